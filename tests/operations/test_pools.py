"""The pool of connections to the database, and poolers in between."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import psycopg.sql
import pytest

from sql.database import read_url
from tests.support.fixtures import StartService
from tests.support.postgres import Postgres
from tests.support.settings import assert_works
from tests.support.waiting import wait_until

# --- Poolers, and the service's own pool -----------------------------------------------------------------------------


def test_no_statement_is_named_when_a_pooler_could_lose_it(
    postgres: Postgres, database: str, start_service: StartService
) -> None:
    assert_works(start_service(f"{postgres.url(database)}?pgbouncer=true"))
    assert executed(postgres, database) == {"<unnamed>"}


def test_statements_are_named_otherwise(postgres: Postgres, database: str, start_service: StartService) -> None:
    assert_works(start_service(f"{postgres.url(database)}?pgbouncer=false&statement_cache_size=100"))
    assert "<unnamed>" not in executed(postgres, database)


def test_what_tells_of_a_pooler() -> None:
    signs = ["pgbouncer=true", "statement_cache_size=0", "prepared_statement_cache_size=0"]
    for url in ("postgresql://user@host:6543/db", *(f"postgresql://user@host/db?{sign}" for sign in signs)):
        assert read_url(url)["statement_cache_size"] == 0
    assert "statement_cache_size" not in read_url("postgresql://user@host:5432/db")


def test_a_pooler_that_the_url_does_not_tell_of_is_noticed_and_gets_no_named_statements(
    postgres: Postgres, pgbouncer: int, database: str, start_service: StartService
) -> None:
    """By its refusal of a startup parameter."""
    service = start_service(f"postgresql://postgres@127.0.0.1:{pgbouncer}/{database}", DATABASE_POOL_SIZE="20")
    service.wait_until_ready()
    with service.client("alice") as alice, ThreadPoolExecutor(40) as threads:
        paths = ["/api/tasks", "/api/tasks?status=pending", "/api/tasks?status=completed", "/api/tasks/1"] * 20
        answers = list(threads.map(alice.get, paths))  # of several statements, so that several connections are used
    assert {answer.status_code for answer in answers} == {200, 404}
    assert executed(postgres, database) <= {"<unnamed>"}


def executed(postgres: Postgres, database: str) -> set[str]:
    """Return the names of the prepared statements that were executed in a database."""
    return set(re.findall(rf"^{database}: LOG:  execute (\S+):", (postgres.folder / "log").read_text(), re.MULTILINE))


def test_any_number_of_requests_get_through_a_pooler_with_two_connections(
    postgres: Postgres, pgbouncer: int, database: str, start_service: StartService
) -> None:
    url = f"postgresql://postgres@127.0.0.1:{pgbouncer}/{database}?pgbouncer=true"
    service = start_service(url, DATABASE_POOL_SIZE="20")
    service.wait_until_ready()
    with service.client("alice") as alice, service.client("bob") as bob, ThreadPoolExecutor(40) as threads:

        def use(number: int) -> None:
            """Send each of the statements, so that a connection that mixes two of them up is noticed."""
            client = (alice, bob)[number % 2]
            task = client.create(f"task {number}")
            path = f"/api/tasks/{task['id']}"
            assert client.get(path).json() == task
            assert client.patch(f"{path}/complete").json()["completed"] is True
            assert client.put(path, json={"title": f"changed {number}"}).json()["title"] == f"changed {number}"
            if number % 4 < 2:
                assert client.delete(path).status_code == 204
            assert client.get("/api/tasks").status_code == 200

        list(threads.map(use, range(60)))
        for client, odd in ((alice, 0), (bob, 1)):
            kept = [f"changed {number}" for number in range(60) if number % 2 == odd and number % 4 >= 2]
            assert sorted(task["title"] for task in client.tasks()) == sorted(kept)
    assert executed(postgres, database) == {"<unnamed>"}


def test_the_pool_opens_no_more_connections_than_it_may(database_url: str, start_service: StartService) -> None:
    service = start_service(f"{database_url}?application_name=bounded", DATABASE_POOL_SIZE="3")
    service.wait_until_ready()
    waiting = """
        SELECT pid, query_start FROM pg_stat_activity
        WHERE application_name = 'bounded' AND datname = current_database()
    """
    with (
        service.client("alice") as alice,
        psycopg.connect(database_url) as lock,
        psycopg.connect(database_url, autocommit=True) as admin,
        ThreadPoolExecutor(12) as threads,
    ):
        task, another = f"/api/tasks/{alice.create()['id']}", f"/api/tasks/{alice.create()['id']}"
        requests: list[tuple[str, str, object, int]] = [  # of six statements, of which each would take a connection
            ("GET", "/api/tasks", None, 200),
            ("GET", "/api/tasks?status=pending", None, 200),
            ("GET", task, None, 200),
            ("POST", "/api/tasks", {"title": "new"}, 201),
            ("PUT", task, {"title": "changed"}, 200),
            ("PATCH", f"{another}/complete", None, 200),
        ]
        lock.execute("LOCK TABLE task IN ACCESS EXCLUSIVE MODE")
        answers = [threads.submit(alice.request, method, path, json=body) for method, path, body, _ in requests]
        # No statement waits for long: it is sent again and again.
        tries, backends = set[object](), set[int]()

        def all_are_tried_again() -> bool:
            found = admin.execute(waiting).fetchall()
            backends.update(pid for pid, _ in found)
            tries.update(found)
            return len(tries) >= 30

        wait_until(all_are_tried_again, 7, lambda: f"{len(tries)} tries")
        assert len(backends) == 3
        lock.rollback()
        assert [answer.result().status_code for answer in answers] == [status for *_, status in requests]


@pytest.mark.skipif(sys.platform != "linux", reason="the timers of a connection are asked of /proc")
def test_the_kernel_asks_the_database_whether_it_is_still_there(database_url: str, start_service: StartService) -> None:
    """A machine that dies says nothing, and whoever waits for its answer sends nothing."""
    service = start_service(database_url)
    service.wait_until_ready()
    database_port = urlsplit(database_url).port

    def timers() -> set[str]:
        """Return the kinds of the timers that the kernel has for the connections of the service to the database."""
        connections = psutil.Process(service.process.pid).net_connections("tcp4")
        ports = {f"{each.laddr.port:04X}" for each in connections if each.raddr and each.raddr.port == database_port}
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return {
            timer[:2]
            for _, here, there, state, _, timer, *_ in lines
            if state == "01" and here[-4:] in ports and there[-4:] == f"{database_port:04X}"
        }

    wait_until(lambda: timers() == {"02"}, 2, lambda: f"{timers()}")  # keep-alive; 00 is none
