"""A database that is not there, and comes back: at start, later, and without a word."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from signal import SIGQUIT, SIGTERM
from urllib.parse import urlsplit

import pytest

from tests.support.database import OTHERS, connect, execute, terminate, url_as
from tests.support.fixtures import Figures, StartService
from tests.support.outages import (
    IDLE,
    assert_all_unavailable,
    assert_healed,
    assert_only_the_database_is_missed,
    assert_unavailable,
    create_database,
    database_setting,
    fill_pool,
    let_notice,
)
from tests.support.postgres import Postgres
from tests.support.service_process import Client, Service
from tests.support.waiting import wait_until

# --- At start

AT_ONCE = {"service.STARTUP_TIMEOUT": 0.1}
"""Constants of a service that serves before it has a database, as all do, but without waiting for one."""


@pytest.mark.fault
def test_a_service_that_is_there_before_its_server_heals_by_itself(
    postgres: Postgres, start: StartService, figures: Figures
) -> None:
    url = create_database(postgres)
    postgres.stop()
    service = start(url, ready=False, constants=AT_ONCE)
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


def test_a_service_that_is_there_before_its_database_heals_by_itself(postgres: Postgres, start: StartService) -> None:
    name = f"tasks_{uuid.uuid4().hex[:12]}"
    service = start(url_as("postgres", postgres.url(name)), ready=False, constants=AT_ONCE)
    with service.client("alice") as alice:
        assert_all_unavailable(service, alice, "the schema has not been applied yet")
        reason = f'waiting for the database: InvalidCatalogNameError: database "{name}" does not exist'
        assert service.log.splitlines().count(reason) == 1
        execute(postgres.url(), f"CREATE DATABASE {name}")
        assert_healed(service, alice, [])


def test_a_service_can_start_on_a_read_only_database(
    postgres: Postgres, service: Service, url: str, alice: Client, start: StartService
) -> None:
    task = alice.create()
    with (
        database_setting(postgres, service, "default_transaction_read_only", "on"),
        start(url).client(alice.user_id) as again,
    ):
        assert again.tasks() == [task]
        assert_unavailable(again.post("/api/tasks", json={"title": "x"}))


def test_a_service_can_start_on_a_server_that_does_not_answer(start: StartService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = url_as("postgres", f"postgresql://127.0.0.1:{silent.getsockname()[1]}/tasks?connect_timeout=1")
        service = start(url, ready=False, constants=AT_ONCE)
        with service.client("alice") as alice, service.client() as nobody:
            assert_all_unavailable(service, alice, "the schema has not been applied yet")
            assert_only_the_database_is_missed(alice, nobody)
            timed_out = "waiting for the database: TimeoutError: .+"
            wait_until(lambda: re.search(timed_out, service.log))
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
    with ThreadPoolExecutor(8) as executor:
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
    wait_until(lambda: execute(service.database_url, f"SELECT count(*) {OTHERS}") == [(0,)])
    let_notice(service)


# --- A database that hangs


def test_a_readiness_check_is_answered_in_time_while_the_database_hangs(
    postgres: Postgres, service: Service, alice: Client
) -> None:
    task = alice.create()
    with ThreadPoolExecutor(4) as executor, postgres.suspended():
        started = time.monotonic()
        checks = [executor.submit(alice.get, "/health/ready") for _ in range(4)]
        assert alice.get("/health").status_code == 200
        assert time.monotonic() - started < 2
        for check in checks:
            assert_unavailable(check.result())
        assert time.monotonic() - started < 4
    assert_healed(service, alice, [task])


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
def behind_proxy(postgres: Postgres, proxy: ForgetfulProxy, start: StartService) -> Service:
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
