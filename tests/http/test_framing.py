"""Where a body ends, whatever its head says, and headers that no client of good will sends."""

from __future__ import annotations

import contextlib
import re
import time
import uuid

import pytest

from tests.support.errors import NOT_AUTHENTICATED, NOT_JSON, TASK_NOT_FOUND
from tests.support.service_process import Client, Service
from tests.support.wire import (
    CHUNKED,
    EXPECT,
    WRITE_REQUESTS,
    Raw,
    ask,
    bearer,
    request,
    wait_until_gone,
    wait_until_read,
)

TOO_LONG = {"detail": "The body must have at most 65536 bytes"}


# --- Framing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 14", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 14"],
        ["Content-Length: 14", "Content-Length: 14"],
        ["Content-Length: 14", "Content-Length: 3"],
        ["Content-Length: 14, 14"],
        ["Content-Length: +14"],
        ["Content-Length: 1_4"],
        ["Content-Length: 0x0e"],
        ["Content-Length: "],
        [f"Content-Length: {'1' * 5_000}"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding : chunked"],
    ],
    ids="; ".join,
)
def test_a_body_of_doubtful_length_creates_nothing(service: Service, alice: Client, headers: list[str]) -> None:
    with Raw(service) as connection:
        connection.send("POST /api/tasks", bearer(alice), *headers, content=b'{"title": "x"}')
        assert connection.answer().status == 400
        assert connection.is_closed()
    assert alice.tasks() == []


@pytest.mark.parametrize("framing", ["Content-Length: 100", CHUNKED])
@pytest.mark.parametrize("sent", [b"", b'{"title": "x", "completed": true}'])
def test_a_client_that_hangs_up_in_mid_body_has_changed_nothing(
    service: Service, alice: Client, bob: Client, framing: str, sent: bytes
) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    for method, path in WRITE_REQUESTS:
        request_id = uuid.uuid4().hex
        with Raw(service) as connection:
            content = b"%x\r\n%s\r\n" % (len(sent), sent) if sent and framing == CHUNKED else sent
            headers = [bearer(alice), framing, f"X-Request-ID: {request_id}"]
            connection.send(f"{method} {path.format(id=task['id'])}", *headers, content=content)
        wait_until_gone(service, connection)
    assert (alice.tasks(), bob.tasks()) == ([task], [other])


@pytest.mark.parametrize("sent", [b"", b'{"title": "x", '])
def test_a_client_that_asks_first_and_hangs_up_has_changed_nothing_and_is_no_bug(
    service: Service, alice: Client, sent: bytes
) -> None:
    task = alice.create("mine")
    for method, path in WRITE_REQUESTS:
        request_id = uuid.uuid4().hex
        printed = len(service.log)
        with Raw(service) as connection:
            headers = [bearer(alice), "Content-Length: 100", EXPECT, f"X-Request-ID: {request_id}"]
            connection.send(f"{method} {path.format(id=task['id'])}", *headers)
            assert connection.answer().status == 100
            connection.socket.sendall(sent)
        wait_until_gone(service, connection)
        assert ask(service, "GET /health").status == 200  # which it answers after it has ended the other one
        assert not re.search(r"Traceback|status=5", service.log[printed:])
    assert alice.tasks() == [task]


def test_a_slow_body_is_waited_for_and_delays_nobody_else(service: Service, alice: Client, bob: Client) -> None:
    with Raw(service) as connection:
        connection.send("POST /api/tasks", bearer(alice), "Content-Length: 14")
        for byte in b'{"title": "x"}':
            time.sleep(0.02)
            connection.socket.sendall(bytes([byte]))
            assert bob.tasks() == []
        assert connection.answer().status == 201
    assert [task["title"] for task in alice.tasks()] == ["x"]


@pytest.mark.parametrize("framing", ["Content-Length: {size}", CHUNKED])
@pytest.mark.parametrize("size", [65_536, 65_537])
def test_a_body_may_have_64_kib_and_not_a_byte_more_in_one_packet_with_its_head(
    alice: Client, raw: Raw, framing: str, size: int
) -> None:
    content = b'{"title": "x"}'.ljust(size)
    if framing == CHUNKED:
        content = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in (content[:7], content[7:])) + b"0\r\n\r\n"
    raw.send("POST /api/tasks", bearer(alice), framing.format(size=size), content=content)
    answer = raw.answer()
    if size > 65_536:
        assert (answer.status, answer.json(), alice.tasks()) == (413, TOO_LONG, [])
    else:
        assert (answer.status, alice.tasks()) == (201, [answer.json()])


@pytest.mark.parametrize("expect", [[], [EXPECT]], ids=["", "asked first"])
def test_a_body_behind_a_413_is_not_taken_for_a_request(
    service: Service, alice: Client, raw: Raw, expect: list[str]
) -> None:
    task = alice.create("mine")
    delete = request(f"DELETE /api/tasks/{task['id']}", bearer(alice))
    content = delete * (70_000 // len(delete) + 1)
    raw.send("POST /api/tasks", bearer(alice), f"Content-Length: {len(content)}", *expect)
    answer = raw.answer()
    assert (answer.status, answer.json()) == (413, TOO_LONG)
    raw.socket.sendall(content)
    raw.send("GET /api/tasks", bearer(alice))  # the answer has come, so this one is read
    answer = raw.answer()
    assert (answer.status, answer.json()) == (200, {"items": [task]})


def test_zeros_before_a_length_are_no_matter(service: Service, alice: Client, raw: Raw) -> None:
    """More of them than int() is willing to read."""
    for size, status in ((14, 201), (65_536, 201), (65_537, 413)):
        length, content = f"Content-Length: {'0' * 4299}{size}", b'{"title": "x"}'.ljust(size)
        raw.send("POST /api/tasks", bearer(alice), length, content=content)
        assert raw.answer().status == status
        with Raw(service) as connection:
            connection.send("POST /api/tasks", bearer(alice), length)
            wait_until_read(service)
            connection.socket.sendall(content)
            assert connection.answer().status == status


@pytest.mark.parametrize(("method", "error"), [("GET", (404, TASK_NOT_FOUND)), ("DELETE", (400, {"detail": NOT_JSON}))])
def test_a_body_where_none_is_expected_is_not_taken_for_a_request(
    alice: Client, raw: Raw, method: str, error: tuple[int, dict[str, str]]
) -> None:
    task = alice.create("mine")
    inner = f"DELETE /api/tasks/{task['id']} HTTP/1.1\r\nHost: x\r\n{bearer(alice)}\r\n\r\n".encode()
    for _ in range(2):
        raw.send(f"{method} /api/tasks/0", bearer(alice), f"Content-Length: {len(inner)}")
        raw.socket.sendall(inner)
        answer = raw.answer()
        assert (answer.status, answer.json()) == error
    assert alice.tasks() == [task]


def test_a_client_that_asks_first_is_told_to_go_on(alice: Client, raw: Raw) -> None:
    raw.send("POST /api/tasks", bearer(alice), "Content-Length: 14", EXPECT)
    assert raw.answer().status == 100
    raw.socket.sendall(b'{"title": "x"}')
    answer = raw.answer()
    assert (answer.status, answer.json()["title"]) == (201, "x")


def test_a_client_that_asks_first_is_told_what_is_wrong_instead(service: Service, alice: Client) -> None:
    answer = ask(service, "POST /api/tasks", "Content-Length: 14", EXPECT)
    assert (answer.status, answer.json()) == (401, {"detail": "Not authenticated"})
    answer = ask(service, "POST /api/nothing", bearer(alice), "Content-Length: 14", EXPECT)
    assert (answer.status, answer.json()) == (404, {"detail": "Not Found"})
    answer = ask(service, "POST /api/tasks", bearer(alice), "Content-Length: 65537", EXPECT)
    assert (answer.status, answer.json()) == (413, TOO_LONG)


# --- Headers -------------------------------------------------------------------------------------------------------


KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADES = [
    ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY}"],
    ["Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAAP__"],
    ["Upgrade: TLS/1.0", "Connection: keep-alive, upgrade"],
    ["Connection: close", "Connection: Upgrade", "Upgrade: h2c"],
    ["Proxy-Connection: Upgrade", "Upgrade: h2c"],
]


def test_a_body_beside_no_real_offer_to_upgrade_is_heeded(service: Service, alice: Client) -> None:
    """As the parser does: an offer is in both headers, and an empty body is none."""
    path = f"/api/tasks/{alice.create()['id']}/complete"
    answer = ask(service, f"PATCH {path}", bearer(alice), "Content-Length: 0", "Connection: upgrade", "Upgrade: h2c")
    assert (answer.status, answer.json()["completed"]) == (200, True)
    content = b'{"completed": false}'
    answer = ask(service, f"PATCH {path}", bearer(alice), "Content-Length: 20", "Upgrade: h2c", content=content)
    assert (answer.status, answer.json()["completed"]) == (200, False)


@pytest.mark.parametrize("upgrade", UPGRADES, ids=lambda headers: headers[0])
def test_an_offer_to_upgrade_is_ignored(service: Service, alice: Client, upgrade: list[str]) -> None:
    task = alice.create("mine")
    answer = ask(service, "GET /api/tasks", bearer(alice), *upgrade)
    assert (answer.status, answer.json()) == (200, {"items": [task]})
    answer = ask(service, "GET /api/tasks", *upgrade)
    assert (answer.status, answer.json()) == (401, NOT_AUTHENTICATED)


@pytest.mark.parametrize("upgrade", UPGRADES, ids=lambda headers: headers[0])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beside_an_offer_to_upgrade_is_refused(
    service: Service, alice: Client, upgrade: list[str], chunked: bool
) -> None:
    """The parser drops it, and a body that gets lost turns a set into a toggle."""
    task = alice.create("mine")
    body = b'{"completed": false}'
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    answer = ask(service, f"PATCH /api/tasks/{task['id']}/complete", bearer(alice), framing, *upgrade, content=content)
    assert (answer.status, answer.json()) == (400, {"detail": "A request with a body must not offer an upgrade"})
    assert alice.tasks() == [task]


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [*(("GET /api/tasks/0", upgrade, 404) for upgrade in UPGRADES), ("CONNECT localhost:443", [], 400)],
    ids=["websocket", "h2c", "TLS", "two lines", "Proxy-Connection", "CONNECT"],
)
def test_a_body_beside_an_offer_to_upgrade_is_not_taken_for_a_request(
    service: Service, alice: Client, raw: Raw, line: str, headers: list[str], status: int
) -> None:
    """Behind a proxy that shares its connections between users, that would be a request of somebody else's."""
    task = alice.create("mine")
    inner = request(f"DELETE /api/tasks/{task['id']}", bearer(alice))
    raw.send(line, bearer(alice), f"Content-Length: {len(inner)}", *headers)
    assert raw.answer().status == status  # so that the body comes in a packet of its own
    with contextlib.suppress(ConnectionError):
        raw.socket.sendall(inner)
    assert raw.is_closed()
    assert alice.tasks() == [task]
