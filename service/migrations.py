"""Brings a database to the state that this version of the service needs, and tells how far it is from it.

It owns the schema `onetime` and the making of the seed's tables: those that are missing are created, those of a host
are taken over as they are, or refused. What the seed is stands in `service/sql/tables/` alone: to compare a host's
table with it, these files are run in the session's temporary schema, and the catalog is asked about both.

It never alters a table of the seed or anything of a host's, and knows nothing of what the tables are used for.
"""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import psycopg
from psycopg.rows import class_row, dict_row

from service.db import load_queries

Connection = psycopg.AsyncConnection[Any]

ADVISORY_LOCK: Final = int.from_bytes(b"onetime")
"""The key of the advisory lock under which one `migrate` at a time works in a database."""

OLDEST_SERVER: Final = 15
"""The first PostgreSQL with NULLS NOT DISTINCT, which an index of the seed has."""

TURN_TIMEOUT_MS = 30_000
"""How long to wait for another `migrate`: many replicas may start at once, and the first does the work."""

LOCK_TIMEOUT_MS = 5_000
"""How long to wait for a lock on a host's table. Everybody else who wants the table waits behind us meanwhile."""

STATEMENT_TIMEOUT_MS = 60_000
"""More than the wait for our turn, so that the error names the cause."""

ONE_TIME_TOKENS: Final = "auth.one_time_tokens"
EMAIL_VERIFICATION_TOKENS: Final = "public.email_verification_tokens"
USERS: Final = "public.users"

_TOKEN_TYPE: Final = "auth.one_time_token_type"  # noqa: S105 # the name of a type
_TRIGGER_FUNCTION: Final = "public.trigger_set_timestamp"
_BOOKKEEPING: Final = ("onetime.schema_migrations", "onetime.adoptions")

_TABLES: Final = (ONE_TIME_TOKENS, EMAIL_VERIFICATION_TOKENS, USERS)
"""What `onetime.adoptions` has a row for."""

_ACCEPTED_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    _TOKEN_TYPE: ("enum",),
    ONE_TIME_TOKENS: ("table",),
    USERS: ("table", "table with inheritance", "partition", "partitioned table"),  # a foreign key can reference these
    _TRIGGER_FUNCTION: ("trigger function",),
    EMAIL_VERIFICATION_TOKENS: ("table",),
}
"""What each object of the seed may be, in the order in which they are created."""

_NEVER_BEYOND: Final = frozenset({"check", "trigger", "rule"})
"""What a table may not have beyond the seed: it could refuse our rows, or change them under our hands."""

_SQL = resources.files("service").joinpath("sql")
_QUERIES = load_queries("migrations")
_SEED = {name: _SQL.joinpath("tables", f"{name.partition('.')[2]}.sql").read_text("utf-8") for name in _ACCEPTED_KINDS}


class MigrationRefused(Exception):
    """The database is not as `migrate` needs it, and nothing in it was changed. The text is for a terminal."""

    def __init__(self, problems: Iterable[str], cure: str) -> None:
        """Take everything that stands in the way, and what helps."""
        self.problems = tuple(problems)
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"The database is not ready for onetime, and was not changed:{listed}\n{cure}")


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What one run of `migrate` did. All empty: there was nothing to do."""

    created: tuple[str, ...] = ()
    """Objects of the seed that were missing."""
    adopted: tuple[str, ...] = ()
    """Tables of the host's that are in use from now on."""
    applied: tuple[str, ...] = ()
    """Migrations of our own schema."""
    tolerated: tuple[str, ...] = ()
    """What the host's tables have beyond the seed, one sentence each."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the tables of a database differ from the seed, one sentence for each difference."""

    problems: tuple[str, ...]
    """What makes `migrate` refuse."""
    tolerated: tuple[str, ...]
    """What it puts up with."""


@dataclass(frozen=True, slots=True)
class _Migration:
    version: int
    name: str
    sql: str


@dataclass(frozen=True, slots=True)
class _Object:
    """What stands under a name in the catalog."""

    name: str
    kind: str
    oid: str


@dataclass(frozen=True, slots=True)
class _State:
    """How far the database is."""

    objects: Mapping[str, _Object]
    versions: frozenset[int]
    adopted: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Fact:
    """One thing that the catalog says of a table."""

    kind: str
    name: str
    definition: str
    required: bool
    """A column without which no row can be written."""

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}".strip()


_Facts = Mapping[str, _Fact]
"""What the catalog says of one table, by title."""


def _load_migrations() -> tuple[_Migration, ...]:
    """Return `sql/migrations/NNNN_*.sql` in the order of their numbers."""
    stems = sorted(file.name.removesuffix(".sql") for file in _SQL.joinpath("migrations").iterdir())
    return tuple(
        _Migration(int(stem[:4]), stem, _SQL.joinpath("migrations", f"{stem}.sql").read_text("utf-8")) for stem in stems
    )


_MIGRATIONS = _load_migrations()


async def migrate(conn: Connection) -> MigrationReport:
    """Bring the database to the state that this version needs, whole or not at all.

    Any number of processes may call it at once: one does the work, the others wait for it. A database that is up to
    date is only read, without a lock.

    Args:
        conn: Outside of any transaction, with a role that may create schemas in this database.

    Raises:
        MigrationRefused: Nothing was changed. Every reason that could be found is listed.
    """
    async with _transaction(conn):
        if not _outstanding(await _read_state(conn)):
            return MigrationReport()
        await _take_turn(conn)
        # Another process may have done it all while we waited for our turn.
        state = await _read_state(conn)
        if not _outstanding(state):
            return MigrationReport()
        comparison = await _compare(conn, state.objects)
        if comparison.problems:
            raise MigrationRefused(comparison.problems, _CURE_FOR_DIFFERENCES)
        created = await _create_missing(conn, state.objects)
        applied = await _apply_missing(conn, state)
        newly_adopted = [name for name in _TABLES if name not in created and name not in state.adopted]
        for name in _TABLES:
            await conn.execute(_QUERIES["record_adoption"], {"table": name, "created": name in created})
    return MigrationReport(
        created=tuple(created),
        adopted=tuple(newly_adopted),
        applied=tuple(applied),
        tolerated=comparison.tolerated,
    )


async def pending(conn: Connection) -> list[str]:
    """Tell what `migrate` has to do before this version can serve, one sentence each; nothing when it is up to date.

    Only reads, and asks little: it needs no privilege but to read the schema `onetime`. Whether the host has altered
    the tables since, `compare_with_seed` tells.
    """
    try:
        async with _transaction(conn):
            return _outstanding(await _read_state(conn))
    except MigrationRefused as refusal:
        return list(refusal.problems)


async def compare_with_seed(conn: Connection) -> Comparison:
    """Compare the tables that exist with the seed, as `migrate` does before it takes them over.

    Leaves nothing behind, but needs the privilege to create temporary tables.

    Raises:
        MigrationRefused: They cannot be compared.
    """
    async with _transaction(conn):
        state = await _read_state(conn)
        return await _compare(conn, state.objects)


async def users_table_is_ours(conn: Connection) -> bool:
    """Tell whether `migrate` made public.users and nobody has extended it since, so that we may add users to it.

    The database has been migrated.
    """
    row = await _fetch_one(conn, "users_table_is_ours", {})
    return bool(row["ours"])


_CURE_FOR_DIFFERENCES: Final = (
    "onetime never alters tables that it finds. Change them by hand to what is said above, or give onetime a database "
    "of its own; then run `onetime migrate` again."
)


@asynccontextmanager
async def _transaction(conn: Connection) -> AsyncIterator[None]:
    """Run the block in one transaction with time limits, and say what its failures mean to an operator."""
    try:
        async with conn.transaction():
            # Under any stricter level the snapshot is older than our turn, and what the one before us did unseen.
            await conn.execute("set transaction isolation level read committed")
            await conn.execute(
                _QUERIES["configure_transaction"],
                {"lock_timeout": str(LOCK_TIMEOUT_MS), "statement_timeout": str(STATEMENT_TIMEOUT_MS)},
            )
            yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise MigrationRefused(
            [str(error.diag.message_primary)],
            "Run `onetime migrate` as a role that may create schemas and temporary tables in this database (grant "
            "create, temporary on database ...), tables in the schemas auth and public where they exist (grant create "
            "on schema ...), and references to the host's public.users (grant references on ...).",
        ) from error
    except psycopg.errors.ReadOnlySqlTransaction as error:
        raise MigrationRefused(
            ["the database is read-only: a standby, or default_transaction_read_only is on"],
            "Run `onetime migrate` on the primary, as a role that may write.",
        ) from error
    except psycopg.errors.LockNotAvailable as error:
        raise MigrationRefused(
            [f"a lock was not to be had within {LOCK_TIMEOUT_MS / 1000:g} s: another session uses the table"],
            "Run `onetime migrate` again when no long transaction is open on public.users (see pg_stat_activity).",
        ) from error
    except psycopg.errors.QueryCanceled as error:
        raise MigrationRefused(
            [f"a statement was cancelled, or took more than {STATEMENT_TIMEOUT_MS / 1000:g} s"],
            "Run `onetime migrate` again when the database has less to do.",
        ) from error


async def _take_turn(conn: Connection) -> None:
    """Wait until no other `migrate` works in this database, and keep others waiting until the transaction ends."""
    try:
        await conn.execute(_QUERIES["set_lock_timeout"], {"lock_timeout": str(TURN_TIMEOUT_MS)})
        await conn.execute(_QUERIES["take_lock"], {"lock": ADVISORY_LOCK})
        await conn.execute(_QUERIES["set_lock_timeout"], {"lock_timeout": str(LOCK_TIMEOUT_MS)})
    except psycopg.errors.LockNotAvailable as error:
        raise MigrationRefused(
            [f"another process has been migrating this database for more than {TURN_TIMEOUT_MS / 1000:g} s"],
            f"Wait for it, or end it, then run `onetime migrate` again. It holds advisory lock {ADVISORY_LOCK}: "
            "pg_locks names its process id, pg_terminate_backend(pid) ends it.",
        ) from error


async def _read_state(conn: Connection) -> _State:
    """Read how far the database is.

    Raises:
        MigrationRefused: The server is too old, or the database too new.
    """
    server = conn.info.server_version // 10_000
    if server < OLDEST_SERVER:
        raise MigrationRefused(
            [f"the server is PostgreSQL {server}, and {OLDEST_SERVER} is the oldest that serves"],
            f"Upgrade the server to PostgreSQL {OLDEST_SERVER} or newer, or point onetime at one.",
        )
    objects = await _find_objects(conn, [*_ACCEPTED_KINDS, *_BOOKKEEPING, "auth", "onetime"])
    if not objects.keys() >= set(_BOOKKEEPING):
        return _State(objects, frozenset(), frozenset())
    versions = frozenset(int(row["version"]) for row in await _fetch(conn, "applied_migrations", {}))
    known = {migration.version for migration in _MIGRATIONS}
    if versions - known:
        raise MigrationRefused(
            [f"the schema onetime is at version {max(versions)}, and this program knows {max(known)} at most"],
            "A newer onetime has migrated this database: run that one.",
        )
    adopted = frozenset(str(row["table_name"]) for row in await _fetch(conn, "adopted_tables", {}))
    return _State(objects, versions, adopted)


def _outstanding(state: _State) -> list[str]:
    """List what `migrate` has to do, or to refuse. Pure."""
    missing = [f"{name} is missing" for name in _ACCEPTED_KINDS if name not in state.objects]
    unadopted = [f"{name} is not adopted" for name in _TABLES if name in state.objects and name not in state.adopted]
    unapplied = [f"{one.name} is not applied" for one in _MIGRATIONS if one.version not in state.versions]
    return [*_misfits(state.objects).values(), *missing, *unadopted, *unapplied]


def _misfits(objects: Mapping[str, _Object]) -> dict[str, str]:
    """Return a sentence for each name of the seed under which stands something else altogether. Pure."""
    return {
        name: f"{name} is of another kind: {objects[name].kind}, must be {kinds[0]}"
        for name, kinds in _ACCEPTED_KINDS.items()
        if name in objects and objects[name].kind not in kinds
    }


async def _compare(conn: Connection, objects: Mapping[str, _Object]) -> Comparison:
    """Compare what exists of the seed with it; what is missing is no difference."""
    misfits = _misfits(objects)
    problems = list(misfits.values())
    tolerated: list[str] = []
    oids = {name: found.oid for name, found in objects.items() if name not in misfits}
    labels, facts = await _describe_seed(conn)
    if _TOKEN_TYPE in oids:
        found = await _enum_labels(conn, oids[_TOKEN_TYPE])
        if found != labels:
            problems.append(f"{_TOKEN_TYPE} has the labels ({found}), must have ({labels}) in this order")
    if USERS in oids and not (await _fetch_one(conn, "has_user_key", {"table": oids[USERS]}))["has_user_key"]:
        problems.append(f"{USERS} has no column id of type uuid that is its primary key or unique by itself")
    for table, seed in facts.items():
        if table in oids:
            here = await _table_facts(conn, oids[table])
            problems += [f"{table}: {what}" for what in _unlike(seed, here)]
            refused, put_up_with = _beyond(seed, here)
            problems += [f"{table}: {what}" for what in refused]
            tolerated += [f"{table}: {what}" for what in put_up_with]
    return Comparison(tuple(problems), tuple(tolerated))


def _unlike(seed: _Facts, here: _Facts) -> list[str]:
    """Tell what a table lacks of the seed, and what is different there. Pure."""
    differences = []
    for title, fact in seed.items():
        if fact.kind == "comment on" or (fact.kind == "default of" and f"column {fact.name}" not in here):
            continue
        if title not in here:
            differences.append(f"{title} is missing, must be {fact.definition}")
        elif here[title].definition != fact.definition:
            differences.append(f"{title} is {here[title].definition}, must be {fact.definition}")
    return differences


def _beyond(seed: _Facts, here: _Facts) -> tuple[list[str], list[str]]:
    """Tell what a table has beyond the seed: what is refused, and what is tolerated. Pure."""
    refused = []
    tolerated = []
    for title, fact in here.items():
        if fact.kind == "comment on":
            if title not in seed or seed[title].definition != fact.definition:
                tolerated.append(f"{title} is not the seed's")
        elif title not in seed:
            sentence = f"{title} is not of the seed: {fact.definition}"
            if fact.required:
                refused.append(f"{sentence}, and has no default")
            elif fact.kind in _NEVER_BEYOND:
                refused.append(sentence)
            else:
                tolerated.append(sentence)
    return refused, tolerated


async def _describe_seed(conn: Connection) -> tuple[str, Mapping[str, _Facts]]:
    """Return the labels of the seed's enum, and what the catalog says of its tables, from the files that make them."""
    # Rolled back at once. The session's temporary schema, since any role may use it, `doctor`'s too.
    async with conn.transaction(force_rollback=True):
        for sql in _SEED.values():
            await conn.execute(re.sub(r"\b(auth|public)\.", "pg_temp.", sql))
        labels = await _enum_labels(conn, _in_temporary_schema(_TOKEN_TYPE))
        facts = {
            name: await _table_facts(conn, _in_temporary_schema(name))
            for name in (ONE_TIME_TOKENS, EMAIL_VERIFICATION_TOKENS)
        }
    return labels, facts


def _in_temporary_schema(name: str) -> str:
    return f"pg_temp.{name.partition('.')[2]}"


async def _create_missing(conn: Connection, objects: Mapping[str, _Object]) -> list[str]:
    """Create what is missing of the seed, and return the names."""
    created = []
    if "auth" not in objects:
        await conn.execute("create schema auth")
    for name, sql in _SEED.items():
        if name not in objects:
            async with _explained(f"{name} cannot be created"):
                await conn.execute(sql)
            created.append(name)
    return created


async def _apply_missing(conn: Connection, state: _State) -> list[str]:
    """Apply the migrations of our schema that are missing, and return their names."""
    if "onetime" not in state.objects:
        await conn.execute("create schema onetime")
    await conn.execute(_QUERIES["create_schema_migrations"])
    await conn.execute(_QUERIES["create_adoptions"])
    applied = []
    for migration in _MIGRATIONS:
        if migration.version not in state.versions:
            async with _explained(f"{migration.name} cannot be applied"):
                await conn.execute(migration.sql)
            await conn.execute(_QUERIES["record_migration"], {"version": migration.version, "name": migration.name})
            applied.append(migration.name)
    return applied


@asynccontextmanager
async def _explained(what: str) -> AsyncIterator[None]:
    """Turn the failure of a statement that creates something into a refusal: a name that is taken, most of all."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege:
        raise
    except psycopg.ProgrammingError as error:
        raise MigrationRefused(
            [f"{what}: {error.diag.message_primary}"],
            "Rename or drop what is in the way, or give onetime a database of its own; then run `onetime migrate` "
            "again.",
        ) from error


async def _find_objects(conn: Connection, names: list[str]) -> dict[str, _Object]:
    async with conn.cursor(row_factory=class_row(_Object)) as cursor:
        await cursor.execute(_QUERIES["find_objects"], {"names": names})
        return {found.name: found for found in await cursor.fetchall()}


async def _table_facts(conn: Connection, table: str) -> _Facts:
    async with conn.cursor(row_factory=class_row(_Fact)) as cursor:
        await cursor.execute(_QUERIES["table_facts"], {"table": table})
        return {fact.title: fact for fact in await cursor.fetchall()}


async def _enum_labels(conn: Connection, enum: str) -> str:
    return str((await _fetch_one(conn, "enum_labels", {"type": enum}))["labels"])


async def _fetch(conn: Connection, query: str, params: Mapping[str, object]) -> list[dict[str, Any]]:
    # The connection is the caller's, and so is its row factory.
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_QUERIES[query], params)
        return await cursor.fetchall()


async def _fetch_one(conn: Connection, query: str, params: Mapping[str, object]) -> dict[str, Any]:
    (row,) = await _fetch(conn, query, params)
    return row
