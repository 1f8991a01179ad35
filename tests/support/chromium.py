"""Chromium, and how the browser of the tests is started."""

from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
PUBLIC = "tasks.example"
"""A name under which the browser finds 127.0.0.1: a page that asks other hosts may refrain from it on localhost."""

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    f"--host-resolver-rules=MAP {PUBLIC} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
