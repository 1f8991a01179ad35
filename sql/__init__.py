"""The query module: each statement about tasks is a `.sql` file, whose `$1` is the caller.

`Queries` takes the caller as the first argument of each. Importing this module raises ValueError if a statement is not
bound to `$1` in one of the ways that `load` knows, so who may see what is settled here.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import weakref
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import asyncpg

FOLDER = Path(__file__).parent

ACQUIRE_TIMEOUT = 5.0  # seconds that a request waits for a connection; two tries of a read, all in all, take under 30
COMMAND_TIMEOUT = 8.0  # seconds that a statement may take, a wait for a locked row included
TURN_TIMEOUT = 2.0  # seconds that a statement waits for others before it may wait for a connection
TOGETHER = 32  # calls that share a message at most, so that more at once are spread over several connections
ENOUGH = 16  # calls that go at once, even where a message of their statement is under way
PATIENCE = 0.01  # seconds that fewer wait for that message to come back
SHORT_LIST = 16_384  # bytes of a list that may share a message with others, which have to wait for it
KNOWN_LISTS = 4096  # that are remembered as short, at most
HELD_LONG = 4  # connections that may wait for locks, if that is half of the pool; as many serve a user's long lists
SCHEMA_TIMEOUT = 3600.0  # seconds that applying the schema may take: adopting a large table rewrites it

CONNECTION_LOST = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""What a statement raises on a connection that died in the pool, depending on when the death is noticed."""


# The rule for a statement, or for its text without comments, literals, and what is filled in. It knows one way to write
# each thing and refuses the rest. The caller is named right behind FROM task or the SET of an UPDATE, or in the one row
# of an INSERT.
BOUND = (
    r"(FROM task|UPDATE task SET ((?!(?i:SELECT)).)*) WHERE user_id = \$1( AND | ORDER BY | RETURNING |$)"
    r"|INTO task \(user_id, [^()]*\) VALUES \(\$1, [^()]*\)( RETURNING |$)"
)
# No other table is read, and no other user named.
NAMED_ONCE = ("task", "user_id", r"\b(FROM|JOIN|USING|INTO|TABLE|UPDATE)\b(?! \()")
# An OR could widen the WHERE; the others could hide something from this rule.
NEVER = r"(?<![a-z_])OR\b|--|/\*|[\"\\;]|\$\D"
# An INSERT may end in this, which finds a row of the same user.
SAME_KEY = (
    " ON CONFLICT (user_id, split_part(idempotency_key, , 1)) WHERE idempotency_key IS NOT NULL"
    " DO UPDATE SET idempotency_key = excluded.idempotency_key WHERE task.idempotency_key = excluded.idempotency_key"
)

# What stands in the other files in {braces}, beside {task}, which is task.sql.
# {version}: which state of a task it is, for If-Match. Its updated_at, as clients see it.
VERSION = """coalesce(to_char(updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'), '')"""
# {key}: which task a row is of.
KEY = "user_id, id"
# {status}: which tasks to list. As text and not as a parameter, so that one plan of each is enough.
STATUSES = {"all": "true", "pending": "NOT completed", "completed": "completed"}
# {lock_timeout}: how long to wait for somebody else's lock on a row. Not long where others may share the message. The
# setting holds for the transaction, which is the message.
LOCK_TIMEOUTS = {"none": "true", "short": "set_config('lock_timeout', '50ms', true) IS NOT NULL"}


def read(name: str) -> str:
    """Return the text of a file in this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def load(name: str, status: str = "all", *, lock_timeout: str = "short") -> str:
    """Return a statement; raise ValueError unless its text binds it to the caller."""
    statement = read(name)
    left_out = r"^--.*$|'[^'\\]*'|{task}|{version}|{key}|{status}|{lock_timeout}"
    text = " ".join(re.sub(left_out, " ", statement, flags=re.MULTILINE).split())
    text = text.replace(SAME_KEY, "")
    named_once = all(len(re.findall(word, text, re.IGNORECASE)) == 1 for word in NAMED_ONCE)
    if not re.search(BOUND, text) or not named_once or re.search(NEVER, text, re.IGNORECASE):
        raise ValueError(f"sql/{name} could reach tasks of somebody other than $1")
    return fill(statement, status=STATUSES[status], lock_timeout=LOCK_TIMEOUTS[lock_timeout])


def fill(statement: str, **texts: str) -> str:
    """Return a statement with its {places} filled; raise ValueError if task.sql reads a table."""
    task = read("task.sql")
    if re.search(r"\b(SELECT|FROM|TABLE)\b", re.sub("^--.*$", "", task, flags=re.MULTILINE), re.IGNORECASE):
        raise ValueError("sql/task.sql could reach tasks of somebody other than $1")
    for place, text in {"task": task, "version": VERSION, "key": KEY, **texts}.items():
        statement = statement.replace(f"{{{place}}}", text)
    return statement


SCHEMA = read("schema.sql")
LIST_TASKS = {status: load("list_tasks.sql", status) for status in STATUSES}
GET_TASK = load("get_task.sql")
CREATE_TASK = load("create_task.sql")
UPDATE_TASK = load("update_task.sql")
COMPLETE_TASK = load("complete_task.sql")
DELETE_TASK = load("delete_task.sql")
READS = (*LIST_TASKS.values(), GET_TASK)
# The changes of a task, and how they wait where somebody else has locked it, until COMMAND_TIMEOUT.
WAITING_FOR_LOCK = {
    UPDATE_TASK: load("update_task.sql", lock_timeout="none"),
    COMPLETE_TASK: load("complete_task.sql", lock_timeout="none"),
    DELETE_TASK: load("delete_task.sql", lock_timeout="none"),
}
CHANGES = {*WAITING_FOR_LOCK, *WAITING_FOR_LOCK.values()}

# Foreign keys are triggers too.
HAS_TRIGGERS = "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = to_regclass('task'))"


class Connection(asyncpg.Connection):
    """A connection that is not reset when it goes back to the pool.

    By default asyncpg sends a query that resets the session at every release, which doubles the round trips. The
    statements of this module leave nothing in the session to reset.
    """

    def get_reset_query(self) -> str:
        return ""


async def plan_once(connection: asyncpg.Connection) -> None:
    """Have a connection plan each statement once, for all users.

    Left alone, PostgreSQL plans a list anew for every call if it thinks that the user has fewer tasks than others, and
    that takes several times as long as to read them.
    """
    with contextlib.suppress(asyncpg.UndefinedObjectError):  # PostgreSQL 11 has no such setting
        await connection.execute("SET plan_cache_mode = force_generic_plan")


class Call(NamedTuple):
    """The parameters of a statement, the caller first, and what waits for the row that they give."""

    parameters: tuple[object, ...]
    row: asyncio.Future[asyncpg.Record | None]


class Turns(asyncio.Semaphore):
    """Lets so many go on at once; raises TimeoutError to who has no turn within TURN_TIMEOUT."""

    async def acquire(self) -> Literal[True]:
        if not self.locked():  # which spares most the timeout
            return await super().acquire()
        async with asyncio.timeout(TURN_TIMEOUT):
            return await super().acquire()


class Queries:
    """The statements on a pool of `Connection`, each for the caller that it is given. Tasks come back as JSON.

    Each method sends one statement, a read once more if its connection was lost, and lets the errors of asyncpg and of
    the operating system through.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool
        self.schema_applied = False
        self.has_triggers = True
        # Of a user's changes of one task, or creations with one key; there only while somebody has or awaits a turn.
        self.turns: weakref.WeakValueDictionary[tuple[str, int | str], Turns] = weakref.WeakValueDictionary()
        self.list_turns: weakref.WeakValueDictionary[str, Turns] = weakref.WeakValueDictionary()
        self.held_long = max(1, min(HELD_LONG, pool.get_max_size() // 2))
        self.lock_turns = Turns(self.held_long)
        self.short_lists: set[tuple[str, str]] = set()
        self.waiting: defaultdict[str, list[Call]] = defaultdict(list)
        self.under_way: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self.sending: set[asyncio.Task[None]] = set()

    async def apply_schema(self) -> None:
        """Create or adopt the table. Until this has succeeded, every other method raises ConnectionError."""
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(SCHEMA, timeout=SCHEMA_TIMEOUT)
            self.has_triggers = await connection.fetchval(HAS_TRIGGERS)
        self.schema_applied = True

    async def list_tasks(self, user_id: str, status: str) -> bytes:
        """Return the caller's tasks of one of STATUSES, newest first, as a JSON object of `items`, in UTF-8."""
        which, statement = (user_id, status), LIST_TASKS[status]
        if which in self.short_lists:
            try:
                row = await self._send(statement, user_id)
            except Exception:
                self.short_lists.discard(which)  # it may have failed because it is no longer short
                raise
        else:
            # Of one user only some at once, or soon nobody else would have a connection.
            async with self.list_turns.setdefault(user_id, Turns(self.held_long)):
                row = await self._send(statement, user_id, alone=True)
        tasks = b'{"items": [%b]}' % (row[0] or b"")
        if len(tasks) > SHORT_LIST:
            self.short_lists.discard(which)
        else:
            if len(self.short_lists) >= KNOWN_LISTS:
                self.short_lists.clear()
            self.short_lists.add(which)
        return tasks

    async def get_task(self, user_id: str, task_id: int) -> str | None:
        """Return a task, or None where the caller has none with this id."""
        task: str | None = (await self._send(GET_TASK, user_id, task_id))[0]
        return task

    async def create_task(
        self, user_id: str, idempotency_key: str | None, values: Sequence[object]
    ) -> tuple[str, int] | None:
        """Insert a task of the values of all fields, or find the one that the key has made; return it and its id.

        The key has the hash of the request behind it; None is returned where it first came with another request.
        """
        if idempotency_key is None:
            row = await self._send(CREATE_TASK, user_id, None, *values, alone=self.has_triggers)
        else:  # which may have to wait for another one of its key, or give no row
            turn = self.turns.setdefault((user_id, idempotency_key.partition(" ")[0]), Turns(1))
            async with turn:
                row = await self._send(CREATE_TASK, user_id, idempotency_key, *values, alone=True)
        return (row[0], row[1]) if row else None

    # The changes apply only to the versions that they are given, if any; None means no such task or no such version.

    async def update_task(
        self, user_id: str, task_id: int, versions: list[str] | None, changes: Sequence[tuple[bool, object]]
    ) -> str | None:
        """Set fields, given whether to set each, and to what; return the task or None."""
        parameters = [parameter for change in changes for parameter in change]
        row = await self._change(UPDATE_TASK, user_id, task_id, versions, *parameters)
        return row[0] if row else None

    async def complete_task(
        self, user_id: str, task_id: int, versions: list[str] | None, completed: bool | None
    ) -> str | None:
        """Set `completed`, or toggle it where None is given; return the task or None."""
        row = await self._change(COMPLETE_TASK, user_id, task_id, versions, completed)
        return row[0] if row else None

    async def delete_task(self, user_id: str, task_id: int, versions: list[str] | None) -> bool:
        """Delete a task; return whether there was one."""
        return await self._change(DELETE_TASK, user_id, task_id, versions) is not None

    async def _change(self, statement: str, user_id: str, task_id: int, *parameters: object) -> Any:
        """Send a statement that changes a task, and return its row or None.

        The changes of a task take turns here, and those that wait for a lock of somebody else: in the database each
        would wait with a connection, and soon nobody would have one.
        """
        async with self.turns.setdefault((user_id, task_id), Turns(1)):
            try:
                return await self._send(statement, user_id, task_id, *parameters, alone=self.has_triggers)
            except asyncpg.LockNotAvailableError:
                async with self.lock_turns:
                    return await self._send(WAITING_FOR_LOCK[statement], user_id, task_id, *parameters, alone=True)

    async def _send(self, statement: str, user_id: str, *parameters: object, alone: bool = False) -> Any:
        """Return the row of a statement, or None if it gives none.

        Unless it is to go alone, it shares a message to the database with the calls of the same statement that come in
        the same turn of the event loop. Where such a message has just been sent, it waits for the next one: until that
        is back, ENOUGH wait, or PATIENCE is over. The database executes the statement for each caller in turn, in one
        transaction. Under load this saves much CPU, here and in the database.
        """
        loop = asyncio.get_running_loop()
        call = Call((user_id, *parameters), loop.create_future())
        if alone:
            self._start(statement, [call])
        else:
            waiting = self.waiting[statement]
            waiting.append(call)
            if len(waiting) in (1, ENOUGH):  # the first of them, and who need not wait
                loop.call_soon(self._start_waiting, statement)
        return await call.row

    def _start_waiting(self, statement: str) -> None:
        waiting, under_way = self.waiting[statement], self.under_way[statement]

        def go_on(message: asyncio.Task[None]) -> None:
            under_way.discard(message)
            self._start_waiting(statement)

        waiting[:] = [call for call in waiting if not call.row.cancelled()]
        while len(waiting) >= (ENOUGH if under_way else 1):
            # In one order, or the messages of two processes could wait for each other's locks.
            calls = sorted(waiting[:TOGETHER], key=lambda call: call.parameters[:2])
            del waiting[:TOGETHER]
            message = self._start(statement, calls)
            under_way.add(message)
            message.add_done_callback(go_on)
            asyncio.get_running_loop().call_later(PATIENCE, go_on, message)

    def _start(self, statement: str, calls: list[Call], *, again: bool = False) -> asyncio.Task[None]:
        message = asyncio.create_task(self._send_message(statement, calls, again))
        self.sending.add(message)  # or it could be collected as garbage
        message.add_done_callback(self.sending.discard)
        return message

    async def _send_message(self, statement: str, calls: list[Call], again: bool) -> None:
        """Send a statement for some calls; if one of them spoils it, or a read was lost, once more for each alone."""
        try:
            rows = await self._rows(statement, calls)
            answers = list(zip(calls, rows, strict=True))
        except Exception as error:
            if isinstance(error, CONNECTION_LOST):
                repeatable = statement in READS  # nobody knows how far a write got
            else:
                repeatable = len(calls) > 1 and isinstance(error, asyncpg.PostgresError)  # none of it was done
            if repeatable and not again:
                for call in calls:
                    if not call.row.cancelled():
                        self._start(statement, [call], again=True)
                return
            for call in calls:
                if not call.row.done():
                    call.row.set_exception(error)
        else:
            for call, row in answers:
                if not call.row.done():  # nobody waits any longer for one that was cancelled
                    call.row.set_result(row)

    async def _rows(self, statement: str, calls: list[Call]) -> list[asyncpg.Record | None]:
        """Send the statement for each of the calls, and return what each gives."""
        if not self.schema_applied:
            raise ConnectionError("the schema has not been applied yet")
        try:
            async with asyncio.timeout(ACQUIRE_TIMEOUT):
                connection = await self.pool.acquire()
            try:
                rows: list[asyncpg.Record] = await connection.fetchmany(statement, [call.parameters for call in calls])
            finally:
                await self.pool.release(connection, timeout=ACQUIRE_TIMEOUT)
        except (*CONNECTION_LOST, asyncpg.ReadOnlySQLTransactionError):
            # A restart has ended all the connections of the pool, a failover left them with what is a standby now.
            await self.pool.expire_connections()
            raise
        if statement in CHANGES:  # which give no row where there is no such task
            found: dict[Any, asyncpg.Record] = {(row["user_id"], row["id"]): row for row in rows}
            return [found.get(call.parameters[:2]) for call in calls]
        return [*rows] or [None]  # None for a creation whose key came with another request, which goes alone
