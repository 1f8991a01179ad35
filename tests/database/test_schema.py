"""The schema: what it refuses, and how it is applied, by any number of processes at once and by whom."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest
from psycopg import sql

from sql.database import BEGIN_SCHEMA, LOCK_TIMEOUT, Unavailable, apply_schema_when_possible, migrate
from sql.database import apply_schema as apply_on
from tests.support.database import PASSWORD, UNAVAILABLE, connect, execute, name_of, url_as
from tests.support.fixtures import StartService
from tests.support.postgres import held_port
from tests.support.service_process import Client, Service, release
from tests.support.tables import (
    BEYOND_A_LIMIT,
    BLANK,
    CHECKS,
    COLUMNS,
    INDEXES,
    MANY_ROWS,
    TABLES,
    VERSION_1_0,
    apply_schema,
    checks,
    columns,
    fingerprint,
    indexes,
    insert,
    make,
    old_table,
    on,
)
from tests.support.waiting import wait_until

AT_A_LIMIT: list[dict[str, Any]] = [
    *({"user_id": text} for text in ("x", "😀" * 255)),
    *({"id": number} for number in (1, 2**63 - 1)),
    *({"title": text} for text in ("x", "😀" * 200, BLANK + "x" + BLANK)),
    {"title": "\u200b"},  # invisible, and no white space to str.isspace
    *({"description": text} for text in ("", None, "😀" * 2000)),
    *({column: moment}
      for column in ("created_at", "updated_at")
      for moment in ("0001-01-01 00:00:00.000001Z", "9999-12-31 23:59:59.999998Z")),
]  # fmt: skip

# --- A fresh database


@pytest.fixture(scope="module")
def fresh_url(new_database: Callable[[], str]) -> str:
    """A database with the schema and nothing else; tests leave nothing in it."""
    url = new_database()
    apply_schema(url)
    return url


@pytest.fixture
def fresh(fresh_url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """A connection whose changes are undone after the test."""
    with psycopg.connect(fresh_url) as connection:
        yield connection
        connection.rollback()


def test_a_fresh_database_gets_the_table_whose_key_and_indexes_begin_with_the_user(fresh_url: str) -> None:
    assert columns(fresh_url) == COLUMNS | {"id": ["bigint", "NO", None, "BY DEFAULT"]}
    assert checks(fresh_url) == CHECKS
    assert indexes(fresh_url) == INDEXES | {"public.task USING btree (user_id, id)"}
    key = execute(fresh_url, "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'task_pkey'")
    assert key == [("PRIMARY KEY (user_id, id)",)]


def test_a_row_and_a_change_beyond_a_limit_are_refused_by_name(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    for constraint, fields in BEYOND_A_LIMIT:
        [(column, value)] = fields.items()
        change = sql.SQL("UPDATE task SET {} = {}").format(sql.Identifier(column), sql.Literal(value))
        with pytest.raises(psycopg.errors.CheckViolation) as refusal, fresh.transaction():
            insert(fresh, fields)
        assert refusal.value.diag.constraint_name == constraint
        with fresh.transaction(force_rollback=True):
            insert(fresh, {})
            with pytest.raises(psycopg.errors.CheckViolation) as refusal:
                fresh.execute(change)
        assert refusal.value.diag.constraint_name == constraint


def test_a_row_at_a_limit_is_accepted_unchanged(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    for fields in AT_A_LIMIT:
        [(column, value)] = fields.items()
        with fresh.transaction(force_rollback=True):
            insert(fresh, fields)
            if column in ("created_at", "updated_at"):
                moment = sql.SQL("SELECT {}::timestamptz").format(sql.Literal(value))
                value = fresh.execute(moment).fetchall()[0][0]
            kept = sql.SQL("SELECT {} FROM task").format(sql.Identifier(column))
            assert fresh.execute(kept).fetchall() == [(value,)]


def test_only_a_description_and_what_is_kept_of_a_key_may_be_null(
    fresh: psycopg.Connection[tuple[Any, ...]],
) -> None:
    for column in ("user_id", "id", "title", "completed", "created_at", "updated_at"):
        with pytest.raises(psycopg.errors.NotNullViolation) as refusal, fresh.transaction():
            insert(fresh, {column: None})
        assert refusal.value.diag.column_name == column
    insert(fresh, {"description": None, "idempotency_key": None, "request_hash": None})


def test_a_title_of_white_space_is_refused(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    for character in BLANK:
        for title in (character, character * 200, f" {character} "):
            with pytest.raises(psycopg.errors.CheckViolation) as refusal, fresh.transaction():
                insert(fresh, {"title": title})
            assert refusal.value.diag.constraint_name == "task_title"


def test_blank_means_what_python_means_in_all_of_unicode(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    """The constraint itself is asked about every character that PostgreSQL can store."""
    [(definition,)] = fresh.execute("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'task_title'")
    characters = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    rule = sql.SQL(definition.removeprefix("CHECK "))
    asked = sql.SQL("SELECT title FROM unnest(%s::text[]) AS title WHERE NOT ({})").format(rule)
    refused = fresh.execute(asked, [characters])
    assert {title for (title,) in refused} == set(BLANK)


def test_another_writer_may_leave_the_rest_to_the_defaults(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    insert(fresh, {})
    insert(fresh, {})
    rows = fresh.execute("SELECT description, completed, created_at = now(), updated_at = now() FROM task").fetchall()
    assert rows == [(None, False, True, True)] * 2
    [(first,), (second,)] = fresh.execute("SELECT id FROM task ORDER BY id").fetchall()
    assert 0 < first < second


def test_two_users_may_have_tasks_with_one_id(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    for user_id in ("alice", "bob"):
        insert(fresh, {"user_id": user_id, "id": 7})
    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(fresh, {"user_id": "bob", "id": 7})


def test_a_key_is_there_once_for_each_user(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    """Rows without a key are as many as they like."""
    for user_id, key in [("bob", "a"), *(("alice", key) for key in ("a", "A", "b", None, None))]:
        insert(fresh, {"user_id": user_id, "idempotency_key": key, "request_hash": key and "1"})
    for request_hash in ("1", "2", None):
        with pytest.raises(psycopg.errors.UniqueViolation) as refusal, fresh.transaction():
            insert(fresh, {"user_id": "alice", "idempotency_key": "a", "request_hash": request_hash})
        assert refusal.value.diag.constraint_name == "task_idempotency_key_idx"


def test_the_longest_key_of_the_longest_user_id_fits_the_index(fresh: psycopg.Connection[tuple[Any, ...]]) -> None:
    """Of characters that do not compress."""
    choices = random.Random(1)
    user_id = "".join(chr(choices.randrange(0x10000, 0x110000)) for _ in range(255))
    key = "".join(chr(choices.randrange(0x21, 0x7F)) for _ in range(255))
    insert(fresh, {"user_id": user_id, "idempotency_key": key, "request_hash": "0" * 64})
    with pytest.raises(psycopg.errors.UniqueViolation):
        insert(fresh, {"user_id": user_id, "idempotency_key": key, "request_hash": "1" * 64})


@on("fresh", "1.0")
@pytest.mark.parametrize(
    "setting", ["DateStyle = 'SQL, DMY'", "timezone = 'Pacific/Auckland'", "standard_conforming_strings = off"]
)
def test_the_limits_do_not_depend_on_the_settings_of_the_database(database_url: str, tables: str, setting: str) -> None:
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET {setting}")
    make(database_url, tables)
    with connect(database_url) as connection:
        connection.execute("SET DateStyle = 'ISO'; SET standard_conforming_strings = on")
        for fields in AT_A_LIMIT:
            insert(connection, {"user_id": "bob"} | fields)
        for constraint, fields in BEYOND_A_LIMIT:
            with pytest.raises(psycopg.errors.CheckViolation) as refusal:
                insert(connection, fields)
            assert refusal.value.diag.constraint_name == constraint


def test_a_database_that_is_not_in_utf8_is_refused_in_a_sentence(database_url: str) -> None:
    url = f"{database_url}_latin1"
    encoding = "TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    execute(database_url, f"CREATE DATABASE {name_of(url)} {encoding}")
    try:
        assert_one_sentence(release(url), "the encoding of the database is LATIN1, and must be UTF8")
        assert execute(url, "SELECT to_regclass('task')") == [(None,)]
    finally:
        execute(database_url, f"DROP DATABASE {name_of(url)} WITH (FORCE)")


def assert_unavailable(service: Service) -> None:
    with service.client("alice") as alice:
        requests = alice.get("/health/ready"), alice.get("/api/tasks"), alice.post("/api/tasks", json={"title": "x"})
    for response in requests:
        assert (response.status_code, response.json()) == (503, UNAVAILABLE)
        assert int(response.headers["retry-after"]) > 0


# --- Applied again


def assert_changes_nothing_the_second_time(database_url: str, tables: str, apply: Callable[[str], object]) -> None:
    """In a database that lets nobody write then, so that no process even takes the number of a transaction."""
    execute(database_url, tables and tables + MANY_ROWS)
    found: list[list[tuple[Any, ...]]] = []
    for _ in range(3):
        apply(database_url)
        assert checks(database_url) == CHECKS
        assert indexes(database_url) >= INDEXES
        found.append(fingerprint(database_url))
        if len(found) == 1:
            execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET default_transaction_read_only = on")
    assert found[0] == found[1] == found[2]
    assert len([kind for kind, *_ in found[0] if kind == "row"]) == (5000 if tables else 0)


@on(*TABLES)
def test_the_schema_changes_nothing_the_second_time(database_url: str, tables: str) -> None:
    assert_changes_nothing_the_second_time(database_url, tables, apply_schema)


@on("fresh", "old")
def test_migrate_applies_the_schema_and_changes_nothing_the_second_time(database_url: str, tables: str) -> None:
    def migrate(url: str) -> None:
        result = release(url)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    assert_changes_nothing_the_second_time(database_url, tables, migrate)


@on("fresh", "old", "1.0")
def test_applying_the_schema_again_waits_for_nobody_who_uses_the_table(database_url: str, tables: str) -> None:
    make(database_url, tables)
    with psycopg.connect(database_url) as busy:
        busy.execute("LOCK TABLE task IN ACCESS EXCLUSIVE MODE")
        apply_schema(database_url)


@on("fresh", "old", "1.0")
def test_an_index_that_somebody_has_dropped_is_made_again(database_url: str, tables: str) -> None:
    make(database_url, tables)
    complete = indexes(database_url)
    names = ["task_user_id_created_at_id_idx", "task_user_id_completed_created_at_id_idx", "task_idempotency_key_idx"]
    for name in names:
        execute(database_url, f"DROP INDEX {name}")
        assert len(indexes(database_url)) == len(complete) - 1
        apply_schema(database_url)
        assert indexes(database_url) == complete


# --- Many at once

[LOCK] = re.findall(r"pg_advisory_xact_lock\([0-9]+\)", BEGIN_SCHEMA)


async def apply_by_many(url: str, tables: str, rounds: int) -> None:
    """Apply the schema on eight connections at once, again and again; raise the first error."""
    settings = {"lock_timeout": LOCK_TIMEOUT}
    async with AsyncExitStack() as stack:
        pools = [asyncpg.create_pool(url, min_size=1, max_size=1, server_settings=settings) for _ in range(8)]
        for pool in pools:
            await stack.enter_async_context(pool)
        for _ in range(rounds):
            await pools[0].execute(f"DROP TABLE IF EXISTS task; {tables}")
            await asyncio.gather(*(apply_on(pool) for pool in pools))


@on("fresh", "old", "1.0", "1.0, adopted, without keys")
def test_eight_connections_can_apply_the_schema_at_once(database_url: str, tables: str) -> None:
    asyncio.run(apply_by_many(database_url, tables, rounds=5))
    assert checks(database_url) == CHECKS
    assert indexes(database_url) >= INDEXES


@on("fresh", "old", "1.0, adopted")
def test_many_processes_can_start_at_once(database_url: str, start_service: StartService, tables: str) -> None:
    execute(database_url, tables and tables + MANY_ROWS)
    services = [start_service(database_url, wait=False) for _ in range(2 if tables else 4)]
    for service in services:
        service.wait_until_ready(60)
    for service in services:
        with service.client("alice") as alice:
            alice.create()
        assert not re.search("waiting for the database|error|traceback", service.log, re.IGNORECASE), service.log
    with services[0].client("alice") as alice:
        assert len(alice.tasks()) == len(services)


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_processes_wait_for_another_one_that_applies_the_schema(database_url: str, isolation: str) -> None:
    """Longer than a request would wait for a lock, and longer than they wait for one of the table itself."""
    execute(database_url, f"ALTER DATABASE {name_of(database_url)} SET default_transaction_isolation = '{isolation}'")
    long = "clock_timestamp() - state_change > interval '0.5 s'"
    waiting = f"wait_event_type = 'Lock' AND datname = current_database() AND {long}"
    with ThreadPoolExecutor() as threads, psycopg.connect(database_url) as busy:
        busy.execute(f"SELECT {LOCK}".encode())
        applied = [threads.submit(apply_schema, database_url) for _ in range(2)]
        count = f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}"
        wait_until(lambda: execute(database_url, count) == [(2,)] or any(each.done() for each in applied))
        assert not any(each.done() for each in applied)
        busy.rollback()
        for each in applied:
            each.result(30)
    assert checks(database_url) == CHECKS


@pytest.mark.parametrize("tables", [VERSION_1_0, "an index is missing"])
def test_nobody_waits_behind_the_schema_while_it_waits_for_somebody_else(
    database_url: str, tables: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It gives up soon, and the service tries again."""
    if tables == VERSION_1_0:
        execute(database_url, tables)
    else:
        apply_schema(database_url)
        execute(database_url, "DROP INDEX task_user_id_created_at_id_idx")
    insertion = "INSERT INTO task (user_id, title) VALUES ('alice', 'x')"
    with ThreadPoolExecutor() as threads, psycopg.connect(database_url) as other:
        other.execute(insertion.encode())  # the transaction stays open
        applied = threads.submit(apply_schema, database_url)
        while not applied.done():
            execute(database_url, f"SET lock_timeout = '5s'; {insertion}")
        assert "lock timeout" in str(applied.exception())
    apply_schema(database_url)
    assert not caplog.records  # as if asyncpg has to end the transaction


def test_migrate_tries_again_while_somebody_reads_the_table(database_url: str) -> None:
    execute(database_url, VERSION_1_0)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with ThreadPoolExecutor() as threads, psycopg.connect(database_url) as reader:
        reader.execute("SELECT FROM task")
        migrated = threads.submit(asyncio.run, migrate(dsn=database_url))
        for _ in range(2):
            wait_until(lambda: execute(database_url, waiting) or migrated.done())
            wait_until(lambda: not execute(database_url, waiting))  # it has given up
        assert not migrated.done(), migrated.exception()
        reader.rollback()
        migrated.result(30)
    assert checks(database_url) == CHECKS


@contextmanager
def silent_after(text: bytes, url: str) -> Iterator[str]:
    """The URL of a proxy, in which each connection is lost without a word when this text has passed it."""
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as sockets:
        there = urlsplit(url)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client = sockets.enter_context(server.accept()[0])
                    database = sockets.enter_context(socket.create_connection((there.hostname, there.port)))
                    lost = threading.Event()
                    for ends in [(client, database), (database, client)]:
                        threading.Thread(target=pass_on, args=(*ends, lost), daemon=True).start()

        def pass_on(source: socket.socket, target: socket.socket, lost: threading.Event) -> None:
            with suppress(OSError):
                while (data := source.recv(2**16)) and not lost.is_set():
                    target.sendall(data)
                    if text in data:
                        lost.set()

        threading.Thread(target=accept, daemon=True).start()
        yield there._replace(netloc=f"{there.username}@127.0.0.1:{server.getsockname()[1]}").geturl()
        server.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_is_lost_while_the_schema_is_applied_holds_up_nobody(database_url: str) -> None:
    """Not its own process, and no other one, though the database does not notice that nobody is there."""

    async def check() -> None:
        with silent_after(b"pg_advisory_xact_lock", database_url) as url:
            async with asyncpg.create_pool(url, min_size=0, command_timeout=0.5) as pool:
                async with asyncio.timeout(5):
                    with pytest.raises(Unavailable, match="it took too long"):
                        await apply_on(pool)
            async with asyncpg.create_pool(database_url, min_size=0) as pool, asyncio.timeout(30):
                await apply_schema_when_possible(pool)

    asyncio.run(check())
    assert checks(database_url) == CHECKS


# --- A role that owns nothing


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may create nothing in the test's database."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    execute(database_url, f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'; REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield name
    execute(database_url, f"DROP OWNED BY {name}; DROP ROLE {name}")


def grants(role: str, *, serial: bool = False) -> str:
    sequence = f"GRANT USAGE ON SEQUENCE task_id_seq TO {role}" if serial else ""
    return f"GRANT SELECT, INSERT, UPDATE, DELETE ON task TO {role}; {sequence}"


@on("fresh", "old", "1.0, without keys")
def test_a_role_that_owns_nothing_runs_on_a_table_that_is_there(
    database_url: str, role: str, start_service: StartService, tables: str
) -> None:
    make(database_url, tables)
    execute(database_url, grants(role, serial="SERIAL" in tables))
    service = start_service(url_as(role, database_url))
    with service.client("alice") as alice, service.client("bob") as bob:
        use_one_task(alice)
        kept = alice.create()
        assert alice.tasks() == [kept]
        assert bob.tasks() == []
    assert "waiting for the database" not in service.log


def use_one_task(client: Client) -> None:
    """Create, get, complete, change and delete a task."""
    task = client.create()
    path = f"/api/tasks/{task['id']}"
    assert client.get(path).json() == task
    assert client.patch(f"{path}/complete").json()["completed"] is True
    assert client.put(path, json={"title": "changed"}).json()["title"] == "changed"
    assert client.delete(path).status_code == 204


def test_a_role_that_owns_nothing_waits_for_the_table(
    database_url: str, role: str, start_service: StartService
) -> None:
    service = start_service(url_as(role, database_url), constants={"service.STARTUP_TIMEOUT": 0.1})
    assert_unavailable(service)
    assert len([line for line in service.log.splitlines() if "permission denied for schema public" in line]) == 1
    assert "Traceback" not in service.log
    assert PASSWORD not in service.log

    apply_schema(database_url)
    execute(database_url, grants(role))
    service.wait_until_ready()
    with service.client("alice") as alice:
        use_one_task(alice)


# --- python service.py migrate


def assert_one_sentence(result: subprocess.CompletedProcess[str], reason: str) -> None:
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert reason in result.stderr
    assert PASSWORD not in result.stderr
    assert result.stdout == ""


def test_migrate_says_that_nobody_listens() -> None:
    url = f"postgresql://app:{PASSWORD}@127.0.0.1:{held_port()}/tasks"
    assert_one_sentence(release(url), "Connect call failed")


def test_migrate_says_that_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://app:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/tasks?connect_timeout=1"
        result = release(url)
    assert_one_sentence(result, "imeout")
    assert not result.stderr.rstrip().endswith(":")


def test_migrate_says_that_the_database_is_not_there(database_url: str) -> None:
    assert_one_sentence(release(f"{database_url}_absent"), f'database "{name_of(database_url)}_absent" does not exist')


def test_migrate_says_that_the_role_may_create_nothing(database_url: str, role: str) -> None:
    assert_one_sentence(release(url_as(role, database_url)), "permission denied for schema public")


def test_migrate_says_what_stands_in_the_way_of_adoption_and_changes_nothing(database_url: str) -> None:
    """PostgreSQL says this in two lines."""
    execute(database_url, old_table(nullable=True) + MANY_ROWS)
    execute(database_url, "CREATE VIEW titles AS SELECT id, title FROM task; UPDATE task SET title = NULL WHERE id < 9")
    before = fingerprint(database_url)
    assert_one_sentence(release(database_url), "used by a view")
    assert fingerprint(database_url) == before


KEY_INDEX, LIST_INDEX = "task_idempotency_key_idx", "task_user_id_created_at_id_idx"
INVALID = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{}'::regclass"


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        ("ALTER TABLE task RENAME TO task_before", "DROP TABLE task_before"),
        (INVALID, "REINDEX INDEX {}"),
    ],
    ids=["of another table", "invalid"],
)
def test_an_index_that_cannot_be_made_is_told(
    database_url: str, spoil: str, mend: str, start_service: StartService
) -> None:
    """IF NOT EXISTS passes over its name, but without it each creation would fail."""
    apply_schema(database_url)
    execute(database_url, spoil.format(KEY_INDEX))
    assert_one_sentence(release(database_url), KEY_INDEX)
    service = start_service(database_url, constants={"service.STARTUP_TIMEOUT": 0.1})
    assert_unavailable(service)
    assert KEY_INDEX in service.log
    execute(database_url, mend.format(KEY_INDEX))
    service.wait_until_ready()
    with service.client("alice") as alice:
        use_one_task(alice)


LIKE_OURS = "ALTER TABLE task RENAME TO task_before; CREATE TABLE task (LIKE task_before INCLUDING ALL)"


def test_an_index_of_keys_may_have_another_name(database_url: str, start_service: StartService) -> None:
    apply_schema(database_url)
    execute(database_url, LIKE_OURS)
    assert release(database_url).returncode == 0
    with start_service(database_url).client("alice") as alice:
        use_one_task(alice)


@pytest.mark.parametrize(
    ("spoil", "is_told"),
    [("DROP INDEX {0}; CREATE TABLE other (x text); CREATE INDEX {0} ON other (x)", True), (INVALID, False)],
    ids=["of another table", "invalid"],
)
def test_an_index_of_lists_that_cannot_be_made_stops_nobody(database_url: str, spoil: str, is_told: bool) -> None:
    """Without it lists are slow. It may be invalid because somebody is making it."""
    apply_schema(database_url)
    execute(database_url, spoil.format(LIST_INDEX))
    result = release(database_url)
    assert (result.returncode, result.stderr) == (0, "")
    assert (LIST_INDEX in result.stdout) == is_told


# --- Indexes


@on("fresh", "old")
def test_no_request_reads_the_whole_table(database_url: str, tables: str, start_service: StartService) -> None:
    """Of a user with 100 of 5,000 tasks. PostgreSQL counts the scans; a connection that ends hands in its counts."""
    make(database_url, tables)
    execute(database_url, MANY_ROWS + "ANALYZE task")
    clients = "pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'"
    counts = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'task'"
    [(sequential, by_index)] = execute(database_url, counts)
    service = start_service(database_url)
    with service.client("user-7") as client:
        for _ in range(10):
            assert len(client.tasks()) == 100
            use_one_task(client)
    service.stop()
    wait_until(lambda: execute(database_url, f"SELECT count(*) FROM {clients}") == [(1,)])
    [(sequential_after, by_index_after)] = execute(database_url, counts)
    assert sequential_after == sequential
    assert by_index_after >= by_index + 50
