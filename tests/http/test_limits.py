"""Limits: heads, idle and slow connections, answers that nobody reads, and the stop."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.support.fixtures import StartService
from tests.support.service_process import Client, Service, new_user_id
from tests.support.waiting import wait_until
from tests.support.wire import (
    EXPECT,
    Raw,
    ask,
    bearer,
    remote_ports,
    request,
    wait_until_gone,
    wait_until_read,
)

ALLOWED_ORIGIN = "Origin: http://localhost:3000"
SOONER: dict[str, object] = {
    "service.KEEP_ALIVE": 1,
    "service.UNREAD_TIMEOUT": 1000,
    "service.REQUEST_TIMEOUT": 1.0,
}


@pytest.fixture(scope="module")
def impatient(new_database: Callable[[], str]) -> Iterator[Service]:
    """A service that closes connections sooner."""
    service = Service(new_database(), constants=SOONER)
    try:
        service.wait_until_ready()
        # Answers of 12 MB for each thousand tasks.
        service.sql(
            "INSERT INTO task (user_id, title, description) SELECT 'many', 'x', repeat(E'\\x01', 2000)"
            " FROM generate_series(1, 4000)"
        )
        yield service
        assert not re.search(r"Traceback|status=5", service.log)
    finally:
        service.remove()


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "more"),
    [(b"GET /", b"x" * 10_000), (b"GET / HTTP/1.1\r\nX: ", b"x" * 10_000), (b"GET / HTTP/1.1\r\n", b"X: x\r\n" * 2000)],
)
def test_a_head_without_end_is_refused(service: Service, raw: Raw, start: bytes, more: bytes) -> None:
    sent = 0
    raw.socket.sendall(start)
    with contextlib.suppress(ConnectionError):
        while sent < 20_000_000:
            sent += raw.socket.send(more)
    assert sent < 10_000_000  # most of which waits in the buffers of the sockets
    with Raw(service) as connection:
        connection.socket.sendall(start)
        for _ in range(14):  # the last of these is beyond the limit; what came after it would reset the connection
            if select.select([connection.socket], [], [], 0.01)[0]:
                break
            connection.socket.sendall(more[:5000])
        assert connection.answer().status == 431


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"GET /health HTTP/1.1\r\nHost: x\r\nX: {'x' * 65_000}\r\n\r\n", 200),
        (f"GET /health HTTP/1.1\r\nHost: x\r\nX: {'x' * 66_000}\r\n\r\n", 431),
        ("GET /health HTTP/1.1\r\nHost: x\r\nY: y\r\n" + "X: xx\r\n" * 9_400 + "\r\n", 431),
        (f"GET /health?{'x' * 66_000} HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        ("GET /health HTTP/1.1\r\nHost: x\r\n" + "X: x\r\n" * 199 + "\r\n", 200),
        ("GET /health HTTP/1.1\r\nHost: x\r\n" + "X: x\r\n" * 200 + "\r\n", 431),
        ("GET /health HTTP/1.1\r\nHost: x\r\n" + "X: x\r\n" * 201, 431),
    ],
    ids=["just small enough", "one header", "many headers", "the URL", "200 lines", "201 lines", "201 without an end"],
)
def test_the_limit_of_a_head_is_the_same_in_one_piece(raw: Raw, head: str, status: int) -> None:
    raw.socket.sendall(head.encode())
    assert raw.answer().status == status


def test_a_large_head_with_an_end_is_served(alice: Client, raw: Raw) -> None:
    for number in range(3):
        raw.send("GET /api/tasks", bearer(alice), *[f"X-{number}: {'x' * 5000}" for number in range(12)])
        assert (raw.answer().status, number) == (200, number)


def test_a_body_in_tiny_chunks_is_no_head(alice: Client, raw: Raw) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"title": "x"' + b" " * 20_000 + b"}") + b"0\r\n\r\n"
    raw.send("POST /api/tasks", bearer(alice), "Transfer-Encoding: chunked")
    for start in range(0, len(chunks), 10_000):
        raw.socket.sendall(chunks[start : start + 10_000])
        time.sleep(0.001)
    assert raw.answer().status == 201


def test_the_extensions_of_chunks_are_limited_together(alice: Client, raw: Raw) -> None:
    raw.send("POST /api/tasks", bearer(alice), "Transfer-Encoding: chunked")
    for _ in range(2):
        assert not select.select([raw.socket], [], [], 0.1)[0]
        raw.socket.sendall(b"1;%s\r\n \r\n" % (b"a" * 40_000))
    assert raw.answer().status == 431


def test_tiny_chunks_are_not_read_on_for_long_after_the_answer(raw: Raw) -> None:
    """To parse them takes so long that it would delay everybody else."""
    raw.send("POST /api/tasks", "Transfer-Encoding: chunked")
    assert raw.answer().status == 401
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 9_000_000:
            sent += raw.socket.send(b"1\r\nx\r\n" * 2000)
    assert sent < 8_000_000


def test_a_body_after_the_answer_is_not_counted_as_a_part_of_the_next_head(raw: Raw) -> None:
    """Behind a proxy that shares connections, the next head may be of somebody else."""
    raw.send("POST /api/tasks", "Content-Length: 65536")
    assert raw.answer().status == 401
    for part in (b"x" * 65_536, b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"y" * 20_000, b"\r\n\r\n"):
        raw.socket.sendall(part)
        time.sleep(0.05)
    assert raw.answer().status == 200


def test_trailers_without_end_are_refused(raw: Raw) -> None:
    sent = 0
    raw.send("POST /api/tasks", "Transfer-Encoding: chunked", content=b"0\r\n")
    with contextlib.suppress(ConnectionError):
        while sent < 20_000_000:
            sent += raw.socket.send(b"a: b\r\n" * 2000)
    assert sent < 10_000_000


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"\r\n"],
        [b"GET /health HTTP/1.1\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\n\r\n", b"\r\n"],
        [b"POST /api/tasks HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"],
    ],
    ids=["nothing", "an empty line", "a request", "an empty line after a request", "a request that is refused"],
)
def test_an_idle_connection_is_closed_whatever_it_has_sent(impatient: Service, pieces: list[bytes]) -> None:
    with Raw(impatient) as connection:
        for piece in pieces:
            connection.socket.sendall(piece)
            if b"HTTP" in piece:
                connection.answer()
        assert connection.is_closed()


def test_a_connection_is_not_kept_by_empty_lines(impatient: Service) -> None:
    with Raw(impatient) as connection, contextlib.suppress(ConnectionError):
        for _ in range(100):
            connection.socket.sendall(b"\r\n")
            if select.select([connection.socket], [], [], 0.1)[0]:
                break
        assert connection.is_closed()


def test_connections_that_never_send_a_byte_make_room_for_others(
    start_service: StartService, database_url: str
) -> None:
    sooner = {"service.REQUEST_TIMEOUT": 1.0}  # an idle connection would be closed late
    service = start_service(database_url, constants=sooner, launcher="prlimit --nofile=256:256")
    with contextlib.ExitStack() as silent:
        for _ in range(300):
            silent.enter_context(Raw(service))
        service.wait_until_ready()


def test_a_connection_is_not_idle_between_requests_that_come_often(impatient: Service) -> None:
    with Raw(impatient) as connection:
        for _ in range(8):
            connection.send("GET /health")
            assert connection.answer().status == 200
            time.sleep(0.2)


def test_a_connection_is_not_idle_while_its_answer_is_due(impatient: Service) -> None:
    with impatient.client(new_user_id()) as client:
        task_id, authorization = client.create()["id"], bearer(client)
    with psycopg.connect(impatient.database_url) as lock, Raw(impatient) as connection:
        lock.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [task_id])
        connection.send(f"DELETE /api/tasks/{task_id}", authorization)
        time.sleep(2)  # longer than a connection may be idle, or a request take to arrive
        lock.rollback()
        assert connection.answer().status == 204


def test_a_connection_is_not_idle_while_a_request_arrives(impatient: Service) -> None:
    with Raw(impatient) as connection:
        connection.send("GET /health")
        assert connection.answer().status == 200
        time.sleep(0.6)
        connection.socket.sendall(b"GET /health HT")
        time.sleep(0.6)  # beyond what it may be idle, and less than a request may take
        connection.socket.sendall(b"TP/1.1\r\n\r\n")
        assert connection.answer().status == 200


HALVES = {
    "a head": (b"GET /", b"x"),
    "a header": (b"GET /health HTTP/1.1\r\nHost: ", b"x"),
    "a body": (b"POST /api/tasks HTTP/1.1\r\nAuthorization: %s\r\nContent-Length: 999\r\n\r\n", b" "),
    "a chunk": (b"POST /api/tasks HTTP/1.1\r\nAuthorization: %s\r\nTransfer-Encoding: chunked\r\n\r\n999\r\n", b" "),
    "a trailer": (b"POST /api/tasks HTTP/1.1\r\nAuthorization: %s\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: ", b"x"),
}


@pytest.mark.parametrize(
    ("before", "half"), [*((b"", half) for half in HALVES), (b"GET /health HTTP/1.1\r\n\r\n", "a head")]
)
def test_half_a_request_is_not_waited_for_however_often_a_byte_of_it_comes(
    impatient: Service, alice: Client, before: bytes, half: str
) -> None:
    start, more = HALVES[half]
    with Raw(impatient) as connection:
        if before:
            connection.socket.sendall(before)
            assert connection.answer().status == 200
        connection.socket.sendall(start.replace(b"%s", alice.headers["authorization"].encode()))
        for _ in range(100):
            if select.select([connection.socket], [], [], 0.1)[0]:
                break
            connection.socket.sendall(more)
        else:
            pytest.fail("ten seconds of it")
        answer = connection.answer()
        assert (answer.status, answer.json()) == (408, {"detail": "A request must arrive within 15 seconds"})
        assert connection.is_closed()


@pytest.mark.parametrize(
    ("length", "body", "status"),
    [
        ("Content-Length: 2", b"{", 408),
        ("Transfer-Encoding: chunked", b"x\r\n", 400),
    ],
)
def test_a_body_that_does_not_arrive_is_answered_as_all_requests_are(
    impatient: Service, length: str, body: bytes, status: int
) -> None:
    request_id = uuid.uuid4().hex
    with impatient.client("alice") as alice, Raw(impatient) as connection:
        headers = (bearer(alice), length, f"X-Request-ID: {request_id}", ALLOWED_ORIGIN)
        connection.send("POST /api/tasks", *headers, content=body)
        answer = connection.answer()
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert answer.headers["x-request-id"] == request_id
        assert answer.headers["cache-control"] == "no-store"
        assert connection.is_closed()
        assert alice.tasks() == []
    assert f" status={status} " in impatient.log_line(request_id)


def test_a_list_comes_whole_although_a_body_that_it_does_not_need_never_comes(impatient: Service) -> None:
    with impatient.client("many") as client, Raw(impatient) as connection:
        connection.send("GET /api/tasks", bearer(client), "Content-Length: 1")
        begun, content = time.monotonic(), b""
        while piece := connection.socket.recv(1_000_000):
            content = content[-10:] + piece
            time.sleep(0.03)
        assert time.monotonic() - begun > 1.5  # seconds; a request has one to arrive
        assert content.endswith(b"]}\r\n0\r\n\r\n")


def test_the_time_for_a_request_begins_with_its_first_byte(impatient: Service) -> None:
    """Not with the connection, which browsers open before they need it."""
    with impatient.client("alice") as alice, Raw(impatient) as connection:
        time.sleep(0.7)  # of the one second
        connection.send("PATCH /api/tasks/7/complete", bearer(alice), "Content-Length: 2")
        time.sleep(0.6)
        connection.socket.sendall(b"{}")
        assert connection.answer().status == 404


@pytest.mark.parametrize("first", [EXPECT, "Content-Length: 70000"])
def test_of_a_request_that_is_refused_the_rest_is_not_waited_for_either(impatient: Service, first: str) -> None:
    with Raw(impatient) as connection:
        lengths = ["Content-Length: 100"] if first == EXPECT else []
        connection.send("POST /api/tasks", first, *lengths)
        assert connection.answer().status == 401
        assert connection.is_closed()  # without another answer


@pytest.mark.parametrize("then", ["nothing", "another request", "the end"])
def test_an_answer_that_nobody_reads_is_not_kept_for_ever(impatient: Service, then: str) -> None:
    request_id = uuid.uuid4().hex
    with impatient.client("many") as client, Raw(impatient) as connection:
        connection.send("GET /api/tasks", bearer(client), f"X-Request-ID: {request_id}")
        wait_until(lambda: select.select([connection.socket], [], [], 0)[0])
        if then == "another request":
            connection.send("GET /api/tasks", bearer(client))
        elif then == "the end":
            connection.socket.shutdown(socket.SHUT_WR)
        wait_until_gone(impatient, connection)
        impatient.log_line(request_id)  # the statement behind it has ended too
        with contextlib.suppress(ConnectionError):
            assert not connection.file.read().endswith(b"0\r\n\r\n")


def test_answers_alike_that_are_read_each_after_a_while_are_all_read(impatient: Service) -> None:
    """Though as much is unread whenever somebody looks."""
    with impatient.client("many") as client, Raw(impatient) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        for _ in range(4):
            connection.send("GET /api/tasks", bearer(client))
            time.sleep(0.3)
            assert connection.answer().content.count(b'"id":') == 4000


def test_an_answer_that_is_read_slowly_is_read_to_its_end(impatient: Service) -> None:
    with impatient.client("many") as client, Raw(impatient) as connection:
        connection.send("GET /api/tasks", bearer(client), "Connection: close")
        pieces = []
        while content := connection.file.read(4_000_000):
            pieces.append(content)
            time.sleep(0.3)  # in all longer than until it is closed where nothing is read
    assert len(pieces) > 10
    answer = b"".join(pieces)
    assert (answer.count(b'"id":'), answer[-7:]) == (4000, b"\r\n0\r\n\r\n")


def test_a_docs_file_is_read_once_however_many_ask_for_it_and_read_nothing(
    tmp_path: Path, start_service: StartService, database_url: str
) -> None:
    file = tmp_path / "redoc.js"
    file.write_bytes(b"x" * 1_000_000)
    service = start_service(database_url, constants=SOONER | {"service.DOCS_FOLDER": str(tmp_path)})
    first = ask(service, "GET /docs/redoc.js")
    assert (first.status, first.content) == (200, file.read_bytes())
    file.write_text("another")
    with contextlib.ExitStack() as silent:
        for _ in range(200):
            silent.enter_context(Raw(service)).socket.sendall(request("GET /docs/redoc.js") * 4)
        assert ask(service, "GET /docs/redoc.js").content == first.content
        assert ask(service, "GET /health").status == 200
        wait_until(lambda: not remote_ports(service), 30)
    assert ask(service, "GET /docs/redoc.js").content == first.content


def test_a_docs_file_that_cannot_be_opened_is_told_as_a_failure_that_passes(
    start_service: StartService, database_url: str
) -> None:
    service = start_service(database_url, launcher="prlimit --nofile=256:256")
    service.wait_until_ready()
    descriptors = psutil.Process(service.process.pid).num_fds
    with Raw(service) as connection:
        connection.send("GET /health")
        assert connection.answer().status == 200
        with contextlib.ExitStack() as silent:
            for _ in range(300):
                silent.enter_context(Raw(service))
            wait_until(lambda: descriptors() == 256)
            connection.send("GET /docs/redoc.js", "X-Request-ID: full")
            answer = connection.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            assert "Too many open files" in service.log_line("full")
        wait_until(lambda: descriptors() < 100)
        connection.send("GET /docs/redoc.js")
        assert connection.answer().status == 200


@pytest.mark.parametrize("path", ["/docs/redoc.js", "/openapi.json", "/api/tasks"])
def test_a_client_that_hangs_up_in_mid_answer_leaves_no_traceback(service: Service, alice: Client, path: str) -> None:
    alice.create("x" * 200, description="x" * 2000)
    for _ in range(5):
        request_id = uuid.uuid4().hex
        with Raw(service) as connection:
            connection.send(f"GET {path}", bearer(alice), f"X-Request-ID: {request_id}")
        assert re.search(" status=(200|499) ", service.log_line(request_id))


def test_connections_that_are_closed_leave_nothing_behind(service: Service) -> None:
    process = psutil.Process(service.process.pid)
    before = process.num_fds()
    for content in [
        b"",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HT",
        b"\0",
        b"GET /docs/redoc.js HTTP/1.1\r\n\r\n",
    ]:
        for _ in range(200):
            with Raw(service) as connection:
                connection.socket.sendall(content)
    wait_until(lambda: process.num_fds() <= before)


def test_what_is_done_when_the_service_is_stopped_is_answered(service: Service) -> None:
    """uvicorn closes connections whose answers it takes for sent, which may still wait for their packet."""
    for _ in range(3):
        stopped = Service(service.database_url)
        unanswered = set[str]()

        def ask_on(stopped: Service = stopped, unanswered: set[str] = unanswered) -> None:
            with Raw(stopped) as connection, contextlib.suppress(ConnectionError):
                while True:
                    request_id = uuid.uuid4().hex
                    unanswered.add(request_id)
                    connection.send("GET /health", f"X-Request-ID: {request_id}")
                    if not connection.file.peek(1):
                        return
                    assert connection.answer().status == 200
                    unanswered.remove(request_id)

        try:
            threads = [threading.Thread(target=ask_on) for _ in range(48)]
            for thread in threads:
                thread.start()
            wait_until(lambda: stopped.log.count("status=200") > 500)  # noqa: B023  it is called at once
            stopped.stop(signal.SIGTERM)
            for thread in threads:
                thread.join()
            carried_out = set(re.findall(r"id=(\w+)$", stopped.log, re.MULTILINE))
            assert unanswered & carried_out == set()
        finally:
            stopped.remove()


def test_a_stop_does_not_wait_for_the_rest_of_a_request_that_has_its_answer(
    database_url: str, start_service: StartService
) -> None:
    service = start_service(database_url)
    service.wait_until_ready()
    with Raw(service) as connection:
        connection.send("POST /api/tasks", "Content-Length: 2")
        answer = connection.answer()
        assert (answer.status, "connection" in answer.headers) == (401, False)
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(5)


def test_a_request_that_a_stop_cuts_off_is_answered(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url, constants={"service.SHUTDOWN_GRACE": 1})
    service.wait_until_ready()
    with Raw(service) as connection:
        alice = bearer(service.client("alice"))
        connection.send("POST /api/tasks", alice, "Content-Length: 2", "X-Request-ID: cut", ALLOWED_ORIGIN)
        wait_until_read(service)
        service.process.send_signal(signal.SIGTERM)
        answer = connection.answer()
    assert (answer.status, answer.json()) == (503, {"detail": "The service is stopping, try again soon"})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    service.stop()
    assert service.log_line("cut").endswith(' user="alice" error="The service is stopping, try again soon"')
