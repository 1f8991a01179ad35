"""Timestamps: their form and order, whatever the settings of the database; updated_at grows with every change."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import psycopg
import pytest

from tests.support.fixtures import StartService
from tests.support.service_process import Client, Service
from tests.support.tasks import KINDS_OF_CHANGE

# --- Timestamps ------------------------------------------------------------------------------------------------------

INSTANTS = {
    "2026-01-31T08:15:30Z": "2026-01-31T08:15:30+00:00",
    "2026-01-31T08:15:30.1Z": "2026-01-31T08:15:30.100000+00:00",
    "2026-01-31T08:15:30.000001Z": "2026-01-31T08:15:30.000001+00:00",
    "2026-01-31T08:15:30+05:30": "2026-01-31T02:45:30+00:00",
    "2024-02-29T23:59:59.999999Z": "2024-02-29T23:59:59.999999+00:00",
    "1969-12-31T23:59:59.9Z": "1969-12-31T23:59:59.900000+00:00",
    "0001-01-01T00:00:00.000001Z": "0001-01-01T00:00:00.000001+00:00",
    "9999-12-31T23:59:59.999998Z": "9999-12-31T23:59:59.999998+00:00",
}


@pytest.mark.parametrize(("instant", "text"), INSTANTS.items())
def test_timestamps_are_in_utc_and_have_six_digits_or_none(
    service: Service, alice: Client, instant: str, text: str
) -> None:
    """As Python's isoformat writes them: none stand for a whole second."""
    task = alice.create()
    service.sql("UPDATE task SET created_at = %s, updated_at = %s WHERE id = %s", instant, instant, task["id"])
    expected = task | {"created_at": text, "updated_at": text}
    assert alice.get(f"/api/tasks/{task['id']}").json() == expected
    assert alice.put(f"/api/tasks/{task['id']}", json={}).json() == expected
    assert alice.tasks() == [expected]


def test_timestamps_sort_as_text(service: Service, alice: Client) -> None:
    for instant in INSTANTS:
        service.sql("INSERT INTO task (user_id, title, created_at) VALUES (%s, 'a', %s)", alice.user_id, instant)
    listed = [task["created_at"] for task in alice.tasks()]
    assert listed == sorted(INSTANTS.values(), reverse=True)


def test_new_timestamps_have_the_same_form(alice: Client) -> None:
    task = alice.create()
    changed = alice.patch(f"/api/tasks/{task['id']}/complete").json()
    for text in (task["created_at"], task["updated_at"], changed["updated_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?\+00:00", text)
        assert datetime.fromisoformat(text).isoformat() == text


def test_timestamps_do_not_depend_on_the_settings_of_the_database(
    database_url: str, start_service: StartService
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for setting in ("timezone = 'Asia/Kolkata'", "datestyle = 'German'", "intervalstyle = 'iso_8601'"):
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET {setting}".encode())
    service = start_service(database_url)
    with service.client("alice") as alice:
        task = alice.create()
        service.sql("UPDATE task SET created_at = '2026-01-31T08:15:30Z', updated_at = '2026-01-31T08:15:30.5Z'")
        [stored] = alice.tasks()
        assert stored["created_at"] == "2026-01-31T08:15:30+00:00"
        assert stored["updated_at"] == "2026-01-31T08:15:30.500000+00:00"
        assert abs(datetime.fromisoformat(task["created_at"]).timestamp() - time.time()) < 60
        changed = alice.put(f"/api/tasks/{task['id']}", json={"title": "new"}).json()
        assert abs(datetime.fromisoformat(changed["updated_at"]).timestamp() - time.time()) < 60


# --- The version: updated_at -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "action", "body", "changes"), [change for change in KINDS_OF_CHANGE if change.values[3]]
)
def test_a_change_moves_an_updated_at_in_the_future_by_a_microsecond(
    service: Service, alice: Client, method: str, action: str, body: object, changes: object
) -> None:
    """As a row has one that was written by a server whose clock was ahead."""
    task = alice.create(description="Two litres")
    service.sql("UPDATE task SET updated_at = '2100-01-01T00:00:00.999999Z' WHERE id = %s", task["id"])
    changed = alice.request(method, f"/api/tasks/{task['id']}{action}", json=body).json()
    assert changed["updated_at"] == "2100-01-01T00:00:01+00:00"


def test_changes_in_one_instant_have_an_updated_at_each(alice: Client) -> None:
    task = alice.create()
    path = f"/api/tasks/{task['id']}"
    with ThreadPoolExecutor(8) as threads:
        changed = threads.map(lambda n: alice.put(path, json={"title": str(n)}).json()["updated_at"], range(40))
    assert len({task["updated_at"], *changed}) == 41
