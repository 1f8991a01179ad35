"""Copies of the project, for what must not be done to the project itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.service_process import ROOT


def copy_program(folder: Path, changed: Mapping[str, str] | None = None) -> Path:
    """Copy what the service runs from into a folder, with another text in some files; return the folder."""
    shutil.copy(ROOT / "service.py", folder)
    shutil.copytree(ROOT / "sql", folder / "sql", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (changed or {}).items():
        (folder / name).write_text(text)
    return folder


def copy_committed(folder: Path) -> Path:
    """Copy what is committed, as it is in the working tree, into a folder; return the folder."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    for file in filter(lambda file: (ROOT / file).exists(), files.splitlines()):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder
