"""Long lists in a stream: while things happen, for clients that read nothing, and where they break off."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

import httptools
import psutil
import pytest

from tests.support.database import OTHERS, execute, locked
from tests.support.fixtures import StartService
from tests.support.lists import Task, fill, pages_read, stored
from tests.support.postgres import Postgres, listens, suspended
from tests.support.service_process import Client, Service, new_user_id, token
from tests.support.waiting import wait_until

LONG_TEXT = "x" * 2000
"""A description that makes a list of a few thousand tasks larger than all the buffers between it and its reader."""


def place(task: Task) -> tuple[str, int]:
    """Return what lists are sorted by."""
    return task["created_at"], task["id"]


class Listing:
    """A list that is asked for and then read only as far as it is told to. `items` are there when it is whole."""

    def __init__(self, service: Service, user_id: str | None, *, status: str = "all", request_id: str = "list") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # or the kernel would take megabytes
        self.socket.settimeout(60)
        self.socket.connect(("127.0.0.1", service.port))
        head = f"GET /api/tasks?status={status} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {request_id}\r\n"
        self.socket.sendall(f"{head}Authorization: Bearer {token(user_id)}\r\n\r\n".encode())
        self.parser = httptools.HttpResponseParser(self)
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.is_whole = False
        """Whether the last chunk has come."""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_whole = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.socket.close()

    def read(self, size: float = float("inf")) -> Self:
        """Read this many bytes more of the body, or what there is until the answer or the connection ends."""
        size += len(self.body)
        while not self.is_whole and len(self.body) < size:
            try:
                received = self.socket.recv(2**16)
            except ConnectionResetError:
                break
            if not received:
                break
            self.parser.feed_data(received)
        return self

    @property
    def items(self) -> list[Task]:
        assert self.is_whole, bytes(self.body[-100:])
        items: list[Task] = json.loads(self.body)["items"]
        return items

    def assert_broken(self) -> None:
        """The answer has begun as a success, and no client can take it for a whole one."""
        assert self.parser.get_status_code() == 200
        assert not self.is_whole
        with pytest.raises(ValueError, match=r"line 1"):
            json.loads(self.body)


# --- A long list while things happen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["all", "pending"])
def test_what_stays_while_a_list_is_streamed_is_in_it_once_and_in_order(
    postgres: Postgres, observed: Service, carol: Client, status: str
) -> None:
    fill(observed, carol.user_id, 9000, description=LONG_TEXT)
    before = {task["id"]: task for task in stored(observed, carol.user_id, status)}
    draw = random.Random(0)
    others = iter(draw.sample(sorted(before), 200))
    touched, deleted = [], []
    with Listing(observed, carol.user_id, status=status) as listing, observed.client(new_user_id()) as dave:
        for _ in range(40):
            listing.read(100_000)
            touched.append(carol.create("meanwhile", description=LONG_TEXT)["id"])
            moved, toggled, gone = next(others), next(others), next(others)
            assert carol.put(f"/api/tasks/{moved}", json={"title": "moved"}).status_code == 200
            assert carol.patch(f"/api/tasks/{toggled}/complete").status_code == 200
            assert carol.delete(f"/api/tasks/{gone}").status_code == 204
            touched += [moved, toggled]
            deleted.append(gone)
            assert dave.get("/api/tasks").json() == {"items": []}, "another user is served meanwhile"
        read = sum(pages_read(postgres, carol.user_id))
        assert read < len(before) - 1000, "all this has happened while the service was reading"
        items = listing.read().items
    after = {task["id"]: task for task in stored(observed, carol.user_id, status)}
    places = [place(task) for task in items]
    assert places == sorted({*places}, reverse=True), "in order, and none of them twice"
    listed = {task["id"]: task for task in items}
    assert before.keys() & after.keys() <= listed.keys() <= before.keys() | {*touched}
    for task_id in before.keys() & after.keys():
        assert listed[task_id] in (before[task_id], after[task_id])
    assert all(listed[task_id] == before[task_id] for task_id in {*deleted} & listed.keys())


def test_two_users_whose_lists_are_streamed_at_once_get_their_own(service: Service, alice: Client, bob: Client) -> None:
    for part in range(4):  # so that their tasks lie beside each other
        for client in (alice, bob):
            fill(service, client.user_id, 1000, title=f"part {part} of {client.user_id}", description=LONG_TEXT)
    clients = [alice, bob, alice, bob]
    with ExitStack() as stack:
        listings = [stack.enter_context(Listing(service, client.user_id)) for client in clients]
        while not all(listing.is_whole for listing in listings):
            for listing in listings:
                read = len(listing.body)
                assert len(listing.read(50_000).body) > read or listing.is_whole
    for client, listing in zip(clients, listings, strict=True):
        assert listing.items == stored(service, client.user_id)
        assert {task["user_id"] for task in listing.items} == {client.user_id}


# --- Clients that read nothing, or go away ---------------------------------------------------------------------------

PAGES_OF_10_000 = 33  # statements that the whole list takes: one of 50 tasks, and 320 each
PAGES_AHEAD = 20  # at most that the service reads of a list that nobody reads: what fits into the kernel's buffers


@pytest.mark.parametrize("count", [1, 20])
def test_of_a_list_that_nobody_reads_the_service_reads_a_bounded_part(
    postgres: Postgres, observed: Service, carol: Client, count: int
) -> None:
    fill(observed, carol.user_id, 10_000, description=LONG_TEXT)
    with ExitStack() as stack:
        listings = [stack.enter_context(Listing(observed, carol.user_id)) for _ in range(count)]
        for listing in listings:
            listing.read(1)
        dave = stack.enter_context(observed.client(new_user_id()))
        fill(observed, dave.user_id, 10_000, description=LONG_TEXT)
        # Who reads is served all this time, and each page of his takes its turn after those of the others.
        for _ in range(2):
            assert len(dave.tasks()) == 10_000
        assert len(pages_read(postgres, dave.user_id)) == 2 * PAGES_OF_10_000
        read = len(pages_read(postgres, carol.user_id))
        assert 5 * count <= read <= PAGES_AHEAD * count
        expected = stored(observed, carol.user_id)
        for listing in listings[:2]:
            assert listing.read().items == expected, "which can still be had"


def test_of_a_list_whose_reader_has_gone_no_further_page_is_read(
    postgres: Postgres, start_service: StartService
) -> None:
    service = start_service(postgres.url(), DATABASE_POOL_SIZE="2")
    service.wait_until_ready()
    with service.client(new_user_id()) as client:
        fill(service, client.user_id, 10_000, description=LONG_TEXT)
        for number in range(6):
            before = len(pages_read(postgres, client.user_id))
            with Listing(service, client.user_id, request_id=f"gone-{number}") as listing:
                listing.read(1_000_000)
            assert " status=200 " in service.log_line(f"gone-{number}"), "the service has noticed"
            assert len(pages_read(postgres, client.user_id)) - before <= PAGES_AHEAD
        read = len(pages_read(postgres, client.user_id))
        assert client.tasks() == stored(service, client.user_id), "with the two connections that there are"
        assert len(pages_read(postgres, client.user_id)) == read + PAGES_OF_10_000
    assert not re.search("Traceback|error=|rror:", service.log), service.log


def test_a_reader_who_goes_while_the_database_is_asked_leaves_no_connection_behind(
    postgres: Postgres, start_service: StartService
) -> None:
    service = start_service(postgres.url(), DATABASE_POOL_SIZE="2")
    service.wait_until_ready()
    with service.client(new_user_id()) as client:
        fill(service, client.user_id, 10_000, description=LONG_TEXT)
        for number in range(3):
            with Listing(service, client.user_id, request_id=f"gone-{number}") as listing:
                listing.read(1_000_000)
                with suspended(backends(postgres)):
                    listing.socket.settimeout(0.2)
                    with pytest.raises(TimeoutError):
                        listing.read()  # all that has been read before, so that the next page is asked for
                    listing.socket.close()
                    assert " status=200 " in service.log_line(f"gone-{number}")
        assert client.tasks() == stored(service, client.user_id), "with the two connections that there are"
    assert not re.search("Traceback|error=|rror:", service.log), service.log


def backends(postgres: Postgres) -> list[psutil.Process]:
    """Return the processes that answer on the connections that there are."""
    pids = execute(postgres.url(), f"SELECT pid {OTHERS} AND backend_type = 'client backend'")
    return [psutil.Process(pid) for (pid,) in pids]


# --- A list that breaks off ------------------------------------------------------------------------------------------


def test_a_list_comes_whole_although_the_connections_to_the_database_were_lost(
    postgres: Postgres, observed: Service, carol: Client
) -> None:
    fill(observed, carol.user_id, 10_000, description=LONG_TEXT)
    with Listing(observed, carol.user_id, request_id="lost") as listing:
        listing.read(1_000_000)
        lost = observed.sql(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE query LIKE '-- A page of%%'"
        )
        assert (True,) in lost, "the service may have closed the others by itself, as it does once it notices"
        assert len(pages_read(postgres, carol.user_id)) <= PAGES_AHEAD
        assert listing.read().items == stored(observed, carol.user_id)
    assert " status=200 " in observed.log_line("lost")
    assert "error=" not in observed.log_line("lost")


def test_a_page_whose_connection_is_lost_while_it_is_read_is_asked_for_again(
    postgres: Postgres, observed: Service, carol: Client
) -> None:
    fill(observed, carol.user_id, 10_000, description=LONG_TEXT)
    expected = stored(observed, carol.user_id)
    with Listing(observed, carol.user_id, request_id="terminated") as listing:
        listing.read(1_000_000)
        with locked(postgres.url(), "LOCK TABLE task"):
            listing.socket.settimeout(0.001)
            terminate_it = f"SELECT pg_terminate_backend(pid, 10000) {OTHERS} AND wait_event_type = 'Lock'"

            def is_terminated() -> bool:
                """The page gives up after 50 ms and comes again, so it has to be met while it waits."""
                with suppress(TimeoutError):
                    listing.read()  # what has been read before the lock
                return execute(postgres.url(), terminate_it) != []

            wait_until(is_terminated)
            listing.socket.settimeout(60)
        assert listing.read().items == expected
    assert "error=" not in observed.log_line("terminated")


def test_a_list_of_a_database_that_stops_ends_as_an_error(postgres: Postgres, observed: Service, carol: Client) -> None:
    fill(observed, carol.user_id, 10_000, description=LONG_TEXT)
    with Listing(observed, carol.user_id, request_id="stopped") as listing:
        listing.read(1_000_000)
        postgres.stop()
        try:
            listing.read().assert_broken()
        finally:
            postgres.start()
    line = observed.log_line("stopped")
    assert re.search(r" status=200 .* error=", line), line
    assert observed.log.count("stopped") == 1
    assert not re.search("Traceback|without completing", observed.log), observed.log
    observed.wait_until_ready()
    assert carol.tasks() == stored(observed, carol.user_id), "it serves on"


def test_a_list_that_is_being_read_comes_whole_although_the_service_is_told_to_stop(
    postgres: Postgres, start_service: StartService
) -> None:
    service = start_service(postgres.url())
    service.wait_until_ready()
    user_id = new_user_id()
    fill(service, user_id, 10_000, description=LONG_TEXT)
    expected = stored(service, user_id)
    with Listing(service, user_id) as listing:
        listing.read(1_000_000)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(service.port))  # it has begun to stop
        assert len(pages_read(postgres, user_id)) <= PAGES_AHEAD
        assert listing.read().items == expected
    service.stop()
    assert "Traceback" not in service.log


@pytest.mark.long
def test_a_list_that_nobody_reads_ends_as_an_error_when_the_service_stops(
    postgres: Postgres, start_service: StartService
) -> None:
    service = start_service(postgres.url())
    service.wait_until_ready()
    user_id = new_user_id()
    fill(service, user_id, 10_000, description=LONG_TEXT)
    with Listing(service, user_id, request_id="unread") as listing:
        listing.read(1)
        service.stop(seconds=40)
        listing.read().assert_broken()
    assert len(pages_read(postgres, user_id)) <= PAGES_AHEAD
    assert service.log_line("unread").endswith('error="cut off, by a stop of the service or a hang-up"')
    assert "Traceback" not in service.log
