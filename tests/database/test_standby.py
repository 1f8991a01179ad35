"""A hot standby, as PostgreSQL makes one, for reads: it is behind, and takes no writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.database import execute
from tests.support.fixtures import StartService
from tests.support.outages import assert_unavailable, requests_for
from tests.support.postgres import Postgres
from tests.support.service_process import Service
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def primary() -> Iterator[Postgres]:
    primary = Postgres()
    yield primary
    primary.remove()


@pytest.fixture(scope="module")
def standby(primary: Postgres) -> Iterator[Postgres]:
    standby = Postgres(standby_of=primary)
    yield standby
    standby.remove()


@pytest.fixture
def services(primary: Postgres, standby: Postgres, start_service: StartService) -> tuple[Service, Service]:
    """A service on each, of which the one on the standby is there before the table is."""
    reads = start_service(standby.url(), constants={"service.STARTUP_TIMEOUT": 0.1})
    writes = start_service(primary.url())
    for service in (writes, reads):
        service.wait_until_ready()
    return writes, reads


def test_a_service_on_a_hot_standby_reads_what_one_on_the_primary_writes(services: tuple[Service, Service]) -> None:
    writes, reads = services
    with writes.client("alice") as alice, reads.client("alice") as reader, reads.client("bob") as bob:
        tasks = [alice.create(f"task {number}", completed=number % 2 == 0) for number in range(100)][::-1]
        wait_until(lambda: reader.tasks() == tasks)
        assert reader.tasks("completed") == [task for task in tasks if task["completed"]]
        path = f"/api/tasks/{tasks[0]['id']}"
        assert reader.get(path).json() == tasks[0]
        assert reader.get(path).headers["etag"] == alice.get(path).headers["etag"]
        assert bob.tasks() == []
        for method, path, body in requests_for(tasks[0]["id"]):
            if method != "GET":
                assert_unavailable(reader.request(method, path, json=body))
        assert reader.get("/health/ready").status_code == 200
        assert alice.tasks() == reader.tasks() == tasks


def test_a_change_by_what_a_standby_that_is_behind_has_shown_is_refused(
    services: tuple[Service, Service], standby: Postgres
) -> None:
    writes, reads = services
    with writes.client("carol") as carol, reads.client("carol") as reader:
        task = carol.create()
        path = f"/api/tasks/{task['id']}"
        wait_until(lambda: reader.get(path).status_code == 200)
        execute(standby.url(), "SELECT pg_wal_replay_pause()")
        changed = carol.put(path, json={"title": "changed"}).json()
        assert reader.get(path).json() == task
        stale = {"If-Match": reader.get(path).headers["etag"]}
        assert carol.put(path, json={"title": "lost"}, headers=stale).status_code == 412
        execute(standby.url(), "SELECT pg_wal_replay_resume()")
        wait_until(lambda: reader.get(path).json() == changed)
        assert carol.get(path).json() == changed
