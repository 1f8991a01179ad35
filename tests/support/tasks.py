"""Answers about tasks, and statements that wait."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.service_process import Service
from tests.support.waiting import wait_until

NO_TASK = 2**62
"""An id that no task has."""


def wait_for_waiting_statements(service: Service, count: int) -> None:
    """Return when that many statements wait for a lock that somebody else holds."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    wait_until(lambda: len(service.sql(waiting)) >= count)


def what_is_stable(response: httpx.Response) -> dict[str, str]:
    """Return the headers of a response but those that every answer has a value of its own of."""
    return {name: value for name, value in response.headers.items() if name not in ("date", "x-request-id")}


# What a client can ask for: method, what follows the id in the path, body, and what becomes of a pending task that has
# a description. None deletes it.
CHANGES: list[Any] = [
    *(
        pytest.param("PUT", "", fields, fields, id=f"PUT {name}")
        for name, fields in {
            "title": {"title": "new"},
            "description": {"description": "new"},
            "completed": {"completed": True},
            "all fields": {"title": "new", "description": "new", "completed": True},
        }.items()
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
KINDS_OF_CHANGE = [
    change
    for change in [NO_CHANGE, *CHANGES]
    if change.id in ("PUT title", "PUT {}", "PATCH without a body", "PATCH true", "PATCH false", "DELETE")
]
"""A few of them."""
