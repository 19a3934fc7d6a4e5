"""The server, wired in one place: what it is made of, in which order it starts, and how it stops.

Read `serve` from top to bottom. It knows every other module, and decides nothing that belongs to one of them.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import grpc
import grpc.aio
import psycopg
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from onetime.v1 import (
    email_verification_pb2,
    email_verification_pb2_grpc,
    one_time_tokens_pb2,
    one_time_tokens_pb2_grpc,
)
from psycopg.rows import dict_row

from service import interceptors, metrics, migrations
from service.cleanup import Cleanup
from service.config import Settings, load_keyring, parse_listen
from service.crypto import argon2_parameters
from service.db import CONNECT_TIMEOUT_S, Database, load_queries
from service.email_verification import EmailVerifications
from service.errors import DatabaseUnavailable
from service.hashing import Hashing
from service.one_time_tokens import OneTimeTokens

_LOG = logging.getLogger(__name__)
_QUERIES = load_queries("app")

SERVICES: Final = (
    one_time_tokens_pb2.DESCRIPTOR.services_by_name["OneTimeTokenService"],
    email_verification_pb2.DESCRIPTOR.services_by_name["EmailVerificationService"],
)
"""Our own services, each with an entry in health."""

_BESIDE: Final = (
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
"""Services of others that are served beside them."""

SERVER_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, and is told so
    ("grpc.max_receive_message_length", 64 * 1024),  # the largest request has under 2 KiB
    ("grpc.max_send_message_length", 64 * 1024),  # ListTokens has six tokens at most; reflection's files fit too
    ("grpc.max_metadata_size", 8 * 1024),  # soft: from here on, a chance to be refused
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 60_000),  # finds clients that are gone
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),  # clients may ping as often
    ("grpc.http2.max_ping_strikes", 2),
)

HEALTH_INTERVAL_S: Final = 1.0
HEALTH_TIMEOUT_S: Final = 2.0
HEALTH_STRIKES: Final = 2
"""Failed looks at the database, one after the other, before health says NOT_SERVING: one is an accident."""

CLOSE_TIMEOUT_S: Final = 6.0
"""For transactions under way at the end: longer than a statement may take."""


class StartError(Exception):
    """The server cannot start. The text is for a terminal, and names the cure."""


async def serve(
    settings: Settings, *, reflect: bool, migrate: bool, on_ready: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until the first SIGINT or SIGTERM, then let calls under way end; a second signal ends at once.

    Args:
        settings: Checked settings.
        reflect: Whether to offer server reflection, so that grpcurl needs no protos.
        migrate: Whether to migrate the database first. Otherwise it must be up to date.
        on_ready: Called with the address as soon as calls are served.

    Raises:
        StartError: The database is not to be had, or would lose what it acknowledged; or the address is taken.
        MigrationRefused: The database is not as `migrate` needs it.
        SettingsError: The keys are not to be had.
    """
    ring = load_keyring(settings)
    adds_users = await prepare_database(settings, migrate=migrate)
    stop, hurry = asyncio.Event(), asyncio.Event()

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_signals(stop, hurry))
        if settings.metrics_listen:
            stack.callback(_serve_metrics(settings.metrics_listen))

        cleanup = Cleanup(settings)
        await cleanup.open()
        stack.push_async_callback(_bounded, cleanup.close)
        database = Database(settings.database_url, pool_size=settings.pool_size, after_write=cleanup.maybe)
        await database.open()
        stack.push_async_callback(_bounded, database.close)

        hashing = Hashing(threads=settings.argon2_threads, queue=settings.argon2_queue)
        stack.callback(hashing.close)
        hasher = ring.code_hasher(
            argon2_parameters(settings.argon2_memory_kib, settings.argon2_time_cost, settings.argon2_parallelism)
            if settings.code_hashing == "argon2id"
            else None
        )

        server = grpc.aio.server(
            interceptors=interceptors.build(cap=settings.call_timeout.total_seconds(), known=(*SERVICES, *_BESIDE)),
            options=SERVER_OPTIONS,
        )
        one_time_tokens_pb2_grpc.add_OneTimeTokenServiceServicer_to_server(
            OneTimeTokens(settings, database, ring, hasher, hashing), server
        )
        email_verification_pb2_grpc.add_EmailVerificationServiceServicer_to_server(
            EmailVerifications(settings, database, ring, adds_users=adds_users), server
        )
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        names = [service.full_name for service in SERVICES]
        if reflect:
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

        _bind(server, settings.listen)
        await server.start()
        watch = asyncio.create_task(_watch_database(database, health_servicer, ["", *names]))
        stack.push_async_callback(_cancelled, watch)
        on_ready(settings.listen)
        _LOG.info("serving", extra={"listen": settings.listen})

        await stop.wait()
        _LOG.info("draining")
        watch.cancel()
        await health_servicer.enter_graceful_shutdown()
        # Balancers learn from health that this replica is going, and until then calls are served.
        await _unless(hurry, asyncio.sleep(settings.drain_delay.total_seconds()))
        await _unless(hurry, server.stop(settings.shutdown_grace.total_seconds()))
        await server.stop(0)
    _LOG.info("stopped")


async def prepare_database(settings: Settings, *, migrate: bool) -> bool:
    """Check that the database can be trusted, and bring it up to date. Return whether public.users is our own.

    Raises:
        StartError: It is not to be had, too old, or would lose what it acknowledged.
        MigrationRefused: It is not as `migrate` needs it.
    """
    try:
        async with await psycopg.AsyncConnection.connect(
            settings.database_url,
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
            row_factory=dict_row,
        ) as connection:
            faults = [row["fault"] for row in await (await connection.execute(_QUERIES["trust"])).fetchall()]
            if faults:
                raise StartError("\n".join(["the database cannot be trusted with tokens:", *faults]))
            if migrate:
                report = await migrations.migrate(connection)
                for done in (*report.created, *report.adopted, *report.applied):
                    _LOG.info("migrated", extra={"what": done})
            elif pending := await migrations.pending(connection):
                raise StartError("\n".join(["the database is not up to date; `onetime migrate` helps:", *pending]))
            return await migrations.users_table_is_ours(connection)
    except psycopg.OperationalError as error:
        raise StartError(f"the database is not to be had: {error}; check database_url, and that it runs") from error


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """Let the first signal set `stop`, and the second `hurry`."""

    def heed() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heed)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _serve_metrics(listen: str) -> Callable[[], None]:
    try:
        _, stop = metrics.serve_metrics(*parse_listen(listen))
    except OSError as error:
        raise StartError(f"metrics_listen {listen}: {error.strerror}; take another port") from error
    return stop


def _bind(server: grpc.aio.Server, listen: str) -> None:
    try:
        server.add_insecure_port(listen)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {listen}: is another server on it? Take another --listen") from error


async def _watch_database(database: Database, servicer: health.aio.HealthServicer, names: list[str]) -> None:
    """Keep health true: SERVING while the database answers and takes writes."""
    strikes = HEALTH_STRIKES
    told: bool | None = None
    while True:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                writable = await database.ping()
        except (DatabaseUnavailable, TimeoutError):
            writable = False
        strikes = 0 if writable else strikes + 1
        serving = strikes < HEALTH_STRIKES
        if serving is not told:
            _LOG.log(logging.INFO if serving else logging.WARNING, "health", extra={"serving": serving})
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in names:
                await servicer.set(name, status)
            told = serving
        await asyncio.sleep(HEALTH_INTERVAL_S if told else HEALTH_INTERVAL_S / 10)


async def _unless(event: asyncio.Event, work: Awaitable[Any]) -> None:
    """Wait for work, but no longer than until the event."""
    waiting = asyncio.create_task(event.wait())
    working = asyncio.ensure_future(work)
    await asyncio.wait({waiting, working}, return_when=asyncio.FIRST_COMPLETED)
    for task in (waiting, working):
        task.cancel()
    await asyncio.wait({waiting, working})


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _bounded(close: Callable[[], Awaitable[None]]) -> None:
    """Close something that may wait for the database, and do not wait for ever."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await close()
