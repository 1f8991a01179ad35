"""Lists that are filled, asked for, and read bit by bit."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from tests.support.postgres import Postgres
from tests.support.service_process import Service

Task = dict[str, Any]

COMPLETED = {"all": None, "pending": False, "completed": True}


def fill(
    service: Service,
    user_id: str | None,
    count: int,
    *,
    title: str | None = None,
    description: str | None = None,
    completed: bool | None = None,
) -> None:
    """Add tasks, many of them made at the same moment, and some of them on a whole second."""
    service.sql(
        """
        INSERT INTO task (user_id, title, description, completed, created_at, updated_at)
        SELECT %s, coalesce(%s, 'task ' || n), %s, coalesce(%s, n %% 3 = 0), moment, moment
        FROM generate_series(1, %s) AS n,
             LATERAL (SELECT timestamptz '2026-01-01 00:00Z' + n * 7919 %% 13 * interval '0.500001 s') AS _ (moment)
        """,
        user_id,
        title,
        description,
        completed,
        count,
    )


def stored(service: Service, user_id: str | None, status: str = "all") -> list[Task]:
    """Return what a list must have, in its order, by another way than the service's."""
    rows = service.sql(
        "SELECT to_jsonb(task) - 'idempotency_key' - 'request_hash', created_at, updated_at FROM task"
        " WHERE user_id = %s",
        user_id,
    )
    tasks = [row | {"created_at": as_text(created), "updated_at": as_text(updated)} for row, created, updated in rows]
    wanted = COMPLETED[status]
    tasks = [task for task in tasks if wanted is None or task["completed"] is wanted]
    return sorted(tasks, key=lambda task: (datetime.fromisoformat(task["created_at"]), task["id"]), reverse=True)


def as_text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


def pages_read(postgres: Postgres, user_id: str | None) -> list[int]:
    """Return how many tasks each statement has asked for that has read a page of this user's."""
    log = (postgres.folder / "log").read_text(errors="replace")
    return [int(limit) for limit in re.findall(rf"arameters: \$1 = '{user_id}', .*\$4 = '\d+', \$5 = '(\d+)'", log)]
