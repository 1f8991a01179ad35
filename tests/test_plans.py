"""How PostgreSQL carries the statements out, by its own plans: by an index, and never more than one user's rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest

import sql
from sql import LOCK_TIMEOUTS, SCHEMA, STATUSES, load
from tests.service_process import Service
from tests.test_query_module import STATEMENTS
from tests.test_schema import old_table

FILL = """
    INSERT INTO task (user_id, title, completed)
    SELECT 'user-' || number % 5000, 'task ' || number, number % 10000 < 5000 FROM generate_series(1, 100000) AS number;
    INSERT INTO task (user_id, title, completed)
    SELECT 'busy', 'task ' || number, number % 10000 > 0 FROM generate_series(1, 100000) AS number;
    ANALYZE task
"""
CALLS = [*((name, "all") for name in STATEMENTS), ("list_tasks.sql", "pending"), ("list_tasks.sql", "completed")]


@pytest.fixture(scope="module", params=["", old_table()], ids=["fresh", "adopted"])
def filled_url(request: pytest.FixtureRequest, new_database: Callable[[], str]) -> str:
    """A database in which 5,000 users have 20 tasks each, and one has 10 to do among 99,990 that are done."""
    url = new_database()
    with psycopg.connect(url) as connection:
        for text in (request.param, SCHEMA, FILL):
            connection.execute(text.encode())
    return url


# The generic plan is what a statement gets, but for one behind a pooler, which has a plan for each call.
@pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
def filled(filled_url: str, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    """A connection whose changes are undone after the test."""
    with psycopg.connect(filled_url) as connection:
        connection.execute(f"SET plan_cache_mode = {request.param}".encode())
        yield connection
        connection.rollback()


def plan_of(connection: psycopg.Connection[Any], statement: str, user_id: str) -> dict[str, Any]:
    """Carry a statement out for a user's oldest task, and return how that was done."""
    [(task_id,)] = connection.execute("SELECT min(id) FROM task WHERE user_id = %s", (user_id,)).fetchall()
    connection.execute(f"PREPARE the_statement AS {statement}".encode())
    types = "SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'the_statement'"
    [(names,)] = connection.execute(types).fetchall()
    values = {"bigint": str(task_id), "boolean": "true", "text": "'a text'"}
    parameters = ", ".join([f"'{user_id}'", *(values.get(name, "NULL") for name in names[1:])])
    explained = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE the_statement ({parameters})"
    [([found],)] = connection.execute(explained.encode()).fetchall()
    connection.execute("DEALLOCATE the_statement")
    plan: dict[str, Any] = found["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def pages(plan: dict[str, Any]) -> int:
    """Return how many pages a plan has looked at."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("lock_timeout", LOCK_TIMEOUTS)
@pytest.mark.parametrize("user_id", ["user-7", "busy"])
@pytest.mark.parametrize(("name", "status"), CALLS)
def test_no_statement_scans_the_table_or_sorts(
    filled: psycopg.Connection[Any], name: str, status: str, user_id: str, lock_timeout: str
) -> None:
    found = list(nodes(plan_of(filled, load(name, status, lock_timeout=lock_timeout), user_id)))
    kinds = {node["Node Type"] for node in found}
    assert not kinds & {"Seq Scan", "Incremental Sort"}, kinds
    scans = [node for node in found if "Scan" in node["Node Type"] and "Relation Name" in node]
    assert len(scans) == (0 if name == "create_task.sql" else 1)
    for node in found:
        if node["Node Type"] == "Sort":  # where most tasks are a user's own, reading them in order is not the cheapest
            assert node["Actual Rows"] <= 100_000


@pytest.mark.parametrize("name", [name for name in STATEMENTS if name not in ("list_tasks.sql", "create_task.sql")])
def test_one_task_of_very_many_costs_as_much_as_one_of_few(filled: psycopg.Connection[Any], name: str) -> None:
    few, many = (pages(plan_of(filled, load(name), user_id)) for user_id in ("user-7", "busy"))
    assert 0 < many <= few * 2 + 4


def test_ten_tasks_to_do_among_a_hundred_thousand_cost_as_much_as_ten_of_twenty(
    filled: psycopg.Connection[Any],
) -> None:
    plans = {user_id: plan_of(filled, load("list_tasks.sql", "pending"), user_id) for user_id in ("user-7", "busy")}
    for plan in plans.values():
        assert {node["Index Name"] for node in nodes(plan) if "Index Name" in node} == {"task_pending_idx"}
        assert max(node["Actual Rows"] for node in nodes(plan)) == 10
        assert not any(node.get("Rows Removed by Filter") for node in nodes(plan))
    assert 0 < pages(plans["busy"]) <= 2 * pages(plans["user-7"])


def test_all_the_statuses_have_a_plan() -> None:
    assert {status for _, status in CALLS} == set(STATUSES)


def test_each_statement_is_planned_once_for_all_users(filled_url: str) -> None:
    """Even a list, for which a plan of its own looks cheaper to PostgreSQL, and is not."""

    async def plans(init: Callable[..., Any] | None) -> tuple[int, int]:
        async with asyncpg.create_pool(
            filled_url, min_size=0, max_size=1, init=init, connection_class=sql.Connection
        ) as pool:
            queries = sql.Queries(pool)
            await queries.apply_schema()
            for _ in range(20):
                await queries.list_tasks("user-7", "all")
            row = await pool.fetchrow(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1",
                sql.LIST_TASKS["all"],
            )
            assert row
            return row["generic_plans"], row["custom_plans"]

    assert asyncio.run(plans(None)) == (0, 20)
    assert asyncio.run(plans(sql.plan_once)) == (20, 0)


@pytest.mark.parametrize(("query", "mode"), [("", "force_generic_plan"), ("?pgbouncer=true", "auto")])
def test_the_service_does_so_but_behind_a_pooler(
    database_url: str, start_service: Callable[[str], Service], query: str, mode: str
) -> None:
    service = start_service(database_url + query)
    service.wait_until_ready()
    with psycopg.connect(database_url) as connection:
        connection.execute("""
            CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                NEW.title := current_setting('plan_cache_mode');
                RETURN NEW;
            END $$;
            CREATE TRIGGER tell BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION tell();
            """)
    with service.client("alice") as alice:
        assert alice.create()["title"] == mode
