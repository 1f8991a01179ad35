"""Many requests at once, on two processes: nothing is lost, nothing happens twice, nobody sees anybody else's tasks."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from sql.database import COLUMNS
from tests.support.fixtures import StartService
from tests.support.service_process import Service, new_user_id, token

Task = dict[str, Any]


@pytest.fixture(scope="module")
def two_processes(new_database: Callable[[], str]) -> Iterator[Service]:
    service = Service(new_database(), WEB_CONCURRENCY="2")
    service.wait_until_ready()
    yield service
    service.remove()


class User:
    """A new user with connections of their own, and a model of what their tasks are."""

    def __init__(self, service: Service, *, connections: int) -> None:
        self.user_id = new_user_id()
        self.model: dict[int, Task] = {}
        self.client = httpx.AsyncClient(
            base_url=service.url,
            headers={"Authorization": f"Bearer {token(self.user_id)}"},
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            timeout=60,
            verify=False,  # there is no TLS here, and loading the certificates takes longer than the requests
        )

    async def __aenter__(self) -> User:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.client.aclose()

    async def send(self, method: str, path: str, body: object = None) -> httpx.Response:
        return await self.client.request(method, path, json=body)

    async def create(self, title: str, **fields: Any) -> int:
        """Create a task and return its id."""
        response = await self.send("POST", "/api/tasks", {"title": title, **fields})
        assert response.status_code == 201, response.text
        task: Task = response.json()
        expected = {"user_id": self.user_id, "title": title, "description": None, "completed": False, **fields}
        assert task == task | expected
        task_id: int = task["id"]
        assert task_id not in self.model
        self.model[task_id] = task
        return task_id

    async def change(self, task_id: int, method: str, path: str, body: object, expected: Task) -> None:
        """Change a task, and check that nothing but this changed since the last time."""
        response = await self.send(method, path, body)
        assert response.status_code == 200, response.text
        task = response.json()
        assert task["updated_at"] > self.model[task_id]["updated_at"]
        assert task == self.model[task_id] | expected | {"updated_at": task["updated_at"]}
        self.model[task_id] = task

    async def toggle(self, task_id: int) -> None:
        completed = not self.model[task_id]["completed"]
        await self.change(task_id, "PATCH", f"/api/tasks/{task_id}/complete", None, {"completed": completed})

    async def update(self, task_id: int, fields: Task) -> None:
        await self.change(task_id, "PUT", f"/api/tasks/{task_id}", fields, fields)

    async def delete(self, task_id: int) -> None:
        response = await self.send("DELETE", f"/api/tasks/{task_id}")
        assert response.status_code == 204, response.text
        del self.model[task_id]

    async def get(self, task_id: int) -> Task:
        response = await self.send("GET", f"/api/tasks/{task_id}")
        assert response.status_code == 200, response.text
        task: Task = response.json()
        return task

    async def tasks(self) -> list[Task]:
        response = await self.send("GET", "/api/tasks")
        assert response.status_code == 200, response.text
        items: list[Task] = response.json()["items"]
        return items

    async def live(self, changes: int, choices: random.Random) -> None:
        """Create a task, change it again and again, and delete it, or not."""
        task_id = await self.create(f"task of {self.user_id}", completed=choices.random() < 0.5)
        for number in range(changes):
            match choices.randrange(5):
                case 0 | 1:
                    await self.toggle(task_id)
                case 2:
                    await self.update(task_id, {"title": f"title {number} of {self.user_id}"})
                case 3:
                    await self.update(task_id, {"description": choices.choice([None, f"description {number}"])})
                case 4:
                    assert {task["user_id"] for task in await self.tasks()} == {self.user_id}
        assert await self.get(task_id) == self.model[task_id]
        if choices.random() < 0.3:
            await self.delete(task_id)
            assert (await self.send("GET", f"/api/tasks/{task_id}")).status_code == 404


def table(service: Service) -> dict[tuple[str, int], Task]:
    """Return what the database has, by owner and id, with its timestamps as times."""
    with psycopg.connect(service.database_url, row_factory=dict_row) as connection:
        rows = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM task".encode()).fetchall()
    return {(row["user_id"], row["id"]): row for row in rows}


def with_times(task: Task) -> Task:
    return task | {name: datetime.fromisoformat(task[name]) for name in ("created_at", "updated_at")}


@pytest.mark.parametrize(
    ("users", "tasks", "changes"),
    [pytest.param(60, 3, 6, id="60 users"), pytest.param(100, 8, 8, id="100 users", marks=pytest.mark.long)],
)
def test_what_many_users_do_at_once_is_what_the_database_has(
    start_service: StartService, database_url: str, users: int, tasks: int, changes: int
) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    service.wait_until_ready()

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            everybody = [await stack.enter_async_context(User(service, connections=2)) for _ in range(users)]
            lives = [user.live(changes, random.Random(seed)) for seed in range(tasks) for user in everybody]
            await asyncio.gather(*lives)
            for user in everybody:
                newest_first = sorted(user.model.values(), key=lambda task: (task["created_at"], task["id"]))[::-1]
                assert await user.tasks() == newest_first
        model = [task for user in everybody for task in user.model.values()]
        assert len({task["id"] for task in model}) == len(model)
        assert table(service) == {(task["user_id"], task["id"]): with_times(task) for task in model}

    asyncio.run(main())


def run_with_two_tasks(service: Service, test: Callable[[User, int], Awaitable[None]]) -> None:
    """Run a test for the first of two tasks of a user; check that the second stays as it is."""

    async def with_two_tasks() -> None:
        async with User(service, connections=40) as user:
            task_id, other_id = await user.create("one"), await user.create("the other")
            await test(user, task_id)
            assert await user.get(other_id) == user.model[other_id]
            assert {task["id"] for task in await user.tasks()} <= {task_id, other_id}

    asyncio.run(with_two_tasks())


def test_concurrent_toggles_each_flip_once(two_processes: Service) -> None:
    async def test(user: User, task_id: int) -> None:
        responses = await asyncio.gather(*(user.send("PATCH", f"/api/tasks/{task_id}/complete") for _ in range(40)))
        assert {response.status_code for response in responses} == {200}
        versions = sorted((response.json() for response in responses), key=lambda task: str(task["updated_at"]))
        history = [user.model[task_id], *versions]
        assert all(before["updated_at"] < after["updated_at"] for before, after in pairwise(history))
        assert [task["completed"] for task in history] == [False, True] * 20 + [False]
        assert await user.get(task_id) == versions[-1]

    run_with_two_tasks(two_processes, test)


def test_concurrent_changes_of_different_fields_are_all_kept(two_processes: Service) -> None:
    async def test(user: User, task_id: int) -> None:
        for number in range(30):
            fields = {"title": f"title {number}", "description": f"text {number}", "completed": number % 2 == 0}
            changes = [user.send("PUT", f"/api/tasks/{task_id}", {name: value}) for name, value in fields.items()]
            versions = {response.json()["updated_at"] for response in await asyncio.gather(*changes)}
            assert len(versions) == 3
            assert await user.get(task_id) == user.model[task_id] | fields | {"updated_at": max(versions)}

    run_with_two_tasks(two_processes, test)


def test_a_toggle_and_a_change_at_once_are_both_kept(two_processes: Service) -> None:
    async def test(user: User, task_id: int) -> None:
        path = f"/api/tasks/{task_id}"
        for number in range(30):
            fields = {"title": f"title {number}", "completed": number % 2 == 0}
            toggle, change = user.send("PATCH", f"{path}/complete"), user.send("PUT", path, {"title": fields["title"]})
            versions = {response.json()["updated_at"] for response in await asyncio.gather(toggle, change)}
            assert await user.get(task_id) == user.model[task_id] | fields | {"updated_at": max(versions)}

    run_with_two_tasks(two_processes, test)


def test_concurrent_deletes_delete_once(two_processes: Service) -> None:
    async def test(user: User, task_id: int) -> None:
        responses = await asyncio.gather(*(user.send("DELETE", f"/api/tasks/{task_id}") for _ in range(20)))
        assert Counter(response.status_code for response in responses) == {204: 1, 404: 19}

    run_with_two_tasks(two_processes, test)


def test_a_change_that_meets_a_deletion_does_not_bring_the_task_back(two_processes: Service) -> None:
    async def test(user: User, task_id: int) -> None:
        path = f"/api/tasks/{task_id}"
        changes = [user.send("PUT", path, {"title": "changed"}) for _ in range(10)]
        toggles = [user.send("PATCH", f"{path}/complete") for _ in range(10)]
        deletion, *others = await asyncio.gather(user.send("DELETE", path), *changes, *toggles)
        assert deletion.status_code == 204
        assert {response.status_code for response in others} <= {200, 404}
        assert (await user.send("GET", path)).status_code == 404

    run_with_two_tasks(two_processes, test)
