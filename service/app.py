"""The server, wired in one place: what it is made of, in which order it starts, and how it stops.

Read `serve` from top to bottom. It knows every other module, and decides nothing that belongs to one of them.
"""

import asyncio
import contextlib
import gc
import logging
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import grpc
import grpc.aio
import psycopg
from grpc._cython import cygrpc  # type: ignore[attr-defined] # it ships no types, here and below
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from onetime.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    email_verification_pb2,
    email_verification_pb2_grpc,
    one_time_tokens_pb2,
    one_time_tokens_pb2_grpc,
)
from psycopg.rows import dict_row

from service import interceptors, metrics, migrations, reload
from service.admin import Admin
from service.callers import Callers, Contract
from service.cleanup import Cleanup
from service.config import (
    Settings,
    SettingsError,
    load_keyring,
    option_of,
    parse_keys,
    parse_listen,
    parse_smtp_url,
)
from service.courier import Courier
from service.crypto import Keyring, argon2_parameters
from service.db import CONNECT_TIMEOUT_S, Database, load_queries
from service.email_verification import EmailVerifications
from service.errors import DatabaseUnavailable
from service.fields import STORED_TYPES
from service.hashing import Hashing
from service.mail import Templates
from service.one_time_tokens import OneTimeTokens
from service.reload import ServerCertificate, Watched
from service.smtp import Transport

_LOG = logging.getLogger(__name__)
_QUERIES = load_queries("app")

SERVICES: Final = (
    one_time_tokens_pb2.DESCRIPTOR.services_by_name["OneTimeTokenService"],
    email_verification_pb2.DESCRIPTOR.services_by_name["EmailVerificationService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
"""Our own services, each with an entry in health."""

_BESIDE: Final = (
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
"""Services of others that are served beside them."""

SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 * 1024),  # the largest request has under 2 KiB
    ("grpc.max_send_message_length", 64 * 1024),  # ListTokens has six tokens at most; reflection's files fit too
    # To one connection. What comes beyond is refused by gRPC as UNAVAILABLE, so it is far above what admission lets one
    # caller have. Streams that were cancelled and are not cleared away yet count too: this stops a rapid reset.
    ("grpc.max_concurrent_streams", 1024),
    # Of one method, before our code hears of them: a flood of calls that are reset at once must not fill this up, or
    # gRPC refuses other clients' calls in their stead. Admission decides.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ("grpc.max_metadata_size", 8 * 1024),  # soft: from here on, a chance to be refused
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 60_000),  # finds clients that are gone
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),  # clients may ping as often
    ("grpc.http2.max_ping_strikes", 2),
)

AHEAD: Final = 64
"""Calls that are waited for at once. gRPC would wait for one, and for the next only when that has come: each is then a
trip to gRPC's thread and back, which has to be woken for it."""

AGE_GRACE_S: Final = 1.0
"""What a connection that is too old has beyond `call_timeout`: every unary call on it ends in that time."""

HEALTH_INTERVAL_S: Final = 1.0
HEALTH_TIMEOUT_S: Final = 2.0
HEALTH_STRIKES: Final = 2
"""Failed looks at the database, one after the other, before health says NOT_SERVING: one is an accident."""

CLOSE_TIMEOUT_S: Final = 6.0
"""For transactions under way at the end: longer than a statement may take."""


class StartError(Exception):
    """The server cannot start. The text is for a terminal, and names the cure."""


async def serve(
    settings: Settings,
    *,
    plain_text: bool,
    migrate: bool,
    on_ready: Callable[[str], None] = lambda _: None,
    on_lost: Callable[[], None] = lambda: None,
) -> None:
    """Serve until the first SIGINT or SIGTERM, then let calls under way end; a second signal ends at once.

    Args:
        settings: Checked settings.
        plain_text: Whether to serve whoever comes, in plain text. Otherwise callers are identified.
        migrate: Whether to migrate the database first. Otherwise it must be up to date.
        on_ready: Called with the address as soon as calls are served.
        on_lost: Called when gRPC can serve no more in this process. It need not return.

    Raises:
        StartError: The database is not to be had, or would lose what it acknowledged; or the address is taken; or
            gRPC can serve no more.
        MigrationRefused: The database is not as `migrate` needs it.
        SettingsError: Keys, policy or certificate are not to be had, or not right.
    """
    files = read_files(settings, plain_text=plain_text)
    ring, certificate = files.ring, files.certificate
    courier = make_courier(settings, ring)
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

        if courier is not None:
            await courier.open()
            stack.push_async_callback(_bounded, courier.close)

        hashing = Hashing(threads=settings.argon2_threads, queue=settings.argon2_queue)
        stack.callback(hashing.close)
        hasher = ring.code_hasher(
            argon2_parameters(settings.argon2_memory_kib, settings.argon2_time_cost, settings.argon2_parallelism)
            if settings.code_hashing == "argon2id"
            else None
        )

        health_servicer = _Health()
        names = [service.full_name for service in SERVICES]
        servicers: tuple[tuple[Callable[..., None], object], ...] = (
            (
                one_time_tokens_pb2_grpc.add_OneTimeTokenServiceServicer_to_server,
                OneTimeTokens(settings, database, ring, hasher, hashing),
            ),
            (
                email_verification_pb2_grpc.add_EmailVerificationServiceServicer_to_server,
                EmailVerifications(
                    settings, database, ring, adds_users=adds_users, on_mail=courier.wake if courier else None
                ),
            ),
            (admin_pb2_grpc.add_AdminServiceServicer_to_server, Admin(database)),
            (health_pb2_grpc.add_HealthServicer_to_server, health_servicer),
        )
        server, accepting = await _start_server(settings, files, servicers)
        changes = asyncio.create_task(reload.watch(files.watched, certificate))
        stack.push_async_callback(_cancelled, changes)
        watch = asyncio.create_task(_watch_database(database, health_servicer, ["", *names]))
        stack.push_async_callback(_cancelled, watch)
        # What is there by now stays: the garbage collector need not look through it again and again. Nor need it come
        # as often as by default, since hardly anything in a call refers to itself.
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        on_ready(settings.listen)
        _LOG.info("serving", extra={"listen": settings.listen})

        if await _ended_before(accepting, stop):
            # A request that gRPC's own code cannot read, such as one whose path is not UTF-8, ends its loop (grpcio
            # 1.85.1), before any code of ours sees it. A second loop in this process crashes Python under load.
            _LOG.critical("gRPC has stopped taking calls", extra={"error": str(accepting.exception())})
            on_lost()
            raise StartError("gRPC has stopped taking calls, and only a new process can take them; start it again")
        _LOG.info("draining")
        watch.cancel()
        await health_servicer.enter_graceful_shutdown()
        # Balancers learn from health that this replica is going, and until then calls are served.
        await _unless(hurry, asyncio.sleep(settings.drain_delay.total_seconds()))
        # A call that arrives at the very moment of the stop gRPC may cancel, or lose (grpcio 1.85.1): what is lost ends
        # by its own deadline, or with the grace. The delay is there so that hardly any arrives by then.
        await _unless(hurry, server.stop(settings.shutdown_grace.total_seconds()))
        await server.stop(0)
    _LOG.info("stopped")


async def _start_server(
    settings: Settings, files: "Files", servicers: Iterable[tuple[Callable[..., None], object]]
) -> tuple[grpc.aio.Server, asyncio.Task[Any]]:
    """Start a server, and return it with gRPC's task that takes calls, which is not to be had otherwise.

    Raises:
        StartError: An address is taken.
    """
    cygrpc.AioServer = _AioServer  # there is no other way in
    server = grpc.aio.server(
        interceptors=interceptors.build(
            callers=files.callers,
            cap=settings.call_timeout.total_seconds(),
            limit=settings.max_concurrent_calls,
            known=(*SERVICES, *_BESIDE),
        ),
        options=(
            *SERVER_OPTIONS,
            *_age_options(settings),
            # A second server on the port is a mistake, and is told so, unless it is wanted.
            ("grpc.so_reuseport", int(settings.share_port)),
        ),
    )
    for add, servicer in servicers:
        add(servicer, server)
    # So that grpcurl needs no protos. Callers are identified before it answers.
    reflection.enable_server_reflection([service.full_name for service in (*SERVICES, *_BESIDE)], server)
    _bind(server, "listen", settings.listen, files.certificate.credentials() if files.certificate else None)
    if settings.health_listen:
        # Nobody can be identified there, so `interceptors.identify` lets nothing but health through.
        _bind(server, "health_listen", settings.health_listen, None)
    before = asyncio.all_tasks()
    await server.start()
    (accepting,) = (
        task
        for task in asyncio.all_tasks() - before
        if getattr(task.get_coro(), "__qualname__", "").endswith("._server_main_loop")
    )
    return server, accepting


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    """What serves in grpc.aio.Server, waiting for many calls at once. A class because gRPC's is one (grpcio 1.85.1)."""

    def __init__(self, *arguments: Any) -> None:  # noqa: ANN401 - they are gRPC's
        """Take what gRPC's takes."""
        super().__init__(*arguments)
        self._coming: deque[asyncio.Task[Any]] = deque()

    def add_registered_method_handlers(self, _: object) -> None:
        """Register none: otherwise gRPC waits for each method's next call, and at every call goes through all waits."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[Any]:
        """Return what ends with the next call: gRPC gives calls to those who wait in the order in which they asked."""
        while len(self._coming) < AHEAD:
            call = super()._make_request_call_future(method)
            call.add_done_callback(_heard)
            self._coming.append(call)
        return self._coming.popleft()

    async def _start_shutting_down(self) -> None:
        """Let go of calls that have come and are not taken up: kept, they would neither end nor let the server end."""
        self._coming.clear()
        await super()._start_shutting_down()


def _heard(call: asyncio.Task[Any]) -> None:
    """Take note of how a wait has ended: at the end of the server with an error, of which asyncio would warn."""
    if not call.cancelled():
        call.exception()


async def _ended_before(task: asyncio.Task[Any], event: asyncio.Event) -> bool:
    """Wait for a task or an event, and tell whether it was the task."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return not event.is_set()


@dataclass(frozen=True, slots=True)
class Files:
    """What is read from files."""

    ring: Keyring
    callers: Callers | None
    """None where nobody is asked who they are."""
    certificate: ServerCertificate | None
    """None in plain text."""
    watched: Sequence[Watched[Any]]
    """Those to be read again when they change."""


def read_files(settings: Settings, *, plain_text: bool) -> Files:
    """Read the files that settings name.

    Raises:
        SettingsError: With all that is wrong in any of them.
    """
    watched: list[Watched[Any]] = []
    problems: list[str] = []

    def read(
        name: str, settings_of_paths: Iterable[str], parse: Callable[..., Any], tell: Callable[[Any], None]
    ) -> Any:  # noqa: ANN401 - of any file
        named = {setting: getattr(settings, setting) for setting in settings_of_paths}
        paths = {setting: path for setting, path in named.items() if path is not None}
        try:
            watched.append(Watched(name, paths, parse, tell=tell))
        except ValueError as error:
            problems.extend(str(error).splitlines())
            return None
        return watched[-1].in_force

    def show_keys(ring: Keyring) -> None:
        metrics.show_keys([key.id for key in ring.keys])

    def show_end(certificate: ServerCertificate) -> None:
        metrics.CERTIFICATE_NOT_AFTER.labels("certificate").set(certificate.not_after.timestamp())

    def parse_policy(content: bytes) -> Callers:
        token_types = {one_time_tokens_pb2.TokenType.Name(number): label for number, label in STORED_TYPES.items()}
        contract = Contract.of(SERVICES, token_types)
        return Callers(content, contract, certificates=settings.tls_client_ca is not None)

    if settings.keys_file is None:
        ring = load_keyring(settings)
        show_keys(ring)
    else:
        ring = read("keys", ["keys_file"], parse_keys, show_keys)
    callers = certificate = None
    if not plain_text:
        callers = read("policy", ["policy_file"], parse_policy, lambda _: None)
        certificate = read("certificate", ["tls_cert", "tls_key", "tls_client_ca"], ServerCertificate, show_end)
    if problems:
        raise SettingsError(problems)
    return Files(ring, callers, certificate, watched)


def make_courier(settings: Settings, ring: Keyring) -> Courier | None:
    """Return what sends mails, or None without a mail server.

    Raises:
        SettingsError: The templates are not right, or the mail server's authorities cannot be read.
    """
    if settings.smtp_url is None and settings.mail_templates is None:
        return None
    problems: list[str] = []
    templates = transport = None
    try:
        # Also without a mail server: whoever sets templates wants to hear of what is wrong with them.
        templates = Templates(settings.mail_templates, locale=settings.mail_locale)
    except ValueError as error:
        problems += [f"mail_templates: {line}" for line in str(error).splitlines()]
    server = parse_smtp_url(settings.smtp_url) if settings.smtp_url else None
    if server is not None:
        try:
            transport = Transport(server, sender=settings.mail_from)
        except ValueError as error:
            problems.append(f"smtp_url: {error}")
    if problems:
        raise SettingsError(problems)
    return Courier(settings, ring, server, transport, templates) if server and transport and templates else None


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


def _age_options(settings: Settings) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for how long connections live.

    A certificate is checked when a connection is made, and for a client whose authority was withdrawn since, the end
    of its connection is the first time that anybody looks. Clients go over to a new one without losing a call.
    """
    grace = settings.call_timeout.total_seconds() + AGE_GRACE_S
    return (
        ("grpc.max_connection_age_ms", settings.max_connection_age // timedelta(milliseconds=1)),
        # Unary calls end in this time; streams, such as Health/Watch, are cut off after it.
        ("grpc.max_connection_age_grace_ms", int(grace * 1000)),
    )


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


def _bind(server: grpc.aio.Server, setting: str, listen: str, credentials: grpc.ServerCredentials | None) -> None:
    """Open a port, of plain text if there are no credentials."""
    try:
        if credentials is None:
            server.add_insecure_port(listen)
        else:
            server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        option = option_of(setting)
        raise StartError(f"cannot listen on {listen}: is another server on it? Take another {option}") from error


class _Health(health.aio.HealthServicer):
    """The library's health, with the one rpc that it lacks."""

    async def List(self, request: object, context: object) -> Any:  # noqa: ANN401, ARG002, N802 - gRPC's name, and its stubs leave the type out
        """Return the status of the whole and of each service."""
        known = self._server_status.items()  # type: ignore[attr-defined] # as above
        each = {name: health_pb2.HealthCheckResponse(status=status) for name, status in known}
        return health_pb2.HealthListResponse(statuses=each)  # type: ignore[attr-defined] # as above


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
