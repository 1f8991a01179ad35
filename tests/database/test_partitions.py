"""Ready to shard: where the table is split by its user, each statement has to do with one part of it.

PostgreSQL's own hash partitions stand for the shards of Citus, CockroachDB and YugabyteDB. With `pytest --partitions`
the tests of the API run on them: .ci/run has those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from sql import load
from sql.database import ADOPT, SCHEMA
from tests.support.fixtures import StartService
from tests.support.postgres import lay_out_in_partitions
from tests.support.query_module import STATEMENTS
from tests.support.service_process import Service

PARTITIONS = {f"task_{number}" for number in range(8)}
USERS = [f"user-{number}" for number in range(40)]

Connection = psycopg.Connection[tuple[Any, ...]]


def rows(connection: Connection, statement: LiteralString) -> list[tuple[Any, ...]]:
    return connection.execute(statement).fetchall()


def test_the_tests_run_on_the_layout_that_is_asked_for(service: Service, pytestconfig: pytest.Config) -> None:
    [(kind,)] = service.sql("SELECT relkind::text FROM pg_class WHERE oid = 'task'::regclass")
    assert kind == ("p" if pytestconfig.option.partitions else "r")


# --- The schema ------------------------------------------------------------------------------------------------------


def layout(connection: Connection) -> dict[str, set[tuple[Any, ...]]]:
    """Return the columns, constraints and indexes of each table that holds tasks, without the names that differ."""
    found = {}
    for oid, name in rows(connection, "SELECT oid, relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^task'"):
        parts = connection.execute(
            """
            SELECT attname, format_type(atttypid, atttypmod), attnotnull::text, pg_get_expr(adbin, adrelid)
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = %(oid)s AND attnum > 0 AND NOT attisdropped
            UNION ALL
            SELECT conname, pg_get_constraintdef(oid), '', ''
            FROM pg_constraint WHERE conrelid = %(oid)s AND contype = 'c'
            UNION ALL
            SELECT regexp_replace(pg_get_indexdef(indexrelid), '.* USING ', ''), indisunique::text, indisvalid::text, ''
            FROM pg_index WHERE indrelid = %(oid)s
            """,
            {"oid": oid},
        )
        found[name] = set(parts.fetchall())
    return found


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_the_schema_makes_each_partition_what_it_makes_an_ordinary_table(
    new_database: Callable[[], str], version: str
) -> None:
    with psycopg.connect(new_database()) as connection:
        connection.execute(SCHEMA.encode())
        [ordinary] = layout(connection).values()
    url = new_database()
    lay_out_in_partitions(url)
    with psycopg.connect(url) as connection:
        if version == "1.0":
            connection.execute("ALTER TABLE task DROP COLUMN request_hash")
            connection.execute(ADOPT.encode())
        connection.execute(SCHEMA.encode())
        assert layout(connection) == dict.fromkeys(PARTITIONS, ordinary)


def test_the_schema_is_applied_once(new_database: Callable[[], str], start_service: StartService) -> None:
    """What the service writes has a row in the catalog that is newer than all others."""
    url = new_database()
    lay_out_in_partitions(url)
    newest: LiteralString = """
        SELECT max(xmin::text::bigint) FROM (
            SELECT xmin FROM pg_class
            UNION ALL SELECT xmin FROM pg_attribute
            UNION ALL SELECT xmin FROM pg_constraint
            UNION ALL SELECT xmin FROM pg_index
        ) AS catalog
    """
    with psycopg.connect(url) as connection:
        written = rows(connection, newest)
    for _ in range(2):
        service = start_service(url)
        service.wait_until_ready()
        written += service.sql(newest)
        service.stop()
    assert written[0] < written[1] == written[2]


# --- The statements --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partitioned_url(new_database: Callable[[], str]) -> str:
    """A database in which each of the users has two tasks, an open one and a completed one."""
    url = new_database()
    lay_out_in_partitions(url)
    with psycopg.connect(url) as connection:
        connection.execute(SCHEMA.encode())
        insert = "INSERT INTO task (user_id, title, completed) SELECT unnest(%s::text[]), 'a task', %s"
        for completed in (False, True):
            connection.execute(insert, (USERS, completed))
    return url


# A statement keeps one plan for all callers, or has one made for each: PostgreSQL decides, unless it is told.
@pytest.fixture(params=["force_generic_plan", "force_custom_plan"])
def partitioned(partitioned_url: str, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection whose changes are undone after the test."""
    with psycopg.connect(partitioned_url) as connection:
        connection.execute(sql.SQL("SET plan_cache_mode = {}").format(sql.Literal(request.param)))
        yield connection
        connection.rollback()


def touched(connection: Connection, statement: str, user_id: str) -> set[str]:
    """Return the partitions that a statement for a user reads or writes, by its executed plan and by its changes."""
    connection.execute(f"PREPARE the_statement AS {statement}".encode())
    [(task_id,)] = connection.execute("SELECT min(id) FROM task WHERE user_id = %s", (user_id,)).fetchall()
    values: dict[str, object] = {
        "text": "a key", "bigint": task_id, "boolean": True, "timestamp with time zone": "infinity", "integer": 0
    }  # fmt: skip
    [(types,)] = rows(
        connection, "SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'the_statement'"
    )
    parameters = [user_id, *(values.get(each) for each in types[1:])]
    changes: LiteralString = "SELECT relname, n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_xact_user_tables"
    before = set(rows(connection, changes))
    explain = sql.SQL("EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE the_statement ({})")
    call = explain.format(sql.SQL(", ").join(map(sql.Literal, parameters)))
    [([explained],)] = connection.execute(call).fetchall()
    connection.execute("DEALLOCATE the_statement")
    return scanned(explained["Plan"]) | {name for name, _ in set(rows(connection, changes)) - before}


def scanned(node: dict[str, Any]) -> set[str]:
    """Return the tables that the executed nodes of a plan read."""
    found = set().union(*map(scanned, node.get("Plans", [])))
    if node["Actual Loops"] and node["Node Type"] != "ModifyTable" and "Relation Name" in node:
        found.add(node["Relation Name"])
    return found


def homes(connection: Connection) -> dict[str, set[str]]:
    """Return the partition of each user."""
    return {user_id: {name} for user_id, name in rows(connection, "SELECT user_id, tableoid::regclass::text FROM task")}


def test_each_statement_touches_the_partition_of_its_caller_alone(partitioned: Connection) -> None:
    expected = homes(partitioned)
    assert set().union(*expected.values()) == PARTITIONS
    for name in STATEMENTS:
        assert {user_id: touched(partitioned, load(name), user_id) for user_id in USERS} == expected, name


def test_a_statement_that_names_no_user_is_seen_to_touch_all_partitions(partitioned: Connection) -> None:
    insert = "INSERT INTO task (user_id, title) SELECT $1 || number, 'a task' FROM generate_series(1, 100) AS number"
    others = [load(name) for name in STATEMENTS if name != "create_task.sql"]
    for statement in [insert, *(other.replace("user_id = $1", "$1::text <> ''") for other in others)]:
        assert touched(partitioned, statement, USERS[0]) == PARTITIONS, statement
