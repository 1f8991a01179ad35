"""Paths that are there: zeros, slashes, HEAD, and what is beside the tasks."""

from __future__ import annotations

import pytest

from tests.support.errors import TASK_NOT_FOUND
from tests.support.service_process import Client, Service, token
from tests.support.tasks import NO_TASK, what_is_stable
from tests.support.wire import all_that_comes

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
