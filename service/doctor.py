"""`onetime doctor`: is everything as the service needs it, and if not, what helps?

Each check gives findings, a line each; one that fails or warns names its cure. It only reads, and goes on after a
failure as long as there is something left to look at. It knows nothing of how findings are shown.
"""

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from service import app, migrations, smtp
from service.config import (
    IDENTIFYING,
    Settings,
    SettingsError,
    format_duration,
    is_cheap,
    is_loopback,
    load_keyring,
    option_of,
    parse_listen,
    parse_smtp_url,
)
from service.crypto import Keyring, new_key
from service.db import STATEMENT_TIMEOUT_MS, Params, load_queries
from service.reload import WARN_BEFORE

_QUERIES: Final = load_queries("doctor")
_TRUST: Final = load_queries("app")["trust"]

_CONNECT_TIMEOUT_S: Final = 5
_STATEMENT_TIMEOUT_MS: Final = 60_000
"""The whole of both tables is read: neither has an index on what is asked."""

_NIST_IN_A_ROW: Final = 100
_NIST_OUT_OF_BAND: Final = timedelta(minutes=10)
_NIST_CONFIRMATION: Final = timedelta(hours=24)
_WORST_ODDS: Final = 0.02
_WORST_DRIFT_S: Final = 30
_MANY_ROWS: Final = 200_000

Connection = psycopg.AsyncConnection[dict[str, Any]]
_Judge: TypeAlias = Callable[[list[dict[str, Any]]], Iterable["Finding"]]
_Look: TypeAlias = Callable[[], Awaitable[Iterable["Finding"]]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    text: str
    cure: str = ""
    """Empty where nothing needs one."""


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Give the findings on the keys, the callers, the settings and the database."""
    ring: Keyring | None = None
    try:
        ring = load_keyring(settings)
    except SettingsError as error:
        for problem in error.problems:
            yield Finding("keys", "fail", problem, "put it right, or make a new file with `onetime keys init`")
    else:
        yield _keys(settings, ring)
    for finding in (*_callers(settings), _hashing(settings), *_limits(settings), *_running(settings)):
        yield finding
    async for finding in _mail(settings):
        yield finding
    try:
        async with await psycopg.AsyncConnection.connect(
            settings.database_url,
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT_S,
            application_name="onetime doctor",
            row_factory=dict_row,
        ) as connection:
            async for finding in _database(settings, connection, ring):
                yield finding
    except psycopg.Error as error:
        cure = "check database_url, that the server runs, and the role's privileges"
        yield Finding("database", "fail", _primary(error), cure)


def _primary(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).partition("\n")[0]


def _open_to_others(path: Path, forbidden: int) -> str | None:
    """Return the mode of a file with permissions that it must not have, or None."""
    status = path.stat()
    return f"{stat.S_IMODE(status.st_mode):04o}" if is_too_open(status, forbidden, reader=os.geteuid()) else None


def is_too_open(status: os.stat_result, forbidden: int, *, reader: int) -> bool:
    """Tell whether a file has permissions that it must not have, given the user id of who reads it.

    As in libpq, a file of root's may be read by its group where the reader is not root: so root, or Kubernetes with
    fsGroup, hands a secret to a service, which could not change the mode.
    """
    if status.st_uid == 0 and reader != 0:
        forbidden &= ~stat.S_IRGRP
    return bool(status.st_mode & forbidden)


def _keys(settings: Settings, ring: Keyring) -> Finding:
    """Tell whether anybody else may read the keys."""
    ids = ", ".join(key.id for key in ring.keys)
    text = f"{ring.keys[0].id} makes; {ids} check" if len(ring.keys) > 1 else f"{ids} makes and checks"
    if settings.keys_file is None:
        return Finding("keys", "ok", f"{text} (from the environment)")
    mode = _open_to_others(settings.keys_file, stat.S_IRWXG | stat.S_IRWXO)
    if mode:
        return Finding(
            "keys",
            "fail",
            f"{settings.keys_file} is open to others (mode {mode})",
            f"chmod 600 {settings.keys_file}; if others may have read it, `onetime keys add`, `switch` and `retire`",
        )
    return Finding("keys", "ok", text)


def _callers(settings: Settings) -> Iterator[Finding]:
    """Tell whether callers can be identified, and whether others can become one."""
    given = [name for name in IDENTIFYING if getattr(settings, name)]
    if not given:
        others = ", ".join(map(option_of, IDENTIFYING))
        yield Finding("callers", "ok", f"whoever is on this machine, with --insecure-loopback; for others set {others}")
        return
    if len(given) < len(IDENTIFYING):
        missing = ", ".join(option_of(name) for name in IDENTIFYING if name not in given)
        yield Finding("callers", "fail", f"{missing} missing beside {given[0]}", "all of them are needed, or none")
        return
    try:
        files = app.read_files(settings, plain_text=False)
    except SettingsError as error:
        # What is wrong with the keys is told already.
        for problem in (each for each in error.problems if "_KEYS" not in each and not each.startswith("keys_file")):
            yield Finding("callers", "fail", problem, "put it right: a server that runs keeps what it had before")
        return
    yield from _policy(settings, files)
    for name, forbidden, danger in (
        ("tls_key", stat.S_IRWXG | stat.S_IRWXO, "whoever has read it can pose as this server"),
        ("policy_file", stat.S_IWGRP | stat.S_IWOTH, "whoever writes to it decides who may do what"),
        ("tls_client_ca", stat.S_IWGRP | stat.S_IWOTH, "whoever writes to it decides who is let in"),
    ):
        path: Path | None = getattr(settings, name)
        mode = path and _open_to_others(path, forbidden)
        if mode:
            right = "600" if name == "tls_key" else "644"
            yield Finding("callers", "fail", f"{path} has mode {mode}: {danger}", f"chmod {right} {path}")


def _policy(settings: Settings, files: app.Files) -> Iterator[Finding]:
    """Tell who may do what, and until when the certificate is good."""
    if files.callers is not None:
        by = "certificate or API key" if settings.tls_client_ca else "API key"
        yield Finding("callers", "ok", f"{_counted(len(files.callers.names()), 'caller')}, known by {by}")
        mailing = files.callers.with_send_email()
        if mailing and settings.smtp_url is None:
            text = f"{', '.join(mailing)} may have codes mailed, and there is no mail server"
            yield Finding("mail", "warn", text, f"set {option_of('smtp_url')}, or take send_email out of the policy")
    if files.certificate is not None:
        left = files.certificate.not_after - datetime.now(UTC)
        text = f"the certificate expires at {files.certificate.not_after:%Y-%m-%d %H:%M} UTC"
        if left < WARN_BEFORE:
            yield Finding("certificate", "warn", text, "renew it: servers take the new files within seconds")
        else:
            yield Finding("certificate", "ok", text)


async def _mail(settings: Settings) -> AsyncIterator[Finding]:
    """Tell whether the mail server takes our login, without sending anything, and whether the templates are right."""
    try:
        # Any keys would do: none is used.
        app.make_courier(settings, Keyring([new_key()]))
    except SettingsError as error:
        for problem in error.problems:
            yield Finding("mail", "fail", problem, "put it right; `onetime mail preview` shows what comes of it")
        return
    if settings.smtp_url is None:
        yield Finding("mail", "ok", f"none is sent; for send_email set {option_of('smtp_url')}")
        return
    server = parse_smtp_url(settings.smtp_url)
    where = f"{server.host}:{server.port}"
    try:
        await smtp.Transport(server, sender=settings.mail_from).check()
    except smtp.NotSent as error:
        yield Finding("mail", "fail", f"{where}: {error}", smtp.CURES[error.failure])
        return
    secured = {"implicit": "over TLS", "starttls": "over STARTTLS", "none": "in plain text"}[server.tls]
    if server.tls == "none" and not is_loopback(server.host):
        cure = "leave out tls=none, or use smtps"
        yield Finding("mail", "warn", f"{where} is spoken to in plain text: whoever listens has the codes", cure)
    else:
        by = "with a login" if server.user else "without a login"
        yield Finding("mail", "ok", f"{where} answers, {secured}, {by}; `onetime mail test ADDRESS` sends one")


def _hashing(settings: Settings) -> Finding:
    """Tell what a guess at a code costs somebody who has a dump of the database and the keys."""
    if settings.code_hashing == "hmac":
        return Finding(
            "hashing",
            "warn",
            "code_hashing is hmac: a dump of the database with the keys gives every live code at once",
            "argon2id, unless its throughput is too low for you",
        )
    cost = f"{settings.argon2_memory_kib} KiB, {settings.argon2_time_cost} passes"
    if is_cheap(settings.argon2_memory_kib, settings.argon2_time_cost):
        return Finding(
            "hashing", "fail", f"Argon2id with {cost} is below OWASP's minimum", "unset ONETIME_UNSAFE_CHEAP_ARGON2"
        )
    memory = settings.argon2_memory_kib * settings.argon2_threads // 1024
    return Finding("hashing", "ok", f"Argon2id with {cost}; {settings.argon2_threads} at once take {memory} MiB")


def _limits(settings: Settings) -> Iterator[Finding]:
    """Tell how far somebody gets who guesses, if more is allowed than by default."""
    findings = []
    if settings.failures_in_a_row > _NIST_IN_A_ROW:
        text = f"{settings.failures_in_a_row} wrong codes in a row stop a subject"
        findings.append(Finding("limits", "warn", f"{text}; NIST SP 800-63B asks for 100 at most", "lower it"))
    odds = 1 - (1 - 1e-6) ** (365 * settings.failures_per_day)
    if odds > _WORST_ODDS:
        findings.append(
            Finding(
                "limits",
                "warn",
                f"{settings.failures_per_day} guesses a day find a 6-digit code in a year with a chance of {odds:.1%}",
                f"lower {option_of('failures_per_day')}, or issue codes of 8 digits",
            )
        )
    if settings.reauthentication_max_ttl > _NIST_OUT_OF_BAND:
        text = f"reauthentication tokens may live for {format_duration(settings.reauthentication_max_ttl)}"
        findings.append(Finding("limits", "warn", f"{text}; NIST SP 800-63B asks for 10m at most", "lower it"))
    if settings.email_verification_max_ttl > _NIST_CONFIRMATION:
        text = f"email verifications may live for {format_duration(settings.email_verification_max_ttl)}"
        findings.append(Finding("limits", "warn", f"{text}; NIST SP 800-63A asks for 24h at most", "lower it"))
    yield from findings or [
        Finding("limits", "ok", f"a subject is guessed in a year with a chance of {odds:.1%} at most")
    ]


def _running(settings: Settings) -> Iterator[Finding]:
    """Tell what will hurt once the server runs."""
    if settings.cleanup_probability == 0:
        cure = f"set {option_of('cleanup_probability')} to 0.1, or run `onetime cleanup` by a timer"
        yield Finding("clean-up", "warn", "no write starts a clean-up: the tables grow without end", cure)
    memory = settings.argon2_memory_kib * settings.argon2_threads * 1024
    limit = _memory_limit()
    if settings.code_hashing == "argon2id" and limit and memory > limit / 2:
        yield Finding(
            "memory",
            "fail",
            f"Argon2 may take {memory // 2**20} MiB of the {limit // 2**20} MiB that this process may use",
            f"lower {option_of('argon2_threads')}, or give it more memory",
        )
    if settings.metrics_listen and not is_loopback(parse_listen(settings.metrics_listen)[0]):
        cure = "let nobody but Prometheus reach it; there is no secret in them"
        yield Finding("metrics", "warn", f"whoever reaches {settings.metrics_listen} may read the metrics", cure)


def _memory_limit() -> int | None:
    """Return the bytes that this process may use, by its control group or by what the machine has."""
    with suppress(OSError, ValueError):
        return int(Path("/sys/fs/cgroup/memory.max").read_text("ascii"))
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


async def _database(settings: Settings, connection: Connection, ring: Keyring | None) -> AsyncIterator[Finding]:
    """Give the findings on the server, the schema and the rows, each as it is made."""
    await connection.execute(_QUERIES["configure_session"], {"statement_timeout": str(_STATEMENT_TIMEOUT_MS)})
    (server,) = await _rows(connection, _QUERIES["server"])
    yield Finding("database", "ok", f"PostgreSQL {server['version']}")
    for finding in _transport(connection):
        yield finding

    def ask(query: str, judge: _Judge, params: Params | None = None) -> _Look:
        async def look() -> Iterable[Finding]:
            return judge(await _rows(connection, query, params))

        return look

    of_server: Mapping[str, _Look] = {
        "operation": ask(_QUERIES["operation"], partial(_operation, settings, connection)),
        "trust": ask(_TRUST, _trust),
        "server log": ask(_QUERIES["unset_log_parameters"], _log_parameters),
        "migrations": partial(_migrations, connection),
        "schema": partial(_schema, connection),
    }
    failed = set()
    for check, look in of_server.items():
        for finding in await _attempt(connection, check, look):
            if finding.verdict == "fail":
                failed.add(check)
            yield finding
    if failed & {"trust", "migrations"}:
        return  # what reads the rows would fail for that reason, and no more be said than is said already
    needed: Params = {
        "longest_ttl": settings.longest_ttl().total_seconds(),
        "receipt_retention": settings.receipt_retention.total_seconds(),
    }
    in_a_row: Params = {"failures_in_a_row": settings.failures_in_a_row}
    of_rows: Mapping[str, _Look] = {
        "foreign rows": ask(_QUERIES["foreign_rows"], _foreign),
        "limits": ask(_QUERIES["stopped_subjects"], _stopped, in_a_row),
        "index": ask(_QUERIES["unindexed_users"], _unindexed),
        "keys in use": ask(_QUERIES["keys_in_use"], partial(_in_use, ring), needed),
    }
    for check, look in of_rows.items():
        for finding in await _attempt(connection, check, look):
            yield finding


async def _attempt(connection: Connection, check: str, look: _Look) -> list[Finding]:
    """Return what a check finds. That it could not be made is a finding too, unless nothing more can be asked."""
    try:
        return list(await look())
    except psycopg.Error as error:
        if connection.broken:
            raise
        return [Finding(check, "fail", _primary(error), _cure(error))]


def _cure(error: psycopg.Error) -> str:
    """Return what helps where the server refused what a check asks."""
    match error:
        case psycopg.errors.InsufficientPrivilege():
            return "grant it to the role, or run `onetime doctor` as the role that migrates"
        case psycopg.errors.QueryCanceled():
            return "run `onetime doctor` again when the database has less to do"
        case psycopg.errors.UndefinedFunction() | psycopg.errors.SyntaxError():
            return "use PostgreSQL 15 or newer"
        case _:
            return "look into PostgreSQL's log, and run `onetime doctor` again"


async def _migrations(connection: Connection) -> list[Finding]:
    """Tell what `migrate` has to do."""
    pending = await migrations.pending(connection)
    return [Finding("migrations", "fail", what, "onetime migrate") for what in pending] or [
        Finding("migrations", "ok", "up to date")
    ]


def _transport(connection: Connection) -> Iterator[Finding]:
    """Tell whether somebody on the way to the database can read along, or be the database."""
    info = connection.info
    if info.host.startswith("/") or is_loopback(info.host):
        return
    mode = str(conninfo_to_dict(info.dsn).get("sslmode") or os.environ.get("PGSSLMODE") or "prefer")
    cure = "sslmode=verify-full in database_url, with sslrootcert for an authority of your own"
    if not info.pgconn.ssl_in_use:
        yield Finding("database TLS", "fail", f"the connection to {info.host} is in plain text", cure)
    elif mode not in ("verify-full", "verify-ca"):
        yield Finding("database TLS", "warn", f"sslmode is {mode}: anybody may pose as {info.host}", cure)
    else:
        yield Finding("database TLS", "ok", f"sslmode is {mode}")


def _operation(settings: Settings, connection: Connection, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell what the server's operator may have got wrong."""
    findings = []
    (row,) = rows
    if row["backend_pid"] != connection.info.backend_pid:
        text = (
            "a pooler stands between: if it pools by transaction, settings of a session reach others and prepared "
            "statements are lost"
        )
        findings.append(Finding("operation", "warn", text, "pool by session, or connect without it"))
    wanted = settings.pool_size + 1 + (2 if settings.smtp_url else 0)  # the clean-up has one, and the courier two
    if row["connections"] < 2 * wanted:
        text = f"PostgreSQL lets {row['connections']} connections in, and each server takes {wanted}"
        cure = f"raise max_connections, or lower {option_of('pool_size')}: two servers stand side by side in a rollout"
        findings.append(Finding("operation", "warn", text, cure))
    if not row["autovacuum"]:
        findings.append(Finding("operation", "warn", "autovacuum is off: the tables grow without end", "set it on"))
    if row["waits_for_standby"] and not row["standbys"]:
        text = "each COMMIT waits for a synchronous standby, and none is connected: every write will be OUTCOME_UNKNOWN"
        findings.append(Finding("operation", "fail", text, "bring a standby back, or change synchronous_standby_names"))
    if row["standbys"] and not row["waits_for_standby"]:
        text = "replication is asynchronous: a failover may bring spent tokens back"
        findings.append(Finding("operation", "warn", text, "set synchronous_standby_names"))
    drift = abs((row["now"] - datetime.now(UTC)).total_seconds())
    if drift > _WORST_DRIFT_S:
        text = (
            f"the clocks of this host and the database are {drift:.0f} s apart: certificates and logs go by this one's"
        )
        findings.append(Finding("operation", "warn", text, "synchronise them; tokens go by the database's"))
    yield from findings or [Finding("operation", "ok", "connections, vacuum, replication and clock are in order")]


def _trust(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell whether the server would lose what it acknowledged, or keep the role from its work."""
    for row in rows:
        fault, _, cure = row["fault"].partition(": ")
        yield Finding("trust", "fail", fault, cure)
    if not rows:
        yield Finding("trust", "ok", "what is acknowledged is on disk, and the role may do its work")


async def _schema(connection: Connection) -> list[Finding]:
    """Tell how the host's tables differ from what they were when they were taken over."""
    try:
        comparison = await migrations.compare_with_seed(connection)
    except migrations.MigrationRefused as refusal:
        # A role that may not make temporary tables can serve nevertheless.
        cure = "run `onetime doctor` as the role that migrates"
        return [Finding("schema", "warn", f"not compared: {problem}", cure) for problem in refusal.problems]
    if comparison.problems:
        cure = "change the table by hand to what is said; onetime never alters it"
        return [Finding("schema", "fail", problem, cure) for problem in comparison.problems]
    beyond = f", with {len(comparison.tolerated)} things beyond them" if comparison.tolerated else ""
    return [Finding("schema", "ok", f"the tables are as documented{beyond}")]


def _log_parameters(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell whether addresses and digests may get into the server's log, where log_statement or the like is on."""
    for row in rows:
        yield Finding(
            "server log",
            "warn",
            f"addresses and digests may be written to it: the role {row['role']} may not set {row['name']}",
            f'grant set on parameter {row["name"]} to "{row["role"]}"; as a superuser',
        )
    if not rows:
        yield Finding("server log", "ok", "parameters of statements and rows are kept out of it")


def _foreign(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell whether a second system goes on writing a table: it may accept what it finds there as its own."""
    for row in rows:
        yield Finding(
            "foreign rows",
            "fail",
            f"{row['table_name']} has {_counted(row['rows'], 'row')} that another system wrote since onetime took it "
            f"over, the last at {row['newest']:%Y-%m-%d %H:%M} UTC",
            "stop that system's writing to this table: two systems on one table are not supported",
        )
    if not rows:
        yield Finding("foreign rows", "ok", "none since onetime took the tables over")


def _in_use(ring: Keyring | None, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell where the replacement of a key stands, and whether rows are left that no key of the ring can check."""
    if ring is None:
        return
    live = {row["key_id"]: row for row in rows}
    for key in ring.keys[1:]:
        row = live.pop(key.id, None)
        if row:
            until = f"{row['last_expiry']:%Y-%m-%d %H:%M} UTC, and longer if another server still makes under it"
            yield Finding("keys in use", "ok", f"{key.id} checks {_needing(row['rows'])} until {until}")
        else:
            step = f"`onetime keys switch {key.id}` if it is new, `onetime keys retire {key.id}` if it is old"
            yield Finding("keys in use", "ok", f"{key.id} checks, and no live token or kept answer needs it: {step}")
    maker = ring.keys[0].id
    row = live.pop(maker, None)
    yield Finding("keys in use", "ok", f"{maker} makes; {_needing(row['rows'] if row else 0)} so far")
    for key_id, row in live.items():
        yield Finding(
            "keys in use",
            "warn",
            f"{_needing(row['rows'])} made under key {key_id}, which the ring does not have: refused",
            "put the key back if it is not compromised, or let them expire",
        )


def _needing(count: int) -> str:
    return "1 live token or kept answer" if count == 1 else f"{count} live tokens and kept answers"


def _stopped(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell whether anybody is being guessed at."""
    if rows[0]["subjects"]:
        yield Finding(
            "limits",
            "warn",
            f"{_counted(rows[0]['subjects'], 'user')} had so many wrong codes in a row that their codes were stopped",
            "look who is guessing; `onetime unlock` for an owner who cannot wait",
        )


def _unindexed(rows: list[dict[str, Any]]) -> Iterator[Finding]:
    """Tell whether the deletion of a user takes long."""
    if rows and rows[0]["rows"] > _MANY_ROWS:
        yield Finding(
            "index",
            "warn",
            f"PurgeUser, and your own deletion of a user, reads {rows[0]['rows']} rows of email_verification_tokens: "
            f"PurgeUser may not end in the {STATEMENT_TIMEOUT_MS / 1000:g} s that it has",
            "create index concurrently on public.email_verification_tokens (user_id); onetime puts up with it",
        )


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


async def _rows(connection: Connection, query: str, params: Params | None = None) -> list[dict[str, Any]]:
    return await (await connection.execute(query, params)).fetchall()
