"""The headers of every answer, X-Request-ID among them, and how it goes over the wire."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable

import httpx
import pytest

from tests.support.answers import ALL, API_READS, API_WRITES_AND_ERRORS
from tests.support.service_process import Client, Service

# --- X-Request-ID ----------------------------------------------------------------------------------------------------

NEW_ID = r"[A-Za-z0-9._-]{16,128}"


@pytest.mark.parametrize("request_id", ["a", "..", "A.b_C-9", "x" * 128])
def test_a_good_request_id_is_kept(service: Service, alice: Client, request_id: str) -> None:
    response = alice.get("/api/tasks", headers={"X-Request-ID": request_id})
    assert response.headers.get_list("x-request-id") == [request_id]
    assert " status=200 " in service.log_line(request_id)


@pytest.mark.parametrize(
    "request_id",
    [b"", b"x" * 129, b"a b", b"a/b", b'"a"', b"a%0Ab", "é".encode("latin-1"), "\uff11".encode()],
)
def test_another_request_id_is_replaced(service: Service, alice: Client, request_id: bytes) -> None:
    response = alice.get("/api/tasks", headers={b"X-Request-ID": request_id})
    [replacement] = response.headers.get_list("x-request-id")
    assert re.fullmatch(NEW_ID, replacement)
    assert replacement.encode() not in request_id
    assert service.log_line(replacement)


def test_each_request_without_an_id_gets_a_new_one(service: Service, alice: Client) -> None:
    ids = [alice.get("/api/tasks").headers["x-request-id"] for _ in range(5)]
    assert len(set(ids)) == 5
    assert all(re.fullmatch(NEW_ID, request_id) and service.log_line(request_id) for request_id in ids)


# --- Standing headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_answer_has_its_request_id_and_tells_caches_and_browsers_what_they_may_do(
    send: Callable[..., httpx.Response], name: str
) -> None:
    headers = send(name, X_Request_ID="mine").headers
    assert headers.get_list("x-request-id") == ["mine"]
    assert headers.get_list("x-content-type-options") == ["nosniff"]
    assert headers.keys().isdisjoint({"server", "x-powered-by", "via"})
    if name in API_READS:
        assert headers.get_list("cache-control") == ["private, no-cache"]
    if name in API_WRITES_AND_ERRORS:
        assert headers.get_list("cache-control") == ["no-store"]


SOURCES = {"'none'", "'self'", "data:"}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_may_load_nothing_from_elsewhere(nobody: Client, path: str) -> None:
    policy = nobody.get(path).headers["content-security-policy"]
    directives = {name: set(sources) for name, *sources in (part.split() for part in policy.split(";"))}
    inline = {source for source in directives["script-src"] if re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", source)}
    assert directives["script-src"] == {"'self'"} | inline
    assert directives["style-src"] == {"'self'", "'unsafe-inline'"}
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert directives[name] == {"'none'"}
    assert all(sources <= SOURCES for name, sources in directives.items() if name not in ("script-src", "style-src"))


# --- On the wire -----------------------------------------------------------------------------------------------------

DATA_SEGMENTS_IN = 152  # the place of tcpi_data_segs_in in Linux's struct tcp_info


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux counts the packets of a connection")
def test_an_answer_comes_in_one_packet(service: Service, alice: Client) -> None:
    """And not its head and then its body, each of which takes a system call and wakes the client up."""
    path = f"/api/tasks/{alice.create()['id']}"
    request = f"GET {path} HTTP/1.1\r\nHost: here\r\nAuthorization: {alice.headers['Authorization']}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        for _ in range(20):
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    assert struct.unpack_from("I", info, DATA_SEGMENTS_IN) == (20,)
