"""What this service aims at, and what load.py has measured of it: `uv run tests/bench/goals.py speed.json`.

A goal is for each line and number of clients that it names, and the worst of them is shown. Beside another contestant
it is a ratio.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.load import FLOOR, LINES, SERVICE, table

LONG, WRITES = ("list of 1,000",), ("toggle", "create", "mix")
SHORT = tuple(line for line in LINES if line not in LONG)
READS = tuple(line for line in LINES if line not in WRITES)
EVERYBODY = "any other"
Found = dict[tuple[int, str], dict[str, dict[str, float]]]  # the figures, by clients and line, and by contestant


class Goal(NamedTuple):
    figure: str
    comparison: str
    limit: float
    other: str  # the contestant, by how its name begins; "" where it is no ratio
    lines: tuple[str, ...] = LINES
    clients: tuple[int, ...] = (16, 64)


GOALS = [
    Goal("requests/s", "at least", 1, "Fastify"),
    Goal("requests/s", "at least", 1.25, "Fastify", ("mix",), (64,)),
    Goal("requests/s", "at least", 1, "Go", SHORT, (64,)),
    Goal("requests/s", "at least", 0.9, "Go", SHORT, (16,)),
    Goal("requests/s", "at least", 0.75, "Go", LONG),
    Goal("requests/s", "at least", 12, "FastAPI + SQLModel", SHORT),
    Goal("requests/s", "at least", 10, "FastAPI + SQLModel", LONG),
    Goal("requests/s", "at least", 4, "FastAPI + asyncpg", SHORT),
    Goal("requests/s", "at least", 3, "FastAPI + asyncpg", LONG),
    Goal("requests/s", "at least", 2, "Litestar", SHORT),
    Goal("requests/s", "at least", 1.3, "Litestar", LONG),
    Goal("requests/s", "at least", 1.5, "BlackSheep", SHORT),
    Goal("requests/s", "at least", 1.1, "BlackSheep", LONG),
    Goal("CPU of PostgreSQL", "at most", 1.05, EVERYBODY),
    Goal("p99", "at most", 1, "Fastify"),
    Goal("CPU of both", "at most", 1, "version 1.0", WRITES),
    Goal("CPU of both", "at most", 1.1, "version 1.0", READS),
    Goal("MB", "at most", 60, "", LONG),
    Goal("seconds until the first answer", "at most", 0.3, "", ("start",), (0,)),
]


def read(content: dict[str, Any]) -> Found:
    found: Found = defaultdict(dict)
    for each in content["starts"]:
        found[0, "start"][each["name"]] = {"seconds until the first answer": each["seconds"]}
    for each in content["figures"]:
        if not each["name"].startswith(FLOOR):
            found[each["clients"], each["line"]][each["name"]] = {
                "requests/s": each["requests"], "p99": each["p99"], "MB": each["memory"],
                "CPU of PostgreSQL": each["postgres_cpu"], "CPU of both": each["cpu"] + each["postgres_cpu"],
            }  # fmt: skip
    return found


def judge(goal: Goal, found: Found) -> tuple[str, str]:
    """Return the worst that was measured and whether the goal is met, if all that it names was measured."""
    values = []
    for clients, line in product(goal.clients, goal.lines):
        here = found.get((clients, line), {})
        others = [name for name in here if name != SERVICE and goal.other in (EVERYBODY, name[: len(goal.other)])]
        if SERVICE not in here or (goal.other and not others):
            return "not measured", ""
        own, where = here[SERVICE][goal.figure], f"{line}, {clients} clients" if clients else line
        if goal.other:
            values += [(own / here[name][goal.figure], f"{where}, {name}") for name in others]
        else:
            values.append((own, where))
    value, where = min(values) if goal.comparison == "at least" else max(values)
    met = value >= goal.limit if goal.comparison == "at least" else value <= goal.limit
    return f"{value:.2f} ({where})", "yes" if met else "**no**"


def main() -> None:
    found = read(json.loads(Path(sys.argv[1]).read_text()))
    rows = []
    for goal in GOALS:
        other = f" times {goal.other}" if goal.other else ""
        lines = {LINES: "every line", SHORT: "every line but the list of 1,000"}.get(goal.lines, ", ".join(goal.lines))
        clients = f", {' and '.join(map(str, goal.clients))} clients" if any(goal.clients) else ""
        text = f"{goal.figure}: {goal.comparison} {goal.limit:g}{other}; {lines}{clients}"
        rows.append([text, *judge(goal, found)])
    print(table(["goal", "measured, at worst", "met"], rows))


if __name__ == "__main__":
    main()
