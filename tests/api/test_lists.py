"""Lists: whole, in order and one's own, of a status; short ones in one text with an ETag, long ones in pages."""

from __future__ import annotations

import re
import select
from contextlib import ExitStack

import httpx
import pytest

from tests.support.errors import assert_invalid
from tests.support.fixtures import StartService
from tests.support.lists import COMPLETED, fill, pages_read, stored
from tests.support.postgres import Postgres
from tests.support.service_process import Client, Service
from tests.support.wire import Raw, bearer

MIB = 2**20


def assert_whole(response: httpx.Response) -> None:
    assert response.status_code == 200
    assert response.headers["Content-Length"] == str(len(response.content))
    assert "Transfer-Encoding" not in response.headers
    assert re.fullmatch('W/"[0-9a-f]+"', response.headers["ETag"])


def assert_streamed(response: httpx.Response) -> None:
    assert response.status_code == 200
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in response.headers
    assert "ETag" not in response.headers


# --- What a list holds -----------------------------------------------------------------------------------------------


# A list is read in a page of 50 tasks and then in pages of 320.
@pytest.mark.parametrize(
    ("status", "count"),
    [
        *(("all", count) for count in (0, 1, 49, 50, 51, 369, 370, 371, 999, 1000, 1001, 5000)),
        *(("pending", count) for count in (0, 50, 371, 1001)),
        *(("completed", count) for count in (0, 50, 371, 1001)),
    ],
)
def test_a_list_has_every_task_once_and_in_order(service: Service, alice: Client, count: int, status: str) -> None:
    completed = COMPLETED[status]
    fill(service, alice.user_id, count, completed=completed)
    if completed is not None:
        fill(service, alice.user_id, 41, completed=not completed)
    response = alice.get("/api/tasks", params={"status": status})
    expected = stored(service, alice.user_id, status)
    assert len(expected) == count
    assert response.json() == {"items": expected}
    if count > 1000:
        assert_streamed(response)
    else:
        assert_whole(response)


@pytest.mark.parametrize(
    ("count", "title", "description"),
    [
        *((count, "\x01" * 200, "\x01" * 2000) for count in (70, 300, 1001)),
        (300, "\U0001f600" * 200, "\U0001f600" * 2000),
        (300, '"' * 200, "\\" * 2000),
    ],
    ids=["70", "300", "1001", "four bytes each", "escaped"],
)
def test_tasks_of_the_longest_possible_json_come_whole(
    service: Service, alice: Client, count: int, title: str, description: str
) -> None:
    fill(service, alice.user_id, count, title=title, description=description)
    response = alice.get("/api/tasks")
    assert response.json() == {"items": stored(service, alice.user_id)}
    if len(response.content) > MIB or count > 1000:
        assert_streamed(response)
    else:
        assert_whole(response)


def test_tasks_that_one_transaction_has_made_are_all_there_across_every_page(service: Service, alice: Client) -> None:
    service.sql(
        "INSERT INTO task (user_id, title) SELECT %s, 'task ' || n FROM generate_series(1, 1500) AS n", alice.user_id
    )
    tasks = stored(service, alice.user_id)
    assert len({task["created_at"] for task in tasks}) == 1
    assert alice.tasks() == tasks
    assert alice.tasks("pending") == tasks


# --- A short list, and where it ends ---------------------------------------------------------------------------------


def etag_of_list(client: Client) -> str:
    """Return the ETag of a short list, having seen that a client that has it gets no list again."""
    response = client.get("/api/tasks")
    assert_whole(response)
    etag: str = response.headers["ETag"]
    for condition in (etag, etag.removeprefix("W/"), f'"other", {etag}', "*"):
        again = client.get("/api/tasks", headers={"If-None-Match": condition})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
        assert again.headers["Cache-Control"] == response.headers["Cache-Control"]
    return etag


@pytest.mark.parametrize("count", [0, 50, 997])
def test_every_change_of_a_short_list_changes_its_etag(service: Service, alice: Client, count: int) -> None:
    fill(service, alice.user_id, count)
    etags = [etag_of_list(alice)]
    task = alice.create()
    path = f"/api/tasks/{task['id']}"
    etags.append(etag_of_list(alice))
    for body in ({"title": "another title"}, {"title": task["title"]}, {"description": "some"}, {"completed": True}):
        assert alice.put(path, json=body).status_code == 200
        etags.append(etag_of_list(alice))
    assert alice.patch(f"{path}/complete").status_code == 200
    etags.append(etag_of_list(alice))
    if count:
        oldest = stored(service, alice.user_id)[-1]
        assert alice.patch(f"/api/tasks/{oldest['id']}/complete").status_code == 200
        etags.append(etag_of_list(alice))
    assert len({*etags}) == len(etags)
    for etag in etags[:-1]:
        response = alice.get("/api/tasks", headers={"If-None-Match": etag})
        assert response.status_code == 200
        assert response.json() == {"items": stored(service, alice.user_id)}
    assert alice.delete(path).status_code == 204
    assert etag_of_list(alice) not in etags[1:]


def test_a_list_of_1001_tasks_has_no_etag_and_one_of_1000_has(service: Service, alice: Client) -> None:
    fill(service, alice.user_id, 1000)
    etag = etag_of_list(alice)
    task = alice.create()
    for condition in (etag, '""', 'W/""'):
        response = alice.get("/api/tasks", headers={"If-None-Match": condition})
        assert_streamed(response)
        assert len(response.json()["items"]) == 1001
    response = alice.get("/api/tasks", headers={"If-None-Match": "*"})
    assert (response.status_code, response.content) == (304, b"")
    assert "ETag" not in response.headers
    assert alice.delete(f"/api/tasks/{task['id']}").status_code == 204
    assert etag_of_list(alice) == etag


@pytest.mark.parametrize("tasks", [480, 600], ids=["the last page is full or not", "of tasks with and without"])
def test_a_list_of_one_mib_has_an_etag_and_one_of_a_byte_more_has_not(
    service: Service, alice: Client, tasks: int
) -> None:
    fill(service, alice.user_id, 480, description="x" * 1900)
    fill(service, alice.user_id, tasks - 480, title="short")
    missing = MIB - len(alice.get("/api/tasks").content)
    assert 0 < missing < 480 * 100
    service.sql(
        """
        UPDATE task
        SET description = description || repeat('x', least(100, greatest(0, %s - 100 * (number - 1)))::int)
        FROM (SELECT id AS numbered, row_number() OVER (ORDER BY id) AS number FROM task WHERE user_id = %s) AS _
        WHERE id = numbered AND number <= 480 AND user_id = %s
        """,
        missing,
        alice.user_id,
        alice.user_id,
    )
    response = alice.get("/api/tasks")
    assert len(response.content) == MIB
    assert_whole(response)
    etag = etag_of_list(alice)
    service.sql("UPDATE task SET title = title || 'x' WHERE id = (SELECT max(id) FROM task WHERE user_id = %s)",
                alice.user_id)  # fmt: skip
    response = alice.get("/api/tasks", headers={"If-None-Match": etag})
    assert len(response.content) == MIB + 1
    assert response.json() == {"items": stored(service, alice.user_id)}
    assert_streamed(response)
    assert alice.get("/api/tasks", headers={"If-None-Match": "*"}).status_code == 304


# --- HEAD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1000])
def test_head_of_a_short_list_is_what_get_says_without_the_body(service: Service, alice: Client, count: int) -> None:
    fill(service, alice.user_id, count)
    got, head = alice.get("/api/tasks"), alice.head("/api/tasks")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("Content-Length", "Content-Type", "ETag", "Cache-Control"):
        assert head.headers[name] == got.headers[name]
    assert alice.head("/api/tasks", headers={"If-None-Match": got.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize(
    ("count", "description", "pages"),
    [
        (1001, None, [50, 320, 320, 320]),
        (5000, None, [50, 320, 320, 320]),
        (500, "\x01" * 2000, [50, 320]),
    ],
    ids=["one task too many", "far too many", "too many bytes on the first page"],
)
def test_head_of_a_long_list_has_neither_body_nor_etag_and_reads_no_page_too_many(
    postgres: Postgres, observed: Service, carol: Client, count: int, description: str | None, pages: list[int]
) -> None:
    fill(observed, carol.user_id, count, description=description)
    head = carol.head("/api/tasks")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == "application/json"
    assert "ETag" not in head.headers
    assert "Content-Length" not in head.headers
    assert carol.head("/api/tasks", headers={"If-None-Match": "*"}).status_code == 304
    assert carol.tasks() == stored(observed, carol.user_id), "the connection goes on"
    read = pages_read(postgres, carol.user_id)
    assert read[: 2 * len(pages)] == 2 * pages
    whole = read[2 * len(pages) :]
    assert whole == [50] + [320] * ((count - 50) // 320 + 1), "a page that is not full is the last"


def test_a_list_is_read_in_pages_and_no_page_twice(postgres: Postgres, observed: Service, carol: Client) -> None:
    fill(observed, carol.user_id, 369)
    assert carol.tasks() == stored(observed, carol.user_id)
    assert pages_read(postgres, carol.user_id) == [50, 320]


@pytest.mark.parametrize("count", [40, 50, 60])
def test_a_list_of_few_tasks_and_more_than_one_mib_is_streamed(
    start_service: StartService, database_url: str, count: int
) -> None:
    """As the table of another program may have had them."""
    service = start_service(database_url)
    service.wait_until_ready()
    service.sql("ALTER TABLE task DROP CONSTRAINT task_description")
    fill(service, "alice", count, description="x" * 30_000)
    with service.client("alice") as client:
        response = client.get("/api/tasks")
    assert_streamed(response)
    assert response.json()["items"] == stored(service, "alice")


def test_the_long_lists_of_one_user_are_in_front_of_no_other_users(
    service: Service, alice: Client, bob: Client
) -> None:
    fill(service, alice.user_id, 1000)
    fill(service, bob.user_id, 100)
    with ExitStack() as stack:
        connections = [stack.enter_context(Raw(service)) for _ in range(60)]
        for connection in connections:
            connection.send("GET /api/tasks", bearer(bob if connection is connections[-1] else alice))
        assert len(connections[-1].answer().json()["items"]) == 100
        answered, _, _ = select.select([connection.socket for connection in connections[:-1]], [], [], 0)
        assert len(answered) < 30


# --- The status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status",
    ["done", "ALL", "true", "all,pending", "all%20", "%20all", "all%00", "completed%0A", "%ff", "'%20OR%20'1'='1",
     "x" * 60_000],
    ids=lambda status: status[:20],
)  # fmt: skip
def test_an_unknown_status_is_refused(alice: Client, untouched: str, status: str) -> None:
    error = ("status", "must be one of all, pending, completed")
    assert_invalid(alice.get(f"/api/tasks?status={status}"), error)
    assert alice.get(f"{untouched}?status={status}").status_code == 200  # one task has no such parameter
