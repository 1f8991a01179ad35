"""DATABASE_URL, as each provider writes it: hosts, sockets, passwords and queries."""

from __future__ import annotations

import inspect
import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import psycopg.sql
import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args as parse_dsn  # type: ignore[attr-defined]  # not in stubs

from sql.database import read_url
from tests.support.database import terminate
from tests.support.fixtures import StartService
from tests.support.postgres import Postgres, held_port
from tests.support.settings import (
    PYTHON,
    URL,
    assert_nothing_leaked,
    assert_waits,
    assert_works,
    client_addresses,
    run_with_settings,
    secured_url,
)

# --- What can be served with works -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address", "ignored"),
    [
        ("postgres://u:p@h.neon.tech/db?sslmode=require&channel_binding=require", ("h.neon.tech", 5432, "require"), []),
        ("postgresql+asyncpg://u:p@h:5433/db?ssl=require", ("h", 5433, "require"), []),
        ("POSTGRESQL+PSYCOPG://u:p@h/db?ssl=true&pgbouncer=true", ("h", 5432, "require"), []),
        ("postgresql://u:p@h:6543/db?ssl=false&connection_limit=1", ("h", 6543, "disable"), ["connection_limit"]),
        ("postgresql://u:p@h/db?sslmode=&schema=public&options=-c%20a%3Db", ("h", 5432, "prefer"), ["schema"]),
        ("postgresql://u:p@[2001:db8::1]:6000/db", ("2001:db8::1", 6000, "prefer"), []),
        ("postgresql://u:p@/db?host=h&port=6000", ("h", 6000, "prefer"), []),
    ],
)
def test_asyncpg_reads_what_a_url_says(url: str, address: tuple[str, int, str], ignored: list[str]) -> None:
    arguments = read_url(url)
    nothing_else = dict.fromkeys(inspect.signature(parse_dsn).parameters)
    [(host, port)], parameters = parse_dsn(**nothing_else | {"dsn": arguments["dsn"]})
    assert (host, port, parameters.sslmode.name) == address
    assert (parameters.user, parameters.password, parameters.database) == ("u", "p", "db")
    assert (parameters.server_settings or {}).keys() <= {"options"}
    assert arguments["ignored"] == ignored


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=prefer&channel_binding=require&gssencmode=disable&application_name=tasks",
        "pgbouncer=true&connect_timeout=5&prepared_statement_cache_size=0&statement_cache_size=0&sslmode=",
    ],
)
def test_a_url_as_providers_write_it_connects_without_a_warning(
    query: str, database_url: str, start_service: StartService
) -> None:
    url = database_url.replace("postgresql", "postgresql+asyncpg", 1)
    service = start_service(f" {url}?{query}\n")
    assert_works(service)
    assert not any(key in service.log for key in re.findall("[a-z_]{6,}", query))


def test_keys_that_are_not_known_are_dropped_with_one_warning_that_has_no_values(
    database_url: str, start_service: StartService
) -> None:
    service = start_service(f"{database_url}?schema=hunter&connection_limit=1&supa=swordfish&application_name=tasks")
    assert_works(service)
    warnings = [line for line in service.log.splitlines() if "schema" in line or "connection_limit" in line]
    assert len(warnings) == 1, warnings
    assert all(key in warnings[0] for key in ("DATABASE_URL", "schema", "connection_limit", "supa"))
    assert "application_name" not in warnings[0]
    assert_nothing_leaked(service.log)


def test_of_several_hosts_the_one_that_can_be_written_to_is_used(
    database_url: str, start_service: StartService
) -> None:
    user, _, host = urlsplit(database_url).netloc.rpartition("@")
    hosts = f"{user}@127.0.0.1:{held_port()},{host}"
    service = start_service(f"postgresql://{hosts}{urlsplit(database_url).path}?target_session_attrs=read-write")
    assert_works(service)


def test_a_home_that_may_not_be_entered_does_no_harm(
    database_url: str, start_service: StartService, tmp_path: Path
) -> None:
    """As where systemd's ProtectHome is on. asyncpg looks there for certificates."""
    (tmp_path / "home").mkdir(mode=0)
    as_others = "setpriv --bounding-set -dac_override,-dac_read_search" if os.geteuid() == 0 else ""
    service = start_service(f"{database_url}?sslmode=prefer", launcher=as_others, HOME=str(tmp_path / "home"))
    assert_works(service)


@pytest.mark.parametrize(
    ("attribute", "silent_hosts", "logs_in"),
    [("any", 1, True), ("read-write", 2, False), ("prefer-standby", 2, True)],
)
def test_a_host_that_says_nothing_is_passed_over(
    attribute: str, silent_hosts: int, logs_in: bool, database_url: str, start_service: StartService
) -> None:
    """As one whose machine has died: the time for it must leave some for the host that has taken its place.

    One that logs in and says no more is like a PgBouncer whose PostgreSQL has died.
    """
    user, _, host = urlsplit(database_url).netloc.rpartition("@")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel takes its connections
        if logs_in:
            threading.Thread(target=log_in_and_say_no_more, args=[silent], daemon=True).start()
        hosts = ",".join([f"127.0.0.1:{silent.getsockname()[1]}"] * silent_hosts + [host])
        query = f"target_session_attrs={attribute}&connect_timeout=10&sslmode=disable"
        service = start_service(f"postgresql://{user}@{hosts}{urlsplit(database_url).path}?{query}")
        assert_works(service)
        terminate(database_url)  # a request then has less time for another connection than the start had
        with service.client("alice") as alice:
            assert alice.tasks() == []


def log_in_and_say_no_more(server: socket.socket) -> None:
    connections = []
    with suppress(OSError):  # the server has been closed
        while True:
            connection, _ = server.accept()
            connections.append(connection)
            connection.recv(4096)  # a startup message
            # AuthenticationOk, ParameterStatus, ReadyForQuery
            connection.sendall(b"R\0\0\0\x08\0\0\0\0S\0\0\0\x18server_version\x0016.0\0Z\0\0\0\x05I")


def test_of_hosts_that_all_fail_each_has_its_reason_in_the_log(start_service: StartService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = f"127.0.0.1:{held_port()},127.0.0.1:{silent.getsockname()[1]}"
        service = start_service(f"postgresql://postgres@{hosts}/postgres?connect_timeout=1", wait=False)
        assert_waits(service, "ConnectionRefusedError.*; TimeoutError")


def test_a_host_that_cannot_be_written_to_is_passed_over(
    postgres: Postgres, database: str, start_service: StartService
) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    service = start_service(f"{postgres.url(database)}?target_session_attrs=read-write", wait=False)
    assert_waits(service, "(read-write|target|suitable)")


# --- A server that demands passwords and listens on a socket ---------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres@/{database}?host={sockets}&port={port}",
        "postgresql+asyncpg://postgres:@{sockets}:{port}/{database}",
    ],
)
def test_a_socket_folder_is_a_host(
    url: str, postgres: Postgres, sockets: Path, database: str, start_service: StartService
) -> None:
    service = start_service(url.format(database=database, port=postgres.port, sockets=quote(str(sockets), safe="")))
    assert_works(service)
    assert client_addresses(postgres, database) == {None}


def test_a_password_of_special_characters_is_read_as_it_was_escaped(
    postgres: Postgres, database: str, start_service: StartService
) -> None:
    service = start_service(secured_url(postgres, database))
    assert_works(service)
    assert_nothing_leaked(service.log)


def test_a_wrong_password_is_told_in_the_log_without_it(
    postgres: Postgres, database: str, start_service: StartService
) -> None:
    url = f"postgresql://{database}:hunterswordfish@127.0.0.1:{postgres.port}/{database}"
    service = start_service(url, wait=False)
    assert_waits(service, "password authentication failed")
    assert_nothing_leaked(service.log)


def test_a_host_may_be_an_ipv6_address(postgres: Postgres, database: str, start_service: StartService) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        if probe.connect_ex(("::1", postgres.port)):
            pytest.skip("this machine has no IPv6")
    service = start_service(f"postgresql://postgres@127.0.0.1:{held_port()},[::1]:{postgres.port}/{database}")
    assert_works(service)
    assert client_addresses(postgres, database) == {"::1"}


def test_a_key_that_is_ignored_is_not_told_in_the_place_of_a_token() -> None:
    made = run_with_settings([*PYTHON, "token", "alice"], DATABASE_URL=f"{URL}?connection_limit=1")
    assert (made.returncode, made.stderr) == (0, "")
    assert re.fullmatch(r"[\w.-]+\n", made.stdout)
