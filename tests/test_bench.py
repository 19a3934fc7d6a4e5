import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Final

import bench
import bench_report
import bench_rows
import psycopg
import pytest
from bench_report import Line, Panel, Spread, ratios
from conftest import clean_environment

ROOT: Final = Path(__file__).parent.parent


def test_a_ratio_is_of_runs_of_one_round() -> None:
    """A round that was slow for both sides of a ratio does not change it; one that has one side only is left out."""
    cells = [
        {"round": 0, "kind": "a", "throughput": 300.0},
        {"round": 0, "kind": "b", "throughput": 100.0},
        {"round": 1, "kind": "b", "throughput": 10.0},
        {"round": 1, "kind": "a", "throughput": 20.0},
        {"round": 2, "kind": "a", "throughput": 40.0},
        {"round": 2, "kind": "b", "throughput": 10.0},
        {"round": 3, "kind": "a", "throughput": 7.0},
    ]
    assert ratios(cells, {"kind": "a"}, {"kind": "b"}, "throughput") == Spread(3.0, 2.0, 4.0)
    assert ratios(cells, {"kind": "a"}, {"kind": "c"}, "throughput") is None


def test_what_ended_in_the_warm_up_does_not_count() -> None:
    """Throughput is calls after the warm-up by the time they took; quantiles are values that there were."""
    ends = [100 + number / 10 for number in range(31)]  # 10 a second, for 3 seconds
    result = bench.within(ends, [1000.0] * 11 + list(map(float, range(1, 21))), warmup=1)
    assert result["throughput"] == pytest.approx(10)
    assert {name: result[name] for name in ("p50", "p95", "p99", "max", "calls")} == {
        "p50": 10,
        "p95": 19,
        "p99": 20,
        "max": 20,
        "calls": 20,
    }


def test_each_comes_first_in_turn() -> None:
    """Over as many rounds as there are variants, each comes first once, and none is lost."""
    orders = [bench.turned(["a", "b", "c"], turn) for turn in range(3)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_a_picture_is_well_formed() -> None:
    """A picture is XML, with a panel for each, whatever is missing or zero in it."""
    values = [Spread(1, 0.5, 2), None, Spread(0, 0, 0)]
    panels = [Panel(f"panel {number}", ["1", "16", "64"], [Line("a", "#000", values)]) for number in range(5)]
    drawn = ET.fromstring(bench_report.picture(panels, "callers", "calls a second"))  # noqa: S314 - of our own making
    texts = ["".join(each.itertext()) for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text.startswith("panel")] == [panel.title for panel in panels]


def pgbench() -> Path:
    """Return pgbench, or skip the test where there is none."""
    program = bench.find_pgbench()
    if program is None:
        if "CI" in os.environ:
            pytest.fail("there is no pgbench, and CI must have it")
        pytest.skip("there is no pgbench")
    return program


LEFT: Final = {
    # rpc: tokens, verifications, those that are used, budgets, receipts, those that are settled
    "IssueToken": (13, 10, 0, 23, 3, 3),
    "ConsumeToken": (7, 10, 0, 20, 3, 3),
    "CheckToken": (10, 10, 0, 20, 0, 0),
    "StartEmailVerification": (10, 13, 0, 23, 0, 0),
    "VerifyCode": (10, 10, 3, 20, 3, 3),
    "GetEmailVerification": (10, 10, 0, 20, 0, 0),
}


@pytest.mark.parametrize("rpc", LEFT)
def test_pgbench_does_what_the_calls_do(migrated_url: str, tmp_path: Path, rpc: str) -> None:
    """Three runs of the script of an rpc leave the rows that three of its calls leave."""
    script = tmp_path / "script.sql"
    script.write_text(bench_rows.pgbench_script(rpc, 10), "utf-8")
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        bench_rows.fill(connection, 0, 10)
        options = ["--no-vacuum", "--protocol=prepared", f"--file={script}", "--transactions=3"]
        subprocess.run(
            [pgbench(), *options, "--define=i=-1", "--define=clients=1", migrated_url],
            env=clean_environment() | {"PGOPTIONS": bench_rows.session_options()},
            check=True,
            capture_output=True,
        )
        left = connection.execute(
            "select (select count(*) from auth.one_time_tokens as t"
            "   join onetime.one_time_token_states as s on s.token_id = t.id),"
            " (select count(*) from public.email_verification_tokens"
            "   join onetime.email_verification_states on token_hash = email_verification_token),"
            " (select count(used_at) from public.email_verification_tokens),"
            " (select count(*) from onetime.budgets), count(*), count(row_id) from onetime.receipts"
        ).fetchone()
    assert left == LEFT[rpc]


def test_the_benchmarks_are_those_that_were_measured(tmp_path: Path) -> None:
    """The document and its pictures are made of the results beside them, and of nothing else."""
    docs = ROOT / "docs"
    bench_report.write(json.loads((docs / "benchmarks" / "results.json").read_text("utf-8")), tmp_path)
    made = {path.relative_to(tmp_path): path.read_text("utf-8") for path in tmp_path.rglob("*.*")}
    kept = {path: (docs / path).read_text("utf-8") for path in made}
    assert made == kept, "make it anew: bench_report.write(the results, docs)"


@pytest.mark.timeout(300)
def test_the_benchmarks_run(tmp_path: Path) -> None:
    """`make bench` measures an rpc in all its variants, without a failed call, and writes table and pictures."""
    if shutil.which("go") is None:
        if "CI" in os.environ:
            pytest.fail("go is not on PATH, and CI must have it")
        pytest.skip("go is not on PATH")
    command = [sys.executable, "tests/bench.py", "--quick", "--only", "calls", "--rpc", "VerifyCode"]
    # Not asked of pytest's own folder: PostgreSQL's account cannot reach it.
    subprocess.run(
        [*command, "--callers", "4", "--rounds", "1", "--seconds", "0.2", "--output", str(tmp_path)],
        cwd=ROOT,
        env=clean_environment(),
        check=True,
        timeout=280,
    )
    cells = json.loads((tmp_path / "benchmarks" / "results.json").read_text("utf-8"))["calls"]["cells"]
    assert {cell["kind"] for cell in cells} == {bench.FULL, bench.EMPTY, bench.SINGLE, bench.PGBENCH}
    assert all(cell["throughput"] > 0 and "failed" not in cell for cell in cells)
    written = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert "| VerifyCode | 4 |" in written
    for picture in re.findall(r"\]\((\S+\.svg)\)", written):
        ET.fromstring((tmp_path / picture).read_text("utf-8"))  # noqa: S314 - of our own making
