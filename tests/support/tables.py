"""Tables of the service and of others, and what the catalogue says of them."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import asyncpg
import psycopg
import pytest
from psycopg import sql

from sql.database import LOCK_TIMEOUT
from sql.database import apply_schema as apply_on
from tests.support.database import execute
from tests.support.service_process import ROOT

VERSION_1_0 = (ROOT / "tests" / "support" / "version_1_0.sql").read_text()

BLANK = "".join(character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace())

BEYOND_A_LIMIT: list[tuple[str, dict[str, Any]]] = [
    *(("task_user_id", {"user_id": text}) for text in ("", "x" * 256)),
    *(("task_id", {"id": number}) for number in (0, -1)),
    *(("task_title", {"title": text}) for text in ("", BLANK, "x" * 201, " " * 200 + "x")),
    ("task_description", {"description": "x" * 2001}),
    *((f"task_{column}", {column: moment})
      for column in ("created_at", "updated_at")
      for moment in ("infinity", "9999-12-31 23:59:59.999999Z", "10000-01-01 00:00Z",
                     "-infinity", "0001-01-01 00:00Z", "0001-12-31 23:59:59.999999Z BC")),
]  # fmt: skip


def apply_schema(url: str, **settings: str) -> None:
    """Apply the schema as the service does, whose connections wait 50 ms for a lock."""

    async def apply() -> None:
        server_settings = {"lock_timeout": LOCK_TIMEOUT} | settings
        async with asyncpg.create_pool(url, min_size=0, max_size=1, server_settings=server_settings) as pool:
            await apply_on(pool)

    asyncio.run(apply())


def make(url: str, tables: str) -> None:
    """Make the tables, and apply the schema to them."""
    execute(url, tables)
    apply_schema(url)


def insert(connection: psycopg.Connection[tuple[Any, ...]], fields: dict[str, Any]) -> None:
    """Insert a task as another program would."""
    row = {"user_id": "alice", "title": "a task"} | fields
    statement = sql.SQL("INSERT INTO task ({}) VALUES ({})").format(
        sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join(map(sql.Literal, row.values()))
    )
    connection.execute(statement)


def columns(url: str) -> dict[str, list[Any]]:
    """Return the type of each column, whether it may be null, its default, and how it is generated."""
    properties = "column_name, data_type, is_nullable, column_default, identity_generation"
    rows = execute(url, f"SELECT {properties} FROM information_schema.columns WHERE table_name = 'task'")
    return {name: rest for name, *rest in rows}


def checks(url: str) -> set[str]:
    """Return the names of the table's check constraints."""
    names = "SELECT conname FROM pg_constraint WHERE conrelid = 'task'::regclass AND contype = 'c'"
    return {name for (name,) in execute(url, names)}


def indexes(url: str, table: str = "task") -> set[str]:
    """Return the definitions of a table's indexes, without their names."""
    definitions = execute(url, f"SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = '{table}'::regclass")
    return {definition.partition(" ON ")[2] for (definition,) in definitions}


COLUMNS = {
    "user_id": ["text", "NO", None, None],
    "title": ["text", "NO", None, None],
    "description": ["text", "YES", None, None],
    "completed": ["boolean", "NO", "false", None],
    "created_at": ["timestamp with time zone", "NO", "now()", None],
    "updated_at": ["timestamp with time zone", "NO", "now()", None],
    "idempotency_key": ["text", "YES", None, None],
    "request_hash": ["text", "YES", None, None],
}
CHECKS = {"task_user_id", "task_id", "task_title", "task_description", "task_created_at", "task_updated_at"}
INDEXES = {
    "public.task USING btree (user_id, created_at DESC, id DESC)",
    "public.task USING btree (user_id, completed, created_at DESC, id DESC)",
    "public.task USING btree (user_id, idempotency_key) WHERE (idempotency_key IS NOT NULL)",
}


def fingerprint(url: str) -> list[tuple[Any, ...]]:
    """Return what differs as soon as the table is rewritten or anything of it is made anew."""
    return execute(
        url,
        """
        SELECT 'table', oid, relfilenode::text, relnatts::text FROM pg_class WHERE oid = 'task'::regclass
        UNION ALL
        SELECT 'column', attnum, attname, concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, atthasdef)
        FROM pg_attribute WHERE attrelid = 'task'::regclass
        UNION ALL
        SELECT 'constraint', oid, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE conrelid = 'task'::regclass
        UNION ALL
        SELECT 'index', indexrelid, '', pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'task'::regclass
        UNION ALL
        SELECT 'trigger', oid, tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = 'task'::regclass
        UNION ALL
        SELECT 'row', 0, '', task::text FROM task
        ORDER BY 1, 2, 3, 4
        """,
    )


def old_table(*, nullable: bool = False) -> str:
    """Return the statements by which SQLModel makes the table of the old backend, or a laxer relative of it."""
    null = "" if nullable else "NOT NULL"
    return f"""
        CREATE TABLE task (
            id SERIAL NOT NULL,
            user_id VARCHAR(255) {null},
            title VARCHAR(200) {null},
            description VARCHAR(2000),
            completed BOOLEAN {null},
            created_at TIMESTAMP WITHOUT TIME ZONE {null},
            updated_at TIMESTAMP WITHOUT TIME ZONE {null},
            PRIMARY KEY (id)
        );
        CREATE INDEX ix_task_user_id ON task (user_id);
    """


MANY_ROWS = """
    INSERT INTO task (user_id, title, description, completed, created_at, updated_at)
    SELECT 'user-' || n % 50, 'task ' || n, nullif('x', repeat('x', n % 2)), n % 3 = 0, moment, moment + n * '1 s'::interval
    FROM (SELECT n, '2024-01-01'::timestamp + n * '97 min 0.000001 s'::interval AS moment FROM generate_series(1, 5000) AS n)
        AS numbered;
"""  # noqa: E501

WITHOUT_KEYS = "ALTER TABLE task DROP COLUMN idempotency_key; DROP INDEX task_pending_idx;"
"""Makes the table of version 1.0 that which it had before it knew keys."""

TABLES = {
    "fresh": "",
    "old": old_table(),
    "old, nullable": old_table(nullable=True),
    "1.0": VERSION_1_0,
    "1.0, adopted": old_table() + VERSION_1_0,
    "1.0, without keys": VERSION_1_0 + WITHOUT_KEYS,
    "1.0, adopted, without keys": old_table() + VERSION_1_0 + WITHOUT_KEYS,
}
"""What the schema may find, as the statements by which that was made."""


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test with each of these TABLES."""
    return pytest.mark.parametrize("tables", [TABLES[name] for name in names], ids=names)
