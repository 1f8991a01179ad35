"""A deployed service: its workers, its signals, and rows that are locked meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tomllib

import psutil
import psycopg
from packaging.utils import canonicalize_name

from tests.support.service_process import ROOT, Service
from tests.support.waiting import wait_until


def workers_of(service: Service) -> list[psutil.Process]:
    """Return the processes that serve: the workers, or the service itself where it has none."""
    process = psutil.Process(service.process.pid)
    workers = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers or [process]


def wait_until_locked_rows_are_tried(database_url: str, count: int) -> None:
    """Return when that many rows, which somebody else has locked, have been waited for, though not all at once.

    No statement waits for long: it is sent again and again, until a request has taken too long.
    """
    tried: set[object] = set()
    query = "SELECT relation, page, tuple FROM pg_locks WHERE locktype = 'tuple' AND granted"
    with psycopg.connect(database_url, autocommit=True) as connection:

        def all_are_tried() -> bool:
            tried.update(connection.execute(query).fetchall())
            return len(tried) >= count

        wait_until(all_are_tried, 7, lambda: f"{len(tried)} rows have been waited for")


def send_sigterm(service: Service, everybody: bool) -> None:
    """Send SIGTERM as platforms do: to the process that they started, or, as Heroku does, to all of them at once."""
    if everybody:
        os.killpg(service.process.pid, signal.SIGTERM)
    else:
        service.process.terminate()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked_versions() -> dict[str, str]:
    """Return the version of each package in requirements.txt."""
    text = re.sub(r"#.*|\\\n", "", (ROOT / "requirements.txt").read_text())
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"([a-zA-Z0-9._-]+)==(\S+?)( ;[^;]*?)?(\s+--hash=sha256:[0-9a-f]{64})+", line)
        assert match, line  # pinned, with hashes, and from the package index
        found[canonicalize_name(match[1])] = match[2]
    return {str(name): version for name, version in found.items()}
