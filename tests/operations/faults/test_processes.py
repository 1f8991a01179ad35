"""Processes that start at once, or die."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import pytest

from tests.support.database import execute
from tests.support.deployment import workers_of
from tests.support.fixtures import Figures, StartService
from tests.support.load import Caller
from tests.support.waiting import wait_in_loop_until

pytestmark = [pytest.mark.long, pytest.mark.fault, pytest.mark.anyio]


async def test_eight_processes_start_at_once_on_an_empty_database(
    new_database: Callable[[], str], start_service: StartService, figures: Figures
) -> None:
    for _ in range(5):
        url = new_database()
        services = [start_service(url, wait=False) for _ in range(8)]
        for service in services:
            service.wait_until_ready(60)
            assert not re.search("waiting for the database|error|traceback", service.log, re.IGNORECASE), service.log
        assert execute(url, "SELECT count(*) FROM task") == [(0,)]
        for service in services:
            service.process.terminate()
        for service in services:
            service.remove()
    figures("Eight processes start at once on an empty database", "5 times, without a complaint in any log")


async def test_a_killed_worker_is_replaced_while_the_other_one_serves(
    database_url: str, start_service: StartService, figures: Figures
) -> None:
    service = start_service(database_url, WEB_CONCURRENCY="2")
    service.wait_until_ready()
    created: list[int] = []
    lost = 0
    finished = asyncio.Event()

    async def create(number: int) -> None:
        nonlocal lost
        async with Caller(service, f"user-{number}") as caller:
            while not finished.is_set():
                try:
                    answer = await caller.send("POST", "/api/tasks", {"title": "x"})
                except ConnectionError:  # it was the killed worker's
                    lost += 1
                else:
                    assert answer.status == 201, answer
                    created.append(answer.json["id"])

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(create(number))
        await asyncio.sleep(1)
        assert len(workers_of(service)) == 2
        victim = max(workers_of(service), key=lambda worker: len(worker.net_connections("tcp")))
        victim.kill()
        killed = time.monotonic()
        await wait_in_loop_until(lambda: len(workers_of(service)) == 2 and victim not in workers_of(service))
        replaced, before = time.monotonic() - killed, len(created)
        await asyncio.sleep(2)
        finished.set()
    assert len(created) > before
    assert 0 < lost <= 16
    assert replaced < 5
    assert {row for (row,) in execute(database_url, "SELECT id FROM task")} >= set(created)
    assert "Traceback" not in service.log
    figures(
        "One of two workers is killed under load",
        f"{lost} of 16 connections ended, {len(created):,} creations, none lost; a new worker {replaced:.1f} s later",
    )
