"""Answers about tasks, and statements that wait."""

from __future__ import annotations

import time

import httpx

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
