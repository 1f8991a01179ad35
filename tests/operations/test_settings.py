"""The settings: each is refused in one sentence or does what it says."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import re
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import psycopg.sql
import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args as parse_dsn  # type: ignore[attr-defined]  # not in stubs

import service
from tests.support.postgres import Postgres, free_port
from tests.support.service_process import ROOT, SECRET, Client, Service, token
from tests.support.settings import PYTHON, URL, refusal, run, write_certificate

StartService = Callable[..., Service]

# --- What cannot be served with is refused ---------------------------------------------------------------------------
UVICORN = ["uvicorn", "service:app", "--port", "1"]  # never opened: the settings are read first

# The two halves of the password in every URL below: neither may ever be printed.
HALVES = ("hunter", "swordfish")

BAD_SECRETS = {
    "missing": ("BETTER_AUTH_SECRET", "", ["BETTER_AUTH_SECRET", "not set"]),
    "blank": ("BETTER_AUTH_SECRET", "  ", ["BETTER_AUTH_SECRET", "not set"]),
    "31 characters": ("BETTER_AUTH_SECRET", "hunterswordfish" + "x" * 16, ["BETTER_AUTH_SECRET", "32"]),
    "31 characters of 2 bytes": ("BETTER_AUTH_SECRET", "é" * 31, ["BETTER_AUTH_SECRET", "32"]),
    "31 characters for the old one": (
        "BETTER_AUTH_SECRET_OLD",
        "hunterswordfish" + "x" * 16,
        ["BETTER_AUTH_SECRET_OLD is too short", "32"],
    ),
}
BAD_URLS = {
    "another database": (URL.replace("postgresql", "mysql"), ["postgresql://"]),
    "no scheme": ("user:hunterswordfish@127.0.0.1/db", ["postgresql://"]),
    "a scheme that only begins well": (URL.replace("postgresql", "postgresqlx"), ["postgresql://"]),
    **{
        f"{character} in the password": (f"postgresql://user:hunter{character}swordfish@127.0.0.1:1/db", ["escaped"])
        for character in "#@/?["
    },
    # What stands before the unescaped character could also be a port.
    "5432/ in the password": ("postgresql://user:5432/hunter@127.0.0.1/db", ["escaped"]),
    "5432# in the password": ("postgresql://user:5432#hunter@127.0.0.1/db", ["escaped"]),
    "5432? in the password": ("postgresql://user:5432?hunter@127.0.0.1/db", ["escaped"]),
    "5432? and = in the password": ("postgresql://user:5432?hunter=swordfish@127.0.0.1/db", ["escaped"]),
    "@ and / in the password": ("postgresql://user:hunter@127.0.0.1/swordfish@127.0.0.1/db", ["escaped"]),
    "@ and ? in the password": ("postgresql://user:hunter@127.0.0.1?swordfish=1@127.0.0.1/db", ["escaped"]),
    "@ and # in the password": ("postgresql://user:hunter@127.0.0.1#swordfish@127.0.0.1/db", ["escaped"]),
    "a port of letters": (URL.replace(":1/", ":hunter/"), []),
    "a port of 0": (URL.replace(":1/", ":0/"), []),
    "a port below 0": (URL.replace(":1/", ":-1/"), []),
    "a port beyond 65535": (URL.replace(":1/", ":65536/"), ["port"]),
    "a second port beyond 65535": (URL.replace(":1/", ":1,127.0.0.1:65536/"), ["port"]),
    "a second port of letters": (URL.replace(":1/", ":1,127.0.0.1:hunter/"), []),
    "a comma with no host behind it": (URL.replace(":1/", ":1,/"), []),
    "a port of letters in the query": ("postgresql://user:hunter@/db?host=127.0.0.1&port=swordfish", ["port"]),
    "an unknown sslmode": (f"{URL}?sslmode=hunter", ["sslmode"]),
    "an sslmode that is a name in asyncpg": (f"{URL}?sslmode=parse", ["sslmode"]),
    "an unknown ssl": (f"{URL}?ssl=hunter", ["sslmode"]),
    "an unknown target_session_attrs": (f"{URL}?target_session_attrs=hunter", ["target_session_attrs"]),
    "no such sslrootcert": (f"{URL}?sslmode=verify-full&sslrootcert=/nowhere/hunter.pem", ["sslrootcert"]),
    "an sslrootcert that is none": (f"{URL}?sslmode=verify-full&sslrootcert={ROOT}/README.md", ["sslrootcert"]),
    "a connect_timeout of letters": (f"{URL}?connect_timeout=abc", ["connect_timeout"]),
    "a connect_timeout of 0": (f"{URL}?connect_timeout=0", ["connect_timeout"]),
}
BAD_ORIGINS = {
    "any": ("*", ["*", "credentials"]),
    "any among others": ("https://app.example.com, *", ["*", "credentials"]),
    "with a path": ("https://app.example.com/app", ["https://app.example.com"]),
    "with a wildcard": ("https://*.example.com", ["https://app.example.com"]),
    "no scheme": ("app.example.com", ["https://app.example.com"]),
    "garbage": ("hunter swordfish", ["https://app.example.com"]),
    "separated by spaces": ("https://a.example.com https://b.example.com", ["https://app.example.com", "commas"]),
}
BAD_NUMBERS = [
    ("PORT", "abc"),
    ("PORT", "0"),
    ("PORT", "99999"),
    ("PORT", "\uff18\uff10\uff10\uff10"),  # digits, but not those of ASCII
    ("DATABASE_POOL_SIZE", "0"),
    ("WEB_CONCURRENCY", "x"),
]
BAD = [
    *(pytest.param(*row, id=f"secret: {name}") for name, row in BAD_SECRETS.items()),
    *(pytest.param("DATABASE_URL", url, ["DATABASE_URL", *names], id=name) for name, (url, names) in BAD_URLS.items()),
    *(pytest.param("CORS_ORIGINS", text, ["CORS_ORIGINS", *names], id=f"origins: {name}")
      for name, (text, names) in BAD_ORIGINS.items()),
    *(pytest.param(name, text, [name, "whole number"], id=f"{name}={text}") for name, text in BAD_NUMBERS),
]  # fmt: skip


@pytest.mark.parametrize("beside", [{}, {"BETTER_AUTH_URL": "https://app.example.com"}], ids=["alone", "with keys"])
def test_an_old_secret_without_a_new_one_is_refused(beside: dict[str, str]) -> None:
    sentence = "BETTER_AUTH_SECRET is not set: BETTER_AUTH_SECRET_OLD needs its successor beside it."
    assert refusal(BETTER_AUTH_SECRET="", BETTER_AUTH_SECRET_OLD=SECRET, **beside) == sentence


def assert_nothing_leaked(output: str) -> None:
    assert "Traceback" not in output
    assert not any(half in output for half in HALVES)
    assert SECRET not in output


@pytest.mark.parametrize(("variable", "value", "names"), BAD)
def test_a_bad_setting_is_refused_in_one_sentence(variable: str, value: str, names: list[str]) -> None:
    sentence = refusal(**{variable: value})
    assert re.fullmatch(r"[^\n]+\.", sentence)
    assert all(name in sentence for name in names), sentence
    assert_nothing_leaked(sentence)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BETTER_AUTH_SECRET", "hunterswordfish"),
        ("DATABASE_URL", "postgresql://user:hunter@swordfish@127.0.0.1/db"),
        ("PORT", "99999"),
    ],
)
def test_a_bad_setting_stops_the_service_with_its_sentence(variable: str, value: str) -> None:
    stopped = run(PYTHON, **{variable: value})
    sentence = refusal(**{variable: value})
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (3, "", f"error: {sentence}\n")


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        pytest.param("BETTER_AUTH_SECRET", "", ["BETTER_AUTH_SECRET", "not set"], id="secret"),
        pytest.param("DATABASE_URL", "", ["DATABASE_URL", "not set"], id="no URL"),
        pytest.param("DATABASE_URL", "postgresql://user:hunter@swordfish@127.0.0.1/db", ["DATABASE_URL"], id="URL"),
        pytest.param("CORS_ORIGINS", "*", ["CORS_ORIGINS", "*"], id="origins"),
    ],
)
def test_a_server_of_ones_own_stops_with_the_sentence_too(variable: str, value: str, names: list[str]) -> None:
    assert_uvicorn_stops(1, variable, value, names)


def test_a_supervisor_of_ones_own_does_not_start_its_workers_again_and_again() -> None:
    assert_uvicorn_stops(2, "BETTER_AUTH_SECRET", "", ["BETTER_AUTH_SECRET", "not set"])


def assert_uvicorn_stops(workers: int, variable: str, value: str, names: list[str]) -> None:
    stopped = run(UVICORN, **{"WEB_CONCURRENCY": str(workers), variable: value})
    sentences = [line for line in stopped.stderr.splitlines() if not re.match("(INFO|ERROR): ", line)]
    if workers == 1:
        assert stopped.returncode != 0  # uvicorn's supervisor may exit with 0
        assert len(sentences) == 1, stopped.stderr
    assert sentences
    assert all(line.startswith("error: ") and name in line for line in sentences for name in names), stopped.stderr
    assert_nothing_leaked(stopped.stdout + stopped.stderr)


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
    arguments, left_out = service.read_database_url(url)
    nothing_else = dict.fromkeys(inspect.signature(parse_dsn).parameters)
    [(host, port)], parameters = parse_dsn(**nothing_else | {"dsn": arguments["dsn"]})
    assert (host, port, parameters.sslmode.name) == address
    assert (parameters.user, parameters.password, parameters.database) == ("u", "p", "db")
    assert (parameters.server_settings or {}).keys() <= {"options"}
    assert left_out == ignored


@pytest.mark.parametrize("scheme", ["postgres", "postgresql+asyncpg", "POSTGRESQL"])
def test_every_scheme_of_postgresql_connects(scheme: str, database_url: str, start_service: StartService) -> None:
    service = start_service(database_url.replace("postgresql", scheme, 1))
    assert_works(service)


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=prefer&channel_binding=require&gssencmode=disable",
        "pgbouncer=true&connect_timeout=5&application_name=tasks",
        "prepared_statement_cache_size=0&statement_cache_size=0",
        "sslmode=",
    ],
)
def test_a_query_as_providers_write_it_connects_without_a_warning(
    query: str, database_url: str, start_service: StartService
) -> None:
    service = start_service(f"{database_url}?{query}")
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


def test_spaces_around_the_url_do_no_harm(database_url: str, start_service: StartService) -> None:
    assert_works(start_service(f" {database_url}\n"))


def test_of_several_hosts_the_one_that_can_be_written_to_is_used(
    database_url: str, start_service: StartService
) -> None:
    user, _, host = urlsplit(database_url).netloc.rpartition("@")
    hosts = f"{user}@127.0.0.1:{free_port()},{host}"
    service = start_service(f"postgresql://{hosts}{urlsplit(database_url).path}?target_session_attrs=read-write")
    assert_works(service)


def test_a_host_that_cannot_be_written_to_is_passed_over(
    postgres: Postgres, database: str, start_service: StartService
) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    service = start_service(f"{postgres.url(database)}?target_session_attrs=read-write", wait=False)
    assert_waits(service, "(read-write|target|suitable)")


def assert_works(service: Service) -> None:
    """Assert that a task can be written and read back."""
    service.wait_until_ready()
    with service.client(f"user-{uuid.uuid4().hex}") as client:
        task = client.create("Buy milk")
        assert client.tasks() == [task]


def assert_waits(service: Service, reason: str) -> None:
    """Assert that a service that has just been started logs why it waits for the database."""
    deadline = time.monotonic() + 15
    while not re.search(f"^waiting for the database: .*{reason}", service.log, re.MULTILINE):
        assert time.monotonic() < deadline, service.log
        time.sleep(0.05)
    service.process.kill()  # it would be stopped, but only after waiting for some seconds


# --- A server that demands passwords and listens on a socket ---------------------------------------------------------

SPECIAL = "p@ss:w/o?r#d [x]%25%&=+;,$!'\"\\`^{|}~<>é"
HBA = """\
local all all trust
host all postgres all trust
host all all all scram-sha-256
"""


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    """A folder for the sockets of PostgreSQL, with a name that needs escaping in a URL."""
    folder = Path(tempfile.mkdtemp(prefix="tasks+test "))
    folder.chmod(0o777)  # PostgreSQL may run as another user
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres(sockets: Path) -> Iterator[Postgres]:
    """A server that demands a password of everybody but `postgres`.

    Its log has every statement, after the name of the database.
    """
    server = Postgres(
        listen_addresses="127.0.0.1,::1",
        unix_socket_directories=f'"{sockets}"',
        log_statement="all",
        log_line_prefix="%d: ",
    )
    try:
        (server.folder / "data" / "pg_hba.conf").write_text(HBA)
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute("SELECT pg_reload_conf()")
        yield server
    finally:
        server.remove()


@pytest.fixture
def database(postgres: Postgres) -> str:
    """The name of an empty database on that server, which a role of the same name owns."""
    name = f"tasks_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
            psycopg.sql.Identifier(name), psycopg.sql.Literal(SPECIAL)
        ))  # fmt: skip
        admin.execute(f"CREATE DATABASE {name} OWNER {name}")
    return name


def secured_url(postgres: Postgres, database: str) -> str:
    return f"postgresql://{database}:{quote(SPECIAL, safe='')}@127.0.0.1:{postgres.port}/{database}"


def client_addresses(postgres: Postgres, database: str) -> set[str | None]:
    """Return where the connections to a database come from: None is a socket."""
    query = """
        SELECT host(client_addr) FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'
    """
    with psycopg.connect(postgres.url()) as admin:
        return {row[0] for row in admin.execute(query, [database])}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://postgres@/{database}?host={sockets}&port={port}",
        "postgresql://postgres@{sockets}:{port}/{database}",
        "postgresql+asyncpg://postgres:@/{database}?host={sockets}&port={port}",
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


@pytest.mark.parametrize("host", ["[::1]:{port}", "127.0.0.1:{dead},[::1]:{port}"])
def test_a_host_may_be_an_ipv6_address(
    host: str, postgres: Postgres, database: str, start_service: StartService
) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        if probe.connect_ex(("::1", postgres.port)):
            pytest.skip("this machine has no IPv6")
    service = start_service(f"postgresql://postgres@{host.format(port=postgres.port, dead=free_port())}/{database}")
    assert_works(service)
    assert client_addresses(postgres, database) == {"::1"}


# --- TLS -------------------------------------------------------------------------------------------------------------


class TlsProxy:
    """A port that speaks TLS for a PostgreSQL that cannot, with a self-signed certificate for localhost.

    `used` says of each connection so far whether the client asked for TLS.
    """

    SSL_REQUEST = struct.pack("!ii", 8, 80877103)

    def __init__(self, postgres: Postgres, folder: Path) -> None:
        self.certificate = folder / "server.crt"
        write_certificate(self.certificate, folder / "server.key")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.certificate, folder / "server.key")
        self.upstream_port = postgres.port
        self.used: set[bool] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.upstream_port)) as upstream:
            asks_for_tls = client.recv(8, socket.MSG_PEEK) == self.SSL_REQUEST
            self.used.add(asks_for_tls)
            if asks_for_tls:
                client.recv(8)
                client.sendall(b"S")
                client = self.context.wrap_socket(client, server_side=True)
            threading.Thread(target=forward, args=[upstream, client], daemon=True).start()
            forward(client, upstream)


def forward(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError), source, target:
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it


@pytest.fixture
def tls(postgres: Postgres, tmp_path: Path) -> Iterator[TlsProxy]:
    proxy = TlsProxy(postgres, tmp_path)
    with proxy.listener:
        yield proxy


@pytest.mark.parametrize(
    ("query", "encrypted"),
    [
        ("", True),
        ("?sslmode=disable", False),
        ("?sslmode=require&channel_binding=require", True),
        pytest.param("?ssl=true", True, marks=pytest.mark.long),
        pytest.param("?sslmode=verify-ca&sslrootcert={certificate}", True, marks=pytest.mark.long),
        ("?sslmode=verify-full&sslrootcert={certificate}", True),
    ],
)
def test_sslmode_decides_on_tls(
    query: str, encrypted: bool, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    service = start_service(tls_url(tls, database, query.format(certificate=quote(str(tls.certificate)))))
    assert_works(service)
    assert tls.used == {encrypted}


@pytest.mark.parametrize("query", ["?sslmode=verify-full", "?sslmode=verify-ca&sslrootcert=system"])
def test_a_server_is_verified_by_what_the_system_trusts(
    query: str, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    assert_works(start_service(tls_url(tls, database, query), SSL_CERT_FILE=str(tls.certificate)))
    assert tls.used == {True}
    assert_waits(start_service(tls_url(tls, database, query), wait=False), "certificate verify failed")


@pytest.mark.parametrize("query", ["sslmode=require", "sslmode=verify-full&sslrootcert={certificate}"])
def test_a_server_without_tls_is_not_talked_to_where_tls_is_demanded(
    query: str, postgres: Postgres, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    url = f"{secured_url(postgres, database)}?{query.format(certificate=quote(str(tls.certificate)))}"
    assert_waits(start_service(url, wait=False), "rejected SSL upgrade")
    assert client_addresses(postgres, database) == set()


UNVERIFIABLE = {
    "another certificate": "localhost",
    "another name": "127.0.0.1",
}


@pytest.mark.parametrize("trouble", UNVERIFIABLE)
def test_a_server_that_cannot_be_verified_is_not_talked_to(
    trouble: str, postgres: Postgres, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    service = start_service(unverifiable_url(trouble, tls, database), wait=False)
    assert_waits(service, "certificate verify failed")
    assert client_addresses(postgres, database) == set()


@pytest.mark.long  # a start waits three seconds for the database
@pytest.mark.parametrize("trouble", UNVERIFIABLE)
def test_a_server_that_cannot_be_verified_is_an_outage(
    trouble: str, tls: TlsProxy, database: str, start_service: StartService
) -> None:
    service = start_service(unverifiable_url(trouble, tls, database))
    with service.client("alice") as alice:
        response = alice.get("/api/tasks")
    assert response.status_code == 503
    assert response.json() == {"detail": "The database is not available right now, try again soon"}
    assert_nothing_leaked(service.log)


def unverifiable_url(trouble: str, tls: TlsProxy, database: str) -> str:
    certificate = tls.certificate
    if trouble == "another certificate":
        certificate = certificate.with_name("other.crt")
        write_certificate(certificate, certificate.with_name("other.key"))
    query = f"?sslmode=verify-full&sslrootcert={quote(str(certificate))}"
    return tls_url(tls, database, query).replace("localhost", UNVERIFIABLE[trouble])


def tls_url(tls: TlsProxy, database: str, query: str) -> str:
    return f"postgresql://{database}:{quote(SPECIAL, safe='')}@localhost:{tls.port}/{database}{query}"


# --- Poolers, and the service's own pool -----------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["pgbouncer=true", "statement_cache_size=0", "prepared_statement_cache_size=0"])
def test_no_statement_is_named_when_a_pooler_could_lose_it(
    query: str, postgres: Postgres, database: str, start_service: StartService
) -> None:
    assert_works(start_service(f"{postgres.url(database)}?{query}"))
    assert executed(postgres, database) == {"<unnamed>"}


def test_statements_are_named_otherwise(postgres: Postgres, database: str, start_service: StartService) -> None:
    assert_works(start_service(f"{postgres.url(database)}?pgbouncer=false&statement_cache_size=100"))
    assert "<unnamed>" not in executed(postgres, database)


def test_no_statement_is_named_on_the_port_of_a_pooler() -> None:
    assert service.read_database_url("postgresql://user@host:6543/db")[0]["statement_cache_size"] == 0
    assert "statement_cache_size" not in service.read_database_url("postgresql://user@host:5432/db")[0]


def test_a_pooler_that_the_url_does_not_tell_of_is_noticed_and_gets_no_named_statements(
    postgres: Postgres, pgbouncer: int, database: str, start_service: StartService
) -> None:
    """By its refusal of a startup parameter."""
    service = start_service(f"postgresql://postgres@127.0.0.1:{pgbouncer}/{database}", DATABASE_POOL_SIZE="20")
    service.wait_until_ready()
    with service.client("alice") as alice, ThreadPoolExecutor(40) as threads:
        paths = ["/api/tasks", "/api/tasks?status=pending", "/api/tasks?status=completed", "/api/tasks/1"] * 50
        answers = list(threads.map(alice.get, paths))  # of several statements, so that several connections are used
    assert {answer.status_code for answer in answers} == {200, 404}
    assert executed(postgres, database) <= {"<unnamed>"}


def executed(postgres: Postgres, database: str) -> set[str]:
    """Return the names of the prepared statements that were executed in a database."""
    return set(re.findall(rf"^{database}: LOG:  execute (\S+):", (postgres.folder / "log").read_text(), re.MULTILINE))


def test_any_number_of_requests_get_through_a_pooler_with_two_connections(
    postgres: Postgres, pgbouncer: int, database: str, start_service: StartService
) -> None:
    url = f"postgresql://postgres@127.0.0.1:{pgbouncer}/{database}?pgbouncer=true"
    service = start_service(url, DATABASE_POOL_SIZE="20")
    service.wait_until_ready()
    with service.client("alice") as alice, service.client("bob") as bob, ThreadPoolExecutor(40) as threads:

        def use(number: int) -> None:
            """Send each of the statements, so that a connection that mixes two of them up is noticed."""
            client = (alice, bob)[number % 2]
            task = client.create(f"task {number}")
            path = f"/api/tasks/{task['id']}"
            assert client.get(path).json() == task
            assert client.patch(f"{path}/complete").json()["completed"] is True
            assert client.put(path, json={"title": f"changed {number}"}).json()["title"] == f"changed {number}"
            if number % 4 < 2:
                assert client.delete(path).status_code == 204
            assert client.get("/api/tasks").status_code == 200

        list(threads.map(use, range(200)))
        for client, odd in ((alice, 0), (bob, 1)):
            kept = [f"changed {number}" for number in range(200) if number % 2 == odd and number % 4 >= 2]
            assert sorted(task["title"] for task in client.tasks()) == sorted(kept)
    assert executed(postgres, database) == {"<unnamed>"}


def test_the_pool_opens_no_more_connections_than_it_may(database_url: str, start_service: StartService) -> None:
    service = start_service(f"{database_url}?application_name=bounded", DATABASE_POOL_SIZE="3")
    service.wait_until_ready()
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'bounded' AND datname = current_database()"
    with (
        service.client("alice") as alice,
        psycopg.connect(database_url) as lock,
        psycopg.connect(database_url, autocommit=True) as admin,
        ThreadPoolExecutor(12) as threads,
    ):
        task, another = f"/api/tasks/{alice.create()['id']}", f"/api/tasks/{alice.create()['id']}"
        requests: list[tuple[str, str, object, int]] = [  # of six statements, of which each would take a connection
            ("GET", "/api/tasks", None, 200),
            ("GET", "/api/tasks?status=pending", None, 200),
            ("GET", task, None, 200),
            ("POST", "/api/tasks", {"title": "new"}, 201),
            ("PUT", task, {"title": "changed"}, 200),
            ("PATCH", f"{another}/complete", None, 200),
        ]
        lock.execute("LOCK TABLE task IN ACCESS EXCLUSIVE MODE")
        answers = [threads.submit(alice.request, method, path, json=body) for method, path, body, _ in requests]
        wait_until(lambda: admin.execute(count).fetchone() == (3,))
        time.sleep(0.5)
        assert admin.execute(count).fetchone() == (3,)
        lock.rollback()
        assert [answer.result().status_code for answer in answers] == [status for *_, status in requests]


@pytest.mark.long
def test_a_pool_of_one_connection_serves(database_url: str, start_service: StartService) -> None:
    assert_works(start_service(database_url, DATABASE_POOL_SIZE="1"))


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- The other settings ----------------------------------------------------------------------------------------------


def test_origins_are_compared_as_browsers_send_them(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url, CORS_ORIGINS=" https://App.Example.com/ ,http://[::1]:3000,HTTP://LAN:8080")
    assert allowed_origin(service, "https://app.example.com") == "https://app.example.com"
    assert allowed_origin(service, "http://[::1]:3000") == "http://[::1]:3000"
    assert allowed_origin(service, "http://lan:8080") == "http://lan:8080"
    assert allowed_origin(service, "http://app.example.com") is None
    assert allowed_origin(service, "https://app.example.com.evil.example") is None
    assert allowed_origin(service, "http://localhost:3000") is None


def test_an_empty_variable_counts_as_unset(database_url: str, start_service: StartService) -> None:
    names = [
        "BETTER_AUTH_SECRET_OLD", "CORS_ORIGINS", "JWT_AUDIENCE", "JWT_ISSUER", "DATABASE_POOL_SIZE", "WEB_CONCURRENCY",
    ]  # fmt: skip
    service = start_service(database_url, **dict.fromkeys(names, ""))
    assert_works(service)
    assert allowed_origin(service, "http://localhost:3000") == "http://localhost:3000"
    with service.client(headers={"Authorization": f"Bearer {token(aud='any', iss='any')}"}) as client:
        assert client.tasks() == []


def allowed_origin(service: Service, origin: str) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    connection.request("GET", "/health", headers={"Origin": origin})
    response = connection.getresponse()
    connection.close()
    return response.headers["Access-Control-Allow-Origin"]


def test_the_secret_is_used_as_its_text_in_utf_8(database_url: str, start_service: StartService) -> None:
    secret = "ключ" * 8
    service = start_service(database_url, BETTER_AUTH_SECRET=secret)
    service.wait_until_ready()
    good, bad = token("alice", secret=secret), token("alice", secret=secret.swapcase())
    with Client(service.url) as client:
        assert client.get("/api/tasks", headers={"Authorization": f"Bearer {good}"}).json() == {"items": []}
        response = client.get("/api/tasks", headers={"Authorization": f"Bearer {bad}"})
    assert (response.status_code, response.json()) == (401, {"detail": "Invalid token"})
