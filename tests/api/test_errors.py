"""Errors: 401 and 500 to the letter, and which of several errors is told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
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

NO_TASK = "/api/tasks/4611686018427387904"

# --- 401: no token, or none that is good; tests/auth has all that can be wrong with one ------------------------------

EXPIRED = token("somebody", exp=int(time.time()) - 3600)


@pytest.mark.parametrize("path", ["/api/tasks", "/api/tasks/1", "/api/tasks/x", "/api/nothing", "/api"])
@pytest.mark.parametrize(
    ("headers", "detail", "challenge"),
    [
        ({}, "Not authenticated", "Bearer"),
        ({"Authorization": f"Bearer {EXPIRED}"}, "Token has expired", 'Bearer error="invalid_token"'),
        ({"Authorization": "Bearer nonsense"}, "Invalid token", 'Bearer error="invalid_token"'),
    ],
    ids=["none", "expired", "wrong"],
)
def test_whoever_has_no_good_token_is_told_so_and_nothing_of_the_path(
    nobody: Client, path: str, headers: dict[str, str], detail: str, challenge: str
) -> None:
    assert_error(nobody.get(path, headers=headers), 401, detail, WWW_Authenticate=challenge)
    assert_error(nobody.patch(path, headers=headers), 401, detail, WWW_Authenticate=challenge)


def test_two_authorization_headers_are_refused(service: Service, alice: Client, bob: Client, untouched: str) -> None:
    """Even if both are valid: what stands before the service may have looked at the other one."""
    no_token = {"detail": "Not authenticated", "WWW_Authenticate": "Bearer"}
    bad_token = {"detail": "Invalid token", "WWW_Authenticate": 'Bearer error="invalid_token"'}
    good, his = f"Bearer {token(alice.user_id)}", f"Bearer {token(bob.user_id)}"
    for first, last in ((good, good), (his, good), (good, his), (good, "none"), ("none", good), ("", good), (good, "")):
        headers = [("Authorization", first), ("Authorization", last)]
        for method, path in (("GET", untouched), ("DELETE", untouched), ("GET", "/api/nothing")):
            with service.client() as client:
                response = client.request(method, path, headers=headers)
            assert_error(response, 401, **(bad_token if first.startswith("Bearer") else no_token))


def test_there_may_be_more_than_one_space_before_a_token(service: Service, alice: Client) -> None:
    task = alice.create()
    with service.client(headers={"Authorization": f"Bearer  {token(alice.user_id)}"}) as client:
        assert client.tasks() == [task]


# --- 500: a bug ------------------------------------------------------------------------------------------------------


def test_a_bug_is_logged_with_its_traceback_and_answered_without(configured: Service) -> None:
    with configured.client(new_user_id()) as client:
        response = client.post("/api/tasks", json={"title": "bug"}, headers={"X-Request-ID": "bug-1"})
        assert_error(response, 500, "Internal Server Error")
        assert response.headers["x-request-id"] == "bug-1"
        assert "id=bug-1" in configured.log_line("bug-1")
        client.get("/api/tasks", headers={"X-Request-ID": "after"})
        configured.log_line("after")  # what comes before it is there by now
    after_bug = configured.log.partition("id=bug-1")[2]
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
        raise LookupError("this was too late")
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
        assert service.log.count("Traceback") == service.log.count("LookupError: this was too late") == 1
    finally:
        service.remove()


def test_a_bug_changes_nothing_and_harms_no_other_request(configured: Service) -> None:
    with configured.client(new_user_id()) as client, configured.client(new_user_id()) as other:
        task, before = client.create(), other.create()
        path = f"/api/tasks/{task['id']}"
        for _ in range(20):  # more than there are connections
            assert_error(client.put(path, json={"title": "bug", "completed": True}), 500, "Internal Server Error")
        assert client.tasks() == [task]
        assert client.put(path, json={"title": "no bug"}).status_code == 200
        assert other.tasks() == [before]


def test_a_bug_is_answered_on_reads_too(configured: Service) -> None:
    configured.sql("ALTER TABLE task RENAME COLUMN description TO details")
    try:
        with configured.client(new_user_id()) as client:
            assert_error(client.get("/api/tasks"), 500, "Internal Server Error")
            head = client.head("/api/tasks")
            assert (head.status_code, head.content) == (500, b"")
    finally:
        configured.sql("ALTER TABLE task RENAME COLUMN details TO description")


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
        ("PATCH", "/api/tasks/x/complete", HALF, TEXT, 415),
        ("DELETE", NO_TASK, FINE, TEXT, 415),
        ("POST", "/api/tasks", HALF, {}, 400),
        ("PUT", "/api/tasks/x", b"", {}, 400),
        ("PATCH", "/api/tasks/x/complete", HALF, {}, 400),
        ("PUT", "/api/tasks/x", FINE, {}, 422),
        ("PATCH", "/api/tasks/x/complete", b"", {}, 422),
        ("DELETE", "/api/tasks/x", b"", TEXT, 422),
        ("PUT", NO_TASK, WRONG, {}, 422),
        ("PATCH", f"{NO_TASK}/complete", b'{"completed": 1}', {}, 422),
        # and last what only the database knows
        ("PUT", NO_TASK, FINE, {}, 404),
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
