import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from conftest import PostgresServer

from service import migrations
from service.migrations import (
    ADVISORY_LOCK,
    MigrationRefused,
    MigrationReport,
    compare_with_seed,
    migrate,
    pending,
    users_table_is_ours,
)

Connection = psycopg.AsyncConnection[Any]

OWN_MIGRATIONS = ("0001_state", "0002_budgets", "0003_outbox", "0004_states_by_id")

EVERYTHING_CREATED = MigrationReport(
    created=(
        "auth.one_time_token_type",
        "auth.one_time_tokens",
        "public.users",
        "public.trigger_set_timestamp",
        "public.email_verification_tokens",
    ),
    applied=OWN_MIGRATIONS,
)

NOTHING_DONE = MigrationReport()

# What GoTrue's own migrations make, with rows of its own.
GOTRUE = """
create schema auth;
create table auth.users (id uuid primary key, email text);
create type auth.one_time_token_type as enum (
  'confirmation_token', 'reauthentication_token', 'recovery_token',
  'email_change_token_new', 'email_change_token_current', 'phone_change_token'
);
create table auth.one_time_tokens (
  id uuid primary key,
  user_id uuid not null references auth.users on delete cascade,
  token_type auth.one_time_token_type not null,
  token_hash text not null,
  relates_to text not null,
  created_at timestamp without time zone not null default now(),
  updated_at timestamp without time zone not null default now(),
  check (char_length(token_hash) > 0)
);
create index one_time_tokens_token_hash_hash_idx on auth.one_time_tokens using hash (token_hash);
create index one_time_tokens_relates_to_hash_idx on auth.one_time_tokens using hash (relates_to);
create unique index one_time_tokens_user_id_token_type_key on auth.one_time_tokens (user_id, token_type);
alter table auth.one_time_tokens enable row level security;
insert into auth.users values ('11111111-1111-4111-8111-111111111111', 'ada@example.com');
insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to) values (
  '22222222-2222-4222-8222-222222222222', '11111111-1111-4111-8111-111111111111',
  'recovery_token', 'pkce_0123456789', 'ada@example.com'
);
"""

# What a course platform has: its users, its trigger function, the second table with a row.
COURSE_PLATFORM = """
create table public.users (id uuid primary key default gen_random_uuid(), email varchar(255) not null);
create function public.trigger_set_timestamp() returns trigger language plpgsql as
  'begin new.updated_at = clock_timestamp(); return new; end';
create table public.email_verification_tokens (
  code varchar(6) not null,
  code_sent boolean not null default false,
  created_at timestamptz not null default now(),
  deleted_at timestamptz,
  email_verification_token varchar(255) not null,
  expires_at timestamptz not null default (now() + interval '15 minutes'),
  id uuid primary key default gen_random_uuid(),
  updated_at timestamptz not null default now(),
  used_at timestamptz,
  user_id uuid not null references public.users (id),
  constraint email_verification_token_length check (length(email_verification_token) >= 128)
);
create index idx_email_verification_tokens_expires_at on public.email_verification_tokens (expires_at);
create unique index unique_active_email_verification_token on public.email_verification_tokens
  (email_verification_token, deleted_at) nulls not distinct where used_at is null;
create trigger set_timestamp before update on public.email_verification_tokens
  for each row execute procedure public.trigger_set_timestamp();
insert into public.users values ('33333333-3333-4333-8333-333333333333', 'grace@example.com');
insert into public.email_verification_tokens (user_id, email_verification_token, code)
  values ('33333333-3333-4333-8333-333333333333', repeat('x', 128), '012345');
"""


@contextlib.asynccontextmanager
async def connect(url: str, *statements: str) -> AsyncIterator[Connection]:
    """Connect in autocommit mode, and run statements first."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        for statement in statements:
            await conn.execute(statement)
        yield conn


async def rows(conn: Connection, query: str) -> list[tuple[Any, ...]]:
    """Return all rows of a query."""
    return await (await conn.execute(query)).fetchall()


async def column(conn: Connection, query: str) -> list[Any]:
    """Return the only column of a query."""
    return [value for (value,) in await rows(conn, query)]


async def catalog(conn: Connection) -> set[tuple[str, ...]]:
    """Return every row of the catalogs that define something, with the transaction that wrote it."""
    tables = (
        *("pg_namespace", "pg_class", "pg_attribute", "pg_attrdef", "pg_type", "pg_enum", "pg_constraint", "pg_index"),
        *("pg_trigger", "pg_proc", "pg_rewrite", "pg_policy", "pg_description"),
    )
    return {
        (table, *map(str, row))
        for table in tables
        for row in await rows(conn, f"select ctid, xmin from pg_catalog.{table}")
    }


async def refusal(conn: Connection) -> MigrationRefused:
    """Run `migrate`, see it refused, and see that it changed nothing."""
    before = await catalog(conn)
    with pytest.raises(MigrationRefused) as caught:
        await migrate(conn)
    assert await catalog(conn) == before
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert "onetime" in str(caught.value)
    return caught.value


async def until_waiting(conn: Connection, count: int) -> list[int]:
    """Wait until so many other sessions of this database wait for a lock; return their process ids."""
    waiting = (
        "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' order by pid"
    )
    for _ in range(2000):
        pids = await column(conn, waiting)
        if len(pids) == count:
            return pids
        await asyncio.sleep(0.01)
    pytest.fail(f"{count} sessions should wait for a lock")


# The seed


COLUMNS = """
select attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
where attrelid = '{}'::regclass and attnum > 0 order by attname
"""

CONSTRAINTS = """
select conname, pg_get_constraintdef(oid) from pg_constraint
where conrelid = '{}'::regclass and contype <> 'n' order by conname
"""

TRIGGERS = "select pg_get_triggerdef(oid) from pg_trigger where tgrelid = '{}'::regclass and not tgisinternal"

INDEXES = "select indexdef from pg_indexes where schemaname || '.' || tablename = '{}' order by indexname"

KIND = """
select relkind, relpersistence, relrowsecurity, relforcerowsecurity, relispartition,
  (select count(*) from pg_policy where polrelid = pg_class.oid),
  (select count(*) from pg_rewrite where ev_class = pg_class.oid),
  (select count(*) from pg_inherits where pg_class.oid in (inhrelid, inhparent))
from pg_class where oid = '{}'::regclass
"""


async def test_a_new_database_has_the_first_table_of_the_seed_to_the_letter(postgres: PostgresServer) -> None:
    """auth.one_time_tokens is what its document says, and has nothing more."""
    table = "auth.one_time_tokens"
    with postgres.database() as url:
        async with connect(url) as conn:
            assert await migrate(conn) == EVERYTHING_CREATED
            assert await rows(conn, COLUMNS.format(table)) == [
                ("created_at", "timestamp without time zone", True, None),
                ("id", "uuid", True, None),
                ("relates_to", "text", True, None),
                ("token_hash", "text", True, None),
                ("token_type", "auth.one_time_token_type", True, None),
                ("updated_at", "timestamp without time zone", True, None),
                ("user_id", "uuid", True, None),
            ]
            assert await column(conn, "select unnest(enum_range(null::auth.one_time_token_type))::text") == [
                "confirmation_token",
                "reauthentication_token",
                "recovery_token",
                "email_change_token_new",
                "email_change_token_current",
                "phone_change_token",
            ]
            assert await rows(conn, CONSTRAINTS.format(table)) == [
                ("one_time_tokens_pkey", "PRIMARY KEY (id)"),
                ("one_time_tokens_token_hash_check", "CHECK ((char_length(token_hash) > 0))"),
            ]
            assert await column(conn, INDEXES.format(table)) == [
                "CREATE UNIQUE INDEX one_time_tokens_pkey ON auth.one_time_tokens USING btree (id)",
                "CREATE INDEX one_time_tokens_relates_to_hash_idx ON auth.one_time_tokens USING hash (relates_to)",
                "CREATE INDEX one_time_tokens_token_hash_hash_idx ON auth.one_time_tokens USING hash (token_hash)",
                (
                    "CREATE UNIQUE INDEX one_time_tokens_user_id_token_type_key ON auth.one_time_tokens "
                    "USING btree (user_id, token_type)"
                ),
            ]
            assert await column(conn, TRIGGERS.format(table)) == []
            assert await rows(conn, KIND.format(table)) == [("r", "p", False, False, False, 0, 0, 0)]


async def test_a_new_database_has_the_second_table_of_the_seed_to_the_letter(postgres: PostgresServer) -> None:
    """public.email_verification_tokens is what its document says, and has nothing more."""
    table = "public.email_verification_tokens"
    with postgres.database() as url:
        async with connect(url) as conn:
            await migrate(conn)
            assert await rows(conn, COLUMNS.format(table)) == [
                ("code", "character varying(6)", True, None),
                ("code_sent", "boolean", True, "false"),
                ("created_at", "timestamp with time zone", True, "now()"),
                ("deleted_at", "timestamp with time zone", False, None),
                ("email_verification_token", "character varying(255)", True, None),
                ("expires_at", "timestamp with time zone", True, "(now() + '00:15:00'::interval)"),
                ("id", "uuid", True, "gen_random_uuid()"),
                ("updated_at", "timestamp with time zone", True, "now()"),
                ("used_at", "timestamp with time zone", False, None),
                ("user_id", "uuid", True, None),
            ]
            assert await rows(conn, CONSTRAINTS.format(table)) == [
                ("email_verification_token_length", "CHECK ((length((email_verification_token)::text) >= 128))"),
                ("email_verification_tokens_pkey", "PRIMARY KEY (id)"),
                ("email_verification_tokens_user_id_fkey", "FOREIGN KEY (user_id) REFERENCES users(id)"),
            ]
            assert await column(conn, INDEXES.format(table)) == [
                (
                    "CREATE UNIQUE INDEX email_verification_tokens_pkey ON public.email_verification_tokens "
                    "USING btree (id)"
                ),
                (
                    "CREATE INDEX idx_email_verification_tokens_expires_at ON public.email_verification_tokens "
                    "USING btree (expires_at)"
                ),
                (
                    "CREATE UNIQUE INDEX unique_active_email_verification_token ON public.email_verification_tokens "
                    "USING btree (email_verification_token, deleted_at) NULLS NOT DISTINCT WHERE (used_at IS NULL)"
                ),
            ]
            assert await column(conn, TRIGGERS.format(table)) == [
                (
                    "CREATE TRIGGER set_timestamp BEFORE UPDATE ON public.email_verification_tokens "
                    "FOR EACH ROW EXECUTE FUNCTION trigger_set_timestamp()"
                )
            ]
            assert await rows(conn, KIND.format(table)) == [("r", "p", False, False, False, 0, 0, 0)]


async def test_not_null_constraints_have_the_names_of_the_document(database_url: str) -> None:
    """PostgreSQL 18 names them, and the second document was made on it."""
    async with connect(database_url) as conn:
        await migrate(conn)
        assert await column(
            conn,
            "select conname from pg_constraint where contype = 'n' and conrelid = "
            "'public.email_verification_tokens'::regclass order by conname",
        ) == [
            "email_verification_tokens_code_not_null",
            "email_verification_tokens_code_sent_not_null",
            "email_verification_tokens_created_at_not_null",
            "email_verification_tokens_email_verification_token_not_null",
            "email_verification_tokens_expires_at_not_null",
            "email_verification_tokens_id_not_null",
            "email_verification_tokens_updated_at_not_null",
            "email_verification_tokens_user_id_not_null",
        ]


async def test_the_trigger_keeps_updated_at(database_url: str) -> None:
    """The function that `migrate` makes where a host has none sets updated_at to the time of the update."""
    async with connect(
        database_url, "create schema auth; set timezone = 'Asia/Tokyo'; set search_path = auth, public"
    ) as conn:
        await migrate(conn)
        await conn.execute("insert into public.users values (gen_random_uuid())")
        await conn.execute(
            "insert into public.email_verification_tokens (user_id, email_verification_token, code, updated_at) "
            "select id, repeat('x', 128), '012345', '2001-01-01' from public.users"
        )
        await conn.execute("update public.email_verification_tokens set code_sent = true")
        assert await column(
            conn, "select now() - updated_at < interval '1 minute' from public.email_verification_tokens"
        ) == [True]


# Running it


async def test_the_second_run_changes_nothing(database_url: str) -> None:
    """A migrated database is left as it is, row for row."""
    async with connect(database_url) as conn:
        assert await pending(conn) == [
            "auth.one_time_token_type is missing",
            "auth.one_time_tokens is missing",
            "public.users is missing",
            "public.trigger_set_timestamp is missing",
            "public.email_verification_tokens is missing",
            "0001_state is not applied",
            "0002_budgets is not applied",
            "0003_outbox is not applied",
            "0004_states_by_id is not applied",
        ]
        await migrate(conn)
        assert await pending(conn) == []
        before = await catalog(conn)
        records = "select xmin, * from onetime.{}"
        applied = await rows(conn, records.format("schema_migrations"))
        adopted = await rows(conn, records.format("adoptions"))
        assert await migrate(conn) == NOTHING_DONE
        assert await catalog(conn) == before
        assert await rows(conn, records.format("schema_migrations")) == applied
        assert await rows(conn, records.format("adoptions")) == adopted


async def test_a_database_that_is_up_to_date_is_only_read(migrated_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`migrate` then neither waits for another one, nor needs a transaction that may write."""
    monkeypatch.setattr(migrations, "TURN_TIMEOUT_MS", 1)
    async with (
        connect(migrated_url, f"select pg_advisory_lock({ADVISORY_LOCK})"),
        connect(migrated_url, "set default_transaction_read_only = on") as conn,
    ):
        assert await migrate(conn) == NOTHING_DONE


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
async def test_of_four_at_once_one_does_the_work(database_url: str, isolation: str) -> None:
    """Four processes that all have seen an empty database succeed, whatever the isolation, and it is made once."""
    program = (
        "import asyncio, sys, psycopg\n"
        "from service.migrations import migrate\n"
        "async def main():\n"
        "    async with await psycopg.AsyncConnection.connect(sys.argv[1]) as conn:\n"
        "        print(len((await migrate(conn)).created))\n"
        "asyncio.run(main())\n"
    )
    async with connect(
        database_url,
        f"do $$ begin execute format('alter database %I set default_transaction_isolation = ''{isolation}''', "
        "current_database()); end $$",
        f"select pg_advisory_lock({ADVISORY_LOCK})",
    ) as conn:
        processes = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "error", "-c", program, database_url), stdout=asyncio.subprocess.PIPE
            )
            for _ in range(4)
        ]
        await until_waiting(conn, 4)
        await conn.execute("select pg_advisory_unlock_all()")
        outputs = [(await process.communicate())[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0, 0]
        assert sorted(outputs) == [b"0\n", b"0\n", b"0\n", b"5\n"]
        assert await column(conn, "select version from onetime.schema_migrations") == list(
            range(1, len(OWN_MIGRATIONS) + 1)
        )


async def test_a_migration_that_is_cut_off_leaves_nothing(database_url: str) -> None:
    """After the connection was killed in the middle the database is as before, and the next run succeeds."""
    async with connect(database_url, "create table public.users (id uuid primary key)") as conn:
        before = await catalog(conn)
        async with (
            connect(database_url, "begin", "lock table public.users in row exclusive mode"),
            connect(database_url) as victim,
        ):
            migration = asyncio.create_task(migrate(victim))
            # It has made the first table by now, and waits to reference the users.
            (pid,) = await until_waiting(conn, 1)
            await conn.execute("select pg_terminate_backend(%s)", [pid])
            with pytest.raises(psycopg.OperationalError):
                await migration
        assert await catalog(conn) == before
        report = await migrate(conn)
        assert report.applied == OWN_MIGRATIONS
        assert report.adopted == ("public.users",)
        assert await pending(conn) == []


async def test_waiting_for_another_migration_ends(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process does not finish, the error says so and how to find that process."""
    monkeypatch.setattr(migrations, "TURN_TIMEOUT_MS", 50)
    async with connect(database_url, f"select pg_advisory_lock({ADVISORY_LOCK})"), connect(database_url) as conn:
        refused = await refusal(conn)
        assert refused.problems == ("another process has been migrating this database for more than 0.05 s",)
        assert "pg_locks" in str(refused)


async def test_waiting_for_a_hosts_table_ends(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's long transaction on its users makes `migrate` give up, before everybody else has to wait behind it."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_MS", 50)
    async with (
        connect(
            database_url,
            "create table public.users (id uuid primary key)",
            "begin",
            "lock table public.users in row exclusive mode",
        ),
        connect(database_url) as conn,
    ):
        async with asyncio.timeout(migrations.TURN_TIMEOUT_MS / 2000):
            refused = await refusal(conn)
        assert refused.problems == ("a lock was not to be had within 0.05 s: another session uses the table",)
        assert "pg_stat_activity" in str(refused)


async def test_a_statement_that_takes_too_long_ends(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of every statement is bounded, whatever the role's own setting."""
    monkeypatch.setattr(migrations, "STATEMENT_TIMEOUT_MS", 50)
    async with (
        connect(database_url, f"select pg_advisory_lock({ADVISORY_LOCK})"),
        connect(database_url, "set statement_timeout = 0") as conn,
    ):
        assert (await refusal(conn)).problems == ("a statement was cancelled, or took more than 0.05 s",)


async def test_a_database_of_an_earlier_version_is_brought_up_to_date(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that an earlier onetime has migrated gets what came since, and keeps its rows."""
    first = len(OWN_MIGRATIONS) - 1
    async with connect(database_url) as conn:
        with monkeypatch.context() as earlier:
            earlier.setattr(migrations, "_MIGRATIONS", vars(migrations)["_MIGRATIONS"][:first])
            assert (await migrate(conn)).applied == OWN_MIGRATIONS[:first]
        await conn.execute(
            "insert into onetime.email_verification_states (token_hash, id, caller, delivery)"
            " select 'ev1.k.' || n, gen_random_uuid(), 'tests', 'return_code' from generate_series(1, 100) as n"
        )
        stored = "select token_hash, id, failed_attempts from onetime.email_verification_states order by id"
        before = await rows(conn, stored)
        assert await migrate(conn) == MigrationReport(applied=OWN_MIGRATIONS[first:])
        assert await rows(conn, stored) == before
        indexes = (
            "select split_part(indexdef, ' USING ', 2) from pg_indexes where tablename = 'email_verification_states'"
        )
        assert set(await column(conn, indexes)) == {"btree (id)", "hash (token_hash)"}


async def test_a_newer_database_is_refused(migrated_url: str) -> None:
    """A version that does not know what a newer one has made neither migrates nor serves."""
    newer = "insert into onetime.schema_migrations (version, name) values (9999, '9999_future')"
    problem = f"the schema onetime is at version 9999, and this program knows {len(OWN_MIGRATIONS)} at most"
    async with connect(migrated_url, newer) as conn:
        refused = await refusal(conn)
        assert refused.problems == (problem,)
        assert "run that one" in str(refused)
        assert await pending(conn) == [problem]


async def test_an_old_server_is_refused(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's version is looked at before anything else."""
    monkeypatch.setattr(migrations, "OLDEST_SERVER", 99)
    async with connect(database_url) as conn:
        assert (await refusal(conn)).problems == ("the server is PostgreSQL 18, and 99 is the oldest that serves",)


async def test_a_role_that_may_not_create_is_told_what_to_grant(database_url: str) -> None:
    """A missing privilege is a refusal with its cure, and once granted is enough."""
    async with connect(database_url, "create role onetime_tester") as conn:
        try:
            await conn.execute("set role onetime_tester")
            refused = await refusal(conn)
            assert len(refused.problems) == 1
            assert refused.problems[0].startswith("permission denied for database")
            assert "grant create" in str(refused)
            await conn.execute("reset role")
            await conn.execute(
                "do $$ begin execute format('grant create on database %I to onetime_tester', current_database()); "
                "end $$"
            )
            await conn.execute("set role onetime_tester")
            refused = await refusal(conn)
            assert refused.problems == ("permission denied for schema public",)
            assert "grant create on schema" in str(refused)
            await conn.execute("reset role")
            await conn.execute("grant create on schema public to onetime_tester")
            await conn.execute("set role onetime_tester")
            assert await migrate(conn) == EVERYTHING_CREATED
        finally:
            await conn.execute("reset role")
            await conn.execute("drop owned by onetime_tester")
            await conn.execute("drop role onetime_tester")


async def test_a_read_only_database_is_refused(database_url: str) -> None:
    """A standby is told from a database that has something wrong with it."""
    async with connect(database_url, "set default_transaction_read_only = on") as conn:
        refused = await refusal(conn)
        assert refused.problems == ("the database is read-only: a standby, or default_transaction_read_only is on",)


# Adoption


async def test_the_tables_of_two_hosts_are_adopted_as_they_are(postgres: PostgresServer) -> None:
    """GoTrue's table and the course platform's, with their rows, go on as they were; what they have more is listed."""
    with postgres.database() as url:
        # Settings that change how definitions read.
        settings = "set search_path = auth, public; set quote_all_identifiers = on"
        async with connect(url, GOTRUE, COURSE_PLATFORM, settings) as conn:
            before = await catalog(conn)
            tables = ("auth.users", "auth.one_time_tokens", "public.users", "public.email_verification_tokens")
            written = [await rows(conn, f"select ctid, xmin, * from {table}") for table in tables]
            assert await pending(conn) != []
            report = await migrate(conn)
            assert report == MigrationReport(
                adopted=("auth.one_time_tokens", "public.email_verification_tokens", "public.users"),
                applied=OWN_MIGRATIONS,
                tolerated=(
                    "auth.one_time_tokens: default of created_at is not of the seed: now()",
                    "auth.one_time_tokens: default of updated_at is not of the seed: now()",
                    (
                        "auth.one_time_tokens: foreign key one_time_tokens_user_id_fkey is not of the seed: "
                        "FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE"
                    ),
                    "auth.one_time_tokens: row level security is not of the seed: enabled",
                ),
            )
            # Nothing that was there was written to, and nothing was added to the host's schemas.
            assert await catalog(conn) >= before
            assert set(
                await column(
                    conn,
                    "select nspname from pg_class join pg_namespace on pg_namespace.oid = relnamespace "
                    "where pg_class.xmin = (select xmin from pg_class where oid = 'onetime.adoptions'::regclass)",
                )
            ) == {"onetime", "pg_toast"}
            assert [await rows(conn, f"select ctid, xmin, * from {table}") for table in tables] == written
            assert await pending(conn) == []
            assert not await users_table_is_ours(conn)
            assert await rows(conn, "select table_name, created from onetime.adoptions order by 1") == [
                ("auth.one_time_tokens", False),
                ("public.email_verification_tokens", False),
                ("public.users", False),
            ]
            assert await migrate(conn) == NOTHING_DONE


async def test_one_table_is_adopted_and_the_other_created(database_url: str) -> None:
    """Each table is taken over or made for itself, and that is recorded."""
    async with connect(database_url, GOTRUE) as conn:
        report = await migrate(conn)
        assert report.adopted == ("auth.one_time_tokens",)
        assert report.created == (
            "public.users",
            "public.trigger_set_timestamp",
            "public.email_verification_tokens",
        )
        assert await rows(conn, "select table_name, created from onetime.adoptions order by 1") == [
            ("auth.one_time_tokens", False),
            ("public.email_verification_tokens", True),
            ("public.users", True),
        ]


async def test_what_a_host_may_add_is_tolerated_and_listed(database_url: str) -> None:
    """Columns, indexes, foreign keys, defaults, policies and comments beyond the seed are the host's own affair."""
    async with connect(
        database_url,
        COURSE_PLATFORM,
        "alter table public.email_verification_tokens"
        "  add note text,"
        "  add kind text not null default 'login',"
        "  add number bigint generated always as identity,"
        "  add parent uuid references public.email_verification_tokens,"
        "  alter used_at set default null,"
        "  alter code set default '000000',"
        "  enable row level security, force row level security;"
        "create index by_user on public.email_verification_tokens (user_id);"
        "create policy all_rows on public.email_verification_tokens using (true);"
        "comment on column public.email_verification_tokens.id is 'ours';"
        "comment on table public.email_verification_tokens is 'ours';",
    ) as conn:
        table = "public.email_verification_tokens"
        assert (await migrate(conn)).tolerated == (
            f"{table}: column kind is not of the seed: text not null",
            f"{table}: column note is not of the seed: text",
            f"{table}: column number is not of the seed: bigint identity not null",
            f"{table}: column parent is not of the seed: uuid",
            f"{table}: comment on id is not the seed's",
            f"{table}: comment on the table is not the seed's",
            f"{table}: default of code is not of the seed: '000000'::character varying",
            f"{table}: default of kind is not of the seed: 'login'::text",
            (
                f"{table}: foreign key email_verification_tokens_parent_fkey is not of the seed: "
                "FOREIGN KEY (parent) REFERENCES email_verification_tokens(id)"
            ),
            (
                f"{table}: index by_user is not of the seed: "
                "CREATE INDEX by_user ON email_verification_tokens USING btree (user_id)"
            ),
            f"{table}: policy all_rows is not of the seed: for row level security",
            f"{table}: row level security is not of the seed: forced",
        )
        assert (await compare_with_seed(conn)).problems == ()


async def test_a_hosts_function_is_used(database_url: str) -> None:
    """Where the table is missing and trigger_set_timestamp() is there, the new table's trigger calls the host's."""
    async with connect(
        database_url,
        "create function public.trigger_set_timestamp() returns trigger language plpgsql as "
        "'begin new.updated_at = timestamptz ''2001-01-01 00:00Z''; return new; end'",
    ) as conn:
        function = "select xmin, prosrc from pg_proc where oid = 'public.trigger_set_timestamp()'::regprocedure"
        before = await rows(conn, function)
        assert "public.trigger_set_timestamp" not in (await migrate(conn)).created
        assert await rows(conn, function) == before
        await conn.execute("insert into public.users values (gen_random_uuid())")
        await conn.execute(
            "insert into public.email_verification_tokens (user_id, email_verification_token, code) "
            "select id, repeat('x', 128), '012345' from public.users"
        )
        await conn.execute("update public.email_verification_tokens set code_sent = true")
        assert await column(conn, "select updated_at = '2001-01-01 00:00Z' from public.email_verification_tokens") == [
            True
        ]


async def test_a_type_without_its_table_is_used(database_url: str) -> None:
    """The enum of the seed is enough to build the table on."""
    async with connect(database_url, GOTRUE, "drop table auth.one_time_tokens") as conn:
        assert "auth.one_time_token_type" not in (await migrate(conn)).created


async def test_our_users_table_is_ours_until_somebody_extends_it(migrated_url: str) -> None:
    """With a column that `migrate` did not make it is a host's table, and we add no users to it."""
    async with connect(migrated_url) as conn:
        assert await users_table_is_ours(conn)
        await conn.execute("alter table public.users add email text")
        assert not await users_table_is_ours(conn)


async def test_a_table_that_was_dropped_is_made_again(migrated_url: str) -> None:
    """That all migrations are recorded does not hide a missing table, or one that gave way to something else."""
    async with connect(migrated_url, "drop table auth.one_time_tokens") as conn:
        assert await pending(conn) == ["auth.one_time_tokens is missing"]
        await conn.execute("update onetime.adoptions set adopted_at = '2001-01-01'")
        assert (await migrate(conn)).created == ("auth.one_time_tokens",)
        assert await rows(
            conn, "select table_name, created, adopted_at > '2001-01-02' from onetime.adoptions order by 1"
        ) == [
            ("auth.one_time_tokens", True, True),
            ("public.email_verification_tokens", True, False),
            ("public.users", True, False),
        ]
        await conn.execute("drop table auth.one_time_tokens")
        await conn.execute("create view auth.one_time_tokens as select 1 as id")
        assert await pending(conn) == ["auth.one_time_tokens is of another kind: view, must be table"]
        assert (await refusal(conn)).problems == ("auth.one_time_tokens is of another kind: view, must be table",)


# Refusal

FIRST = "auth.one_time_tokens"
SECOND = "public.email_verification_tokens"
LABELS = (
    "confirmation_token, reauthentication_token, recovery_token, email_change_token_new, email_change_token_current, "
    "phone_change_token"
)
UNIQUE_ACTIVE = (
    "CREATE UNIQUE INDEX unique_active_email_verification_token ON email_verification_tokens "
    "USING btree (email_verification_token, deleted_at) NULLS NOT DISTINCT WHERE (used_at IS NULL)"
)
SET_TIMESTAMP = (
    "CREATE TRIGGER set_timestamp BEFORE UPDATE ON email_verification_tokens "
    "FOR EACH ROW EXECUTE FUNCTION trigger_set_timestamp()"
)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        pytest.param(
            f"alter table {FIRST} drop relates_to",
            [
                f"{FIRST}: column relates_to is missing, must be text not null",
                (
                    f"{FIRST}: index one_time_tokens_relates_to_hash_idx is missing, must be "
                    "CREATE INDEX one_time_tokens_relates_to_hash_idx ON one_time_tokens USING hash (relates_to)"
                ),
            ],
            id="column missing",
        ),
        pytest.param(
            f"alter table {SECOND} drop code_sent",
            [f"{SECOND}: column code_sent is missing, must be boolean not null"],
            id="column with a default missing",
        ),
        pytest.param(
            f"alter table {SECOND} alter code type varchar(10)",
            [f"{SECOND}: column code is character varying(10) not null, must be character varying(6) not null"],
            id="type",
        ),
        pytest.param(
            f"alter table {FIRST} alter created_at type timestamptz",
            [
                (
                    f"{FIRST}: column created_at is timestamp with time zone not null, must be "
                    "timestamp without time zone not null"
                )
            ],
            id="type with a zone",
        ),
        pytest.param(
            f'alter table {FIRST} alter relates_to type text collate "C"',
            [
                f'{FIRST}: column relates_to is text collate "C" not null, must be text not null',
            ],
            id="collation",
        ),
        pytest.param(
            f"drop trigger set_timestamp on {SECOND}; alter table {SECOND} drop updated_at, "
            "add updated_at timestamptz not null generated always as ('2001-01-01'::timestamptz) stored;"
            f"create trigger set_timestamp before update on {SECOND} "
            "for each row execute function trigger_set_timestamp()",
            [
                (
                    f"{SECOND}: column updated_at is timestamp with time zone generated not null, must be "
                    "timestamp with time zone not null"
                ),
                f"{SECOND}: default of updated_at is missing, must be now()",
            ],
            id="generated",
        ),
        pytest.param(
            f"alter table {FIRST} alter relates_to drop not null",
            [f"{FIRST}: column relates_to is text, must be text not null"],
            id="null where the seed has none",
        ),
        pytest.param(
            f"delete from {SECOND}; alter table {SECOND} alter used_at set not null",
            [
                f"{SECOND}: column used_at is timestamp with time zone not null, must be timestamp with time zone",
            ],
            id="no null where the seed has some",
        ),
        pytest.param(
            f"alter table {SECOND} alter code_sent drop default",
            [f"{SECOND}: default of code_sent is missing, must be false"],
            id="default missing",
        ),
        pytest.param(
            f"alter table {SECOND} alter expires_at set default now() + interval '10 minutes'",
            [
                (
                    f"{SECOND}: default of expires_at is (now() + '00:10:00'::interval), must be "
                    "(now() + '00:15:00'::interval)"
                )
            ],
            id="default changed",
        ),
        pytest.param(
            f"alter table {FIRST} drop constraint one_time_tokens_token_hash_check",
            [
                (
                    f"{FIRST}: check one_time_tokens_token_hash_check is missing, must be "
                    "CHECK ((char_length(token_hash) > 0))"
                )
            ],
            id="check missing",
        ),
        pytest.param(
            f"alter table {SECOND} drop constraint email_verification_token_length, "
            "add constraint email_verification_token_length check (length(email_verification_token) >= 64)",
            [
                (
                    f"{SECOND}: check email_verification_token_length is "
                    "CHECK ((length((email_verification_token)::text) >= 64)), must be "
                    "CHECK ((length((email_verification_token)::text) >= 128))"
                )
            ],
            id="check changed",
        ),
        pytest.param(
            f"alter table {FIRST} add constraint extra check (token_hash <> 'otl1')",
            [f"{FIRST}: check extra is not of the seed: CHECK ((token_hash <> 'otl1'::text))"],
            id="check beyond",
        ),
        pytest.param(
            f"alter table {FIRST} drop constraint one_time_tokens_pkey",
            [
                (
                    f"{FIRST}: index one_time_tokens_pkey is missing, must be "
                    "CREATE UNIQUE INDEX one_time_tokens_pkey ON one_time_tokens USING btree (id)"
                ),
                f"{FIRST}: primary key one_time_tokens_pkey is missing, must be PRIMARY KEY (id)",
            ],
            id="primary key missing",
        ),
        pytest.param(
            "drop index auth.one_time_tokens_token_hash_hash_idx; "
            f"create index one_time_tokens_token_hash_hash_idx on {FIRST} (token_hash)",
            [
                (
                    f"{FIRST}: index one_time_tokens_token_hash_hash_idx is "
                    "CREATE INDEX one_time_tokens_token_hash_hash_idx ON one_time_tokens USING btree (token_hash), "
                    "must be "
                    "CREATE INDEX one_time_tokens_token_hash_hash_idx ON one_time_tokens USING hash (token_hash)"
                )
            ],
            id="index changed",
        ),
        pytest.param(
            "drop index unique_active_email_verification_token; "
            "create unique index unique_active_email_verification_token on public.email_verification_tokens "
            "(email_verification_token, deleted_at) where used_at is null",
            [
                (
                    f"{SECOND}: index unique_active_email_verification_token is "
                    f"{UNIQUE_ACTIVE.replace('NULLS NOT DISTINCT ', '')}, must be {UNIQUE_ACTIVE}"
                )
            ],
            id="nulls distinct",
        ),
        pytest.param(
            "alter index unique_active_email_verification_token rename to another",
            [f"{SECOND}: index unique_active_email_verification_token is missing, must be {UNIQUE_ACTIVE}"],
            id="index renamed",
        ),
        pytest.param(
            "update pg_index set indisvalid = false "
            "where indexrelid = 'unique_active_email_verification_token'::regclass",
            [
                (
                    f"{SECOND}: index unique_active_email_verification_token is {UNIQUE_ACTIVE} (invalid), "
                    f"must be {UNIQUE_ACTIVE}"
                )
            ],
            id="index invalid",
        ),
        pytest.param(
            "drop index auth.one_time_tokens_user_id_token_type_key; "
            f"alter table {FIRST} add unique (user_id, token_type) deferrable",
            [
                (
                    f"{FIRST}: index one_time_tokens_user_id_token_type_key is "
                    "CREATE UNIQUE INDEX one_time_tokens_user_id_token_type_key ON one_time_tokens "
                    "USING btree (user_id, token_type) (deferrable), must be "
                    "CREATE UNIQUE INDEX one_time_tokens_user_id_token_type_key ON one_time_tokens "
                    "USING btree (user_id, token_type)"
                )
            ],
            id="unique at the end of the transaction only",
        ),
        pytest.param(
            f"alter table {SECOND} drop constraint email_verification_tokens_user_id_fkey",
            [
                (
                    f"{SECOND}: foreign key email_verification_tokens_user_id_fkey is missing, must be "
                    "FOREIGN KEY (user_id) REFERENCES users(id)"
                )
            ],
            id="foreign key missing",
        ),
        pytest.param(
            f"delete from {SECOND}; alter table {SECOND} drop constraint email_verification_tokens_user_id_fkey, "
            "add foreign key (user_id) references auth.users",
            [
                (
                    f"{SECOND}: foreign key email_verification_tokens_user_id_fkey is "
                    "FOREIGN KEY (user_id) REFERENCES auth.users(id), "
                    "must be FOREIGN KEY (user_id) REFERENCES users(id)"
                )
            ],
            id="foreign key to other users",
        ),
        pytest.param(
            f"alter table {SECOND} disable trigger all",
            [
                (
                    f"{SECOND}: foreign key email_verification_tokens_user_id_fkey is "
                    "FOREIGN KEY (user_id) REFERENCES users(id) (disabled), must be "
                    "FOREIGN KEY (user_id) REFERENCES users(id)"
                ),
                f"{SECOND}: trigger set_timestamp is {SET_TIMESTAMP} (disabled), must be {SET_TIMESTAMP}",
            ],
            id="triggers disabled",
        ),
        pytest.param(
            f"drop trigger set_timestamp on {SECOND}",
            [f"{SECOND}: trigger set_timestamp is missing, must be {SET_TIMESTAMP}"],
            id="trigger missing",
        ),
        pytest.param(
            f"drop trigger set_timestamp on {SECOND}; create trigger set_timestamp before update on {SECOND} "
            "for each row execute function suppress_redundant_updates_trigger()",
            [
                (
                    f"{SECOND}: trigger set_timestamp is "
                    f"{SET_TIMESTAMP.replace('trigger_set_timestamp', 'suppress_redundant_updates_trigger')}, "
                    f"must be {SET_TIMESTAMP}"
                )
            ],
            id="trigger changed",
        ),
        pytest.param(
            f"create trigger extra before update on {FIRST} "
            "for each row execute function suppress_redundant_updates_trigger()",
            [
                (
                    f"{FIRST}: trigger extra is not of the seed: CREATE TRIGGER extra BEFORE UPDATE ON one_time_tokens "
                    "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
                )
            ],
            id="trigger beyond",
        ),
        pytest.param(
            f"create rule extra as on delete to {FIRST} do instead nothing",
            [
                (
                    f"{FIRST}: rule extra is not of the seed: CREATE RULE extra AS\n"
                    "    ON DELETE TO one_time_tokens DO INSTEAD NOTHING;"
                )
            ],
            id="rule beyond",
        ),
        pytest.param(
            f"delete from {FIRST}; alter table {FIRST} add tenant uuid not null",
            [f"{FIRST}: column tenant is not of the seed: uuid not null, and has no default"],
            id="required column beyond",
        ),
        pytest.param(
            f"delete from {FIRST}; create domain tenant as uuid not null; alter table {FIRST} add tenant tenant",
            [f"{FIRST}: column tenant is not of the seed: public.tenant, and has no default"],
            id="column of a required domain beyond",
        ),
        pytest.param(
            "alter type auth.one_time_token_type add value 'webauthn_token' before 'recovery_token'",
            [
                (
                    "auth.one_time_token_type has the labels "
                    f"({LABELS.replace('recovery', 'webauthn_token, recovery')}), must have ({LABELS}) in this order"
                )
            ],
            id="label of the enum beyond",
        ),
        pytest.param(
            "alter type auth.one_time_token_type rename value 'recovery_token' to 'x'; "
            "alter type auth.one_time_token_type rename value 'phone_change_token' to 'recovery_token'; "
            "alter type auth.one_time_token_type rename value 'x' to 'phone_change_token'",
            [
                (
                    "auth.one_time_token_type has the labels (confirmation_token, reauthentication_token, "
                    "phone_change_token, email_change_token_new, email_change_token_current, recovery_token), "
                    f"must have ({LABELS}) in this order"
                )
            ],
            id="order of the enum",
        ),
        pytest.param(
            "alter type auth.one_time_token_type set schema public",
            [
                (
                    f"{FIRST}: column token_type is public.one_time_token_type not null, "
                    "must be one_time_token_type not null"
                )
            ],
            id="enum elsewhere",
        ),
        pytest.param(
            "drop table auth.one_time_tokens; alter type auth.one_time_token_type add value 'webauthn_token'",
            [f"auth.one_time_token_type has the labels ({LABELS}, webauthn_token), must have ({LABELS}) in this order"],
            id="enum without its table",
        ),
        pytest.param(
            "drop table auth.one_time_tokens; drop type auth.one_time_token_type; "
            "create domain auth.one_time_token_type as text",
            ["auth.one_time_token_type is of another kind: domain, must be enum"],
            id="domain for the enum",
        ),
        pytest.param(
            f"alter table {FIRST} set unlogged",
            [f"{FIRST} is of another kind: unlogged table, must be table"],
            id="table that a crash empties",
        ),
        pytest.param(
            f"alter table {SECOND} rename to moved; create view {SECOND} as select * from moved",
            [f"{SECOND} is of another kind: view, must be table"],
            id="view",
        ),
        pytest.param(
            f"create table other () inherits ({SECOND})",
            [f"{SECOND} is of another kind: table with inheritance, must be table"],
            id="rows in another table",
        ),
        pytest.param(
            f"drop table {SECOND}; create table {SECOND} (id uuid primary key) partition by hash (id)",
            [f"{SECOND} is of another kind: partitioned table, must be table"],
            id="partitions",
        ),
        pytest.param(
            f"drop table {SECOND}; drop table users; create view users as select gen_random_uuid() as id",
            ["public.users is of another kind: view, must be table"],
            id="view of users",
        ),
        pytest.param(
            f"drop table {SECOND}; drop table users; create table users (id text primary key)",
            ["public.users has no column id of type uuid that is its primary key or unique by itself"],
            id="users with an id of another type",
        ),
        pytest.param(
            f"drop table {SECOND}; drop table users; create table users (id uuid, tenant int, unique (id, tenant));"
            "create unique index on users (id) where tenant = 1; create index on users (id)",
            ["public.users has no column id of type uuid that is its primary key or unique by itself"],
            id="users that are not unique",
        ),
        pytest.param(
            f"drop table {SECOND}; drop function trigger_set_timestamp; "
            "create function trigger_set_timestamp() returns int return 1",
            ["public.trigger_set_timestamp is of another kind: function for other uses, must be trigger function"],
            id="function of another type",
        ),
        pytest.param(
            f"drop table {SECOND}; create table archive (id int); "
            "create index idx_email_verification_tokens_expires_at on archive (id)",
            [f'{SECOND} cannot be created: relation "idx_email_verification_tokens_expires_at" already exists'],
            id="name of an index taken",
        ),
        pytest.param(
            "create schema onetime; create table onetime.receipts (id int)",
            ['0001_state cannot be applied: relation "receipts" already exists'],
            id="somebody else's schema onetime",
        ),
    ],
)
async def test_a_table_unlike_the_seed_is_refused(database_url: str, change: str, problems: list[str]) -> None:
    """Each difference is told with what would be right, and a refused database is left as it is."""
    async with connect(database_url, GOTRUE, COURSE_PLATFORM) as conn:
        for statement in change.split(";"):
            await conn.execute(statement)
        assert list((await refusal(conn)).problems) == problems


async def test_all_differences_of_both_tables_are_told_at_once(database_url: str) -> None:
    """The operator learns the whole of it in one run: in the error, and from `compare_with_seed` without any."""
    async with connect(
        database_url,
        GOTRUE,
        COURSE_PLATFORM,
        "drop index auth.one_time_tokens_relates_to_hash_idx",
        "alter table auth.one_time_tokens add constraint extra check (relates_to <> '')",
        "alter table public.email_verification_tokens alter code_sent drop default",
        "drop trigger set_timestamp on public.email_verification_tokens",
    ) as conn:
        refused = await refusal(conn)
        assert refused.problems == (
            (
                f"{FIRST}: index one_time_tokens_relates_to_hash_idx is missing, must be "
                "CREATE INDEX one_time_tokens_relates_to_hash_idx ON one_time_tokens USING hash (relates_to)"
            ),
            f"{FIRST}: check extra is not of the seed: CHECK ((relates_to <> ''::text))",
            f"{SECOND}: default of code_sent is missing, must be false",
            f"{SECOND}: trigger set_timestamp is missing, must be {SET_TIMESTAMP}",
        )
        assert str(refused).startswith("The database is not ready for onetime, and was not changed:\n  - auth.")
        assert str(refused).endswith("then run `onetime migrate` again.")
        before = await catalog(conn)
        assert (await compare_with_seed(conn)).problems == refused.problems
        assert await catalog(conn) == before


async def test_a_migrated_database_that_was_altered_since_is_found_out(migrated_url: str) -> None:
    """`pending` asks little and sees nothing; `compare_with_seed` sees it, for a role that may only read."""
    async with connect(migrated_url, "drop index auth.one_time_tokens_user_id_token_type_key") as conn:
        assert await pending(conn) == []
        await conn.execute("create role onetime_reader")
        try:
            await conn.execute("set role onetime_reader")
            assert await pending(conn) == ["permission denied for schema onetime"]
            await conn.execute("reset role")
            await conn.execute("grant usage on schema onetime to onetime_reader")
            await conn.execute("grant select on all tables in schema onetime to onetime_reader")
            await conn.execute("set role onetime_reader")
            assert (await compare_with_seed(conn)).problems == (
                (
                    f"{FIRST}: index one_time_tokens_user_id_token_type_key is missing, must be "
                    "CREATE UNIQUE INDEX one_time_tokens_user_id_token_type_key ON one_time_tokens "
                    "USING btree (user_id, token_type)"
                ),
            )
        finally:
            await conn.execute("reset role")
            await conn.execute("drop owned by onetime_reader")
            await conn.execute("drop role onetime_reader")
