"""The statements of the service, and the module that sends them."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path
from types import ModuleType

from tests.support.service_process import ROOT

NOT_STATEMENTS = ["schema.sql", "adopt.sql"]
STATEMENTS = sorted(file.name for file in (ROOT / "sql").glob("*.sql") if file.name not in NOT_STATEMENTS)


def import_query_module(folder: Path) -> ModuleType:
    """Import that of a copy under a name of its own, beside the real one."""
    spec = importlib.util.spec_from_file_location(f"sql_{uuid.uuid4().hex}", folder / "sql" / "__init__.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
