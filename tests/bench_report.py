"""What `make bench` has measured, as a document with tables and pictures.

All of it follows from `results.json`, the figures of each run, so it can be made again when only the words change. It
knows what the figures mean, and nothing of how they were come by.
"""

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FULL: Final = "onetime"
EMPTY: Final = "empty rpc"
SINGLE: Final = "one transaction each"
PGBENCH: Final = "pgbench"
COLOURS: Final = {FULL: "#0072b2", SINGLE: "#d55e00", EMPTY: "#8a8a8a", PGBENCH: "#009e73"}

Cell = Mapping[str, Any]
"""One figure of one run, with what it is of."""


# Arithmetic


@dataclass(frozen=True, slots=True)
class Spread:
    """What several runs gave."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Describe values, one or more."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """Return the median, and the least and the most."""
        return f"{number(self.median)} ({number(self.least)} to {number(self.most)})"


def ratios(cells: Sequence[Cell], of: Mapping[str, object], to: Mapping[str, object], what: str) -> Spread | None:
    """Return the ratio of a figure of some cells to that of others, each with the one of its own round.

    What disturbs a machine disturbs what is measured next too, so that ratios differ less than the figures do.

    Args:
        cells: All there are.
        of: What those above the line have in common: values by their names.
        to: What those below it have in common.
        what: Which figure.
    """
    above, below = ({cell["round"]: cell[what] for cell in matching(cells, **each)} for each in (of, to))
    shared = [above[turn] / below[turn] for turn in above if below.get(turn)]
    return Spread.of(shared) if shared else None


def matching(cells: Sequence[Cell], **wanted: object) -> list[Cell]:
    """Return the cells that have these values."""
    return [cell for cell in cells if all(cell[name] == value for name, value in wanted.items())]


def spread(cells: Sequence[Cell], figure: str, **wanted: object) -> Spread:
    """Return what a figure was in the cells that have these values."""
    return Spread.of([cell[figure] for cell in matching(cells, **wanted)])


def number(value: float) -> str:
    """Return a figure with as many digits as it is good for."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def different(cells: Sequence[Cell], name: str) -> list[Any]:
    """Return the values that a name has in cells, in their order."""
    return list(dict.fromkeys(cell[name] for cell in cells))


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown. Figures are set to the right: all but the first column."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Spread | None) -> str:
    """Return what stands in a table: a dash for what was not measured."""
    return "-" if value is None else str(value)


# Pictures


WIDTH, HEIGHT, MARGIN = 300, 200, 58
"""Of a panel, in pixels, and what its axes take."""


GRPC_QUEUE: Final = 1000
"""Calls of all connections that wait to be taken up, beyond which gRPC refuses further ones (grpcio 1.85)."""

FONT: Final = 'font-family="system-ui, sans-serif" font-size="11" fill="#333"'


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel: for each place on the x axis what was measured there."""

    name: str
    colour: str
    values: Sequence[Spread | None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture among several that are read alike."""

    title: str
    ticks: Sequence[str]
    """Of the x axis. They stand at even distances."""
    lines: Sequence[Line]


def picture(panels: Sequence[Panel], x: str, y: str, *, columns: int = 3) -> str:
    """Return panels as SVG, side by side, with a legend above. Bars show the spread; each y axis begins at 0."""
    across = min(columns, len(panels))
    width, top = across * WIDTH, 34
    height = top + HEIGHT * -(-len(panels) // across)
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} {FONT}>',
        f'<rect {size} fill="#fff"/>',
    ]
    legend = {line.name: line.colour for panel in panels for line in panel.lines}
    at = 12
    for name, colour in legend.items():
        parts.append(f'<circle cx="{at}" cy="14" r="4" fill="{colour}"/><text x="{at + 9}" y="18">{name}</text>')
        at += 30 + 6 * len(name)
    for index, panel in enumerate(panels):
        parts += _panel(panel, index % across * WIDTH, top + index // across * HEIGHT, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: int, top: int, x: str, y: str) -> list[str]:
    x0, x1, y0, y1 = left + MARGIN, left + WIDTH - 14, top + HEIGHT - 38, top + 24
    known = [value for line in panel.lines for value in line.values if value]
    step = _step(max((value.most for value in known), default=1))
    highest = step * max(1, -(-max((value.most for value in known), default=1) // step))

    def place(index: int) -> float:
        return x0 + (x1 - x0) * (index + 0.5) / len(panel.ticks)

    def height(value: float) -> float:
        return y0 - (y0 - y1) * value / highest

    parts = [f'<text x="{x0}" y="{top + 12}" font-weight="600">{panel.title}</text>']
    for count in range(round(highest / step) + 1):
        at = height(count * step)
        parts.append(f'<path d="M{x0} {at:.1f}H{x1}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 5}" y="{at + 4:.1f}" text-anchor="end">{count * step:,.10g}</text>')
    for index, tick in enumerate(panel.ticks):
        if tick:
            parts.append(f'<text x="{place(index):.1f}" y="{y0 + 14}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(x0 + x1) / 2:.1f}" y="{y0 + 28}" text-anchor="middle" fill="#777">{x}</text>')
    parts.append(
        f'<text transform="translate({left + 10} {(y0 + y1) / 2:.1f}) rotate(-90)" text-anchor="middle"'
        f' fill="#777">{y}</text>'
    )
    for line in panel.lines:
        points = [(place(index), value) for index, value in enumerate(line.values) if value]
        path = "L".join(f"{at:.1f} {height(value.median):.1f}" for at, value in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        for at, value in points:
            if value.most > value.least:
                bar = f"M{at:.1f} {height(value.least):.1f}V{height(value.most):.1f}"
                parts.append(f'<path d="{bar}" stroke="{line.colour}" stroke-width="1"/>')
            if len(points) <= 12:
                parts.append(f'<circle cx="{at:.1f}" cy="{height(value.median):.1f}" r="3" fill="{line.colour}"/>')
    return parts


def _step(most: float) -> float:
    """Return a round distance of the lines of a grid: three to six of them."""
    size = 10.0 ** (len(f"{most:.0f}") - 1) if most >= 1 else 0.1
    return next((size * part for part in (0.1, 0.2, 0.5, 1, 2, 5) if most / (size * part) <= 5), size * 10)


# Sections


def about_calls(result: Cell, pictures: Path) -> str:
    """Tell of each rpc, beside what it could be at best."""
    cells = result["cells"]
    callers, rpcs, kinds = different(cells, "callers"), different(cells, "rpc"), different(cells, "kind")
    kinds = [kind for kind in COLOURS if kind in kinds]
    for figure, unit in (("throughput", "calls a second"), ("p99", "ms")):
        panels = [
            Panel(
                rpc,
                [str(each) for each in callers],
                [
                    Line(
                        kind,
                        COLOURS[kind],
                        [spread(cells, figure, rpc=rpc, callers=each, kind=kind) for each in callers],
                    )
                    for kind in kinds
                ],
            )
            for rpc in rpcs
        ]
        (pictures / f"calls-{figure}.svg").write_text(picture(panels, "callers", unit), "utf-8")

    def beside(rpc: str, count: int, kind: str, what: str) -> Spread | None:
        of, to = ({"rpc": rpc, "callers": count, "kind": each} for each in (FULL, kind))
        return ratios(cells, of, to, what)

    def row(rpc: str, count: int) -> list[str]:
        full = spread(cells, "throughput", rpc=rpc, callers=count, kind=FULL)
        others = (beside(rpc, count, kind, "throughput") for kind in (EMPTY, SINGLE, PGBENCH))
        return [rpc, str(count), str(full), *map(shown, others)]

    def times(rpc: str, count: int) -> list[str]:
        columns = [
            " / ".join(
                number(spread(cells, figure, rpc=rpc, callers=count, kind=kind).median)
                for figure in ("p50", "p95", "p99")
            )
            for kind in kinds
        ]
        return [rpc, str(count), *columns, shown(beside(rpc, count, SINGLE, "p50"))]

    pairs = [(rpc, count) for rpc in rpcs for count in callers]
    header = ["rpc", "callers", "calls/s", "of an empty rpc", "times one transaction each", "times pgbench"]
    shares = [cell["cpu_share"] for cell in cells if "cpu_share" in cell]
    return f"""## Calls

Each rpc by {listed(callers)} callers, in closed loops: a caller makes a call, waits for its end, and makes the
next. Links, not codes; IssueToken, ConsumeToken and VerifyCode with a `request_id`, and so with a receipt. Each
call is of another user. Beside it, in turns and on tables that are made anew for each run:

- *{EMPTY}*: the same server with the same interceptors, log and metrics, whose rpc of that name answers a constant.
- *{SINGLE}*: the same server, which does not put calls that are in flight together into one set.
- *{PGBENCH}*: PostgreSQL without us. As many clients as callers run the statements of one call, prepared and in the
  same trips, with a connection each.

{table(header, [row(*pair) for pair in pairs])}

Throughput is the median of all rounds, with the least and the most. A ratio is that of the two runs of one round,
and again its median, least and most. The first ratio tells how much of what gRPC and Python give is left once there
is work to do; it cannot exceed 1. The second is what sets gain. The third is above 1 where one commit for many
calls gains more than all of our own work costs.

![Throughput by callers](benchmarks/calls-throughput.svg)

Time of a call in milliseconds, p50 / p95 / p99, medians of the rounds:

{table(["rpc", "callers", *kinds, "ratio of p50"], [times(*pair) for pair in pairs])}

In a closed loop, time is callers over throughput: where throughput no longer rises with the callers, only the
waiting does. The p99 is for a service level; the p50 of one caller is what a call costs on an idle server. The
ratio is that of p50 to the p50 of one transaction each, in the runs of one round.

![p99 by callers](benchmarks/calls-p99.svg)

The load generator used at most {number(max(shares))} of one core, which the others then lacked.\
{failures(cells)}{f" There is no column of pgbench: {result['skipped']}." if result["skipped"] else ""}"""


def about_overload(result: Cell, pictures: Path) -> str:
    """Tell of more callers than are admitted."""
    cells = result["cells"]
    levels = different(cells, "callers")
    peaks = {
        turn: max(cell["throughput"] for cell in matching(cells, round=turn)) for turn in different(cells, "round")
    }
    rows = []
    for level in levels:
        mine = matching(cells, callers=level)
        of_peak = Spread.of([cell["throughput"] / peaks[cell["round"]] for cell in mine])
        # A round in which nobody was refused has no such times.
        refusing = [cell for cell in mine if cell["refused"]]
        ended = [spread(refusing, name) for name in ("refused_p50", "refused_p99")] if refusing else []
        rows.append(
            [
                str(level),
                str(spread(mine, "throughput")),
                str(of_peak),
                *(number(spread(mine, name).median) for name in ("p50", "p99")),
                number(spread(mine, "refused").median),
                " / ".join(number(each.median) for each in ended) or "-",
            ]
        )
    panel = [
        Panel("answered OK", [str(each) for each in levels], [_level(FULL, cells, levels, "throughput")]),
        Panel("refused", [str(each) for each in levels], [_level(FULL, cells, levels, "refused")]),
    ]
    (pictures / "overload.svg").write_text(picture(panel, "callers", "calls a second"), "utf-8")
    header = ["callers", "OK/s", "of the peak", "p50 ms", "p99 ms", "refused/s", "refused p50 / p99 ms"]
    return f"""## Overload

IssueToken with `request_id`, by up to {max(levels)} callers, on a server with the default limits: {result["limit"]}
calls at once, of which one caller has four fifths. All callers are one here, since nobody asks who they are. Who is
refused waits as long as RetryInfo says and up to a tenth longer, and comes again.

{table(header, rows)}

The peak is the best throughput of the round. Times are of single tries: those that were admitted, and those that
were refused. What is beyond the limit is refused as soon as it is taken up. But the server takes calls up about as
fast as it answers them: of more than it keeps up with, most wait in gRPC, where nobody refuses them before they are
{GRPC_QUEUE:,}, and their time grows with their number.{failures(cells)}

![Overload](benchmarks/overload.svg)
"""


def _level(name: str, cells: Sequence[Cell], levels: Sequence[int], figure: str) -> Line:
    return Line(name, COLOURS[FULL], [spread(cells, figure, callers=each) for each in levels])


def about_codes(result: Cell, _: Path) -> str:
    """Tell of codes beside Argon2 alone."""
    cells = result["cells"]
    rows = []
    for what in ("ConsumeToken", "CheckToken"):
        for callers in result["callers"]:
            mine = matching(cells, what=what, callers=callers)
            figures = (str(spread(mine, name)) for name in ("throughput", "share"))
            times = (number(spread(mine, name).median) for name in ("p50", "p99"))
            rows.append([what, str(callers), *figures, *times])
    rows.append(["Argon2 alone", "-", str(spread(cells, "alone")), "1", "-", "-"])
    header = ["", "callers", "a second", "of Argon2 alone", "p50 ms", "p99 ms"]
    return f"""## Codes

Right codes under Argon2id with the default parameters, in {result["threads"]} threads. Before and after
each, argon2-cffi alone: as many threads that check one hash again and again, while nothing else runs. The ratio is to
the mean of both.

{table(header, rows)}

Argon2 is slow on purpose and sets the pace; the ratio tells how little the rest takes from it on the same cores.
More codes a second are to be had with more cores, or with `--code-hashing hmac`.{failures(cells)}
"""


def about_growth(result: Cell, pictures: Path) -> str:
    """Tell of a large database beside a small one."""
    cells, sizes = result["cells"], result["rows"]
    rpcs = different(cells, "rpc")
    rows = []
    for rpc in rpcs:
        ratio = ratios(cells, {"rpc": rpc, "size": "large"}, {"rpc": rpc, "size": "small"}, "throughput")
        each = [spread(cells, "throughput", rpc=rpc, size=size) for size in ("small", "large")]
        late = [spread(cells, "p99", rpc=rpc, size=size).median for size in ("small", "large")]
        rows.append([rpc, *map(str, each), shown(ratio), " / ".join(map(number, late))])
    ticks = [f"{sizes[size]:,}" for size in ("small", "large")]
    panels = [
        Panel(
            rpc,
            ticks,
            [
                Line(
                    FULL,
                    COLOURS[FULL],
                    [spread(cells, "throughput", rpc=rpc, size=size) for size in ("small", "large")],
                )
            ],
        )
        for rpc in rpcs
    ]
    first = [cell for cell in cells if cell["size"] == "checkpoint"]
    fresh = "".join(
        f"\nIn the first seconds after one, {number(cell['throughput'])} calls/s of {cell['rpc']} are answered."
        for cell in first
    )
    (pictures / "growth.svg").write_text(picture(panels, "rows in both tables", "calls a second", columns=4), "utf-8")
    header = ["rpc", f"calls/s at {ticks[0]}", f"calls/s at {ticks[1]}", "ratio", "p99 ms"]
    return f"""## Growth

The calls that write, by {result["callers"]} callers, on a database with {ticks[0]} rows in each of the two tables
and on one with {ticks[1]}, in turns. Each row has its user, its state and its budgets; nothing has expired. The large
one takes {number(result["bytes"] / 2**30)} GiB, of which {number(result["index_bytes"] / 2**30)} are indexes, which
PostgreSQL's shared buffers are to hold, and was filled in {number(result["filled_seconds"] / 60)} minutes. Its
last checkpoint is {result["aged"]:,} further rows ago. The small one is made anew for each run; both grow while they
are written to.

{table(header, rows)}

Every statement finds its rows by an index, so the ratio should be near 1. What is below is the depth of the
indexes, and pages that are not in memory: each of the large database's rows lies on a page of its own, which is
read, and written to the log in full the first time after a checkpoint.{fresh}{failures(cells)}

![Growth](benchmarks/growth.svg)
"""


def about_process(result: Cell, pictures: Path) -> str:
    """Tell of start-up and memory."""
    rows = [
        ["from exec to SERVING", f"{Spread.of(result['seconds'])} s"],
        ["memory after the start", f"{Spread.of([each / 2**20 for each in result['after_start']])} MiB"],
    ]
    panels, growth = [], {}
    for title, key in (("nobody hangs up", "heard"), ("one in ten hangs up", "hung_up")):
        mebibytes = [(each["calls"], each["bytes"] / 2**20) for each in result[key]["memory"]]
        middle = min(mebibytes, key=lambda each: abs(each[0] - mebibytes[-1][0] / 2))
        rows += [
            [f"{title}: after {calls:,} calls", f"{number(size)} MiB"]
            for calls, size in (mebibytes[1], middle, mebibytes[-1])
        ]
        growth[key] = (mebibytes[-1][1] - middle[1]) * 2**20 / (mebibytes[-1][0] - middle[0])
        every = max(1, len(mebibytes) // 3)
        ticks = [f"{calls:,}" if index % every == 0 else "" for index, (calls, _) in enumerate(mebibytes)]
        line = Line(FULL, COLOURS[FULL], [Spread.of([size]) for _, size in mebibytes])
        panels.append(Panel(title, ticks, [line]))
    (pictures / "memory.svg").write_text(picture(panels, "calls", "MiB"), "utf-8")
    return f"""## Start and memory

From the start of the process of `onetime serve` on a migrated database until health says SERVING,
{len(result["seconds"])} times. Memory is the resident set of the process, over calls of {result["callers"]} callers, of
the rpcs above that spend nothing, in turns: once to their ends, and once with one in ten whose caller hangs up after
up to 5 ms. {result["hung_up"]["cancelled"]:,} were cancelled so.

{table(["", ""], rows)}

Memory rises to what so many calls at once take, and then must stay. In the second half it grew by
{number(growth["heard"])} bytes a call where nobody hung up, and by {number(growth["hung_up"])} bytes a call where one
in ten did. What hang-ups leave behind is gRPC's: the operations of a batch that fails, since its caller has gone, are
never freed ([grpc#43360](https://github.com/grpc/grpc/issues/43360), open at 1.85.1).

![Memory](benchmarks/memory.svg)
"""


def failures(cells: Sequence[Cell]) -> str:
    """Return a sentence on calls that failed; nothing if there were none."""
    failed: Counter[str] = Counter()
    for cell in cells:
        failed.update(cell.get("failed", {}))
    if not failed:
        return ""
    calls = sum(cell.get("calls", 0) for cell in cells)
    return f" Of {calls:,} calls some failed: {', '.join(f'{count:,} {status}' for status, count in failed.items())}."


def listed(items: Sequence[object]) -> str:
    """Return items as a sentence has them."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


ABOUT: Final[Mapping[str, Callable[[Cell, Path], str]]] = {
    "calls": about_calls,
    "overload": about_overload,
    "codes": about_codes,
    "growth": about_growth,
    "process": about_process,
}


# The document


def write(results: Mapping[str, Cell], output: Path) -> None:
    """Write `benchmarks.md` into a folder, and its pictures into `benchmarks/` there."""
    pictures = output / "benchmarks"
    pictures.mkdir(parents=True, exist_ok=True)
    known = [section for section in ABOUT if section in results]
    parts = [_INTRODUCTION, *(_section(section, results[section], pictures) for section in known)]
    blocks = "\n".join(parts).split("\n\n")
    (output / "benchmarks.md").write_text("\n\n".join(map(wrapped, blocks)).rstrip() + "\n", "utf-8")


def wrapped(block: str) -> str:
    """Return a paragraph in lines of our length; anything else as it is."""
    if block.lstrip("\n").startswith(("#", "|", "<", "!", "- ")):
        return block
    return textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)


_INTRODUCTION: Final = """# Benchmarks

<!-- Made by `make bench` from benchmarks/results.json, not to be edited. Its words are in tests/bench_report.py -->

Read the ratios. They are of runs that took turns on one machine, so they hold on another one too, as far as its
parts have the same proportions; calls per second are of the machine that is named beside them. A spread that is
wide, or that holds 1, says that there is no difference to be told.

The server runs as in production, except that callers are not asked who they are: interceptors, log (to a file),
metrics, budgets, receipts and clean-up are on, settings are the defaults. PostgreSQL, the server and the load
generator share the machine, so a call's whole cost is in the figures, and none has as many cores as it could use.

To measure again: `make bench`, with Go for the load generator. It takes about an hour and a half, and up to 48 GiB of
disk for the ten million rows; `make bench ARGS='--quick'` shows in some minutes that it runs, and
`make bench ARGS=--help` what can be chosen.
"""


def _section(name: str, result: Cell, pictures: Path) -> str:
    machine, plan = result["machine"], result["plan"]
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    versions = ", ".join(f"{what} {which}" for what, which in machine["versions"].items())
    return f"""{ABOUT[name](result, pictures).rstrip()}

<details><summary>Measured on {machine["at"][:10]} at {machine["commit"]}, {cores}</summary>

{plan["rounds"]} rounds of {number(plan["seconds"])} s after {number(plan["warmup"])} s of warm-up, in
{plan["minutes"]} minutes. {machine["processor"]}, {cores}, {number(machine["memory"] / 2**30)} GiB,
{machine["system"]}, {machine["file_system"]}; load before the run {machine["load_before"]}. {versions}. PostgreSQL:
{", ".join(machine["postgres"])}.

</details>
"""
