"""What a client sees while the database is away, full, locked, read-only or hanging: a 503 in time, and never a 500."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGQUIT, SIGTERM
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import pytest

from sql import TIMEOUT
from tests.support.outages import UNAVAILABLE, connect, execute
from tests.support.postgres import Postgres, free_port
from tests.support.service_process import ROOT, Client, Service, running, token

PASSWORD = "hunter2-of-the-tests"
IDLE = 5
"""How many connections at least a test makes the pool hold."""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server of this module's own. What it has committed survives a kill."""
    server = Postgres(max_connections="40", synchronous_commit="on", autovacuum="off")
    yield server
    server.remove()


@pytest.fixture
def postgres(server: Postgres) -> Iterator[Postgres]:
    """The server, running, whatever the test before has done to it."""
    yield server
    assert server.process
    if server.process.poll() is not None:
        server.start()


def create_database(server: Postgres, options: str = "") -> str:
    """Create a database and return its URL, with a password that no log may show."""
    name = f"tasks_{uuid.uuid4().hex[:12]}"
    execute(server.url(), f"CREATE DATABASE {name} {options}")
    return url_as("postgres", server.url(name))


@pytest.fixture(scope="module")
def service(server: Postgres) -> Iterator[Service]:
    """One service that lives through the troubles of most tests here; `alice`, `bob` and `nobody` are its clients."""
    with running(create_database(server)) as service:
        yield service


@pytest.fixture
def url(service: Service) -> str:
    """The URL of its database."""
    return service.database_url


@pytest.fixture(autouse=True)
def _service_is_unharmed(postgres: Postgres, service: Service) -> Iterator[None]:
    before = len(service.log)
    yield
    assert_unharmed(service.log[before:])


@pytest.fixture
def start(start_service: Callable[..., Service]) -> Iterator[Callable[..., Service]]:
    """A function that starts a service of the test's own."""
    services = []

    def start(url: str, *, ready: bool = True, **options: Any) -> Service:
        services.append(start_service(url, **options))
        if ready:
            services[-1].wait_until_ready()
        return services[-1]

    yield start
    for service in services:
        assert_unharmed(service.log)


def assert_unharmed(log: str) -> None:
    """Assert that a service has met no bug and told no secret."""
    assert not re.search(f"Traceback|status=500|{PASSWORD}", log), log


def url_as(role: str, url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}:{PASSWORD}@{parts.hostname}:{parts.port}").geturl()


def name_of(url: str) -> str:
    return urlsplit(url).path.removeprefix("/")


OTHERS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def terminate(url: str, condition: str = "true") -> None:
    """Terminate the backends of everybody else in this database, and wait until they are gone."""
    execute(url, f"SELECT pg_terminate_backend(pid, 10000) {OTHERS} AND {condition}")


def drop_connections(service: Service) -> None:
    """Terminate the backends of a service, and let it take notice."""
    terminate(service.database_url)
    let_notice(service)


def let_notice(service: Service) -> None:
    """Give a service the turns of its event loop in which it sees what has been closed."""
    for _ in range(2):
        assert httpx.get(f"{service.url}/health").status_code == 200


def wait_for(url: str, condition: str, action: str = "pid") -> Any:
    """Wait until a backend of somebody else is in a condition, do something to it, and return what comes of that."""
    for _ in range(1000):
        if found := execute(url, f"SELECT {action} {OTHERS} AND {condition}"):
            return found[0][0]
        time.sleep(0.01)
    raise AssertionError(f"a backend should be seen with {condition}")


WAITS_FOR_A_LOCK = "wait_event_type = 'Lock'"
HELD = "wait_event = 'PgSleep'"


@contextmanager
def locked(url: str, statement: str) -> Iterator[None]:
    """Hold the lock that a statement takes."""
    with psycopg.connect(url) as connection:
        connection.execute(statement.encode())
        yield
        connection.rollback()


def locked_row(url: str, task: dict[str, Any]) -> Any:
    return locked(url, f"SELECT FROM task WHERE user_id = '{task['user_id']}' AND id = {task['id']} FOR UPDATE")


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


@contextmanager
def threads(count: int = 1) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(count) as executor:
        yield executor


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
        for _ in range(1000):
            if not execute(url, f"SELECT pid {OTHERS} AND {HELD}"):
                break
            time.sleep(0.01)
    finally:
        execute(url, LET_GO)


def fill_pool(service: Service, client: Client) -> int:
    """Make the service hold several idle connections, and return how many there are in its database."""
    url = service.database_url
    paths = [f"/api/tasks/{client.create()['id']}" for _ in range(3)]
    writes = [("POST", "/api/tasks"), ("POST", "/api/tasks"), ("PUT", paths[0]), ("PUT", paths[1])]
    writes.append(("PATCH", f"{paths[2]}/complete"))
    with threads(len(writes)) as executor:
        answers = []
        with held_writes(url, client.user_id):
            for number, (method, path) in enumerate(writes):
                body = None if method == "PATCH" else {"title": "x"}
                answers.append(executor.submit(client.request, method, path, json=body))
                for _ in range(1000):  # or it could share a message with the next one
                    if len(execute(url, f"SELECT pid {OTHERS} AND {HELD}")) > number:
                        break
                    time.sleep(0.01)
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


# --- At start


@pytest.mark.fault
def test_a_service_that_is_there_before_its_server_heals_by_itself(
    postgres: Postgres, start: Callable[..., Service], figures: Callable[[str, str], None]
) -> None:
    url = create_database(postgres)
    postgres.stop()
    service = start(url, ready=False)
    with service.client("alice") as alice, service.client() as nobody:
        assert_all_unavailable(service, alice, "the schema has not been applied yet")
        assert_only_the_database_is_missed(alice, nobody)
        assert service.log.count("waiting for the database: ConnectionRefusedError") == 1
        postgres.start()
        back = time.monotonic()
        assert_healed(service, alice, [])
        seconds = time.monotonic() - back
    figures(
        "The database is absent at boot",
        f"`/health` 200, `/health/ready` and `/api` 503; schema and all {seconds:.1f} s after it appeared",
    )


@pytest.mark.long
def test_a_service_that_is_there_before_its_database_heals_by_itself(
    postgres: Postgres, start: Callable[..., Service]
) -> None:
    name = f"tasks_{uuid.uuid4().hex[:12]}"
    service = start(url_as("postgres", postgres.url(name)), ready=False)
    with service.client("alice") as alice:
        assert_all_unavailable(service, alice, "the schema has not been applied yet")
        reason = f'waiting for the database: InvalidCatalogNameError: database "{name}" does not exist'
        assert service.log.splitlines().count(reason) == 1
        execute(postgres.url(), f"CREATE DATABASE {name}")
        assert_healed(service, alice, [])


def test_a_service_can_start_on_a_read_only_database(
    postgres: Postgres, service: Service, url: str, alice: Client, start: Callable[..., Service]
) -> None:
    task = alice.create()
    with (
        database_setting(postgres, service, "default_transaction_read_only", "on"),
        start(url).client(alice.user_id) as again,
    ):
        assert again.tasks() == [task]
        assert_unavailable(again.post("/api/tasks", json={"title": "x"}))


@pytest.mark.long
def test_a_service_can_start_on_a_server_that_does_not_answer(start: Callable[..., Service]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        service = start(url_as("postgres", f"postgresql://127.0.0.1:{silent.getsockname()[1]}/tasks"), ready=False)
        with service.client("alice") as alice, service.client() as nobody:
            assert_all_unavailable(service, alice, "the schema has not been applied yet")
            assert_only_the_database_is_missed(alice, nobody)
            timed_out = "waiting for the database: TimeoutError: .+"
            for _ in range(400):  # the first try ends after ten seconds, of which a start waits three
                if re.search(timed_out, service.log):
                    break
                time.sleep(0.05)
            assert len(re.findall(timed_out, service.log)) == 1


# --- Away, and back again


DISRUPTIONS: dict[str, Callable[[Postgres], None]] = {
    "stopped": lambda postgres: postgres.stop(),
    "stopped at once": lambda postgres: postgres.stop(SIGQUIT),
    "killed": lambda postgres: postgres.kill(),
}


@pytest.mark.parametrize("disrupt", DISRUPTIONS.values(), ids=DISRUPTIONS)
def test_a_database_that_is_down_is_a_503_until_it_is_back(
    postgres: Postgres,
    service: Service,
    alice: Client,
    bob: Client,
    nobody: Client,
    disrupt: Callable[[Postgres], None],
) -> None:
    tasks, bobs = [alice.create()], [bob.create()]
    disrupt(postgres)
    assert_all_unavailable(service, alice, "ConnectionRefusedError", tasks[0]["id"])
    assert_only_the_database_is_missed(alice, nobody)
    postgres.start()
    assert_healed(service, alice, tasks)
    assert bob.tasks() == bobs


def test_a_database_that_takes_no_new_connections_is_a_503(
    postgres: Postgres, service: Service, url: str, alice: Client
) -> None:
    """A smart shutdown waits for the sessions that are there: SQLSTATE 57P03, which a starting server says too."""
    task = alice.create()
    with connect(url) as session:
        assert postgres.process
        postgres.process.send_signal(SIGTERM)
        session.execute(f"SELECT pg_terminate_backend(pid, 10000) {OTHERS}".encode())
        assert_all_unavailable(service, alice, "CannotConnectNowError: the database system is shutting down")
    postgres.process.wait(30)
    postgres.start()
    assert_healed(service, alice, [task])


def restart(postgres: Postgres, url: str) -> None:
    postgres.stop()
    postgres.start()


def kill_and_start(postgres: Postgres, url: str) -> None:
    postgres.kill()
    postgres.start()


BREAKS: dict[str, Callable[[Postgres, str], None]] = {
    "restarted": restart,
    "killed and started": kill_and_start,
    "its backends terminated": lambda postgres, url: terminate(url),
}

each_break = pytest.mark.parametrize("cut", BREAKS.values(), ids=BREAKS)


@each_break
def test_a_read_survives_the_loss_of_every_idle_connection(
    postgres: Postgres, service: Service, url: str, alice: Client, bob: Client, cut: Callable[[Postgres, str], None]
) -> None:
    task, bobs = alice.create(), bob.create()
    fill_pool(service, alice)
    cut(postgres, url)
    with threads(8) as executor:
        lists = [executor.submit(client.tasks) for client in (alice, bob) * 8]
        assert [answer.result() for answer in lists] == [[task], [bobs]] * 8
    cut(postgres, url)
    assert alice.get("/health/ready").status_code == 200
    for _ in range(IDLE):
        assert alice.get(f"/api/tasks/{task['id']}").json() == task


@each_break
def test_a_write_meets_each_lost_connection_at_most_once(
    postgres: Postgres, service: Service, url: str, alice: Client, bob: Client, cut: Callable[[Postgres, str], None]
) -> None:
    bobs = bob.create()
    lost = fill_pool(service, alice)
    cut(postgres, url)
    created = create_until_healed(alice, lost)
    assert sorted(task["id"] for task in alice.tasks()) == sorted(created)
    assert bob.tasks() == [bobs]


def create_until_healed(client: Client, lost: int) -> list[int]:
    """Create tasks, of which as many may fail as connections were lost, and return the ids of those that did not."""
    responses = [client.post("/api/tasks", json={"title": "x"}) for _ in range(lost + 3)]
    failed = [response for response in responses if response.status_code != 201]
    for response in failed:
        assert_unavailable(response)
    assert len(failed) <= lost
    return [response.json()["id"] for response in responses if response.status_code == 201]


def test_backends_terminated_again_and_again_are_never_noticed_by_reads(url: str, alice: Client) -> None:
    task = alice.create()
    for _ in range(10):
        terminate(url)
        assert alice.tasks() == [task]


def test_sessions_that_the_server_ends_for_idleness_are_not_noticed(
    postgres: Postgres, service: Service, alice: Client
) -> None:
    """SQLSTATE 57P05, and what a database that scales to zero does."""
    with database_setting(postgres, service, "idle_session_timeout", "100ms"):
        task = alice.create()
        for _ in range(2):
            wait_until_alone(service)
            assert alice.tasks() == [task]
        wait_until_alone(service)
        second = alice.create()
        assert alice.tasks() == [second, task]


def wait_until_alone(service: Service) -> None:
    for _ in range(200):
        if execute(service.database_url, f"SELECT count(*) {OTHERS}") == [(0,)]:
            let_notice(service)
            return
        time.sleep(0.05)
    raise AssertionError("the server should have ended the idle sessions")


# --- Idle connections that are lost without a word


class ForgetfulProxy:
    """A TCP proxy that can forget its connections as a firewall does: silently, and with a reset at the next byte."""

    def __init__(self, port: int) -> None:
        self.upstream = ("127.0.0.1", port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.forgotten: set[socket.socket] = set()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.upstream)
                self.pairs.append((client, server))
                threading.Thread(target=self.send_up, args=(client, server), daemon=True).start()
                threading.Thread(target=self.send_down, args=(client, server), daemon=True).start()

    def send_up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), client:
            while content := client.recv(65536):
                if client in self.forgotten:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
                    return
                server.sendall(content)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def send_down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), server:
            while content := server.recv(65536):
                client.sendall(content)
        if client not in self.forgotten:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        for client, server in self.pairs:
            self.forgotten.add(client)
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for one in (self.listener, *(one for pair in self.pairs for one in pair)):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[ForgetfulProxy]:
    proxy = ForgetfulProxy(postgres.port)
    yield proxy
    proxy.close()


@pytest.fixture
def behind_proxy(postgres: Postgres, proxy: ForgetfulProxy, start: Callable[..., Service]) -> Service:
    """A service that reaches its database through the proxy; `database_url` is for the tests, and straight."""
    url = create_database(postgres)
    service = start(url.replace(f":{urlsplit(url).port}/", f":{proxy.port}/"))
    service.database_url = url
    return service


def test_a_read_survives_connections_that_were_forgotten(proxy: ForgetfulProxy, behind_proxy: Service) -> None:
    """The pool cannot see that they are dead, so that the second attempt has to be on a connection that is new."""
    with behind_proxy.client("reader") as alice, behind_proxy.client("another reader") as bob:
        task, bobs = alice.create(), bob.create()
        for _ in range(2):
            fill_pool(behind_proxy, alice)
            proxy.forget()
            assert bob.tasks() == [bobs]
            assert alice.tasks() == [task]
            assert alice.get("/health/ready").status_code == 200
            assert alice.get(f"/api/tasks/{task['id']}").json() == task


def test_a_write_meets_each_forgotten_connection_at_most_once(proxy: ForgetfulProxy, behind_proxy: Service) -> None:
    with behind_proxy.client("writer") as alice, behind_proxy.client("another writer") as bob:
        bobs = bob.create()
        lost = fill_pool(behind_proxy, alice)
        proxy.forget()
        created = create_until_healed(alice, lost)
        assert sorted(task["id"] for task in alice.tasks()) == sorted(created)
        assert bob.tasks() == [bobs]


# --- Lost in the middle of a statement


TERMINATE = "pg_terminate_backend(pid, 10000)"


def test_a_read_whose_backend_is_terminated_is_sent_again(url: str, alice: Client) -> None:
    task = alice.create()
    with threads() as executor:
        with locked(url, "LOCK TABLE task IN ACCESS EXCLUSIVE MODE"):
            answer = executor.submit(alice.tasks)
            wait_for(url, WAITS_FOR_A_LOCK, TERMINATE)
            wait_for(url, WAITS_FOR_A_LOCK)
        assert answer.result() == [task]


def test_a_write_whose_backend_is_terminated_is_a_503_and_not_sent_again(
    service: Service, url: str, alice: Client
) -> None:
    """Nobody can know how far it came."""
    task, other = alice.create(), alice.create()
    writes = [request for request in requests_for(task["id"]) if request[0] != "GET"]
    with threads() as executor, held_writes(url, alice.user_id):
        for method, path, body in writes:
            headers = {"X-Request-ID": uuid.uuid4().hex}
            answer = executor.submit(alice.request, method, path, json=body, headers=headers)
            wait_for(url, HELD, TERMINATE)
            assert_unavailable(answer.result())
            reason = "terminating connection due to administrator command"
            assert reason in service.log_line(headers["X-Request-ID"])
    assert len(writes) == 4
    assert_healed(service, alice, [other, task])


def test_a_write_that_is_cancelled_is_sent_once_more_and_then_a_503(service: Service, url: str, alice: Client) -> None:
    """SQLSTATE 57014, of which the first may have been meant for another call in the same message."""
    task, other = alice.create(), alice.create()
    writes = [request for request in requests_for(task["id"]) if request[0] != "GET"]
    with threads() as executor, held_writes(url, alice.user_id):
        for method, path, body in writes:
            headers = {"X-Request-ID": uuid.uuid4().hex}
            answer = executor.submit(alice.request, method, path, json=body, headers=headers)
            began = "-infinity"
            for _ in range(2):
                condition = f"{HELD} AND query_start > '{began}'"
                began = wait_for(url, condition, "query_start::text, pg_cancel_backend(pid)")
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
        threads() as executor,
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
    with threads(len(users)) as executor:
        answers = [executor.submit(work, user) for user in users]
        until = time.monotonic() + 2
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


# --- Full, forbidden, dropped, read-only


@pytest.mark.fault
def test_a_server_without_a_free_connection_is_a_503(
    postgres: Postgres, service: Service, alice: Client, figures: Callable[[str, str], None]
) -> None:
    """SQLSTATE 53300."""
    task = alice.create()
    others: list[psycopg.Connection[tuple[Any, ...]]] = []
    try:
        take_every_connection(postgres, others)
        others[0].execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname <> 'postgres'")
        take_every_connection(postgres, others)
        assert_all_unavailable(service, alice, "TooManyConnectionsError: .*too many clients already")
    finally:
        for other in others:
            other.close()
    freed = time.monotonic()
    assert_healed(service, alice, [task])
    figures(
        "Others have all the connections of the database",
        f"503; as usual {time.monotonic() - freed:.1f} s after they let go",
    )


def take_every_connection(postgres: Postgres, taken: list[psycopg.Connection[tuple[Any, ...]]]) -> None:
    with suppress(psycopg.OperationalError):
        while True:
            taken.append(connect(postgres.url()))


@pytest.fixture(scope="module")
def role(server: Postgres, service: Service) -> str:
    """A role that has to give its password, and may use the table that is there."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    access = server.folder / "data" / "pg_hba.conf"
    rules = f"host all {name} 127.0.0.1/32 scram-sha-256\nhost all {name}_gone 127.0.0.1/32 trust\n"
    access.write_text(rules + access.read_text())
    execute(server.url(), "SELECT pg_reload_conf()")
    execute(service.database_url, f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'; GRANT ALL ON task TO {name}")
    return name


@pytest.fixture(scope="module")
def service_of_role(service: Service, role: str) -> Iterator[Service]:
    with running(url_as(role, service.database_url)) as service:
        yield service
        assert_unharmed(service.log)


LOCKED_OUT = {
    "another password": ("ALTER ROLE {role} PASSWORD 'other'", f"ALTER ROLE {{role}} PASSWORD '{PASSWORD}'"),
    "no login": ("ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN"),
    "no such role": ("ALTER ROLE {role} RENAME TO {role}_gone", "ALTER ROLE {role}_gone RENAME TO {role}"),
}


@pytest.mark.parametrize(("lock_out", "let_in"), LOCKED_OUT.values(), ids=LOCKED_OUT)
def test_a_role_that_is_not_let_in_is_a_503(
    url: str, role: str, service_of_role: Service, lock_out: str, let_in: str
) -> None:
    """SQLSTATE class 28."""
    with service_of_role.client(uuid.uuid4().hex) as alice:
        task = alice.create()
        execute(url, lock_out.format(role=role))
        try:
            terminate(url)
            let_notice(service_of_role)
            assert_all_unavailable(service_of_role, alice, "Invalid(Password|AuthorizationSpecification)Error")
        finally:
            execute(url, let_in.format(role=role))
        assert_healed(service_of_role, alice, [task])


def test_a_database_that_is_dropped_is_a_503_until_it_is_restored(
    postgres: Postgres, start: Callable[..., Service]
) -> None:
    """SQLSTATE 3D000."""
    url = create_database(postgres)
    service, name = start(url), name_of(url)
    with service.client("alice") as alice:
        task = alice.create()
        drop_connections(service)
        execute(postgres.url(), f"CREATE DATABASE {name}_copy TEMPLATE {name}")
        execute(postgres.url(), f"DROP DATABASE {name} WITH (FORCE)")
        assert_all_unavailable(service, alice, f'InvalidCatalogNameError: database ."{name}." does not exist')
        execute(postgres.url(), f"ALTER DATABASE {name}_copy RENAME TO {name}")
        assert_healed(service, alice, [task])


def test_a_table_that_is_dropped_is_a_503_until_it_is_restored(service: Service, url: str, alice: Client) -> None:
    """SQLSTATE 42P01: pg_restore drops and creates what it restores."""
    task = alice.create()
    execute(url, "CREATE SCHEMA backup; ALTER TABLE task SET SCHEMA backup")
    try:
        assert_all_unavailable(service, alice, "UndefinedTableError")
    finally:
        execute(url, "ALTER TABLE backup.task SET SCHEMA public; DROP SCHEMA backup")
    assert_healed(service, alice, [task])


def test_a_database_that_is_read_only_is_read(postgres: Postgres, service: Service, alice: Client, bob: Client) -> None:
    """SQLSTATE 25006."""
    task, bobs = alice.create(), bob.create()
    with database_setting(postgres, service, "default_transaction_read_only", "on"):
        for method, path, body in requests_for(task["id"]):
            request_id = uuid.uuid4().hex
            response = alice.request(method, path, json=body, headers={"X-Request-ID": request_id})
            if method == "GET":
                assert response.status_code == 200
            else:
                assert_unavailable(response)
                assert "ReadOnlySQLTransactionError" in service.log_line(request_id)
        assert alice.get("/health/ready").status_code == 200
        assert alice.tasks() == [task]
    assert_healed(service, alice, [task])
    assert bob.tasks() == [bobs]


def test_writes_go_on_once_the_database_is_writable_again(
    postgres: Postgres, service: Service, url: str, alice: Client
) -> None:
    """Sessions keep the setting that they began with, and so do connections to a primary that became a standby."""
    task = alice.create()
    with database_setting(postgres, service, "default_transaction_read_only", "on"):
        assert_unavailable(alice.post("/api/tasks", json={"title": "x"}))
        execute(postgres.url(), f"ALTER DATABASE {name_of(url)} RESET default_transaction_read_only")
        first = alice.post("/api/tasks", json={"title": "may meet a session from before"})
        created = [first.json()] if first.status_code == 201 else []
        created.insert(0, alice.create("must not"))
        assert alice.tasks() == [*created, task]


# --- Locks, and a pool without a free connection


TOO_LONG = 'error="TimeoutError: it took too long"'


@pytest.mark.long
def test_a_locked_row_holds_up_nobody_else(service: Service, url: str, alice: Client, bob: Client) -> None:
    task, other, bobs = alice.create(), alice.create(), bob.create()
    with threads() as executor, locked_row(url, task):
        started = time.monotonic()
        answer = complete(executor, alice, task, request_id := uuid.uuid4().hex)
        wait_for(url, WAITS_FOR_A_LOCK)
        assert alice.tasks() == [other, task]
        assert alice.get(f"/api/tasks/{task['id']}").json() == task
        assert bob.patch(f"/api/tasks/{bobs['id']}/complete").json()["completed"] is True
        assert alice.patch(f"/api/tasks/{other['id']}/complete").json()["completed"] is True
        assert not answer.done()
        assert_unavailable(answer.result())
        assert TIMEOUT - 1 < time.monotonic() - started < TIMEOUT + 3
    assert TOO_LONG in service.log_line(request_id)
    assert alice.get(f"/api/tasks/{task['id']}").json() == task
    assert alice.patch(f"/api/tasks/{task['id']}/complete").json()["completed"] is True


def test_a_change_of_a_locked_row_is_made_when_the_row_is_let_go(url: str, alice: Client) -> None:
    task = alice.create()
    with threads() as executor:
        with locked_row(url, task):
            answer = complete(executor, alice, task, uuid.uuid4().hex)
            wait_for(url, WAITS_FOR_A_LOCK)
            assert not answer.done()
        assert answer.result().json()["completed"] is True
    assert alice.get(f"/api/tasks/{task['id']}").json() == answer.result().json()


@pytest.mark.long
def test_a_table_that_is_locked_is_a_503_for_who_has_to_wait_for_it(
    service: Service, url: str, alice: Client, bob: Client
) -> None:
    """Reads go on while nobody may write, as during CREATE INDEX; and nobody may do anything during ALTER TABLE."""
    task, bobs = alice.create(), bob.create()
    for mode, waits in (("SHARE", "POST PUT PATCH DELETE"), ("ACCESS EXCLUSIVE", "GET POST PUT PATCH DELETE")):
        requests = [request for request in requests_for(task["id"]) if request[0] in waits.split()]
        with threads(len(requests)) as executor, locked(url, f"LOCK TABLE task IN {mode} MODE"):
            started, answers = time.monotonic(), {}
            for method, path, body in requests:
                headers = {"X-Request-ID": uuid.uuid4().hex}
                answer = executor.submit(alice.request, method, path, json=body, headers=headers)
                answers[headers["X-Request-ID"]] = answer
            wait_for(url, WAITS_FOR_A_LOCK)
            if mode == "SHARE":
                for _ in range(20):
                    assert bob.tasks() == [bobs]
                    assert alice.get(f"/api/tasks/{task['id']}").json() == task
            assert not any(answer.done() for answer in answers.values())
            for request_id, answer in answers.items():
                assert_unavailable(answer.result())
                assert TOO_LONG in service.log_line(request_id)
            assert time.monotonic() - started < TIMEOUT + 3
        assert_healed(service, alice, [task])


@pytest.mark.long
def test_a_pool_without_a_free_connection_is_a_503_in_time(
    postgres: Postgres, url: str, start: Callable[..., Service]
) -> None:
    service = start(url, DATABASE_POOL_SIZE="1")
    with service.client(uuid.uuid4().hex) as alice, service.client(uuid.uuid4().hex) as bob, threads(3) as executor:
        task, bobs = alice.create(), bob.create()
        with suspended(postgres):
            started = time.monotonic()
            answer = complete(executor, alice, task, "has the connection")
            waiting = executor.submit(bob.get, "/api/tasks", headers={"X-Request-ID": "waits for it"})
            ready = executor.submit(bob.get, "/health/ready")
            assert bob.get("/health").status_code == 200
            for response in (answer, waiting, ready):
                assert_unavailable(response.result())
            assert time.monotonic() - started < TIMEOUT + 4
        for request_id in ("has the connection", "waits for it"):
            assert TOO_LONG in service.log, request_id
        service.wait_until_ready()
        assert bob.tasks() == [bobs]
        assert [each["id"] for each in alice.tasks()] == [task["id"]]


@pytest.mark.long
def test_a_pool_of_one_connection_serves_others_while_a_change_waits_for_a_lock(
    url: str, start: Callable[..., Service]
) -> None:
    service = start(url, DATABASE_POOL_SIZE="1")
    with service.client(uuid.uuid4().hex) as alice, service.client(uuid.uuid4().hex) as bob, threads() as executor:
        task, bobs = alice.create(), bob.create()
        with locked_row(url, task):
            answer = complete(executor, alice, task, "locked")
            wait_for(url, WAITS_FOR_A_LOCK)
            for _ in range(20):
                assert bob.tasks() == [bobs]
                assert bob.get("/health/ready").status_code == 200
            assert not answer.done()
        assert answer.result().json()["completed"] is True


# --- A database that hangs


@contextmanager
def suspended(postgres: Postgres) -> Iterator[None]:
    """Stop the clock of the server: its connections are open, and nobody answers on them."""
    assert postgres.process
    postmaster = psutil.Process(postgres.process.pid)
    postmaster.suspend()
    processes = [*postmaster.children(recursive=True), postmaster]
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def test_a_readiness_check_is_answered_in_time_while_the_database_hangs(
    postgres: Postgres, service: Service, alice: Client
) -> None:
    task = alice.create()
    with threads(4) as executor, suspended(postgres):
        started = time.monotonic()
        checks = [executor.submit(alice.get, "/health/ready") for _ in range(4)]
        assert alice.get("/health").status_code == 200
        assert time.monotonic() - started < 2
        for check in checks:
            assert_unavailable(check.result())
        assert time.monotonic() - started < 4
    assert_healed(service, alice, [task])


@pytest.mark.long
def test_requests_are_answered_in_time_while_the_database_hangs(
    postgres: Postgres, service: Service, alice: Client
) -> None:
    """More of them than the pool has connections; a router gives up after 30 seconds.

    What became of the readiness check's query, long after its answer, must not show up in the log.
    """
    task = alice.create()
    fill_pool(service, alice)
    with threads(20) as executor, suspended(postgres):
        assert_unavailable(alice.get("/health/ready"))
        started = time.monotonic()
        answers = [executor.submit(alice.get, "/api/tasks") for _ in range(20)]
        for answer in answers:
            assert_unavailable(answer.result())
        assert time.monotonic() - started < 20
    assert_healed(service, alice, [task])


# --- Another encoding, and what is no trouble of the database ---------------------------------------------------------


def test_a_database_of_another_encoding_is_a_503_and_told_in_the_log(
    postgres: Postgres, start: Callable[..., Service]
) -> None:
    """A title could hold what it cannot store."""
    url = create_database(postgres, "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    service = start(url, ready=False)
    with service.client("alice") as alice, service.client() as nobody:
        assert_all_unavailable(service, alice, "the schema has not been applied yet")
        assert_only_the_database_is_missed(alice, nobody)
    reason = "waiting for the database: the encoding of the database is LATIN1, and must be UTF8"
    assert service.log.splitlines().count(reason) == 1
    assert execute(url, "SELECT to_regclass('task')") == [(None,)]


def test_a_file_of_the_documentation_that_is_missing_is_a_bug_and_no_trouble_of_the_database(
    database_url: str, start_service: Callable[..., Service], tmp_path: Path
) -> None:
    for name in ("service.py", "Procfile", "sql"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    program = (tmp_path / "service.py").read_text()
    line = re.search("^DOCS_FOLDER = .+$", program, re.MULTILINE)
    assert line
    (tmp_path / "service.py").write_text(program.replace(line[0], 'DOCS_FOLDER = Path("/nowhere")'))
    service = start_service(database_url, folder=tmp_path)
    service.wait_until_ready()
    with service.client() as nobody:
        response = nobody.get("/docs/redoc.js")
        assert (response.status_code, response.json()) == (500, {"detail": "Internal Server Error"})
        assert "retry-after" not in response.headers
        assert nobody.get("/docs").status_code == 200
        assert nobody.get("/health/ready").status_code == 200
        assert "status=500" in service.log_line(response.headers["X-Request-ID"])
    assert "FileNotFoundError" in service.log


def test_requests_that_fail_leave_nothing_behind(start_service: Callable[[str], Service]) -> None:
    service = start_service(f"postgresql://postgres@127.0.0.1:{free_port()}/none")
    service.wait_until_healthy()
    body = json.dumps({"title": "not now", "description": "x" * 2000}).encode()
    head = f"POST /api/tasks HTTP/1.1\r\nAuthorization: Bearer {token('alice')}\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}X-Padding: {'x' * 60_000}\r\n\r\n".encode() + body

    async def fail(times: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        for _ in range(times):
            writer.write(request)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
            await reader.readexactly(len(json.dumps(UNAVAILABLE, separators=(",", ":"))))
        writer.close()

    async def fail_on_many_connections() -> None:
        await asyncio.gather(*(fail(30) for _ in range(50)))

    before = service.memory
    asyncio.run(fail_on_many_connections())
    assert service.memory < before + 15
