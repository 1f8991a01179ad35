"""HAProxy, as what stands before the service."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Self

from tests.support.postgres import listens
from tests.support.waiting import wait_until

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/local/bin:/opt/homebrew/bin:" + os.environ.get("PATH", ""))


class HAProxy:
    """HAProxy with a configuration, in which {address} is where it listens. `log` is what it has printed."""

    def __init__(self, configuration: str, folder: Path, **values: object) -> None:
        self.folder = folder
        self.output = folder / "log"
        with socket.socket() as listener, self.output.open("wb") as output:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
            address = f"fd@{listener.fileno()}"  # which it inherits, so that nobody else can get the port
            (folder / "configuration").write_text(configuration.format(folder=folder, address=address, **values))
            self.process = subprocess.Popen(
                [str(HAPROXY), "-db", "-f", folder / "configuration"],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[listener.fileno()],
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.output.read_text()

    def __enter__(self) -> Self:
        try:
            wait_until(lambda: listens(self.port), otherwise=lambda: self.log)
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
