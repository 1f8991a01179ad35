"""What dies, hangs or is full: each test has a server of its own, which waits for the disk, and a service on it.

`uv run pytest -m fault` runs these and the smaller ones of other files, and prints what was seen of each fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.faults import durable
from tests.support.fixtures import StartService
from tests.support.postgres import Postgres
from tests.support.service_process import Service


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server of the test's own."""
    postgres = durable()
    yield postgres
    postgres.remove()


@pytest.fixture
def service(postgres: Postgres, start_service: StartService) -> Iterator[Service]:
    service = start_service(postgres.url())
    service.wait_until_ready()
    yield service
    assert not re.search("Traceback|status=500", service.log), service.log
