"""Request lines, paths and headers that no client of good will sends.

Each has an answer of the contract. None is a bug's way in, or anybody's way to the tasks of another.
"""

from __future__ import annotations

import pytest

from tests.support.errors import NOT_AUTHENTICATED, TASK_NOT_FOUND
from tests.support.service_process import Client, Service
from tests.support.wire import ask, bearer

# --- Paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/api/tasks/", "/%61pi/tasks", "/api%2Ftasks", "/%61%70%69%2F%74%61%73%6B%73", "/api/tasks?status=x",
     "/api/tasks#x", "/api/tasks;x=1", "/api/../health", "/api/%2e%2e/health", "http://localhost/api/tasks",
     "http://elsewhere.example/%61pi/tasks/1", "https://user:pass@x:1/api/tasks"],
)  # fmt: skip
def test_whatever_is_under_api_needs_a_token_however_it_is_spelt(service: Service, path: str) -> None:
    for method in ("GET", "DELETE", "OPTIONS", "TRACE"):
        answer = ask(service, f"{method} {path}")
        assert (answer.status, answer.json()) == (401, NOT_AUTHENTICATED), method
        assert answer.headers["www-authenticate"] == "Bearer", method


@pytest.mark.parametrize(
    "path", ["/%61pi/tasks", "/api%2Ftasks", "http://elsewhere.example/api/tasks", "/api/tasks#x", "/api/tasks?%zz=%zz"]
)
def test_another_spelling_of_a_path_names_the_same_resource(
    service: Service, alice: Client, bob: Client, path: str
) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    answer = ask(service, f"GET {path}", bearer(alice))
    assert (answer.status, answer.json()) == (200, {"items": [task]})
    assert bob.tasks() == [other]


def test_a_task_of_somebody_else_is_as_absent_as_none_in_every_disguise(
    service: Service, alice: Client, bob: Client
) -> None:
    task, other = alice.create("mine"), bob.create("theirs")
    for text in (f"00{other['id']}", f"%3{str(other['id'])[0]}{str(other['id'])[1:]}"):
        for method, suffix in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete"), ("DELETE", "/")):
            line = f"{method} /api/tasks/{text}{suffix}"
            answer = ask(service, line, bearer(alice), "Content-Length: 2", content=b"{}")
            assert (answer.status, answer.json()) == (404, TASK_NOT_FOUND), line
    assert (alice.tasks(), bob.tasks()) == ([task], [other])


@pytest.mark.parametrize("path", ["/api/tasks/\u00e9", "/api/tasks?status=\u00ff", "http://localhost"])
def test_what_is_no_request_target_is_a_bad_request(service: Service, alice: Client, path: str) -> None:
    assert ask(service, f"GET {path}".encode(), bearer(alice)).status == 400
    assert ask(service, f"GET {path}".encode("latin-1"), bearer(alice)).status == 400


# --- Headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", ["0-9", "x-y", "0-," * 10_000 + "0-"], ids=lambda requested: requested[:9])
def test_a_range_is_ignored(nobody: Client, requested: str) -> None:
    """RFC 9110, section 14.2. So no crowd of ranges makes an answer that is longer than the file."""
    whole = nobody.get("/docs/redoc.js")
    response = nobody.get("/docs/redoc.js", headers={"Range": f"bytes={requested}"})
    assert (response.status_code, response.content == whole.content) == (200, True)


def test_no_header_or_parameter_overrides_the_method(service: Service, alice: Client) -> None:
    task = alice.create("mine")
    for name in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"):
        answer = ask(service, f"POST /api/tasks/{task['id']}?_method=DELETE", bearer(alice), f"{name}: DELETE")
        assert (answer.status, answer.json()) == (405, {"detail": "Method Not Allowed"})
        answer = ask(service, f"GET /api/tasks/{task['id']}?_method=DELETE", bearer(alice), f"{name}: DELETE")
        assert (answer.status, answer.json()) == (200, task)
    assert alice.tasks() == [task]


@pytest.mark.parametrize(
    "header",
    ["Origin: \xff", "Content-Type: \xff", "Cookie: \xff=;", "X-Forwarded-For: \xff, [::1, x:y:z, :7", "Host: \xff"],
    ids=ascii,
)
def test_bytes_beyond_ascii_in_a_header_are_no_bug(service: Service, alice: Client, header: str) -> None:
    task = alice.create("mine")
    answer = ask(service, "GET /api/tasks", bearer(alice), header)
    assert (answer.status, answer.json()) == (200, {"items": [task]})
