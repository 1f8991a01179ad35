"""A real PostgreSQL, the embedded one or that of TEST_DATABASE_URL, and the service as a real process on it."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import fasteners
import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from tests.support.chromium import ARGUMENTS, CHROMIUM
from tests.support.citus import distributed_schemas, runs_on_citus
from tests.support.fixtures import Figures, StartService
from tests.support.postgres import PGBOUNCER, Postgres, held_port, lay_out_in_partitions
from tests.support.service_process import Client, Service, new_user_id, running

embedded: Postgres | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--partitions", action="store_true", help="lay out the table of each database in hash partitions")
    parser.addoption(
        "--citus",
        action="store_true",
        help="distribute it on the cluster of TEST_CITUS_URL; see test_citus.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tell pytest-postgresql, whose `postgresql_noproc` the fixtures below build on, where the server is."""
    global embedded
    if config.option.citus and "TEST_CITUS_URL" not in os.environ:
        raise pytest.UsageError("--citus needs TEST_CITUS_URL, the URL of a database on the coordinator of a cluster.")
    if config.option.collectonly or (config.option.numprocesses and not hasattr(config, "workerinput")):
        return  # no test runs in this process
    if "TEST_DATABASE_URL" not in os.environ:
        embedded = Postgres()
    parts = urlsplit(embedded.url() if embedded else os.environ["TEST_DATABASE_URL"])
    config.option.postgresql_host = parts.hostname
    config.option.postgresql_port = parts.port
    config.option.postgresql_user = unquote(parts.username or "")
    config.option.postgresql_password = unquote(parts.password or "")


def pytest_unconfigure() -> None:
    if embedded:
        embedded.remove()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))
    if config.option.citus:
        config.hook.pytest_deselected(items=[item for item in items if not runs_on_citus(item)])
        items[:] = [item for item in items if runs_on_citus(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI everything is installed, so that there a skipped test is a failed one."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Figures:
    """A function that takes a fault and what was seen of it, for the table at the end of the run."""

    def record(fault: str, seen: str) -> None:
        record_property("figures", f"| {fault} | {seen} |")

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [value for report in reports for name, value in report.user_properties if name == "figures"]
    if rows:
        terminalreporter.section("What was seen")
        terminalreporter.write_line("\n".join(["| fault | what was seen |", "|---|---|", *dict.fromkeys(rows)]))


@pytest.fixture(scope="session")
def new_database(postgresql_noproc: NoopExecutor, pytestconfig: pytest.Config) -> Iterator[Callable[[], str]]:
    """A function that creates a database, empty but for what --partitions puts there, and returns its URL.

    With --citus it is a schema with the distributed table.
    """
    if pytestconfig.option.citus:
        with distributed_schemas(os.environ["TEST_CITUS_URL"]) as create_schema:
            yield create_schema
        return
    server = postgresql_noproc
    janitors = []

    def create() -> str:
        name = f"tasks_{uuid.uuid4().hex[:12]}"
        janitor = DatabaseJanitor(
            user=server.user, host=server.host, port=server.port, dbname=name,
            password=server.password,
        )  # fmt: skip
        janitor.init()
        janitors.append(janitor)
        user = f"{quote(server.user)}:{quote(server.password)}" if server.password else quote(server.user)
        url = f"postgresql://{user}@{server.host}:{server.port}/{name}"
        if pytestconfig.option.partitions:
            lay_out_in_partitions(url)
        return url

    yield create
    for janitor in janitors if embedded is None else []:  # which is removed as a whole
        janitor.drop()


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """An empty database of the test's own."""
    return new_database()


@pytest.fixture(scope="session")
def service(new_database: Callable[[], str]) -> Iterator[Service]:
    """The service that most tests share; each has users of its own on it."""
    with running(new_database()) as service:
        yield service


@pytest.fixture
def start_service() -> Iterator[StartService]:
    """A function that starts a service of the test's own; see `Service`."""
    services = []

    def start(*arguments: Any, **options: Any) -> Service:
        services.append(Service(*arguments, **options))
        return services[-1]

    yield start
    for service in services:
        service.remove()


@pytest.fixture
def default_port() -> Iterator[None]:
    """Port 8000, for one test of one process at a time."""
    with fasteners.InterProcessLock(Path(tempfile.gettempdir()) / "tasks-test-port-8000"):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 8000)) == 0:
                pytest.skip("something else listens on port 8000")
        yield


@pytest.fixture
def pgbouncer(postgres: Postgres, tmp_path: Path) -> Iterator[int]:
    """The port of a PgBouncer that hands each transaction to one of two connections to the module's `postgres`."""
    if not PGBOUNCER:
        pytest.skip("pgbouncer is not installed")
    port = held_port()
    settings = {
        "listen_addr": "127.0.0.1", "listen_port": port, "unix_socket_dir": "", "auth_type": "any",
        "pool_mode": "transaction", "default_pool_size": 2, "max_client_conn": 500,
    }  # fmt: skip
    lines = [f"{name} = {value}" for name, value in settings.items()]
    if postgres.user:  # PgBouncer refuses to run as root too
        lines.append(f"user = {postgres.user}")
    ini = tmp_path / "pgbouncer.ini"
    server = f"* = host=127.0.0.1 port={postgres.port} user=postgres"
    ini.write_text("\n".join(["[databases]", server, "[pgbouncer]", *lines, ""]))
    with (tmp_path / "log").open("wb") as log, subprocess.Popen([PGBOUNCER, str(ini)], stderr=log) as process:
        yield port
        process.terminate()


@pytest.fixture
def alice(service: Service) -> Iterator[Client]:
    """A client with the token of a user whom no other test has."""
    with service.client(new_user_id()) as client:
        yield client


@pytest.fixture
def bob(service: Service) -> Iterator[Client]:
    """A client with the token of another one."""
    with service.client(new_user_id()) as client:
        yield client


@pytest.fixture
def nobody(service: Service) -> Iterator[Client]:
    """A client without a token."""
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one module: while it is there, playwright's event loop runs, and asyncio.run refuses to."""
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    expect.set_options(timeout=20_000)  # for a busy machine
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser with an empty cache and no cookies."""
    context = browser.new_context()
    yield context
    context.close()
