"""What makes a request safe to repeat, and to race: ETag, If-None-Match, If-Match and Idempotency-Key."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any, LiteralString

import asyncpg
import httpx
import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sql
from tests.support.service_process import ROOT, Client, Service, new_user_id, token
from tests.support.tasks import NO_TASK, NOT_FOUND, wait_for_waiting_statements, what_is_stable

Task = dict[str, Any]

MOVED_ON = {"detail": "The task has changed since the version that If-Match names"}
NOT_A_KEY = {"detail": "Idempotency-Key must have 1 to 255 visible ASCII characters"}
ANOTHER_BODY = {
    "detail": "body is not the one that this Idempotency-Key was first sent with",
    "errors": [{"field": "body", "message": "is not the one that this Idempotency-Key was first sent with"}],
}

# What a client can say with If-Match and If-None-Match about a version whose tag is {}, or <> without its quotes. Each
# line is one of the header's.
NAMES_IT = {
    "its tag": "{}",
    "a list that begins with it": '{}, "a", "b"',
    "a list that ends with it": '"a","b",{}',
    "a list with nothing between commas": ',, {}, ,"a",',
    "a list with tabs": '"a"\t,\t{}',
    "lines of which it is the first": '{}\n"a"',
    "lines of which it is the last": '"a", "b"\n{}',
    "it twice": "{}, {}",
    "it beside a weak tag": 'W/"a", {}',
    "it beside the empty tag": '"", {}',
    "it beside a tag with a comma": '"a,b", {}',
    "it beside a tag with odd characters": '"!#\\\'/~\x80\xe9\xff", {}',
    "it beside a thousand others": ", ".join(f'"{number}"' for number in range(1000)) + ", {}",
}
ANY = {"an asterisk": "*"}
NAMES_IT_WEAKLY = {
    "the weak tag": "W/{}",
    "a list with the weak tag": '"a", W/{}',
    "lines with the weak tag": '"a"\nW/{}\nW/"b"',
}
NAMES_ANOTHER = {
    "a version before": '"2000-01-01T00:00:00.000001+00:00"',
    "a version to come": '"2100-01-01T00:00:00+00:00"',
    "the first version that there can be": '"0001-01-01T00:00:00.000001+00:00"',
    "a version before the first": '"0001-01-01T00:00:00+00:00"',
    "a version after the last": '"9999-12-31T23:59:59.999999+00:00"',
    "a version before the first year in UTC": '"0001-01-01T00:00:00+23:59"',
    "a version after the last year in UTC": '"9999-12-31T23:59:59-23:59"',
    "a version of no year": '"10000-01-01T00:00:00+00:00"',
    "no version": '"2026-02-30T00:00:00+00:00"',
    "infinity": '"infinity", "-infinity"',
    "a date": '"2026-01-31"',
    "null": '"null", "None"',
    "another tag": '"a"',
    "a weak tag": 'W/"a"',
    "a list of others": '"a", W/"b",\t"c"',
    "lines of others": '"a"\n"b"',
    "the empty tag": '""',
    "an asterisk in quotes": '"*"',
    "a beginning of the tag": '"2"',
    "more than the tag": '"<>."',
    "no text but commas": ", ,",
    "no text": "",
    "SQL": '"\' OR true --"',
}
IS_NO_LIST = {
    "no quotes": "<>",
    "no first quote": '<>"',
    "no last quote": '"<>',
    "single quotes": "'<>'",
    "a lower-case w": "w/{}",
    "a space after W/": "W/ {}",
    "W without its slash": "W{}",
    "no comma": '{} "a"',
    "not even a space": "{}{}",
    "a semicolon": '{}; "a"',
    "a word before it": "a, {}",
    "a word after it": "{}, a",
    "a space in a tag": '"a b", {}',
    "a quote in a tag": '"a"b", {}',
    "an escaped quote in a tag": r'"a\"b", {}',
    "an asterisk before it": "*, {}",
    "an asterisk after it": "{}, *",
    "an asterisk in a line before it": "*\n{}",
    "an asterisk in a line after it": "{}\n*",
    "an asterisk before a stale one": '*\n"a"',
    "two asterisks": "*, *",
    "two lines of an asterisk": "*\n*",
}
EVERYTHING = NAMES_IT | ANY | NAMES_IT_WEAKLY | NAMES_ANOTHER | IS_NO_LIST


def cases(said: dict[str, Any]) -> list[Any]:
    return [pytest.param(value, id=name) for name, value in said.items()]


def lines(name: str, said: str, etag: str) -> list[tuple[bytes, bytes]]:
    """Return the lines of a header that says this about a version."""
    tag = etag.removeprefix("W/")
    text = said.replace("{}", tag).replace("<>", tag.strip('"'))
    return [(name.encode(), line.encode("latin-1")) for line in text.split("\n")]


def etag_of(task: Task) -> str:
    """Return the ETag of a task, as a client makes it of a task from anywhere."""
    return f'"{task["updated_at"]}"'


def path_of(task: Task) -> str:
    return f"/api/tasks/{task['id']}"


def if_match(task: Task) -> dict[str, str]:
    return {"If-Match": etag_of(task)}


# What can be done to a pending task without a description: method, what follows the id, body, and what becomes of it.
WRITES: list[Any] = [
    pytest.param("PUT", "", {"title": "new"}, {"title": "new"}, id="PUT"),
    pytest.param("PUT", "", {}, {}, id="PUT {}"),
    pytest.param("PATCH", "/complete", None, {"completed": True}, id="PATCH without a body"),
    pytest.param("PATCH", "/complete", {"completed": True}, {"completed": True}, id="PATCH true"),
    pytest.param("PATCH", "/complete", {"completed": False}, {"completed": False}, id="PATCH false"),
    pytest.param("DELETE", "", None, None, id="DELETE"),
]
CHANGES = [write for write in WRITES if write.values[3] != {}]

READS = [
    (method, path)
    for method in ("GET", "HEAD")
    for path in ("/api/tasks/{}", "/api/tasks", "/api/tasks?status=pending", "/api/tasks?status=completed")
]


# --- ETag ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "action", "body"),
    [("GET", "", None), ("HEAD", "", None), *(write.values[:3] for write in WRITES if write.values[0] != "DELETE")],
)
def test_an_answer_with_a_task_has_its_version_as_the_etag(
    alice: Client, bob: Client, method: str, action: str, body: object
) -> None:
    task = alice.create()
    response = alice.request(method, path_of(task) + action, json=body)
    [stored] = alice.tasks()
    assert (response.status_code, response.headers.get_list("etag")) == (200, [etag_of(stored)])
    assert method == "HEAD" or response.json() == stored
    response = bob.request(method, path_of(task) + action, json=body)
    assert (response.status_code, response.headers.get_list("etag")) == (404, [])


def test_a_new_task_has_its_version_as_the_etag(alice: Client) -> None:
    for headers in ({}, {"Idempotency-Key": "a"}, {"Idempotency-Key": "a"}):
        response = alice.post("/api/tasks", json={"title": "Buy milk"}, headers=headers)
        assert (response.status_code, response.headers.get_list("etag")) == (201, [etag_of(response.json())])
        assert alice.get(response.headers["location"]).headers["etag"] == response.headers["etag"]


def test_whoever_has_a_list_has_every_etag_in_it(service: Service, alice: Client, bob: Client) -> None:
    for number in range(5):
        alice.create(completed=number % 2 == 0)
        bob.create()
    alice.patch(f"{path_of(alice.tasks()[0])}/complete")
    before = service.rows(bob)
    listed = alice.tasks()
    assert [alice.get(path_of(task)).headers["etag"] for task in listed] == [etag_of(task) for task in listed]
    for task in listed:
        assert alice.get(path_of(task), headers={"If-None-Match": etag_of(task)}).status_code == 304
        response = bob.put(path_of(task), json={"title": "new"}, headers=if_match(task))
        assert (response.status_code, response.json()) == (404, NOT_FOUND)
        assert alice.put(path_of(task), json={"title": "new"}, headers=if_match(task)).status_code == 200
    assert [task["title"] for task in alice.tasks()] == ["new"] * 5
    assert service.rows(bob) == before


def change_in_turn(client: Client, task: Task, number: int) -> Task:
    """Change a task in one of four ways, on the condition that it is still what it was; return what it is now."""
    method, action, body = [
        ("PUT", "", {"title": f"title {number}"}),
        ("PATCH", "/complete", None),
        ("PUT", "", {"description": None}),
        ("PATCH", "/complete", {"completed": True}),
    ][number % 4]
    response = client.request(method, path_of(task) + action, json=body, headers=if_match(task))
    assert (response.status_code, response.headers["etag"]) == (200, etag_of(response.json()))
    changed: Task = response.json()
    return changed


def test_fifty_changes_in_a_row_have_fifty_rising_versions(alice: Client) -> None:
    history = [alice.create()]
    for number in range(50):
        history.append(change_in_turn(alice, history[-1], number))
    assert all(before["updated_at"] < after["updated_at"] for before, after in pairwise(history))
    for stale in history[:-1]:
        assert alice.delete(path_of(stale), headers=if_match(stale)).status_code == 412
    assert alice.delete(path_of(history[-1]), headers=if_match(history[-1])).status_code == 204


def test_fifty_changes_have_fifty_rising_versions_after_the_clock_was_set_back(service: Service, alice: Client) -> None:
    """A row that was written when the clock was ahead: it goes on by a microsecond at a time, into the next second."""
    future = datetime.fromisoformat("2100-12-31T23:59:59.999980+00:00")
    task = alice.create()
    service.sql("UPDATE task SET updated_at = %s WHERE id = %s", future, task["id"])
    task = alice.get(path_of(task)).json()
    for number in range(50):
        task = change_in_turn(alice, task, number)
        assert task["updated_at"] == (future + timedelta(microseconds=number + 1)).isoformat()


def test_changes_in_one_microsecond_have_a_version_each(service: Service, alice: Client) -> None:
    """In a transaction PostgreSQL's clock stands still."""
    task = alice.create()

    async def change() -> list[datetime]:
        connection = await asyncpg.connect(service.database_url)
        versions = []
        try:
            async with connection.transaction():
                update = await connection.prepare(sql.UPDATE_TASK)
                kept = [False, None] * (len(update.get_parameters()) // 2 - 3)  # the other fields
                for title in ("one", "two"):
                    changed = await update.fetchrow(alice.user_id, 0, task["id"], None, True, title, *kept)
                    toggled = await connection.fetchrow(sql.COMPLETE_TASK, alice.user_id, 0, task["id"], None, None)
                    assert changed
                    assert toggled
                    versions += [changed["updated_at"], toggled["updated_at"]]
        finally:
            await connection.close()
        return versions

    versions = asyncio.run(change())
    assert versions[0] > datetime.fromisoformat(task["updated_at"])
    assert [after - before for before, after in pairwise(versions)] == [timedelta(microseconds=1)] * 3
    [stored] = alice.tasks()
    assert stored == task | {"title": "two", "updated_at": versions[-1].isoformat()}


# Moments, their texts, and other texts of the same moment, all of them in quotes.
SPELLINGS = {
    "a whole second": (
        "2026-01-31T08:15:30+00:00",
        ["2026-01-31T08:15:30.000000+00:00", "2026-01-31T08:15:30.000+00:00", "2026-01-31T08:15:30.0+00:00",
         "2026-01-31T08:15:30Z", "2026-01-31T08:15:30+0000", "2026-01-31T08:15:30+00", "2026-01-31T08:15:30-00:00",
         "2026-01-31T08:15:30+00:00:00", "2026-01-31T08:15:30", "2026-01-31T10:15:30+02:00",
         "2026-01-31t08:15:30+00:00", "20260131T081530+0000", "2026-W05-6T08:15:30+00:00", "1769847330"],
    ),
    "a whole minute": ("2026-01-31T08:15:00+00:00", ["2026-01-31T08:15+00:00", "2026-01-31T08:15:00.000000+00:00"]),
    "midnight": (
        "2026-01-31T00:00:00+00:00",
        ["2026-01-31", "2026-01-31T00:00:00.000000+00:00", "2026-01-30T24:00:00+00:00", "2026-01-31T00+00:00"],
    ),
    "a tenth of a second": (
        "2026-01-31T08:15:30.100000+00:00",
        ["2026-01-31T08:15:30.1+00:00", "2026-01-31T08:15:30.100+00:00", "2026-01-31T08:15:30,100000+00:00"],
    ),
    "a microsecond": (
        "2026-01-31T08:15:30.000001+00:00",
        ["2026-01-31T08:15:30.0000010+00:00", "2026-01-31T08:15:30.0000011+00:00", "2026-01-31T08:15:30.000001Z",
         "2026-01-31T08:15:30.000001", "2026-01-31T08:15:30.000001-00:00", "2026-01-31T07:15:30.000001-01:00"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "others"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_version_is_compared_character_by_character(
    service: Service, alice: Client, text: str, others: list[str]
) -> None:
    """Another text of the same moment, such as the one that version 1.0 wrote, is another version."""
    task = alice.create()
    service.sql("UPDATE task SET created_at = %s, updated_at = %s WHERE id = %s", text, text, task["id"])
    before = service.rows(alice)
    response = alice.get(path_of(task))
    assert response.json() == task | {"created_at": text, "updated_at": text}
    assert response.headers["etag"] == f'"{text}"'
    for other in others:
        response = alice.get(path_of(task), headers={"If-None-Match": f'"{other}"'})
        assert (response.status_code, response.headers["etag"]) == (200, f'"{text}"')
        for method, action, body, _ in (write.values for write in WRITES):
            response = alice.request(method, path_of(task) + action, json=body, headers={"If-Match": f'"{other}"'})
            assert (response.status_code, response.json()) == (412, MOVED_ON)
    assert service.rows(alice) == before
    assert alice.get(path_of(task), headers={"If-None-Match": f'"{text}"'}).status_code == 304
    many = ", ".join(f'"{each}"' for each in [*others, text])
    assert alice.get(path_of(task), headers={"If-None-Match": many}).status_code == 304
    assert alice.put(path_of(task), json={}, headers={"If-Match": f'"{text}"'}).headers["etag"] == f'"{text}"'
    assert alice.put(path_of(task), json={}, headers={"If-Match": many}).headers["etag"] == f'"{text}"'
    assert alice.put(path_of(task), json={"title": "new"}, headers={"If-Match": f'"{text}"'}).status_code == 200
    assert alice.put(path_of(task), json={"title": "newer"}, headers={"If-Match": f'"{text}"'}).status_code == 412


# --- If-None-Match ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", cases(NAMES_IT | NAMES_IT_WEAKLY | ANY))
def test_what_the_client_has_already_is_not_sent_again(alice: Client, said: str) -> None:
    task = alice.create()
    for method, path in READS:
        whole = alice.request(method, path.format(task["id"]))
        headers = lines("If-None-Match", said, whole.headers["etag"])
        response = alice.request(method, path.format(task["id"]), headers=headers)
        assert (whole.status_code, response.status_code, response.content) == (200, 304, b"")
        expected = what_is_stable(whole)
        assert expected["cache-control"] == "private, no-cache"
        del expected["content-length"], expected["content-type"]
        assert what_is_stable(response) == expected
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize("said", cases(NAMES_ANOTHER | IS_NO_LIST))
def test_what_the_client_does_not_have_is_sent(alice: Client, said: str) -> None:
    """That includes what is no list of tags: it is ignored."""
    task = alice.create()
    for method, path in READS:
        whole = alice.request(method, path.format(task["id"]))
        headers = lines("If-None-Match", said, whole.headers["etag"])
        response = alice.request(method, path.format(task["id"]), headers=headers)
        assert (response.status_code, response.content) == (200, whole.content)
        assert what_is_stable(response) == what_is_stable(whole)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_none_match_tells_a_stranger_nothing(alice: Client, bob: Client, method: str) -> None:
    task = alice.create()
    never = bob.request(method, f"/api/tasks/{NO_TASK}")
    assert (never.status_code, method == "HEAD" or never.json() == NOT_FOUND) == (404, True)
    for said in EVERYTHING.values():
        response = bob.request(method, path_of(task), headers=lines("If-None-Match", said, etag_of(task)))
        assert (response.status_code, response.content) == (404, never.content)
        assert what_is_stable(response) == what_is_stable(never)


def test_the_etag_of_somebody_elses_list_is_none_of_ones_own(alice: Client, bob: Client) -> None:
    alice.create()
    etag = alice.get("/api/tasks").headers["etag"]
    response = bob.get("/api/tasks", headers={"If-None-Match": etag})
    assert (response.status_code, response.json()) == (200, {"items": []})
    assert response.headers["etag"] != etag
    his = bob.create()
    response = bob.get("/api/tasks", headers={"If-None-Match": f"{etag}, {response.headers['etag']}"})
    assert (response.status_code, response.json()) == (200, {"items": [his]})


def test_a_deleted_task_is_gone_even_if_the_client_has_it(alice: Client) -> None:
    task = alice.create()
    alice.delete(path_of(task))
    for said in EVERYTHING.values():
        response = alice.get(path_of(task), headers=lines("If-None-Match", said, etag_of(task)))
        assert (response.status_code, response.json()) == (404, NOT_FOUND)


def test_a_changed_task_is_sent_again(alice: Client) -> None:
    task = alice.create()
    for number in range(8):
        changed = change_in_turn(alice, task, number)
        response = alice.get(path_of(task), headers={"If-None-Match": etag_of(task)})
        assert (response.status_code, response.json(), response.headers["etag"]) == (200, changed, etag_of(changed))
        assert alice.get(path_of(task), headers={"If-None-Match": etag_of(changed)}).status_code == 304
        task = changed


def list_etag(client: Client, status: str = "all") -> str:
    """Return the ETag of a list, having checked that the list is not sent to whoever has it."""
    etag = client.get("/api/tasks", params={"status": status}).headers["etag"]
    response = client.get("/api/tasks", params={"status": status}, headers={"If-None-Match": etag})
    assert (response.status_code, response.headers["etag"]) == (304, etag)
    assert re.fullmatch(r'W/"[!#-~]+"', etag)
    return etag


def test_every_change_gives_the_list_another_etag(service: Service, alice: Client) -> None:
    """Changes that leave it as long as it was, or take the one before back, and such as nothing but their order has."""
    etags = [list_etag(alice)]
    one, two = alice.create("a"), alice.create("a")
    etags.append(list_etag(alice))
    future = "UPDATE task SET updated_at = '2100-01-01T00:00Z' WHERE id = ANY(%s)"
    service.sql(future, [one["id"], two["id"]])  # from here on the changes are a microsecond apart
    etags.append(list_etag(alice))
    for task in (one, two):
        for method, action, body in (
            ("PUT", "", {"title": "b"}),
            ("PUT", "", {"title": "a"}),
            ("PUT", "", {"title": "a"}),
            ("PUT", "", {"description": ""}),
            ("PUT", "", {"description": None}),
            ("PATCH", "/complete", None),
            ("PATCH", "/complete", None),
            ("PATCH", "/complete", {"completed": False}),
        ):
            assert alice.request(method, path_of(task) + action, json=body).status_code == 200
            etags.append(list_etag(alice))
    alice.delete(path_of(one))
    etags.append(list_etag(alice))
    alice.create("a")
    etags.append(list_etag(alice))
    assert len(set(etags)) == len(etags)
    alice.delete(path_of(two))
    alice.delete(path_of(alice.tasks()[0]))
    assert list_etag(alice) == etags[0]


@pytest.mark.parametrize(
    "assignment", ["title = 'b'", "description = ''", "completed = true", "created_at = '2000-01-01T00:00Z'"]
)
def test_a_change_by_another_program_gives_the_list_another_etag(
    service: Service, alice: Client, assignment: LiteralString
) -> None:
    """One that knows nothing of versions and leaves updated_at as it is."""
    task = alice.create("a")
    before = list_etag(alice)
    service.sql(f"UPDATE task SET {assignment} WHERE id = %s", task["id"])
    response = alice.get("/api/tasks", headers={"If-None-Match": before})
    assert (response.status_code, response.json()) == (200, {"items": [alice.get(path_of(task)).json()]})
    assert response.headers["etag"] != before


def test_the_list_keeps_its_etag_while_nothing_changes(alice: Client, bob: Client) -> None:
    key = {"Idempotency-Key": "a"}
    task = alice.post("/api/tasks", json={"title": "a"}, headers=key).json()
    stale = {"If-Match": '"a"'}
    before = list_etag(alice)
    assert alice.put(path_of(task), json={}).status_code == 200
    assert alice.put(path_of(task), json={"title": "b"}, headers=stale).status_code == 412
    assert alice.patch(f"{path_of(task)}/complete", headers=stale).status_code == 412
    assert alice.delete(path_of(task), headers=stale).status_code == 412
    assert alice.put(path_of(task), json={"title": ""}).status_code == 422
    assert alice.post("/api/tasks", json={"title": "a"}, headers=key).status_code == 201
    assert alice.post("/api/tasks", json={"title": "b"}, headers=key).status_code == 422
    assert alice.post("/api/tasks", json={"title": "a"}, headers={"Idempotency-Key": ""}).status_code == 400
    assert bob.post("/api/tasks", json={"title": "b"}, headers=key).status_code == 201
    assert bob.delete(path_of(task)).status_code == 404
    assert list_etag(alice) == before


def test_each_status_has_an_etag_of_its_own(alice: Client) -> None:
    pending, done = alice.create(), alice.create(completed=True)
    before = {status: list_etag(alice, status) for status in ("all", "pending", "completed")}
    assert len(set(before.values())) == 3
    assert alice.get("/api/tasks").headers["etag"] == before["all"]
    alice.put(path_of(pending), json={"title": "new"})
    after = {status: list_etag(alice, status) for status in before}
    assert {status for status in before if after[status] != before[status]} == {"all", "pending"}
    alice.patch(f"{path_of(done)}/complete")
    later = {status: list_etag(alice, status) for status in before}
    assert {status for status in before if later[status] != after[status]} == {"all", "pending", "completed"}


steps = st.tuples(
    st.sampled_from(["create", "PUT", "PATCH", "DELETE", "other program"]), st.integers(0, 2), st.booleans()
)


@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(st.lists(steps, max_size=20))
@example([("create", 0, True), ("create", 0, False), ("PUT", 0, True), ("PUT", 1, True), ("DELETE", 0, True)])
@example([("create", 0, False), ("PATCH", 0, False), ("PATCH", 0, False), ("create", 0, False), ("DELETE", 1, False)])
def test_lists_with_one_etag_are_one_list(service: Service, steps: list[tuple[str, int, bool]]) -> None:
    """Whatever two users do, in whatever order: what is a 304 now is what was sent with that ETag then."""
    bodies: dict[str, bytes] = {}
    with service.client(new_user_id()) as alice, service.client(new_user_id()) as bob:
        for number, (step, which, first) in enumerate([("", 0, True), *steps]):
            client = alice if first else bob
            tasks = client.tasks() if step else []
            if step == "create":
                client.create("a", completed=which == 0)
            elif tasks:
                task = tasks[which % len(tasks)]
                if step == "other program":
                    service.sql("UPDATE task SET title = %s WHERE id = %s", "ab"[number % 2], task["id"])
                else:
                    action, body = ("/complete", {}) if step == "PATCH" else ("", {"title": "ab"[number % 2]})
                    response = client.request(step, path_of(task) + action, json=None if step == "DELETE" else body)
                    assert response.status_code in (200, 204)
            for client, status in itertools.product((alice, bob), ("all", "completed")):
                before = list(bodies)
                response = client.get("/api/tasks", params={"status": status})
                assert bodies.setdefault(response.headers["etag"], response.content) == response.content
                again = client.get(
                    "/api/tasks", params={"status": status}, headers={"If-None-Match": ", ".join(before)}
                )
                assert again.status_code == (304 if response.headers["etag"] in before else 200)
                assert again.headers["etag"] == response.headers["etag"]
    assert len(set(bodies.values())) == len(bodies)


# --- If-Match --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", cases(NAMES_IT | ANY))
def test_a_write_is_made_to_the_version_that_it_names(alice: Client, said: str) -> None:
    other = alice.create()
    for method, action, body, changes in (write.values for write in WRITES):
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


@pytest.mark.parametrize("said", cases(NAMES_IT_WEAKLY | NAMES_ANOTHER | IS_NO_LIST))
def test_a_write_is_not_made_to_a_version_that_it_does_not_name(service: Service, alice: Client, said: str) -> None:
    task = alice.create()
    before = service.rows(alice)
    for method, action, body, _ in (write.values for write in WRITES):
        headers = lines("If-Match", said, etag_of(task))
        response = alice.request(method, path_of(task) + action, json=body, headers=headers)
        assert (response.status_code, response.json()) == (412, MOVED_ON)
    assert service.rows(alice) == before


@pytest.mark.parametrize(("method", "action", "body", "changes"), WRITES)
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
    assert response.status_code in (200, 204)


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
    assert (response.status_code, response.json()) == (404, NOT_FOUND)
    response = alice.patch(path, content=b"null", headers=headers | if_match(toggled))
    assert (response.status_code, response.json()["completed"]) == (200, False)


@pytest.mark.parametrize(("method", "action", "body", "changes"), WRITES)
def test_if_match_tells_a_stranger_nothing(
    service: Service, alice: Client, bob: Client, method: str, action: str, body: object, changes: object
) -> None:
    task = alice.create()
    bob.create()
    before = service.rows(alice, bob)
    never = bob.request(method, f"/api/tasks/{NO_TASK}{action}", json=body)
    assert (never.status_code, never.json()) == (404, NOT_FOUND)
    for said in EVERYTHING.values():
        headers = lines("If-Match", said, etag_of(task))
        response = bob.request(method, path_of(task) + action, json=body, headers=headers)
        assert (response.status_code, response.content) == (404, never.content)
        assert what_is_stable(response) == what_is_stable(never)
    assert service.rows(alice, bob) == before


@pytest.mark.parametrize("task_id", ["0", "-1", str(NO_TASK), str(2**63), "9" * 40, "of a deleted task"])
@pytest.mark.parametrize(("method", "action", "body", "changes"), WRITES)
def test_a_task_that_is_not_there_is_not_found_whatever_if_match_says(
    alice: Client, method: str, action: str, body: object, changes: object, task_id: str
) -> None:
    task = alice.create()
    assert alice.delete(path_of(task)).status_code == 204
    path = path_of(task) if task_id == "of a deleted task" else f"/api/tasks/{task_id}"
    for said in EVERYTHING.values():
        headers = lines("If-Match", said, etag_of(task))
        response = alice.request(method, path + action, json=body, headers=headers)
        assert (response.status_code, response.json()) == (404, NOT_FOUND)


def wrong(field: str, message: str) -> Task:
    return {"detail": f"{field} {message}", "errors": [{"field": field, "message": message}]}


# What can be wrong with a write, and the answer to it.
FAULTS: dict[str, tuple[dict[str, Any], int, Task]] = {
    "no token": ({"headers": {"Authorization": ""}}, 401, {"detail": "Not authenticated"}),
    "another token": ({"headers": {"Authorization": "Bearer a"}}, 401, {"detail": "Invalid token"}),
    "an id that is none": ({"path": "/api/tasks/seven"}, 422, wrong("task_id", "must be a decimal integer")),
}
FAULTS_OF_A_BODY: dict[str, tuple[dict[str, Any], int, Task]] = {
    "too large": ({"content": b" " * 65_537}, 413, {"detail": "The body must have at most 65536 bytes"}),
    "no JSON": ({"content": b"{"}, 400, {"detail": "The body must be valid JSON, encoded as UTF-8"}),
    "not declared as JSON": (
        {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
        415,
        {"detail": "The body must be JSON, with Content-Type: application/json"},
    ),
    "no object": ({"json": []}, 422, wrong("body", "must be an object")),
    "a field that is wrong": ({"json": {"completed": 1}}, 422, wrong("completed", "must be true or false")),
}


@pytest.mark.parametrize(
    ("method", "action", "fault"),
    [
        *(("PUT", "", fault) for fault in FAULTS_OF_A_BODY | FAULTS),
        *(("PATCH", "/complete", fault) for fault in FAULTS_OF_A_BODY | FAULTS),
        *(("DELETE", "", fault) for fault in ("too large", "not declared as JSON", *FAULTS)),
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
        assert (response.status_code, response.json()) == (status, answer)
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


# --- Idempotency-Key -------------------------------------------------------------------------------------------------

KEYS = [
    "a", "0", "!", "~", "*", "-", "null", "5f0c2b3e-8b1f-4f1e-9d53-0f6f5f0c2b3e", '"5f0c2b3e"', "'", '"', "''", "\\",
    "\\'", "%", "%%", "%s", "%20", "_", "$1", "$$", "{task}", "{}", "a,b", "a;b", "a=b", "--", "/*",
    "';DROP/**/TABLE/**/task;--",
    "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~", "x" * 255,
]  # fmt: skip
BODY = {"title": "Buy milk", "description": "Two litres", "completed": True}


def with_key(client: Client, key: str | bytes, body: object = BODY) -> httpx.Response:
    key = key.encode() if isinstance(key, str) else key
    return client.post("/api/tasks", json=body, headers={b"Idempotency-Key": key})


def assert_created(response: httpx.Response, task: Task | None = None) -> Task:
    """Check the answer to a creation, of the task if one is given, and return the task."""
    created: Task = response.json()
    assert (response.status_code, created) == (201, task or created)
    assert response.headers["location"] == path_of(created)
    assert response.headers["etag"] == etag_of(created)
    assert created.keys() >= {"id", "user_id", "title", "description", "completed", "created_at", "updated_at"}
    return created


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:30])
def test_one_key_makes_one_task(service: Service, alice: Client, bob: Client, key: str) -> None:
    task = assert_created(with_key(alice, key))
    assert task == task | BODY
    for _ in range(3):
        assert_created(with_key(alice, key), task)
    assert alice.tasks() == [task]
    his = assert_created(with_key(bob, key))
    assert (his["id"] != task["id"], his["user_id"], bob.tasks()) == (True, bob.user_id, [his])
    assert alice.tasks() == [task]


def test_keys_that_are_alike_are_not_the_same(alice: Client) -> None:
    """Another case, a beginning, an end, a pattern, an escape, leading zeros."""
    keys = [
        "key",
        "KEY",
        "Key",
        "ke",
        "ey",
        "keys",
        "k%",
        "_ey",
        "k*",
        '"key',
        'key"',
        '""key""',
        "'key'",
        "%6Bey",
        "\\key",
        "1",
        "01",
        "+1",
    ]
    tasks = [assert_created(with_key(alice, key)) for key in keys]
    assert alice.tasks() == tasks[::-1]
    for key, task in zip(keys, tasks, strict=True):
        assert_created(with_key(alice, key), task)
    assert alice.tasks() == tasks[::-1]


@pytest.mark.parametrize(
    "key", ["k", "5f0c2b3e-8b1f-4f1e-9d53", "a,b;c", "'", '"', "\\", "x" * 253, "x" * 255], ids=len
)
@pytest.mark.parametrize("quoted_first", [False, True], ids=["without quotes first", "with quotes first"])
def test_a_key_is_the_same_in_quotes_and_without(alice: Client, bob: Client, key: str, quoted_first: bool) -> None:
    """As the draft of the IETF writes it, and as everybody does. The longest one has 257 characters then."""
    first, second = (f'"{key}"', key) if quoted_first else (key, f'"{key}"')
    task = assert_created(with_key(alice, first))
    assert_created(with_key(alice, second), task)
    assert_created(with_key(alice, first), task)
    response = with_key(alice, second, {"title": "another"})
    assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    assert alice.tasks() == [task]
    his = assert_created(with_key(bob, second))
    assert (his["id"] != task["id"], bob.tasks()) == (True, [his])


@pytest.mark.parametrize(
    "key",
    [b'""', b'"a b"', b'" "', b'"' + b"x" * 256 + b'"', b'"' + b"x" * 255, b"x" * 255 + b'"', b'"\xe9"',
     b"", b"x" * 256, b"x" * 5000, b"a b", b"a\tb", b", ,", "é".encode(), "é".encode("latin-1"), b"\x80", b"\xa0",
     "\uff41".encode(), b"a\xff"],
    ids=lambda key: ascii(key)[:20],
)  # fmt: skip
@pytest.mark.parametrize("existing", [False, True], ids=["alone", "beside a task"])
def test_what_cannot_be_a_key_is_refused(alice: Client, key: bytes, existing: bool) -> None:
    tasks = [with_key(alice, "a").json()] if existing else []
    response = with_key(alice, key)
    assert (response.status_code, response.json()) == (400, NOT_A_KEY)
    assert alice.tasks() == tasks


@pytest.mark.parametrize(
    ("request_options", "status", "answer"),
    [
        ({"content": b" " * 65_537}, 413, FAULTS_OF_A_BODY["too large"][2]),
        (
            {"content": b"a", "headers": {"Content-Type": "text/plain"}},
            415,
            FAULTS_OF_A_BODY["not declared as JSON"][2],
        ),
        ({"content": b"{"}, 400, FAULTS_OF_A_BODY["no JSON"][2]),
        ({"json": {"title": ""}}, 400, NOT_A_KEY),
    ],
    ids=["413", "415", "400", "422"],
)
def test_what_cannot_be_a_key_is_told_in_its_place(
    alice: Client, request_options: dict[str, Any], status: int, answer: Task
) -> None:
    headers = request_options.get("headers", {}) | {"Idempotency-Key": "a b"}
    response = alice.post("/api/tasks", **request_options | {"headers": headers})
    assert (response.status_code, response.json()) == (status, answer)


@pytest.mark.parametrize(
    "keys", [("a", "b"), ("a", "a"), ("a", ""), ("", "a"), ("", ""), ("a", "b", "c"), ('"a"', '"a"'), ('"a"', "a")]
)
def test_several_keys_are_refused(alice: Client, keys: tuple[str, ...]) -> None:
    headers = [("Idempotency-Key", key) for key in keys]
    response = alice.post("/api/tasks", json=BODY, headers=headers)
    assert (response.status_code, response.json()) == (400, NOT_A_KEY)
    assert alice.tasks() == []


def test_without_a_key_each_request_makes_a_task(alice: Client) -> None:
    tasks = [assert_created(alice.post("/api/tasks", json=BODY)) for _ in range(3)]
    tasks.append(assert_created(with_key(alice, "a")))
    tasks.append(assert_created(alice.post("/api/tasks", json=BODY)))
    assert len({task["id"] for task in tasks}) == 5
    assert alice.tasks() == tasks[::-1]


# Bodies that say the same, each with a first one.
PLAIN, FULL = b'{"title": "M\xc3\xbcsli"}', b'{"title": "a", "description": "b", "completed": true}'
SAME = {
    "no space": (PLAIN, b'{"title":"M\xc3\xbcsli"}'),
    "white space": (PLAIN, b' {\n\t"title" :\r\n "M\xc3\xbcsli" } \n'),
    "escapes": (PLAIN, rb'{"title": "\u004d\u00FCsl\u0069"}'),
    "an escaped name": (PLAIN, b'{"\\u0074itle": "M\xc3\xbcsli"}'),
    "the defaults": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": null, "completed": false}'),
    "a null alone": (PLAIN, b'{"description": null, "title": "M\xc3\xbcsli"}'),
    "a false alone": (PLAIN, b'{"completed": false, "title": "M\xc3\xbcsli"}'),
    "another order": (FULL, b'{"completed": true, "description": "b", "title": "a"}'),
    "unknown fields": (
        FULL,
        b'{"id": 7, "title": "a", "description": "b", "completed": true, "user_id": "c", "x": [{}]}',
    ),
    "a surrogate pair": ('{"title": "😀"}'.encode(), b'{"title": "\\ud83d\\ude00"}'),
    "a slash": (b'{"title": "a/b"}', rb'{"title": "a\/b"}'),
}
OTHER = {
    "another title": (PLAIN, b'{"title": "M\xc3\xbcsl"}'),
    "a title in another case": (PLAIN, b'{"title": "m\xc3\xbcsli"}'),
    "a title with a blank": (PLAIN, b'{"title": "M\xc3\xbcsli "}'),
    "a title of other characters that look the same": (PLAIN, b'{"title": "Mu\\u0308sli"}'),
    "a description": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": "b"}'),
    "an empty description": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": ""}'),
    "a description that is a word of JSON": (PLAIN, b'{"title": "M\xc3\xbcsli", "description": "null"}'),
    "completed": (PLAIN, b'{"title": "M\xc3\xbcsli", "completed": true}'),
    "not completed": (FULL, b'{"title": "a", "description": "b"}'),
    "no description": (FULL, b'{"title": "a", "completed": true}'),
    "title and description exchanged": (FULL, b'{"title": "b", "description": "a", "completed": true}'),
    "the two in one": (FULL, b'{"title": "a\\", \\"b", "completed": true}'),
}


def both_ways(pairs: dict[str, tuple[bytes, bytes]]) -> list[Any]:
    forth = [pytest.param(first, second, id=name) for name, (first, second) in pairs.items()]
    return forth + [pytest.param(second, first, id=f"{name}, reversed") for name, (first, second) in pairs.items()]


def send_with_key(client: Client, key: str, content: bytes, media_type: str = "application/json") -> httpx.Response:
    return client.post("/api/tasks", content=content, headers={"Idempotency-Key": key, "Content-Type": media_type})


@pytest.mark.parametrize(("first", "second"), both_ways(SAME))
def test_the_same_body_in_other_words_is_the_same(alice: Client, first: bytes, second: bytes) -> None:
    task = assert_created(send_with_key(alice, "a", first))
    assert_created(send_with_key(alice, "a", second), task)
    assert_created(send_with_key(alice, "a", first, "application/vnd.api+json; charset=utf-8"), task)
    assert alice.tasks() == [task]


@pytest.mark.parametrize(("first", "second"), both_ways(OTHER))
def test_another_body_with_the_same_key_is_refused(
    service: Service, alice: Client, bob: Client, first: bytes, second: bytes
) -> None:
    task = assert_created(send_with_key(alice, "a", first))
    before = service.rows(alice)
    response = send_with_key(alice, "a", second)
    assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    assert service.rows(alice) == before
    his = assert_created(send_with_key(bob, "a", second))
    assert_created(send_with_key(alice, "a", first), task)
    assert (service.rows(alice), bob.tasks()) == (before, [his])
    assert_created(send_with_key(alice, "b", second))


@pytest.mark.parametrize(
    ("status", "request_options"),
    [
        (422, {"json": {}}),
        (422, {"json": {"title": " "}}),
        (422, {"json": BODY | {"completed": None}}),
        (422, {"json": [BODY]}),
        (400, {"content": b""}),
        (400, {"content": json.dumps(BODY)[:-1].encode()}),
        (413, {"content": json.dumps(BODY).encode() + b" " * 65_536}),
        (415, {"content": json.dumps(BODY).encode(), "headers": {"Content-Type": "text/plain"}}),
        (401, {"json": BODY, "headers": {"Authorization": ""}}),
        (405, {"json": BODY, "method": "PUT"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_failed_uses_no_key_up(
    service: Service, alice: Client, status: int, request_options: dict[str, Any]
) -> None:
    headers = request_options.get("headers", {}) | {"Idempotency-Key": "a"}
    for _ in range(2):
        response = alice.request(**{"method": "POST", "url": "/api/tasks"} | request_options | {"headers": headers})
        assert response.status_code == status
    assert service.rows(alice) == []
    task = assert_created(with_key(alice, "a"))
    assert task == task | BODY
    response = alice.request(**{"method": "POST", "url": "/api/tasks"} | request_options | {"headers": headers})
    assert response.status_code == status
    assert_created(with_key(alice, "a"), task)
    assert alice.tasks() == [task]


def test_a_creation_that_the_database_refuses_uses_no_key_up(
    database_url: str, start_service: Callable[..., Service]
) -> None:
    service = start_service(database_url)
    service.wait_until_ready()
    service.sql("ALTER TABLE task ADD CONSTRAINT task_title_of_mine CHECK (title <> 'Buy milk')")
    with service.client("alice") as alice:
        assert with_key(alice, "a").status_code == 422
        assert with_key(alice, "a", BODY | {"title": "Buy bread"}).json()["title"] == "Buy bread"
        assert with_key(alice, "b").status_code == 422
        service.sql("ALTER TABLE task DROP CONSTRAINT task_title_of_mine")
        response = with_key(alice, "a")
        assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
        assert_created(with_key(alice, "b"))
        assert [task["title"] for task in alice.tasks()] == ["Buy milk", "Buy bread"]


@pytest.mark.parametrize(("method", "action", "body", "changes"), [write for write in WRITES if write.values[3]])
def test_a_repeated_creation_answers_with_the_task_as_it_is_now(
    alice: Client, method: str, action: str, body: object, changes: Task
) -> None:
    task = assert_created(with_key(alice, "a", {"title": "Buy milk"}))
    changed = alice.request(method, path_of(task) + action, json=body).json()
    assert changed == task | changes | {"updated_at": changed["updated_at"]}
    assert_created(with_key(alice, "a", {"title": "Buy milk"}), changed)
    assert alice.tasks() == [changed]
    if changes == {"title": "new"}:  # it is the body of the first time that counts
        response = with_key(alice, "a", {"title": "new"})
        assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    headers = if_match(changed)
    assert alice.put(path_of(task), json={"title": "last"}, headers=headers).status_code == 200


def test_a_key_makes_a_new_task_once_the_first_is_deleted(alice: Client, bob: Client) -> None:
    his = assert_created(with_key(bob, "a"))
    ids = set()
    for body in (BODY, BODY, {"title": "another"}):
        task = assert_created(with_key(alice, "a", body))
        ids.add(task["id"])
        assert_created(with_key(alice, "a", body), task)
        assert bob.delete(path_of(task)).status_code == 404
        assert_created(with_key(alice, "a", body), task)
        assert alice.tasks() == [task]
        assert alice.delete(path_of(task)).status_code == 204
        assert alice.get(path_of(task)).status_code == 404
    assert len(ids) == 3
    assert bob.tasks() == [his]


def test_a_key_of_somebody_else_tells_nothing(service: Service, alice: Client, bob: Client) -> None:
    """Whether alice has used it or not, bob's requests are answered alike, and hers too."""
    hers = assert_created(with_key(alice, "used"))
    before = service.rows(alice)
    for key in ("used", "unused"):
        first = with_key(bob, key, {"title": "his"})
        his = assert_created(first)
        assert his == first.json() | {"user_id": bob.user_id, "title": "his", "description": None, "completed": False}
        assert_created(with_key(bob, key, {"title": "his"}), his)
        response = with_key(bob, key)
        assert (response.status_code, response.json()) == (422, ANOTHER_BODY)
    assert service.rows(alice) == before
    assert_created(with_key(alice, "used"), hers)
    assert len(bob.tasks()) == 2


# --- Races -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_processes(new_database: Callable[[], str]) -> Iterator[Service]:
    service = Service(new_database(), WEB_CONCURRENCY="3")
    service.wait_until_ready()
    yield service
    service.remove()


@pytest.fixture
def ann(three_processes: Service) -> Iterator[Client]:
    """A client of the three processes, with the token of a user whom no other test has."""
    with three_processes.client(new_user_id()) as client:
        yield client


@pytest.fixture
def ben(three_processes: Service) -> Iterator[Client]:
    """A client of the three processes, with the token of another one."""
    with three_processes.client(new_user_id()) as client:
        yield client


def race(
    service: Service, held: LiteralString, parameters: list[Any], requests: Sequence[Callable[[], httpx.Response]]
) -> list[httpx.Response]:
    """Send requests at once, while a transaction holds what they are after, and release them together."""
    with ThreadPoolExecutor(len(requests)) as threads, psycopg.connect(service.database_url) as connection:
        connection.execute(held, parameters)
        answers = [threads.submit(request) for request in requests]
        wait_for_waiting_statements(service, 1)
        time.sleep(0.2)  # for one of each process at most; the others wait there for their turn
        connection.rollback()
        return [answer.result() for answer in answers]


THE_TASK: LiteralString = "SELECT FROM task WHERE user_id = %s AND id = %s FOR UPDATE"
THE_KEY: LiteralString = "INSERT INTO task (user_id, title, idempotency_key, request_hash) VALUES (%s, 'a', %s, 'b')"


def statuses(answers: list[httpx.Response]) -> dict[int, int]:
    return dict(Counter(answer.status_code for answer in answers))


def test_fifty_creations_with_one_key_make_one_task(three_processes: Service, ann: Client) -> None:
    answers = race(three_processes, THE_KEY, [ann.user_id, "a"], [partial(with_key, ann, "a")] * 50)
    [task] = ann.tasks()
    assert task == task | BODY
    assert statuses(answers) == {201: 50}
    for answer in answers:
        assert_created(answer, task)


def test_creations_with_one_key_and_two_bodies_make_one_task(three_processes: Service, ann: Client) -> None:
    bodies = [{"title": "one"}, {"title": "two"}] * 25
    for key in "abcdef":
        requests = [partial(with_key, ann, key, body) for body in bodies]
        answers = race(three_processes, THE_KEY, [ann.user_id, key], requests)
        task = ann.tasks()[0]
        for answer, body in zip(answers, bodies, strict=True):
            if body["title"] == task["title"]:
                assert_created(answer, task)
            else:
                assert (answer.status_code, answer.json()) == (422, ANOTHER_BODY)
    assert len(ann.tasks()) == 6


def test_two_users_who_race_with_one_key_have_a_task_each(three_processes: Service, ann: Client, ben: Client) -> None:
    requests = [partial(with_key, ann, "a"), partial(with_key, ben, "a")] * 25
    answers = race(three_processes, THE_KEY, [ann.user_id, "a"], requests)
    for client, theirs in ((ann, answers[::2]), (ben, answers[1::2])):
        [task] = client.tasks()
        assert task["user_id"] == client.user_id
        for answer in theirs:
            assert_created(answer, task)


def test_creations_with_one_key_that_meet_a_deletion_are_all_made(three_processes: Service, ann: Client) -> None:
    """Each answers with the task before or the one after."""
    for number in range(5):
        task = assert_created(with_key(ann, "a"))
        requests = [partial(with_key, ann, "a")] * 20
        requests.insert(number * 5, partial(ann.delete, path_of(task)))
        answers = race(three_processes, THE_TASK, [ann.user_id, task["id"]], requests)
        assert statuses(answers) == {201: 20, 204: 1}
        left = {task["id"]: task for task in ann.tasks()}
        assert task["id"] not in left
        assert len(left) <= 1
        for answer in answers:
            if answer.status_code == 201:
                assert_created(answer, left.get(answer.json()["id"], task))
        for other in left.values():
            ann.delete(path_of(other))


@pytest.mark.parametrize(("method", "action", "body", "changes"), CHANGES)
def test_of_fifty_writes_with_one_etag_one_is_made(
    three_processes: Service, ann: Client, method: str, action: str, body: object, changes: Task | None
) -> None:
    task, other = ann.create(), ann.create()
    write = partial(ann.request, method, path_of(task) + action, json=body, headers=if_match(task))
    answers = race(three_processes, THE_TASK, [ann.user_id, task["id"]], [write] * 50)
    failed = [answer for answer in answers if answer.status_code >= 400]
    if changes is None:
        assert statuses(answers) == {204: 1, 404: 49}
        assert [answer.json() for answer in failed] == [NOT_FOUND] * 49
        assert ann.tasks() == [other]
    else:
        assert statuses(answers) == {200: 1, 412: 49}
        assert [answer.json() for answer in failed] == [MOVED_ON] * 49
        [changed] = [answer.json() for answer in answers if answer.status_code == 200]
        assert changed == task | changes | {"updated_at": changed["updated_at"]}
        assert ann.tasks() == [other, changed]


def test_of_different_writes_with_one_etag_one_is_made(three_processes: Service, ann: Client) -> None:
    for _ in range(5):
        task = ann.create()
        writes = [
            partial(ann.request, method, path_of(task) + action, json=body, headers=if_match(task))
            for method, action, body, _ in (change.values for change in CHANGES)
        ] * 8
        random.Random(0).shuffle(writes)
        answers = race(three_processes, THE_TASK, [ann.user_id, task["id"]], writes)
        [made] = [answer for answer in answers if answer.is_success]
        others = 404 if made.status_code == 204 else 412
        assert statuses(answers) == {made.status_code: 1, others: len(writes) - 1}
        assert ann.tasks() == ([] if made.status_code == 204 else [made.json()])
        ann.delete(path_of(task))


def test_nobody_overwrites_what_another_has_just_saved(three_processes: Service, ann: Client) -> None:
    """Ten clients count to five each in one title, by reading, adding one, and writing if nobody else has."""
    path = path_of(ann.create("0"))

    def count(client_number: int) -> int:
        refused = 0
        with three_processes.client(ann.user_id) as client:
            for _ in range(5):
                while True:
                    task = client.get(path).json()
                    body = {"title": str(int(task["title"]) + 1)}
                    response = client.put(path, json=body, headers=if_match(task))
                    if response.status_code == 200:
                        break
                    assert (response.status_code, response.json()) == (412, MOVED_ON)
                    refused += 1
        return refused

    with ThreadPoolExecutor(10) as threads:
        refused = sum(threads.map(count, range(10)))
    assert ann.get(path).json()["title"] == "50"
    assert refused > 0, "there was no race"


# --- A client that repeats what it got no answer to ------------------------------------------------------------------

FATES = {
    "passed on": 6,
    "request lost": 1,
    "request cut": 1,
    "answer lost": 1,
    "answer cut": 1,
    "not waited for": 1,
}
"""What becomes of a request on its way, and how often."""


class BadConnection:
    """A proxy for one client, in a thread of its own, that loses requests and answers, whole or in part, at random."""

    def __init__(self, service: Service, choices: random.Random) -> None:
        self.service, self.choices = service, choices
        self.fates: Counter[str] = Counter()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def __enter__(self) -> BadConnection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # which ends the wait for the next connection
        self.thread.join()
        self.listener.close()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self.carry(connection)

    def carry(self, connection: socket.socket) -> None:
        """Carry one request to the service and the answer back, or not."""
        request = read_request(connection)
        request = re.sub(rb"\r\nconnection: [^\r]*", b"\r\nConnection: close", request, count=1, flags=re.IGNORECASE)
        [fate] = self.choices.choices(list(FATES), list(FATES.values()))
        if fate == "not waited for" and b"\r\nif-match:" not in request.lower():
            fate = "answer lost"  # if it is made later than its repetition, a condition alone makes that harmless
        self.fates[fate] += 1
        if fate == "request lost":
            return
        with socket.create_connection(("127.0.0.1", self.service.port), timeout=30) as server:
            server.sendall(request[: self.choices.randrange(1, len(request))] if fate == "request cut" else request)
            if fate in ("request cut", "not waited for"):
                return
            answer = b"".join(iter(lambda: server.recv(65_536), b""))
        if fate != "answer lost":
            connection.sendall(answer[: self.choices.randrange(1, len(answer))] if fate == "answer cut" else answer)


def read_request(connection: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        if not (more := connection.recv(65_536)):
            raise ConnectionError
        request += more
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        if not (more := connection.recv(65_536)):
            raise ConnectionError
        body += more
    return head + b"\r\n\r\n" + body


class Persistent:
    """A client that repeats each request until it has an answer, and the tasks that it means to have."""

    def __init__(self, user_id: str, connection: BadConnection, choices: random.Random) -> None:
        self.client = Client(connection.url, user_id, headers={"Connection": "close"})
        self.choices = choices
        self.tasks: dict[int, Task] = {}
        self.outcomes: Counter[str] = Counter()

    def send(self, method: str, path: str, body: object, headers: dict[str, str]) -> tuple[httpx.Response, bool]:
        """Return the answer, and whether an earlier try may have been made."""
        for cuts in range(100):
            with suppress(httpx.TransportError):
                return self.client.request(method, path, json=body, headers=headers), cuts > 0
        raise AssertionError("no answer to a hundred tries")

    def live(self, operations: int) -> None:
        for _ in range(operations):
            task = self.choices.choice([None, *self.tasks.values()][:8])
            conditional = self.choices.random() < 0.5
            completed = self.choices.random() < 0.5
            match self.choices.randrange(5) if task else 0:
                case 0:
                    self.create(completed)
                case _ if task is None:
                    raise AssertionError
                case 1:
                    wanted: Task = {"title": self.text(), "description": self.choices.choice([None, self.text()])}
                    self.change(task, "PUT", "", wanted, wanted, if_match(task) if conditional else {})
                case 2:
                    wanted = {"completed": completed}
                    self.change(task, "PATCH", "/complete", wanted, wanted, if_match(task) if conditional else {})
                case 3:
                    wanted = {"completed": not task["completed"]}
                    self.change(task, "PATCH", "/complete", None, wanted, if_match(task))
                case 4:
                    self.delete(task, if_match(task) if conditional else {})

    def text(self) -> str:
        return f"text {self.choices.randrange(10**9)}"

    def create(self, completed: bool) -> None:
        fields = {"title": self.text(), "completed": completed}
        key = f"{self.choices.getrandbits(128):x}"
        response, _ = self.send("POST", "/api/tasks", fields, {"Idempotency-Key": key})
        task = assert_created(response)
        assert task == task | fields | {"user_id": self.client.user_id, "description": None}
        assert task["id"] not in self.tasks
        self.tasks[task["id"]] = task

    def change(self, task: Task, method: str, action: str, body: object, wanted: Task, headers: dict[str, str]) -> None:
        response, repeated = self.send(method, path_of(task) + action, body, headers)
        if response.status_code == 412:
            assert (response.json(), repeated, headers) == (MOVED_ON, True, if_match(task))
            self.outcomes["412"] += 1
            response, _ = self.send("GET", path_of(task), None, {})
        assert response.status_code == 200
        changed = response.json()
        assert changed == task | wanted | {"updated_at": changed["updated_at"]}
        assert changed["updated_at"] > task["updated_at"]
        self.tasks[task["id"]] = changed

    def delete(self, task: Task, headers: dict[str, str]) -> None:
        response, repeated = self.send("DELETE", path_of(task), None, headers)
        if response.status_code == 404:
            assert (response.json(), repeated) == (NOT_FOUND, True)
            self.outcomes["404"] += 1
        else:
            assert response.status_code == 204
        del self.tasks[task["id"]]


@pytest.mark.parametrize("operations", [2_000, pytest.param(20_000, marks=pytest.mark.long)])
def test_a_client_that_repeats_its_writes_has_what_it_meant_to_have(three_processes: Service, operations: int) -> None:
    """Four clients of each of two users, each with tasks of its own."""
    users = [new_user_id(), new_user_id()]
    with ExitStack() as stack:
        connections, clients = [], []
        for seed in range(8):
            connection = stack.enter_context(BadConnection(three_processes, random.Random(seed)))
            connections.append(connection)
            clients.append(Persistent(users[seed % 2], connection, random.Random(-seed)))
            stack.enter_context(clients[-1].client)
        with ThreadPoolExecutor(len(clients)) as threads:
            list(threads.map(lambda client: client.live(operations // len(clients)), clients))

    for user_id in users:
        meant = [task for client in clients if client.client.user_id == user_id for task in client.tasks.values()]
        meant.sort(key=lambda task: (task["created_at"], task["id"]), reverse=True)
        with three_processes.client(user_id) as client:
            assert client.tasks() == meant
    fates = sum((connection.fates for connection in connections), Counter())
    outcomes = sum((client.outcomes for client in clients), Counter())
    assert fates.keys() == FATES.keys()
    assert outcomes.keys() == {"404", "412"}, "no write was made whose answer was lost"
    assert fates.total() > operations * 1.3


MEANT = """
    const now = globalThis.setTimeout
    globalThis.setTimeout = (callback, milliseconds) => now(callback, milliseconds / 100)
    const tasks = []
    for (let number = 0; number < 60; number++) {
      const { status, json: task } = await create({ title: `task ${number}` })
      if (status !== 201) throw new Error(status)
      if (number % 3 === 0) await remove(task)
      else if (number % 3 === 1) tasks.push((await change(task.id, { description: `of ${number}` })).json)
      else tasks.push(task)
    }
    console.log(JSON.stringify(tasks.map(({ updated_at, ...rest }) => rest)))
"""


@pytest.mark.parametrize("seed", range(3))
def test_the_client_of_the_readme_has_what_it_meant_to_have(service: Service, alice: Client, seed: int) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    [example] = re.findall(
        r"^```js\n(// tasks\.js\n.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    with BadConnection(service, random.Random(seed)) as connection:
        constants = f"const API_URL = '{connection.url}', TOKEN = '{token(alice.user_id)}'\n"
        command = ["node", "--input-type=module", "--eval", constants + example + MEANT]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    meant = json.loads(ran.stdout)
    assert len(meant) == 40
    found = [{name: value for name, value in task.items() if name != "updated_at"} for task in alice.tasks()]
    assert found == list(reversed(meant))
    assert connection.fates.total() > connection.fates["passed on"] > 0


# --- On the wire ---------------------------------------------------------------------------------------------------


def exchange(service: Service, request: str) -> bytes:
    """Send a request that asks for the connection's end, and return all the bytes that come back."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def head(client: Client, method: str, path: str, *headers: str) -> str:
    """Return the head of a request that asks for the connection's end."""
    lines = [f"{method} {path} HTTP/1.1", "Host: here", "Connection: close"]
    return "\r\n".join([*lines, f"Authorization: {client.headers['Authorization']}", *headers, "", ""])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_unchanged_list_of_two_hundred_tasks_takes_less_than_a_kilobyte(
    service: Service, alice: Client, method: str
) -> None:
    fill: LiteralString = "INSERT INTO task (user_id, title, description) SELECT %s, n::text, repeat('x', n)"
    service.sql(f"{fill} FROM generate_series(1, 200) AS n", alice.user_id)
    origin = "Origin: http://localhost:3000"  # which makes the answer longer
    whole = exchange(service, head(alice, method, "/api/tasks", origin))
    etag = re.search(r'\r\netag: (W/".*?")\r\n', whole.decode(), re.IGNORECASE)
    assert whole.startswith(b"HTTP/1.1 200 ")
    assert len(whole) > 50_000 or method == "HEAD"
    assert etag
    answer = exchange(service, head(alice, method, "/api/tasks", origin, f"If-None-Match: {etag[1]}"))
    assert answer.startswith(b"HTTP/1.1 304 ")
    assert len(answer) < 1024
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("around", [" {}", "{} ", "\t {}\t \t", "   {}   "], ids=ascii)
def test_white_space_around_a_header_is_no_part_of_it(service: Service, alice: Client, around: str) -> None:
    """As RFC 9110 has it, section 5.5. HTTP clients for programs take it away themselves."""
    task = assert_created(with_key(alice, "a"))
    body, etag = json.dumps(BODY), etag_of(task)

    def status(method: str, header: str, value: str, content: str = "") -> int:
        path = "/api/tasks" if method == "POST" else path_of(task)
        lines = f"{header}:{around.format(value)}", f"Content-Length: {len(content)}"
        return int(exchange(service, head(alice, method, path, *lines) + content)[9:12])

    assert status("POST", "Idempotency-Key", "a", body) == 201
    assert alice.tasks() == [task]
    for value in ("*", etag, f'"a", W/{etag}'):
        assert status("GET", "If-None-Match", value) == 304
    assert status("GET", "If-None-Match", '"a"') == 200
    assert status("PUT", "If-Match", '"a"', "{}") == 412
    assert status("PUT", "If-Match", etag, "{}") == 200
    assert status("PUT", "If-Match", "*", "{}") == 200
    assert status("DELETE", "If-Match", "*") == 204


def test_a_connection_goes_on_after_a_304(alice: Client) -> None:
    """Nothing follows it that the client would take for the next answer."""
    task = alice.create()
    for _ in range(3):
        assert alice.get("/api/tasks", headers={"If-None-Match": "*"}).status_code == 304
        assert alice.head(path_of(task), headers={"If-None-Match": "*"}).status_code == 304
        assert alice.get(path_of(task)).json() == task


# --- Browsers --------------------------------------------------------------------------------------------------------

ORIGIN = {"Origin": "http://localhost:3000"}


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match", "Idempotency-Key"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_preflight_allows_the_conditions(nobody: Client, method: str, header: str) -> None:
    for asked in (header, header.lower(), f"authorization,content-type,{header.lower()}"):
        headers = ORIGIN | {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": asked}
        response = nobody.options("/api/tasks/1", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert header.lower() in re.split(", *", response.headers["access-control-allow-headers"].lower())


CROSS_ORIGIN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 GET": ("GET", "", {}),
    "200 PUT": ("PUT", "", {"json": {"title": "new"}}),
    "200 PATCH": ("PATCH", "/complete", {}),
    "204 DELETE": ("DELETE", "", {"headers": {"If-Match": "*"}}),
    "304 GET": ("GET", "", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD": ("HEAD", "", {"headers": {"If-None-Match": "*"}}),
    "412 PUT": ("PUT", "", {"json": {}, "headers": {"If-Match": '"a"'}}),
    "412 PATCH": ("PATCH", "/complete", {"headers": {"If-Match": '"a"'}}),
    "412 DELETE": ("DELETE", "", {"headers": {"If-Match": '"a"'}}),
}


@pytest.mark.parametrize("name", CROSS_ORIGIN)
def test_a_page_of_an_allowed_origin_may_read_the_answer_and_its_etag(alice: Client, name: str) -> None:
    method, action, options = CROSS_ORIGIN[name]
    task = alice.create()
    headers = options.get("headers", {})
    response = alice.request(method, path_of(task) + action, **options | {"headers": headers | ORIGIN})
    assert response.status_code == int(name[:3])
    assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    assert response.headers["access-control-allow-credentials"] == "true"
    assert "etag" in re.split(", *", response.headers["access-control-expose-headers"].lower())
    assert "origin" in response.headers["vary"].lower()
    other = alice.create()
    headers = headers | {"Origin": "https://evil.example.com"}
    response = alice.request(method, path_of(other) + action, **options | {"headers": headers})
    assert response.status_code == int(name[:3])
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("key", ["a", "a b"])
def test_a_page_of_an_allowed_origin_may_read_the_answer_to_a_creation_with_a_key(alice: Client, key: str) -> None:
    for status, body in ((201, BODY), (201, BODY), (422, {"title": "another"})):
        response = alice.post("/api/tasks", json=body, headers=ORIGIN | {"Idempotency-Key": key})
        assert response.status_code == (status if key == "a" else 400)
        assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert {"etag", "location"} <= {*re.split(", *", response.headers["access-control-expose-headers"].lower())}
