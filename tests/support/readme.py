"""The README: its code, found by how it begins, its tables, found by their first heading, and what runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.service_process import ROOT, environment

README = (ROOT / "README.md").read_text()


def code(beginning: str) -> str:
    """Return the code, in a block or in a line, that begins so; there has to be one."""
    blocks: list[str] = re.findall(r"^```\w+\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    lines: list[str] = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)
    [found] = [text for text in [*blocks, *lines] if text.startswith(beginning)]
    return found


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading, without its head."""
    [rows] = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows.splitlines()]


def sh(script: str, folder: Path, **variables: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=folder, env=environment(**variables), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
