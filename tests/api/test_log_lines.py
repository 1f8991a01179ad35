"""The log: one line for each request, which nobody can forge and in which there is no secret."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.answers import ALL, EACH_STATUS
from tests.support.postgres import held_port
from tests.support.service_process import ROOT, SECRET, Client, Service, environment, new_user_id, procfile_line, token
from tests.support.waiting import wait_until

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


@pytest.mark.parametrize("name", EACH_STATUS)
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
    ["alice bob", "alice\nmethod=GET path=/forged status=200", '" status="500', '\\" x="', "a=b", "a\x1b[31m\u2028b",
     "x" * 255],
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
        ("/%22%20status=%22500", '/" status="500'),
        ("/%5C%22", '/\\"'),
        ("/a=b", "/a=b"),
        ("/%1B%5B31m", "/\x1b[31m"),
        ("/%E2%80%A8%C2%85", "/\u2028\x85"),
        ("/%00%7F", "/\0\x7f"),
        ("/%FF", "/\ufffd"),
    ],
)
def test_a_path_cannot_forge_a_log_line(service: Service, alice: Client, sent: str, logged: str) -> None:
    request_id = new_request_id()
    assert alice.get(sent, headers={"X-Request-ID": request_id}).status_code == 404
    assert line_of(service, request_id)["path"] == logged
    assert "\nmethod=GET path=/forged" not in service.log


def test_neither_a_query_nor_a_request_id_can_forge_a_log_line(service: Service, alice: Client) -> None:
    forged = "method=GET path=/forged status=200 ms=0.1 id=forged"
    query = f"status=%0A{forged.replace(' ', '%20')}"
    response = alice.get(f"/api/tasks?{query}", headers={"X-Request-ID": forged})
    assert response.status_code == 422
    assert line_of(service, response.headers["x-request-id"])["path"] == "/api/tasks"
    assert "forged" not in service.log_line(response.headers["x-request-id"])
    assert "\nmethod=GET path=/forged" not in service.log


@pytest.mark.parametrize(
    ("sent", "decoded", "length"),
    [("x" * 60_000, "x" * 60_000, 500), ("%00" * 20_000, "\0" * 20_000, 1500),
     ("%F0%9F%98%80" * 5000, "\U0001f600" * 5000, 2700)],
    ids=["letters", "NUL", "emoji"],
)  # fmt: skip
def test_a_long_path_makes_no_long_line(service: Service, alice: Client, sent: str, decoded: str, length: int) -> None:
    """Its first 200 characters are logged, which can be twelve times as much where they have to be escaped."""
    request_id = new_request_id()
    assert alice.get(f"/{sent}", headers={"X-Request-ID": request_id}).status_code == 404
    assert line_of(service, request_id)["path"] == f"/{decoded}"[:200]
    assert len(service.log_line(request_id)) < length


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only Linux has pipes that keep writes apart")
def test_lines_of_one_moment_are_written_in_pieces_that_a_pipe_takes_whole() -> None:
    """Or those of two workers could be mixed, and a path begin a line."""
    reader, writer = os.pipe2(os.O_DIRECT)  # of which each read returns what one write has written
    pieces: list[bytes] = []
    port = held_port()
    url = "postgresql://nobody@127.0.0.1:1/nothing"  # no request here needs the database
    variables = environment(DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET, PORT=str(port))
    command = ["sh", "-c", f"exec env {procfile_line('web')}"]

    def printed(text: bytes) -> int:
        return b"".join(pieces).count(text)

    with (
        ThreadPoolExecutor(1) as threads,
        subprocess.Popen(command, cwd=ROOT, env=variables, stdout=writer, stderr=subprocess.STDOUT) as process,
    ):
        os.close(writer)
        threads.submit(lambda: pieces.extend(iter(lambda: os.read(reader, 65_536), b"")))
        try:
            wait_until(lambda: printed(b"Uvicorn running"))
            connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(200)]
            request = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 199)
            for connection in connections:
                connection.sendall(request)
                assert connection.recv(65_536).startswith(b"HTTP/1.1 404 ")
            wait_until(lambda: printed(b"method=GET") == len(connections))
            process.send_signal(signal.SIGSTOP)  # until all have asked again
            for connection in connections:
                connection.sendall(request)
            process.send_signal(signal.SIGCONT)
            wait_until(lambda: printed(b"method=GET") == 2 * len(connections))
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
