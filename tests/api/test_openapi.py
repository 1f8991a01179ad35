"""The OpenAPI document: what it promises is what the service does, tried by hand and by schemathesis."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis

from tests.support.fixtures import StartService
from tests.support.postgres import held_port
from tests.support.service_process import ROOT, Client, Service, run_command, token

Document = dict[str, Any]

# Each operation, and each status that it can answer with.
ANY_TASK_ENDPOINT = {401, 422, 500, 503}
WITH_BODY = {400, 413, 415}
STATUSES = {
    "GET /api/tasks": {200, 304} | ANY_TASK_ENDPOINT,
    "POST /api/tasks": {201} | ANY_TASK_ENDPOINT | WITH_BODY,
    "GET /api/tasks/{task_id}": {200, 304, 404} | ANY_TASK_ENDPOINT,
    "PUT /api/tasks/{task_id}": {200, 404, 412} | ANY_TASK_ENDPOINT | WITH_BODY,
    "DELETE /api/tasks/{task_id}": {204, 404, 412} | {400, 413, 415} | ANY_TASK_ENDPOINT,
    "PATCH /api/tasks/{task_id}/complete": {200, 404, 412} | ANY_TASK_ENDPOINT | WITH_BODY,
}
CONDITIONS = {
    "GET": "If-None-Match",
    "POST": "Idempotency-Key",
    "PUT": "If-Match",
    "PATCH": "If-Match",
    "DELETE": "If-Match",
}
ANSWERS = [(operation, status) for operation, statuses in STATUSES.items() for status in sorted(statuses)]


@pytest.fixture(scope="module")
def document(service: Service) -> Document:
    return get_json(service, "/openapi.json")


@pytest.fixture(scope="module")
def with_a_bug(new_database: Callable[[], str]) -> Iterator[Client]:
    """A client of a service whose statements name a column that is not there, as only a bug would make them do."""
    service = Service(new_database())
    service.wait_until_ready()
    service.sql("ALTER TABLE task RENAME COLUMN user_id TO owner")
    with service.client("somebody") as client:
        yield client
    service.remove()


@pytest.fixture(scope="module")
def without_database() -> Iterator[Client]:
    """A client of a service that nothing listens for at its DATABASE_URL."""
    service = Service(f"postgresql://postgres@127.0.0.1:{held_port()}/tasks")
    with service.client("somebody") as client:
        yield client
    service.remove()


def get_json(service: Service, path: str) -> Document:
    document: Document = httpx.get(service.url + path).json()
    return document


def operation_of(document: Document, operation: str) -> Document:
    method, path = operation.split()
    found: Document = document["paths"][path][method.lower()]
    return found


def parameters_of(document: Document, operation: str) -> dict[str, Document]:
    """Return the parameters of an operation by their names."""
    listed = operation_of(document, operation).get("parameters", [])
    parameters = {parameter["name"]: parameter for parameter in (resolve(document, value) for value in listed)}
    assert len(parameters) == len(listed)
    return parameters


def resolve(document: Document, value: Document) -> Document:
    """Return what a reference object refers to; it must be within the document and exist."""
    while "$ref" in value:
        found: Any = document
        root, *keys = value["$ref"].split("/")
        assert root == "#"
        for key in keys:
            found = found[key.replace("~1", "/").replace("~0", "~")]
        value = found
    return value


def validator(document: Document, schema: Document) -> jsonschema_rs.Validator:
    """Return a validator for a schema of the document, which may refer to the others."""
    return jsonschema_rs.Draft202012Validator(
        {"allOf": [schema], "components": document["components"]}, validate_formats=True
    )


def everything_in(value: Any) -> Iterator[Document]:
    """Yield every object of the document."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from everything_in(inner)


def example_of(document: Document, media: Document) -> Any:
    """Return what the documentation pages show for a body: its example, or one that is put together by its schema."""
    if "example" in media:
        return media["example"]
    if isinstance(media.get("examples"), dict):
        return next(iter(media["examples"].values()))["value"]
    return example_by_schema(document, media["schema"])


def example_by_schema(document: Document, schema: Document) -> Any:
    schema = resolve(document, schema)
    if "examples" in schema:
        return schema["examples"][0]
    if "const" in schema or "enum" in schema:
        return schema.get("const") or schema["enum"][0]
    if schema.get("type") == "array":
        return [example_by_schema(document, schema["items"])]
    assert "properties" in schema, f"no example in {schema}"
    return {name: example_by_schema(document, inner) for name, inner in schema["properties"].items()}


def test_the_document_is_valid_openapi_3_1(document: Document) -> None:
    assert re.fullmatch(r"3\.1\.\d", document["openapi"])
    schemathesis.openapi.from_dict(document).validate()


def test_its_schemas_are_valid_json_schemas(document: Document) -> None:
    """OpenAPI's own schema says nothing about what is in a schema object."""
    schemas = [*document["components"]["schemas"].values()]
    schemas += [resolve(document, value)["schema"] for value in everything_in(document["paths"]) if "schema" in value]
    for schema in schemas:
        jsonschema_rs.meta.validate(schema)


def test_every_reference_leads_somewhere_and_every_component_is_used(document: Document) -> None:
    references = {value["$ref"] for value in everything_in(document) if "$ref" in value}
    components = {
        f"#/components/{kind}/{name}"
        for kind, named in document["components"].items()
        for name in named
        if kind != "securitySchemes"  # these are named, not referred to
    }
    assert references == components


def test_the_document_has_every_operation_and_no_other(document: Document) -> None:
    methods = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
    assert {f"{key.upper()} {path}" for path, item in document["paths"].items() for key in item if key in methods} == {
        *STATUSES
    }


@pytest.mark.parametrize("operation", STATUSES)
def test_an_operation_has_exactly_the_statuses_that_can_occur(document: Document, operation: str) -> None:
    assert {int(status) for status in operation_of(document, operation)["responses"]} == STATUSES[operation]


@pytest.mark.parametrize("operation", STATUSES)
def test_an_operation_has_an_id_and_a_summary_in_plain_text(document: Document, operation: str) -> None:
    """A client generator makes a function's name of the id; the summary is shown as it is, Markdown and all."""
    assert re.fullmatch("[a-z]+(_[a-z]+)*", operation_of(document, operation)["operationId"])
    assert re.fullmatch(r"[A-Z][^`*\n]*[^`*\n.]", operation_of(document, operation)["summary"])


def test_no_two_operations_have_the_same_id(document: Document) -> None:
    ids = [operation_of(document, operation)["operationId"] for operation in STATUSES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("operation", STATUSES)
def test_a_bearer_token_is_asked_for_under_api_and_nowhere_else(document: Document, operation: str) -> None:
    (name, scheme), *others = document["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"].lower(), scheme["bearerFormat"], others) == ("http", "bearer", "JWT", [])
    expected: list[Document] = [{name: []}] if " /api/" in operation else []
    assert operation_of(document, operation).get("security", document.get("security", [])) == expected


@pytest.mark.parametrize("operation", STATUSES)
def test_the_parameters_are_those_of_the_path_the_status_of_the_list_and_the_conditions(
    document: Document, operation: str
) -> None:
    method, path = operation.split()
    expected = {("path", name, True) for name in re.findall("{(.*?)}", path)}
    expected |= {("query", "status", False)} if operation == "GET /api/tasks" else set()
    expected |= {("header", CONDITIONS[method], False)} if path.startswith("/api/") else set()
    parameters = parameters_of(document, operation)
    assert {(parameter["in"], name, parameter.get("required", False)) for name, parameter in parameters.items()} == (
        expected
    )


def test_the_version_is_the_same_everywhere(service: Service, document: Document) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    found = [document["info"]["version"], *(get_json(service, path)["version"] for path in ("/", "/health"))]
    assert found == [version] * 3


def test_the_root_leads_to_the_document_and_its_pages(service: Service, document: Document) -> None:
    about = get_json(service, "/")
    assert (about["title"], about["description"]) == (document["info"]["title"], document["info"]["description"])
    assert [about["openapi_url"], about["docs_url"], about["redoc_url"]] == ["/openapi.json", "/docs", "/redoc"]


def test_every_example_is_valid_by_its_own_schema(document: Document) -> None:
    for value in everything_in(document):
        if isinstance(value.get("examples"), list):
            for example in value["examples"]:
                validator(document, value).validate(example)
        if "example" in value and "schema" in value:
            validator(document, value["schema"]).validate(value["example"])


@pytest.mark.parametrize("operation", STATUSES)
def test_every_body_has_an_example_that_is_valid(document: Document, operation: str) -> None:
    """Without one, the documentation pages show "string"."""
    described = operation_of(document, operation)
    bodies = [described["requestBody"]] if "requestBody" in described else []
    for body in [*bodies, *described["responses"].values()]:
        media = resolve(document, body).get("content", {}).get("application/json")
        if media:
            validator(document, media["schema"]).validate(example_of(document, media))


# What is valid, at its edges. JSON cannot carry the lone surrogate to the validator, so it is not among these.
BODIES: list[tuple[Document, bool]] = [
    ({"title": "a" * 200}, True),
    ({"title": "a" * 201}, False),
    ({"title": "😀" * 200}, True),
    ({"title": "😀" * 201}, False),
    ({"title": ""}, False),
    ({"title": " \t\r\n\v\f"}, False),
    ({"title": "\u3000\u2003\u00a0\u1680\u2028\u2029\u202f\u205f"}, False),
    ({"title": "\u001c\u001d\u001e\u001f\u0085"}, False),  # white space to Unicode and Python, not to ECMAScript's \s
    ({"title": "\ufeff"}, True),  # the other way round
    ({"title": " a\n"}, True),
    ({"title": "a\0b"}, False),
    ({"title": None}, False),
    ({"title": 7}, False),
    ({"title": "a", "description": None}, True),
    ({"title": "a", "description": ""}, True),
    ({"title": "a", "description": "😀" * 2000}, True),
    ({"title": "a", "description": "😀" * 2001}, False),
    ({"title": "a", "description": "\0"}, False),
    ({"title": "a", "description": 7}, False),
    ({"title": "a", "completed": False}, True),
    ({"title": "a", "completed": None}, False),
    ({"title": "a", "completed": 1}, False),
    ({"title": "a", "id": "x", "user_id": 1, "created_at": None, "priority": {"high": []}}, True),
]
SHOWN = [ascii(body)[:60] for body, _ in BODIES]


def document_and_service(document: Document, client: Client, operation: str, body: Any) -> tuple[bool, bool]:
    """Return whether the document calls a body valid and whether the service takes it."""
    method, path = operation.split()
    described = operation_of(document, operation)["requestBody"]["content"]["application/json"]["schema"]
    task = client.create() if "{" in path else {"id": 0}
    response = client.request(method, path.format(task_id=task["id"]), content=json.dumps(body))
    assert response.status_code in (200, 201, 422), response.text
    return validator(document, described).is_valid(body), response.is_success


@pytest.mark.parametrize(("body", "valid"), BODIES, ids=SHOWN)
def test_document_and_service_have_the_same_limits(
    document: Document, alice: Client, body: Document, valid: bool
) -> None:
    for operation in ("POST /api/tasks", "PUT /api/tasks/{task_id}"):
        assert document_and_service(document, alice, operation, body) == (valid, valid), operation


@pytest.mark.parametrize(
    ("operation", "body", "valid"),
    [
        ("POST /api/tasks", {}, False),
        ("POST /api/tasks", {"description": "a"}, False),
        ("POST /api/tasks", None, False),
        ("PUT /api/tasks/{task_id}", {}, True),
        ("PUT /api/tasks/{task_id}", [], False),
        ("PUT /api/tasks/{task_id}", None, False),
        ("PATCH /api/tasks/{task_id}/complete", {}, True),
        ("PATCH /api/tasks/{task_id}/complete", {"completed": True}, True),
        ("PATCH /api/tasks/{task_id}/complete", {"completed": None}, False),
        ("PATCH /api/tasks/{task_id}/complete", {"title": 7}, True),
        ("PATCH /api/tasks/{task_id}/complete", None, True),
    ],
)
def test_document_and_service_require_the_same_fields(
    document: Document, alice: Client, operation: str, body: Any, valid: bool
) -> None:
    assert document_and_service(document, alice, operation, body) == (valid, valid)


def test_a_body_is_required_exactly_where_an_empty_one_is_refused(document: Document, alice: Client) -> None:
    for operation, statuses in STATUSES.items():
        if statuses >= WITH_BODY and "DELETE" not in operation:
            method, path = operation.split()
            response = alice.request(method, path.format(task_id=alice.create()["id"]))
            required = operation_of(document, operation)["requestBody"].get("required", False)
            assert required == (response.status_code == 400), operation


@pytest.mark.parametrize("status", ["", "all", "pending", "completed", "done", "ALL"])
def test_document_and_service_know_the_same_values_of_status(document: Document, alice: Client, status: str) -> None:
    """An empty one counts as none, which OpenAPI says beside the schema."""
    accepted = alice.get("/api/tasks", params={"status": status}).is_success
    parameter = parameters_of(document, "GET /api/tasks")["status"]
    valid = validator(document, parameter["schema"]).is_valid(status)
    assert (valid or (status == "" and parameter.get("allowEmptyValue", False))) == accepted


@pytest.mark.parametrize(
    "key",
    ["!~", '"a"', '"', '"a', "x" * 255, "x" * 256, f'"{"x" * 255}"', f'"{"x" * 256}"', "", '""', '""a', "a b", "é"],
    ids=ascii,
)
def test_document_and_service_take_the_same_idempotency_keys(document: Document, alice: Client, key: str) -> None:
    response = alice.post("/api/tasks", json={"title": "a"}, headers={b"Idempotency-Key": key.encode()})
    assert response.status_code in (201, 400)
    schema = parameters_of(document, "POST /api/tasks")["Idempotency-Key"]["schema"]
    assert validator(document, schema).is_valid(key) == response.is_success


def test_the_default_of_status_is_what_a_list_without_it_has(document: Document, alice: Client) -> None:
    alice.create(completed=True)
    alice.create()
    default = parameters_of(document, "GET /api/tasks")["status"]["schema"]["default"]
    assert alice.get("/api/tasks").json()["items"] == alice.tasks(default)


def test_a_field_has_a_default_only_where_leaving_it_out_sets_it(document: Document, alice: Client) -> None:
    """A form made from the document fills in the defaults, and in a change would overwrite what was not touched."""
    task = alice.create()
    for operation, statuses in STATUSES.items():
        if statuses >= WITH_BODY and "DELETE" not in operation:
            media = operation_of(document, operation)["requestBody"]["content"]["application/json"]
            for field, rule in resolve(document, media["schema"])["properties"].items():
                assert "default" not in rule or (operation == "POST /api/tasks" and rule["default"] == task[field])


def test_the_defaults_of_a_new_task_are_told(document: Document, alice: Client) -> None:
    """In words: as `default` they would make openapi-typescript require the fields that have one."""
    new_task = document["components"]["schemas"]["NewTask"]
    [defaults] = re.findall("{.*}", new_task["description"])
    task = alice.create()
    left_out = new_task["properties"].keys() - {"title"}
    assert {name: task[name] for name in left_out} == dict.fromkeys(left_out) | json.loads(defaults)


def test_the_document_names_the_limit_of_a_body(document: Document) -> None:
    description = resolve(document, operation_of(document, "POST /api/tasks")["responses"]["413"])["description"]
    assert re.search("65[, ]?536|64 KiB", description)


@pytest.mark.parametrize(("operation", "status"), ANSWERS)
def test_each_answer_that_is_documented_is_given_as_documented(
    document: Document,
    alice: Client,
    nobody: Client,
    with_a_bug: Client,
    without_database: Client,
    operation: str,
    status: int,
) -> None:
    client = {401: nobody, 500: with_a_bug, 503: without_database}.get(status, alice)
    response = provoke(status, operation, client=client, task_id=alice.create()["id"])
    assert response.status_code == status
    assert_documented(document, operation, response)
    if status >= 400 and status != 422:  # which has another answer for each thing that can be wrong
        answer = resolve(document, operation_of(document, operation)["responses"][str(status)])
        assert response.json() == example_of(document, answer["content"]["application/json"])


def provoke(status: int, operation: str, *, client: Client, task_id: int) -> httpx.Response:
    """Send the request that this status is the answer to."""
    method, path = operation.split()
    body = {"title": "a task"} if method == "POST" else {} if method == "PUT" else None
    request: Document = {} if body is None else {"json": body}
    if status == 304:
        request = {"headers": {"If-None-Match": "*"}}
    elif status == 412:
        request |= {"headers": {"If-Match": '"of another version"'}}
    elif status == 400:
        request = {"content": b'{"title": '}
    elif status == 413:
        request = {"content": b" " * 65_537}
    elif status == 415:
        request = {"content": b"title=a", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}
    elif status == 422 and "{task_id}" in path:
        path = path.replace("{task_id}", "seven")
    elif status == 422:
        request = {"json": {"title": " "}} if method == "POST" else {"params": {"status": "late"}}
    return client.request(method, path.format(task_id=2**53 if status == 404 else task_id), **request)


DOCUMENTED_HEADERS = {"etag", "location", "retry-after", "www-authenticate", "x-request-id"}


def assert_documented(document: Document, operation: str, response: httpx.Response) -> None:
    answer = resolve(document, operation_of(document, operation)["responses"][str(response.status_code)])
    documented = {name.lower() for name in answer.get("headers", {})}
    assert documented <= response.headers.keys()
    assert DOCUMENTED_HEADERS & response.headers.keys() <= documented
    if response.status_code in (204, 304):
        assert "content" not in answer
        assert response.content == b""
        return
    ((media_type, media),) = answer["content"].items()
    assert response.headers["content-type"] == media_type == "application/json"
    body = response.json()
    validator(document, media["schema"]).validate(body)
    assert body.keys() == resolve(document, media["schema"])["properties"].keys()


def test_every_refusal_of_a_token_is_as_documented(document: Document, nobody: Client) -> None:
    for authorization in ("Bearer nonsense", f"Bearer {token(exp=1)}", "Basic YTpi"):
        response = nobody.get("/api/tasks", headers={"Authorization": authorization})
        assert response.status_code == 401
        assert_documented(document, "GET /api/tasks", response)


def test_all_that_is_wrong_is_told_as_documented(document: Document, alice: Client) -> None:
    response = alice.put("/api/tasks/x", json={"title": "", "description": 1, "completed": 0})
    assert [error["field"] for error in response.json()["errors"]] == ["task_id", "title", "description", "completed"]
    assert_documented(document, "PUT /api/tasks/{task_id}", response)


# A valid If-Match may name another version: that is 412, which schemathesis does not expect by itself.
CONFIGURATION = """
hooks = "hooks.py"
[auth.wfc]
path = "users.json"
peers = ["alice", "bob"]
[cache]
enabled = false
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", "401", "403", "404", "409", "412", "429", "5xx"]
"""
# An If-Match that is made up names no version; the plainest, an empty one, becomes the one that names them all. Of two
# bodies with one Idempotency-Key, both valid, the second is refused by right; so no key is sent twice.
HOOKS = """
import itertools
import re

import schemathesis

numbers = itertools.count()


@schemathesis.hook
def before_call(context, case, kwargs):
    headers = case.headers or {}
    if headers.get("If-Match") == "":
        headers["If-Match"] = "*"
    if re.fullmatch('"[!-~]{1,255}"|(?!""$)[!-~]{1,255}', str(headers.get("Idempotency-Key", ""))):
        headers["Idempotency-Key"] = f"{next(numbers)}-{headers['Idempotency-Key']}"[:255]
"""


def run_schemathesis(service: Service, folder: Path, *options: str) -> Document:
    """Run all phases and all checks over the document as two users; return the report, or fail with it in print.

    The checks include that no operation takes a request without a token or with a wrong one, that an answer after a
    deletion is 404, and that neither of the users can read what the other one made.
    """
    users = {
        "auth": [
            {"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {token(name)}"}]}
            for name in ("alice", "bob")
        ]
    }
    (folder / "users.json").write_text(json.dumps(users))
    (folder / "hooks.py").write_text(HOOKS)
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--no-color"]
    command += ["--checks=all", "--max-response-time=20", "--phases=examples,coverage,fuzzing,stateful"]
    command += ["--suppress-health-check=too_slow"]  # of the machine, when it makes up the requests
    command += ["--report=json", "--report-json-path=report.json", *options]
    result = run_command(command, folder=folder, seconds=500)
    assert result.returncode == 0, result.stdout + result.stderr
    report: Document = json.loads((folder / "report.json").read_text())
    assert report["complete"], result.stdout
    return report


def test_schemathesis_finds_nothing(start_service: StartService, database_url: str, tmp_path: Path) -> None:
    report = run_schemathesis(start_service(database_url), tmp_path, "--generation-deterministic", "--max-examples=25")
    assert report["operations"]["tested"] == len(STATUSES)
    assert {name: phase["status"] for name, phase in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    assert not any(report["warnings"].values())
    # A run whose requests are all refused would find nothing either.
    for operation in report["valid_rates"]:
        assert report["valid_rates"][operation]["fuzzing"]["accepted"] > 0, operation


@pytest.mark.long
def test_schemathesis_finds_nothing_in_a_long_run(
    start_service: StartService, database_url: str, tmp_path: Path
) -> None:
    """Each run is another one; a failure prints the seed that repeats it."""
    run_schemathesis(start_service(database_url), tmp_path, "--max-examples=100", "--continue-on-failure")
