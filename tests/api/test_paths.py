"""Paths: ids, slashes, HEAD, what is beside the tasks; paths and methods that there are not."""

from __future__ import annotations

import pytest

from tests.support.errors import NOT_AUTHENTICATED, TASK_NOT_FOUND, assert_error
from tests.support.service_process import Client, Service, token
from tests.support.tasks import NO_TASK, what_is_stable
from tests.support.wire import RawAnswer, all_that_comes, ask, bearer

PAGES = ["/", "/health", "/health/ready", "/docs", "/redoc", "/openapi.json"]

# --- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ["0", "0" * 5000], ids=len)
def test_an_id_may_have_leading_zeros(alice: Client, zeros: str) -> None:
    task, other = alice.create(), alice.create()
    path = f"/api/tasks/{zeros}{task['id']}"
    assert alice.get(path).json() == task
    assert alice.put(path, json={"title": "new"}).json()["title"] == "new"
    assert alice.patch(f"{path}/complete").json()["completed"] is True
    assert alice.delete(path).status_code == 204
    assert alice.tasks() == [other]


def test_a_trailing_slash_on_the_list_names_the_list(alice: Client, bob: Client) -> None:
    bob.create()
    response = alice.post("/api/tasks/", json={"title": "Buy milk"})
    assert (response.status_code, response.headers["location"]) == (201, f"/api/tasks/{response.json()['id']}")
    done = alice.create(completed=True)
    listed = alice.get("/api/tasks/")
    assert (listed.status_code, listed.json()) == (200, {"items": [done, response.json()]})
    assert alice.get("/api/tasks/?status=completed").json() == {"items": [done]}
    assert alice.head("/api/tasks/").status_code == 200


def test_a_trailing_slash_on_a_task_names_the_task_for_its_owner_alone(
    service: Service, alice: Client, bob: Client
) -> None:
    task, other, his = alice.create(), alice.create(), bob.create()
    before = service.rows(alice)
    path = f"/api/tasks/{task['id']}"
    for method, action, body in (
        ("GET", "", None),
        ("PUT", "", {}),
        ("PATCH", "/complete", None),
        ("DELETE", "", None),
    ):
        response = bob.request(method, f"{path}{action}/", json=body)
        assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND), method
    assert service.rows(alice) == before
    assert (response := alice.get(f"{path}/")).json() == task, response
    assert alice.put(f"{path}/", json={"title": "new"}).json() == alice.get(path).json()
    assert alice.patch(f"{path}/complete/").json()["completed"] is True
    assert (response := alice.delete(f"{path}/")).status_code == 204, response
    assert (alice.tasks(), bob.tasks()) == ([other], [his])


@pytest.mark.parametrize("path", ["/health/ready", "/docs"])
def test_a_trailing_slash_on_a_page_names_the_page(nobody: Client, path: str) -> None:
    with_slash, without = nobody.get(f"{path}/"), nobody.get(path)
    assert (with_slash.status_code, with_slash.content) == (200, without.content)
    assert what_is_stable(with_slash) == what_is_stable(without)
    assert nobody.head(f"{path}/").status_code == 200


def test_head_has_the_headers_of_get(alice: Client) -> None:
    task = alice.create()
    for path in ("/api/tasks", "/api/tasks?status=completed", f"/api/tasks/{task['id']}", f"/api/tasks/{NO_TASK}"):
        head, get = alice.head(path), alice.get(path)
        assert (head.status_code, what_is_stable(head)) == (get.status_code, what_is_stable(get))
        assert int(head.headers["content-length"]) == len(get.content)


@pytest.mark.parametrize("path", ["/", "/health/ready", "/docs", "/docs/swagger_bundle.js", "/api/tasks", "/nothing"])
def test_head_has_the_headers_of_get_without_a_token(nobody: Client, path: str) -> None:
    head, get = nobody.head(path), nobody.get(path)
    assert (head.status_code, what_is_stable(head)) == (get.status_code, what_is_stable(get))
    assert int(head.headers["content-length"]) == int(get.headers["content-length"]) > 0


@pytest.mark.parametrize("path", ["/api/tasks", "/api/tasks/x", "/docs", "/nothing"])
@pytest.mark.parametrize("authorization", [f"Bearer {token()}", "none"], ids=["with a token", "without a token"])
def test_head_has_no_body(service: Service, path: str, authorization: str) -> None:
    """On the wire: HTTP clients do not look for one."""
    answer = all_that_comes(service, f"HEAD {path}", f"Authorization: {authorization}")
    assert answer.startswith(b"HTTP/1.1 ")
    assert answer.partition(b"\r\n\r\n")[2] == b""


def test_a_deletion_has_no_body(service: Service, alice: Client) -> None:
    task = alice.create()
    response = alice.delete(f"/api/tasks/{task['id']}")
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers
    assert "content-length" not in response.headers
    assert service.rows(alice) == []


# --- Beside the tasks ------------------------------------------------------------------------------------------------


def test_the_root_says_what_this_is(nobody: Client) -> None:
    response = nobody.get("/")
    about = response.json()
    assert response.status_code == 200
    assert about.keys() == {"title", "description", "version", "docs_url", "redoc_url", "openapi_url"}
    assert (about["docs_url"], about["redoc_url"], about["openapi_url"]) == ("/docs", "/redoc", "/openapi.json")
    assert all(about.values())


@pytest.mark.parametrize("path", PAGES)
def test_what_is_beside_the_tasks_needs_no_token(service: Service, nobody: Client, path: str) -> None:
    assert nobody.get(path).status_code == 200
    assert nobody.get(path, headers={"Authorization": "Bearer nonsense"}).status_code == 200


def test_health_says_ok_and_the_version(nobody: Client) -> None:
    response = nobody.get("/health")
    version = nobody.get("/").json()["version"]
    assert (response.status_code, response.json()) == (200, {"status": "ok", "version": version})


def test_the_service_is_ready_while_its_database_answers(nobody: Client) -> None:
    response = nobody.get("/health/ready")
    assert (response.status_code, response.json()["status"]) == (200, "ok")


# --- Ids that are none, and that name no task ------------------------------------------------------------------------

ONE_TASK = [("GET", ""), ("HEAD", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")]


def ask_for_id(service: Service, client: Client, task_id: str) -> dict[str, RawAnswer]:
    """Send each request that names a task, with exactly these bytes as its id; return the answers by the methods."""
    headers = [bearer(client), "Content-Type: application/json", "Content-Length: 2"]
    return {
        method: ask(service, f"{method} /api/tasks/{task_id}{action}", *headers, content=b"{}")
        for method, action in ONE_TASK
    }


@pytest.mark.parametrize(
    "task_id",
    ["0", "0" * 5000, "-0", "-1", "-" + "9" * 18, str(-(2**63)), str(2**63 - 1), str(2**63), str(2**64 + 1), "9" * 5000,
     "-" + "9" * 60_000],
    ids=lambda task_id: task_id[:22],
)  # fmt: skip
def test_an_integer_that_names_no_task_is_not_found(
    service: Service, alice: Client, untouched: str, task_id: str
) -> None:
    for method, answer in ask_for_id(service, alice, task_id).items():
        assert answer.status == 404, method
        assert method == "HEAD" or answer.json() == TASK_NOT_FOUND, method


def test_an_id_beyond_the_largest_is_not_taken_for_a_small_one(alice: Client, untouched: str) -> None:
    task_id = int(untouched.rpartition("/")[2])
    for other in (task_id + 2**32, task_id + 2**63, task_id + 2**64, -task_id):
        assert_error(alice.delete(f"/api/tasks/{other}"), 404, "Task not found")


NO_INTEGERS = [
    "abc", "1.0", "1_0", "+1", "%201", "1%20", "%EF%BC%91%EF%BC%92", "%C2%B2", "%E2%88%921", "1e3", "--1", "-", "%00",
    "1%00", "1%0A", "%0A1", "%FF", "1'%20OR%20'1'='1", "complete", "a" * 60_000,
]  # fmt: skip


@pytest.mark.parametrize("task_id", NO_INTEGERS, ids=lambda task_id: task_id[:20])
def test_an_id_must_be_a_decimal_integer(service: Service, alice: Client, untouched: str, task_id: str) -> None:
    message = "must be a decimal integer"
    errors = [{"field": "task_id", "message": message}]
    for method, answer in ask_for_id(service, alice, task_id).items():
        assert answer.status == 422, method
        assert method == "HEAD" or answer.json() == {"detail": f"task_id {message}", "errors": errors}, method


# --- 404: no such path -----------------------------------------------------------------------------------------------

UNDER_API = [
    "/api", "/api/", "/api/nothing", "/api/task", "/api/Tasks", "/api/tasks//", "/api//tasks", "/api/tasks/../tasks",
    "/api/tasks%20", "/api/tasks%00", "/api/tasks%0A", "/api%2ftasks%2f%2f", "{}/nothing", "{}/Complete", "{}/2",
    "{}%2F2", "{}/complete/x", "{}//complete", "{}/complete//", "{}/complete%0A",
]  # fmt: skip
BESIDE_API = [
    "/nothing", "/tasks", "/apitasks", "/API/tasks", "//api/tasks", "/./api/tasks", "/x/../api/tasks", "/%2fapi/tasks",
    "/%252fapi/tasks", "/\\api\\tasks", "*", "/Health", "/health/live", "/health%20", "/health%0A", "/%0A", "/%00",
    "/%ff", "/docs/nothing", "/docs/..%2fservice.py", "/docs/%2e%2e/%2e%2e/etc/passwd", "/docs/__init__.py",
    "/docs/swagger_bundle.js/x", "/service.py", "/sql/schema.sql", "/.env", "/.postgres/secret", "/redoc;x=1",
]  # fmt: skip


@pytest.mark.parametrize("path", UNDER_API)
def test_an_unknown_path_under_api_is_not_found_with_a_token(
    service: Service, alice: Client, untouched: str, path: str
) -> None:
    """With exactly these bytes as the path, {} for that of a task: an HTTP client would put some in order first."""
    line = path.replace("{}", untouched)
    for method in ("GET", "PATCH"):
        answer = ask(service, f"{method} {line}", bearer(alice))
        assert (answer.status, answer.json()) == (404, {"detail": "Not Found"}), method
        assert answer.headers["content-type"] == "application/json"
        answer = ask(service, f"{method} {line}")
        assert (answer.status, answer.json()) == (401, NOT_AUTHENTICATED), method


@pytest.mark.parametrize("path", BESIDE_API)
def test_another_unknown_path_is_not_found_with_a_token_and_without(service: Service, alice: Client, path: str) -> None:
    alice.create()
    for headers in ([], [bearer(alice)]):
        answer = ask(service, f"GET {path}", *headers)
        assert (answer.status, answer.json()) == (404, {"detail": "Not Found"})
        assert answer.headers["content-type"] == "application/json"


# --- 405: no such method ---------------------------------------------------------------------------------------------

ALLOW = {
    "/api/tasks": {"GET", "HEAD", "POST"},
    "/api/tasks/": {"GET", "HEAD", "POST"},
    "/api/tasks/1": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/tasks/x": {"GET", "HEAD", "PUT", "DELETE"},
    "/api/tasks/1/complete": {"PATCH"},
    "/": {"GET", "HEAD"},
    "/health": {"GET", "HEAD"},
    "/health/ready/": {"GET", "HEAD"},
    "/docs": {"GET", "HEAD"},
    "/docs/swagger_bundle.js": {"GET", "HEAD"},
    "/redoc": {"GET", "HEAD"},
    "/openapi.json": {"GET", "HEAD"},
}
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE", "QUERY"}


@pytest.mark.parametrize("path", ALLOW)
def test_a_method_that_a_path_does_not_have_is_refused(alice: Client, path: str) -> None:
    for method in sorted(METHODS - ALLOW[path]):
        response = alice.request(method, path)
        allowed = response.headers.get("allow", "")
        assert set(allowed.split(", ")) == ALLOW[path], method
        if method == "HEAD":
            assert (response.status_code, response.content) == (405, b"")
        else:
            assert_error(response, 405, "Method Not Allowed", Allow=allowed)
