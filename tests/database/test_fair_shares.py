"""Whoever asks for much takes the connections and the turns from nobody else: long lists, many calls of one kind."""

from __future__ import annotations

import asyncio
import gc
from typing import ClassVar

import pytest

import sql
from sql import Refused
from tests.support.batches import NEW, USERS, Message, Spy, make_tasks, pool_and_queries, sizes, values_of, whole_list
from tests.support.waiting import wait_in_loop_until


def test_a_list_that_has_grown_long_shares_a_message_with_its_first_page_only(database_url: str) -> None:
    """The others in that message wait for at most a page of it."""

    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            users = USERS[:31]
            await make_tasks(pool, [*users, "long"])
            for count in (1, 10_000):
                Spy.sent.clear()
                long = asyncio.create_task(whole_list(queries, "long"))
                lists = await asyncio.gather(*(whole_list(queries, user_id) for user_id in users))
                assert [len(each) for each in lists] == [1] * 31
                assert long.done() == (count == 1)
                assert len(await long) == count
                first, *further = Spy.sent
                assert (len(first.calls), first.rows) == (32, 31 + min(count, sql.FIRST_PAGE))
                pages = -(-(10_000 - sql.FIRST_PAGE + 1) // sql.NEXT_PAGE) if count > 1 else 0
                assert {len(message.calls) for message in further} <= {1}
                assert len(further) == pages
                assert all(message.rows <= sql.NEXT_PAGE for message in further)
                await pool.execute(
                    "INSERT INTO task (user_id, title) SELECT 'long', 'x' FROM generate_series(2, 10000)"
                )

    asyncio.run(check())


class Slow(Spy):
    """A connection on which each further page of a list takes its time, and that counts how many are in flight."""

    pages: ClassVar[int] = 0
    most_pages: ClassVar[int] = 0

    async def before(self, message: Message) -> None:
        if message.statement == sql.LIST_TASKS and message.calls[0][4] == sql.NEXT_PAGE:
            Slow.pages += 1
            Slow.most_pages = max(self.most_pages, self.pages)
            await asyncio.sleep(0.05)
            Slow.pages -= 1


def test_long_lists_take_at_most_a_quarter_of_the_pool_whatever_waits_for_locks(database_url: str) -> None:
    async def check() -> None:
        Slow.pages = Slow.most_pages = 0
        async with pool_and_queries(database_url, Slow, size=8) as (pool, queries):
            long = [f"long-{number}" for number in range(12)]
            fill = "INSERT INTO task (user_id, title) SELECT unnest($1::text[]), 'x' FROM generate_series(1, 2000)"
            await pool.execute(fill, long)
            lists = [asyncio.create_task(whole_list(queries, user_id)) for user_id in long]
            await wait_in_loop_until(lambda: Slow.pages == 2)
            for user_id in USERS[:20]:
                assert await queries.get_task(user_id, 1) is None
            assert not any(each.done() for each in lists)
            async with queries.lone_writes, queries.lone_writes:  # both of their places
                assert [len(each) for each in await asyncio.gather(*lists)] == [2000] * 12
            assert Slow.most_pages == 2  # of the eight connections

    asyncio.run(check())


def test_what_one_user_does_at_once_is_in_front_of_no_page_of_another(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url) as (pool, queries):
            fill = "INSERT INTO task (user_id, title) SELECT $1, 'x' FROM generate_series(1, $2::int) RETURNING id"
            ids = [row["id"] for row in await pool.fetch(fill, "alice", 2000)]
            await pool.execute(fill, "bob", 400)
            busy: list[asyncio.Task[object]] = [asyncio.create_task(whole_list(queries, "alice")) for _ in range(40)]
            for _ in range(4):
                busy += [asyncio.create_task(queries.complete_task("alice", id, None, None)) for id in ids[:20]]
            await wait_in_loop_until(lambda: any(message.calls[0][-1] == sql.NEXT_PAGE for message in Spy.sent))
            before = len(Spy.sent)
            assert len(await whole_list(queries, "bob")) == 400
            assert sum(message.calls[0][0] == "alice" for message in Spy.sent[before:]) < 30
            assert not all(each.done() for each in busy)
            await asyncio.gather(*busy)

    asyncio.run(check())


def test_a_pool_of_one_connection_serves_each_statement_however_many_wait_for_another(database_url: str) -> None:
    async def check() -> None:
        async with pool_and_queries(database_url, size=1) as (_, queries):
            finished = False

            async def ask_again_and_again(number: int) -> None:
                while not finished:
                    await queries.get_task("alice", number)

            asking = [asyncio.create_task(ask_again_and_again(number)) for number in range(100)]
            await wait_in_loop_until(lambda: len(Spy.sent) > 10)
            before = len(Spy.sent)
            assert await whole_list(queries, "bob") == []
            assert len(Spy.sent) - before < 10
            finished = True
            await asyncio.gather(*asking)

    asyncio.run(check())


def test_after_writes_that_went_alone_those_of_their_users_share_messages_again(database_url: str) -> None:
    """At once: it may take the garbage collector a minute to find what an error has kept."""

    async def check() -> None:
        async with pool_and_queries(database_url) as (_, queries):
            gc.disable()
            try:
                good = asyncio.create_task(queries.create_task("user-1", None, None, NEW))
                with pytest.raises(Refused):
                    await queries.create_task("user-2", None, None, values_of(" "))
                await good
                assert sizes() == [2, 1, 1]
                Spy.sent.clear()
                again = (queries.create_task(user_id, None, None, NEW) for user_id in ("user-1", "user-2"))
                await asyncio.gather(*again)
                assert sizes() == [2]
            finally:
                gc.enable()

    asyncio.run(check())
