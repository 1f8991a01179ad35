"""Paths and methods: zeros, slashes, HEAD, and what is beside the tasks."""

from __future__ import annotations

import socket

import pytest

from tests.support.errors import TASK_NOT_FOUND
from tests.support.service_process import Client, Service, token
from tests.support.tasks import CHANGES, NO_CHANGE, NO_TASK, what_is_stable

PAGES = ["/", "/health", "/health/ready", "/docs", "/redoc", "/openapi.json"]

# --- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ["0", "00", "0" * 30, "0" * 5000], ids=len)
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


def test_a_trailing_slash_on_a_task_names_the_task(service: Service, alice: Client, bob: Client) -> None:
    task, other, his = alice.create(), alice.create(), bob.create()
    path = f"/api/tasks/{task['id']}"
    assert (response := alice.get(f"{path}/")).json() == task, response
    assert alice.put(f"{path}/", json={"title": "new"}).json() == alice.get(path).json()
    assert alice.patch(f"{path}/complete/").json()["completed"] is True
    assert (response := alice.delete(f"{path}/")).status_code == 204, response
    assert (alice.tasks(), bob.tasks()) == ([other], [his])


@pytest.mark.parametrize(("method", "action", "body", "changes"), [*CHANGES, NO_CHANGE])
def test_a_trailing_slash_lets_no_stranger_in(
    service: Service, alice: Client, bob: Client, method: str, action: str, body: object, changes: object
) -> None:
    task = alice.create()
    before = service.rows(alice)
    response = bob.request(method, f"/api/tasks/{task['id']}{action}/", json=body)
    assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND)
    assert service.rows(alice) == before


@pytest.mark.parametrize("path", PAGES[1:])
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


@pytest.mark.parametrize("path", [*PAGES, "/docs/swagger_bundle.js", "/api/tasks", "/nothing"])
def test_head_has_the_headers_of_get_without_a_token(nobody: Client, path: str) -> None:
    head, get = nobody.head(path), nobody.get(path)
    assert (head.status_code, what_is_stable(head)) == (get.status_code, what_is_stable(get))
    assert int(head.headers["content-length"]) == int(get.headers["content-length"]) > 0


@pytest.mark.parametrize("path", [*PAGES, "/api/tasks", "/api/tasks/1", "/api/tasks/x", "/nothing"])
@pytest.mark.parametrize("authorization", [f"Bearer {token()}", "none"], ids=["with a token", "without a token"])
def test_head_has_no_body(service: Service, path: str, authorization: str) -> None:
    """On the wire: HTTP clients do not look for one."""
    head = f"HEAD {path} HTTP/1.1\r\nHost: here\r\nAuthorization: {authorization}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
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
