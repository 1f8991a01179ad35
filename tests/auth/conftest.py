"""Services and clients of the tests of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.support.service_process import Client, Service
from tests.support.tokens import (
    AUDIENCE,
    ISSUER,
    OLD_SECRET,
    STRICT_SECRET,
)


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[Client]:
    """A client without a token. When all are done with it the service still answers, and no bug is in its log."""
    printed = len(service.log)
    with service.client() as client:
        yield client
        assert client.get("/health/ready").status_code == 200
    assert not re.search(r"Traceback|status=5", service.log[printed:])


@pytest.fixture(scope="module")
def strict_http(new_database: Callable[[], str]) -> Iterator[Client]:
    """A client of a service with an audience, an issuer and secrets beyond ASCII, in the poorest of locales."""
    service = Service(
        new_database(), wait=False, LC_ALL="C", BETTER_AUTH_SECRET=STRICT_SECRET, BETTER_AUTH_SECRET_OLD=OLD_SECRET,
        JWT_AUDIENCE=AUDIENCE, JWT_ISSUER=ISSUER,
    )  # fmt: skip
    try:
        service.wait_until_ready()
        with service.client() as client:
            yield client
    finally:
        service.remove()


@pytest.fixture(scope="module")
def database(new_database: Callable[[], str]) -> str:
    """The URL of the database that all services here share."""
    return new_database()
