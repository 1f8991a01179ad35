"""Errors: 401, 404, 405 and 500 to the letter, and which of several errors is told."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.copies import copy_program
from tests.support.errors import (
    BLANK,
    LIMIT,
    NOT_DECLARED_AS_JSON,
    NOT_JSON,
    TOO_LARGE,
    assert_error,
    assert_invalid,
    padded,
)
from tests.support.service_process import ROOT, Client, Service, new_user_id, token
from tests.support.wire import exchange

NO_TASK = "/api/tasks/4611686018427387904"

# --- 401: no token, or none that is good -----------------------------------------------------------------------------

EXPIRED = token("somebody", exp=int(time.time()) - 3600)
FORGED = token("somebody", secret="another secret that is also of 32 characters or more")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "bearer",
        "Basic YWxpY2U6c2VjcmV0",
        f"Token {token()}",
        token(),
        f"Bearer{token()}",
    ],
    ids=["none", "empty", "scheme", "blank", "lower", "Basic", "Token", "no scheme", "no space"],
)
def test_who_sends_no_token_is_not_authenticated(service: Service, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for path in ("/api/tasks", "/api/tasks/1", "/api/nothing"):
        status, answered, body = exchange(service, "GET", path, headers)
        assert (status, json.loads(body)) == (401, {"detail": "Not authenticated"})
        assert (answered["www-authenticate"], answered["content-type"]) == ("Bearer", "application/json")


@pytest.mark.parametrize(
    ("authorization", "detail"),
    [
        pytest.param(f"Bearer {EXPIRED}", "Token has expired", id="expired"),
        pytest.param(f"bearer {EXPIRED}", "Token has expired", id="expired, lower case"),
        pytest.param(f"Bearer {FORGED}", "Invalid token", id="another secret"),
        pytest.param(f"Bearer {token()}x", "Invalid token", id="another signature"),
        pytest.param(f"Bearer {token()} {token()}", "Invalid token", id="two tokens"),
        pytest.param("Bearer nonsense", "Invalid token", id="nonsense"),
        pytest.param("Bearer a.b.c", "Invalid token", id="three dots of nonsense"),
        pytest.param("Bearer \xff\xc3\xa9", "Invalid token", id="no ASCII"),
    ],
)
def test_a_token_that_is_not_good_is_refused(nobody: Client, authorization: str, detail: str) -> None:
    response = nobody.get("/api/tasks", headers={b"Authorization": authorization.encode("latin-1")})
    assert_error(response, 401, detail, WWW_Authenticate='Bearer error="invalid_token"')


def test_two_authorization_headers_are_refused(service: Service, alice: Client, bob: Client, untouched: str) -> None:
    """Even if both are valid: what stands before the service may have looked at the other one."""
    good, his = f"Bearer {token(alice.user_id)}", f"Bearer {token(bob.user_id)}"
    for first, last in ((good, good), (his, good), (good, his), (good, "none"), ("none", good), ("", good), (good, "")):
        headers = [("Authorization", first), ("Authorization", last)]
        for method, path in (("GET", untouched), ("DELETE", untouched), ("GET", "/api/nothing")):
            with service.client() as client:
                response = client.request(method, path, headers=headers)
            assert_error(response, 401, "Invalid token", WWW_Authenticate='Bearer error="invalid_token"')


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR", "Bearer  "])
def test_the_scheme_is_read_in_any_case(service: Service, alice: Client, scheme: str) -> None:
    task = alice.create()
    headers = {"Authorization": f"{scheme} {token(alice.user_id)}"}
    with service.client(headers=headers) as client:
        assert client.tasks() == [task]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("action", ["", "/complete", "/nothing", "/"])
def test_nothing_is_done_or_told_without_a_token(nobody: Client, untouched: str, method: str, action: str) -> None:
    for headers in ({}, {"Authorization": f"Bearer {FORGED}"}):
        response = nobody.request(method, untouched + action, headers=headers)
        assert response.status_code == 401
        assert "allow" not in response.headers
    for body in ({"title": "mine now"}, {"title": ""}):
        assert nobody.request(method, untouched + action, json=body).status_code == 401


# --- 404: no such task, no such path ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task_id",
    ["0", "00", "-1", "-0", "-7", str(2**62), str(2**63 - 1), str(2**63), str(-(2**63)), str(-(2**63) - 1),
     str(2**64 + 1), "9" * 20, "9" * 5000, "-" + "9" * 5000],
    ids=lambda task_id: task_id[:22],
)  # fmt: skip
def test_an_integer_that_names_no_task_is_not_found(alice: Client, untouched: str, task_id: str) -> None:
    path = f"/api/tasks/{task_id}"
    assert_error(alice.get(path), 404, "Task not found")
    assert_error(alice.put(path, json={"title": "new"}), 404, "Task not found")
    assert_error(alice.patch(f"{path}/complete"), 404, "Task not found")
    assert_error(alice.delete(path), 404, "Task not found")


def test_an_id_beyond_the_largest_is_not_taken_for_a_small_one(alice: Client, untouched: str) -> None:
    task_id = int(untouched.rpartition("/")[2])
    for other in (task_id + 2**32, task_id + 2**63, task_id + 2**64, -task_id):
        assert_error(alice.delete(f"/api/tasks/{other}"), 404, "Task not found")


UNKNOWN_PATHS = [
    "/nothing", "/healthz", "/health/live", "/healthy", "/Health", "/index.html", "/favicon.ico", "/task", "/tasks",
    "/api", "/api/", "/api/nothing", "/api/task", "/api/Tasks", "/API/tasks", "/api/tasks/1/2", "/api/tasks/1/nothing",
    "/api/tasks/complete/x", "/api/tasks/1/complete/x", "/api/tasks//", "/api//tasks", "//api/tasks",
    "/api/tasks/1//complete", "/api%2ftasks%2f%2f", "/docs/nothing", "/docs/x/y", "/docs/swagger_bundle.js/x",
    "/docs/..%2fservice.py", "/docs/%2e%2e%2fservice.py", "/docs/..%2f..%2fpyproject.toml", "/service.py", "/.env",
    "/sql/schema.sql", "/.postgres/secret", "/openapi.yaml", "/openapi", "/redoc;x=1", "/%00", "/%ff", "/health%20",
    "/api/tasks%20", "/health%0A", "/openapi.json%0A", "/docs%0A", "/%0A", "/api/tasks%0A", "/api/tasks/1/complete%0A",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_an_unknown_path_is_not_found(service: Service, alice: Client, method: str, path: str) -> None:
    """With exactly these bytes as the path: an HTTP client would put some of them in order first."""
    status, headers, body = exchange(service, method, path, {"Authorization": alice.headers["Authorization"]})
    assert (status, json.loads(body)) == (404, {"detail": "Not Found"})
    assert headers["content-type"] == "application/json"


def test_an_unknown_path_is_not_found_without_a_token_where_none_is_needed(nobody: Client) -> None:
    assert_error(nobody.get("/nothing"), 404, "Not Found")
    assert_error(nobody.post("/docs/nothing/else"), 404, "Not Found")


# --- 405: no such method ---------------------------------------------------------------------------------------------

ALLOW = {
    "/api/tasks": {"GET", "HEAD", "POST"},
    "/api/tasks/1": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/tasks/x": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/tasks/1/complete": {"PATCH"},
    "/": {"GET", "HEAD"},
    "/health": {"GET", "HEAD"},
    "/health/ready": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},
    "/docs/swagger_bundle.js": {"GET", "HEAD"},
    "/redoc": {"GET", "HEAD"},
    "/openapi.json": {"GET", "HEAD"},
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE"]


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for path, allowed in ALLOW.items() for method in METHODS if method not in allowed],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_method_that_a_path_does_not_have_is_refused(alice: Client, method: str, path: str, slash: str) -> None:
    response = alice.request(method, path if path == "/" else path + slash)
    allowed = response.headers["allow"]
    assert set(allowed.split(", ")) == ALLOW[path]
    if method == "HEAD":
        assert (response.status_code, response.content) == (405, b"")
    else:
        assert_error(response, 405, "Method Not Allowed", Allow=allowed)


@pytest.mark.parametrize("path", ALLOW)
def test_every_allowed_method_is_there(alice: Client, path: str) -> None:
    for method in sorted(ALLOW[path]):
        assert alice.request(method, path).status_code not in (405, 500)


# --- 500: a bug ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(new_database: Callable[[], str]) -> Iterator[Service]:
    """A service on a database in which every write of a task with the title `bug` raises what no one expects."""
    service = Service(new_database())
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the secret of the database' USING ERRCODE = 'internal_error';
        END $$;
        CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON task
            FOR EACH ROW WHEN (NEW.title = 'bug') EXECUTE FUNCTION fail();
        """)
    yield service
    service.remove()


def test_a_bug_is_logged_with_its_traceback_and_answered_without(faulty: Service) -> None:
    with faulty.client(new_user_id()) as client:
        response = client.post("/api/tasks", json={"title": "bug"}, headers={"X-Request-ID": "bug-1"})
        assert_error(response, 500, "Internal Server Error")
        assert response.headers["x-request-id"] == "bug-1"
        assert "id=bug-1" in faulty.log_line("bug-1")
        client.get("/api/tasks", headers={"X-Request-ID": "after"})
        faulty.log_line("after")  # what comes before it is there by now
    after_bug = faulty.log.partition("id=bug-1")[2]
    assert after_bug.partition("\n")[2].startswith("Traceback (most recent call last):\n")
    assert "the secret of the database" in after_bug


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "a"}], ids=["without a key", "with a key"])
def test_an_id_that_is_taken_already_is_a_bug(
    new_database: Callable[[], str], start_service: Callable[..., Service], headers: dict[str, str]
) -> None:
    """As after a restore that has left the sequence of the ids behind its table: nothing is the client's fault."""
    service = start_service(new_database())
    service.wait_until_ready()
    with service.client("alice") as alice:
        tasks = [alice.create(str(number)) for number in range(50)][::-1]
        before = service.rows(alice)
        service.sql("SELECT setval(pg_get_serial_sequence('task', 'id'), %s)", tasks[-1]["id"])
        for number in range(7):
            given = {"X-Request-ID": f"taken-{number}"}
            response = alice.post("/api/tasks", json={"title": "new"}, headers=headers | given)
            assert_error(response, 500, "Internal Server Error")
            assert " status=500 " in service.log_line(f"taken-{number}")
        assert alice.get("/health", headers={"X-Request-ID": "after"}).status_code == 200
        service.log_line("after")  # what comes before it is there by now
        assert service.log.count("Traceback (most recent call last):\n") == 7
        assert service.log.count("UniqueViolationError") >= 7
        assert service.rows(alice) == before
        service.sql("SELECT setval(pg_get_serial_sequence('task', 'id'), max(id)) FROM task")
        response = alice.post("/api/tasks", json={"title": "new"}, headers=headers)
        assert (response.status_code, alice.tasks()) == (201, [response.json(), *tasks])


def test_what_a_rule_of_the_database_refuses_is_no_bug(
    new_database: Callable[[], str], start_service: Callable[..., Service]
) -> None:
    """One that whoever runs the service has added: a constraint or a trigger."""
    service = start_service(new_database())
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the secret of the database';
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON task
            FOR EACH ROW WHEN (NEW.title = 'trigger') EXECUTE FUNCTION refuse();
        ALTER TABLE task ADD CONSTRAINT task_no_x CHECK (title <> 'constraint');
        """)
    with service.client("alice") as alice:
        task = alice.create()
        for title in ("trigger", "constraint"):
            error = ("body", "is refused by the database")
            assert_invalid(alice.post("/api/tasks", json={"title": title}), error)
            assert_invalid(alice.put(f"/api/tasks/{task['id']}", json={"title": title}), error)
        assert alice.tasks() == [task]
    assert "Traceback" not in service.log


def test_an_exception_in_the_middle_of_an_answer_is_logged_with_the_status_that_was_sent(
    tmp_path: Path, new_database: Callable[[], str]
) -> None:
    program = (ROOT / "service.py").read_text()
    [routes] = re.findall("^ROUTES = .*\n", program, re.MULTILINE)
    breaks_off = """
class BreaksOff:
    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"9")]})
        raise OSError("this was too late")
ROUTES += [Route("/breaks-off", BreaksOff())]
"""
    copy_program(tmp_path, {"service.py": program.replace(routes, routes + breaks_off)})
    service = Service(new_database(), folder=tmp_path)
    try:
        service.wait_until_ready()
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{service.url}/breaks-off", headers={"X-Request-ID": "late"})
        assert "status=201" in service.log_line("late")
        httpx.get(f"{service.url}/health", headers={"X-Request-ID": "after"})
        service.log_line("after")
        assert service.log.count("Traceback") == service.log.count("OSError: this was too late") == 1
    finally:
        service.remove()


def test_a_bug_changes_nothing_and_harms_no_other_request(faulty: Service) -> None:
    with faulty.client(new_user_id()) as client, faulty.client(new_user_id()) as other:
        task, before = client.create(), other.create()
        path = f"/api/tasks/{task['id']}"
        for _ in range(20):  # more than there are connections
            assert_error(client.put(path, json={"title": "bug", "completed": True}), 500, "Internal Server Error")
        assert client.tasks() == [task]
        assert client.put(path, json={"title": "no bug"}).status_code == 200
        assert other.tasks() == [before]


def test_a_bug_is_answered_on_reads_too(faulty: Service) -> None:
    faulty.sql("ALTER TABLE task RENAME COLUMN description TO details")
    try:
        with faulty.client(new_user_id()) as client:
            assert_error(client.get("/api/tasks"), 500, "Internal Server Error")
            head = client.head("/api/tasks")
            assert (head.status_code, head.content) == (500, b"")
    finally:
        faulty.sql("ALTER TABLE task RENAME COLUMN details TO description")


# --- Which of several errors is told ---------------------------------------------------------------------------------

HUGE, TEXT, HALF, WRONG, FINE = padded(LIMIT + 1), {"Content-Type": "text/plain"}, b"{", b'{"title": 1}', b"{}"


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        # what precedes 404 and 405 for what does not exist: nothing but 401
        ("POST", "/api/nothing", HUGE, TEXT, 404),
        ("POST", "/api/tasks/x", HUGE, TEXT, 405),
        ("DELETE", "/api/tasks/x/complete", HALF, TEXT, 405),
        # then 413, with all that could be wrong beside it, and one thing less in each line
        ("POST", "/api/tasks", HUGE, TEXT, 413),
        ("PUT", "/api/tasks/x", HUGE, TEXT, 413),
        ("DELETE", "/api/tasks/x", HUGE, TEXT, 413),
        ("PATCH", "/api/tasks/x/complete", HUGE, TEXT, 413),
        ("POST", "/api/tasks", HALF, TEXT, 415),
        ("PUT", "/api/tasks/x", HALF, TEXT, 415),
        ("DELETE", "/api/tasks/x", HALF, TEXT, 415),
        ("DELETE", NO_TASK, FINE, TEXT, 415),
        ("PATCH", "/api/tasks/x/complete", HALF, TEXT, 415),
        ("PUT", NO_TASK, WRONG, TEXT, 415),
        ("POST", "/api/tasks", HALF, {}, 400),
        ("PUT", "/api/tasks/x", HALF, {}, 400),
        ("PUT", "/api/tasks/x", b"", {}, 400),
        ("PATCH", "/api/tasks/x/complete", HALF, {}, 400),
        ("PUT", NO_TASK, HALF, {}, 400),
        ("PUT", "/api/tasks/x", FINE, {}, 422),
        ("PATCH", "/api/tasks/x/complete", FINE, {}, 422),
        ("PATCH", "/api/tasks/x/complete", b"", {}, 422),
        ("PATCH", "/api/tasks/x/complete", b"null", {}, 422),
        ("DELETE", "/api/tasks/x", b"", TEXT, 422),
        ("PUT", NO_TASK, WRONG, {}, 422),
        ("PATCH", f"{NO_TASK}/complete", b'{"completed": 1}', {}, 422),
        # and last what only the database knows
        ("PUT", NO_TASK, FINE, {}, 404),
        ("PATCH", f"{NO_TASK}/complete", FINE, {}, 404),
        ("PATCH", f"{NO_TASK}/complete", b"", TEXT, 404),
        ("PATCH", f"{NO_TASK}/complete", b"null", {}, 404),
        ("DELETE", NO_TASK, FINE, {}, 404),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_errors_are_told_in_a_fixed_order(
    alice: Client, nobody: Client, method: str, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    assert alice.request(method, path, content=content, headers=headers).status_code == status
    without = nobody.request(method, path, content=content, headers=headers)
    assert_error(without, 401, "Not authenticated", WWW_Authenticate="Bearer")


def test_a_wrong_request_for_the_task_of_another_is_wrong_and_no_more(bob: Client, untouched: str) -> None:
    """It tells nothing of whether the task is there."""
    for path in (untouched, NO_TASK):
        assert_error(bob.put(path, content=HALF), 400, NOT_JSON)
        assert_error(bob.put(path, content=HUGE), 413, TOO_LARGE)
        assert_error(bob.put(path, content=FINE, headers=TEXT), 415, NOT_DECLARED_AS_JSON)
        assert_invalid(bob.put(path, json={"title": ""}), ("title", BLANK))
        assert_invalid(bob.patch(f"{path}/complete", json={"completed": 1}), ("completed", "must be true or false"))
