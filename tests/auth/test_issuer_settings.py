"""The settings that say where the keys are, and who the issuer is."""

from __future__ import annotations

import re

import pytest

import service
from tests.support.fixtures import StartService
from tests.support.issuer import AUTH_ORIGIN, HEALING
from tests.support.postgres import held_port
from tests.support.settings import PYTHON, refusal, run_with_settings
from tests.support.waiting import wait_until

# --- The settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("BETTER_AUTH_URL", "ftp://auth.example.com"),
        ("BETTER_AUTH_URL", "https:///some/path"),
        ("BETTER_AUTH_URL", "https://user:hunterswordfish@auth.example.com"),
        ("BETTER_AUTH_URL", "https://auth.example.com:hunter"),
        ("JWKS_URL", "https://user:hunterswordfish@auth.example.com/keys"),
    ],
)
def test_a_bad_url_is_refused_in_one_sentence(name: str, url: str) -> None:
    assert refusal(**{name: url}) == f"{name} must be a URL like https://app.example.com."


def origins(*urls: str) -> list[str]:
    """Return what the service reads as the origins of URLs, or as no URL."""

    def origin(url: str) -> str:
        try:
            return service.read_origin("X", url)
        except ValueError as error:
            return str(error)

    return [origin(url) for url in urls]


def test_an_origin_is_read_as_browsers_read_it() -> None:
    expected = {
        "https://app.example.com": "https://app.example.com",
        "https://app.example.com/": "https://app.example.com",
        "HTTPS://App.Example.COM/some/Path/?query=1#fragment": "https://app.example.com",
        "https://app.example.com:443/": "https://app.example.com",
        "https://app.example.com:80": "https://app.example.com:80",
        "http://localhost:80": "http://localhost",
        "http://localhost:443": "http://localhost:443",
        "http://localhost:3000/api/auth": "http://localhost:3000",
        "http://[::1]:3000/": "http://[::1]:3000",
        "http://[::1]:80": "http://[::1]",
        "https://app.example.com/@someone": "https://app.example.com",
    }
    assert origins(*expected) == [*expected.values()]


def test_what_browsers_do_not_read_has_no_origin() -> None:
    urls = ["auth.example.com", "//auth.example.com", "https://", "https://:443", "http://a:65536", "http://a:-1",
            "http://[::1", "http://a:\u0663", "https://a\tb", "javascript:alert(1)", "file:///etc/passwd",
            "https://user@auth.example.com"]  # fmt: skip
    assert origins(*urls) == ["X must be a URL like https://app.example.com."] * len(urls)


def test_spaces_around_a_url_do_no_harm_and_within_it_they_do() -> None:
    assert origins(" https://app.example.com ", "https://app.example.com\n") == ["https://app.example.com"] * 2
    assert origins("https://app example.com") == ["X must be a URL like https://app.example.com."]


def test_no_token_can_be_made_without_a_secret() -> None:
    stopped = run_with_settings([*PYTHON, "token", "alice"], BETTER_AUTH_SECRET="", BETTER_AUTH_URL=AUTH_ORIGIN)
    assert (stopped.returncode != 0, stopped.stdout) == (True, "")
    assert re.fullmatch(r"BETTER_AUTH_SECRET [^\n]+\n", stopped.stderr)


def test_the_query_of_a_url_is_not_logged(database: str, start_service: StartService) -> None:
    url = f"http://127.0.0.1:{held_port()}/jwks"
    service = start_service(database, BETTER_AUTH_SECRET="", JWKS_URL=f"{url}?key=hunterswordfish")
    wait_until(lambda: f"{url}: no keys could be fetched: " in service.log, HEALING)
    assert "hunter" not in service.log


@pytest.mark.parametrize(
    "variable",
    [{"SSL_CERT_FILE": "/nowhere"}, {"HTTP_PROXY": "ftp://me:hunterswordfish@here"}],
    ids=["SSL_CERT_FILE", "HTTP_PROXY"],
)
def test_a_variable_that_httpx_refuses_is_told_like_an_issuer_that_is_down(
    database: str, start_service: StartService, variable: dict[str, str]
) -> None:
    service = start_service(database, JWKS_URL=f"http://127.0.0.1:{held_port()}/jwks", WEB_CONCURRENCY="2", **variable)
    wait_until(lambda: service.log.count(": no keys could be fetched: ") == 2, HEALING)
    with service.client("alice") as client:
        assert client.get("/api/tasks").json() == {"items": []}
    assert not re.search("Traceback|hunter", service.log)
