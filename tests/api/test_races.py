"""Writes that meet under one ETag or one Idempotency-Key."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, LiteralString

import httpx
import psycopg
import pytest

from tests.support.conditions import (
    ANOTHER_BODY,
    BODY,
    MOVED_ON,
    Task,
    assert_created,
    if_match,
    path_of,
    with_key,
)
from tests.support.errors import TASK_NOT_FOUND
from tests.support.service_process import Client, Service, new_user_id
from tests.support.tasks import KINDS_OF_CHANGE, wait_for_waiting_statements

REAL_CHANGES = [write for write in KINDS_OF_CHANGE if write.values[3] != {}]

# --- Races -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("method", "action", "body", "changes"), REAL_CHANGES)
def test_of_fifty_writes_with_one_etag_one_is_made(
    three_processes: Service, ann: Client, method: str, action: str, body: object, changes: Task | None
) -> None:
    task, other = ann.create(), ann.create()
    write = partial(ann.request, method, path_of(task) + action, json=body, headers=if_match(task))
    answers = race(three_processes, THE_TASK, [ann.user_id, task["id"]], [write] * 50)
    failed = [answer for answer in answers if answer.status_code >= 400]
    if changes is None:
        assert statuses(answers) == {204: 1, 404: 49}
        assert [answer.json() for answer in failed] == [TASK_NOT_FOUND] * 49
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
            for method, action, body, _ in (change.values for change in REAL_CHANGES)
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
