"""The command line, as people who have never read the program use it: help, mistakes, Ctrl-C, a port that is taken."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.copies import copy_program
from tests.support.postgres import held_port
from tests.support.service_process import ROOT, SECRET, environment
from tests.support.settings import PYTHON, URL, run_with_settings
from tests.support.waiting import wait_until

# --- Help, and mistakes ----------------------------------------------------------------------------------------------


def test_help_says_in_a_few_lines_what_one_can_do() -> None:
    helped = run_with_settings([*PYTHON, "--help"], DATABASE_URL="", BETTER_AUTH_SECRET="")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert re.findall(r"service\.py (\w*)", helped.stdout) == ["", "token", "migrate"]
    assert helped.stdout.count("\n") < 20


@pytest.mark.parametrize("arguments", [["sevre"], ["token"]])
def test_a_mistake_is_answered_with_the_usage(arguments: list[str]) -> None:
    refused = run_with_settings([*PYTHON, *arguments])
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "usage: service.py [serve | token USER_ID | migrate | --help]\n"


# --- A port that is taken --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "workers"), [([], "1"), (["serve"], "2")], ids=["no command", "serve"])
def test_a_port_that_is_taken_is_told(arguments: list[str], workers: str, database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = {"DATABASE_URL": database_url, "PORT": str(port), "WEB_CONCURRENCY": workers}
        refused = run_with_settings([*PYTHON, *arguments], **settings)
    assert (refused.returncode, refused.stderr) == (3, "")
    assert os.strerror(errno.EADDRINUSE).lower() in refused.stdout.lower()
    assert workers == "2" or f"('127.0.0.1', {port})" in refused.stdout
    assert "Traceback" not in refused.stdout


@pytest.mark.parametrize("host", ["nowhere.invalid", "203.0.113.7"])
def test_an_address_of_another_machine_is_told(host: str, database_url: str) -> None:
    refused = run_with_settings(PYTHON, DATABASE_URL=database_url, HOST=host, PORT=str(held_port()))
    assert (refused.returncode, refused.stderr) == (3, "")
    assert re.search(rf"^\[Errno -?\d+\] .*({host}|not known|resolution)", refused.stdout, re.MULTILINE), refused.stdout
    assert "Traceback" not in refused.stdout


# --- Ctrl-C, in a terminal -------------------------------------------------------------------------------------------


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str, cwd: Path = ROOT, **variables: str) -> None:
        self.terminal, its_side = pty.openpty()
        os.set_blocking(self.terminal, False)
        self.port = held_port()
        self.printed = ""
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**{"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET, "PORT": str(self.port)} | variables),
            stdin=its_side,
            stdout=its_side,
            stderr=its_side,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(its_side)

    def prints(self, text: str) -> bool:
        with contextlib.suppress(OSError):  # there is nothing to read, now or any more
            while received := os.read(self.terminal, 65_536):
                self.printed += received.decode()
        return text in self.printed

    def press_ctrl_c(self) -> int:
        """Return the exit status that it leads to."""
        for last in (False, True):  # in the middle of an import Python may lose the first one
            os.write(self.terminal, b"\x03")
            with contextlib.nullcontext() if last else contextlib.suppress(AssertionError):
                wait_until(lambda: self.prints("\0") or self.process.poll() is not None, 10)
                break
        self.prints("")
        return self.process.wait()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """A function that starts a command in a terminal."""
    terminals = []

    def start(*command: str, **options: Any) -> Terminal:
        terminals.append(Terminal(*command, **options))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize(
    ("workers", "started"),
    [("1", "Application startup complete"), ("1", "Waiting for application startup"),
     ("2", "Application startup complete")],
)  # fmt: skip
def test_ctrl_c_is_quiet_and_the_log_has_no_colours(
    open_terminal: Callable[..., Terminal], database_url: str, workers: str, started: str
) -> None:
    terminal = open_terminal("python", "service.py", DATABASE_URL=database_url, WEB_CONCURRENCY=workers)
    wait_until(lambda: terminal.prints(started) and terminal.printed.count(started) == int(workers))
    assert terminal.press_ctrl_c() == (130 if workers == "1" else 0)
    assert "Traceback" not in terminal.printed
    assert "\x1b" not in terminal.printed


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is asked of /proc")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_during_the_imports_leaves_no_process(open_terminal: Callable[..., Terminal], workers: str) -> None:
    terminal = open_terminal("python", "service.py", WEB_CONCURRENCY=workers)
    process = psutil.Process(terminal.process.pid)

    def importing() -> bool:
        """Return whether the process, or each of its workers, has begun with the imports of the program."""
        with contextlib.suppress(psutil.NoSuchProcess):
            workers_of_it = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
            serving = [process] if workers == "1" else workers_of_it
            return [any("_ssl" in mapped.path for mapped in each.memory_maps()) for each in serving] == [True] * int(
                workers
            )
        return False

    wait_until(importing)
    children = process.children(recursive=True)
    assert terminal.press_ctrl_c() in (-signal.SIGINT, 130, 0)
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_ctrl_c_ends_a_migration_quietly(open_terminal: Callable[..., Terminal]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a database that never answers
        url = f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/db"
        terminal = open_terminal("python", "service.py", "migrate", DATABASE_URL=url)
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            assert terminal.press_ctrl_c() == 130
    assert terminal.printed.strip() == "^C"


# --- uvicorn's own command -------------------------------------------------------------------------------------------


def test_uvicorn_reloads_what_was_edited(
    open_terminal: Callable[..., Terminal], database_url: str, tmp_path: Path
) -> None:
    copy_program(tmp_path)
    port = str(held_port())
    command = ["uvicorn", "service:app", "--reload", "--no-access-log", "--port", port]
    terminal = open_terminal(*command, cwd=tmp_path, DATABASE_URL=database_url)

    def version() -> object:
        terminal.prints("")  # or what nobody reads would hold it up
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health").json()["version"]
        return None

    wait_until(version)
    source = (tmp_path / "service.py").read_text()
    edited = source.replace('VERSION = "', 'VERSION = "edited-')
    assert edited != source

    def is_reloaded() -> bool:
        """Edit the program anew, since the reloader begins to watch only after it has started the service."""
        if time.time() > (tmp_path / "service.py").stat().st_mtime + 3:
            (tmp_path / "service.py").write_text(edited)
        return str(version()).startswith("edited-")

    wait_until(is_reloaded, 30)
    wait_until(lambda: terminal.prints('method=GET path="/health" status=200'))
    assert terminal.press_ctrl_c() == 0
    assert "Traceback" not in terminal.printed
