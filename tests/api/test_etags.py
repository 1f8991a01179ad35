"""Versions: ETag and If-None-Match."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from datetime import datetime, timedelta
from itertools import pairwise
from typing import LiteralString

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sql
from tests.support.conditions import (
    ANY,
    BODY,
    EVERYTHING,
    IS_NO_LIST,
    MOVED_ON,
    NAMES_ANOTHER,
    NAMES_IT,
    NAMES_IT_WEAKLY,
    assert_created,
    cases,
    change_in_turn,
    etag_of,
    if_match,
    lines,
    path_of,
    with_key,
)
from tests.support.errors import TASK_NOT_FOUND
from tests.support.service_process import Client, Service, new_user_id
from tests.support.tasks import KINDS_OF_CHANGE, NO_TASK, what_is_stable
from tests.support.wire import all_that_comes, ask, bearer

READS = [
    (method, path)
    for method in ("GET", "HEAD")
    for path in ("/api/tasks/{}", "/api/tasks", "/api/tasks?status=pending", "/api/tasks?status=completed")
]

# --- ETag ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "action", "body"),
    [
        ("GET", "", None),
        ("HEAD", "", None),
        *(each.values[:3] for each in KINDS_OF_CHANGE if each.values[0] != "DELETE"),
    ],
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
        assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND)
        assert alice.put(path_of(task), json={"title": "new"}, headers=if_match(task)).status_code == 200
    assert [task["title"] for task in alice.tasks()] == ["new"] * 5
    assert service.rows(bob) == before


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
        ["2026-01-31T08:15:30.000000+00:00", "2026-01-31T08:15:30Z", "2026-01-31T08:15:30+0000",
         "2026-01-31T08:15:30-00:00", "2026-01-31T08:15:30", "2026-01-31T10:15:30+02:00", "2026-01-31t08:15:30+00:00",
         "20260131T081530+0000", "2026-W05-6T08:15:30+00:00", "1769847330"],
    ),
    "midnight": ("2026-01-31T00:00:00+00:00", ["2026-01-31", "2026-01-30T24:00:00+00:00", "2026-01-31T00+00:00"]),
    "a tenth of a second": (
        "2026-01-31T08:15:30.100000+00:00",
        ["2026-01-31T08:15:30.1+00:00", "2026-01-31T08:15:30.100+00:00", "2026-01-31T08:15:30,100000+00:00"],
    ),
    "a microsecond": (
        "2026-01-31T08:15:30.000001+00:00",
        ["2026-01-31T08:15:30.0000011+00:00", "2026-01-31T08:15:30.000001Z", "2026-01-31T07:15:30.000001-01:00"],
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
        assert (response.status_code, response.headers["etag"]) == (200, f'"{text}"'), other
        for method, action, body, _ in (write.values for write in KINDS_OF_CHANGE):
            response = alice.request(method, path_of(task) + action, json=body, headers={"If-Match": f'"{other}"'})
            assert (response.status_code, response.json()) == (412, MOVED_ON), (other, method)
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


# The grammar is that of If-Match, whose tests have all of it.
SOME_ARE_NO_LISTS = {name: IS_NO_LIST[name] for name in ("no quotes", "no comma", "two lines of an asterisk")}


@pytest.mark.parametrize("said", cases(NAMES_ANOTHER | SOME_ARE_NO_LISTS))
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
    assert (never.status_code, method == "HEAD" or never.json() == TASK_NOT_FOUND) == (404, True)
    for name, said in EVERYTHING.items():
        response = bob.request(method, path_of(task), headers=lines("If-None-Match", said, etag_of(task)))
        assert (response.status_code, response.content) == (404, never.content), name
        assert what_is_stable(response) == what_is_stable(never), name


def test_the_etag_of_somebody_elses_list_is_none_of_ones_own(alice: Client, bob: Client) -> None:
    alice.create()
    etag = alice.get("/api/tasks").headers["etag"]
    response = bob.get("/api/tasks", headers={"If-None-Match": etag})
    assert (response.status_code, response.json()) == (200, {"items": []})
    assert response.headers["etag"] != etag
    his = bob.create()
    response = bob.get("/api/tasks", headers={"If-None-Match": f"{etag}, {response.headers['etag']}"})
    assert (response.status_code, response.json()) == (200, {"items": [his]})


@pytest.mark.parametrize(("method", "action", "body", "changes"), KINDS_OF_CHANGE)
def test_a_write_does_not_heed_if_none_match(
    alice: Client, method: str, action: str, body: object, changes: object
) -> None:
    for said in ("*", '"a"'):
        task = alice.create()
        response = alice.request(method, path_of(task) + action, json=body, headers={"If-None-Match": said})
        assert response.status_code == (204 if changes is None else 200), said
        assert changes is None or response.json() in alice.tasks(), said


def test_a_deleted_task_is_gone_even_if_the_client_has_it(alice: Client) -> None:
    task = alice.create()
    alice.delete(path_of(task))
    for name, said in EVERYTHING.items():
        response = alice.get(path_of(task), headers=lines("If-None-Match", said, etag_of(task)))
        assert (response.status_code, response.json()) == (404, TASK_NOT_FOUND), name


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


@pytest.mark.parametrize("assignment", ["title = 'b'", "created_at = '2000-01-01T00:00Z'"])
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
                    assert response.status_code == (204 if step == "DELETE" else 200)
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


# --- On the wire ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_unchanged_list_of_two_hundred_tasks_takes_less_than_a_kilobyte(
    service: Service, alice: Client, method: str
) -> None:
    fill: LiteralString = "INSERT INTO task (user_id, title, description) SELECT %s, n::text, repeat('x', n)"
    service.sql(f"{fill} FROM generate_series(1, 200) AS n", alice.user_id)
    origin = "Origin: http://localhost:3000"  # which makes the answer longer
    whole = all_that_comes(service, f"{method} /api/tasks", bearer(alice), origin)
    etag = re.search(r'\r\netag: (W/".*?")\r\n', whole.decode(), re.IGNORECASE)
    assert whole.startswith(b"HTTP/1.1 200 ")
    assert len(whole) > 50_000 or method == "HEAD"
    assert etag
    answer = all_that_comes(service, f"{method} /api/tasks", bearer(alice), origin, f"If-None-Match: {etag[1]}")
    assert answer.startswith(b"HTTP/1.1 304 ")
    assert len(answer) < 1024
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("around", ["{}", "\t {}\t \t"], ids=ascii)
def test_white_space_around_a_header_is_no_part_of_it(service: Service, alice: Client, around: str) -> None:
    """As RFC 9110 has it, section 5.5. HTTP clients for programs take it away themselves."""
    task = assert_created(with_key(alice, "a"))
    body, etag = json.dumps(BODY), etag_of(task)

    def status(method: str, header: str, value: str, content: str = "") -> int:
        path = "/api/tasks" if method == "POST" else path_of(task)
        lines = f"{header}:{around.format(value)}", f"Content-Length: {len(content)}"
        return ask(service, f"{method} {path}", bearer(alice), *lines, content=content.encode()).status

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
