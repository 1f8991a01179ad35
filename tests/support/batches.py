"""The queries of the service on a pool of the test's own, and what is sent of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import asyncpg

import sql
from service import DEFAULTS, FIELDS
from sql import Queries
from sql.database import LOCK_TIMEOUT, Connection, apply_schema

Task = dict[str, Any]
USERS = [f"user-{number}" for number in range(1000)]


def values_of(title: str, **fields: object) -> list[object]:
    """Return what a creation of these fields is given."""
    given = DEFAULTS | {"title": title} | fields
    return [given.get(name) for name in FIELDS]


def changes_of(**fields: object) -> list[object]:
    """Return what a change of these fields is given."""
    return [part for name in FIELDS for part in (name in fields, fields.get(name))]


NEW = values_of("a task")
"""The fields of a new task, of which no test asks for more."""


@dataclass
class Message:
    """What was sent to the database at once: a statement, and the parameters of each call of it."""

    statement: str
    calls: list[tuple[Any, ...]]
    rows: int = 0
    error: str = ""


class Spy(Connection):
    """A connection of the service that notes each message."""

    sent: ClassVar[list[Message]] = []
    url: ClassVar[str] = ""

    async def fetchmany(self, query: str, args: Iterable[Any], **options: Any) -> Any:
        message = Message(query, list(args))
        self.sent.append(message)
        await self.before(message)
        try:
            rows = await super().fetchmany(query, message.calls, **options)
        except Exception as error:
            message.error = type(error).__name__
            raise
        message.rows = len(rows)
        return await self.after(message, rows)

    async def before(self, message: Message) -> None:
        """Do what a test wants before a message is sent."""

    async def after(self, message: Message, rows: list[Any]) -> list[Any]:
        """Return the rows of a message, or what a test makes of them."""
        return rows


def sizes(*statements: str) -> list[int]:
    """Return how many calls each message had, of these statements or of all."""
    return [len(message.calls) for message in Spy.sent if message.statement in statements or not statements]


def failures() -> list[str]:
    return [message.error for message in Spy.sent if message.error]


async def connect(*arguments: Any, **options: Any) -> Any:
    """Open a connection as the service does; a test may say more about it."""
    settings = {"lock_timeout": LOCK_TIMEOUT, "plan_cache_mode": "force_generic_plan"}
    settings |= options.pop("server_settings", None) or {}
    connection = await asyncpg.connect(*arguments, **options, server_settings=settings)
    await connection.set_builtin_type_codec("timestamptz", schema="pg_catalog", codec_name="int8", format="binary")
    return connection


@asynccontextmanager
async def pool_and_queries(
    url: str, connection_class: type[Spy] = Spy, *, size: int = 4, **settings: str
) -> AsyncIterator[tuple[asyncpg.Pool, Queries]]:
    options: dict[str, Any] = {"connect": connect, "connection_class": connection_class, "server_settings": settings}
    async with asyncpg.create_pool(url, min_size=0, max_size=size, **options) as pool:
        queries = Queries(pool)
        await apply_schema(pool)
        queries.schema_applied = True
        Spy.sent.clear()
        Spy.url = url
        yield pool, queries


def fields(row: asyncpg.Record | None) -> Task | None:
    """Return the task in a row, without what comes behind it."""
    return dict(zip(sql.database.COLUMNS, row, strict=False)) if row else None


async def whole_list(queries: Queries, user_id: str, completed: bool | None = None) -> list[Task | None]:
    return [fields(row) async for page in queries.list_tasks(user_id, completed) for row in page]


async def make_tasks(pool: asyncpg.Pool, users: list[str]) -> dict[str, int]:
    """Give each of the users a task; return their ids."""
    made = "INSERT INTO task (user_id, title) SELECT unnest($1::text[]), 'a task' RETURNING user_id, id"
    return {row[0]: row[1] for row in await pool.fetch(made, users)}
