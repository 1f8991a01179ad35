"""Starts the service of the current folder with other constants than its own.

TEST_CONSTANTS has them as JSON: {"service.KEEP_ALIVE": 1, "sql.MAX_BATCH": 2}. Each worker sets them too: it imports
this file before it does anything else. No module of the tests is imported, so that nothing else differs.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path.cwd())  # where `python -m service` looks, instead of beside this file
for name, value in json.loads(os.environ["TEST_CONSTANTS"]).items():
    module_name, _, constant = name.rpartition(".")
    module = importlib.import_module(module_name)
    own = getattr(module, constant)  # there must be one
    setattr(module, constant, Path(value) if isinstance(own, Path) else value)

if __name__ == "__main__":
    importlib.import_module("service").main()
