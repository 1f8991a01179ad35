"""What comes over one connection: requests in turn, what is no request, and trailers."""

from __future__ import annotations

import contextlib
import select
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from tests.support.errors import NO_HTTP
from tests.support.haproxy import HAPROXY, HAProxy
from tests.support.service_process import Client, Service
from tests.support.waiting import wait_until
from tests.support.wire import (
    CHUNKED,
    EXPECT,
    WRITE_REQUESTS,
    Raw,
    RawAnswer,
    ask,
    bearer,
    request,
    wait_until_read,
)

# --- Who hangs up ----------------------------------------------------------------------------------------------------


def test_a_request_that_waits_ends_when_its_client_hangs_up(service: Service, alice: Client) -> None:
    """What waits for nobody would fill the memory: hanging up is free, and no limit of connections counts it."""
    task = alice.create("mine")
    path, content = f"/api/tasks/{task['id']}", b'{"title": "x"}'
    requests = {"list": "GET /api/tasks", "head": "HEAD /api/tasks", "one": f"GET {path}", "new": "POST /api/tasks",
                "first": f"PUT {path}", "second": f"PUT {path}", "third": f"DELETE {path}",
                "ready": "GET /health/ready"}  # fmt: skip
    with psycopg.connect(service.database_url) as lock:
        lock.execute("LOCK TABLE task")
        for request_id, line in requests.items():
            with Raw(service) as connection:
                body = content if line.startswith("P") else b""
                length = f"Content-Length: {len(body)}"
                connection.send(line, bearer(alice), f"X-Request-ID: {request_id}", length, content=body)
                time.sleep(0.2)  # longer than a batch waits for a lock
        for request_id in requests:
            assert "status=499" in service.log_line(request_id, seconds=4)
    assert alice.tasks() == [task]


def test_an_answer_that_is_not_read_is_in_the_log_as_it_was_sent(service: Service) -> None:
    """It waits for the answers before it. That its client hangs up then is no error."""
    with Raw(service) as connection:
        for number in range(8):  # of 1 MB each, so that the buffers are full
            connection.send("GET /docs/redoc.js", f"X-Request-ID: unread-{number}")
            time.sleep(0.1)
    line = service.log_line("unread-0")
    assert "status=200" in line
    time.sleep(0.2)
    assert "error=" not in "".join(line for line in service.log.splitlines() if "id=unread-" in line)


def test_a_write_that_is_being_made_is_made_though_its_client_hangs_up(service: Service, alice: Client) -> None:
    slowly = (
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.5); RETURN new; END'"
    )
    service.sql(slowly)
    service.sql("CREATE TRIGGER slowly BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION slowly()")
    try:
        with Raw(service) as connection:
            connection.send("POST /api/tasks", bearer(alice), "Content-Length: 14", content=b'{"title": "x"}')
            wait_until_read(service)
        wait_until(lambda: [each["title"] for each in alice.tasks()] == ["x"])
    finally:
        service.sql("DROP FUNCTION slowly CASCADE")


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
            with Raw(service) if CHUNKED in headers else contextlib.nullcontext(connection) as sender:
                sender.socket.sendall(whole[:split])
                other.send("GET /health")  # when that is answered the first segment has been read
                assert other.answer().status == 200
                sender.socket.sendall(whole[split:])
                assert (sender.answer().status, split) == (401, split)
        for byte in request(line, bearer(alice), *headers, content=content):
            connection.socket.sendall(bytes([byte]))
        assert connection.answer().status == status
    assert len(alice.tasks()) == (status == 201)


# --- What is no request ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "2.0"])
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
     b"CONNECT x:443 HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b" HTTP/1.1\r\n\r\n",
     b"get /health HTTP/1.1\r\n\r\n", b"FOO /health HTTP/1.1\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_or_lax_about_it_is_refused(raw: Raw, sent: bytes) -> None:
    raw.socket.sendall(sent)
    answer = raw.answer()
    assert (answer.status, answer.json(), answer.headers["connection"]) == (400, NO_HTTP, "close")
    assert raw.is_closed()


BODY = b'{"title": "x", "completed": true}'
BROKEN = {
    "a size of no digits": b"zz\r\n",
    "a negative size": b"-1\r\n",
    "a size beyond 64 bits": b"FFFFFFFFFFFFFFFFF\r\n",
    "no size": b"\r\n",
    "a chunk that is longer than it says": b"1\r\n  \r\n0\r\n\r\n",
    "a malformed trailer": b"0\r\nno trailer\r\n\r\n",
    "a trailer with a NUL": b"0\r\nA: \0\r\n\r\n",
    "a trailer that is another length": b"0\r\nContent-Length: 1\r\n\r\n",
    "a trailer that is another encoding": b"0\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n0\r\n\r\n",
    "a malformed end": b"0\r\n\rx\r\n",
}
"""What may follow a whole chunk with a body that all writes would take, and that makes no whole request of it."""


@pytest.mark.parametrize("in_one_packet", [True, False])
@pytest.mark.parametrize("end", BROKEN.values(), ids=BROKEN)
def test_a_creation_that_is_answered_with_400_has_created_nothing(
    service: Service, alice: Client, raw: Raw, end: bytes, in_one_packet: bool
) -> None:
    content = b"%x\r\n%s\r\n%s" % (len(BODY), BODY, end)
    raw.send("POST /api/tasks", bearer(alice), CHUNKED, content=content if in_one_packet else b"")
    if not in_one_packet:
        wait_until_read(service)
        raw.socket.sendall(content)
    answer = raw.answer()
    assert (answer.status, answer.json()) == (400, NO_HTTP)
    assert raw.is_closed()
    assert alice.tasks() == []


@pytest.mark.parametrize(("method", "path"), WRITE_REQUESTS, ids=[method for method, _ in WRITE_REQUESTS])
@pytest.mark.parametrize("asked_first", [True, False])
def test_a_write_that_is_answered_with_400_has_changed_nothing(
    service: Service, alice: Client, raw: Raw, method: str, path: str, asked_first: bool
) -> None:
    task = alice.create("mine")
    expect = [EXPECT] if asked_first else []
    raw.send(f"{method} {path.format(id=task['id'])}", bearer(alice), CHUNKED, *expect)
    if asked_first:
        assert raw.answer().status == 100
    wait_until_read(service)
    raw.socket.sendall(b"%x\r\n%s\r\n%s" % (len(BODY), BODY, BROKEN["a malformed trailer"]))
    answer = raw.answer()
    assert (answer.status, answer.json()) == (400, NO_HTTP)
    assert raw.is_closed()
    assert alice.tasks() == [task]


# --- Trailers --------------------------------------------------------------------------------------------------------


def test_a_trailer_is_no_header(service: Service, alice: Client, bob: Client, raw: Raw) -> None:
    """RFC 9110, section 6.5.1: a recipient must not merge the two."""

    def send(*headers: str, trailer: str) -> RawAnswer:
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


@pytest.mark.parametrize(("method", "status"), [("PUT", 200), ("DELETE", 204)])
def test_a_trailer_is_no_condition(service: Service, alice: Client, method: str, status: int) -> None:
    task = alice.create("mine")
    content = b'f\r\n{"title": "t" }\r\n0\r\nIf-Match: "another"\r\n\r\n'
    answer = ask(service, f"{method} /api/tasks/{task['id']}", bearer(alice), CHUNKED, content=content)
    assert answer.status == status
    assert [each["title"] for each in alice.tasks()] == (["t"] if method == "PUT" else [])


LAST = b"1\r\nx\r\n0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("early", [False, True], ids=["", "after the answer"])
@pytest.mark.parametrize("trailer", ["", "Connection: close", "Content-Length: 5", "X: \x80\x01"])
def test_a_request_in_chunks_is_the_last_of_its_connection(
    service: Service, alice: Client, raw: Raw, trailer: str, early: bool
) -> None:
    """Its trailers may make the parser deaf, when the answer has said already whether the connection goes on."""
    task = alice.create("mine")
    rest = b"1\r\nx\r\n0\r\n" + (f"{trailer}\r\n\r\n" if trailer else "\r\n").encode("latin-1")
    rest += request(f"DELETE /api/tasks/{task['id']}", bearer(alice))
    raw.send("GET /health", CHUNKED, *([EXPECT] if early else []), content=b"" if early else rest)
    answer = raw.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    if early:
        readable, _, _ = select.select([raw.socket], [], [], 0.2)
        assert not readable  # the rest is waited for, as a reset could overtake the answer
        raw.socket.sendall(rest)
    assert raw.is_closed()
    assert alice.tasks() == [task]


PROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 5s
    http-reuse safe
    retries 0
listen proxy
    bind {address}
    server only 127.0.0.1:{service}
"""


@pytest.mark.skipif(not HAPROXY, reason="haproxy is not installed")
@pytest.mark.parametrize("early", [False, True], ids=["", "after the answer"])
def test_behind_a_proxy_that_shares_connections_nobody_makes_those_of_others_deaf(
    service: Service, tmp_path: Path, early: bool
) -> None:
    stop = threading.Event()

    def attack() -> int:
        answers = 0
        while not stop.is_set():
            with contextlib.suppress(OSError), Raw(proxy) as connection:
                connection.send("PUT /health", CHUNKED, content=b"" if early else LAST)
                answers += connection.answer().status == 405
                if early:
                    connection.socket.sendall(LAST)
                    time.sleep(0.005)  # or the proxy would send nothing of it on
        return answers

    def ask_often(number: int) -> None:
        with Client(f"http://127.0.0.1:{proxy.port}", timeout=20) as client:
            for _ in range(200):
                assert stop.is_set() or client.get("/health").status_code == 200

    with HAProxy(PROXY, tmp_path, service=service.port) as proxy, ThreadPoolExecutor() as threads:
        attacker = threads.submit(attack)
        try:
            list(threads.map(ask_often, range(3)))
        finally:
            stop.set()
        assert attacker.result() > 10
