"""The service as a real process, started by the line of the Procfile, and clients for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import httpx
import jwt
import psutil
import psycopg

from tests.support.postgres import held_port
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SECRET = "a secret for the tests, of 32 characters or more"


def procfile_line(process_type: str) -> str:
    """Return the command of a process type, without the `exec` that it begins with: callers put more before it."""
    for line in (ROOT / "Procfile").read_text().splitlines():
        name, _, command = line.partition(":")
        if name == process_type:
            assert command.startswith(" exec ")
            return command.strip().removeprefix("exec ")
    raise AssertionError(f"the Procfile has no {process_type}")


SETTINGS = {
    "DATABASE_URL", "DATABASE_POOL_SIZE", "BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET_OLD", "BETTER_AUTH_URL", "JWKS_URL",
    "JWT_AUDIENCE", "JWT_ISSUER", "CORS_ORIGINS", "HOST", "PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS",
    "VIRTUAL_ENV",
}  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    """Return the environment with these settings and none of the developer's own."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS and not name.startswith("PG")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of a thousand starts would compile all that it imports
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path} | variables


def run_command(
    command: list[str],
    settings: Mapping[str, str] | None = None,
    *,
    folder: Path = ROOT,
    user: str | None = None,
    seconds: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with these settings and none of the developer's own."""
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**settings or {}),
        user=user,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )


def release(database_url: str) -> subprocess.CompletedProcess[str]:
    """Run the Procfile's release line."""
    command = ["sh", "-c", procfile_line("release")]
    return run_command(command, {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET})


def new_user_id() -> str:
    return f"user-{uuid.uuid4().hex}"


class Client(httpx.Client):
    """An HTTP client of the service that sends the token of a user, if one is given."""

    def __init__(self, url: str, user_id: str | None = None, **options: Any) -> None:
        headers = {} if user_id is None else {"Authorization": f"Bearer {token(user_id)}"}
        # Without verify=False each client would load the machine's certificates, which takes longer than most tests.
        options = {"timeout": 30, "verify": False} | options
        super().__init__(base_url=url, headers=headers | options.pop("headers", {}), **options)
        self.user_id = user_id

    def create(self, title: str = "a task", **fields: Any) -> dict[str, Any]:
        """Create a task and return it."""
        response = self.post("/api/tasks", json={"title": title} | fields)
        assert response.status_code == 201, response.text
        task: dict[str, Any] = response.json()
        return task

    def tasks(self, status: str = "all") -> list[dict[str, Any]]:
        """Return the user's tasks."""
        response = self.get("/api/tasks", params={"status": status})
        assert response.status_code == 200, response.text
        items: list[dict[str, Any]] = response.json()["items"]
        return items


def answers(client: httpx.Client, path: str = "/health/ready") -> bool:
    """Return whether there is a service, and what it answers is a 200."""
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


class Service:
    """A running service. `log` is what it has printed so far, both streams together."""

    def __init__(
        self,
        database_url: str,
        *,
        folder: Path = ROOT,
        launcher: str = "",
        constants: dict[str, object] | None = None,
        wait: bool = True,
        **variables: str,
    ) -> None:
        """Start the Procfile's line, by another command if one is given, and with other constants of its modules."""
        self.database_url = database_url
        self.port = held_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = Path(tempfile.mkstemp(prefix="tasks-service-", suffix=".log")[1])
        settings = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "PORT": str(self.port)}
        line = procfile_line("web").replace("python", f"{launcher} python")
        if constants:
            settings["TEST_CONSTANTS"] = json.dumps(constants)
            line = line.replace("-m service", str(ROOT / "tests" / "support" / "launcher.py"))
            assert "launcher" in line
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["sh", "-c", f"exec env {line}"],
                cwd=folder,
                env=environment(**settings | variables),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            try:
                self.wait_until_healthy()
            except AssertionError:
                self.remove()
                raise

    @property
    def log(self) -> str:
        return self.output.read_text()

    @property
    def memory(self) -> float:
        """The megabytes that its first process has in memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)

    def wait_until_healthy(self, seconds: float = 20) -> None:
        self.wait_for("/health", seconds)

    def wait_until_ready(self, seconds: float = 20) -> None:
        self.wait_for("/health/ready", seconds)

    def wait_for(self, path: str, seconds: float) -> None:
        with self.client(timeout=5) as client:
            wait_until(lambda: answers(client, path) or self.process.poll() is not None, seconds, lambda: self.log)
        assert self.process.poll() is None, self.log

    def log_line(self, request_id: str, seconds: float = 5) -> str:
        """Return the line of the log that has this request id."""
        line = re.compile(rf"^method=.* id={re.escape(request_id)}( .*)?$", re.MULTILINE)
        found = wait_until(lambda: line.search(self.log), seconds, lambda: f"no line with {request_id}:\n{self.log}")
        assert found
        return found[0]

    def sql(self, statement: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        """Send a statement to the service's database, as another of its users would, and return the rows."""
        with psycopg.connect(self.database_url) as connection:
            cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def rows(self, *clients: Client) -> list[tuple[Any, ...]]:
        """Return all that the database holds of the clients' tasks."""
        users = [client.user_id for client in clients]
        return self.sql("SELECT * FROM task WHERE user_id = ANY(%s) ORDER BY user_id, id", users)

    def client(self, user_id: str | None = None, **options: Any) -> Client:
        """Return a client with a user's token, or without any."""
        return Client(self.url, user_id, **options)

    def stop(self, how: signal.Signals = signal.SIGTERM, seconds: float = 30) -> int:
        """Stop the service by a signal and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise

    def remove(self) -> None:
        self.stop()
        self.output.unlink(missing_ok=True)


@contextmanager
def running(database_url: str) -> Iterator[Service]:
    """A service that is ready, and that is gone afterwards, come what may."""
    service = Service(database_url, wait=False)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.remove()


def token(user_id: Any = "somebody", *, secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a token that is valid for an hour; a claim that is given as None is left out."""
    now = int(time.time())
    payload = {"sub": user_id, "iat": now, "exp": now + 3600} | claims
    return jwt.encode(
        {name: value for name, value in payload.items() if value is not None}, secret, algorithm=algorithm
    )
