"""The query module: the rule that binds every statement to its caller, and what is sent by that rule."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import asyncpg
import pytest

import sql
from tests.service_process import ROOT

NOT_STATEMENTS = {"schema.sql", "task.sql"}
STATEMENTS = sorted(file.name for file in (ROOT / "sql").glob("*.sql") if file.name not in NOT_STATEMENTS)


def copy_query_module(folder: Path, changed: dict[str, str] | None = None) -> Path:
    """Copy `sql/` into a folder, with another text in some of its files; return the copy."""
    copy = shutil.copytree(ROOT / "sql", folder / "sql", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (changed or {}).items():
        (copy / name).write_text(text)
    return copy


def import_query_module(copy: Path) -> ModuleType:
    """Import a copy under a name of its own, beside the real one."""
    spec = importlib.util.spec_from_file_location(f"sql_{uuid.uuid4().hex}", copy / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A function that puts a statement into a copy of the folder and loads it there."""
    copy = copy_query_module(tmp_path_factory.mktemp("query_module"))
    module = import_query_module(copy)

    def load(statement: str) -> str:
        (copy / "new.sql").write_text(statement)
        loaded: str = module.load("new.sql")
        return loaded

    return load


# The one conflict that the rule knows, for an INSERT of a row with this key.
SAME_KEY = """
    ON CONFLICT (user_id, split_part(idempotency_key, ' ', 1)) WHERE idempotency_key IS NOT NULL
    DO UPDATE SET idempotency_key = excluded.idempotency_key
    WHERE task.idempotency_key = excluded.idempotency_key
"""
KEYED = f"INSERT INTO task (user_id, title, idempotency_key) VALUES ($1, 'x', 'his hash') {SAME_KEY}"
KEYED_AGAIN = KEYED.replace("his hash", "hers hash")

# Each of these, sent for alice, shows or changes what is bob's: shown below on a database.
REACHING = {
    "no predicate": "SELECT {task}, $1::text FROM task",
    "another predicate": "SELECT {task} FROM task WHERE $1::text IS NOT NULL AND id = $2",
    "an id instead of the caller": "SELECT {task}, $1::text FROM task WHERE id = $2",
    "another column": "SELECT {task} FROM task WHERE title <> $1",
    "another parameter": "SELECT {task}, $1::text FROM task WHERE user_id = $2::text",
    "a constant": "SELECT {task}, $1::text FROM task WHERE user_id = 'bob'",
    "the column itself": "SELECT {task}, $1::text FROM task WHERE user_id = user_id",
    "a comparison that is wider": "SELECT {task} FROM task WHERE user_id >= $1",
    "a pattern": "SELECT {task} FROM task WHERE user_id NOT LIKE $1",
    "not": "SELECT {task} FROM task WHERE NOT user_id = $1",
    "not null": "SELECT {task}, $1::text FROM task WHERE user_id IS NOT NULL",
    "negated in parentheses": "SELECT {task} FROM task WHERE NOT (user_id = $1 AND true)",
    "compared with a truth": "SELECT {task} FROM task WHERE (user_id = $1) IS NOT NULL",
    "or": "SELECT {task} FROM task WHERE user_id = $1 OR id = $2",
    "or in lower case": "SELECT {task} FROM task WHERE user_id = $1 or true",
    "or in front": "SELECT {task} FROM task WHERE true OR user_id = $1",
    "or behind an and": "SELECT {task} FROM task WHERE user_id = $1 AND true = true OR true",
    "or on a line of its own": "SELECT {task} FROM task WHERE user_id = $1 AND id = $2\nOR\ntrue",
    "or behind what only looks like a comment": "SELECT {task} FROM task WHERE user_id = $1 AND '--' <> '' OR true",
    "or behind an escaped quote": r"SELECT {task} FROM task WHERE user_id = $1 AND title <> E'\'' OR title <> ''",
    "a line comment": "SELECT {task}, $1::text FROM task -- WHERE user_id = $1",
    "a line comment before a condition": "SELECT {task} FROM task\n-- WHERE user_id = $1 AND\nWHERE $1 <> title",
    "a block comment": "SELECT {task} FROM task /* WHERE user_id = $1 AND */ WHERE $1 <> title",
    "a block comment at the end": "SELECT {task} FROM task WHERE $1 <> title /* WHERE user_id = $1 AND */",
    "a literal": "SELECT {task} FROM task WHERE title <> 'WHERE user_id = $1 AND ' || $1",
    "a dollar-quoted literal": "SELECT {task} FROM task WHERE title <> $q$WHERE user_id = $1 AND $q$ || $1",
    "an update within a literal": (
        "SELECT 'UPDATE task SET ', (SELECT json_agg(title) FROM task AS t), 'it WHERE user_id = $1 AND ', $1::text"
    ),
    "an alias in quotes": 'SELECT {task} AS "WHERE user_id = $1 AND ", $1::text FROM task',
    "a filter": "SELECT json_agg(title), count(*) FILTER (WHERE user_id = $1 AND completed) FROM task",
    "a union": "SELECT {task} FROM task WHERE user_id = $1 UNION ALL SELECT {task} FROM task",
    "a union with the schema named": "SELECT title FROM task WHERE user_id = $1 UNION SELECT title FROM public.task",
    "a union with quotes": 'SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM "task"',
    "a union with no space": 'SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM"task"',
    "a union with a comment": "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM/**/task",
    "a union with TABLE": (
        "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT all_of_it.title FROM (TABLE task) AS all_of_it"
    ),
    "ONLY": "SELECT title FROM task WHERE user_id = $1 AND true UNION SELECT title FROM ONLY task",
    "a join": "SELECT theirs.title FROM task JOIN task AS theirs ON true WHERE task.user_id = $1",
    "a join with other names": "SELECT mine FROM task CROSS JOIN task AS mine (owner) WHERE user_id = $1",
    "two tables": "SELECT theirs.title FROM task AS theirs, task AS mine WHERE mine.user_id = $1",
    "two tables with other names": "SELECT theirs FROM task AS mine, task AS theirs (owner) WHERE user_id = $1",
    "two tables in parentheses": "SELECT theirs FROM (task CROSS JOIN task AS theirs (owner)) WHERE user_id = $1",
    "a subselect": "SELECT (SELECT json_agg(title) FROM task) FROM task WHERE user_id = $1",
    "a subselect in the predicate": "SELECT {task} FROM task WHERE id IN (SELECT id + 1 FROM task WHERE user_id = $1)",
    "a subselect over TABLE": "SELECT (SELECT json_agg(t) FROM (TABLE task) AS t) FROM task WHERE user_id = $1",
    "the predicate of a subselect": (
        "SELECT {task} FROM task WHERE (SELECT true FROM (VALUES ($1)) AS me (user_id) WHERE user_id = $1 AND true)"
    ),
    "a CTE": "WITH everyone AS (SELECT * FROM task) SELECT {task}, $1::text FROM everyone",
    "a CTE beside a bound one": (
        "WITH mine AS (SELECT id FROM task WHERE user_id = $1) SELECT {task} FROM task WHERE id NOT IN (TABLE mine)"
    ),
    "a CTE that is called like the table": (
        "WITH task AS (SELECT $1::text AS user_id, title FROM (TABLE task) AS t) "
        "SELECT title FROM task WHERE user_id = $1"
    ),
    "UPDATE without a predicate": "UPDATE task SET title = $1",
    "UPDATE by the id": "UPDATE task SET title = $1 WHERE id = $2",
    "UPDATE with the predicate in a literal": "UPDATE task SET title = 'WHERE user_id = $1 AND ' || $1",
    "UPDATE with the predicate in a comment": "UPDATE task SET title = $1 /* WHERE user_id = $1 AND */",
    "UPDATE with the predicate in a subselect": (
        "UPDATE task SET title = coalesce((SELECT 'mine' WHERE user_id = $1 AND true), 'x')"
    ),
    "UPDATE with the predicate in a subselect in lower case": (
        "UPDATE task SET title = coalesce((select 'mine' WHERE user_id = $1 AND true), 'x')"
    ),
    "UPDATE ... FROM": "UPDATE task SET title = 'x' FROM task AS mine WHERE mine.user_id = $1",
    "UPDATE ... FROM a bound subselect": (
        "UPDATE task SET title = 'x' FROM (SELECT FROM task WHERE user_id = $1 AND true) AS mine"
    ),
    "UPDATE that gives a task away": "UPDATE task SET user_id = 'bob' WHERE user_id = $1",
    "UPDATE that takes a task over": "UPDATE task SET user_id = $1 WHERE id = $2",
    "DELETE without a predicate": "DELETE FROM task RETURNING $1::text",
    "DELETE by the id": "DELETE FROM task WHERE id = $2 RETURNING $1::text",
    "DELETE ... USING": "DELETE FROM task USING task AS mine WHERE mine.user_id = $1",
    "DELETE ... USING a bound subselect": (
        "DELETE FROM task USING (SELECT user_id AS me FROM task WHERE user_id = $1 "
        "AND EXISTS (SELECT WHERE user_id = $1 AND true)) AS mine WHERE me IS NOT NULL"
    ),
    "INSERT for somebody else": "INSERT INTO task (user_id, title) VALUES ('bob', $1)",
    "INSERT for another parameter": "INSERT INTO task (title, user_id) VALUES ($1, 'bob')",
    "INSERT for what is made of the caller": "INSERT INTO task (user_id, title) VALUES (left($1, 1), 'x')",
    "INSERT of a second row": "INSERT INTO task (user_id, title) VALUES ($1, 'x'), ('bob', 'x')",
    "INSERT of a second row by a union": "INSERT INTO task (user_id, title) VALUES ($1, 'x') UNION SELECT 'bob', 'x'",
    "INSERT ... SELECT": "INSERT INTO task (user_id, title) SELECT user_id, $1 FROM task",
    "INSERT that returns everything": (
        "INSERT INTO task (user_id, title) VALUES ($1, 'x') RETURNING (SELECT json_agg(t) FROM (TABLE task) AS t)"
    ),
    "INSERT that gives a task away": (
        "INSERT INTO task (user_id, id, title) VALUES ($1, 1, 'x')"
        " ON CONFLICT (user_id, id) DO UPDATE SET user_id = 'bob'"
    ),
    "INSERT that gives the task of its key away": KEYED_AGAIN.replace("SET ", "SET user_id = 'bob ' || task.id, "),
    "INSERT with a key that returns everything": f"{KEYED} RETURNING (SELECT json_agg(t) FROM (TABLE task) AS t)",
    "INSERT of a second row with a key": KEYED.replace("'his hash')", "'his hash'), ('bob', 'x', 'new hash')"),
    "INSERT with a key for somebody else": KEYED.replace("$1, 'x'", "'bob', $1") + "RETURNING {task}",
    "MERGE": "MERGE INTO task USING (VALUES ($1)) AS me (name) ON user_id <> name WHEN MATCHED THEN DELETE",
}  # fmt: skip

# These reach nobody else. They are refused because the rule knows one way to write each thing.
UNVOUCHED = {
    "no table": "SELECT $1::text",
    "nothing": "-- WHERE user_id = $1",
    "another table": "SELECT $1::text FROM pg_class",
    "another table by TABLE": "SELECT {task} FROM task WHERE user_id = $1 AND EXISTS (TABLE pg_class)",
    "another table beside": "SELECT {task} FROM task WHERE user_id = $1 AND EXISTS (SELECT FROM pg_class)",
    "lower case": "select {task} from task where user_id = $1",
    "lower case in the predicate": "SELECT {task} FROM task where user_id = $1",
    "parentheses": "SELECT {task} FROM task WHERE (user_id = $1)",
    "a condition before": "SELECT {task} FROM task WHERE id = $2 AND user_id = $1",
    "the other way round": "SELECT {task} FROM task WHERE $1 = user_id",
    "a cast": "SELECT {task} FROM task WHERE user_id = $1::text",
    "parameter ten and more": "SELECT {task} FROM task WHERE user_id = $10",
    "the schema named": "SELECT {task} FROM public.task WHERE user_id = $1",
    "a semicolon": "DELETE FROM task WHERE user_id = $1; DELETE FROM task",
    "a conflict whose condition is wider": f"{KEYED} OR true RETURNING id",
    "a conflict with another condition": KEYED.replace("task.idempotency_key = excluded.idempotency_key", "true"),
    "a conflict with another change": KEYED.replace("SET ", "SET title = excluded.title, "),
    "a conflict of everybody's keys": KEYED.replace("ON CONFLICT (user_id, ", "ON CONFLICT ("),
    "a conflict in lower case": KEYED.replace("ON CONFLICT", "on conflict"),
    "another conflict": "INSERT INTO task (user_id, id) VALUES ($1, 1) ON CONFLICT (user_id, id) DO NOTHING",
    "INSERT without the caller": "INSERT INTO task (title) VALUES ($1)",
    "INSERT with the caller last": "INSERT INTO task (title, user_id) VALUES ($2, $1)",
    "TRUNCATE": "TRUNCATE task",
}

BOUND = {
    "the predicate alone": "SELECT {task} FROM task WHERE user_id = $1",
    "a further condition": "SELECT {task} FROM task WHERE user_id = $1 AND NOT completed",
    "an order": "SELECT {task} FROM task WHERE user_id = $1 ORDER BY id",
    "white space": "SELECT {task}\nFROM   task\n\n\tWHERE user_id = $1\n",
    "a comment with an or in it": "-- One task, or none.\nSELECT {task} FROM task WHERE user_id = $1",
    "a change": "UPDATE task SET title = $2 WHERE user_id = $1 AND id = $3 RETURNING {task}",
    "a removal": "DELETE FROM task WHERE user_id = $1 RETURNING id",
    "a new row": "INSERT INTO task (user_id, title) VALUES ($1, $2) RETURNING id",
    "a new row with a key": KEYED,
    "a new row with a key that is returned": f"{KEYED} RETURNING {{task}}, id",
    "a row that is found by its key": f"{KEYED_AGAIN} RETURNING {{task}}, id",
    "a subselect": (
        "SELECT json_agg(item) FROM (SELECT {task} AS item FROM task WHERE user_id = $1 ORDER BY id) AS items"
    ),
}  # fmt: skip


def cases(statements: dict[str, str]) -> list[object]:
    return [pytest.param(statement, id=name) for name, statement in statements.items()]


@pytest.mark.parametrize("statement", cases(REACHING | UNVOUCHED))
def test_a_statement_that_is_not_plainly_bound_to_its_caller_is_refused(
    load: Callable[[str], str], statement: str
) -> None:
    with pytest.raises(ValueError, match=r"sql/new\.sql"):
        load(statement)


@pytest.mark.parametrize("statement", cases(BOUND))
def test_a_statement_that_is_bound_to_its_caller_is_accepted(load: Callable[[str], str], statement: str) -> None:
    assert load(statement).endswith(statement.rpartition("{task}")[2])


@pytest.mark.parametrize("name", STATEMENTS)
def test_importing_the_module_fails_for_an_unbound_statement(name: str, tmp_path: Path) -> None:
    copy = copy_query_module(tmp_path, {name: "SELECT {task}, $1::text FROM task"})
    with pytest.raises(ValueError, match=name):
        import_query_module(copy)


@pytest.mark.parametrize("text", ["(SELECT max(title) FROM task)", "1 - (select 1)", "ARRAY(TABLE task)"])
def test_importing_the_module_fails_where_what_is_filled_in_reads_a_table(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.sql"):
        import_query_module(copy_query_module(tmp_path, {"task.sql": f"-- A comment.\n{text}\n"}))


def test_importing_an_untouched_copy_succeeds(tmp_path: Path) -> None:
    assert vars(import_query_module(copy_query_module(tmp_path)))["GET_TASK"] == sql.GET_TASK


@pytest.mark.parametrize("name", [*STATEMENTS, "schema.sql"])
def test_every_file_is_read_into_one_constant_of_its_name(name: str) -> None:
    text: object = sql.read(name) if name in NOT_STATEMENTS else sql.load(name)
    if name == "list_tasks.sql":
        text = {status: sql.load(name, status) for status in sql.STATUSES}
    assert [constant for constant, value in vars(sql).items() if value == text] == [name.removesuffix(".sql").upper()]


def test_every_method_takes_the_caller_first() -> None:
    methods = {name: method for name, method in vars(sql.Queries).items() if inspect.isfunction(method)}
    public = {name: method for name, method in methods.items() if not name.startswith("_")}
    del public["apply_schema"]  # it makes the table and touches nobody's rows
    assert {f"{name}.sql" for name in public} == set(STATEMENTS)
    for method in public.values():
        assert list(inspect.signature(method).parameters)[:2] == ["self", "user_id"]


# --- On a database: alice and bob have a task each -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_users(new_database: Callable[[], str]) -> str:
    """The URL of a database in which alice and bob have a task each, made with a key."""
    url = new_database()

    async def fill() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(sql.SCHEMA)
        await connection.execute(
            "INSERT INTO task (user_id, title, idempotency_key)"
            " VALUES ('alice', 'hers', 'hers hash'), ('bob', 'a secret', 'his hash')"
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
    prepared = await connection.prepare(sql.fill(statement))
    values = {"text": "bob", "int8": before[0]["task"]["id"]}
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
