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
    return statement.replace("{task}", ", ".join(sql.NAMES))


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

# Each of these, sent for alice, shows or changes what is bob's: shown below on a database.
REACHING = {
    "no predicate": "SELECT {row}, $1::text FROM task",
    "another predicate": "SELECT {row} FROM task WHERE $1::text IS NOT NULL AND id = $3",
    "an id instead of the caller": "SELECT {row}, $1::text FROM task WHERE id = $3 AND true",
    "another column": "SELECT {row} FROM task WHERE title <> $1 AND true",
    "another parameter": "SELECT {row}, $1::text FROM task WHERE user_id = $3::text AND true",
    "another parameter without a cast": "SELECT {row}, $1::text FROM task WHERE user_id = $3 AND true",
    "a constant": "SELECT {row}, $1::text FROM task WHERE user_id = 'bob' AND true",
    "the column itself": "SELECT {row}, $1::text FROM task WHERE user_id = user_id AND true",
    "a comparison that is wider": "SELECT {row} FROM task WHERE user_id >= $1 AND true",
    "a pattern": "SELECT {row} FROM task WHERE user_id NOT LIKE $1 AND true",
    "not": "SELECT {row} FROM task WHERE NOT user_id = $1 AND true",
    "not null": "SELECT {row}, $1::text FROM task WHERE user_id IS NOT NULL AND true",
    "negated in parentheses": "SELECT {row} FROM task WHERE NOT (user_id = $1 AND true)",
    "compared with a truth": "SELECT {row} FROM task WHERE (user_id = $1) IS NOT NULL AND true",
    "or": "SELECT {row} FROM task WHERE user_id = $1 OR id = $3",
    "or in lower case": "SELECT {row} FROM task WHERE user_id = $1 or true",
    "or in front": "SELECT {row} FROM task WHERE true OR user_id = $1",
    "or in front of all of it": "SELECT {row} FROM task WHERE true OR user_id = $1 AND true",
    "or behind an and": "SELECT {row} FROM task WHERE user_id = $1 AND true = true OR true",
    "or behind an and in lower case": "SELECT {row} FROM task WHERE user_id = $1 AND true or true",
    "or on a line of its own": "SELECT {row} FROM task WHERE user_id = $1 AND id = $3\nOR\ntrue",
    "or in a change": "UPDATE task SET title = 'x' WHERE user_id = $1 AND id = $3 OR true RETURNING $2::int AS call",
    "or in a removal": "DELETE FROM task WHERE user_id = $1 AND id = $3 OR true RETURNING {row}",
    "or behind what only looks like a comment": "SELECT {row} FROM task WHERE user_id = $1 AND '--' <> '' OR true",
    "or behind an escaped quote": r"SELECT {row} FROM task WHERE user_id = $1 AND title <> E'\'' OR title <> ''",
    "a line comment": "SELECT {row}, $1::text FROM task -- WHERE user_id = $1 AND true",
    "a line comment before a condition": (
        "SELECT {row} FROM task\n-- WHERE user_id = $1 AND\nWHERE $1 <> title AND true"
    ),
    "a line comment in a change": "UPDATE task SET title = $1 -- WHERE user_id = $1 AND true",
    "a block comment": "SELECT {row} FROM task /* WHERE user_id = $1 AND */ WHERE $1 <> title",
    "a block comment at the end": "SELECT {row} FROM task WHERE $1 <> title /* WHERE user_id = $1 AND */",
    "a block comment in a change": "UPDATE task SET title = $1 /* WHERE user_id = $1 AND */",
    "a literal": "SELECT {row} FROM task WHERE title <> 'WHERE user_id = $1 AND ' || $1",
    "a literal in a removal": "DELETE FROM task WHERE title <> ' WHERE user_id = $1 AND ' || $1",
    "a dollar-quoted literal": "SELECT {row} FROM task WHERE title <> $q$WHERE user_id = $1 AND $q$ || $1",
    "a dollar-quoted literal in a change": "UPDATE task SET title = $q$ WHERE user_id = $1 AND $q$ || $1",
    "an update within a literal": (
        "SELECT 'UPDATE task SET ', (SELECT json_agg(title) FROM task AS t), 'it WHERE user_id = $1 AND ', $1::text"
    ),
    "an alias in quotes": 'SELECT {task} AS "WHERE user_id = $1 AND ", $1::text FROM task',
    "an alias in quotes in a change": (
        'UPDATE task AS " WHERE user_id = $1 AND " SET title = $1 WHERE true RETURNING {row}'
    ),
    "a filter": "SELECT json_agg(title), count(*) FILTER (WHERE user_id = $1 AND completed) FROM task",
    "a union": "SELECT {row} FROM task WHERE user_id = $1 AND true UNION ALL SELECT {row} FROM task",
    "a union with the schema named": (
        "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM public.task"
    ),
    "a union with quotes": 'SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM "task"',
    "a union with no space": 'SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM"task"',
    "a union with a comment": "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM/**/task",
    "a union with TABLE": (
        "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT all_of_it.title FROM (TABLE task) AS all_of_it"
    ),
    "a union with ONLY": "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM ONLY task",
    "a join": "SELECT theirs.title FROM task JOIN task AS theirs ON true WHERE task.user_id = $1 AND true",
    "a join with other names": "SELECT mine FROM task CROSS JOIN task AS mine (owner) WHERE user_id = $1 AND true",
    "two tables": "SELECT theirs.title FROM task AS theirs, task AS mine WHERE mine.user_id = $1 AND true",
    "two tables with other names": "SELECT theirs FROM task AS mine, task AS theirs (owner) WHERE user_id = $1",
    "two tables in parentheses": "SELECT theirs FROM (task CROSS JOIN task AS theirs (owner)) WHERE user_id = $1",
    "a subselect": "SELECT (SELECT json_agg(title) FROM task) FROM task WHERE user_id = $1 AND true",
    "a subselect in the predicate": (
        "SELECT {row} FROM task WHERE id IN (SELECT id + 1 FROM task WHERE user_id = $1 AND true)"
    ),
    "a subselect over TABLE": "SELECT (SELECT json_agg(t) FROM (TABLE task) AS t) FROM task WHERE user_id = $1",
    "the predicate of a subselect": (
        "SELECT {row} FROM task WHERE (SELECT true FROM (VALUES ($1)) AS me (user_id) WHERE user_id = $1 AND true)"
    ),
    "a CTE": "WITH everyone AS (SELECT * FROM task) SELECT {row}, $1::text FROM everyone",
    "a CTE beside a bound one": (
        "WITH mine AS (SELECT id FROM task WHERE user_id = $1 AND true) "
        "SELECT {row} FROM task WHERE id NOT IN (TABLE mine)"
    ),
    "a CTE that is called like the table": (
        "WITH task AS (SELECT $1::text AS user_id, title FROM (TABLE task) AS t) "
        "SELECT title FROM task WHERE user_id = $1 AND true"
    ),
    "UPDATE without a predicate": "UPDATE task SET title = $1",
    "UPDATE by the id": "UPDATE task SET title = $1 WHERE id = $2 AND true",
    "UPDATE with the predicate in a literal": "UPDATE task SET title = ' WHERE user_id = $1 AND ' || $1",
    "UPDATE with the predicate in a literal of two lines": "UPDATE task SET title = '\nWHERE user_id = $1 AND\n' || $1",
    "UPDATE with the predicate in a comment": "UPDATE task SET title = $1\n-- WHERE user_id = $1 AND true",
    "UPDATE with the predicate in a subselect": (
        "UPDATE task SET title = coalesce((SELECT 'mine' WHERE user_id = $1 AND true), 'x')"
    ),
    "UPDATE with the predicate in a subselect in lower case": (
        "UPDATE task SET title = coalesce((select 'mine' WHERE user_id = $1 AND true), 'x')"
    ),
    "UPDATE ... FROM": "UPDATE task SET title = 'x' FROM task AS mine WHERE mine.user_id = $1 AND true",
    "UPDATE ... FROM a bound subselect": (
        "UPDATE task SET title = 'x' FROM (SELECT FROM task WHERE user_id = $1 AND true) AS mine"
    ),
    "UPDATE that gives a task away": "UPDATE task SET user_id = 'bob' WHERE user_id = $1 AND true",
    "UPDATE that gives a task away among all columns": (
        "UPDATE task SET ({task}) = (id + 2, 'bob', title, description, completed, created_at, updated_at)"
        " WHERE user_id = $1 AND true"
    ),
    "UPDATE that takes a task over": "UPDATE task SET user_id = $1 WHERE id = $2 AND true",
    "DELETE without a predicate": "DELETE FROM task RETURNING $1::text",
    "DELETE by the id": "DELETE FROM task WHERE id = $2 AND true RETURNING $1::text",
    "DELETE ... USING": "DELETE FROM task USING task AS mine WHERE mine.user_id = $1 AND true",
    "DELETE ... USING a bound subselect": (
        "DELETE FROM task USING (SELECT user_id AS me FROM task WHERE user_id = $1 "
        "AND EXISTS (SELECT WHERE user_id = $1 AND true)) AS mine WHERE me IS NOT NULL"
    ),
    "INSERT for somebody else": "INSERT INTO task (user_id, title) VALUES ('bob', $1) RETURNING id",
    "INSERT for another parameter": "INSERT INTO task (title, user_id) VALUES ($1, 'bob') RETURNING id",
    "INSERT for what is made of the caller": "INSERT INTO task (user_id, title) VALUES (left($1, 1), $2) RETURNING id",
    "INSERT for what is made of the caller without a function": (
        "INSERT INTO task (user_id, title) VALUES ($1 || 'x', $2) RETURNING id"
    ),
    "INSERT of a second row": "INSERT INTO task (user_id, title) VALUES ($1, $2), ('bob', 'x') RETURNING id",
    "INSERT of a second row by a union": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) UNION SELECT 'bob', 'x' RETURNING id"
    ),
    "INSERT of a second row by a union without a SELECT": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) UNION VALUES ('bob', 'x') RETURNING id"
    ),
    "INSERT ... SELECT": "INSERT INTO task (user_id, title) SELECT user_id, $1 FROM task RETURNING id",
    "INSERT that returns everything": (
        "INSERT INTO task (user_id, title) VALUES ($1, $2) RETURNING (SELECT json_agg(t) FROM (TABLE task) AS t)"
    ),
    "INSERT that gives a task away": (
        "INSERT INTO task (user_id, id, title) VALUES ($1, 1, $3)"
        " ON CONFLICT (user_id, id) DO UPDATE SET user_id = 'bob' RETURNING {row}"
    ),
    "INSERT that gives the task of its key away": (
        KEYED_AGAIN.replace("DO NOTHING", "DO UPDATE SET user_id = 'bob ' || task.id") + "RETURNING id"
    ),
    "INSERT with a key that returns everything": f"{KEYED} RETURNING (SELECT json_agg(t) FROM (TABLE task) AS t)",
    "INSERT of a second row with a key": (
        KEYED.replace("'his key')", "'his key'), ('bob', 'x', 'new key')") + "RETURNING id"
    ),
    "INSERT with a key for somebody else": KEYED.replace("$1, 'x', 'his", "'bob', $1, 'new") + "RETURNING {task}",
    "MERGE": "MERGE INTO task USING (VALUES ($1)) AS me (name) ON user_id <> name WHEN MATCHED THEN DELETE",
}  # fmt: skip

# These reach nobody else. They are refused because the rule knows one way to write each thing.
UNVOUCHED = {
    "no table": "SELECT $1::text",
    "nothing": "-- WHERE user_id = $1 AND true",
    "the predicate alone": "SELECT {row} FROM task WHERE user_id = $1",
    "another table": "SELECT $1::text FROM pg_class",
    "another table by TABLE": "SELECT {row} FROM task WHERE user_id = $1 AND EXISTS (TABLE pg_class)",
    "another table beside": "SELECT {row} FROM task WHERE user_id = $1 AND EXISTS (SELECT FROM pg_class)",
    "a subselect of the one table": (
        "SELECT json_agg(item) FROM (SELECT {row} FROM task WHERE user_id = $1 AND true ORDER BY id) AS item"
    ),
    "a function": "SELECT {row}, now() FROM task WHERE user_id = $1 AND true",
    "lower case": "select {row} from task where user_id = $1 AND true",
    "lower case in the predicate": "SELECT {row} FROM task where user_id = $1 AND true",
    "parentheses": "SELECT {row} FROM task WHERE (user_id = $1) AND true",
    "a condition before": "SELECT {row} FROM task WHERE id = $3 AND user_id = $1",
    "the other way round": "SELECT {row} FROM task WHERE $1 = user_id AND true",
    "a cast": "SELECT {row} FROM task WHERE user_id = $1::text AND true",
    "parameter ten and more": "SELECT {row} FROM task WHERE user_id = $10 AND true",
    # PostgreSQL 14 reads a number and an OR here, later ones refuse it.
    "or behind a digit": "SELECT {row} FROM task WHERE user_id = $1 AND 1 = 1OR true",
    "or behind a parameter": "SELECT {row} FROM task WHERE user_id = $1 AND 1 = $3OR true",
    "the schema named": "SELECT {row} FROM public.task WHERE user_id = $1 AND true",
    "an alias": "SELECT {row} FROM task AS mine WHERE user_id = $1 AND true",
    "a lock": "SELECT {row} FROM task WHERE user_id = $1 AND true FOR UPDATE",
    "a semicolon": "DELETE FROM task WHERE user_id = $1 AND true; DELETE FROM task",
    "a conflict whose condition is wider": KEYED.replace("NOT NULL", "NOT NULL OR true") + "RETURNING id",
    "a conflict without a condition": KEYED.replace("WHERE idempotency_key IS NOT NULL ", "") + "RETURNING id",
    "a conflict with a change": KEYED.replace("DO NOTHING", "DO UPDATE SET title = excluded.title") + "RETURNING id",
    "a conflict of everybody's keys": KEYED.replace("ON CONFLICT (user_id, ", "ON CONFLICT (") + "RETURNING id",
    "a conflict of whatever it is": re.sub("(?s)CONFLICT.*DO", "CONFLICT DO", KEYED) + "RETURNING id",
    "a conflict in lower case": KEYED.replace("ON CONFLICT", "on conflict") + "RETURNING id",
    "another conflict": (
        "INSERT INTO task (user_id, id) VALUES ($1, 1) ON CONFLICT (user_id, id) DO NOTHING RETURNING id"
    ),
    "INSERT without the caller": "INSERT INTO task (title) VALUES ($1) RETURNING id",
    "INSERT with the caller last": "INSERT INTO task (title, user_id) VALUES ($2, $1) RETURNING id",
    "INSERT that returns nothing": KEYED,
    "INSERT that returns what a function makes": "INSERT INTO task (user_id, title) VALUES ($1, $2) RETURNING now()",
    "TRUNCATE": "TRUNCATE task",
}

BOUND = {
    "a further condition": "SELECT {row} FROM task WHERE user_id = $1 AND NOT completed",
    "the id": "SELECT {row} FROM task WHERE user_id = $1 AND id = $3",
    "an order": "SELECT {row} FROM task WHERE user_id = $1 AND true ORDER BY id LIMIT $3",
    "a page": "SELECT {row} FROM task WHERE user_id = $1 AND (title, id) > ($3, $4) ORDER BY title, id LIMIT $4",
    "another column": "SELECT {task}, request_hash, $2::int AS call FROM task WHERE user_id = $1 AND title = $3",
    "white space": "SELECT {row}\nFROM   task\n\n\tWHERE user_id = $1\n  AND true\n",
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


@pytest.mark.parametrize("statement", cases(REACHING | UNVOUCHED))
def test_a_statement_that_is_not_plainly_bound_to_its_caller_is_refused(
    load: Callable[[str], str], statement: str
) -> None:
    with pytest.raises(ValueError, match=r"sql/new\.sql"):
        load(statement)


@pytest.mark.parametrize("statement", cases(BOUND))
def test_a_statement_that_is_bound_to_its_caller_is_accepted(load: Callable[[str], str], statement: str) -> None:
    assert load(statement) == filled(statement)


@pytest.mark.parametrize("name", STATEMENTS)
def test_importing_the_module_fails_for_an_unbound_statement(name: str, tmp_path: Path) -> None:
    copy_program(tmp_path, {f"sql/{name}": f"SELECT {ROW}, $1::text FROM task"})
    with pytest.raises(ValueError, match=name):
        import_query_module(tmp_path)


def test_importing_an_untouched_copy_succeeds(tmp_path: Path) -> None:
    assert vars(import_query_module(copy_program(tmp_path)))["GET_TASK"] == sql.GET_TASK


@pytest.mark.parametrize("name", [*STATEMENTS, *NOT_STATEMENTS])
def test_every_file_is_read_into_one_constant_of_its_name(name: str) -> None:
    text = (ROOT / "sql" / name).read_text() if name in NOT_STATEMENTS else sql.load(name)
    assert [constant for constant, value in vars(sql).items() if value == text] == [name.removesuffix(".sql").upper()]


def test_every_method_takes_the_caller_first() -> None:
    methods = {name: method for name, method in vars(sql.Queries).items() if inspect.isfunction(method)}
    public = {name: method for name, method in methods.items() if not name.startswith("_")}
    # create_task and list_tasks send one of two statements.
    assert {f"{name}.sql" for name in public} == {*STATEMENTS} - {"get_task_by_key.sql", "list_tasks_by_status.sql"}
    for method in public.values():
        assert list(inspect.signature(method).parameters)[:2] == ["self", "user_id"]


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
def test_what_is_refused_would_reach_somebody_else(two_users: str, statement: str) -> None:
    assert asyncio.run(reaches_bob(two_users, statement))


@pytest.mark.parametrize("statement", cases(BOUND))
def test_what_is_accepted_reaches_nobody_else(two_users: str, statement: str) -> None:
    assert not asyncio.run(reaches_bob(two_users, statement))


@pytest.mark.parametrize("name", STATEMENTS)
def test_the_first_parameter_of_every_statement_is_text(two_users: str, name: str) -> None:
    async def parameters() -> list[str]:
        connection = await asyncpg.connect(two_users)
        prepared = await connection.prepare(sql.load(name))
        names = [parameter.name for parameter in prepared.get_parameters()]
        await connection.close()
        return names

    assert asyncio.run(parameters())[0] in ("text", "varchar")
