"""How PostgreSQL carries the statements out, by its own plans: by an index, and never more than one page of a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import psycopg.sql
import pytest

from sql import FIRST_PAGE, NEXT_PAGE, load
from sql.database import ADOPT, SCHEMA
from tests.support.fixtures import StartService
from tests.support.query_module import STATEMENTS

# As SQLModel makes it for the old backend.
OLD_TABLE = """
    CREATE TABLE task (
        id SERIAL NOT NULL PRIMARY KEY,
        user_id VARCHAR(255) NOT NULL,
        title VARCHAR(200) NOT NULL,
        description VARCHAR(2000),
        completed BOOLEAN NOT NULL,
        created_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
        updated_at TIMESTAMP WITHOUT TIME ZONE NOT NULL
    );
    CREATE INDEX ix_task_user_id ON task (user_id);
"""
FILL = """
    INSERT INTO task (user_id, title, completed, created_at, idempotency_key, request_hash)
    SELECT 'user-' || number % 5000, 'task ' || number, number % 10000 < 5000, now() - number * interval '1 second',
        CASE WHEN number % 10 = 7 THEN 'key ' || number END, CASE WHEN number % 10 = 7 THEN 'hash' END
    FROM generate_series(1, 100000) AS number;
    INSERT INTO task (user_id, title, completed, created_at, idempotency_key, request_hash)
    SELECT 'busy', 'task ' || number, number % 10000 > 0, now() - number * interval '1 second',
        CASE WHEN number % 10 = 7 THEN 'key ' || number END, CASE WHEN number % 10 = 7 THEN 'hash' END
    FROM generate_series(1, 100000) AS number;
    VACUUM ANALYZE task
"""
LISTS = ["list_tasks.sql", "list_tasks_by_status.sql"]
BY_ID = ["get_task.sql", "update_task.sql", "complete_task.sql", "delete_task.sql"]
INDEXES = {
    "list_tasks.sql": "task_user_id_created_at_id_idx",
    "list_tasks_by_status.sql": "task_user_id_completed_created_at_id_idx",
    "get_task_by_key.sql": "task_idempotency_key_idx",
    **dict.fromkeys(BY_ID, "task_pkey"),
}
BEFORE_ALL = ("infinity", 2**63 - 1)
"""What the first page of a list comes after."""


@pytest.fixture(scope="module", params=["fresh", "adopted"])
def filled_url(request: pytest.FixtureRequest, new_database: Callable[[], str]) -> str:
    """A database in which 5,000 users have 20 tasks each, and one has 10 to do among 99,990 that are done."""
    url = new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        before = [OLD_TABLE, ADOPT] if request.param == "adopted" else []
        connection.execute("\n".join([*before, SCHEMA]).encode())
        for statement in FILL.split(";"):
            connection.execute(statement.encode())
    return url


# The generic plan is what a statement gets, but for one behind a pooler, which may have a plan for each call.
@pytest.fixture(params=["force_custom_plan", "force_generic_plan"])
def filled(filled_url: str, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    """A connection whose changes are undone after the test."""
    with psycopg.connect(filled_url) as connection:
        connection.execute(f"SET plan_cache_mode = {request.param}".encode())
        yield connection
        connection.rollback()


def plan_of(connection: psycopg.Connection[Any], name: str, *parameters: object) -> dict[str, Any]:
    """Carry a statement out, with null for the parameters that are left out, and return how that was done."""
    connection.execute(f"PREPARE the_statement AS {load(name)}".encode())
    types = "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'the_statement'"
    [(count,)] = connection.execute(types).fetchall()
    values = [*parameters, *[None] * (count - len(parameters))]
    call = psycopg.sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE the_statement ({})")
    literals = psycopg.sql.SQL(", ").join(map(psycopg.sql.Literal, values))
    [([found],)] = connection.execute(call.format(literals)).fetchall()
    connection.execute("DEALLOCATE the_statement")
    plan: dict[str, Any] = found["Plan"]
    return plan


def page_of(
    connection: psycopg.Connection[Any],
    name: str,
    user_id: str,
    after: tuple[object, object],
    limit: int,
    *status: bool,
) -> dict[str, Any]:
    return plan_of(connection, name, user_id, 0, *after, limit, *status)


def middle_of_the_list(connection: psycopg.Connection[Any], user_id: str) -> tuple[object, object]:
    """Return where a page in the middle of a user's tasks begins."""
    middle = """
        SELECT created_at, id FROM task WHERE user_id = %s ORDER BY created_at DESC, id DESC
        OFFSET (SELECT count(*) / 2 FROM task WHERE user_id = %s) LIMIT 1
    """
    [(created_at, task_id)] = connection.execute(middle, (user_id, user_id)).fetchall()
    return created_at, task_id


def oldest(connection: psycopg.Connection[Any], user_id: str) -> int:
    [(task_id,)] = connection.execute("SELECT min(id) FROM task WHERE user_id = %s", (user_id,)).fetchall()
    assert isinstance(task_id, int)
    return task_id


def setting(connection: psycopg.Connection[Any]) -> str:
    [(mode,)] = connection.execute("SHOW plan_cache_mode").fetchall()
    return str(mode)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def buffers(plan: dict[str, Any]) -> int:
    """Return how many of PostgreSQL's pages a plan has looked at."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


# --- Lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user_id", ["user-7", "busy"])
@pytest.mark.parametrize(("name", "status"), [(LISTS[0], ()), (LISTS[1], (True,)), (LISTS[1], (False,))])
def test_a_page_is_read_off_an_index_in_its_order(
    filled: psycopg.Connection[Any], name: str, status: tuple[bool, ...], user_id: str
) -> None:
    for after in (BEFORE_ALL, middle_of_the_list(filled, user_id)):
        check_page(filled, name, status, after, user_id)


def check_page(
    filled: psycopg.Connection[Any], name: str, status: tuple[bool, ...], after: tuple[object, object], user_id: str
) -> None:
    limit, *others, scan = nodes(page_of(filled, name, user_id, after, FIRST_PAGE, *status))
    if scan.get("Index Name") == "ix_task_user_id":  # the old backend's: no worse for less than a page
        assert (name, user_id, scan["Actual Rows"], setting(filled)) == (LISTS[0], "user-7", 20, "force_custom_plan")
        return
    assert others == []
    assert (limit["Node Type"], scan["Node Type"]) == ("Limit", "Index Scan")  # and nothing that sorts
    assert (scan["Index Name"], scan["Scan Direction"]) == (INDEXES[name], "Forward")
    assert "ROW(created_at, id) < ROW(" in scan["Index Cond"]
    assert "Filter" not in scan
    assert scan["Actual Rows"] <= FIRST_PAGE


@pytest.mark.parametrize(("name", "status"), [(LISTS[0], ()), (LISTS[1], (True,))])
def test_a_page_of_a_hundred_thousand_tasks_costs_what_it_holds(
    filled: psycopg.Connection[Any], name: str, status: tuple[bool, ...]
) -> None:
    """Wherever it is: the way down the index, and then pages that are full of this user's tasks."""
    for after in (BEFORE_ALL, middle_of_the_list(filled, "busy")):
        for limit in (FIRST_PAGE, NEXT_PAGE):
            plan = page_of(filled, name, "busy", after, limit, *status)
            assert plan["Actual Rows"] == limit
            assert 0 < buffers(plan) <= 6 + limit / 25


def test_ten_tasks_to_do_among_a_hundred_thousand_cost_as_much_as_ten_of_twenty(
    filled: psycopg.Connection[Any],
) -> None:
    plans = {each: page_of(filled, LISTS[1], each, BEFORE_ALL, FIRST_PAGE, False) for each in ("user-7", "busy")}
    for plan in plans.values():
        assert plan["Actual Rows"] == 10
        assert not any(node.get("Rows Removed by Filter") for node in nodes(plan))
    assert 0 < buffers(plans["busy"]) <= buffers(plans["user-7"]) + 2


# --- One task --------------------------------------------------------------------------------------------------------


def test_one_task_is_found_by_one_index_and_of_very_many_as_of_few(filled: psycopg.Connection[Any]) -> None:
    for name in (*BY_ID, "get_task_by_key.sql"):
        with filled.transaction(force_rollback=True):
            check_one_task(filled, name)


def check_one_task(filled: psycopg.Connection[Any], name: str) -> None:
    cost = {}
    for user_id in ("user-7", "busy"):
        key_or_id = ["key 7", "hash"] if name == "get_task_by_key.sql" else [oldest(filled, user_id)]
        plan = plan_of(filled, name, user_id, 0, *key_or_id)
        [scan] = [node for node in nodes(plan) if "Scan" in node["Node Type"]]
        assert (scan["Node Type"], scan["Index Name"]) == ("Index Scan", INDEXES[name])
        assert (scan["Actual Rows"], scan.get("Rows Removed by Filter", 0)) == (1, 0)
        cost[user_id] = buffers(plan)
    assert 0 < cost["busy"] <= cost["user-7"] * 2 + 4


def test_a_creation_reads_no_table(filled: psycopg.Connection[Any]) -> None:
    for key in (None, "a new key", "key 7"):
        plan = plan_of(filled, "create_task.sql", "user-7", 0, key, key, "a task", None, False)
        assert [node["Node Type"] for node in nodes(plan)] == ["ModifyTable", "Result"]
        assert plan["Actual Rows"] == (0 if key == "key 7" else 1)
        assert buffers(plan) < 100  # the way down each index, for the new row; the table has thousands


def test_every_statement_has_a_plan() -> None:
    assert {*INDEXES, "create_task.sql"} == set(STATEMENTS)


# --- The service -----------------------------------------------------------------------------------------------------


def test_the_service_has_each_statement_planned_once_for_all_users(
    database_url: str, start_service: StartService
) -> None:
    """Even a list, for which a plan of its own looks cheaper to PostgreSQL, and is not."""
    service = start_service(database_url)
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
        assert alice.create()["title"] == "force_generic_plan"
