"""The front end of tests/clients: its modules, for a service and a Better Auth server of the tests."""

from __future__ import annotations

import json

from tests.support.service_process import ROOT

FOLDER = ROOT / "tests" / "clients"
SERVICE, BETTER_AUTH = "http://127.0.0.1:8000", "http://localhost:3001"  # as the files have them

# What node lacks: a window, and a Better Auth server, which gives one after the other of the tokens.
WITHOUT_A_BROWSER = """\
globalThis.addEventListener = () => {}
const tokens = TOKENS
const fetchOthers = globalThis.fetch
globalThis.fetch = async (input, options) =>
  String(input).startsWith('BETTER_AUTH') ? Response.json({ token: tokens.shift() }) : fetchOthers(input, options)
"""


def with_urls(text: str, service: str, better_auth: str = BETTER_AUTH) -> str:
    """Return the text of a module in which the URLs are those of the tests."""
    assert SERVICE in text
    return text.replace(SERVICE, service).replace(BETTER_AUTH, better_auth)


def front_end(service: str, better_auth: str = BETTER_AUTH) -> dict[str, str]:
    """Return the text of the modules by the names of their files."""
    return {
        "api.js": with_urls((FOLDER / "api.js").read_text(), service, better_auth),
        "tasks.js": (FOLDER / "tasks.js").read_text(),
    }


def without_a_browser(*tokens: str) -> str:
    """Return what node has to run before these modules."""
    return WITHOUT_A_BROWSER.replace("TOKENS", json.dumps(tokens)).replace("BETTER_AUTH", BETTER_AUTH)
