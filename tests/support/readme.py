"""The README and its blocks, and what runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.service_process import ROOT, environment

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the code blocks in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


RUN, TEST, TOUR, TYPES, HEROKU, INSTALL, WATCH, AUDIT = blocks("sh")


def sh(script: str, folder: Path, **variables: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=folder, env=environment(**variables), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
