"""The query module: the rule that binds every statement to its caller, and what is sent by that rule."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

import sql
from tests.support.copies import copy_program
from tests.support.query_module import NOT_STATEMENTS, STATEMENTS, import_query_module
from tests.support.service_process import ROOT


def filled(statement: str) -> str:
    """Return a statement as PostgreSQL is sent it."""
    return statement.replace("{task}", ", ".join(sql.database.COLUMNS))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that puts a statement into a copy of the folder and loads it there."""
    folder = copy_program(tmp_path_factory.mktemp("query_module"))
    module = import_query_module(folder)

    def load(statement: str) -> str:
        (folder / "sql" / "new.sql").write_text(statement)
        loaded: str = module.load("new.sql")
        return loaded

    return load


# What a statement gives back: a task, and the number of the call in its batch.
ROW = "{task}, $2::int AS call"
# The one conflict that the rule knows, for an INSERT of a row with this key.
KEYED = """
    INSERT INTO task (user_id, title, idempotency_key) VALUES ($1, 'x', 'his key')
    ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
"""
KEYED_AGAIN = KEYED.replace("his key", "hers key")

# Each of these, sent for alice, shows or changes what is bob's.
REACHING = {
    "no predicate": "SELECT {row}, $1::text FROM task",
    "an id instead of the caller": "SELECT {row}, $1::text FROM task WHERE id = $3 AND true",
    "another column": "SELECT {row} FROM task WHERE title <> $1 AND true",
    "another parameter": "SELECT {row}, $1::text FROM task WHERE user_id = $3::text AND true",
    "a constant": "SELECT {row}, $1::text FROM task WHERE user_id = 'bob' AND true",
    "a comparison that is wider": "SELECT {row} FROM task WHERE user_id >= $1 AND true",
    "not": "SELECT {row} FROM task WHERE NOT user_id = $1 AND true",
    "negated in parentheses": "SELECT {row} FROM task WHERE NOT (user_id = $1 AND true)",
    "or": "SELECT {row} FROM task WHERE user_id = $1 OR id = $3",
    "or behind an and": "SELECT {row} FROM task WHERE user_id = $1 AND true = true OR true",
    "or behind an and in lower case": "SELECT {row} FROM task WHERE user_id = $1 AND true or true",
    "or on a line of its own": "SELECT {row} FROM task WHERE user_id = $1 AND id = $3\nOR\ntrue",
    "or in a change": "UPDATE task SET title = 'x' WHERE user_id = $1 AND id = $3 OR true RETURNING $2::int AS call",
    "or behind what only looks like a comment": "SELECT {row} FROM task WHERE user_id = $1 AND '--' <> '' OR true",
    "or behind an escaped quote": r"SELECT {row} FROM task WHERE user_id = $1 AND title <> E'\'' OR title <> ''",
    "or that touches a literal": "SELECT {row} FROM task WHERE user_id = $1 AND E't'OR true",
    "a dollar quote by a digit of another script": (
        "UPDATE task SET title = $1, description = $\u0661$1 WHERE user_id = $1 AND true$\u0661$"
    ),
    "a line comment in a change": "UPDATE task SET title = $1 -- WHERE user_id = $1 AND true",
    "a line comment before a condition": (
        "SELECT {row} FROM task\n-- WHERE user_id = $1 AND\nWHERE $1 <> title AND true"
    ),
    "a block comment": "SELECT {row} FROM task /* WHERE user_id = $1 AND */ WHERE $1 <> title",
    "a block comment in a change": "UPDATE task SET title = $1 /* WHERE user_id = $1 AND */",
    "a literal": "SELECT {row} FROM task WHERE title <> 'WHERE user_id = $1 AND ' || $1",
    "a dollar-quoted literal": "SELECT {row} FROM task WHERE title <> $q$WHERE user_id = $1 AND $q$ || $1",
    "a dollar-quoted literal in a change": "UPDATE task SET title = $q$ WHERE user_id = $1 AND $q$ || $1",
    "an update within a literal": (
        "SELECT 'UPDATE task SET ', (SELECT json_agg(title) FROM task AS t), 'it WHERE user_id = $1 AND ', $1::text"
    ),
    "an alias in quotes": 'SELECT {task} AS "WHERE user_id = $1 AND ", $1::text FROM task',
    "a filter": "SELECT json_agg(title), count(*) FILTER (WHERE user_id = $1 AND completed) FROM task",
    "a union": "SELECT {row} FROM task WHERE user_id = $1 AND true UNION ALL SELECT {row} FROM task",
    "a union with a comment": "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM/**/task",
    "a union with TABLE": (
        "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT all_of_it.title FROM (TABLE task) AS all_of_it"
    ),
    "a join": "SELECT theirs.title FROM task JOIN task AS theirs ON true WHERE task.user_id = $1 AND true",
    "two tables": "SELECT theirs.title FROM task AS theirs, task AS mine WHERE mine.user_id = $1 AND true",
    "two tables in parentheses": "SELECT theirs FROM (task CROSS JOIN task AS theirs (owner)) WHERE user_id = $1",
    "a subselect": "SELECT (SELECT json_agg(title) FROM task) FROM task WHERE user_id = $1 AND true",
    "the predicate of a subselect": (
        "SELECT {row} FROM task WHERE (SELECT true FROM (VALUES ($1)) AS me (user_id) WHERE user_id = $1 AND true)"
    ),
    "a CTE": "WITH everyone AS (SELECT * FROM task) SELECT {row}, $1::text FROM everyone",
    "a CTE that is called like the table": (
        "WITH task AS (SELECT $1::text AS user_id, title FROM (TABLE task) AS t) "
        "SELECT title FROM task WHERE user_id = $1 AND true"
    ),
    "UPDATE by the id": "UPDATE task SET title = $1 WHERE id = $2 AND true",
    "UPDATE with the predicate in a literal of two lines": "UPDATE task SET title = '\nWHERE user_id = $1 AND\n' || $1",
    "UPDATE with the predicate in a subselect in lower case": (
        "UPDATE task SET title = coalesce((select 'mine' WHERE user_id = $1 AND true), 'x')"
    ),
    "UPDATE ... FROM a bound subselect": (
        "UPDATE task SET title = 'x' FROM (SELECT FROM task WHERE user_id = $1 AND true) AS mine"
    ),
    "UPDATE that gives a task away": "UPDATE task SET user_id = 'bob' WHERE user_id = $1 AND true",
    "UPDATE that gives a task away among all columns": (
        f"UPDATE task SET ({{task}}) = (id + 2, 'bob', {', '.join(sql.database.COLUMNS[2:])})"
        " WHERE user_id = $1 AND true"
    ),
    "UPDATE that takes a task over": "UPDATE task SET user_id = $1 WHERE id = $2 AND true",
    "DELETE by the id": "DELETE FROM task WHERE id = $2 AND true RETURNING $1::text",
    "DELETE ... USING a bound subselect": (
        "DELETE FROM task USING (SELECT user_id AS me FROM task WHERE user_id = $1 "
        "AND EXISTS (SELECT WHERE user_id = $1 AND true)) AS mine WHERE me IS NOT NULL"
    ),
    "INSERT for somebody else": "INSERT INTO task (user_id, title) VALUES ('bob', $1) RETURNING id",
    "INSERT for what is made of the caller": "INSERT INTO task (user_id, title) VALUES (left($1, 1), $2) RETURNING id",
    "INSERT of a second row": "INSERT INTO task (user_id, title) VALUES ($1, $2), ('bob', 'x') RETURNING id",
    "INSERT of a second row by a union without a SELECT": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) UNION VALUES ('bob', 'x') RETURNING id"
    ),
    "INSERT ... SELECT": "INSERT INTO task (user_id, title) SELECT user_id, $1 FROM task RETURNING id",
    "INSERT that returns everything": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) RETURNING (SELECT json_agg(t) FROM (TABLE task) AS t)"
    ),
    "INSERT that gives the task of its key away": (
        KEYED_AGAIN.replace("DO NOTHING", "DO UPDATE SET user_id = 'bob ' || task.id") + "RETURNING id"
    ),
    "INSERT with a key that returns everything": f"{KEYED} RETURNING (SELECT json_agg(t) FROM (TABLE task) AS t)",
    "MERGE": "MERGE INTO task USING (VALUES ($1)) AS me (name) ON user_id <> name WHEN MATCHED THEN DELETE",
}  # fmt: skip

# These reach nobody else. They are refused because the rule knows one way to write each thing.
UNVOUCHED = {
    "no table": "SELECT $1::text",
    "the predicate alone": "SELECT {row} FROM task WHERE user_id = $1",
    "another table": "SELECT $1::text FROM pg_class",
    "another table by TABLE": "SELECT {row} FROM task WHERE user_id = $1 AND EXISTS (TABLE pg_class)",
    "another table beside": "SELECT {row} FROM task WHERE user_id = $1 AND EXISTS (SELECT FROM pg_class)",
    "a function": "SELECT {row}, now() FROM task WHERE user_id = $1 AND true",
    "lower case": "select {row} from task where user_id = $1 AND true",
    "parentheses": "SELECT {row} FROM task WHERE (user_id = $1) AND true",
    "the other way round": "SELECT {row} FROM task WHERE $1 = user_id AND true",
    "a cast": "SELECT {row} FROM task WHERE user_id = $1::text AND true",
    # PostgreSQL 14 reads a number and an OR here, later ones refuse it.
    "or behind a digit": "SELECT {row} FROM task WHERE user_id = $1 AND 1 = 1OR true",
    "the schema named": "SELECT {row} FROM public.task WHERE user_id = $1 AND true",
    "a lock": "SELECT {row} FROM task WHERE user_id = $1 AND true FOR UPDATE",
    "a semicolon": "DELETE FROM task WHERE user_id = $1 AND true; DELETE FROM task",
    "a conflict whose condition is wider": KEYED.replace("NOT NULL", "NOT NULL OR true") + "RETURNING id",
    "a conflict without a condition": KEYED.replace("WHERE idempotency_key IS NOT NULL ", "") + "RETURNING id",
    "a conflict of whatever it is": re.sub("(?s)CONFLICT.*DO", "CONFLICT DO", KEYED) + "RETURNING id",
    "another conflict": (
        "INSERT INTO task (user_id, id) VALUES ($1, 1) ON CONFLICT (user_id, id) DO NOTHING RETURNING id"
    ),
    "INSERT without the caller": "INSERT INTO task (title) VALUES ($1) RETURNING id",
    "INSERT that returns nothing": KEYED,
    "INSERT that returns what a function makes": "INSERT INTO task (user_id, title) VALUES ($1, $2) RETURNING now()",
    "TRUNCATE": "TRUNCATE task",
}

BOUND = {
    "a further condition": "SELECT {row} FROM task WHERE user_id = $1 AND NOT completed",
    "an order": "SELECT {row} FROM task WHERE user_id = $1 AND true ORDER BY id LIMIT $3",
    "a page": "SELECT {row} FROM task WHERE user_id = $1 AND (title, id) > ($3, $4) ORDER BY title, id LIMIT $4",
    "a comment with an or in it": "-- One task, or none.\nSELECT {row} FROM task WHERE user_id = $1 AND true",
    "a comment with an apostrophe": "-- The caller's.\nSELECT {row} FROM task WHERE user_id = $1 AND title <> 'x'",
    "a change": "UPDATE task SET title = $3 WHERE user_id = $1 AND id = $4 RETURNING {row}",
    "a change with functions": (
        "UPDATE task SET title = coalesce($3, title), updated_at = greatest(now(), updated_at + interval '1 second')"
        " WHERE user_id = $1 AND coalesce(id = $4, true) RETURNING {row}"
    ),
    "a removal": "DELETE FROM task WHERE user_id = $1 AND true RETURNING {row}",
    "a new row": "INSERT INTO task (user_id, title) VALUES ($1, $3) RETURNING {row}",
    "a new row with a key": f"{KEYED} RETURNING {{row}}",
    "a row whose key is taken": f"{KEYED_AGAIN} RETURNING {{row}}",
}  # fmt: skip


def cases(statements: dict[str, str]) -> list[object]:
    return [pytest.param(statement.replace("{row}", ROW), id=name) for name, statement in statements.items()]


# --- On a database: alice and bob have a task each -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_users(new_database: Callable[[], str]) -> str:
    """The URL of a database in which alice and bob have a task each, made with a key."""
    url = new_database()

    async def fill() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(sql.database.SCHEMA)
        await connection.execute(
            "INSERT INTO task (user_id, title, idempotency_key)"
            " VALUES ('alice', 'hers', 'hers key'), ('bob', 'a secret', 'his key')"
        )
        await connection.close()

    asyncio.run(fill())
    return url


async def reaches_bob(url: str, statement: str) -> bool:
    """Return whether a statement, sent for alice, shows or changes what bob has. It is rolled back."""
    connection = await asyncpg.connect(url)
    transaction = connection.transaction()
    await transaction.start()
    bobs = "SELECT task FROM task WHERE user_id <> 'alice' ORDER BY task"
    before = await connection.fetch(bobs)
    prepared = await connection.prepare(filled(statement))
    values = {"text": "bob", "int8": before[0]["task"]["id"], "int4": 0}
    others = [values[parameter.name] for parameter in prepared.get_parameters()[1:]]
    answer = await prepared.fetch("alice", *others)
    after = await connection.fetch(bobs)
    await transaction.rollback()
    await connection.close()
    return before != after or "a secret" in str([list(row.values()) for row in answer])


@pytest.mark.parametrize("statement", cases(REACHING))
def test_a_statement_that_would_reach_somebody_else_is_refused(
    load: Callable[[str], str], two_users: str, statement: str
) -> None:
    assert_is_refused(load, statement)
    assert asyncio.run(reaches_bob(two_users, statement))


@pytest.mark.parametrize("statement", cases(UNVOUCHED))
def test_a_statement_that_is_not_plainly_bound_to_its_caller_is_refused(
    load: Callable[[str], str], statement: str
) -> None:
    assert_is_refused(load, statement)


def assert_is_refused(load: Callable[[str], str], statement: str) -> None:
    with pytest.raises(ValueError, match=r"sql/new\.sql"):
        load(statement)


@pytest.mark.parametrize("statement", cases(BOUND))
def test_a_statement_that_is_bound_to_its_caller_is_accepted_and_reaches_nobody_else(
    load: Callable[[str], str], two_users: str, statement: str
) -> None:
    assert load(statement) == filled(statement)
    assert not asyncio.run(reaches_bob(two_users, statement))


# --- The statements of the service -----------------------------------------------------------------------------------


def test_importing_the_module_fails_for_each_unbound_statement(tmp_path: Path) -> None:
    folder = copy_program(tmp_path)
    assert vars(import_query_module(folder))["GET_TASK"] == sql.GET_TASK
    for name in STATEMENTS:
        bound = (folder / "sql" / name).read_text()
        (folder / "sql" / name).write_text(f"SELECT {ROW}, $1::text FROM task")
        with pytest.raises(ValueError, match=name):
            import_query_module(folder)
        (folder / "sql" / name).write_text(bound)


def test_every_file_is_read_into_one_constant_of_its_name() -> None:
    texts = {name: sql.load(name) for name in STATEMENTS}
    texts |= {name: (ROOT / "sql" / name).read_text() for name in NOT_STATEMENTS}
    constants = vars(sql) | vars(sql.database)
    found = {name: [constant for constant, value in constants.items() if value == text] for name, text in texts.items()}
    assert found == {name: [name.removesuffix(".sql").upper()] for name in texts}


def test_every_method_takes_the_caller_first() -> None:
    methods = {name: method for name, method in vars(sql.Queries).items() if inspect.isfunction(method)}
    public = {name: method for name, method in methods.items() if not name.startswith("_")}
    del public["make_ready"], public["semaphore"]  # which send nothing for a caller
    # create_task and list_tasks send one of two statements.
    assert {f"{name}.sql" for name in public} == {*STATEMENTS} - {"get_task_by_key.sql", "list_tasks_by_status.sql"}
    for method in public.values():
        assert list(inspect.signature(method).parameters)[:2] == ["self", "user_id"]


def test_the_first_parameter_of_every_statement_is_text(two_users: str) -> None:
    async def check() -> None:
        connection = await asyncpg.connect(two_users)
        for name in STATEMENTS:
            prepared = await connection.prepare(sql.load(name))
            assert prepared.get_parameters()[0].name in ("text", "varchar"), name
        await connection.close()

    asyncio.run(check())
