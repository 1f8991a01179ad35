"""Draws what load.py has measured as a picture in SVG: `uv run tests/bench/chart.py speed.json tests/bench/speed.svg`.

For each line, contestant and number of clients: the requests per second, and the CPU of a request, that of PostgreSQL
and that of the server in one bar. Each line has scales of its own. The picture has its own background, a dark one where
the reader prefers that.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

SERVICE = "this service"
FLOOR = "floor:"
WIDTH, MARGIN, NAMES = 880, 18, 146  # the names of the contestants are left of the bars
GAP, NUMBER = 14, 40  # between two columns of bars; what a number takes right of its bar
HEAD, TITLE, ROW, BAR, BELOW = 102, 28, 14, 10, 9  # heights: of the head, of a line's title, of its rows
CUT = 4.5  # a bar of CPU ends at this many times the least, or the others could not be told apart
REQUESTS = {
    "one task": "GET /api/tasks/{id}",
    "list of 20": "GET /api/tasks, of a user with 20 tasks",
    "list of 1,000": "GET /api/tasks, of a user with 1,000 tasks",
    "toggle": "PATCH /api/tasks/{id}/complete",
    "create": "POST /api/tasks",
    "mix": "of ten requests seven for one task, one for a list of 20, one toggle, one create",
}

STYLE = """
text { font: 11.5px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 } .strong { font-weight: 700 } .end { text-anchor: end }
.small, .number { font-size: 10.5px } .small { fill: #59636e }
.page { fill: #fff; stroke: #d1d9e0 } .rule { stroke: #d1d9e0 } .cut { stroke: #fff; stroke-width: 2.5 }
.server { fill: #98a2ad } .postgres { fill: #cfd5db } .own-server { fill: #0a7d55 } .own-postgres { fill: #7cc9a8 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  .page { fill: #0d1117; stroke: #3d444d } .rule { stroke: #3d444d } .cut { stroke: #0d1117 }
  .server { fill: #7d8792 } .postgres { fill: #444c56 } .own-server { fill: #2fbf87 } .own-postgres { fill: #14694a }
}
"""


class Picture:
    """Collects what is drawn. All bars of one colour are one path, which keeps the file small."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.paths: dict[str, str] = defaultdict(str)

    def write(self, x: float, y: float, text: str, style: str = "") -> None:
        attributes = f' class="{style}"' if style else ""
        self.parts.append(f'<text x="{x:.0f}" y="{y:.0f}"{attributes}>{escape(text)}</text>')

    def draw_bar(self, x: float, y: float, width: float, colour: str) -> None:
        self.paths[colour] += f"M{x:.1f} {y:.0f}h{width:.1f}v{BAR}H{x:.1f}z"

    def draw_cut(self, x: float, y: float) -> None:
        self.paths["cut"] += f"M{x - 9:.1f} {y + BAR + 1:.0f}l5 -{BAR + 2}"

    def svg(self, height: float, title: str) -> str:
        paths = [f'<path class="{style}" d="{path}"/>' for style, path in self.paths.items()]
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        page = f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="8"/>'
        return "\n".join(
            [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", page, *paths, *self.parts, "</svg>\n"]
        )


def draw(measured: dict[str, Any], title: str) -> str:
    figures = {
        (each["clients"], each["line"], each["name"]): each
        for each in measured["figures"]
        if not each["name"].startswith(FLOOR)
    }
    clients = list(dict.fromkeys(clients for clients, _, _ in figures))
    lines = list(dict.fromkeys(line for _, line, _ in figures))

    def speed(name: str) -> float:
        """Return what to sort by: this service is first, then who answers most on the last line with most clients."""
        return float("-inf") if name == SERVICE else -float(figures[clients[-1], lines[-1], name]["requests"])

    names = sorted({name for _, _, name in figures}, key=speed)
    left, column = MARGIN + NAMES, (WIDTH - 2 * MARGIN - NAMES - GAP) / (2 * len(clients))
    right = left + column * len(clients) + GAP  # where the CPU begins
    longest = column - GAP - NUMBER

    picture = Picture()
    picture.write(MARGIN, 31, title, "title")
    picture.write(MARGIN, 49, measured["conditions"], "small")
    picture.write(left, HEAD - 27, "Requests a second: more is better", "strong")
    picture.write(right, HEAD - 27, "CPU of a request, µs: less is better", "strong")
    for number, count in enumerate(clients):
        picture.write(left + column * number, HEAD - 10, f"{count} clients", "small")
        picture.write(right + column * number, HEAD - 10, f"{count} clients", "small")
    for x, colour, label in ((right, "postgres", "PostgreSQL"), (right + 94, "server", "server")):
        picture.draw_bar(x, 40, 9, f"own-{colour}")
        picture.draw_bar(x + 9, 40, 9, colour)
        picture.write(x + 23, 49, label, "small")
    picture.draw_bar(right + 164, 40, 18, "server")
    picture.draw_cut(right + 182, 40)
    picture.write(right + 187, 49, "too long to be shown whole", "small")

    y = HEAD
    for line in lines:
        of_line = [each for (_, other, _), each in figures.items() if other == line]
        most = max(each["requests"] for each in of_line)
        cpus = [each["cpu"] + each["postgres_cpu"] for each in of_line]
        cut = min(CUT * min(cpus), max(cpus))
        picture.paths["rule"] += f"M{MARGIN} {y}H{WIDTH - MARGIN}"
        picture.write(MARGIN, y + 19, line.capitalize(), "strong")
        picture.write(left, y + 19, REQUESTS.get(line, ""), "small")
        y += TITLE - ROW
        for name in names:
            y += ROW
            own = "own-" if name == SERVICE else ""
            style = "strong " if own else ""
            picture.write(left - 10, y + BAR - 1, name, f"{style}end")
            for number, count in enumerate(clients):
                each = figures[count, line, name]
                x = left + column * number
                width = each["requests"] / most * longest
                picture.draw_bar(x, y, width, f"{own}server")
                picture.write(x + width + 4, y + BAR - 1, f"{each['requests']:,.0f}", f"{style}number")
                x = right + column * number
                both = each["cpu"] + each["postgres_cpu"]
                of_postgres, width = (min(cpu, cut) / cut * longest for cpu in (each["postgres_cpu"], both))
                picture.draw_bar(x, y, of_postgres, f"{own}postgres")
                picture.draw_bar(x + of_postgres, y, width - of_postgres, f"{own}server")
                if both > cut:
                    picture.draw_cut(x + width, y)
                picture.write(x + width + 4, y + BAR - 1, f"{both:,.0f}", f"{style}number")
        y += ROW + BELOW
    return picture.svg(y + BELOW, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what load.py has written")
    parser.add_argument("svg", type=Path, help="the picture")
    parser.add_argument("--title", default="The same API, served by one worker of each")
    arguments = parser.parse_args()
    picture = draw(json.loads(arguments.json.read_text()), arguments.title)
    arguments.svg.write_text(picture)


if __name__ == "__main__":
    main()
