"""Requests for all kinds of answers."""

from __future__ import annotations

from typing import Any

APP, OTHER_APP = "https://app.example.com", "http://localhost:4321"


STALE = '"2000-01-01T00:00:00+00:00"'

# Method, path, and the rest of a request, by the status of its answer. {id} is a task of the caller's.
API_READS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 GET list": ("GET", "/api/tasks", {}),
    "200 GET": ("GET", "/api/tasks/{id}", {}),
    "200 GET with a slash": ("GET", "/api/tasks/", {}),
    "200 HEAD": ("HEAD", "/api/tasks/{id}", {}),
    "304 GET list": ("GET", "/api/tasks", {"headers": {"If-None-Match": "*"}}),
    "304 HEAD": ("HEAD", "/api/tasks/{id}", {"headers": {"If-None-Match": "*"}}),
}
API_WRITES_AND_ERRORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "201 POST": ("POST", "/api/tasks", {"json": {"title": "milk"}}),
    "200 PUT": ("PUT", "/api/tasks/{id}", {"json": {"title": "milk"}}),
    "200 PATCH": ("PATCH", "/api/tasks/{id}/complete", {}),
    "204 DELETE": ("DELETE", "/api/tasks/{id}", {}),
    "400 POST": ("POST", "/api/tasks", {"content": b"{"}),
    "401 GET": ("GET", "/api/tasks", {"headers": {"Authorization": ""}}),
    "401 HEAD": ("HEAD", "/api/tasks", {"headers": {"Authorization": ""}}),
    "401 POST": ("POST", "/api/tasks", {"headers": {"Authorization": "Bearer nonsense"}, "json": {"title": "milk"}}),
    "401 of no path": ("GET", "/api/nothing", {"headers": {"Authorization": ""}}),
    "404 GET": ("GET", "/api/tasks/0", {}),
    "404 HEAD": ("HEAD", "/api/tasks/0", {}),
    "404 DELETE": ("DELETE", "/api/tasks/0", {}),
    "404 of no path": ("GET", "/api/nothing", {}),
    "404 of /api": ("GET", "/api", {}),
    "405 DELETE": ("DELETE", "/api/tasks", {}),
    "412 PUT": ("PUT", "/api/tasks/{id}", {"json": {}, "headers": {"If-Match": STALE}}),
    "413 POST": ("POST", "/api/tasks", {"content": b" " * 70_000}),
    "415 DELETE": ("DELETE", "/api/tasks/{id}", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}),
    "422 GET list": ("GET", "/api/tasks?status=x", {}),
    "422 POST": ("POST", "/api/tasks", {"json": {}}),
    "500 POST": ("POST", "/api/tasks", {"json": {"title": "bug"}}),
    "503 POST": ("POST", "/api/tasks", {"json": {"title": "outage"}}),
}
BESIDE_THE_API: dict[str, tuple[str, str, dict[str, Any]]] = {
    "200 /": ("GET", "/", {}),
    "200 /health/ready": ("GET", "/health/ready", {}),
    "200 HEAD /docs": ("HEAD", "/docs", {}),
    "200 /docs/swagger_bundle.js": ("GET", "/docs/swagger_bundle.js", {}),
    "200 /openapi.json": ("GET", "/openapi.json", {}),
    "404 /nothing": ("GET", "/nothing", {}),
    "405 /health": ("POST", "/health", {}),
}
API = API_READS | API_WRITES_AND_ERRORS
ALL = API | BESIDE_THE_API
EACH_STATUS = [*{name[:3]: name for name in API}.values(), "200 /"]
"""A request for each status, and one beside the API."""
