"""A database that is full, forbidden, dropped, damaged, read-only or of another encoding."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from tests.support.database import OTHERS, PASSWORD, UNAVAILABLE, connect, execute, name_of, terminate, url_as
from tests.support.fixtures import Figures, StartService
from tests.support.outages import (
    assert_all_unavailable,
    assert_healed,
    assert_only_the_database_is_missed,
    assert_unavailable,
    assert_unharmed,
    create_database,
    database_setting,
    drop_connections,
    let_notice,
    requests_for,
)
from tests.support.postgres import Postgres, held_port
from tests.support.service_process import Client, Service, running, token
from tests.support.waiting import told

# --- Full, forbidden, dropped, damaged, read-only


@pytest.mark.fault
def test_a_server_without_a_free_connection_is_a_503(
    postgres: Postgres, service: Service, alice: Client, figures: Figures
) -> None:
    """SQLSTATE 53300."""
    task = alice.create()
    others: list[psycopg.Connection[tuple[Any, ...]]] = []
    try:
        take_every_connection(postgres, others)
        others[0].execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname <> 'postgres'")
        take_every_connection(postgres, others)
        assert_all_unavailable(service, alice, "TooManyConnectionsError: .*too many clients already")
    finally:
        for other in others:
            other.close()
    freed = time.monotonic()
    assert_healed(service, alice, [task])
    figures(
        "Others have all the connections of the database",
        f"503; as usual {told(time.monotonic() - freed)} after they let go",
    )


def take_every_connection(postgres: Postgres, taken: list[psycopg.Connection[tuple[Any, ...]]]) -> None:
    with suppress(psycopg.OperationalError):
        for _ in range(100):
            taken.append(connect(postgres.url()))


@pytest.fixture(scope="module")
def role(server: Postgres, service: Service) -> str:
    """A role that has to give its password, and may use the table that is there."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    access = server.folder / "data" / "pg_hba.conf"
    rules = f"host all {name} 127.0.0.1/32 scram-sha-256\nhost all {name}_gone 127.0.0.1/32 trust\n"
    access.write_text(rules + access.read_text())
    execute(server.url(), "SELECT pg_reload_conf()")
    execute(service.database_url, f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'; GRANT ALL ON task TO {name}")
    return name


@pytest.fixture(scope="module")
def service_of_role(service: Service, role: str) -> Iterator[Service]:
    with running(url_as(role, service.database_url)) as service:
        yield service
        assert_unharmed(service.log)


LOCKED_OUT = {
    "another password": ("ALTER ROLE {role} PASSWORD 'other'", f"ALTER ROLE {{role}} PASSWORD '{PASSWORD}'"),
    "no login": ("ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN"),
    "no such role": ("ALTER ROLE {role} RENAME TO {role}_gone", "ALTER ROLE {role}_gone RENAME TO {role}"),
}


@pytest.mark.parametrize(("lock_out", "let_in"), LOCKED_OUT.values(), ids=LOCKED_OUT)
def test_a_role_that_is_not_let_in_is_a_503(
    url: str, role: str, service_of_role: Service, lock_out: str, let_in: str
) -> None:
    """SQLSTATE class 28."""
    with service_of_role.client(uuid.uuid4().hex) as alice:
        task = alice.create()
        execute(url, lock_out.format(role=role))
        try:
            terminate(url)
            let_notice(service_of_role)
            assert_all_unavailable(service_of_role, alice, "Invalid(Password|AuthorizationSpecification)Error")
        finally:
            execute(url, let_in.format(role=role))
        assert_healed(service_of_role, alice, [task])


def test_a_database_that_is_dropped_is_a_503_until_it_is_restored(postgres: Postgres, start: StartService) -> None:
    """SQLSTATE 3D000."""
    url = create_database(postgres)
    service, name = start(url), name_of(url)
    with service.client("alice") as alice:
        task = alice.create()
        drop_connections(service)
        execute(postgres.url(), f"CREATE DATABASE {name}_copy TEMPLATE {name}")
        execute(postgres.url(), f"DROP DATABASE {name} WITH (FORCE)")
        assert_all_unavailable(service, alice, f'InvalidCatalogNameError: database ."{name}." does not exist')
        execute(postgres.url(), f"ALTER DATABASE {name}_copy RENAME TO {name}")
        assert_healed(service, alice, [task])


def test_a_table_that_is_dropped_is_a_503_until_it_is_restored(service: Service, url: str, alice: Client) -> None:
    """SQLSTATE 42P01: pg_restore drops and creates what it restores."""
    task = alice.create()
    execute(url, "CREATE SCHEMA backup; ALTER TABLE task SET SCHEMA backup")
    try:
        assert_all_unavailable(service, alice, "UndefinedTableError")
    finally:
        execute(url, "ALTER TABLE backup.task SET SCHEMA public; DROP SCHEMA backup")
    assert_healed(service, alice, [task])


def test_an_index_that_a_restore_has_not_made_yet_is_a_503(service: Service, url: str, alice: Client) -> None:
    """SQLSTATE 42P10: pg_restore makes indexes after the rows."""
    [(made,)] = execute(url, "SELECT pg_get_indexdef('task_idempotency_key_idx'::regclass)")
    task = alice.create()
    execute(url, "DROP INDEX task_idempotency_key_idx")
    assert_unavailable(alice.post("/api/tasks", json={"title": "x"}))
    assert_unavailable(alice.post("/api/tasks", json={"title": "x"}, headers={"Idempotency-Key": "a"}))
    assert alice.tasks() == [task]
    execute(url, made)
    assert_healed(service, alice, [task])


@pytest.mark.parametrize(
    ("trouble", "mended", "named"),
    [
        ("SELECT setval('task_id_seq', 9223372036854775807)", "SELECT setval('task_id_seq', 1000)", "Sequence"),
        ("CREATE INDEX i ON task (description) WHERE title = 'Program'", "DROP INDEX i", "Program"),
    ],
    ids=["ids that are used up", "somebody's index that is too narrow"],
)
def test_what_the_database_has_no_place_for_is_a_503_until_somebody_makes_some(
    service: Service, url: str, alice: Client, trouble: str, mended: str, named: str
) -> None:
    """SQLSTATE 2200H and 54000."""
    task = {"title": named, "description": "".join(map(chr, random.Random(1).sample(range(0x1F000, 0x1FFFF), 2000)))}
    execute(url, trouble)
    assert_unavailable(alice.post("/api/tasks", json=task, headers={"X-Request-ID": named}))
    assert f'error="{named}' in service.log_line(named)
    execute(url, mended)
    assert alice.post("/api/tasks", json=task).status_code == 201


def test_a_damaged_table_is_a_503_until_it_is_restored(
    postgres: Postgres, service: Service, url: str, alice: Client
) -> None:
    """SQLSTATE XX001."""
    task = alice.create()
    [(path,)] = execute(url, "SELECT pg_relation_filepath('task')")
    file = postgres.folder / "data" / path
    postgres.stop()
    pages = file.read_bytes()
    file.write_bytes(b"\1" * len(pages))
    postgres.start()
    assert_unavailable(alice.get(f"/api/tasks/{task['id']}"))
    assert_unavailable(alice.get("/api/tasks", headers={"X-Request-ID": "damaged"}))
    assert "DataCorruptedError: invalid page in block 0" in service.log_line("damaged")
    postgres.stop()
    file.write_bytes(pages)
    postgres.start()
    assert_healed(service, alice, [task])


def test_a_database_that_is_read_only_is_read(postgres: Postgres, service: Service, alice: Client, bob: Client) -> None:
    """SQLSTATE 25006."""
    task, bobs = alice.create(), bob.create()
    with database_setting(postgres, service, "default_transaction_read_only", "on"):
        for method, path, body in requests_for(task["id"]):
            request_id = uuid.uuid4().hex
            response = alice.request(method, path, json=body, headers={"X-Request-ID": request_id})
            if method == "GET":
                assert response.status_code == 200
            else:
                assert_unavailable(response)
                assert "ReadOnlySQLTransactionError" in service.log_line(request_id)
        assert alice.get("/health/ready").status_code == 200
        assert alice.tasks() == [task]
    assert_healed(service, alice, [task])
    assert bob.tasks() == [bobs]


def test_writes_go_on_once_the_database_is_writable_again(postgres: Postgres, start: StartService) -> None:
    """Sessions keep the setting that they began with, and so do connections to a primary that became a standby."""
    service = start(create_database(postgres), constants={"sql.database.FRESH": 0.5})
    with service.client("alice") as alice:
        task = alice.create()
        with database_setting(postgres, service, "default_transaction_read_only", "on"):
            assert_unavailable(alice.post("/api/tasks", json={"title": "x"}))
            name = name_of(service.database_url)
            execute(postgres.url(), f"ALTER DATABASE {name} RESET default_transaction_read_only")
            time.sleep(0.6)
            first = alice.post("/api/tasks", json={"title": "may meet the session from before"})
            created = [first.json()] if first.status_code == 201 else []
            created.insert(0, alice.create("must not"))
            assert alice.tasks() == [*created, task]


def test_refused_writes_leave_reads_their_connections(
    postgres: Postgres, service: Service, url: str, alice: Client
) -> None:
    """New ones would be read-only, too, and cost a reader more than what it asks for."""
    with database_setting(postgres, service, "default_transaction_read_only", "on"):
        assert_unavailable(alice.post("/api/tasks", json={"title": "x"}))
        before = execute(url, f"SELECT pid {OTHERS}")
        for _ in range(3):
            assert_unavailable(alice.post("/api/tasks", json={"title": "x"}))
            assert alice.tasks() == []
        assert execute(url, f"SELECT pid {OTHERS}") == before


# --- Another encoding, and what is no trouble of the database ---------------------------------------------------------


def test_a_database_of_another_encoding_is_a_503_and_told_in_the_log(postgres: Postgres, start: StartService) -> None:
    """A title could hold what it cannot store."""
    url = create_database(postgres, "ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    service = start(url, ready=False, constants={"service.STARTUP_TIMEOUT": 0.1})
    with service.client("alice") as alice, service.client() as nobody:
        assert_all_unavailable(service, alice, "the schema has not been applied yet")
        assert_only_the_database_is_missed(alice, nobody)
    reason = "waiting for the database: the encoding of the database is LATIN1, and must be UTF8"
    assert service.log.splitlines().count(reason) == 1
    assert execute(url, "SELECT to_regclass('task')") == [(None,)]


def test_a_file_of_the_documentation_that_is_missing_is_a_bug_and_no_trouble_of_the_database(
    database_url: str, start_service: StartService
) -> None:
    service = start_service(database_url, constants={"service.DOCS_FOLDER": "/nowhere"})
    service.wait_until_ready()
    with service.client() as nobody:
        response = nobody.get("/docs/redoc.js")
        assert (response.status_code, response.json()) == (500, {"detail": "Internal Server Error"})
        assert "retry-after" not in response.headers
        assert nobody.get("/docs").status_code == 200
        assert nobody.get("/health/ready").status_code == 200
        assert "status=500" in service.log_line(response.headers["X-Request-ID"])
    assert "FileNotFoundError" in service.log


def test_requests_that_fail_leave_nothing_behind(start_service: StartService) -> None:
    """Neither their heads nor their bodies, of 25 MB in all."""
    url = f"postgresql://postgres@127.0.0.1:{held_port()}/none"
    service = start_service(url, constants={"service.STARTUP_TIMEOUT": 0.1})
    body = json.dumps({"title": "not now", "description": "x" * 2000}).encode()
    head = f"POST /api/tasks HTTP/1.1\r\nAuthorization: Bearer {token('alice')}\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}X-Padding: {'x' * 60_000}\r\n\r\n".encode() + body

    async def fail(times: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        for _ in range(times):
            writer.write(request)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
            await reader.readexactly(len(json.dumps(UNAVAILABLE, separators=(",", ":"))))
        writer.close()

    async def fail_on_many_connections() -> None:
        await asyncio.gather(*(fail(20) for _ in range(20)))

    asyncio.run(fail(20))
    before = service.memory
    asyncio.run(fail_on_many_connections())
    assert service.memory < before + 15
