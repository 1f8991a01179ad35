"""Rules that hold for any input, looked for by Hypothesis among a great many."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service import FIELDS
from tests.support.service_process import Client, Service

# The same examples in every run, so that a failure in CI is nobody's bad luck; no deadline, so that slowness is none.
few = settings(max_examples=100, derandomize=True, deadline=None, database=None)
many = settings(few, max_examples=200)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    """A client of a user of this module's. In the end there was no bug."""
    printed = len(service.log)
    with service.client(f"user-{uuid.uuid4().hex}") as client:
        yield client
        assert client.get("/health/ready").status_code == 200
    assert not re.search(r"Traceback|status=5", service.log[printed:])


# --- The contract's "What is valid", once more and independently of the service --------------------------------------


def storable(value: object, *, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and not re.search("[\0\ud800-\udfff]", value)


def valid_title(value: object) -> bool:
    return storable(value, most=200) and value != "" and not str(value).isspace()


def valid_description(value: object) -> bool:
    return value is None or storable(value, most=2000)


def faults(body: object, *fields: str, required: str = "") -> set[str]:
    """Return which fields of a body are at fault, of those that the request has."""
    if not isinstance(body, dict):
        return {"body"}
    valid: dict[str, Callable[[object], bool]] = {
        "title": valid_title,
        "description": valid_description,
        "completed": lambda value: value is True or value is False,
    }
    wrong = {field for field in fields if field in body and not valid[field](body[field])}
    return wrong | ({required} if required and required not in body else set())


# --- What to send ----------------------------------------------------------------------------------------------------

anything = st.text(st.one_of(st.characters(), st.characters(), st.sampled_from("\0\ud800\udfff\ud83d\ude00")))
white_space = st.text(st.sampled_from([chr(code) for code in range(0x3001) if chr(code).isspace()]), max_size=5)
about_too_long = st.builds(
    lambda text, size: (text * size)[:size], anything.filter(bool), st.sampled_from([200, 201, 2000, 2001])
)
texts = st.one_of(anything, white_space, about_too_long)

leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts)
others = anything.filter(lambda name: name not in FIELDS)  # hypothesis tries the words of the program, too
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(others, inner, max_size=3))
valid_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)
titles = valid_text.filter(valid_title)
descriptions = st.one_of(st.none(), valid_text, valid_text.map(lambda text: (text * 2000)[:2000]))

# A valid task, and one in which anything may have been put in the place of anything: most have one fault, or none.
tasks = st.fixed_dictionaries({"title": titles}, optional={"description": descriptions, "completed": st.booleans()})
names = st.sampled_from(["title", "description", "completed", "id", "user_id", "created_at"])
faulty_tasks = st.builds(
    lambda task, changes: task | changes, tasks, st.dictionaries(names, texts | values, max_size=2)
)
bodies = st.one_of(tasks, faulty_tasks, faulty_tasks, values)


def assert_answered(client: Client, method: str, path: str, body: object, wrong: set[str], success: int) -> None:
    """Check the answer to a body against the fields that the model holds to be at fault in it; delete what it made."""
    content = json.dumps(body)
    response = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    if len(content) > 65_536:
        assert response.status_code == 413
    elif wrong:
        assert response.status_code == 422, response.text
        assert {error["field"] for error in response.json()["errors"]} == wrong
        assert len(response.json()["errors"]) == len(wrong)
        assert isinstance(response.json()["detail"], str)
    else:
        assert response.status_code == success, response.text
        for field in ("title", "description", "completed"):
            if method != "PATCH" and isinstance(body, dict) and field in body:
                assert response.json()[field] == body[field]
        if method == "POST":
            assert client.delete(response.headers["location"]).status_code == 204


# --- The rules -------------------------------------------------------------------------------------------------------


@many
@given(bodies)
@example({"title": "x" * 200})
@example({"title": "😀" * 201})
@example({"title": "\x1c"})
@example({"title": "\u200b"})
@example({"title": "a\0b", "description": "a\ud83d"})
@example({"title": "x", "description": "😀" * 2000, "completed": 1})
def test_a_task_is_created_exactly_when_the_body_is_valid(client: Client, body: object) -> None:
    wrong = faults(body, "title", "description", "completed", required="title" if isinstance(body, dict) else "")
    assert_answered(client, "POST", "/api/tasks", body, wrong, 201)


@many
@given(bodies)
@example({})
@example({"title": None})
@example({"title": "a\ud83d", "description": "\0"})
@example({"description": None})
@example({"completed": None})
def test_a_task_is_changed_exactly_when_the_body_is_valid(client: Client, body: object) -> None:
    task = client.create("before", description="before")
    path = f"/api/tasks/{task['id']}"
    wrong = faults(body, "title", "description", "completed")
    assert_answered(client, "PUT", path, body, wrong, 200)
    after = client.get(path).json()
    sent = body if isinstance(body, dict) and not wrong else {}
    for field in ("title", "description", "completed"):
        assert after[field] == sent.get(field, task[field])
    assert client.delete(path).status_code == 204


@few
@given(bodies)
@example({"title": 7, "description": 7})
@example({"completed": None})
@example(None)
def test_a_task_is_completed_exactly_when_the_body_is_valid(client: Client, body: object) -> None:
    task = client.create()
    path = f"/api/tasks/{task['id']}"
    wrong = set() if body is None else faults(body, "completed")  # null is as good as no body
    assert_answered(client, "PATCH", f"{path}/complete", body, wrong, 200)
    sent = body if isinstance(body, dict) else {}
    assert client.get(path).json()["completed"] is (False if wrong else sent.get("completed", True))
    assert client.delete(path).status_code == 204


@many
@given(
    st.one_of(st.binary(), bodies.map(lambda body: json.dumps(body).encode())),
    st.binary(max_size=3),
    st.integers(0, 99),
)
@example(b'{"title": "x", "n": 1}', b"e999", 96)
@example(b'{"title": "x"}', b"\xef\xbb\xbf", 0)
@example(b'{"title": "x", "n": []}', b"NaN", 92)
def test_bytes_that_are_broken_anywhere_are_no_bug(client: Client, content: bytes, junk: bytes, percent: int) -> None:
    at = len(content) * percent // 100
    content = content[:at] + junk + content[at:]
    response = client.post("/api/tasks", content=content)
    try:
        body: Any = json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        body = ValueError
    if len(content) > 65_536:
        assert response.status_code == 413
    elif body is ValueError or not math.isfinite(largest_number(body)):
        assert response.status_code == 400
    else:
        wrong = faults(body, "title", "description", "completed", required="title" if isinstance(body, dict) else "")
        assert response.status_code == (422 if wrong else 201)
        assert wrong or client.delete(response.headers["location"]).status_code == 204


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def largest_number(value: object) -> float:
    """Return the largest number in a JSON value, by its size; infinity for one beyond a double."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return max(map(largest_number, value), default=0)
    try:
        return abs(float(value)) if isinstance(value, int | float) else 0
    except OverflowError:
        return math.inf


@few
@given(titles, descriptions, st.booleans())
@example("e\u0301 \ufeff\u202e\u2028\x7f\x85", "\r\n\t \\ \"'<>&\u0001", True)
@example("\U0010ffff" * 200, "\uffff" * 2000, False)
@example(" x ", "", False)
def test_a_title_and_a_description_come_back_as_they_were_sent(
    client: Client, title: str, description: str | None, escaped: bool
) -> None:
    sent = {"title": title, "description": description}
    response = client.post("/api/tasks", content=json.dumps(sent, ensure_ascii=escaped).encode())
    assert response.status_code == 201, response.text
    path = response.headers["location"]
    (listed,) = [task for task in client.tasks() if f"/api/tasks/{task['id']}" == path]
    changed = client.put(path, content=json.dumps(sent, ensure_ascii=not escaped).encode())
    for task in (response.json(), client.get(path).json(), listed, changed.json()):
        assert (task["title"], task["description"]) == (title, description)
        assert task["title"].encode() == title.encode()
    assert client.delete(path).status_code == 204


@few
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("all ")
@example("ALL")
@example("")
@example(" ")
@example("pending\0")
@example("ﬁnished")
def test_any_text_as_a_status_but_a_status_or_none_is_refused(client: Client, status: str) -> None:
    response = client.get("/api/tasks", params={"status": status})
    if status in ("", "all", "pending", "completed"):
        assert response.status_code == 200
    else:
        assert response.status_code == 422
        assert [error["field"] for error in response.json()["errors"]] == ["status"]


ids = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1),
    st.text("-0123456789", min_size=1, max_size=40),
    st.text("-+_.eE \u0663\uff12\u00b20\n", min_size=1, max_size=5),
    st.integers(-(2**70), 2**70).map(str),
)


@many
@given(ids, st.sampled_from(["GET", "PUT", "DELETE", "PATCH"]))
@example(".", "GET")
@example("..", "GET")
@example("1\n", "PATCH")
@example("9223372036854775808", "DELETE")
def test_any_text_as_an_id_is_refused_or_names_no_task(client: Client, text: str, method: str) -> None:
    path = f"/api/tasks/{quote(text, safe='').replace('.', '%2E')}" + ("/complete" if method == "PATCH" else "")
    response = client.request(method, path, json={} if method in ("PUT", "PATCH") else None)
    if re.fullmatch("-?[0-9]+", text):
        # This user has no task but while a test of the above runs.
        assert (response.status_code, response.json()) == (404, {"detail": "Task not found"})
    else:
        assert response.status_code == 422
        assert [error["field"] for error in response.json()["errors"]] == ["task_id"]


@few
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("")
@example("/")
@example("0/complete/")
@example("x/complete")
@example("0//")
def test_any_text_after_the_path_of_the_tasks_is_the_list_or_an_id_or_no_path(client: Client, text: str) -> None:
    response = client.get(f"/api/tasks/{quote(text).replace('.', '%2E')}")
    path, status = f"/api/tasks/{text}".removesuffix("/"), 404
    if path == "/api/tasks":
        status = 200
    elif re.fullmatch("/api/tasks/[^/]+/complete", path):
        status = 405
    elif re.fullmatch("/api/tasks/[^/]+", path) and not re.fullmatch("/api/tasks/-?[0-9]+", path):
        status = 422
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
