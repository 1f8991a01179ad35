"""Statements that are lost half way, that wait for a lock, or that a hanging database never answers."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from sql.database import CALL_TIMEOUT
from tests.support.database import OTHERS, connect, locked, wait_for_backends
from tests.support.fixtures import StartService
from tests.support.outages import (
    HELD,
    assert_healed,
    assert_unavailable,
    create_database,
    database_setting,
    fill_pool,
    held_writes,
    requests_for,
)
from tests.support.postgres import Postgres
from tests.support.service_process import Client, Service

WAITS_FOR_A_LOCK = "wait_event_type = 'Lock'"

SHORT = 1.5
HASTY: dict[str, object] = dict.fromkeys(
    ["service.CALL_TIMEOUT", "sql.CALL_TIMEOUT", "sql.database.CALL_TIMEOUT"], SHORT
)
"""Constants of a service in which a call may take that many seconds."""


@pytest.fixture(scope="module")
def service(server: Postgres) -> Iterator[Service]:
    """A hasty one, so that the tests need not wait for as long as its clients would."""
    service = Service(create_database(server), constants=HASTY, wait=False)
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.remove()


def test_a_call_may_take_eight_seconds() -> None:
    assert CALL_TIMEOUT == 8


def locked_row(url: str, task: dict[str, Any]) -> Any:
    return locked(url, f"SELECT FROM task WHERE user_id = '{task['user_id']}' AND id = {task['id']} FOR UPDATE")


# --- Lost in the middle of a statement


TERMINATE = "pg_terminate_backend(pid, 10000)"


def test_a_read_whose_backend_is_terminated_is_sent_again(url: str, alice: Client) -> None:
    task = alice.create()
    with ThreadPoolExecutor(1) as executor:
        with locked(url, "LOCK TABLE task IN ACCESS EXCLUSIVE MODE"):
            answer = executor.submit(alice.tasks)
            wait_for_backends(url, WAITS_FOR_A_LOCK, action=TERMINATE)
            wait_for_backends(url, WAITS_FOR_A_LOCK)
        assert answer.result() == [task]


def test_a_write_whose_backend_is_terminated_is_a_503_and_not_sent_again(
    service: Service, url: str, alice: Client
) -> None:
    """Nobody can know how far it came."""
    task, other = alice.create(), alice.create()
    writes = [request for request in requests_for(task["id"]) if request[0] != "GET"]
    with ThreadPoolExecutor(1) as executor, held_writes(url, alice.user_id):
        for method, path, body in writes:
            headers = {"X-Request-ID": uuid.uuid4().hex}
            answer = executor.submit(alice.request, method, path, json=body, headers=headers)
            wait_for_backends(url, HELD, action=TERMINATE)
            assert_unavailable(answer.result())
            reason = "terminating connection due to administrator command"
            assert reason in service.log_line(headers["X-Request-ID"])
    assert len(writes) == 4
    assert_healed(service, alice, [other, task])


def test_a_write_that_is_cancelled_is_sent_once_more_and_then_a_503(service: Service, url: str, alice: Client) -> None:
    """SQLSTATE 57014, of which the first may have been meant for another call in the same message."""
    task, other = alice.create(), alice.create()
    writes = [request for request in requests_for(task["id"]) if request[0] != "GET"]
    with ThreadPoolExecutor(1) as executor, held_writes(url, alice.user_id):
        for method, path, body in writes:
            headers = {"X-Request-ID": uuid.uuid4().hex}
            answer = executor.submit(alice.request, method, path, json=body, headers=headers)
            began = "-infinity"
            for _ in range(2):
                condition = f"{HELD} AND query_start > '{began}'"
                began = wait_for_backends(url, condition, action="query_start::text, pg_cancel_backend(pid)")
            assert_unavailable(answer.result())
            assert "QueryCanceledError" in service.log_line(headers["X-Request-ID"])
    assert_healed(service, alice, [other, task])


def complete(
    executor: ThreadPoolExecutor, client: Client, task: dict[str, Any], request_id: str
) -> Future[httpx.Response]:
    """Toggle a task in another thread."""
    path = f"/api/tasks/{task['id']}/complete"
    return executor.submit(client.patch, path, headers={"X-Request-ID": request_id})


def test_a_time_limit_of_the_database_is_a_503(
    postgres: Postgres, service: Service, url: str, alice: Client, bob: Client
) -> None:
    task, other = alice.create(), alice.create()
    with (
        database_setting(postgres, service, "statement_timeout", "200ms"),
        ThreadPoolExecutor(1) as executor,
        held_writes(url, alice.user_id),
    ):
        assert_unavailable(complete(executor, alice, task, request_id := uuid.uuid4().hex).result())
        assert bob.create()["user_id"] == bob.user_id
    assert "QueryCanceledError: canceling statement due to statement timeout" in service.log_line(request_id)
    assert_healed(service, alice, [other, task])


def test_terminating_backends_under_load_gives_nothing_but_503(service: Service, url: str) -> None:
    finished = threading.Event()

    def work(user_id: str) -> tuple[set[int], int, int]:
        """Use one task after the other; return the statuses, and how many tasks there must and may be at the end."""
        statuses, must, may = set(), 0, 0
        with service.client(user_id) as client:
            while not finished.is_set():
                created = client.post("/api/tasks", json={"title": "x"})
                path = f"/api/tasks/{created.json().get('id', 0)}"
                read = client.get("/api/tasks")
                changed = client.patch(f"{path}/complete")
                for response in (created, read, changed):
                    statuses.add(response.status_code)
                    if response.status_code == 503:
                        assert_unavailable(response)
                must += created.status_code == 201
                may += created.status_code in (201, 503)  # of a lost connection nobody knows how far it came
        return statuses, must, may

    users = [uuid.uuid4().hex for _ in range(4)]
    with ThreadPoolExecutor(len(users)) as executor:
        answers = [executor.submit(work, user) for user in users]
        until = time.monotonic() + 1
        with connect(url) as connection:
            while time.monotonic() < until:
                connection.execute(f"SELECT pg_terminate_backend(pid) {OTHERS}".encode())
                time.sleep(0.02)
        finished.set()
        results = [answer.result() for answer in answers]

    assert {503} < set().union(*(statuses for statuses, _, _ in results)) <= {200, 201, 404, 503}
    for user, (_, must, may) in zip(users, results, strict=True):
        with service.client(user) as client:
            assert must <= len(client.tasks()) <= may


# --- Locks, and a pool without a free connection


TOO_LONG = 'error="TimeoutError: it took too long"'


def test_a_locked_row_holds_up_nobody_else(service: Service, url: str, alice: Client, bob: Client) -> None:
    task, other, bobs = alice.create(), alice.create(), bob.create()
    with ThreadPoolExecutor(1) as executor, locked_row(url, task):
        started = time.monotonic()
        answer = complete(executor, alice, task, request_id := uuid.uuid4().hex)
        wait_for_backends(url, WAITS_FOR_A_LOCK)
        assert alice.tasks() == [other, task]
        assert alice.get(f"/api/tasks/{task['id']}").json() == task
        assert bob.patch(f"/api/tasks/{bobs['id']}/complete").json()["completed"] is True
        assert alice.patch(f"/api/tasks/{other['id']}/complete").json()["completed"] is True
        assert not answer.done()
        assert_unavailable(answer.result())
        assert SHORT - 0.1 < time.monotonic() - started < SHORT + 3
    assert TOO_LONG in service.log_line(request_id)
    assert alice.get(f"/api/tasks/{task['id']}").json() == task
    assert alice.patch(f"/api/tasks/{task['id']}/complete").json()["completed"] is True


def test_a_change_of_a_locked_row_is_made_when_the_row_is_let_go(url: str, alice: Client) -> None:
    task = alice.create()
    with ThreadPoolExecutor(1) as executor:
        with locked_row(url, task):
            answer = complete(executor, alice, task, uuid.uuid4().hex)
            wait_for_backends(url, WAITS_FOR_A_LOCK)
            assert not answer.done()
        assert answer.result().json()["completed"] is True
    assert alice.get(f"/api/tasks/{task['id']}").json() == answer.result().json()


def test_a_table_that_is_locked_is_a_503_for_who_has_to_wait_for_it(
    service: Service, url: str, alice: Client, bob: Client
) -> None:
    """Reads go on while nobody may write, as during CREATE INDEX; and nobody may do anything during ALTER TABLE."""
    task, bobs = alice.create(), bob.create()
    for mode, waits in (("SHARE", "POST PUT PATCH DELETE"), ("ACCESS EXCLUSIVE", "GET POST PUT PATCH DELETE")):
        requests = [request for request in requests_for(task["id"]) if request[0] in waits.split()]
        with ThreadPoolExecutor(len(requests)) as executor, locked(url, f"LOCK TABLE task IN {mode} MODE"):
            started, answers = time.monotonic(), {}
            for method, path, body in requests:
                headers = {"X-Request-ID": uuid.uuid4().hex}
                answer = executor.submit(alice.request, method, path, json=body, headers=headers)
                answers[headers["X-Request-ID"]] = answer
            wait_for_backends(url, WAITS_FOR_A_LOCK)
            if mode == "SHARE":
                for _ in range(20):
                    assert bob.tasks() == [bobs]
                    assert alice.get(f"/api/tasks/{task['id']}").json() == task
            assert not any(answer.done() for answer in answers.values())
            for request_id, answer in answers.items():
                assert_unavailable(answer.result())
                assert TOO_LONG in service.log_line(request_id)
            assert time.monotonic() - started < SHORT + 3
        assert_healed(service, alice, [task])


def test_a_pool_without_a_free_connection_is_a_503_in_time(postgres: Postgres, url: str, start: StartService) -> None:
    service = start(url, DATABASE_POOL_SIZE="1", constants=HASTY)
    with (
        service.client(uuid.uuid4().hex) as alice,
        service.client(uuid.uuid4().hex) as bob,
        ThreadPoolExecutor(3) as executor,
    ):
        task, bobs = alice.create(), bob.create()
        with postgres.suspended():
            started = time.monotonic()
            answer = complete(executor, alice, task, "has the connection")
            waiting = executor.submit(bob.get, "/api/tasks", headers={"X-Request-ID": "waits for it"})
            ready = executor.submit(bob.get, "/health/ready")
            assert bob.get("/health").status_code == 200
            for response in (answer, waiting, ready):
                assert_unavailable(response.result())
            assert time.monotonic() - started < SHORT + 4
        for request_id in ("has the connection", "waits for it"):
            assert TOO_LONG in service.log, request_id
        service.wait_until_ready()
        assert bob.tasks() == [bobs]
        assert [each["id"] for each in alice.tasks()] == [task["id"]]


def test_a_pool_of_one_connection_serves_others_while_a_change_waits_for_a_lock(url: str, start: StartService) -> None:
    service = start(url, DATABASE_POOL_SIZE="1", constants=HASTY)
    with (
        service.client(uuid.uuid4().hex) as alice,
        service.client(uuid.uuid4().hex) as bob,
        ThreadPoolExecutor(1) as executor,
    ):
        task, bobs = alice.create(), bob.create()
        with locked_row(url, task):
            answer = complete(executor, alice, task, "locked")
            wait_for_backends(url, WAITS_FOR_A_LOCK)
            for _ in range(20):
                assert bob.tasks() == [bobs]
                assert bob.get("/health/ready").status_code == 200
            assert not answer.done()
        assert answer.result().json()["completed"] is True


# --- A database that hangs


def test_requests_are_answered_in_time_while_the_database_hangs(
    postgres: Postgres, service: Service, alice: Client
) -> None:
    """More of them than the pool has connections.

    What became of the readiness check's query, long after its answer, must not show up in the log.
    """
    task = alice.create()
    fill_pool(service, alice)
    with ThreadPoolExecutor(20) as executor, postgres.suspended():
        assert_unavailable(alice.get("/health/ready"))
        started = time.monotonic()
        answers = [executor.submit(alice.get, "/api/tasks") for _ in range(20)]
        for answer in answers:
            assert_unavailable(answer.result())
        assert time.monotonic() - started < SHORT + 4
    assert_healed(service, alice, [task])
