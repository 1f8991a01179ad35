"""OpenTelemetry: what a collector is sent of each request and its statement, and what it is never sent."""

from __future__ import annotations

import gzip
import math
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, LiteralString

import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from sql import FIRST_PAGE, NEXT_PAGE, load
from tests.support.fixtures import StartService
from tests.support.postgres import held_port
from tests.support.readme import code
from tests.support.service_process import SECRET, Service, new_user_id, token
from tests.support.waiting import wait_until
from tests.support.wire import Raw


class Collector(ThreadingHTTPServer):
    """An OTLP collector that keeps all that it is sent: the bytes by their path, and the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Export)
        self.received: list[tuple[str, bytes]] = []
        self.spans: list[Span] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def wait_for_spans(self, trace_id: str, count: int, seconds: float = 10) -> list[Span]:
        """Return the spans of a trace, once there are so many; without those of single ASGI messages."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.trace_id.hex() == trace_id and span.kind != INTERNAL]

        wait_until(lambda: len(found()) >= count, seconds, found)
        return found()


INTERNAL = Span.SpanKind.SPAN_KIND_INTERNAL
SERVER = Span.SpanKind.SPAN_KIND_SERVER
CLIENT = Span.SpanKind.SPAN_KIND_CLIENT


class Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        self.server.received.append((self.path, body))
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the output of the tests to the tests."""


def attributes(span: Span) -> dict[str, str | int]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


def export_to(port: int) -> dict[str, Any]:
    """Return what starts a service as the README says, but exporting to another port, and sooner."""
    commands = code("pip install opentelemetry")
    [launcher] = re.findall(r"^(\S+) python service\.py$", commands, re.MULTILINE)
    settings = dict(re.findall(r"(OTEL_[A-Z_]+)=(\S+)", commands))
    here = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    return {"launcher": launcher} | settings | here


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector
        collector.shutdown()


@pytest.fixture(scope="module")
def traced(new_database: Callable[[], str], collector: Collector) -> Iterator[Service]:
    """The service under OpenTelemetry, with two workers."""
    service = Service(new_database(), WEB_CONCURRENCY="2", **export_to(collector.server_port))
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.remove()


def traceparent(trace_id: str, span_id: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{span_id}-01"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "statement", "verb"),
    [
        ("POST", "/api/tasks", {"title": "a task"}, 201, "create_task.sql", "INSERT"),
        ("GET", "/api/tasks", None, 200, "list_tasks.sql", "SELECT"),
        ("GET", "/api/tasks?status=pending", None, 200, "list_tasks_by_status.sql", "SELECT"),
        ("GET", "/api/tasks/{task_id}", None, 200, "get_task.sql", "SELECT"),
        ("PUT", "/api/tasks/{task_id}", {"title": "another"}, 200, "update_task.sql", "UPDATE"),
        ("PATCH", "/api/tasks/{task_id}/complete", None, 200, "complete_task.sql", "UPDATE"),
        ("DELETE", "/api/tasks/{task_id}", None, 204, "delete_task.sql", "DELETE"),
    ],
)
def test_a_request_and_its_statement_are_in_the_trace_of_the_client(
    traced: Service, collector: Collector, method: str, path: str, body: object, status: int, statement: str, verb: str
) -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    with traced.client(new_user_id()) as client:
        url = path.format(task_id=client.create()["id"])
        response = client.request(method, url, json=body, headers=traceparent(trace_id, span_id))
    assert response.status_code == status
    request, sent = sorted(collector.wait_for_spans(trace_id, 2), key=lambda span: span.kind)
    route = path.partition("?")[0]
    assert (request.kind, request.name, request.parent_span_id.hex()) == (SERVER, f"{method} {route}", span_id)
    found = attributes(request)
    assert (found["http.method"], found["http.target"], found["http.status_code"]) == (
        method,
        url.partition("?")[0],
        status,
    )
    assert (sent.kind, sent.name, sent.parent_span_id) == (CLIENT, verb, request.span_id)
    assert attributes(sent) == {"db.system": "postgresql", "db.statement": load(statement)}
    assert request.start_time_unix_nano < sent.start_time_unix_nano < sent.end_time_unix_nano
    assert sent.end_time_unix_nano < request.end_time_unix_nano


def test_a_creation_whose_key_is_taken_has_a_span_of_each_statement(traced: Service, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)
    with traced.client(new_user_id(), headers={"Idempotency-Key": "a-key"}) as client:
        task = client.create()
        headers = traceparent(trace_id, secrets.token_hex(8))
        assert client.post("/api/tasks", json={"title": "a task"}, headers=headers).json() == task
    request, *sent = sorted(collector.wait_for_spans(trace_id, 3), key=lambda span: span.start_time_unix_nano)
    assert [(span.name, span.parent_span_id) for span in sent] == [
        ("INSERT", request.span_id),
        ("SELECT", request.span_id),
    ]
    assert [attributes(span)["db.statement"] for span in sent] == [load("create_task.sql"), load("get_task_by_key.sql")]


def test_each_page_of_a_long_list_has_a_span(traced: Service, collector: Collector) -> None:
    trace_id = secrets.token_hex(16)
    with traced.client(new_user_id()) as client:
        fill = "INSERT INTO task (user_id, title) SELECT %s, 'a task' FROM generate_series(1, 1200)"
        traced.sql(fill, client.user_id)
        response = client.get("/api/tasks", headers=traceparent(trace_id, secrets.token_hex(8)))
        assert len(response.json()["items"]) == 1200
    pages = 1 + math.ceil((1201 - FIRST_PAGE) / NEXT_PAGE)  # until one is not full
    spans = collector.wait_for_spans(trace_id, 1 + pages)
    assert sorted(span.name for span in spans) == ["GET /api/tasks", *["SELECT"] * pages]


def test_a_change_that_waits_for_a_lock_has_one_span(
    database_url: str, start_service: StartService, collector: Collector
) -> None:
    """Its first try, with others, and the further ones, alone, are one call. Somebody else commits meanwhile."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    service = start_service(database_url, **export_to(collector.server_port))
    service.wait_until_ready()
    with (
        service.client(new_user_id()) as client,
        psycopg.connect(database_url) as locker,
        ThreadPoolExecutor(1) as threads,
    ):
        path = f"/api/tasks/{client.create()['id']}"
        locker.execute("UPDATE task SET title = 'locked' WHERE user_id = %s", (client.user_id,))
        answer = threads.submit(client.put, path, json={"title": "x"}, headers=traceparent(trace_id, span_id))
        waits: LiteralString = """
            SELECT pid, query_start FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND query LIKE '%%UPDATE task%%'
        """
        tries: set[tuple[Any, ...]] = set()

        def is_tried_again() -> bool:
            tries.update(service.sql(waits))
            return len(tries) >= 3

        wait_until(is_tried_again, 7)
        assert not answer.done()
        released = time.time_ns()
        locker.commit()
        assert answer.result().status_code == 200
    service.stop()  # which exports what is left
    request, sent = sorted(collector.wait_for_spans(trace_id, 2), key=lambda span: span.kind)
    assert (request.kind, sent.kind, sent.name) == (SERVER, CLIENT, "UPDATE")
    assert sent.status.code == Status.STATUS_CODE_UNSET
    assert sent.start_time_unix_nano < released < sent.end_time_unix_nano


def test_reads_that_share_a_message_have_a_span_each(
    database_url: str, start_service: StartService, collector: Collector
) -> None:
    service = start_service(database_url, **export_to(collector.server_port))
    service.wait_until_ready()
    trace_id = secrets.token_hex(16)
    trace = f"traceparent: {traceparent(trace_id, secrets.token_hex(8))['traceparent']}"
    authorization = f"Authorization: Bearer {token('alice')}"
    with ExitStack() as stack:
        connections = [stack.enter_context(Raw(service)) for _ in range(10)]
        for connection in connections:
            connection.send("GET /api/tasks/1", authorization)
        assert [connection.answer().status for connection in connections] == [404] * 10
        service.process.send_signal(signal.SIGSTOP)
        for connection in connections:
            connection.send("GET /api/tasks/1", authorization, trace)
        service.process.send_signal(signal.SIGCONT)
        assert [connection.answer().status for connection in connections] == [404] * 10
    service.stop()  # which exports what is left
    spans = collector.wait_for_spans(trace_id, 20)
    requests = {span.span_id for span in spans if span.kind == SERVER}
    sent = [span for span in spans if span.kind == CLIENT]
    assert len(requests) == 10
    assert sorted(span.parent_span_id for span in sent) == sorted(requests)
    assert max(span.start_time_unix_nano for span in sent) < min(span.end_time_unix_nano for span in sent)


def test_neither_tasks_nor_tokens_are_exported(
    database_url: str, start_service: StartService, collector: Collector
) -> None:
    """Not even where the database refuses a task, in an error that quotes it."""
    service = start_service(database_url, **export_to(collector.server_port))
    service.wait_until_ready()
    service.sql("ALTER TABLE task ADD CONSTRAINT none_of_this CHECK (title <> 'refused, and private')")
    trace_id = secrets.token_hex(16)
    headers = traceparent(trace_id, secrets.token_hex(8)) | {"Idempotency-Key": "private-key"}
    with service.client(new_user_id(), headers=headers) as client:
        path = f"/api/tasks/{client.create('a private title', description='private matters')['id']}"
        assert client.get(path).status_code == 200
        assert client.put(path, json={"title": "refused, and private"}).status_code == 422
        sent = client.headers["Authorization"].removeprefix("Bearer ")
        assert client.get(path, headers={"Authorization": f"Bearer {sent}x"}).status_code == 401
    service.stop()  # which exports what is left
    failed = [span for span in collector.wait_for_spans(trace_id, 7) if span.status.code == Status.STATUS_CODE_ERROR]
    assert [(span.name, span.status.message, list(span.events)) for span in failed] == [("UPDATE", "", [])]
    assert {path for path, _ in collector.received} == {"/v1/traces", "/v1/metrics"}
    everything = b"".join(body for _, body in collector.received)
    assert b"INSERT INTO task" in everything
    for private in (str(client.user_id), "private", sent, sent.split(".")[2], SECRET):
        assert private.encode() not in everything


def test_a_collector_that_is_down_disturbs_no_request(database_url: str, start_service: StartService) -> None:
    service = start_service(database_url, **export_to(held_port()))
    service.wait_until_ready()
    with service.client("alice", timeout=2) as client:
        for _ in range(20):
            client.create()
        assert len(client.tasks()) == 20
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("asked", [False, True])
def test_opentelemetry_is_imported_only_where_it_is_asked_for(
    database_url: str, start_service: StartService, collector: Collector, asked: bool
) -> None:
    options = export_to(collector.server_port) | ({} if asked else {"launcher": ""})
    service = start_service(database_url, PYTHONPROFILEIMPORTTIME="1", **options)
    service.wait_until_ready()
    assert re.search(r"^import time:.* asyncpg$", service.log, re.MULTILINE)
    assert bool(re.search(r"^import time:.* opentelemetry\b", service.log, re.MULTILINE)) == asked
