"""What every answer carries, whatever its status, and what the log says of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.postgres import free_port
from tests.support.service_process import ROOT, SECRET, Client, Service, environment, new_user_id, procfile_line, token

APP, OTHER_APP = "https://app.example.com", "http://localhost:4321"


@pytest.fixture(scope="module")
def configured(new_database: Callable[[], str]) -> Iterator[Service]:
    """A service with two origins of its own, on a database that raises what no one expects at the title `bug`."""
    service = Service(new_database(), CORS_ORIGINS=f"{APP}, {OTHER_APP}")
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'a bug' USING ERRCODE = 'internal_error';
        END $$;
        CREATE TRIGGER fail BEFORE INSERT ON task FOR EACH ROW WHEN (NEW.title = 'bug') EXECUTE FUNCTION fail();
        """)
    yield service
    service.remove()


STALE = '"2000-01-01T00:00:00+00:00"'

# One request for each status: method, path, and the rest. {id} is a task of the caller's.
API_READS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 GET list": ("GET", "/api/tasks", {}),
    "200 GET": ("GET", "/api/tasks/{id}", {}),
    "200 GET with a slash": ("GET", "/api/tasks/", {}),
    "200 HEAD list": ("HEAD", "/api/tasks", {}),
    "200 HEAD": ("HEAD", "/api/tasks/{id}", {}),
    "304 GET list": ("GET", "/api/tasks", {"headers": {"If-None-Match": "*"}}),
    "304 GET": ("GET", "/api/tasks/{id}", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD list": ("HEAD", "/api/tasks", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD": ("HEAD", "/api/tasks/{id}", {"headers": {"If-None-Match": "*"}}),
}
API_WRITES_AND_ERRORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "201 POST": ("POST", "/api/tasks", {"json": {"title": "milk"}}),
    "201 POST with a key": ("POST", "/api/tasks", {"json": {"title": "milk"}, "headers": {"Idempotency-Key": "a"}}),
    "200 PUT": ("PUT", "/api/tasks/{id}", {"json": {"title": "milk"}}),
    "200 PUT nothing": ("PUT", "/api/tasks/{id}", {"json": {}}),
    "200 PATCH": ("PATCH", "/api/tasks/{id}/complete", {}),
    "204 DELETE": ("DELETE", "/api/tasks/{id}", {}),
    "400 POST": ("POST", "/api/tasks", {"content": b"{"}),
    "400 POST with a key": ("POST", "/api/tasks", {"json": {"title": "milk"}, "headers": {"Idempotency-Key": "a b"}}),
    "401 GET": ("GET", "/api/tasks", {"headers": {"Authorization": ""}}),
    "401 HEAD": ("HEAD", "/api/tasks", {"headers": {"Authorization": ""}}),
    "401 POST": ("POST", "/api/tasks", {"headers": {"Authorization": "Bearer nonsense"}, "json": {"title": "milk"}}),
    "401 of no path": ("GET", "/api/nothing", {"headers": {"Authorization": ""}}),
    "404 GET": ("GET", "/api/tasks/0", {}),
    "404 HEAD": ("HEAD", "/api/tasks/0", {}),
    "404 PUT": ("PUT", "/api/tasks/0", {"json": {}}),
    "404 PATCH": ("PATCH", "/api/tasks/0/complete", {}),
    "404 DELETE": ("DELETE", "/api/tasks/0", {}),
    "404 of no path": ("GET", "/api/nothing", {}),
    "404 of /api": ("GET", "/api", {}),
    "405 GET": ("GET", "/api/tasks/1/complete", {}),
    "405 DELETE": ("DELETE", "/api/tasks", {}),
    "412 PUT": ("PUT", "/api/tasks/{id}", {"json": {}, "headers": {"If-Match": STALE}}),
    "412 PATCH": ("PATCH", "/api/tasks/{id}/complete", {"headers": {"If-Match": STALE}}),
    "412 DELETE": ("DELETE", "/api/tasks/{id}", {"headers": {"If-Match": STALE}}),
    "413 POST": ("POST", "/api/tasks", {"content": b" " * 70_000}),
    "413 DELETE": ("DELETE", "/api/tasks/{id}", {"content": b" " * 70_000}),
    "415 POST": ("POST", "/api/tasks", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    "415 DELETE": ("DELETE", "/api/tasks/{id}", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    "422 GET list": ("GET", "/api/tasks?status=x", {}),
    "422 GET": ("GET", "/api/tasks/x", {}),
    "422 POST": ("POST", "/api/tasks", {"json": {}}),
    "500 POST": ("POST", "/api/tasks", {"json": {"title": "bug"}}),
}
BESIDE_THE_API: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 /": ("GET", "/", {}),
    "200 /health": ("GET", "/health", {}),
    "200 /health/ready": ("GET", "/health/ready", {}),
    "200 /docs": ("GET", "/docs", {}),
    "200 HEAD /docs": ("HEAD", "/docs", {}),
    "200 /docs/swagger_bundle.js": ("GET", "/docs/swagger_bundle.js", {}),
    "200 /redoc": ("GET", "/redoc", {}),
    "200 /openapi.json": ("GET", "/openapi.json", {}),
    "404 /nothing": ("GET", "/nothing", {}),
    "404 /docs/nothing": ("GET", "/docs/nothing", {}),
    "405 /health": ("POST", "/health", {}),
}
API = API_READS | API_WRITES_AND_ERRORS
ALL = API | BESIDE_THE_API


@pytest.fixture
def send(configured: Service) -> Iterator[Callable[..., httpx.Response]]:
    """A function that sends a request of the tables, by its name, with more headers, and checks its status."""
    with configured.client(new_user_id()) as client:

        def send(name: str, **headers: str) -> httpx.Response:
            method, path, options = ALL[name]
            if "{id}" in path:
                path = path.replace("{id}", str(client.create()["id"]))
            added = {name.replace("_", "-"): value for name, value in headers.items()}
            response = client.request(method, path, **options | {"headers": options.get("headers", {}) | added})
            assert response.status_code == int(name[:3]), response.text
            return response

        yield send


# --- X-Request-ID ----------------------------------------------------------------------------------------------------

NEW_ID = r"[A-Za-z0-9._-]{16,128}"


@pytest.mark.parametrize("request_id", ["a", "0", "-", "req-1", "A.b_C-9", "..", "x" * 128, str(uuid.UUID(int=7))])
def test_a_good_request_id_is_kept(service: Service, alice: Client, request_id: str) -> None:
    response = alice.get("/api/tasks", headers={"X-Request-ID": request_id})
    assert response.headers.get_list("x-request-id") == [request_id]
    assert " status=200 " in service.log_line(request_id)


@pytest.mark.parametrize(
    "request_id",
    [b"", b"x" * 129, b"x" * 5000, b"a b", b"a\tb", b"a/b", b"a,b", b"a;b", b"a:b", b"a=b", b'"a"', b"{a}", b"a%0Ab",
     b"<script>", "é".encode(), "é".encode("latin-1"), "\uff11".encode(), b"\xff"],
)  # fmt: skip
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


@pytest.mark.parametrize("name", ALL)
def test_every_answer_has_the_request_id_and_so_has_its_log_line(
    configured: Service, send: Callable[..., httpx.Response], name: str
) -> None:
    given = f"mine-{uuid.uuid4().hex}"
    assert send(name, X_Request_ID=given).headers.get_list("x-request-id") == [given]
    assert f" status={name[:3]} " in configured.log_line(given)
    [made] = send(name).headers.get_list("x-request-id")
    assert re.fullmatch(NEW_ID, made)
    assert f" status={name[:3]} " in configured.log_line(made)


# --- Standing headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_no_answer_is_sniffed_or_names_its_server(send: Callable[..., httpx.Response], name: str) -> None:
    headers = send(name).headers
    assert headers.get_list("x-content-type-options") == ["nosniff"]
    assert headers.keys().isdisjoint({"server", "x-powered-by", "via"})


@pytest.mark.parametrize("name", API_READS)
def test_what_is_read_is_cached_by_the_caller_alone(send: Callable[..., httpx.Response], name: str) -> None:
    assert send(name).headers.get_list("cache-control") == ["private, no-cache"]


@pytest.mark.parametrize("name", API_WRITES_AND_ERRORS)
def test_writes_and_errors_are_not_stored(send: Callable[..., httpx.Response], name: str) -> None:
    assert send(name).headers.get_list("cache-control") == ["no-store"]


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


# --- CORS ------------------------------------------------------------------------------------------------------------

EXPOSED = {"etag", "location", "retry-after", "x-request-id"}
STRANGERS = [
    "https://evil.example.com", "http://app.example.com", "https://app.example.com:8443", "https://app.example.com/",
    "https://app.example.com.evil.com", "https://evilapp.example.com", "https://example.com", "http://localhost:3000",
    "null", "*", "",
]  # fmt: skip


def names(header: str) -> set[str]:
    """Return the members of a header that is a list."""
    return {name.strip().lower() for name in header.split(",")}


@pytest.mark.parametrize(("name", "origin"), [*((name, APP) for name in ALL), ("200 GET list", OTHER_APP)])
def test_an_allowed_origin_may_read_every_answer(send: Callable[..., httpx.Response], name: str, origin: str) -> None:
    headers = send(name, Origin=origin).headers
    assert headers.get_list("access-control-allow-origin") == [origin]
    assert headers.get_list("access-control-allow-credentials") == ["true"]
    assert names(headers["access-control-expose-headers"]) == EXPOSED
    assert "origin" in names(headers["vary"])


@pytest.mark.parametrize("name", ALL)
def test_another_origin_may_read_no_answer(send: Callable[..., httpx.Response], name: str) -> None:
    assert "access-control-allow-origin" not in send(name, Origin=STRANGERS[0]).headers
    assert "access-control-allow-origin" not in send(name).headers


@pytest.mark.parametrize("origin", STRANGERS)
def test_an_origin_is_allowed_as_a_whole_or_not_at_all(send: Callable[..., httpx.Response], origin: str) -> None:
    assert "access-control-allow-origin" not in send("200 GET list", Origin=origin).headers
    assert "access-control-allow-origin" not in send("401 GET", Origin=origin).headers


def test_an_answer_for_one_origin_is_never_taken_for_another(send: Callable[..., httpx.Response]) -> None:
    """A cache that has the answer to one origin, or to none, must ask again for another."""
    for origin in ({}, {"Origin": APP}, {"Origin": STRANGERS[0]}):
        assert "origin" in names(send("200 GET list", **origin).headers["vary"])


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:3000", "http://localhost:5173"])
def test_the_usual_origins_are_allowed_where_none_are_configured(nobody: Client, origin: str) -> None:
    response = nobody.get("/api/tasks", headers={"Origin": origin})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, origin)
    assert "access-control-allow-origin" not in nobody.get("/api/tasks", headers={"Origin": APP}).headers


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
REQUEST_HEADERS = ["Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key", "X-Request-ID"]

SAFELISTED = {"accept", "accept-language", "content-language", "content-type"}
"""What browsers let any origin send anyway."""


def preflight(
    service: Service, origin: str, method: str, headers: str = "", path: str = "/api/tasks"
) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers:
        asked["Access-Control-Request-Headers"] = headers
    with service.client() as client:
        return client.options(path, headers=asked)


@pytest.mark.parametrize(
    "path", ["/api/tasks", "/api/tasks/", "/api/tasks/1", "/api/tasks/1/complete", "/health", "/x"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_preflight_of_an_allowed_origin_is_granted_without_a_token(
    configured: Service, method: str, path: str
) -> None:
    response = preflight(configured, APP, method, ", ".join(REQUEST_HEADERS), path)
    assert response.status_code in (200, 204)
    assert response.headers.get_list("access-control-allow-origin") == [APP]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert names(response.headers["access-control-allow-methods"]) == names(",".join(METHODS))
    assert (
        names(response.headers["access-control-allow-headers"]) - SAFELISTED
        == names(",".join(REQUEST_HEADERS)) - SAFELISTED
    )
    assert "origin" in names(response.headers["vary"])


@pytest.mark.parametrize("headers", [*REQUEST_HEADERS, "authorization", "authorization,content-type", ""])
def test_a_preflight_is_granted_for_each_header(configured: Service, headers: str) -> None:
    response = preflight(configured, OTHER_APP, "PATCH", headers)
    assert response.status_code in (200, 204)
    assert response.headers["access-control-allow-origin"] == OTHER_APP


@pytest.mark.parametrize("origin", STRANGERS)
def test_a_preflight_of_another_origin_is_refused(configured: Service, origin: str) -> None:
    response = preflight(configured, origin, "GET", "Authorization")
    assert response.status_code >= 400
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(("method", "headers"), [("TRACE", ""), ("PURGE", ""), ("get", ""), ("GET", "X-Forwarded-For")])
def test_a_preflight_for_anything_else_is_refused(configured: Service, method: str, headers: str) -> None:
    response = preflight(configured, APP, method, headers)
    assert response.status_code >= 400


def test_a_preflight_does_nothing(configured: Service) -> None:
    before = configured.sql("SELECT * FROM task")
    for method, path in (("DELETE", "/api/tasks/1"), ("PATCH", "/api/tasks/1/complete"), ("POST", "/api/tasks")):
        preflight(configured, APP, method, path=path)
    assert configured.sql("SELECT * FROM task") == before


# --- The log ---------------------------------------------------------------------------------------------------------


def new_request_id() -> str:
    return f"log-{uuid.uuid4().hex}"


def fields(line: str) -> dict[str, str]:
    """Return the fields of a line in logfmt; every character of it must belong to one."""
    field = r'([a-z]+)=("(?:[^"\\]|\\.)*"|[^\s"=]*)'
    assert re.fullmatch(rf"{field}( {field})*", line), line
    return {name: json.loads(value) if value.startswith('"') else value for name, value in re.findall(field, line)}


def line_of(service: Service, request_id: str) -> dict[str, str]:
    """Return the fields of the one line that a request has in the log."""
    line = service.log_line(request_id)
    assert service.log.count(request_id) == 1
    assert re.fullmatch("[ -~]*", line)
    return fields(line)


@pytest.mark.parametrize("name", ALL)
def test_a_request_has_one_line_in_the_log(configured: Service, send: Callable[..., httpx.Response], name: str) -> None:
    request_id = new_request_id()
    send(name, X_Request_ID=request_id)
    line = line_of(configured, request_id)
    assert (line["method"], line["status"], line["id"]) == (ALL[name][0], name[:3], request_id)
    assert re.fullmatch(ALL[name][1].partition("?")[0].replace("{id}", "[0-9]+"), line["path"])
    assert 0 <= float(line["ms"]) < 60_000


def test_nothing_else_logs_a_request(service: Service, alice: Client) -> None:
    """The server neither."""
    request_id, path = new_request_id(), f"/api/{uuid.uuid4().hex}"
    alice.get(path, headers={"X-Request-ID": request_id})
    assert line_of(service, request_id)["path"] == path
    assert service.log.count(path) == 1


def test_a_line_names_the_caller_once_known(service: Service, alice: Client, nobody: Client) -> None:
    ids = [new_request_id() for _ in range(4)]
    alice.get("/api/tasks/0", headers={"X-Request-ID": ids[0]})
    alice.get("/health", headers={"X-Request-ID": ids[1]})
    nobody.get("/api/tasks", headers={"X-Request-ID": ids[2]})
    forged = token(alice.user_id, secret="another secret that is also of 32 characters or more")
    nobody.get("/api/tasks", headers={"X-Request-ID": ids[3], "Authorization": f"Bearer {forged}"})
    assert [line_of(service, request_id).get("user") for request_id in ids] == [alice.user_id, None, None, None]


@pytest.mark.parametrize(
    "user_id",
    ["alice bob", "alice\nmethod=GET path=/forged status=200", "a\r\nb", "a\tb", '"', '" status="500',
     "\\", '\\" x="', "a=b", "a\x1b[31mb", "a\u2028b", "a\x85b", "é\U0001f600", "a\x7fb", "id=x", "-", "x" * 255],
    ids=lambda user_id: ascii(user_id)[:24],
)  # fmt: skip
def test_a_user_id_cannot_forge_a_log_line(service: Service, user_id: str) -> None:
    request_id = new_request_id()
    with service.client(user_id) as client:
        assert client.get("/api/tasks", headers={"X-Request-ID": request_id}).status_code == 200
    assert line_of(service, request_id)["user"] == user_id
    assert "\nmethod=GET path=/forged" not in service.log


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        ("/a%20b", "/a b"),
        ("/a%0Amethod=GET%20path=/forged%20status=200", "/a\nmethod=GET path=/forged status=200"),
        ("/a%0D%0Ab", "/a\r\nb"),
        ("/%22", '/"'),
        ("/%22%20status=%22500", '/" status="500'),
        ("/%5C%22", '/\\"'),
        ("/a=b", "/a=b"),
        ("/%1B%5B31m", "/\x1b[31m"),
        ("/%E2%80%A8", "/\u2028"),
        ("/%C2%85", "/\x85"),
        ("/%00", "/\0"),
        ("/%C3%A9", "/é"),
        ("/%FF", "/\ufffd"),
        ("/%7F", "/\x7f"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "/api/tasks"])
def test_a_path_cannot_forge_a_log_line(service: Service, alice: Client, prefix: str, sent: str, logged: str) -> None:
    request_id = new_request_id()
    assert alice.get(prefix + sent, headers={"X-Request-ID": request_id}).status_code in (404, 422)
    assert line_of(service, request_id)["path"] == prefix + logged
    assert "\nmethod=GET path=/forged" not in service.log


@pytest.mark.parametrize(
    ("sent", "decoded", "length"),
    [("x" * 60_000, "x" * 60_000, 500), ("%00" * 20_000, "\0" * 20_000, 1500),
     ("%F0%9F%98%80" * 5000, "\U0001f600" * 5000, 2700), ("%FF" * 20_000, "\ufffd" * 20_000, 1500)],
    ids=["letters", "NUL", "emoji", "no UTF-8"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["/", "/api/tasks/"])
def test_a_long_path_makes_no_long_line(
    service: Service, alice: Client, prefix: str, sent: str, decoded: str, length: int
) -> None:
    """Its first 200 characters are logged, which can be twelve times as much where they have to be escaped."""
    request_id = new_request_id()
    assert alice.get(prefix + sent, headers={"X-Request-ID": request_id}).status_code in (404, 422)
    assert line_of(service, request_id)["path"] == (prefix + decoded)[:200]
    assert len(service.log_line(request_id)) < length


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux has pipes that keep writes apart")
def test_lines_of_one_moment_are_written_in_pieces_that_a_pipe_takes_whole() -> None:
    """Or those of two workers could be mixed, and a path begin a line."""
    reader, writer = os.pipe2(os.O_DIRECT)  # of which each read returns what one write has written
    pieces: list[bytes] = []
    port = free_port()
    url = "postgresql://nobody@127.0.0.1:1/nothing"  # no request here needs the database
    variables = environment(DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET, PORT=str(port))
    command = ["sh", "-c", f"exec env {procfile_line('web')}"]

    def wait_for(text: bytes, count: int) -> None:
        deadline = time.monotonic() + 30
        while b"".join(pieces).count(text) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with (
        ThreadPoolExecutor(1) as threads,
        subprocess.Popen(command, cwd=ROOT, env=variables, stdout=writer, stderr=subprocess.STDOUT) as process,
    ):
        os.close(writer)
        threads.submit(lambda: pieces.extend(iter(lambda: os.read(reader, 65_536), b"")))
        try:
            wait_for(b"Uvicorn running", 1)
            connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(200)]
            request = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 199)
            for connection in connections:
                connection.sendall(request)
                assert connection.recv(65_536).startswith(b"HTTP/1.1 404 ")
            wait_for(b"method=GET", len(connections))
            process.send_signal(signal.SIGSTOP)  # until all have asked again
            for connection in connections:
                connection.sendall(request)
            process.send_signal(signal.SIGCONT)
            wait_for(b"method=GET", 2 * len(connections))
            for connection in connections:
                connection.close()
        finally:
            process.terminate()
    os.close(reader)
    lines = [piece for piece in pieces if b"method=GET" in piece]
    assert len(lines) < 2 * len(connections)  # so that some were written together
    assert [piece for piece in lines if len(piece) > 4096 or not piece.endswith(b"\n")] == []


def test_the_log_holds_no_token_and_no_query_string(configured: Service) -> None:
    """Whatever becomes of the request."""
    mark = uuid.uuid4().hex
    good = token(new_user_id())
    tokens = [good, token(new_user_id(), secret=mark), token(new_user_id(), exp=1), f"nonsense-{mark}"]
    with configured.client() as client:
        for sent in tokens:
            headers = {"Authorization": f"Bearer {sent}", "Cookie": f"session={mark}"}
            client.get(f"/api/tasks?status=pending&token={mark}", headers=headers)
            client.get(f"/api/tasks?status={mark}", headers=headers)
            client.get(f"/api/nothing?{mark}", headers=headers)
            client.get(f"/docs?{mark}", headers=headers)
            client.post(f"/api/tasks?{mark}", json={"title": mark, "description": mark}, headers=headers)
            client.post(f"/api/tasks?{mark}", json={"title": "bug"}, headers=headers)
            client.post(f"/api/tasks?{mark}", content=f"{{{mark}", headers=headers)
        request_id = new_request_id()
        client.get("/health", headers={"X-Request-ID": request_id})
    configured.log_line(request_id)
    assert mark not in configured.log
    for sent in tokens:
        assert sent not in configured.log
        assert sent.rpartition(".")[2] not in configured.log


def test_the_log_holds_no_secret(configured: Service) -> None:
    assert SECRET not in configured.log
    assert configured.database_url not in configured.log


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
