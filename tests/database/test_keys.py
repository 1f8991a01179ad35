"""How a key is found again: with two statements, whatever it came with, and in spite of deletions in between."""

from __future__ import annotations

import asyncio

import pytest

import sql
from sql.database import Unavailable
from tests.support.batches import NEW, Message, Spy, pool_and_queries


class Deleting(Spy):
    """A connection on which the task of a key is deleted whenever it is about to be looked for."""

    async def before(self, message: Message) -> None:
        if message.statement == sql.GET_TASK_BY_KEY:
            await self.execute("DELETE FROM task")
            await self.execute("INSERT INTO task (user_id, title) VALUES ('alice', 'another')")

    async def after(self, message: Message, rows: list[object]) -> list[object]:
        if message.statement == sql.GET_TASK_BY_KEY:
            await self.execute(
                "INSERT INTO task (user_id, title, idempotency_key, request_hash) VALUES ('alice', 'x', 'key', 'hash')"
            )
        return rows


def test_a_key_that_came_with_another_request_takes_two_statements(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (_, queries):
            task = await queries.create_task("alice", "key", "hash", NEW)
            assert task
            Spy.sent.clear()
            assert await queries.create_task("alice", "key", "another hash", NEW) is None
            assert [message.statement for message in Spy.sent] == [sql.CREATE_TASK, sql.GET_TASK_BY_KEY]
            again = await queries.create_task("alice", "key", "hash", NEW)
            assert again
            assert again["id"] == task["id"]

    asyncio.run(check())


def test_a_key_whose_task_is_made_and_deleted_all_the_time_is_not_said_to_be_another_requests(
    database_url: str,
) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, Deleting) as (pool, queries):
            await pool.execute(
                "INSERT INTO task (user_id, title, idempotency_key, request_hash) VALUES ('alice', 'x', 'key', 'hash')"
            )
            with pytest.raises(Unavailable, match="made and deleted"):
                await queries.create_task("alice", "key", "hash", NEW)

    asyncio.run(check())
