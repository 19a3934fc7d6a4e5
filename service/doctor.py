"""`onetime doctor`: is everything as the service needs it, and if not, what helps?

Each check gives findings, a line each; one that fails or warns names its cure. It only reads, and goes on after a
failure as long as there is something left to look at. It knows nothing of how findings are shown.
"""

import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import psycopg
from psycopg.rows import dict_row

from service import migrations
from service.config import Settings, SettingsError, is_cheap, load_keyring
from service.crypto import Keyring
from service.db import load_queries

_QUERIES: Final = load_queries("doctor")
_TRUST: Final = load_queries("app")["trust"]

_CONNECT_TIMEOUT_S: Final = 5
_STATEMENT_TIMEOUT_MS: Final = 60_000
"""The whole of both tables is read: neither has an index on what is asked."""

Connection = psycopg.AsyncConnection[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    text: str
    cure: str = ""
    """Empty where nothing needs one."""


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Give the findings on the keys, the hashing and the database."""
    ring: Keyring | None = None
    try:
        ring = load_keyring(settings)
    except SettingsError as error:
        for problem in error.problems:
            yield Finding("keys", "fail", problem, "put it right, or make a new file with `onetime keys init`")
    else:
        yield _keys(settings, ring)
    yield _hashing(settings)
    try:
        async with await psycopg.AsyncConnection.connect(
            settings.database_url,
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT_S,
            application_name="onetime doctor",
            row_factory=dict_row,
        ) as connection:
            async for finding in _database(connection, ring):
                yield finding
    except psycopg.Error as error:
        text = error.diag.message_primary or str(error).partition("\n")[0]
        yield Finding("database", "fail", text, "check database_url, that the server runs, and the role's privileges")


def _keys(settings: Settings, ring: Keyring) -> Finding:
    """Tell whether anybody else may read the keys."""
    ids = ", ".join(key.id for key in ring.keys)
    text = f"{ring.keys[0].id} makes; {ids} check" if len(ring.keys) > 1 else f"{ids} makes and checks"
    if settings.keys_file is None:
        return Finding("keys", "ok", f"{text} (from the environment)")
    mode = stat.S_IMODE(settings.keys_file.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(
            "keys",
            "fail",
            f"{settings.keys_file} is open to others (mode {mode:04o})",
            f"chmod 600 {settings.keys_file}; if others may have read it, `onetime keys add`, `switch` and `retire`",
        )
    return Finding("keys", "ok", text)


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


async def _database(connection: Connection, ring: Keyring | None) -> AsyncIterator[Finding]:
    """Give the findings on the server, the schema and the rows."""
    await connection.execute(_QUERIES["configure_session"], {"statement_timeout": str(_STATEMENT_TIMEOUT_MS)})
    server = await _rows(connection, _QUERIES["server"])
    yield Finding("database", "ok", f"PostgreSQL {server[0]['version']}")
    findings = [
        *_trust(await _rows(connection, _TRUST)),
        *_log_parameters(await _rows(connection, _QUERIES["unset_log_parameters"])),
    ]
    pending = await migrations.pending(connection)
    findings += [Finding("migrations", "fail", what, "onetime migrate") for what in pending]
    findings += await _schema(connection)
    if not pending:
        findings.append(Finding("migrations", "ok", "up to date"))
        findings += _foreign(await _rows(connection, _QUERIES["foreign_rows"]))
        findings += _retired(await _rows(connection, _QUERIES["keys_in_use"]), ring) if ring else []
    for finding in findings:
        yield finding


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
            f"{row['table_name']} has {_counted(row['rows'])} that another system wrote since onetime took it over, "
            f"the last at {row['newest']:%Y-%m-%d %H:%M} UTC",
            "stop that system's writing to this table: two systems on one table are not supported",
        )
    if not rows:
        yield Finding("foreign rows", "ok", "none since onetime took the tables over")


def _retired(rows: list[dict[str, Any]], ring: Keyring) -> Iterator[Finding]:
    """Tell whether tokens are left that no key of the ring can check."""
    known = {key.id for key in ring.keys}
    lost = [row for row in rows if row["key_id"] not in known]
    for row in lost:
        yield Finding(
            "retired keys",
            "warn",
            f"{_counted(row['rows'])} made under key {row['key_id']}, which the ring does not have: they are refused",
            "put the key back if it is not compromised, or let them expire",
        )
    if not lost:
        yield Finding("retired keys", "ok", "every row was made under a key of the ring")


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


async def _rows(connection: Connection, query: str) -> list[dict[str, Any]]:
    return await (await connection.execute(query)).fetchall()
