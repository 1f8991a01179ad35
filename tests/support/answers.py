"""One request for each status that there is."""

from __future__ import annotations

from typing import Any

APP, OTHER_APP = "https://app.example.com", "http://localhost:4321"


STALE = '"2000-01-01T00:00:00+00:00"'

# One request for each status: method, path, and the rest. {id} is a task of the caller's.
API_READS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 GET list": ("GET", "/api/tasks", {}),
    "200 GET": ("GET", "/api/tasks/{id}", {}),
    "200 GET with a slash": ("GET", "/api/tasks/", {}),
    "200 HEAD list": ("HEAD", "/api/tasks", {}),
    "200 HEAD": ("HEAD", "/api/tasks/{id}", {}),
    "304 GET list": ("GET", "/api/tasks", {"headers": {"If-None-Match": "*"}}),
    "304 GET": ("GET", "/api/tasks/{id}", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD list": ("HEAD", "/api/tasks", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD": ("HEAD", "/api/tasks/{id}", {"headers": {"If-None-Match": "*"}}),
}
API_WRITES_AND_ERRORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "201 POST": ("POST", "/api/tasks", {"json": {"title": "milk"}}),
    "201 POST with a key": ("POST", "/api/tasks", {"json": {"title": "milk"}, "headers": {"Idempotency-Key": "a"}}),
    "200 PUT": ("PUT", "/api/tasks/{id}", {"json": {"title": "milk"}}),
    "200 PUT nothing": ("PUT", "/api/tasks/{id}", {"json": {}}),
    "200 PATCH": ("PATCH", "/api/tasks/{id}/complete", {}),
    "204 DELETE": ("DELETE", "/api/tasks/{id}", {}),
    "400 POST": ("POST", "/api/tasks", {"content": b"{"}),
    "400 POST with a key": ("POST", "/api/tasks", {"json": {"title": "milk"}, "headers": {"Idempotency-Key": "a b"}}),
    "401 GET": ("GET", "/api/tasks", {"headers": {"Authorization": ""}}),
    "401 HEAD": ("HEAD", "/api/tasks", {"headers": {"Authorization": ""}}),
    "401 POST": ("POST", "/api/tasks", {"headers": {"Authorization": "Bearer nonsense"}, "json": {"title": "milk"}}),
    "401 of no path": ("GET", "/api/nothing", {"headers": {"Authorization": ""}}),
    "404 GET": ("GET", "/api/tasks/0", {}),
    "404 HEAD": ("HEAD", "/api/tasks/0", {}),
    "404 PUT": ("PUT", "/api/tasks/0", {"json": {}}),
    "404 PATCH": ("PATCH", "/api/tasks/0/complete", {}),
    "404 DELETE": ("DELETE", "/api/tasks/0", {}),
    "404 of no path": ("GET", "/api/nothing", {}),
    "404 of /api": ("GET", "/api", {}),
    "405 GET": ("GET", "/api/tasks/1/complete", {}),
    "405 DELETE": ("DELETE", "/api/tasks", {}),
    "412 PUT": ("PUT", "/api/tasks/{id}", {"json": {}, "headers": {"If-Match": STALE}}),
    "412 PATCH": ("PATCH", "/api/tasks/{id}/complete", {"headers": {"If-Match": STALE}}),
    "412 DELETE": ("DELETE", "/api/tasks/{id}", {"headers": {"If-Match": STALE}}),
    "413 POST": ("POST", "/api/tasks", {"content": b" " * 70_000}),
    "413 DELETE": ("DELETE", "/api/tasks/{id}", {"content": b" " * 70_000}),
    "415 POST": ("POST", "/api/tasks", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    "415 DELETE": ("DELETE", "/api/tasks/{id}", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    "422 GET list": ("GET", "/api/tasks?status=x", {}),
    "422 GET": ("GET", "/api/tasks/x", {}),
    "422 POST": ("POST", "/api/tasks", {"json": {}}),
    "500 POST": ("POST", "/api/tasks", {"json": {"title": "bug"}}),
}
BESIDE_THE_API: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 /": ("GET", "/", {}),
    "200 /health": ("GET", "/health", {}),
    "200 /health/ready": ("GET", "/health/ready", {}),
    "200 /docs": ("GET", "/docs", {}),
    "200 HEAD /docs": ("HEAD", "/docs", {}),
    "200 /docs/swagger_bundle.js": ("GET", "/docs/swagger_bundle.js", {}),
    "200 /redoc": ("GET", "/redoc", {}),
    "200 /openapi.json": ("GET", "/openapi.json", {}),
    "404 /nothing": ("GET", "/nothing", {}),
    "404 /docs/nothing": ("GET", "/docs/nothing", {}),
    "405 /health": ("POST", "/health", {}),
}
API = API_READS | API_WRITES_AND_ERRORS
ALL = API | BESIDE_THE_API
