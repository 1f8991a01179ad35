"""Services and clients of the tests of the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.support.answers import ALL, APP, OTHER_APP
from tests.support.postgres import Postgres
from tests.support.service_process import Client, Service, new_user_id


@pytest.fixture(scope="module")
def configured(new_database: Callable[[], str]) -> Iterator[Service]:
    """A service with two origins of its own, on a database that raises what no one expects at the title `bug`.

    At the title `outage` it raises what a database does that is starting.
    """
    service = Service(new_database(), CORS_ORIGINS=f"{APP}, {OTHER_APP}")
    service.wait_until_ready()
    service.sql("""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'the secret of the database'
                USING ERRCODE = CASE NEW.title WHEN 'bug' THEN 'internal_error' ELSE 'cannot_connect_now' END;
        END $$;
        CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON task
            FOR EACH ROW WHEN (NEW.title IN ('bug', 'outage')) EXECUTE FUNCTION fail();
        """)
    yield service
    service.remove()


@pytest.fixture
def send(configured: Service) -> Iterator[Callable[..., httpx.Response]]:
    """A function that sends a request of the tables, by its name, with more headers, and checks its status."""
    with configured.client(new_user_id()) as client:

        def send(name: str, **headers: str) -> httpx.Response:
            method, path, options = ALL[name]
            if "{id}" in path:
                path = path.replace("{id}", str(client.create()["id"]))
            added = {name.replace("_", "-"): value for name, value in headers.items()}
            response = client.request(method, path, **options | {"headers": options.get("headers", {}) | added})
            assert response.status_code == int(name[:3]), response.text
            return response

        yield send


@pytest.fixture(scope="module")
def three_processes(new_database: Callable[[], str]) -> Iterator[Service]:
    service = Service(new_database(), WEB_CONCURRENCY="3")
    service.wait_until_ready()
    yield service
    service.remove()


@pytest.fixture
def untouched(service: Service, alice: Client, bob: Client) -> Iterator[str]:
    """The path of a task of Alice's. Whatever the test sends, her tasks and Bob's are in the end what they were."""
    task = alice.create(description="Two litres")
    bob.create()
    before = service.rows(alice, bob)
    yield f"/api/tasks/{task['id']}"
    assert service.rows(alice, bob) == before


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server of this module's own, which logs each statement and its parameters, and can be stopped."""
    postgres = Postgres(log_statement="all")
    yield postgres
    postgres.remove()


@pytest.fixture(scope="module")
def observed(postgres: Postgres) -> Iterator[Service]:
    """A service on that server."""
    service = Service(postgres.url(), wait=False)
    service.wait_until_ready()
    yield service
    service.remove()


@pytest.fixture
def carol(observed: Service) -> Iterator[Client]:
    """A client of that service."""
    with observed.client(new_user_id()) as client:
        yield client
