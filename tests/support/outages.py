"""Databases in trouble, and the answers then."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.database import OTHERS, PASSWORD, UNAVAILABLE, execute, name_of, terminate, url_as, wait_for_backends
from tests.support.postgres import Postgres
from tests.support.service_process import Client, Service
from tests.support.waiting import wait_until

IDLE = 5
"""How many connections at least a test makes the pool hold."""


def create_database(server: Postgres, options: str = "") -> str:
    """Create a database and return its URL, with a password that no log may show."""
    name = f"tasks_{uuid.uuid4().hex[:12]}"
    execute(server.url(), f"CREATE DATABASE {name} {options}")
    return url_as("postgres", server.url(name))


def assert_unharmed(log: str) -> None:
    """Assert that a service has met no bug and told no secret."""
    assert not re.search(f"Traceback|status=500|{PASSWORD}", log), log


def drop_connections(service: Service) -> None:
    """Terminate the backends of a service, and let it take notice."""
    terminate(service.database_url)
    let_notice(service)


def let_notice(service: Service) -> None:
    """Give a service the turns of its event loop in which it sees what has been closed."""
    for _ in range(2):
        assert httpx.get(f"{service.url}/health").status_code == 200


HELD = "wait_event = 'PgSleep'"


@contextmanager
def database_setting(postgres: Postgres, service: Service, name: str, value: str) -> Iterator[None]:
    """Have the sessions of a service begin with a setting."""
    database = f"ALTER DATABASE {name_of(service.database_url)}"
    try:
        execute(postgres.url(), f"{database} SET {name} = '{value}'")
        drop_connections(service)
        yield
    finally:
        execute(postgres.url(), f"{database} RESET {name}")
        drop_connections(service)


HOLD = """
    CREATE TABLE gate AS SELECT false AS is_open;
    CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        WHILE NOT (SELECT is_open FROM gate) LOOP
            PERFORM pg_sleep(0.02);
        END LOOP;
        RETURN CASE WHEN TG_OP = 'DELETE' THEN old ELSE new END;
    END $$;
    CREATE TRIGGER hold_new BEFORE INSERT OR UPDATE ON task
    FOR EACH ROW WHEN (new.user_id = '{user_id}') EXECUTE FUNCTION hold();
    CREATE TRIGGER hold_old BEFORE DELETE ON task
    FOR EACH ROW WHEN (old.user_id = '{user_id}') EXECUTE FUNCTION hold();
"""
LET_GO = "DROP FUNCTION hold CASCADE; DROP TABLE gate"


@contextmanager
def held_writes(url: str, user_id: str | None) -> Iterator[None]:
    """Have the statements of a user's writes take until the end of this."""
    execute(url, HOLD.replace("{user_id}", str(user_id)))
    try:
        yield
        execute(url, "UPDATE gate SET is_open = true")
        wait_until(lambda: not execute(url, f"SELECT pid {OTHERS} AND {HELD}"))
    finally:
        execute(url, LET_GO)


def fill_pool(service: Service, client: Client) -> int:
    """Make the service hold several idle connections, and return how many there are in its database."""
    url = service.database_url
    paths = [f"/api/tasks/{client.create()['id']}" for _ in range(3)]
    writes = [("POST", "/api/tasks"), ("POST", "/api/tasks"), ("PUT", paths[0]), ("PUT", paths[1])]
    writes.append(("PATCH", f"{paths[2]}/complete"))
    with ThreadPoolExecutor(len(writes)) as executor:
        answers = []
        with held_writes(url, client.user_id):
            for number, (method, path) in enumerate(writes):
                body = None if method == "PATCH" else {"title": "x"}
                answers.append(executor.submit(client.request, method, path, json=body))
                wait_for_backends(url, HELD, number + 1)  # or it could share a message with the next one
        tasks = [answer.result().json() for answer in answers]
    for task in tasks:
        assert client.delete(f"/api/tasks/{task['id']}").status_code == 204
    [(connections,)] = execute(url, f"SELECT count(*) {OTHERS}")
    assert connections >= IDLE
    return int(connections)


def requests_for(task_id: int) -> list[tuple[str, str, Any]]:
    """Return one valid request for each of the task endpoints."""
    return [
        ("GET", "/api/tasks", None),
        ("POST", "/api/tasks", {"title": "must not be"}),
        ("GET", f"/api/tasks/{task_id}", None),
        ("PUT", f"/api/tasks/{task_id}", {"title": "must not be"}),
        ("PATCH", f"/api/tasks/{task_id}/complete", None),
        ("DELETE", f"/api/tasks/{task_id}", None),
    ]


def assert_unavailable(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.json() == UNAVAILABLE
    assert int(response.headers["retry-after"]) > 0


def assert_all_unavailable(service: Service, client: Client, reason: str, task_id: int = 1) -> None:
    """Assert that every endpoint that needs the database answers 503, and says why in its one line of the log."""
    assert_unavailable(client.get("/health/ready"))
    for number, (method, path, body) in enumerate(requests_for(task_id)):
        request_id = f"{uuid.uuid4().hex}-{number}"
        response = client.request(method, path, json=body, headers={"X-Request-ID": request_id})
        assert_unavailable(response)
        assert re.search(reason, service.log_line(request_id)), service.log_line(request_id)


def assert_only_the_database_is_missed(client: Client, nobody: Client) -> None:
    """Assert that what can be answered without the database is answered as ever."""
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert nobody.get(path).status_code == 200
    assert nobody.get("/api/tasks").json() == {"detail": "Not authenticated"}
    assert client.get("/api/nothing").status_code == 404
    assert client.get("/api/tasks/abc").status_code == 422
    assert client.post("/api/tasks", json={}).status_code == 422
    assert client.post("/api/tasks", content=b"{").status_code == 400


def assert_healed(service: Service, client: Client, tasks: list[dict[str, Any]]) -> None:
    """Assert that the tasks are as they were, and that a new one can be made, changed and deleted."""
    service.wait_until_ready()
    assert client.tasks() == tasks
    path = f"/api/tasks/{client.create()['id']}"
    assert client.patch(f"{path}/complete").json()["completed"] is True
    assert client.delete(path).status_code == 204
