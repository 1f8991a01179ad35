"""The database: its rows, its errors, its URL, the connections to it, and the schema."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
import orjson
from asyncpg import Pool, Record
from asyncpg.connect_utils import _parse_connect_dsn_and_args as parse_dsn  # type: ignore[attr-defined]  # not in stubs

log = logging.getLogger("service")

# The columns of a task, with which each row begins, in the order in which clients see them.
COLUMNS = ("id", "user_id", "title", "description", "completed", "created_at", "updated_at")
EPOCH, MICROSECOND = datetime(2000, 1, 1), timedelta(microseconds=1)  # of PostgreSQL's timestamps, in UTC


def to_json(rows: Iterable[Record]) -> bytes:
    """Return the JSON of tasks as clients see them, with commas between, from rows with timestamps since EPOCH."""
    tasks: list[dict[str, Any]] = [dict(zip(COLUMNS, row)) for row in rows]  # noqa: B905  a row has more columns
    for task in tasks:
        task["created_at"] = EPOCH + MICROSECOND * task["created_at"]
        task["updated_at"] = EPOCH + MICROSECOND * task["updated_at"]
    return orjson.dumps(tasks, option=orjson.OPT_NAIVE_UTC)[1:-1]  # without the brackets


def format_timestamp(timestamp: int) -> str:
    """Return a timestamp as clients see it."""
    return f"{(EPOCH + MICROSECOND * timestamp).isoformat()}+00:00"


def parse_timestamp(text: str) -> int | None:
    """Return the timestamp that clients see as this text, or None unless `format_timestamp` would write it so."""
    if len(text) not in (25, 32):  # an exception for each of a thousand tags would take milliseconds
        return None
    with contextlib.suppress(ValueError, TypeError):  # no time, or one of another zone
        timestamp = (datetime.fromisoformat(text.removesuffix("+00:00")) - EPOCH) // MICROSECOND
        if text == format_timestamp(timestamp):
            return timestamp
    return None


class Unavailable(Exception):
    """The database cannot be reached, or not in time. A write may have been made. The text is for the log."""


class Refused(Exception):
    """The database does not accept such values. Nothing was changed. The text names the constraint, or the error."""


def reason(error: BaseException) -> str:
    """Return an exception in one line, for the log."""
    if isinstance(error, Unavailable):
        return str(error)
    text = "it took too long" if isinstance(error, TimeoutError) else str(error)
    return ": ".join([type(error).__name__, *text.splitlines()[:1]])


# What says that a connection is lost, or does not answer in time: TimeoutError is an OSError.
LOST = (OSError, asyncpg.InternalClientError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError)

# SQLSTATEs (PostgreSQL, Appendix A) of what passes by itself, or when somebody has mended the database.
TRANSIENT = (
    "(08|25|28|3D|40|53|54|55|57|58)..."
    "|42P01|42501|42P10"  # the table, its grants or its index for keys are not there, as while a backup is restored
    "|26000|42P05"  # a prepared statement is not there, or is already, as through a pooler
    "|XX00[12]"  # a page is damaged, until a backup is restored
    "|2200H"  # the sequence of ids is at its end
)
INVALID = "(22|23)...|P0001"  # the database cannot take a value, a constraint forbids it, or a trigger rejects it
NOT_YET = "55P03|40001|40P01"  # somebody's lock, a serialization failure, a deadlock
UNDONE = f"{INVALID}|{NOT_YET}|(0A|25|42)..."  # what has surely done nothing, though Citus or a pooler reports it
KEY_INDEX = "idempotency_key_idx"  # a part of the names of version 1.0's key index, and of a copy that REINDEX makes


def may_succeed_later(error: Exception) -> bool:
    """Return whether an error is of a statement that has done nothing, and may succeed when it is sent again."""
    if isinstance(error, asyncpg.InvalidCachedStatementError):
        return True  # a column has another type since the statement was prepared
    if KEY_INDEX in (getattr(error, "constraint_name", None) or ""):
        return True  # our index, which ON CONFLICT names, then shows the task that the key has made
    return re.fullmatch(NOT_YET, getattr(error, "sqlstate", None) or "") is not None


def shows_outdated(connection: "Connection | None", error: Exception) -> bool:
    """Return whether an error of a connection tells that others of its age will fail, too, and new ones may not.

    A restart ends all connections. After a failover they may lead to a standby, and a session that began read-only
    stays so. But where a new connection is read-only, the database is.
    """
    if connection and isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return time.monotonic() - connection.opened_at > FRESH
    return isinstance(error, ConnectionError)


def classify(error: Exception) -> Exception:
    """Return the exception to raise for an error: Unavailable, Refused, or itself if it is one of these or a bug."""
    sqlstate = getattr(error, "sqlstate", None) or ""
    if isinstance(error, OSError) or re.fullmatch(TRANSIENT, sqlstate):  # ConnectionError is one, too
        return Unavailable(reason(error))
    # Ids are not the client's: one that is taken comes from a sequence that is behind its table.
    taken_id = sqlstate == "23505" and re.search(r"\((user_id, )?id\)", getattr(error, "detail", None) or "")
    if re.fullmatch(INVALID, sqlstate) and not taken_id:
        return Refused(getattr(error, "constraint_name", None) or type(error).__name__)
    return error


# Keys of a URL that are read here, or left out without a word, as asyncpg has nothing of the kind.
OUR_KEYS = {"ssl", "pgbouncer", "statement_cache_size", "prepared_statement_cache_size", "connect_timeout",
            "channel_binding", "gssencmode"}  # fmt: skip


@functools.lru_cache(maxsize=4)  # to read the certificates of all authorities takes 20 ms
def parse(dsn: str, minute: int = 0) -> tuple[list[Any], Any]:
    """Return the addresses and the parameters that asyncpg's own parser reads in a URL, once in each minute."""
    unset = dict.fromkeys(inspect.signature(parse_dsn).parameters)  # it has many arguments besides the URL
    return parse_dsn(**unset | {"dsn": dsn})  # type: ignore[no-any-return]


def read_url(url: str) -> dict[str, Any]:
    """Return the arguments of `create_pool` from a URL as providers write it; `ignored` are keys left out.

    Raise ValueError, with a text that holds no password.
    """
    try:
        parts = urlsplit(url.strip())
        query = dict(parse_qsl(parts.query))
        if "ssl" in query:  # as SQLAlchemy's asyncpg dialect and JDBC call it
            query.setdefault("sslmode", {"true": "require", "false": "disable"}.get(query["ssl"], query["ssl"]))
        if query.get("sslmode", "").startswith("verify") and query.get("sslrootcert", "system") == "system":
            query["sslrootcert"] = ssl.get_default_verify_paths().cafile or "system"
        parts = parts._replace(scheme=parts.scheme.partition("+")[0], query=urlencode(query))
        addresses, parameters = parse(parts.geturl())
        timeout = query.get("connect_timeout", f"{CONNECT_TIMEOUT:.0f}")
        ports = [address[1] for address in addresses if isinstance(address, tuple)]
        # asyncpg would take a part of a password with an unescaped @, / or ? for the host.
        well_formed = re.fullmatch("[^/@]*//([^@/?#]*@)?[^@]*", url) and re.fullmatch("[1-9][0-9]{0,2}", timeout)
        if not well_formed or not all(0 < port < 65_536 for port in ports):
            raise ValueError
    except Exception:  # whose text may hold the password
        raise ValueError(
            "DATABASE_URL cannot be read: it must be like postgresql://user:password@host:port/database, the password"
            " percent-escaped (@ as %40, # as %23, / as %2F, ? as %3F), and what follows a ? must be right: sslmode,"
            " sslrootcert, target_session_attrs, connect_timeout."
        ) from None
    # asyncpg sends unknown keys as settings of the server, which then refuses the connection.
    unknown = (parameters.server_settings or {}).keys() - {"application_name", "options"}
    dsn = parts._replace(query=urlencode({key: query[key] for key in query.keys() - unknown})).geturl()
    arguments: dict[str, Any] = {"dsn": dsn, "timeout": int(timeout), "ignored": sorted(unknown - OUR_KEYS)}
    # A pooler that gives every transaction another server connection cannot keep prepared statements.
    if 6543 in ports or any(sign in url for sign in ("pgbouncer=true", "statement_cache_size=0")):  # Supabase's port
        arguments["statement_cache_size"] = 0
    return arguments


CALL_TIMEOUT = 8.0  # seconds that a call may take, second tries included
RELEASE_TIMEOUT = 2.0  # seconds that a statement gets to be cancelled; then its connection is closed
CONNECT_TIMEOUT = 6.0  # seconds that all hosts have together to take a connection, so that a call can reach the last
FRESH = 5.0  # seconds for which a connection counts as new
LOCK_TIMEOUT = "50ms"  # that a statement waits for somebody else's lock, as PostgreSQL writes it
SCHEMA_TIMEOUT = 3600.0  # seconds; converting a large table rewrites it

# uvloop looks names up in half of these threads, by default in two, which lookups of the issuer may occupy for long.
os.environ.setdefault("UV_THREADPOOL_SIZE", "16")
# asyncpg looks for certificates in the home directory, and fails if it may not enter that.
if not os.access(os.environ.get("HOME", "/"), os.X_OK):
    os.environ["HOME"] = os.devnull


def create_pool(*, ignored: Sequence[str] = (), **arguments: Any) -> Pool:
    """Return a pool that opens connections as calls need them, so that a process starts without the database."""
    if ignored:
        log.warning("DATABASE_URL: ignored what asyncpg does not know: %s", ", ".join(ignored))
    return asyncpg.create_pool(
        **arguments, min_size=0, command_timeout=CALL_TIMEOUT, connect=connect, connection_class=Connection
    )


async def connect(*arguments: Any, **options: Any) -> "Connection":
    """Open a connection to the first host of a URL that is as its target_session_attrs say. Raise Unavailable.

    asyncpg's pool calls this, with the URL as its one positional argument.
    Each host has its share of the time: asyncpg has one time for all, in which a silent host would hide the others.
    """
    addresses, parameters = parse(*arguments, int(time.monotonic() / 60))  # certificates may have been renewed
    if parameters.sslmode.name.startswith(("require", "verify")):
        options["ssl"] = parameters.ssl  # or asyncpg would read the certificates again
    attribute = parameters.target_session_attrs.value
    attributes = ("standby", "any") if attribute == "prefer-standby" else (attribute,)
    tries = list(itertools.product(attributes, addresses))
    seconds = min(options.pop("timeout", CONNECT_TIMEOUT), CONNECT_TIMEOUT / len(tries))
    failures = []
    for wanted, address in tries:
        host, port = (address, 5432) if isinstance(address, str) else address  # the path of a socket is complete
        try:
            async with asyncio.timeout(seconds):
                return await connect_to_host(*arguments, **options, host=host, port=port, target_session_attrs=wanted)
        except Exception as error:
            failures.append(reason(error))
    raise Unavailable("; ".join(dict.fromkeys(failures)))


async def connect_to_host(*arguments: Any, **options: Any) -> "Connection":
    """Open a connection that waits for no lock longer than LOCK_TIMEOUT, and plans a statement once for all users."""
    # These are startup parameters, as what is SET in a session leaks to others through a pooler.
    settings = {"lock_timeout": LOCK_TIMEOUT, "plan_cache_mode": "force_generic_plan"}
    try:
        connection: Connection = await asyncpg.connect(*arguments, **options, server_settings=settings)
    except (asyncpg.ProtocolViolationError, asyncpg.UndefinedObjectError):
        # PgBouncer takes no such parameters, and PostgreSQL 11 has no plan_cache_mode.
        options["statement_cache_size"] = 0  # a pooler may give each transaction another connection of the server
        connection = await asyncpg.connect(*arguments, **options)
    await connection.prepare_session()
    return connection


class Connection(asyncpg.Connection):
    """A connection whose session the pool seldom resets: nothing is left in it, and that would be a round trip."""

    # Whether each transaction has to set lock_timeout: where a pooler has refused or dropped it as a parameter.
    sets_lock_timeout = False
    is_citus = False  # whether each statement of a message is a transaction of its own, as on a coordinator of Citus
    opened_at = 0.0  # by time.monotonic
    is_clean = True  # whether the last message was sent to its end

    def get_reset_query(self) -> str:
        # asyncpg sends Parse and Sync apart, and may be stopped in between, as by a timeout. That leaves a transaction
        # open, with a lock of the table. Any statement ends it.
        return "" if self.is_clean else "SELECT"

    async def prepare_session(self) -> None:
        tcp = self._transport.get_extra_info("socket")  # type: ignore[attr-defined]  # not in stubs
        if tcp.family != socket.AF_UNIX and hasattr(socket, "TCP_KEEPIDLE"):
            # While a large table is converted, nothing else would tell that the server's machine has died, and a router
            # may forget a connection that is silent. So Linux asks, and ends the connection after a minute of silence.
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)  # seconds
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self.opened_at = time.monotonic()
        try:
            settings = "SELECT current_setting('lock_timeout'), current_setting('citus.version', true)"
            [(lock_timeout, citus_version)] = await self.fetch(settings)
            self.sets_lock_timeout, self.is_citus = lock_timeout != LOCK_TIMEOUT, citus_version is not None
            # Timestamps come as integers: asyncpg takes three times as long as Python to make a datetime of one.
            await self.set_builtin_type_codec("timestamptz", schema="pg_catalog", codec_name="int8", format="binary")
        except BaseException:
            self.terminate()
            raise

    @contextlib.asynccontextmanager
    async def sending(self, seconds: float, writes: int) -> AsyncIterator[None]:
        """Wrap the sending of a message: raise ConnectionError if the connection is lost, or gives no answer in time.

        Raise Unavailable if a write may have been made although it has got an error. Other SQL errors have undone all.
        Make a transaction around the message, which may take `seconds`, where lock_timeout must be set in it, or where
        its several writes would not be one.
        """
        self.is_clean = False
        needs_transaction = self.sets_lock_timeout or (self.is_citus and writes > 1)
        commits = not needs_transaction  # whether what is being sent commits
        try:
            if not needs_transaction:
                yield
            else:
                async with asyncio.timeout(seconds):
                    try:
                        await self.execute(f"BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
                        yield
                        commits = True
                        await self.execute("COMMIT")
                    except asyncpg.PostgresError:
                        await self.execute("ROLLBACK")
                        raise
                    except BaseException:
                        self.terminate()  # a database that hangs would not answer a ROLLBACK either
                        raise
            self.is_clean = True
        except Exception as error:
            self.is_clean = bool(getattr(error, "severity", ""))  # one of the server comes when it has rolled back
            if self.is_closed() or isinstance(error, LOST):
                raise ConnectionError(reason(error)) from None
            # Citus and poolers have many SQL errors for a server that is lost. It may have committed before.
            is_in_between, sqlstate = self.is_citus or self.sets_lock_timeout, getattr(error, "sqlstate", None)
            if writes and commits and is_in_between and sqlstate and not re.fullmatch(UNDONE, sqlstate):
                raise Unavailable(reason(error)) from None
            raise


async def release(pool: Pool, connection: Any) -> None:
    """Give a connection back to its pool. It never raises: an error closes the connection."""
    with contextlib.suppress(Exception):
        await pool.release(connection, timeout=RELEASE_TIMEOUT)


SCHEMA, ADOPT = ((Path(__file__).parent / name).read_text("utf-8") for name in ("schema.sql", "adopt.sql"))
BEGIN_SCHEMA = """
    BEGIN ISOLATION LEVEL READ COMMITTED;  -- so that it sees what another process has made while it waited
    SET LOCAL lock_timeout = '5s';  -- another process may be applying it; this one tries again later
    SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = '5s';  -- lets go of the lock if this connection is lost
    SELECT pg_advisory_xact_lock(7305001);  -- a number of our own, the same in every version
    -- While this waits for a lock of the table, all others wait behind it; so it soon gives up, and tries again later.
    SET LOCAL lock_timeout = '200ms';
    -- Have IF NOT EXISTS look where the table is, which may be in a later schema of the search path.
    SELECT set_config('search_path', relnamespace::regnamespace::text, true)
    FROM pg_class WHERE oid = to_regclass('task')
"""
PRESENT = """
    SELECT attname FROM pg_attribute WHERE attrelid = to_regclass('task') AND attnum > 0 AND NOT attisdropped
    UNION ALL
    SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid WHERE indrelid = to_regclass('task')
      AND (indisvalid OR NOT indisunique)
"""
USE_KEY_INDEX = """
    EXPLAIN INSERT INTO task (user_id, title) VALUES ('', '')
    ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
"""
EXPECTED = set(re.findall(r"(?m)(?:^    |(?:INDEX|COLUMN) IF NOT EXISTS )([a-z_]+)\b", SCHEMA))  # columns and indexes


async def apply_schema(pool: Pool) -> None:
    """Create or convert the table, in one transaction, one process at a time; do nothing where all is there.

    Raise Unavailable.
    """
    try:
        async with pool.acquire() as connection:
            try:
                await connection.execute(BEGIN_SCHEMA)
                if (encoding := await connection.fetchval("SHOW server_encoding")) != "UTF8":
                    raise Unavailable(f"the encoding of the database is {encoding}, and must be UTF8")
                present = {row[0] for row in await connection.fetch(PRESENT)}
                if present and "request_hash" not in present:
                    await connection.execute(ADOPT, timeout=SCHEMA_TIMEOUT)
                if not present >= EXPECTED:  # IF NOT EXISTS needs the CREATE privilege even where all is there
                    await connection.execute(SCHEMA, timeout=SCHEMA_TIMEOUT)
                    missing = EXPECTED - {row[0] for row in await connection.fetch(PRESENT)}
                    if missing:  # indexes that IF NOT EXISTS has passed over
                        names = ", ".join(sorted(missing))
                        text = f"another table has an index of this name, or it is invalid: {names}"
                        try:  # each creation needs that of keys, under whatever name
                            await connection.execute(USE_KEY_INDEX)
                        except asyncpg.InvalidColumnReferenceError:
                            raise Unavailable(text) from None
                        log.warning("lists may be slow: %s", text)
                await connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(asyncpg.InterfaceError):  # the pool has closed it already
                    connection.terminate()  # which rolls back; a lost connection would not answer a ROLLBACK
                raise
    except Exception as error:  # whatever it is, someone can mend it in the database
        raise Unavailable(reason(error)) from None


async def migrate(**arguments: Any) -> None:
    """Apply the schema once, over a pool with these arguments; exit with a sentence if that fails.

    While others hold locks of the table, it tries again for a minute.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Ctrl-C may leave a connection that nobody waits for
    deadline = time.monotonic() + 60
    async with create_pool(**arguments) as pool:
        while True:
            try:
                return await apply_schema(pool)
            except Unavailable as error:
                if time.monotonic() > deadline or not str(error).startswith("LockNotAvailableError"):
                    sys.exit(f"The schema was not applied: {error}")
            await asyncio.sleep(1)


async def apply_schema_when_possible(pool: Pool) -> None:
    """Apply the schema, however long the database takes to appear; log each new reason why it could not be."""
    reported = ""
    while True:
        try:
            return await apply_schema(pool)
        except Unavailable as error:
            if reported != str(error):
                reported = str(error)
                log.warning("waiting for the database: %s", reported)
            await asyncio.sleep(1)


@contextlib.contextmanager
def traced(statement: str) -> Iterator[None]:
    """Give OpenTelemetry a span of a call: its statement without the parameters. Waits and second tries are in it."""
    from opentelemetry import trace

    verb, *_ = re.sub("(?m)^--.*", "", statement).split()
    attributes = {"db.system": "postgresql", "db.statement": statement}
    span = trace.get_tracer("service").start_span(verb, kind=trace.SpanKind.CLIENT, attributes=attributes)
    try:
        yield
    except Exception:
        span.set_status(trace.StatusCode.ERROR)  # and no more: the error may quote the task
        raise
    finally:
        span.end()
