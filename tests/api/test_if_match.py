"""Writes to the version that the client knows: If-Match."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.conditions import (
    ANY,
    EVERYTHING,
    FAULTS_OF_A_BODY,
    IS_NO_LIST,
    MOVED_ON,
    NAMES_ANOTHER,
    NAMES_ANOTHER_VERSION,
    NAMES_IT,
    NAMES_IT_WEAKLY,
    Task,
    cases,
    change_in_turn,
    etag_of,
    if_match,
    lines,
    path_of,
    wrong,
)
from tests.support.errors import TASK_NOT_FOUND
from tests.support.service_process import Client, Service
from tests.support.tasks import KINDS_OF_CHANGE, NO_TASK, what_is_stable

# --- If-Match --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", cases(NAMES_IT | ANY))
def test_a_write_is_made_to_the_version_that_it_names(alice: Client, said: str) -> None:
    other = alice.create()
    for method, action, body, changes in (write.values for write in KINDS_OF_CHANGE):
        task = alice.create()
        headers = lines("If-Match", said, etag_of(task))
        response = alice.request(method, path_of(task) + action, json=body, headers=headers)
        if changes is None:
            assert (response.status_code, response.content) == (204, b"")
            assert alice.tasks() == [other]
        else:
            changed = task | changes | {"updated_at": response.json()["updated_at"]}
            assert (response.status_code, response.json()) == (200, changed)
            assert (changed["updated_at"] > task["updated_at"]) == (changes != {})
            assert alice.tasks() == [changed, other]
            alice.delete(path_of(task))


@pytest.mark.parametrize("said", cases(NAMES_IT_WEAKLY | NAMES_ANOTHER | NAMES_ANOTHER_VERSION | IS_NO_LIST))
def test_a_write_is_not_made_to_a_version_that_it_does_not_name(service: Service, alice: Client, said: str) -> None:
    task = alice.create()
    before = service.rows(alice)
    for method, action, body, _ in (write.values for write in KINDS_OF_CHANGE):
        headers = lines("If-Match", said, etag_of(task))
        response = alice.request(method, path_of(task) + action, json=body, headers=headers)
        assert (response.status_code, response.json()) == (412, MOVED_ON), method
    assert service.rows(alice) == before


@pytest.mark.parametrize(("method", "action", "body", "changes"), KINDS_OF_CHANGE)
def test_a_write_is_not_made_to_a_task_that_has_moved_on(
    service: Service, alice: Client, method: str, action: str, body: object, changes: object
) -> None:
    history = [alice.create(), other := alice.create()]
    for number in range(4):
        history.append(change_in_turn(alice, history[-1 if number else 0], number))
    history.remove(other)
    before = service.rows(alice)
    for version in [*history[:-1], other]:
        response = alice.request(method, path_of(history[0]) + action, json=body, headers=if_match(version))
        assert (response.status_code, response.json()) == (412, MOVED_ON)
    assert service.rows(alice) == before
    response = alice.request(method, path_of(history[0]) + action, json=body, headers=if_match(history[-1]))
    assert response.status_code == (204 if method == "DELETE" else 200)


def test_a_toggle_by_null_is_made_to_the_version_that_it_names(service: Service, alice: Client, bob: Client) -> None:
    """As axios sends it for no body."""
    task, headers = alice.create(), {"Content-Type": "application/json"}
    path = f"{path_of(task)}/complete"
    answers = [alice.patch(path, content=b"null", headers=headers | if_match(task)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 412]
    toggled = answers[0].json()
    assert toggled == task | {"completed": True, "updated_at": toggled["updated_at"]}
    assert answers[1].json() == MOVED_ON
    assert alice.tasks() == [toggled]
    response = bob.patch(path, content=b"null", headers=headers | if_match(toggled))
    assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND)
    response = alice.patch(path, content=b"null", headers=headers | if_match(toggled))
    assert (response.status_code, response.json()["completed"]) == (200, False)


@pytest.mark.parametrize(("method", "action", "body", "changes"), KINDS_OF_CHANGE)
def test_if_match_tells_a_stranger_nothing(
    service: Service, alice: Client, bob: Client, method: str, action: str, body: object, changes: object
) -> None:
    task = alice.create()
    bob.create()
    before = service.rows(alice, bob)
    never = bob.request(method, f"/api/tasks/{NO_TASK}{action}", json=body)
    assert (never.status_code, never.json()) == (404, TASK_NOT_FOUND)
    for name, said in EVERYTHING.items():
        headers = lines("If-Match", said, etag_of(task))
        response = bob.request(method, path_of(task) + action, json=body, headers=headers)
        assert (response.status_code, response.content) == (404, never.content), name
        assert what_is_stable(response) == what_is_stable(never), name
    assert service.rows(alice, bob) == before


@pytest.mark.parametrize(("method", "action", "body", "changes"), KINDS_OF_CHANGE)
def test_a_task_that_is_not_there_is_not_found_whatever_if_match_says(
    alice: Client, method: str, action: str, body: object, changes: object
) -> None:
    task = alice.create()
    assert alice.delete(path_of(task)).status_code == 204
    for name, said in EVERYTHING.items():
        for path in (path_of(task), f"/api/tasks/{2**63}"):
            headers = lines("If-Match", said, etag_of(task))
            response = alice.request(method, path + action, json=body, headers=headers)
            assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND), (path, name)


# What can be wrong with a write, and the answer to it.
FAULTS: dict[str, tuple[dict[str, Any], int, Task]] = {
    "no token": ({"headers": {"Authorization": ""}}, 401, {"detail": "Not authenticated"}),
    "another token": ({"headers": {"Authorization": "Bearer a"}}, 401, {"detail": "Invalid token"}),
    "an id that is none": ({"path": "/api/tasks/seven"}, 422, wrong("task_id", "must be a decimal integer")),
}


@pytest.mark.parametrize(
    ("method", "action", "fault"),
    [
        *(("PUT", "", fault) for fault in FAULTS_OF_A_BODY | FAULTS),
        *(("PATCH", "/complete", fault) for fault in ("no JSON", "a field that is wrong", "an id that is none")),
        *(("DELETE", "", fault) for fault in ("not declared as JSON", "an id that is none")),
    ],
)
def test_what_is_wrong_with_a_write_comes_before_if_match(
    service: Service, alice: Client, method: str, action: str, fault: str
) -> None:
    task = alice.create()
    before = service.rows(alice)
    options, status, answer = (FAULTS_OF_A_BODY | FAULTS)[fault]
    options = {"json": {} if method == "PUT" and "content" not in options else None} | options
    path = options.pop("path", path_of(task)) + action
    for said in ("*", '"a"', etag_of(task), "a"):
        headers = options.get("headers", {}) | {"If-Match": said}
        response = alice.request(method, path, **options | {"headers": headers})
        assert (response.status_code, response.json()) == (status, answer), said
    assert service.rows(alice) == before


@pytest.mark.parametrize(("method", "path", "status"), [("PUT", "/api/nothing", 404), ("DELETE", "/api/tasks", 405)])
def test_a_path_or_method_that_is_not_there_comes_before_if_match(
    alice: Client, nobody: Client, method: str, path: str, status: int
) -> None:
    for said in ("*", '"a"', "a"):
        assert alice.request(method, path, headers={"If-Match": said}).status_code == status
        assert nobody.request(method, path, headers={"If-Match": said}).status_code == 401


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_is_wrong_with_a_read_comes_before_if_none_match(alice: Client, nobody: Client, method: str) -> None:
    for said in ("*", '"a"', "a"):
        headers = {"If-None-Match": said}
        assert alice.request(method, "/api/tasks/seven", headers=headers).status_code == 422
        assert alice.request(method, "/api/tasks?status=late", headers=headers).status_code == 422
        assert nobody.request(method, "/api/tasks", headers=headers).status_code == 401
        assert nobody.request(method, f"/api/tasks/{NO_TASK}", headers=headers).status_code == 401
