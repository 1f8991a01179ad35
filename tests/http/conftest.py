"""The service has to survive what is here."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator

import psutil
import pytest

from tests.support.service_process import Service
from tests.support.waiting import wait_until
from tests.support.wire import Raw, remote_ports


@pytest.fixture(scope="module", autouse=True)
def the_service_survives(service: Service) -> Iterator[None]:
    """After all of it the service still answers, there was no bug, and of the connections nothing is left."""
    printed, before = len(service.log), psutil.Process(service.process.pid).num_fds()
    yield
    with service.client(f"user-{uuid.uuid4().hex}") as client:
        assert client.create("still here")["title"] == "still here"
    assert not re.search(r"Traceback|status=5", service.log[printed:])
    wait_until(lambda: not remote_ports(service))
    # The connections to the database are at most ten, by default, and open when there is need.
    assert psutil.Process(service.process.pid).num_fds() <= before + 10


@pytest.fixture
def raw(service: Service) -> Iterator[Raw]:
    with Raw(service) as connection:
        yield connection
