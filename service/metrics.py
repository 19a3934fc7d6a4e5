"""What is counted, and the page that Prometheus reads it from.

The names and labels of the calls' metrics are those that go-grpc-prometheus made customary, so that the dashboards
and alerts which people have fit. Labels take their values from finite sets: methods that are served, statuses, reasons.

It knows nothing of when things are counted.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

# They double the page, and nobody graphs them.
disable_created_metrics()  # type: ignore[no-untyped-call] # it ships no type for this one

REGISTRY: Final = CollectorRegistry(auto_describe=True)
"""Ours alone: what another library puts into the client's default registry is not published."""

ProcessCollector(registry=REGISTRY)

_CALL: Final = ("grpc_type", "grpc_service", "grpc_method")

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. From a look-up by link to the server's cap and what outlives it."""

_STARTED: Final = Counter("grpc_server_started", "Calls that were started.", _CALL, registry=REGISTRY)
_HANDLED: Final = Counter(
    "grpc_server_handled", "Calls that have ended, whatever the status.", (*_CALL, "grpc_code"), registry=REGISTRY
)
_RECEIVED: Final = Counter("grpc_server_msg_received", "Messages that were understood.", _CALL, registry=REGISTRY)
_SENT: Final = Counter("grpc_server_msg_sent", "Messages that were answered.", _CALL, registry=REGISTRY)
_SECONDS: Final = Histogram(
    "grpc_server_handling_seconds", "How long calls took.", _CALL, buckets=_BUCKETS, registry=REGISTRY
)

ERRORS: Final = Counter("onetime_errors", "Errors that callers got, by reason.", ("reason",), registry=REGISTRY)
CLEANUP_ROWS: Final = Counter("onetime_cleanup_rows", "Rows that were cleaned away.", ("table",), registry=REGISTRY)
CLEANUP_RUNS: Final = Counter("onetime_cleanup_runs", "Runs of the clean-up.", ("outcome",), registry=REGISTRY)
CALLS_UNDER_WAY: Final = Gauge(
    "onetime_calls_under_way", "Calls that count against max_concurrent_calls.", registry=REGISTRY
)
SET_ELEMENTS: Final = Histogram(
    "onetime_set_elements",
    "How many calls were decided together.",
    ("kind",),
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
ARGON2_HASHES: Final = Counter("onetime_argon2_hashes", "Argon2 hashes made and checked.", registry=REGISTRY)
ARGON2_BUSY: Final = Gauge("onetime_argon2_busy", "Threads that make Argon2 hashes.", registry=REGISTRY)
ARGON2_QUEUED: Final = Gauge("onetime_argon2_queued", "Codes that no such thread has taken yet.", registry=REGISTRY)

MAILS: Final = Counter(
    "onetime_mails",
    "Tries to send a mail: sent, to be tried again (retry), given up (failed), or not wanted any more (withdrawn).",
    ("outcome", "failure"),
    registry=REGISTRY,
)
MAIL_SECONDS: Final = Histogram(
    "onetime_mail_seconds",
    "From a mail's queueing to its acceptance by the mail server.",
    buckets=(*_BUCKETS, 30.0, 60.0, 300.0, 900.0),
    registry=REGISTRY,
)
MAILS_QUEUED: Final = Gauge("onetime_mails_queued", "Mails that are to be sent, by any server.", registry=REGISTRY)
MAILS_OLDEST: Final = Gauge(
    "onetime_mails_oldest_seconds", "For how long the oldest of them has been queued.", registry=REGISTRY
)

RELOADS: Final = Counter("onetime_reloads", "Changed files that were put in force.", ("file",), registry=REGISTRY)
RELOAD_FAILURES: Final = Counter(
    "onetime_reload_failures", "Changed files that were not right.", ("file",), registry=REGISTRY
)
RELOAD_FAILING: Final = Gauge(
    "onetime_reload_failing",
    "1 while a file is not right, and what was read before is in force.",
    ("file",),
    registry=REGISTRY,
)
CERTIFICATE_NOT_AFTER: Final = Gauge(
    "onetime_certificate_not_after_seconds",
    "When the server's certificate expires, in Unix time.",
    ("file",),  # as above; and so there is no 0, which would alarm, where there is no certificate
    registry=REGISTRY,
)
_KEYS: Final = Gauge(
    "onetime_keys",
    "1 for each key that this server has. A key that makes must be known to all servers first.",
    ("id", "role"),
    registry=REGISTRY,
)
_shown_keys: set[tuple[str, str]] = set()

_GO_CODES: Final = {
    # Go's spelling has one l; every other name is its words run together.
    grpc.StatusCode.CANCELLED: "Canceled",
    grpc.StatusCode.OK: "OK",
}


@dataclass(frozen=True, slots=True)
class Series:
    """The time series of one method, looked up once: looking them up on every call costs more than counting."""

    started: Counter
    handled: Mapping[grpc.StatusCode, Counter]
    received: Counter
    sent: Counter
    seconds: Histogram


@functools.cache
def series(kind: str, service: str, method: str) -> Series:
    """Return a method's series, all of them at 0 from the first time on, so that a rate is right from its start.

    Only for methods that are served, and for "unknown": the series stay for ever.
    """
    labels = (kind, service, method)
    return Series(
        started=_STARTED.labels(*labels),
        handled={code: _HANDLED.labels(*labels, _go_name(code)) for code in grpc.StatusCode},
        received=_RECEIVED.labels(*labels),
        sent=_SENT.labels(*labels),
        seconds=_SECONDS.labels(*labels),
    )


def show_keys(ids: Sequence[str]) -> None:
    """Publish the keys that this server has, by their ids; the first one makes."""
    wanted = {(each, "makes" if number == 0 else "checks") for number, each in enumerate(ids)}
    for labels in wanted:
        _KEYS.labels(*labels).set(1)
    # Afterwards, so that no reader of the page misses a key.
    for labels in _shown_keys - wanted:
        _KEYS.remove(*labels)
    _shown_keys.clear()
    _shown_keys.update(wanted)


def _go_name(code: grpc.StatusCode) -> str:
    """Return a status as Go spells it, such as NotFound."""
    return _GO_CODES.get(code) or code.name.title().replace("_", "")


def serve_metrics(host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Publish the metrics over HTTP, from a thread of their own.

    Returns:
        The port, which matters where 0 was asked for, and what stops it.

    Raises:
        OSError: The address cannot be had.
    """
    server, thread = start_http_server(port, host, registry=REGISTRY)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
