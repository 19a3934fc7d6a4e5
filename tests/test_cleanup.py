import asyncio
import json
import re
import sys
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import pytest
from calls import Client, Database, connected, expire, new_id, refused, seconds
from conftest import OnetimeServer, PostgresServer, Serve, clean_environment
from onetime.v1 import one_time_tokens_pb2 as ott
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer

from service.cleanup import PAUSE_S, Cleanup, sweep, sweep_all
from service.config import Settings
from service.db import Database as Pool
from service.db import load_queries

TABLES: Final[tuple[LiteralString, ...]] = (
    "auth.one_time_tokens",
    "public.email_verification_tokens",
    "onetime.one_time_token_states",
    "onetime.email_verification_states",
    "onetime.outbox",
    "onetime.receipts",
    "onetime.budgets",
)
SWEEPS: Final = {
    "auth.one_time_tokens": "sweep_one_time_tokens",
    "public.email_verification_tokens": "sweep_email_verification_tokens",
    "onetime.one_time_token_states": "sweep_one_time_token_states",
    "onetime.email_verification_states": "sweep_email_verification_states",
    "onetime.outbox": "sweep_outbox",
    "onetime.receipts": "sweep_receipts",
    "onetime.budgets": "sweep_budgets",
}
ANALYSE: Final[LiteralString] = f"vacuum (analyze) public.users, {', '.join(TABLES)}"
TIMEOUT_S: Final = 60.0
MANY: Final = 200_000


# Rows


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection to a migrated database."""
    with connected(migrated_url) as connection:
        yield connection


@pytest.fixture
def settings(migrated_url: str) -> Settings:
    """Settings for a clean-up in this process."""
    return Settings(database_url=migrated_url)


@pytest.fixture(scope="module")
def defaults() -> Settings:
    """Settings that are all their defaults."""
    return Settings()


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    """The connection of a clean-up in this process."""
    pool = Pool(settings.database_url, pool_size=1)
    await pool.open()
    yield pool
    await pool.close()


def fill(database: Database, count: int, *, expired: str = "true", first: int = 1) -> None:
    """Write so many rows into each table, those for which an expression over `n` holds as if they had expired.

    Each `n`, from the first on, is one token, budget, verification, mail and receipt, with address and digests made
    from it. Of the mails of verifications that are not over, one in a hundred is still to be sent.
    """
    # Without the checks of foreign keys, and with ids in the order of an index: either would take most of the time.
    database.execute("set session_replication_role = replica")
    last = first + count - 1
    age = f"case when {expired} then interval '2 days' else interval '0' end"
    database.execute(f"""
        with request as (
          select uuidv7() as id, uuidv7() as user_id, n, clock_timestamp() - {age} as made
          from generate_series({first}, {last}) as n
        ), token as (
          insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)
          select id, user_id, 'recovery_token', 'otl1.k0.' || md5(n::text), n || '@example.org',
            made at time zone 'utc', made at time zone 'utc'
          from request
        ), token_state as (
          insert into onetime.one_time_token_states (user_id, token_type, token_id, ttl, caller, created_at)
          select user_id, 'recovery_token', id, interval '15 min', 'tests', made from request
        ), budget as (
          insert into onetime.budgets (user_id, purpose, sends)
          select user_id, 'recovery_token', array[made] from request
        ), receipt as (
          insert into onetime.receipts (caller, rpc, request_id, fingerprint, row_id, created_at)
          select 'tests', 'IssueToken', user_id, 'k0.x', id, made from request
        )
        select
    """)
    users = 1 + count // 10
    user_id = f"md5('user ' || n % {users})::uuid"
    database.execute(f"""
        insert into public.users (id) select {user_id} from generate_series(1, {users}) as n on conflict do nothing
    """)
    database.execute(f"""
        with request as (
          select n, uuidv7() as id, {user_id} as user_id, 'ev1.k0.' || repeat(md5(n::text), 4) as token_hash,
            clock_timestamp() - {age} as made
          from generate_series({first}, {last}) as n
        ), token as (
          insert into public.email_verification_tokens
            (id, user_id, email_verification_token, code, created_at, updated_at, expires_at)
          select id, user_id, token_hash, '123456', made, made, made + interval '15 min' from request
        ), mail as (
          insert into onetime.outbox (verification_id, message_id, sealed_address, locale, state, queued_at, due_at)
          select id, uuidv7(), case when not ({expired}) then 'k0.x'::bytea end, '',
            case when not ({expired}) and n % 100 = 1 then 'queued' else 'sent' end, made,
            case when not ({expired}) then case when n % 100 = 1 then made else made + interval '15 min' end end
          from request
        )
        insert into onetime.email_verification_states (token_hash, id, caller, delivery, created_at)
        select token_hash, id, 'tests', 'send_email', made from request
    """)
    database.execute("reset session_replication_role")


def counts(database: Database) -> dict[str, int]:
    """Return how many rows each table has."""
    return {table: database.execute(f"select count(*) from {table}").fetchall()[0]["count"] for table in TABLES}


def rows_in_blocks(database: Database, table: LiteralString, blocks: int) -> int:
    """Return how many rows the first blocks of a table have."""
    query = f"select count(*) from {table} where ctid < '({blocks},0)'"
    (row,) = database.execute(query).fetchall()
    return int(row["count"])


async def sweep_everything(settings: Settings) -> Mapping[str, int]:
    """Clean up on demand."""
    return await sweep_all(settings, lambda *_: None)


# What goes, and what stays


async def test_expired_rows_never_match_and_are_removed_in_passing(serve: Serve, migrated_url: str) -> None:
    """An expired token is refused as such, and as unknown once a write of anybody's has cleaned it away."""
    async with serve(migrated_url, cleanup_probability=0, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        issued = [await client.issue(), await client.issue(digits=6)]
        started = await client.start()
        with connected(migrated_url) as database:
            for made in issued:
                expire(database, made)
            expire(database, started)
        for made in issued:
            assert (await refused(client.consume(made))).reason == "TOKEN_EXPIRED"
            assert await client.list(made.token.user_id) == []
        assert (await refused(client.verify(started))).reason == "TOKEN_EXPIRED"
        # With a chance of 0 no write starts a clean-up.
        await _settled(server)
        assert runs(server, "done") + runs(server, "failed") == 0

    async with serve(migrated_url, cleanup_probability=1, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        keep, keep_started = await client.issue(request_id=new_id()), await client.start()
        with connected(migrated_url) as database:
            async with asyncio.timeout(TIMEOUT_S):
                # Nothing but writes.
                while counts(database)["onetime.one_time_token_states"] > 1 or (
                    counts(database)["onetime.email_verification_states"] > 1
                ):
                    await client.revoke(new_id())
            # What was issued is gone, and what bounds its issuing is not.
            assert counts(database) == dict.fromkeys(TABLES, 1) | {"onetime.budgets": 5, "onetime.outbox": 0}
        for made in issued:
            assert (await refused(client.consume(made))).reason == "TOKEN_NOT_FOUND"
        assert (await refused(client.verify(started))).reason == "TOKEN_NOT_FOUND"
        await client.consume(keep)
        await client.verify(keep_started)


async def test_others_rows_are_never_touched(database: Database, settings: Settings) -> None:
    """Rows of another system stay, however old: those without our format, and those that only look like ours."""
    hashes = ["pkce_" + "0" * 40, "otl1", "otl1.", "otl1.K0.x", "xotl1.k0.x", "otx1.k0.x", "otl1.k0", "", "ev1.k0.x"]
    for token_hash in filter(None, hashes):
        database.execute(
            "insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)"
            " values (gen_random_uuid(), gen_random_uuid(), 'recovery_token', %s, 'a', '2000-01-01', '2000-01-01')",
            [token_hash],
        )
    database.execute("insert into public.users (id) values (gen_random_uuid())")
    for token in ("x" * 128, "ev1." + "x" * 128, "ev1.K0." + "x" * 128, "ev2.k0." + "x" * 128, "otl1.k0." + "x" * 128):
        for used, deleted in ((None, None), ("2000-01-01", None), (None, "2000-01-01")):
            database.execute(
                "insert into public.email_verification_tokens"
                " (id, user_id, email_verification_token, code, expires_at, used_at, deleted_at)"
                " select gen_random_uuid(), id, %s, '123456', '2000-01-01', %s, %s from public.users",
                [token, used, deleted],
            )
    before = counts(database)
    assert before == dict.fromkeys(TABLES, 0) | {TABLES[0]: 8, TABLES[1]: 15}
    assert set((await sweep_everything(settings)).values()) == {0}
    assert counts(database) == before
    # The control: the same rows, with our format.
    database.execute("update auth.one_time_tokens set token_hash = 'otl1.k0.x'")
    database.execute("update public.email_verification_tokens set email_verification_token = concat('ev1.k0.', id, repeat('0', 128))")  # fmt: skip # noqa: E501
    await sweep_everything(settings)
    assert counts(database) == dict.fromkeys(TABLES, 0)


async def test_used_and_cancelled_rows_are_kept_for_their_retention(database: Database) -> None:
    """A used or cancelled verification stays until its retention is over, whenever it would have expired."""
    settings = Settings(database_url=_url(database), retention="1h")
    fill(database, 6)
    for number, (column, minutes) in enumerate(
        [("used_at", 59), ("used_at", 61), ("deleted_at", 59), ("deleted_at", 61)], start=1
    ):
        database.execute(
            f"update public.email_verification_tokens set {column} = now() - make_interval(mins => {minutes})"
            f" where email_verification_token = 'ev1.k0.' || repeat(md5('{number}'), 4)"
        )
    # Cancelled first, and used: its use counts.
    database.execute(
        "update public.email_verification_tokens set deleted_at = now() - interval '61 min', used_at = now()"
        " where email_verification_token = 'ev1.k0.' || repeat(md5('5'), 4)"
    )
    removed = await sweep_everything(settings)
    assert removed["public.email_verification_tokens"] == 3
    left = database.execute(
        "select t.email_verification_token as token from public.email_verification_tokens as t"
        " join onetime.email_verification_states as s on s.id = t.id"
    ).fetchall()
    digest = "select 'ev1.k0.' || repeat(md5(n::text), 4) as token from unnest(array[1, 3, 5]) as n"
    assert {row["token"] for row in left} == {row["token"] for row in database.execute(digest)}
    assert counts(database)["onetime.email_verification_states"] == counts(database)["onetime.outbox"] == 3


def _url(database: Database) -> str:
    info = database.info
    return f"postgresql://{info.user}@/{info.dbname}?host={info.host}&port={info.port}"


async def test_receipts_go_after_their_retention(database: Database) -> None:
    """A receipt stays until its retention is over."""
    settings = Settings(database_url=_url(database), receipt_retention="30m")
    fill(database, 3)
    for minutes in (29, 31):
        database.execute(
            "update onetime.receipts set created_at = clock_timestamp() - make_interval(mins => %s)"
            " where request_id = (select max(request_id::text)::uuid from onetime.receipts"
            " where created_at < clock_timestamp() - interval '1 day')",
            [minutes],
        )
    assert (await sweep_everything(settings))["onetime.receipts"] == 2
    (row,) = database.execute("select clock_timestamp() - created_at as age from onetime.receipts").fetchall()
    assert 29 <= row["age"].total_seconds() / 60 < 30


async def test_orphans_go(database: Database, settings: Settings) -> None:
    """States and mails of tokens that the host has deleted go after a while, and none goes before its token."""
    fill(database, 10, expired="n <= 5")
    database.execute("delete from auth.one_time_tokens")
    database.execute("delete from public.email_verification_tokens")
    removed = await sweep_everything(settings)
    # The young ones may be states of rows that the sweep does not see yet.
    beside = ("onetime.one_time_token_states", "onetime.email_verification_states", "onetime.outbox")
    assert {table: removed[table] for table in beside} == dict.fromkeys(beside, 5)
    fill(database, 10, expired="false", first=11)
    database.execute("update onetime.one_time_token_states set created_at = created_at - interval '2 days'")
    database.execute("update onetime.email_verification_states set created_at = created_at - interval '2 days'")
    database.execute("update onetime.outbox set queued_at = queued_at - interval '2 days'")
    await sweep_everything(settings)
    # The orphans that were too young by then have aged too.
    left = counts(database)
    assert {left[table] for table in TABLES if table not in ("onetime.receipts", "onetime.budgets")} == {10}


async def test_a_token_without_a_state_lives_as_long_as_any(database: Database) -> None:
    """Without its state nobody knows a token's lifetime: it goes when the longest that any may have is over."""
    settings = Settings(database_url=_url(database), confirmation_max_ttl="3d")
    fill(database, 2)
    database.execute("update auth.one_time_tokens set created_at = created_at - interval '2 days' where relates_to = '1@example.org'")  # fmt: skip # noqa: E501
    database.execute("delete from onetime.one_time_token_states")
    assert (await sweep_everything(settings))["auth.one_time_tokens"] == 1
    (row,) = database.execute("select relates_to from auth.one_time_tokens").fetchall()
    assert row["relates_to"] == "2@example.org"


async def test_a_token_that_is_being_replaced_stays(database: Database, settings: Settings, pool: Pool) -> None:
    """A token that takes the place of an expired one is not swept with it, not even where its state is missing yet."""
    fill(database, 1)
    replace = (
        "update auth.one_time_tokens set id = gen_random_uuid(), created_at = clock_timestamp() at time zone 'utc'"
    )
    with connected(settings.database_url) as other:
        with other.transaction():
            other.execute(replace)
            assert await sweep_twice(settings, pool, "auth.one_time_tokens", 64) == 0
        assert await sweep(settings, pool, "auth.one_time_tokens", 64) == 0
    assert counts(database)["auth.one_time_tokens"] == 1


async def test_a_replaced_token_is_judged_by_its_own_times(database: Database, settings: Settings) -> None:
    """A token that was replaced after a sweep had seen it, and before it was locked, is held to its own lifetime."""
    fill(database, 1)
    database.execute("update onetime.one_time_token_states set ttl = interval '1 ms'")
    (old,) = database.execute("select user_id from auth.one_time_tokens").fetchall()
    # The sweep sees the rows as they are when it starts, and looks at the clock a moment later.
    query = load_queries("cleanup")["sweep_one_time_tokens"]
    slow = query.replace("clock_timestamp()", "(select clock_timestamp() from pg_sleep(1))")
    assert slow != query
    with connected(settings.database_url) as sweeper:
        sweeping = asyncio.create_task(asyncio.to_thread(sweeper.execute, slow, sweep_params(settings, 64)))
        async with asyncio.timeout(TIMEOUT_S):
            asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and pid = %s"
            pid = sweeper.info.backend_pid
            while not database.execute(asleep, [pid]).fetchall()[0]["count"]:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.01)
        new = {"user_ids": [old["user_id"]], "token_types": ["recovery_token"], "relates_to": ["a"], "ttls": [900.0]}
        names = {"ids": [uuid.uuid4()], "token_hashes": ["otl1.k0.new"], "callers": ["tests"]}
        database.execute(load_queries("one_time_tokens")["issue_tokens"], new | names)
        assert (await sweeping).fetchall() == [{"removed": 0}]
    assert counts(database) == dict.fromkeys(TABLES, 1)


# Bounds


async def sweep_twice(settings: Settings, pool: Pool, table: str, blocks: int) -> int:
    """Sweep a table. The first sweep of all only makes the table's cursor."""
    first = await sweep(settings, pool, table, blocks)
    return first + await sweep(settings, pool, table, blocks)


@pytest.mark.parametrize("table", ["auth.one_time_tokens", "public.email_verification_tokens", "onetime.receipts"])
async def test_a_sweep_removes_a_bounded_batch(
    database: Database, settings: Settings, pool: Pool, table: LiteralString
) -> None:
    """One sweep removes no more than a few blocks have; the next one goes on where it ended, and around."""
    fill(database, 2000)
    expected, total = rows_in_blocks(database, table, 4), counts(database)[table]
    assert 0 < expected < total / 2
    removed = [await sweep_twice(settings, pool, table, 4)]
    assert removed == [expected]
    while sum(removed) < total:
        removed.append(await sweep(settings, pool, table, 4))
        assert removed[-1] > 0
    assert counts(database)[table] == 0
    # Around: what is written into the first blocks is found again.
    database.execute(f"vacuum {table}")
    fill(database, 1, first=total + 1)
    assert await sweep(settings, pool, table, 4) == 1


@pytest.mark.parametrize("table", TABLES)
async def test_locked_rows_are_passed_over(
    database: Database, settings: Settings, pool: Pool, table: LiteralString
) -> None:
    """A row that somebody has locked holds up neither a sweep nor the rest; it goes when it is free."""
    fill(database, 20)
    if table.endswith("_states") or table == "onetime.outbox":
        # Orphans, but for the sweep of their tokens below.
        database.execute("delete from auth.one_time_tokens where relates_to <> '1@example.org'")
    with connected(settings.database_url) as holder, holder.transaction():
        assert holder.execute(f"select from {table} limit 1 for update").rowcount == 1
        # A sweep that waited would give up after 100 ms, and raise.
        for swept in TABLES:
            await sweep_twice(settings, pool, swept, 64)
        await sweep_everything(settings)
        assert counts(database)[table] == 1
    await sweep_everything(settings)
    assert counts(database) == dict.fromkeys(TABLES, 0)


async def test_one_replica_sweeps_a_table_at_a_time(database: Database, settings: Settings, pool: Pool) -> None:
    """A table that another replica is sweeping is left to it, without waiting."""
    fill(database, 10)
    table = "auth.one_time_tokens"
    database.execute("insert into onetime.sweep_cursors (table_name) values (%s)", [table])
    with connected(settings.database_url) as other:
        for statement in (
            "select from onetime.sweep_cursors for update",
            "update onetime.sweep_cursors set next_block = 0",
        ):
            with other.transaction():
                other.execute(statement)
                assert await sweep(settings, pool, table, 64) == 0
                assert counts(database)[table] == 10
    assert await sweep(settings, pool, table, 64) == 10


# Costs


@pytest.fixture(scope="module")
def large(postgres_18: PostgresServer, template_url: str) -> Iterator[Database]:
    """Tables with many rows, every second of which has expired."""
    with postgres_18.database(template_url) as url, connected(url) as database:
        fill(database, MANY, expired="n % 2 = 0")
        database.execute(ANALYSE)
        yield database


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give all nodes of a plan."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def read_whole(plan: Mapping[str, Any]) -> set[str]:
    """Return the tables that a plan reads from end to end, but for the one with a row for each table."""
    return {node["Relation Name"] for node in nodes(plan) if node["Node Type"] == "Seq Scan"} - {"sweep_cursors"}


def sweep_params(settings: Settings, blocks: int) -> dict[str, object]:
    """Return the parameters for a sweep of a table's first blocks."""
    return {
        "first": "(0,0)",
        "end": f"({blocks},0)",
        "longest_ttl": settings.longest_ttl().total_seconds(),
        "retention": settings.retention.total_seconds(),
        "receipt_retention": settings.receipt_retention.total_seconds(),
        "grace": 3600.0,
        "longest_send": 86400.0,
        "longest_failure": 86400.0,
        "longest_run": 86400.0 * 366,
    }


def analysed(database: Database, query: str, params: Mapping[str, object], *, sweep: bool = False) -> Mapping[str, Any]:
    """Run a statement as the service does, undo it, and return its plan with what it has really done."""
    with database.transaction(force_rollback=True):
        limits = {"statement_timeout": "60000", "lock_timeout": "0", "idle_timeout": "0"}
        database.execute(load_queries("db")["configure_session"], limits)
        if sweep:
            database.execute(load_queries("cleanup")["join_by_hash"])
        ((row,),) = [database.execute(f"explain (analyze, buffers, format json)\n{query}", params).fetchall()]
    plan: Mapping[str, Any] = row["QUERY PLAN"][0]["Plan"]
    return plan


def compared(plan: Mapping[str, Any]) -> int:
    """Return how many rows, and pairs of rows, a statement has looked at."""
    return int(
        sum(
            (node["Actual Rows"] + node.get("Rows Removed by Join Filter", 0) + node.get("Rows Removed by Filter", 0))
            * node["Actual Loops"]
            for node in nodes(plan)
        )
    )


def blocks_read(plan: Mapping[str, Any]) -> int:
    """Return how many blocks a statement has looked at."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("table", TABLES)
def test_a_sweep_costs_the_same_in_a_large_table(
    large: Database, database: Database, defaults: Settings, table: LiteralString
) -> None:
    """What a sweep reads does not depend on a table's size, nor on that of the tables beside it; no rows are paired."""
    fill(database, MANY // 20, expired="n % 2 = 0")
    database.execute(ANALYSE)
    query, params = load_queries("cleanup")[SWEEPS[table]], sweep_params(defaults, 64)
    plans = [analysed(each, query, params, sweep=True) for each in (database, large)]
    small_cost, large_cost = map(blocks_read, plans)
    # Twenty times the rows, and one level more of an index.
    assert large_cost <= 2.5 * small_cost
    assert read_whole(plans[1]) == set()
    # The range itself, and a few blocks of an index and a table for each of its rows.
    rows = rows_in_blocks(large, table, 64)
    assert large_cost <= 64 + 12 * rows
    assert compared(plans[1]) <= 20 * rows


def hot_params(database: Database, stem: str, settings: Settings) -> list[dict[str, object]]:
    """Return parameters for the statements of a module: for a row that is there, one that is used, one that is not."""
    if stem == "cleanup":
        return [sweep_params(settings, 64) | {"table_name": "auth.one_time_tokens", "next_block": 0}]
    if stem == "budgets":
        (found,) = database.execute("select user_id from onetime.budgets limit 1").fetchall()
        return [
            {"user_ids": [user_id], "purposes": ["recovery_token"], "keep": 50, "charged_ats": [None]}
            for user_id in (found["user_id"], uuid.uuid4())
        ]
    if stem == "receipts":
        (found,) = database.execute("select * from onetime.receipts where created_at > now() - interval '1 h' limit 1").fetchall()  # fmt: skip # noqa: E501
        return [
            {
                "callers": ["tests"],
                "rpcs": ["IssueToken"],
                "request_ids": [request_id],
                "fingerprints": ["k0.x"],
                "row_ids": [uuid.uuid4()],
                "answers": [b"x"],
            }
            for request_id in (found["request_id"], uuid.uuid4())
        ]
    if stem == "outbox":
        (found,) = database.execute("select * from onetime.outbox where state = 'queued' limit 1").fetchall()
        return [
            {
                "verification_ids": [verification_id],
                "message_ids": [found["message_id"]],
                "sealed_addresses": [b"k0.x"],
                "locales": [""],
                "tries": [0],
                "failures": ["deferred"],
                "waits": [wait],
                "count": 500,
                "lease": 40.0,
                "max_attempts": settings.max_attempts,
            }
            for verification_id, wait in ((found["verification_id"], 1.0), (uuid.uuid4(), None))
        ]
    if stem == "one_time_tokens":
        table, digest, unknown = "auth.one_time_tokens", "token_hash", "otl1.k0.unknown"
    else:
        table, digest, unknown = "public.email_verification_tokens", "email_verification_token", "ev1.k0.unknown"
    (found,) = database.execute(f"select * from {table} limit 1").fetchall()
    made = [
        {
            "ords": [1],
            "ids": [row_id],
            "user_ids": [user_id],
            "token_types": ["recovery_token"],
            "token_hashes": [token_hash],
            "relates_to": [None],
            "ttls": [900.0],
            "callers": ["tests"],
            "deliveries": ["return_code"],
            "sealed_codes": ["123456"],
            "request_ids": [request_id],
        }
        for row_id, user_id, token_hash, request_id in (
            (found["id"], found["user_id"], found[digest], None),
            (uuid.uuid4(), uuid.uuid4(), unknown, uuid.uuid4()),
        )
    ]
    by_address = [made[0] | {"user_ids": [None], "relates_to": [address]} for address in ("7@example.org", "nobody")]
    by_token = [made[0] | {"ids": [None], "token_hashes": [each]} for each in (found[digest], unknown)]
    return [*made, *(by_address if stem == "one_time_tokens" else by_token)]


HOT: Final = [
    (stem, name)
    for stem in ("one_time_tokens", "email_verification", "outbox", "budgets", "receipts", "cleanup")
    for name in load_queries(stem)
]


@pytest.mark.parametrize(("stem", "name"), HOT, ids=[f"{stem}.{name}" for stem, name in HOT])
def test_no_statement_reads_a_large_table_whole(large: Database, defaults: Settings, stem: str, name: str) -> None:
    """Each statement of a call finds its rows by an index, whether they are there or not, and with any plan."""
    query = load_queries(stem)[name]
    for params in hot_params(large, stem, defaults):
        ((row,),) = [large.execute(f"explain (format json)\n{query}", params).fetchall()]
        assert read_whole(row["QUERY PLAN"][0]["Plan"]) == set()
    # psycopg prepares what it runs often, and then the server may plan without looking at the parameters.
    converted = PostgresQuery(Transformer(large))
    converted.convert(query, dict.fromkeys(re.findall(r"%\((\w+)\)s", query)))
    generic = large.execute(f"explain (generic_plan, format json)\n{converted.query.decode()}".encode())
    assert read_whole(generic.fetchall()[0]["QUERY PLAN"][0]["Plan"]) == set()


def test_a_used_token_is_found_by_its_state(large: Database) -> None:
    """The table's index has unused rows only: a used one is found too, by reading a handful of blocks."""
    with large.transaction(force_rollback=True):
        (used,) = large.execute(
            "update public.email_verification_tokens set used_at = now() where id ="
            " (select id from public.email_verification_tokens limit 1) returning email_verification_token as token"
        ).fetchall()
        for token, rows in ((used["token"], 1), ("ev1.k0.unknown", 0)):
            plan = analysed(
                large,
                load_queries("email_verification")["find_verifications"],
                {"ords": [1], "ids": [None], "token_hashes": [token], "callers": [None]},
            )
            assert plan["Actual Rows"] == rows
            assert blocks_read(plan) < 40


# In passing


def metric(server: OnetimeServer, name: str) -> float:
    """Return the value of a time series of a server."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:  # noqa: S310 - our own, over HTTP
        text = page.read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def runs(server: OnetimeServer, outcome: str) -> float:
    """Return how many clean-ups of a server have ended so."""
    return metric(server, f'onetime_cleanup_runs_total{{outcome="{outcome}"}}')


def sweeping() -> set[asyncio.Task[object]]:
    """Return the sweeps that are under way in this process."""
    return {task for task in asyncio.all_tasks() if "Cleanup._run" in repr(task.get_coro())}


async def test_about_one_write_in_ten_starts_a_clean_up(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default chance, a thousand writes start about a hundred runs; while one is under way, none does."""
    monkeypatch.setattr("service.cleanup.PAUSE_S", 0)
    cleanup = Cleanup(settings)
    await cleanup.open()
    started = 0
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(1000):
            cleanup.maybe(1)
            if under_way := sweeping():
                started += 1
                cleanup.maybe(1000)
                assert len(under_way) == 1
                assert sweeping() == under_way
                await asyncio.gather(*under_way)
    await cleanup.close()
    # 100 give or take four sigmas.
    assert 62 <= started <= 138


async def test_clean_ups_are_started_by_writes_and_pause(serve: Serve, migrated_url: str) -> None:
    """Writes start runs, a second apart at the least, however many writes there are; reads start none."""
    async with serve(migrated_url, cleanup_probability=None, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        for _ in range(100):
            await client.list(new_id())
        assert runs(server, "done") == 0
        begin = time.monotonic()
        async with asyncio.timeout(TIMEOUT_S):
            while runs(server, "done") < 3:
                await asyncio.gather(*(client.revoke(new_id()) for _ in range(20)))
        assert runs(server, "done") - 1 <= (time.monotonic() - begin) / PAUSE_S
        assert runs(server, "failed") == 0


async def _settled(server: OnetimeServer) -> None:
    """Wait for the run under way."""
    async with asyncio.timeout(TIMEOUT_S):
        last = -1.0
        while (now := runs(server, "done") + runs(server, "failed")) != last:
            last = now
            await asyncio.sleep(0.2)


async def test_a_failing_clean_up_fails_no_call(serve: Serve, migrated_url: str) -> None:
    """Calls go on where every clean-up fails; that it does is logged and counted."""
    async with serve(migrated_url, cleanup_probability=1, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        with connected(migrated_url) as database:
            database.execute("alter table onetime.sweep_cursors rename to elsewhere")
            for _ in range(20):
                await client.consume(await client.issue(digits=6))
                await client.verify(await client.start())
            await _settled(server)
            assert runs(server, "failed") > 0
            assert runs(server, "done") == 0
            database.execute("alter table onetime.elsewhere rename to sweep_cursors")
            # Nor where it cannot get at its table.
            with database.transaction():
                database.execute("lock table onetime.sweep_cursors in access exclusive mode")
                for _ in range(5):
                    await client.consume(await client.issue(digits=6))
            async with asyncio.timeout(TIMEOUT_S):
                # Not at once: from one run to the next there is a pause.
                while not runs(server, "done"):
                    await client.issue()
        lines = [json.loads(line) for line in server.log.read_text("utf-8").splitlines()]
    assert {line["event"] for line in lines if line["level"] in ("ERROR", "WARNING")} == {"clean-up failed"}


async def test_steady_load_keeps_the_tables_bounded(serve: Serve, migrated_url: str) -> None:
    """Under a load that never ends, with nobody but the load itself to clean up, the tables do not grow."""
    span = 15.0
    made = 0
    samples: list[tuple[float, dict[str, int]]] = []
    async with serve(migrated_url, cleanup_probability=None, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        begin = time.monotonic()

        async def load() -> None:
            nonlocal made
            while time.monotonic() - begin < span:
                await asyncio.gather(client.issue(ttl=seconds(1)), client.start(ttl=seconds(1)))
                made += 1
                await asyncio.sleep(0.03)

        async def watch() -> None:
            with connected(migrated_url) as database:
                while time.monotonic() - begin < span:
                    await asyncio.sleep(0.5)
                    samples.append((time.monotonic() - begin, await asyncio.to_thread(counts, database)))

        async with asyncio.timeout(2 * TIMEOUT_S):
            await asyncio.gather(*(load() for _ in range(6)), watch())
        assert made > 100
        # Of what was made in all, a fifteenth is live at any moment.
        late = [rows for moment, rows in samples if moment > span / 2]
        for table in TABLES[:4]:
            assert max(rows[table] for rows in late) < made / 3


# On demand


@dataclass(frozen=True, slots=True)
class Command:
    """How `onetime cleanup` ended."""

    exit_code: int | None
    output: str
    errors: str

    @property
    def removed(self) -> dict[str, int]:
        """What it says that it removed, by table."""
        found = re.findall(r"^(\S+) +(\d+) rows? removed$", self.output, re.MULTILINE)
        assert len(found) == len(self.output.splitlines())
        return {table: int(rows) for table, rows in found}


async def clean_up(url: str, **settings: object) -> Command:
    """Run `onetime cleanup`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "service", "cleanup"),
        env=clean_environment(database_url=url, **settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, errors = await process.communicate()
    return Command(process.returncode, output.decode(), errors.decode())


async def test_clean_up_on_demand(database: Database, migrated_url: str) -> None:
    """`onetime cleanup` removes all that has expired, says how much of what, and finds nothing the second time."""
    fill(database, 1000, expired="n > 10")
    first = await clean_up(migrated_url)
    assert (first.exit_code, first.removed) == (
        0,
        dict.fromkeys(TABLES, 0)
        | dict.fromkeys(
            ("auth.one_time_tokens", "public.email_verification_tokens", "onetime.receipts", "onetime.budgets"), 990
        ),
    )
    assert counts(database) == dict.fromkeys(TABLES, 10)
    second = await clean_up(migrated_url)
    assert (second.exit_code, second.removed) == (0, dict.fromkeys(TABLES, 0))


async def test_two_clean_ups_at_once(database: Database, migrated_url: str) -> None:
    """Two clean-ups at the same time remove everything between them, and nothing twice."""
    fill(database, 15_000, expired="n > 10")
    results = await asyncio.gather(*(clean_up(migrated_url) for _ in range(2)))
    assert [result.exit_code for result in results] == [0, 0], results
    total = {table: sum(result.removed[table] for result in results) for table in TABLES}
    assert total["auth.one_time_tokens"] == total["public.email_verification_tokens"] == 14_990
    assert total["onetime.receipts"] == total["onetime.budgets"] == 14_990
    assert counts(database) == dict.fromkeys(TABLES, 10)


async def test_clean_up_on_demand_meets_calls(serve: Serve, migrated_url: str) -> None:
    """A clean-up of many rows beside calls: none of the calls fails, and what is live stays."""
    async with serve(migrated_url, drain_delay="0s") as server, server.channel() as channel:
        client = Client(channel)
        with connected(migrated_url) as database:
            fill(database, 20_000)
            cleaning = asyncio.create_task(clean_up(migrated_url))
            kept = []
            while not cleaning.done():
                kept.append(await client.issue(token_type=ott.TOKEN_TYPE_CONFIRMATION))
                await client.verify(await client.start())
            assert (await cleaning).exit_code == 0
            assert kept
            for issued in kept:
                await client.consume(issued)
            assert counts(database)["auth.one_time_tokens"] == 0
