"""A server of each file's own, and a service that lives through its troubles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fixtures import StartService
from tests.support.outages import assert_unharmed, create_database
from tests.support.postgres import Postgres
from tests.support.service_process import Service, running


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server of this module's own. What it has committed survives a kill."""
    server = Postgres(max_connections="40", synchronous_commit="on", autovacuum="off")
    yield server
    server.remove()


@pytest.fixture
def postgres(server: Postgres) -> Iterator[Postgres]:
    """The server, running, whatever the test before has done to it."""
    yield server
    assert server.process
    if server.process.poll() is not None:
        server.start()


@pytest.fixture(scope="module")
def service(server: Postgres) -> Iterator[Service]:
    """One service that lives through the troubles of most tests here; `alice`, `bob` and `nobody` are its clients."""
    with running(create_database(server)) as service:
        yield service


@pytest.fixture
def url(service: Service) -> str:
    """The URL of its database."""
    return service.database_url


@pytest.fixture(autouse=True)
def _service_is_unharmed(postgres: Postgres, service: Service) -> Iterator[None]:
    before = len(service.log)
    yield
    assert_unharmed(service.log[before:])


@pytest.fixture
def start(start_service: StartService) -> Iterator[StartService]:
    """A function that starts a service of the test's own."""
    services = []

    def start(url: str, *, ready: bool = True, **options: Any) -> Service:
        services.append(start_service(url, **options))
        if ready:
            services[-1].wait_until_ready()
        return services[-1]

    yield start
    for service in services:
        assert_unharmed(service.log)
