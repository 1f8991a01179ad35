"""The settings: each is refused in one sentence or does what it says."""

from __future__ import annotations

import re

import pytest

import service
from tests.support.service_process import ROOT, SECRET
from tests.support.settings import (
    PYTHON,
    URL,
    assert_nothing_leaked,
    refusal,
    run_with_settings,
)

# --- What cannot be served with is refused ---------------------------------------------------------------------------
UVICORN = ["uvicorn", "service:app", "--port", "1"]  # never opened: the settings are read first

BAD_SECRETS = {
    "missing": ("BETTER_AUTH_SECRET", "", ["BETTER_AUTH_SECRET", "not set"]),
    "31 characters": ("BETTER_AUTH_SECRET", "hunterswordfish" + "x" * 16, ["BETTER_AUTH_SECRET", "32"]),
    "31 characters of 2 bytes": ("BETTER_AUTH_SECRET", "é" * 31, ["BETTER_AUTH_SECRET", "32"]),
    "31 characters for the old one": (
        "BETTER_AUTH_SECRET_OLD",
        "hunterswordfish" + "x" * 16,
        ["BETTER_AUTH_SECRET_OLD is too short", "32"],
    ),
}
BAD_URLS = {
    "another database": (URL.replace("postgresql", "mysql"), ["postgresql://"]),
    "a scheme that only begins well": (URL.replace("postgresql", "postgresqlx"), ["postgresql://"]),
    **{
        f"{character} in the password": (f"postgresql://user:hunter{character}swordfish@127.0.0.1:1/db", ["escaped"])
        for character in "#@["
    },
    # What stands before the unescaped character could also be a port.
    "5432/ in the password": ("postgresql://user:5432/hunter@127.0.0.1/db", ["escaped"]),
    "5432# in the password": ("postgresql://user:5432#hunter@127.0.0.1/db", ["escaped"]),
    "5432? in the password": ("postgresql://user:5432?hunter@127.0.0.1/db", ["escaped"]),
    "@ and ? in the password": ("postgresql://user:hunter@127.0.0.1?swordfish=1@127.0.0.1/db", ["escaped"]),
    "? in the password, and no // before it": ("postgresql:user:hunter?swordfish@127.0.0.1//db?x=y", ["escaped"]),
    "a port of letters": (URL.replace(":1/", ":hunter/"), []),
    "a port of 0": (URL.replace(":1/", ":0/"), []),
    "a port beyond 65535": (URL.replace(":1/", ":65536/"), ["port"]),
    "a second port beyond 65535": (URL.replace(":1/", ":1,127.0.0.1:65536/"), ["port"]),
    "a comma with no host behind it": (URL.replace(":1/", ":1,/"), []),
    "an unknown sslmode": (f"{URL}?sslmode=hunter", ["sslmode"]),
    "an sslmode that is a name in asyncpg": (f"{URL}?sslmode=parse", ["sslmode"]),
    "an unknown ssl": (f"{URL}?ssl=hunter", ["sslmode"]),
    "an unknown target_session_attrs": (f"{URL}?target_session_attrs=hunter", ["target_session_attrs"]),
    "no such sslrootcert": (f"{URL}?sslmode=verify-full&sslrootcert=/nowhere/hunter.pem", ["sslrootcert"]),
    "an sslrootcert that is none": (f"{URL}?sslmode=verify-full&sslrootcert={ROOT}/README.md", ["sslrootcert"]),
    "a connect_timeout of letters": (f"{URL}?connect_timeout=abc", ["connect_timeout"]),
    "a connect_timeout of 0": (f"{URL}?connect_timeout=0", ["connect_timeout"]),
}
BAD_ORIGINS = {
    "any": ("*", ["*"]),
    "any among others": ("https://app.example.com, *", ["*"]),
    "no scheme": ("app.example.com", ["https://app.example.com"]),
    # Browsers send the host as xn--mller-kva.example, and the port without the zero.
    "letters beyond ASCII": ("https://m\u00fcller.example", ["https://app.example.com"]),
    "a zero before the port": ("http://localhost:03000", ["https://app.example.com"]),
    "separated by spaces": ("https://a.example.com https://b.example.com", ["https://app.example.com", "commas"]),
}
BAD_NUMBERS = [
    ("PORT", "99999"),
    ("PORT", "\uff18\uff10\uff10\uff10"),  # digits, but not those of ASCII
    ("DATABASE_POOL_SIZE", "0"),
    ("WEB_CONCURRENCY", "x"),
]
BAD = [
    *(pytest.param(*row, id=f"secret: {name}") for name, row in BAD_SECRETS.items()),
    *(pytest.param("DATABASE_URL", url, ["DATABASE_URL", *names], id=name) for name, (url, names) in BAD_URLS.items()),
    *(pytest.param("CORS_ORIGINS", text, ["CORS_ORIGINS", *names], id=f"origins: {name}")
      for name, (text, names) in BAD_ORIGINS.items()),
    *(pytest.param(name, text, [name, "whole number"], id=f"{name}={text}") for name, text in BAD_NUMBERS),
]  # fmt: skip


def test_an_old_secret_alone_is_refused() -> None:
    assert "BETTER_AUTH_SECRET must say" in refusal(BETTER_AUTH_SECRET="", BETTER_AUTH_SECRET_OLD=SECRET)


@pytest.mark.parametrize(("variable", "value", "names"), BAD)
def test_a_bad_setting_is_refused_in_one_sentence(variable: str, value: str, names: list[str]) -> None:
    sentence = refusal(**{variable: value})
    assert re.fullmatch(r"[^\n]+\.", sentence)
    assert all(name in sentence for name in names), sentence
    assert_nothing_leaked(sentence)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BETTER_AUTH_SECRET", "hunterswordfish"),
        ("DATABASE_URL", "postgresql://user:hunter@swordfish@127.0.0.1/db"),
        ("PORT", "99999"),
    ],
)
def test_a_bad_setting_stops_the_service_with_its_sentence(variable: str, value: str) -> None:
    stopped = run_with_settings(PYTHON, **{variable: value})
    sentence = refusal(**{variable: value})
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (3, "", f"{sentence}\n")


@pytest.mark.parametrize(
    ("variable", "value", "names"),
    [
        pytest.param("DATABASE_URL", "", ["DATABASE_URL", "not set"], id="no URL"),
        pytest.param("CORS_ORIGINS", "*", ["CORS_ORIGINS", "*"], id="origins"),
    ],
)
def test_a_server_of_ones_own_stops_with_the_sentence_too(variable: str, value: str, names: list[str]) -> None:
    assert_uvicorn_stops(1, variable, value, names)


@pytest.mark.long
def test_a_supervisor_of_ones_own_does_not_start_its_workers_again_and_again() -> None:
    assert_uvicorn_stops(2, "BETTER_AUTH_SECRET", "", ["BETTER_AUTH_SECRET", "not set"])


def assert_uvicorn_stops(workers: int, variable: str, value: str, names: list[str]) -> None:
    stopped = run_with_settings(UVICORN, **{"WEB_CONCURRENCY": str(workers), variable: value})
    sentences = [line for line in stopped.stderr.splitlines() if not re.match("(INFO|ERROR): ", line)]
    if workers == 1:
        assert stopped.returncode != 0  # uvicorn's supervisor may exit with 0
        assert len(sentences) == 1, stopped.stderr
    assert sentences
    assert all(name in line for line in sentences for name in names), stopped.stderr
    assert_nothing_leaked(stopped.stdout + stopped.stderr)


# --- The other settings ----------------------------------------------------------------------------------------------


def test_origins_are_kept_as_browsers_send_them() -> None:
    given = " https://App.Example.com/ ,http://[::1]:3000,HTTP://LAN:80, "
    settings = service.Settings({"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET, "CORS_ORIGINS": given})
    assert settings.cors_origins == ["https://app.example.com", "http://[::1]:3000", "http://lan"]


def test_an_empty_variable_counts_as_unset() -> None:
    needed = {"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET}
    names = [
        "BETTER_AUTH_SECRET_OLD", "BETTER_AUTH_URL", "JWKS_URL", "JWT_AUDIENCE", "JWT_ISSUER", "CORS_ORIGINS",
        "DATABASE_POOL_SIZE", "HOST", "PORT", "WEB_CONCURRENCY",
    ]  # fmt: skip
    defaults = vars(service.Settings(needed))
    assert (defaults["port"], defaults["host"], defaults["workers"]) == (8000, "127.0.0.1", 1)
    for nothing in ("", "  "):
        assert vars(service.Settings(needed | dict.fromkeys(names, nothing))) == defaults
        refusals = refusal(DATABASE_URL=nothing), refusal(BETTER_AUTH_SECRET=nothing)
        assert all(" is not set" in sentence for sentence in refusals), refusals
