"""Connections that no client of good will makes, and what uvicorn by itself does not survive: see HttpProtocol."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tests.support.postgres import free_port
from tests.support.service_process import ROOT, Client, Service, new_user_id
from tests.support.wire import (
    CHANGES,
    CHUNKED,
    EXPECT,
    Answer,
    Raw,
    ask,
    bearer,
    copy_program,
    remote_ports,
    request,
    wait_until,
    wait_until_gone,
    wait_until_read,
)

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/local/bin:/opt/homebrew/bin:" + os.environ.get("PATH", ""))
NO_HTTP = {"detail": "The request must be valid HTTP/1.1"}


@pytest.fixture(scope="module", autouse=True)
def the_service_survives(service: Service) -> Iterator[None]:
    """After all of it the service still answers, there was no bug, and of the connections nothing is left."""
    printed, before = len(service.log), psutil.Process(service.process.pid).num_fds()
    yield
    with service.client(f"user-{uuid.uuid4().hex}") as client:
        assert client.create("still here")["title"] == "still here"
    assert not re.search(r"Traceback|status=5", service.log[printed:])
    wait_until(lambda: not remote_ports(service))
    # The connections to the database are at most ten, by default, and open when there is need.
    assert psutil.Process(service.process.pid).num_fds() <= before + 10


@pytest.fixture
def raw(service: Service) -> Iterator[Raw]:
    with Raw(service) as connection:
        yield connection


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[], str]) -> Iterator[Service]:
    """A service that closes connections sooner."""
    service = Service(new_database(), folder=copy_program(tmp_path_factory.mktemp("impatient")))
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


# --- One request at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_a_request_behind_another_in_one_packet_is_not_carried_out(service: Service, alice: Client, count: int) -> None:
    """RFC 9112, section 9.3.2: who pipelines asks again what was not answered."""
    task = alice.create("mine")
    delete = request(f"DELETE /api/tasks/{task['id']}", bearer(alice))
    with Raw(service) as connection:
        connection.send("GET /api/tasks", bearer(alice), content=delete * count)
        answer = connection.answer()
        assert (answer.status, answer.json()) == (200, {"items": [task]})
        assert connection.is_closed()
    assert alice.tasks() == [task]
    assert ask(service, f"DELETE /api/tasks/{task['id']}", bearer(alice)).status == 204
    assert alice.tasks() == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_request_that_comes_before_the_answer_is_not_carried_out(
    service: Service, alice: Client, whole: bool
) -> None:
    task, other = alice.create("mine"), alice.create("mine too")
    delete = request(f"DELETE /api/tasks/{other['id']}", bearer(alice))
    with psycopg.connect(service.database_url) as lock, Raw(service) as connection:
        lock.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [task["id"]])
        connection.send(f"PATCH /api/tasks/{task['id']}/complete", bearer(alice))
        wait_until_read(service)
        connection.socket.sendall(delete if whole else delete[:-1])
        wait_until_read(service)
        lock.rollback()
        answer = connection.answer()
        assert (answer.status, answer.json()["completed"]) == (200, True)
        with contextlib.suppress(ConnectionError):
            connection.socket.sendall(delete[-1:])
        assert connection.is_closed()
    assert [each["id"] for each in alice.tasks()] == [other["id"], task["id"]]


def test_requests_that_wait_for_each_other_share_a_connection(service: Service, alice: Client, raw: Raw) -> None:
    for number in range(20):
        raw.send("POST /api/tasks", bearer(alice), "Content-Length: 14", content=b'{"title": "x"}')
        task = raw.answer().json()
        raw.send(f"GET /api/tasks/{task['id']}", bearer(alice))
        assert raw.answer().json() == task
        raw.socket.sendall(b"\r\n" * (number % 3))  # RFC 9112, section 2.2: ignored before a request
        raw.send("GET /api/tasks")
        assert raw.answer().status == 401


def test_ten_megabytes_of_requests_are_one_answer(service: Service) -> None:
    path = f"/api/tasks/{uuid.uuid4().hex}"
    requests = request(f"GET {path}") * (10_000_000 // len(request(f"GET {path}")))
    with Raw(service) as connection:

        def send() -> None:
            with contextlib.suppress(ConnectionError):
                connection.socket.sendall(requests)

        sender = threading.Thread(target=send)
        sender.start()
        assert connection.answer().status == 401
        assert connection.is_closed()
        sender.join()
    wait_until_read(service)
    assert service.log.count(path) == 1


@pytest.mark.parametrize("in_one_packet", [True, False])
def test_what_follows_a_request_and_is_none_does_not_take_its_answer(
    service: Service, alice: Client, in_one_packet: bool
) -> None:
    for number in range(20):
        garbage = b"\0garbage\r\n\r\n"
        with Raw(service) as connection:
            content = b'{"title": "x"}' + (garbage if in_one_packet else b"")
            connection.send("POST /api/tasks", bearer(alice), "Content-Length: 14", content=content)
            connection.socket.sendall(garbage)
            assert connection.answer().status == 201
            with contextlib.suppress(ConnectionError):
                rest = connection.file.read()
                assert not rest or rest.startswith(b"HTTP/1.1 400 ")  # where the other answer was there before it
        assert len(alice.tasks()) == number + 1


PIECES = {
    "no body": ("GET /api/tasks", [], b"", 200),
    "a body": ("POST /api/tasks", ["Content-Length: 14"], b'{"title": "x"}', 201),
    "chunks": ("POST /api/tasks", [CHUNKED], b'5;a=b\r\n{"tit\r\n9\r\nle": "x"}\r\n0\r\nA: b\r\n\r\n', 201),
}


@pytest.mark.parametrize(("line", "headers", "content", "status"), PIECES.values(), ids=PIECES)
def test_a_request_may_come_in_two_segments_wherever_it_is_split_and_byte_by_byte(
    service: Service, alice: Client, line: str, headers: list[str], content: bytes, status: int
) -> None:
    whole = request(line, "Authorization: Bearer x", *headers, content=content)
    with Raw(service) as connection, Raw(service) as other:
        for split in range(1, len(whole)):
            connection.socket.sendall(whole[:split])
            other.send("GET /health")  # when that is answered the first segment has been read
            assert other.answer().status == 200
            connection.socket.sendall(whole[split:])
            assert (connection.answer().status, split) == (401, split)
        for byte in request(line, bearer(alice), *headers, content=content):
            connection.socket.sendall(bytes([byte]))
        assert connection.answer().status == status
    assert len(alice.tasks()) == (status == 201)


# --- What is no request ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "0.9", "2.0"])
def test_another_version_of_http_is_answered_once_and_right(service: Service, alice: Client, version: str) -> None:
    for line, content, status in (("GET /api/tasks", b"", 200), ("POST /api/tasks", b'{"title": "x"}', 201)):
        whole = request(line, bearer(alice), f"Content-Length: {len(content)}", content=content)
        with Raw(service) as connection:
            connection.socket.sendall(whole.replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1))
            assert connection.answer().status == status
            assert version != "1.0" or connection.is_closed()
    assert len(alice.tasks()) == 1


@pytest.mark.parametrize(
    "sent",
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n", b"GET / HTTP/1.1\r\nHost: x\r\n\n",
     b"GET /health HTTP/1.1\rHost: x\r\r", b"GET /health HTTP/1.1\r\nX: a\r\n b\r\n\r\n", b"GET /health HTTP/3\r\n\r\n",
     b"CONNECT x:443 HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
)  # fmt: skip
def test_what_is_another_protocol_or_lax_about_lines_is_refused(raw: Raw, sent: bytes) -> None:
    raw.socket.sendall(sent)
    answer = raw.answer()
    assert (answer.status, answer.json(), answer.headers["connection"]) == (400, NO_HTTP, "close")
    assert raw.is_closed()


BROKEN = {
    "a malformed chunk": (CHUNKED, b"zz\r\n"),
    "a malformed chunk behind a whole one": (CHUNKED, b"1\r\n \r\nzz\r\n"),
    "a chunk that is longer than it says": (CHUNKED, b"1\r\n  \r\n0\r\n\r\n"),
    "a malformed trailer": (CHUNKED, b"0\r\nno trailer\r\n\r\n"),
    "a trailer with a NUL": (CHUNKED, b"0\r\nA: \0\r\n\r\n"),
    "a trailer that is another length": (CHUNKED, b"0\r\nContent-Length: 1\r\n\r\n"),
    "a trailer that is another encoding": (CHUNKED, b"0\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n\r\n"),
    "a malformed end": (CHUNKED, b"0\r\n\rx\r\n"),
}


@pytest.mark.parametrize(("method", "path"), CHANGES, ids=[method for method, _ in CHANGES])
@pytest.mark.parametrize("expect", [[], [EXPECT]], ids=["", "asked first"])
@pytest.mark.parametrize("in_one_packet", [True, False])
@pytest.mark.parametrize(("framing", "content"), BROKEN.values(), ids=BROKEN)
def test_a_request_that_is_answered_with_400_has_changed_nothing(
    service: Service, alice: Client, raw: Raw, method: str, path: str, expect: list[str], in_one_packet: bool,
    framing: str, content: bytes,
) -> None:  # fmt: skip
    task = alice.create("mine")
    headers = [bearer(alice), framing, *expect]
    raw.send(f"{method} {path.format(id=task['id'])}", *headers, content=content if in_one_packet else b"")
    if not in_one_packet:
        wait_until_read(service)
        raw.socket.sendall(content)
    answer = raw.answer()
    if answer.status == 100:
        answer = raw.answer()
    assert (answer.status, answer.json()) == (400, NO_HTTP)
    assert raw.is_closed()
    assert alice.tasks() == [task]


@pytest.mark.parametrize("in_one_packet", [True, False])
def test_garbage_behind_a_whole_request_does_not_make_it_a_bad_one(
    service: Service, alice: Client, raw: Raw, in_one_packet: bool
) -> None:
    task = alice.create("mine")
    raw.send(f"DELETE /api/tasks/{task['id']}", bearer(alice), content=b"\0\r\n\r\n" if in_one_packet else b"")
    with contextlib.suppress(ConnectionError):
        raw.socket.sendall(b"\0\r\n\r\n")
    assert (raw.answer().status, alice.tasks()) == (204, [])


# --- Trailers --------------------------------------------------------------------------------------------------------


def test_a_trailer_is_no_header(service: Service, alice: Client, bob: Client, raw: Raw) -> None:
    """RFC 9110, section 6.5.1: a recipient must not merge the two."""

    def send(*headers: str, trailer: str) -> Answer:
        content = b'f\r\n{"title": "t" }\r\n0\r\n%s\r\n\r\n' % trailer.encode()
        return ask(service, "POST /api/tasks", CHUNKED, *headers, content=content)

    assert send(trailer=bearer(alice)).json() == {"detail": "Not authenticated"}
    trailers = (bearer(bob), "Authorization: Bearer x", "Content-Type: text/plain", "Idempotency-Key: a b",
                "Upgrade: x", EXPECT, "Origin: http://localhost:3000", "X-Request-ID: a-trailer")  # fmt: skip
    for trailer in trailers:
        answer = send(bearer(alice), trailer=trailer)
        assert (answer.status, answer.json()["user_id"]) == (201, alice.user_id)
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-request-id"] != "a-trailer"
    assert (len(alice.tasks()), bob.tasks()) == (len(trailers), [])


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_trailer_is_no_condition(service: Service, alice: Client, method: str) -> None:
    task = alice.create("mine")
    content = b'f\r\n{"title": "t" }\r\n0\r\nIf-Match: "another"\r\n\r\n'
    answer = ask(service, f"{method} /api/tasks/{task['id']}", bearer(alice), CHUNKED, content=content)
    assert answer.status in (200, 204)
    assert [each["title"] for each in alice.tasks()] == (["t"] if method == "PUT" else [])


LAST = b"1\r\nx\r\n0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("early", [False, True])
def test_a_trailer_that_ends_the_connection_ends_it(raw: Raw, early: bool) -> None:
    """The parser heeds it, and would read nothing more of a connection that is left open."""
    raw.send("GET /health", CHUNKED, *([EXPECT] if early else []), content=b"" if early else LAST)
    assert raw.answer().status == 200
    raw.socket.sendall(LAST if early else b"")
    assert raw.is_closed()


PROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 5s
    http-reuse safe
    retries 0
listen proxy
    bind 127.0.0.1:{port}
    server only 127.0.0.1:{service}
"""


@pytest.mark.skipif(not HAPROXY, reason="haproxy is not installed")
def test_behind_a_proxy_that_shares_connections_nobody_makes_those_of_others_deaf(
    service: Service, tmp_path: Path
) -> None:
    port = free_port()
    (tmp_path / "configuration").write_text(PROXY.format(port=port, service=service.port))
    proxy = subprocess.Popen([str(HAPROXY), "-db", "-f", tmp_path / "configuration"], start_new_session=True)
    stop = threading.Event()

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def attack() -> int:
        answers = 0
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(request("GET /health", CHUNKED, content=LAST))
                answers += connection.recv(12) == b"HTTP/1.1 200"
        return answers

    def ask_often(number: int) -> list[int]:
        with Client(f"http://127.0.0.1:{port}", timeout=20) as client:
            return [client.get("/health").status_code for _ in range(30)]

    try:
        wait_until(listens)
        with ThreadPoolExecutor() as threads:
            attacker = threads.submit(attack)
            try:
                statuses = list(threads.map(ask_often, range(3)))
            finally:
                stop.set()
            assert statuses == [[200] * 30] * 3
            assert attacker.result() > 10
    finally:
        proxy.kill()
        proxy.wait()


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
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(start)
        for _ in range(20):
            time.sleep(0.001)
            connection.sendall(more[:5000])
            if select.select([connection], [], [], 0)[0]:
                break
        connection.settimeout(5)
        assert connection.recv(1000).startswith(b"HTTP/1.1 431 ")


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
    tmp_path: Path, start_service: Callable[..., Service], database_url: str
) -> None:
    folder = copy_program(tmp_path, "REQUEST_TIMEOUT", "TICK")
    service = start_service(database_url, folder=folder, launcher="prlimit --nofile=256:256")
    with contextlib.ExitStack() as silent:
        for _ in range(300):
            silent.enter_context(socket.create_connection(("127.0.0.1", service.port)))
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


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\n\r\n"], ids=["the first", "the second"])
@pytest.mark.parametrize(("start", "more"), HALVES.values(), ids=HALVES)
def test_half_a_request_is_not_waited_for_however_often_a_byte_of_it_comes(
    impatient: Service, alice: Client, before: bytes, start: bytes, more: bytes
) -> None:
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
        assert (answer.status, answer.json()) == (408, {"detail": "A request must arrive within 1 seconds"})
        assert connection.is_closed()


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
    tmp_path: Path, start_service: Callable[..., Service], database_url: str
) -> None:
    folder = copy_program(tmp_path)
    package = Path(str(importlib.util.find_spec("offapi").origin)).parent  # type: ignore[union-attr]  # it is there
    shutil.copytree(package, folder / "offapi")
    service = start_service(database_url, folder=folder)
    first = ask(service, "GET /docs/redoc.js")
    assert (first.status, first.content) == (200, (folder / "offapi" / "redoc.js").read_bytes())
    (folder / "offapi" / "redoc.js").write_text("another")
    with contextlib.ExitStack() as silent:
        for _ in range(200):
            silent.enter_context(Raw(service)).socket.sendall(request("GET /docs/redoc.js") * 4)
        assert ask(service, "GET /docs/redoc.js").content == first.content
        assert ask(service, "GET /health").status == 200
        wait_until(lambda: not remote_ports(service), 30)
    assert ask(service, "GET /docs/redoc.js").content == first.content


@pytest.mark.parametrize("path", ["/docs/redoc.js", "/openapi.json", "/api/tasks"])
def test_a_client_that_hangs_up_in_mid_answer_leaves_no_traceback(service: Service, alice: Client, path: str) -> None:
    alice.create("x" * 200, description="x" * 2000)
    for _ in range(5):
        request_id = uuid.uuid4().hex
        with Raw(service) as connection:
            connection.send(f"GET {path}", bearer(alice), f"X-Request-ID: {request_id}")
        assert " status=200 " in service.log_line(request_id)


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


# --- uvicorn ---------------------------------------------------------------------------------------------------------

OVERRIDDEN = {
    "connection_made", "data_received", "on_message_begin", "on_headers_complete", "on_body", "on_message_complete",
    "on_response_complete",
}  # fmt: skip
USED = {
    "self": {"parser", "loop", "transport", "connections", "flow", "cycle", "headers",
             "timeout_keep_alive"},
    "cycle": {"keep_alive", "response_started", "response_complete"},
    "flow": {"resume_reading"},
}  # fmt: skip
"""What HttpProtocol takes from uvicorn."""


def test_uvicorn_still_has_all_that_the_protocol_takes_from_it() -> None:
    async def app(scope: object, receive: object, send: object) -> None: ...

    config = Config(app, log_config=None, http=HttpToolsProtocol)
    protocol = HttpToolsProtocol(config, ServerState(), {}, _loop=object())  # type: ignore[arg-type]  # it only keeps it
    protocol.scope = {}  # type: ignore[typeddict-item]  # as every one that a head sets
    missing = {name for name in OVERRIDDEN if name not in vars(HttpToolsProtocol)}
    set_later = set(re.findall(r"self\.(\w+)(?:: .+)? = ", inspect.getsource(HttpToolsProtocol.on_message_begin)))
    missing |= USED["self"] - vars(protocol).keys() - set_later
    missing |= USED["cycle"] - set(re.findall(r"self\.(\w+)", inspect.getsource(RequestResponseCycle.__init__)))
    missing |= USED["flow"] - vars(FlowControl).keys()
    assert missing == set()
    assert {400, 408, 431} <= STATUS_LINE.keys()
    # uvicorn takes the protocol for its transport, and the protocol waits for uvicorn to call all that it overrides.
    assert set(re.findall(r"self\.transport\.(\w+)", inspect.getsource(RequestResponseCycle))) == {
        "write", "close", "is_closing",
    }  # fmt: skip
    for method in ("shutdown", "connection_lost"):
        used = re.findall(r"self\.transport\.(\w+)", inspect.getsource(getattr(HttpToolsProtocol, method)))
        assert used == ["close"], method
    heads = inspect.getsource(HttpToolsProtocol.on_headers_complete)
    assert "transport=self.transport" in heads
    assert "self._start_asgi_task(self.cycle, app)" in heads
    assert "on_response=self.on_response_complete" in heads


def test_the_protocol_takes_no_more_from_uvicorn_than_that() -> None:
    tree = ast.parse((ROOT / "service.py").read_text())
    (protocol,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "HttpProtocol")
    methods = {node.name for node in protocol.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert methods & vars(HttpToolsProtocol).keys() <= OVERRIDDEN
    taken: dict[str, set[str]] = {name: set() for name in USED}
    own = set(methods)
    for node in ast.walk(protocol):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        if name in taken:
            taken[name].add(node.attr)
        if name == "self" and isinstance(node.ctx, ast.Store) and node.attr not in USED["self"]:
            own.add(node.attr)
    taken["self"] -= own
    assert all(taken[name] <= USED[name] for name in USED), taken
