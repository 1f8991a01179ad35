"""The statements of the service, and copies of the module that sends them."""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from pathlib import Path
from types import ModuleType

from tests.support.service_process import ROOT

NOT_STATEMENTS = ["schema.sql", "adopt.sql"]
STATEMENTS = sorted(file.name for file in (ROOT / "sql").glob("*.sql") if file.name not in NOT_STATEMENTS)


def copy_query_module(folder: Path, changed: dict[str, str] | None = None) -> Path:
    """Copy `sql/` into a folder, with another text in some of its files; return the copy."""
    copy = shutil.copytree(ROOT / "sql", folder / "sql", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in (changed or {}).items():
        (copy / name).write_text(text)
    return copy


def import_query_module(copy: Path) -> ModuleType:
    """Import a copy under a name of its own, beside the real one."""
    spec = importlib.util.spec_from_file_location(f"sql_{uuid.uuid4().hex}", copy / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
