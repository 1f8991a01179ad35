"""The database dies, fails over, or sets its clock back, under load: nothing that was promised is lost."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.database import execute
from tests.support.faults import Promises, durable, load
from tests.support.fixtures import Figures, StartService
from tests.support.load import Caller
from tests.support.postgres import Postgres
from tests.support.service_process import Service
from tests.support.waiting import told, wait_until

pytestmark = [pytest.mark.long, pytest.mark.fault, pytest.mark.anyio]

LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


async def heal(promises: Promises) -> float:
    """Return after how many seconds the last 503 came of a database that is back now."""
    back, before = time.monotonic(), len(promises.answers)
    await asyncio.sleep(3)
    assert len(promises.answers) > before + 100
    return promises.seconds_until_the_last(503, back, back + 3)


async def test_a_database_that_restarts_or_is_killed_loses_nothing(
    postgres: Postgres, service: Service, figures: Figures
) -> None:
    promises = Promises()
    healed = []
    async with load(service, promises):
        for fault in [postgres.stop, postgres.kill, postgres.kill, postgres.kill]:
            await asyncio.to_thread(fault)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(postgres.start)
            healed.append(await heal(promises))
    assert promises.count(503) > 4
    assert promises.broken(postgres.url()) == []
    assert max(healed) < 3
    creations = len(promises.kept) + len(promises.deleted)
    figures(
        "PostgreSQL restarts once and is killed three times, under load",
        f"{creations:,} creations, none lost, none doubled; {promises.count(503):,} of {len(promises.answers):,}"
        f" answers were 503, the last one {told(max(healed))} after the database took connections again",
    )


async def test_a_failover_to_a_synchronous_standby_loses_nothing(
    postgres: Postgres, start_service: StartService, figures: Figures
) -> None:
    standby = durable(standby_of=postgres)
    try:
        execute(postgres.url(), "ALTER SYSTEM SET synchronous_standby_names = '*'")
        execute(postgres.url(), "SELECT pg_reload_conf()")
        following = "SELECT pid FROM pg_stat_replication WHERE sync_state = 'sync'"
        wait_until(lambda: len(execute(postgres.url(), following)) == 1)
        hosts = f"127.0.0.1:{postgres.port},127.0.0.1:{standby.port}"
        service = start_service(f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write")
        service.wait_until_ready()
        promises = Promises()
        async with load(service, promises):
            created = len(promises.kept)
            killed = time.monotonic()
            await asyncio.to_thread(postgres.kill)
            await asyncio.to_thread(execute, standby.url(), "SELECT pg_promote()")
            await asyncio.sleep(15)
            recovered = promises.seconds_until_the_last(503, killed, killed + 15)
        assert recovered < 14
        assert 0 < created < len(promises.kept)
        assert promises.count(503) > 0
        assert promises.broken(standby.url()) == []
        assert not re.search("Traceback|status=500", service.log), service.log
    finally:
        standby.remove()
    figures(
        "The primary is killed under load and its synchronous standby promoted",
        f"{len(promises.kept) + len(promises.deleted):,} creations, none lost, none doubled; the last 503"
        f" {told(recovered)} after the kill",
    )


async def test_versions_go_forward_while_the_clock_of_the_database_does_not(
    start_service: StartService, figures: Figures
) -> None:
    if not LIBFAKETIME:
        pytest.skip("libfaketime is not installed")
    clock = Path(tempfile.mkstemp(prefix="tasks-clock-")[1])
    clock.write_text("+0")
    clock.chmod(0o644)  # PostgreSQL may run as another user
    postgres = Postgres(
        environment={
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
    )
    try:
        service = start_service(postgres.url())
        service.wait_until_ready()
        async with Caller(service, "alice") as alice:
            task = (await alice.send("POST", "/api/tasks", {"title": "x"})).json
            path, versions = f"/api/tasks/{task['id']}", [task["updated_at"]]
            for time_of_day in ("+0", "-1h", "2020-01-01 00:00:00", "+0"):  # set back, and standing still
                clock.write_text(time_of_day)
                for _ in range(20):
                    changed = await alice.send("PATCH", f"{path}/complete", If_Match=f'"{versions[-1]}"')
                    assert changed.status == 200, changed
                    versions.append(changed.json["updated_at"])
            clock.write_text("2020-01-01 00:00:00")
            [(now, later)] = execute(postgres.url(), "SELECT now()::text, clock_timestamp()::text")
            assert now == later == "2020-01-01 00:00:00+00"  # it does
    finally:
        postgres.remove()
        clock.unlink()
    assert versions == sorted(set(versions))
    figures(
        "The clock of the database is set back by an hour, and stands still",
        f"{len(versions)} versions of a task, each later than the one before",
    )
