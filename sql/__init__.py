"""The query module: every statement about tasks is a file of its own, whose `$1` is the caller.

A file that is not bound to `$1` fails the import. Calls raise Unavailable, TimeoutError or Refused; others are bugs.
"""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from asyncpg import Pool, PostgresError, Record

from sql import database
from sql.database import CALL_TIMEOUT, COLUMNS, Refused, Unavailable, classify, may_succeed_later

__all__ = ["CALL_TIMEOUT", "FIRST_PAGE", "Queries", "Refused", "Unavailable", "Versions"]

Versions = list[int] | None  # the updated_at that a task may have, in microseconds since 2000; None for any

MIN_PAUSE, MAX_PAUSE = 0.05, 1.0  # seconds between two tries of a call that goes alone
MAX_BATCH = 32  # calls
MAX_DELAY = 0.01  # seconds; if a batch takes longer, those that wait for its connection get another one
FIRST_PAGE, NEXT_PAGE = 50, 320  # tasks of a list; the first page shares a batch, so it is small
LONG_LISTS_AT_ONCE = 3  # per process; bounds the memory for lists of more than a page that are put together
LONE_READS_AT_ONCE = 3  # per user and statement: reads that go alone
NEWEST = (2**63 - 1, 2**63 - 1)  # a created_at and an id before the first page; this timestamp is infinity

# Patterns of a statement without its comments, literals and {task}. WHERE begins with the caller and has no OR, so that
# nothing can widen it. Only `task` is named, once. They find mistakes, not malice: a function that takes SQL passes.
BOUND = (
    r"(SELECT [^()]+ FROM task|UPDATE task SET .+|DELETE FROM task) WHERE user_id = \$1 AND .+"
    r"|INSERT INTO task \(user_id, [^()]+\) VALUES \(\$1, [^()]+\) RETURNING [^()]+"
)
KEY_CONFLICT = " ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING"
# What each has exactly once: the table, its owner, a verb, a word before a table.
ONCE = (r"\btask\b", r"\buser_id\b", r"\b(SELECT|UPDATE|DELETE|INSERT)\b", r"\b(FROM|INTO|UPDATE|JOIN|USING|TABLE)\b")
# What none has: OR, even behind a digit, comments, quoted names, escapes, `;`, braces, dollar quotes, non-ASCII.
NEVER = r"(?<![a-z_])OR\b|--|/\*|[\"\\;{]|\$[^0-9]|[^ -~]"


def load(name: str) -> str:
    """Return a statement, with the columns of a task in the place of {task}; raise ValueError unless it is bound."""
    statement = (Path(__file__).parent / name).read_text("utf-8")
    bare = re.sub(r"(?m)^--.*$|'[^'\\]*'|(?<=SELECT ){task}|(?<=RETURNING ){task}", " ", statement)
    bare = " ".join(bare.split()).replace(KEY_CONFLICT, "")
    once = all(len(re.findall(word, bare, re.IGNORECASE)) == 1 for word in ONCE)
    if not re.fullmatch(BOUND, bare) or not once or re.search(NEVER, bare, re.IGNORECASE):
        raise ValueError(f"sql/{name} could reach tasks of somebody other than $1")
    return statement.replace("{task}", ", ".join(COLUMNS))


GET_TASK, GET_TASK_BY_KEY, CREATE_TASK = load("get_task.sql"), load("get_task_by_key.sql"), load("create_task.sql")
LIST_TASKS, LIST_TASKS_BY_STATUS = load("list_tasks.sql"), load("list_tasks_by_status.sql")
UPDATE_TASK, COMPLETE_TASK, DELETE_TASK = load("update_task.sql"), load("complete_task.sql"), load("delete_task.sql")
READS = (GET_TASK, GET_TASK_BY_KEY, LIST_TASKS, LIST_TASKS_BY_STATUS)


class Call(NamedTuple):
    user_id: str
    parameters: tuple[object, ...]
    deadline: float  # by the clock of the event loop
    rows: list[Record]  # that it has got
    done: asyncio.Future[None]


class Queries:
    """The statements, each for the caller that it is given. Up to MAX_BATCH calls of one share a message, by a sender.

    A call goes alone where it would disturb others: after an error in its batch, for a further page of a list, and as a
    write of a task or key that this process is writing, or while a write of the same user and statement goes alone.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        # opentelemetry-instrument has loaded it before this program; otherwise nothing does.
        self.span = database.traced if "opentelemetry" in sys.modules else nullcontext
        self.loop = asyncio.get_running_loop()  # asking for it again is a system call before Python 3.12
        self.schema_applied = False  # until it is, all methods raise Unavailable
        self.queues: dict[str, list[Call]] = {}  # by their statement; each list is emptied by a sender of its own
        self.senders: set[asyncio.Task[None]] = set()
        # A quarter of the connections for reads that go alone, and another for such writes, which may wait for locks.
        self.lone_reads, self.lone_writes = (asyncio.Semaphore(max(1, pool.get_max_size() // 4)) for _ in range(2))
        self.many_senders = pool.get_max_size() // 2  # if there are more, each gives its connection up after a batch
        self.long_lists = asyncio.Semaphore(LONG_LISTS_AT_ONCE)
        # By (user, task id or key), (user, statement of a lone call), (user, "a list"), while they are held or awaited.
        self.semaphores: WeakValueDictionary[tuple[str, object], asyncio.Semaphore] = WeakValueDictionary()

    async def make_ready(self) -> None:
        """Apply the schema, however long the database takes to appear; then let calls through."""
        await database.apply_schema_when_possible(self.pool)
        self.schema_applied = True

    def semaphore(self, user_id: str, work: object, at_once: int = 1) -> asyncio.Semaphore:
        """Return the semaphore that lets a user do at most `at_once` of this work at a time."""
        return self.semaphores.setdefault((user_id, work), asyncio.Semaphore(at_once))

    async def get_task(self, user_id: str, task_id: int) -> Record | None:
        """Return a task, or None where the caller has none with this id."""
        return rows[0] if (rows := await self._send(GET_TASK, user_id, task_id)) else None

    async def list_tasks(self, user_id: str, completed: bool | None) -> AsyncIterator[list[Record]]:
        """Yield the caller's tasks, newest first, in pieces of FIRST_PAGE: all, or those whose `completed` is this."""
        statement, filters = (LIST_TASKS, ()) if completed is None else (LIST_TASKS_BY_STATUS, (completed,))
        size, after, more = FIRST_PAGE, NEWEST, True
        while more:
            page = await self._send(statement, user_id, *after, size, *filters, alone=after is not NEWEST)
            if more := len(page) == size:
                after, size = (page[-1]["created_at"], page[-1]["id"]), NEXT_PAGE
            while page:
                yield page[:FIRST_PAGE]  # not the whole page, so that little JSON waits for a slow client
                del page[:FIRST_PAGE]

    async def create_task(self, user_id: str, key: str | None, digest: str | None, values: list[Any]) -> Record | None:
        """Return a new task, or the one that the key has made; None if that was by another request."""
        for _ in range(3):  # the task of the key may be deleted in between
            if task := await self._write(CREATE_TASK, user_id, key, digest, *values):
                return task
            if key is None:
                raise Refused("no row and no key: a trigger has dropped it")
            if rows := await self._send(GET_TASK_BY_KEY, user_id, key, digest):
                return rows[0] if rows[0]["same_request"] else None
        raise Unavailable("the task of the key is made and deleted all the time")

    async def update_task(self, user_id: str, task_id: int, versions: Versions, changes: list[Any]) -> Record | None:
        """Change a task, given for each field, one after the other: whether to set it, and to what."""
        return await self._write(UPDATE_TASK, user_id, task_id, versions, *changes)

    async def complete_task(self, user_id: str, task_id: int, versions: Versions, value: bool | None) -> Record | None:
        """Set `completed`, or toggle it where None is given."""
        return await self._write(COMPLETE_TASK, user_id, task_id, versions, value)

    async def delete_task(self, user_id: str, task_id: int, versions: Versions) -> Record | None:
        return await self._write(DELETE_TASK, user_id, task_id, versions)

    async def _write(self, statement: str, user_id: str, target: object, *parameters: object) -> Record | None:
        # A process makes one write of a task or key at a time. One that had to wait goes alone, as it may meet a lock.
        busy = (user_id, target) in self.semaphores
        limit = asyncio.timeout(CALL_TIMEOUT) if busy else nullcontext()  # a free semaphore needs no limit
        async with limit, nullcontext() if target is None else self.semaphore(user_id, target):
            rows = await self._send(statement, user_id, target, *parameters, alone=busy)
            return rows[0] if rows else None  # if there is no such task, or none of these versions

    async def _send(self, statement: str, user_id: str, *parameters: object, alone: bool = False) -> list[Record]:
        """Return the rows of a statement for its caller, sent in a batch with others, or by itself if `alone`."""
        if not self.schema_applied:
            raise Unavailable("the schema has not been applied yet")
        is_read = may_read_again = statement in READS
        deadline, pause = self.loop.time() + CALL_TIMEOUT, 0.0
        # While a write of a user goes alone, as it has met a lock, so do the next ones: they may meet it, too.
        alone = alone or (not is_read and (user_id, statement) in self.semaphores)
        with self.span(statement):
            while True:
                call = Call(user_id, parameters, deadline, [], self.loop.create_future())
                try:
                    if alone:
                        of_user: Any = self.semaphore(user_id, statement, LONE_READS_AT_ONCE if is_read else 1)
                        of_all = self.lone_reads if is_read else self.lone_writes
                        async with asyncio.timeout_at(deadline):
                            await asyncio.sleep(pause)
                            async with of_user, of_all:
                                await self._send_queue(statement, [call])
                    elif statement in self.queues:
                        self.queues[statement].append(call)
                    else:
                        self.queues[statement] = [call]
                        self._start_sender(statement, self.queues[statement])
                    await call.done
                    return call.rows
                except Exception as error:
                    # An SQL error has rolled the batch back, so even a write is sent again, alone: if it was in a
                    # batch, or met a lock. After Connection.sending's ConnectionError nobody knows: reads go again.
                    send_again = isinstance(error, PostgresError) and (not alone or may_succeed_later(error))
                    read_again = isinstance(error, ConnectionError) and may_read_again
                    if not send_again and not read_again:
                        raise classify(error) from None
                    may_read_again = may_read_again and not read_again
                    pause, alone = min(2 * pause or MIN_PAUSE, MAX_PAUSE) if alone else 0.0, True
                finally:
                    of_user = None  # an error keeps this frame until garbage is collected

    def _start_sender(self, statement: str, queue: list[Call]) -> None:
        sender = self.loop.create_task(self._send_queue(statement, queue))
        self.senders.add(sender)
        sender.add_done_callback(self.senders.discard)

    def _hand_over_queue(self, statement: str, queue: list[Call]) -> None:
        """Take a queue from its sender, if it still has one, and let another sender send what is left of it."""
        if self.queues.get(statement) is queue:
            del self.queues[statement]
            if queue:
                self.queues[statement] = queue.copy()
                queue.clear()  # which ends the loop of the old sender
                self._start_sender(statement, self.queues[statement])

    async def _send_queue(self, statement: str, queue: list[Call]) -> None:
        """Send calls over one connection, in batches, until none are left, others need it, or a batch fails."""
        connection: Any = None  # a database.Connection
        held: list[object] = []  # semaphores of what the batch writes, for the next writes to see even after a hang-up
        try:
            while queue:
                if len(self.senders) > 1:  # while the database is busy, let more requests come into the batch
                    await asyncio.sleep(0)
                batch, queue[:MAX_BATCH] = queue[:MAX_BATCH], []
                deadline = min(call.deadline for call in batch)
                timer = self.loop.call_later(MAX_DELAY, self._hand_over_queue, statement, queue)
                if not connection:
                    async with asyncio.timeout_at(deadline):
                        connection = await self.pool.acquire()
                if statement not in READS:  # by user and id or key: batches lock rows in one order, so never deadlock
                    batch.sort(key=lambda call: (call.user_id, str(call.parameters[0])))
                    held[:] = [self.semaphores.get((call.user_id, call.parameters[0])) for call in batch]
                batch = [call for call in batch if not call.done.done()]  # it is done if the request was cancelled
                parameters = [(call.user_id, number, *call.parameters) for number, call in enumerate(batch)]
                seconds = deadline - self.loop.time()
                async with connection.sending(seconds, 0 if statement in READS else len(batch)):
                    # One transaction: its statement is executed for each call with its own $1. With none it stays open.
                    rows = await connection.fetchmany(statement, parameters, timeout=seconds) if batch else []
                for row in rows:
                    call = batch[row["call"]]
                    if row["user_id"] != call.user_id:
                        raise RuntimeError("a statement has returned a row of somebody else")
                    call.rows.append(row)
                for call in batch:
                    if not call.done.done():
                        call.done.set_result(None)
                timer.cancel()
                if len(self.senders) > self.many_senders:
                    break  # another one may wait for this connection
        except Exception as error:
            if database.shows_outdated(connection, error):
                await self.pool.expire_connections()  # the other connections are as old
            rest = [call for call in batch if not call.done.done()]
            if isinstance(error, PostgresError) and 0 < len(rest) < len(batch):
                return self._start_sender(statement, rest)  # the error may be due to one whose client has hung up
            for call in rest:
                call.done.set_exception(error)
                call.done.exception()  # or asyncio would complain if the caller has just been cancelled
        finally:
            held.clear()
            if not queue:  # now, so that the next call starts a sender at once
                self._hand_over_queue(statement, queue)
            if connection:
                release = database.release(self.pool, connection)
                # A lone call may be cancelled meanwhile, and asyncpg log a traceback. Nobody cancels a sender.
                await (release if asyncio.current_task() in self.senders else asyncio.shield(release))
            self._hand_over_queue(statement, queue)  # if there is a rest: those who wait get the connection before it
