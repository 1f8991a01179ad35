"""Answers about tasks, and statements that wait."""

from __future__ import annotations

import itertools
import time
from typing import Any

import httpx
import pytest

from tests.support.service_process import Service

NOT_FOUND = {"detail": "Task not found"}
NO_TASK = 2**62
"""An id that no task has."""


def wait_for_waiting_statements(service: Service, count: int) -> None:
    """Return when that many statements wait for a lock that somebody else holds."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    deadline = time.monotonic() + 5
    while len(service.sql(waiting)) < count:
        assert time.monotonic() < deadline, f"less than {count} statements are waiting"
        time.sleep(0.02)


def what_is_stable(response: httpx.Response) -> dict[str, str]:
    """Return the headers of a response but those that every answer has a value of its own of."""
    return {name: value for name, value in response.headers.items() if name not in ("date", "x-request-id")}


# What a client can ask for: method, what follows the id in the path, body, and what becomes of a pending task that has
# a description. None deletes it.
CHANGES: list[Any] = [
    *(
        pytest.param("PUT", "", dict(fields), dict(fields), id=f"PUT {'+'.join(name for name, _ in fields)}")
        for count in (1, 2, 3)
        for fields in itertools.combinations({"title": "new", "description": "new", "completed": True}.items(), count)
    ),
    pytest.param("PUT", "", {"description": None}, {"description": None}, id="PUT null description"),
    pytest.param("PUT", "", {"description": ""}, {"description": ""}, id="PUT empty description"),
    pytest.param("PUT", "", {"completed": False}, {"completed": False}, id="PUT what is there already"),
    pytest.param("PATCH", "/complete", None, {"completed": True}, id="PATCH without a body"),
    pytest.param("PATCH", "/complete", {}, {"completed": True}, id="PATCH {}"),
    pytest.param("PATCH", "/complete", {"completed": True}, {"completed": True}, id="PATCH true"),
    pytest.param("PATCH", "/complete", {"completed": False}, {"completed": False}, id="PATCH false"),
    pytest.param("DELETE", "", None, None, id="DELETE"),
]
NO_CHANGE = pytest.param("PUT", "", {}, {}, id="PUT {}")
