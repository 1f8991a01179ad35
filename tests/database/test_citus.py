"""Ready for Citus: what it refuses is in no statement, and `pytest --citus` runs the tests of the API on a cluster.

Citus is no Python package and is not installed here, so that its rules are stated as tests on an ordinary PostgreSQL,
which knows the volatility of each function. They were found with Citus 13.2 on PostgreSQL 15.

With a cluster at hand:

    TEST_CITUS_URL=postgresql://user:password@coordinator/database uv run pytest --citus -n 0 \\
        tests/database/test_citus.py tests/api

All of it happens in that one database, where each database of the other tests is a schema, with a distributed table of
its own, that the `search_path` in the URL chooses. A database of its own would have to be made on each worker too.
A lock that is held on a worker ends no statement there, unless the role of the tests has
`ALTER ROLE ... SET lock_timeout = '50ms'`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
import psycopg.sql
import pytest

from sql import COMPLETE_TASK, CREATE_TASK, DELETE_TASK, UPDATE_TASK
from sql.database import SCHEMA
from tests.support.citus import FILES, NOT_ON_CITUS
from tests.support.service_process import Service, run_command

Connection = psycopg.Connection[tuple[Any, ...]]

# --- The option --citus ----------------------------------------------------------------------------------------------


def test_the_table_is_distributed_where_that_is_asked_for(service: Service, pytestconfig: pytest.Config) -> None:
    [(kind,)] = service.sql("SELECT to_regclass('pg_dist_partition')::text")
    if pytestconfig.option.citus:
        # partmethod h: by a hash; 1: the first column, which is user_id.
        found = service.sql("""
            SELECT partmethod::text, (SELECT attname FROM pg_attribute WHERE attrelid = logicalrelid AND attnum = 1)
            FROM pg_dist_partition
            WHERE logicalrelid = 'task'::regclass AND partkey LIKE '%%:varattno 1 %%'
        """)
        assert found == [("h", "user_id")]
    else:
        assert kind is None


# A plain PostgreSQL in the place of Citus: it has what the tests ask Citus for, and does nothing.
STAND_IN = """
    CREATE TABLE calls (name text, by text, in_schema text);
    CREATE TABLE pg_dist_partition (logicalrelid regclass, partmethod "char", partkey text);
    CREATE FUNCTION create_distributed_table(name text, by text) RETURNS void LANGUAGE sql AS $$
        INSERT INTO public.pg_dist_partition
        SELECT attrelid, 'h', format('{VAR :varno 1 :varattno %s :vartype 25}', attnum)
        FROM pg_attribute WHERE attrelid = name::regclass AND attname = by;
        INSERT INTO public.calls VALUES (name, by, current_schema());
    $$;
"""


def run_pytest(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    return run_command(command, variables, seconds=100)


def test_the_option_needs_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_CITUS_URL", raising=False)
    run = run_pytest("--citus", "tests/api/test_tasks.py")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert run.stderr.strip().endswith(
        "ERROR: --citus needs TEST_CITUS_URL, the URL of a database on the coordinator of a cluster."
    )


def test_the_option_runs_the_tests_of_the_api_on_distributed_tables(new_database: Callable[[], str]) -> None:
    url = new_database()
    with psycopg.connect(url) as connection:
        connection.execute(STAND_IN.encode())
    tests = [
        "tests/database/test_citus.py::test_the_table_is_distributed_where_that_is_asked_for",
        "tests/database/test_citus.py::test_no_change_has_what_citus_refuses",
        "tests/api/test_timestamps.py",
        "tests/database/test_query_module.py",
    ]
    run = run_pytest("--citus", *tests, TEST_CITUS_URL=url)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b\d+ passed, \d+ deselected\b", run.stdout)
    with psycopg.connect(url) as connection:
        calls = connection.execute("SELECT name, by, in_schema FROM calls").fetchall()
        schemas = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'tasks_%'").fetchall()
    assert len(calls) >= 2
    assert {(name, by) for name, by, _ in calls} == {("task", "user_id")}
    assert len({schema for *_, schema in calls}) == len(calls)
    assert schemas == []  # they are gone afterwards


def test_the_tests_that_are_left_out_exist() -> None:
    texts = "".join(file.read_text() for file in FILES)
    assert [name for name in NOT_ON_CITUS if f"\ndef {name}(" not in texts] == []


# --- What Citus refuses ----------------------------------------------------------------------------------------------

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}()]|(?:[^\s{}()\\]|\\.)+')


@dataclass
class Node:
    """A node of a parsed statement, as PostgreSQL stores it in the catalog: {NAME :field value ...}."""

    name: str
    fields: dict[str, list[Any]]

    def get(self, field: str) -> list[Any]:
        return self.fields.get(field, [])


def read_items(tokens: Iterator[str], end: str) -> list[Any]:
    """Return what comes before the end of a list or node: names and values, lists and nodes."""
    found: list[Any] = []
    for token in tokens:
        if token == end:
            return found
        if token == "(":
            found.append(read_items(tokens, ")"))
        elif token == "{":
            name, *items = read_items(tokens, "}")
            fields: dict[str, list[Any]] = {}
            for item in items:
                if isinstance(item, str) and item.startswith(":"):
                    values = fields.setdefault(item[1:], [])
                else:
                    values.append(item)
            found.append(Node(name, fields))
        else:
            found.append(token)
    return found


def nodes(tree: Any) -> Iterator[Node]:
    """Yield all the nodes of a tree."""
    if isinstance(tree, Node):
        yield tree
        yield from nodes(list(tree.fields.values()))
    elif isinstance(tree, list):
        for each in tree:
            yield from nodes(each)


def parsed(connection: Connection, statement: str) -> Node:
    """Return a statement with its parameters as PostgreSQL understands it: it is the body of a function."""
    types: LiteralString = "SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'the_statement'"
    body: LiteralString = "SELECT prosqlbody::text FROM pg_proc WHERE proname = 'the_statement'"
    result = "SETOF record" if "RETURNING" in statement else "void"
    with connection.transaction(force_rollback=True):
        connection.execute(f"PREPARE the_statement AS {statement}".encode())
        [(parameters,)] = connection.execute(types).fetchall()
        connection.execute("DEALLOCATE the_statement")
        create = f"CREATE FUNCTION the_statement({', '.join(parameters)}) RETURNS {result} LANGUAGE sql"
        connection.execute(f"{create} BEGIN ATOMIC {statement}; END".encode())
        [(text,)] = connection.execute(body).fetchall()
    [query] = [node for node in nodes(read_items(iter(TOKEN.findall(text)), "")) if node.name == "QUERY"]
    return query


def refused(connection: Connection, statement: str) -> set[str]:
    """Return what Citus would refuse in a statement that changes a distributed table."""
    query = parsed(connection, statement)
    functions = "SELECT oid::text, proname, provolatile::text FROM pg_proc"
    known = {oid: (name, volatility) for oid, name, volatility in connection.execute(functions)}
    operators = "SELECT oid::text, oprcode::oid::text FROM pg_operator"
    functions_of: dict[str, str] = dict(connection.execute(operators).fetchall())
    found = set()

    def used(node: Node) -> Iterator[tuple[str, str]]:
        oids = [*node.get("funcid"), *(functions_of.get(oid, "0") for oid in node.get("opno"))]
        yield from (known[oid] for oid in oids if oid in known)
        if node.name == "COERCEVIAIO":  # by the text of a value, which depends on settings for some types
            yield "a cast by text", "s"

    for node in nodes(query.get("returningList")):
        found |= {f"{name} in RETURNING" for name, volatility in used(node) if volatility != "i"}
    values = query.get("targetList") if query.get("commandType") == ["2"] else []  # those of an INSERT are no column's
    changes = [*values, *query.get("jointree"), *query.get("onConflict")]
    for node in nodes(changes):
        for name, volatility in used(node):
            if volatility == "v":
                found.add(f"{name}, which is VOLATILE")
            elif volatility == "s" and any(each.name == "VAR" for each in nodes(node)):
                found.add(f"{name}, which is STABLE, of a column")
        if node.name in ("CASEEXPR", "COALESCEEXPR"):
            inside = {name for each in nodes(node) for name, volatility in used(each) if volatility != "i"}
            found |= {f"{name} in a {node.name.removesuffix('EXPR')}" for name in inside}
    return found


@pytest.fixture(scope="module")
def connection(new_database: Callable[[], str]) -> Iterator[Connection]:
    """A connection to a database with an ordinary table of tasks."""
    with psycopg.connect(new_database()) as connection:
        connection.execute(SCHEMA.encode())
        yield connection


@pytest.mark.parametrize("statement", [CREATE_TASK, UPDATE_TASK, COMPLETE_TASK, DELETE_TASK])
def test_no_change_has_what_citus_refuses(connection: Connection, statement: str) -> None:
    assert refused(connection, statement) == set()


# Of version 1.0, whose changes Citus refused, and what it refused in them.
UPDATE = "UPDATE task SET completed = true WHERE user_id = $1 AND id = $2"
REFUSED = {
    "a time as text": (
        f"{UPDATE} RETURNING to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
        {"to_char in RETURNING"},
    ),
    "a new task as JSON": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) RETURNING '{' || id || to_json(title)",
        {"textanycat in RETURNING", "to_json in RETURNING"},
    ),
    "a lock timeout": (
        f"{UPDATE} AND set_config('lock_timeout', '50ms', true) IS NOT NULL",
        {"set_config, which is VOLATILE"},
    ),
    "a version as text": (
        f"{UPDATE} AND coalesce(to_char(updated_at AT TIME ZONE 'UTC', 'YYYY') = ANY($3::text[]), true)",
        {"to_char, which is STABLE, of a column", "to_char in a COALESCE"},
    ),
    "a microsecond later": (
        "UPDATE task SET updated_at = greatest(now(), updated_at + interval '1 microsecond') WHERE user_id = $1",
        {"timestamptz_pl_interval, which is STABLE, of a column"},
    ),
    "now in a CASE": (
        "UPDATE task SET updated_at = CASE WHEN $2 THEN now() ELSE updated_at END WHERE user_id = $1",
        {"now in a CASE"},
    ),
    "now in coalesce": (
        "UPDATE task SET updated_at = coalesce($2, now()) WHERE user_id = $1",
        {"now in a COALESCE"},
    ),
    "the clock": (
        "UPDATE task SET updated_at = clock_timestamp() WHERE user_id = $1",
        {"clock_timestamp, which is VOLATILE"},
    ),
    "the clock at a conflict": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) ON CONFLICT (user_id, id)"
        " DO UPDATE SET updated_at = clock_timestamp()",
        {"clock_timestamp, which is VOLATILE"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("statement", "expected"), [pytest.param(*case, id=name) for name, case in REFUSED.items()])
def test_what_citus_refuses_is_noticed(connection: Connection, statement: str, expected: set[str]) -> None:
    assert refused(connection, statement) == expected


def unique_without_user(connection: Connection) -> list[str]:
    """Return the unique indexes that have no column user_id, or only an expression of it."""
    indexes = """
        SELECT indexrelid::regclass::text FROM pg_index
        WHERE indrelid = 'task'::regclass AND indisunique AND NOT EXISTS (
            SELECT FROM pg_attribute WHERE attrelid = indrelid AND attname = 'user_id' AND attnum = ANY(indkey)
        )
        ORDER BY 1
    """
    return [name for (name,) in connection.execute(indexes)]


def test_every_unique_index_has_the_column_user_id(connection: Connection) -> None:
    assert unique_without_user(connection) == []
    with connection.transaction(force_rollback=True):
        connection.execute("CREATE UNIQUE INDEX by_case ON task (lower(user_id), idempotency_key)")
        connection.execute("CREATE UNIQUE INDEX by_key ON task (split_part(idempotency_key, ' ', 1))")
        assert unique_without_user(connection) == ["by_case", "by_key"]


def test_the_primary_key_of_the_old_backend_has_no_column_user_id(new_database: Callable[[], str]) -> None:
    with psycopg.connect(new_database()) as connection:
        connection.execute("CREATE TABLE task (id serial PRIMARY KEY, user_id varchar(255) NOT NULL)")
        assert unique_without_user(connection) == ["task_pkey"]
