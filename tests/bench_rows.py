"""Rows and SQL for the benchmarks: tables that are filled without calls, and pgbench's scripts.

Calls that spend something need something to spend, and making it by calls would take as long again. So rows are written
as the service writes them: what calls are to present under the server's keys, all else under a key that nobody has. In
scripts and rows for pgbench everything follows from a number, so that a script finds its rows without asking.

It knows the tables and the statements of the service, and nothing of servers and of time.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from service.crypto import EMAIL_CODE_LENGTH, Keyring, new_code, new_email_token, new_link_secret
from service.db import load_queries

TABLES: Final = (
    "auth.one_time_tokens",
    "onetime.one_time_token_states",
    "public.email_verification_tokens",
    "onetime.email_verification_states",
    "onetime.budgets",
    "onetime.receipts",
    "onetime.outbox",
    "public.users",
)
BATCH: Final = 500_000
"""Rows in a statement of `fill`: the memory of its sort is bounded, and there is progress to tell."""

LIFETIME: Final = timedelta(days=7)
"""Of rows that are there to be in the way: they must outlive the benchmark, since a clean-up would remove them."""

BYTES_PER_ROW: Final = 2_500
"""What a token and a verification take together, with their users, states, budgets and indexes, and some to spare."""

Connection = psycopg.Connection[tuple[object, ...]]


def wipe(connection: Connection) -> None:
    """Empty all tables."""
    connection.execute(f"truncate {', '.join(TABLES)}; update onetime.sweep_cursors set next_block = 0".encode())


def tidy(connection: Connection) -> None:
    """Bring statistics and visibility up to date."""
    connection.execute(f"vacuum (analyze) {', '.join(TABLES)}".encode())


# Rows that calls present


def add_links(connection: Connection, ring: Keyring, count: int) -> list[str]:
    """Add links as IssueToken leaves them, and return their secrets."""
    now = datetime.now(UTC)
    naive = now.replace(tzinfo=None)
    secrets = [new_link_secret() for _ in range(count)]
    ids = [(uuid.uuid4(), uuid.uuid4()) for _ in range(count)]
    label = "recovery_token"
    _copy(
        connection,
        "auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)",
        [
            (row_id, user_id, label, ring.link_hash(label, secret), f"{user_id}@example.com", naive, naive)
            for (row_id, user_id), secret in zip(ids, secrets, strict=True)
        ],
    )
    _copy(
        connection,
        "onetime.one_time_token_states (user_id, token_type, token_id, ttl, caller)",
        [(user_id, label, row_id, timedelta(minutes=15), "anonymous") for row_id, user_id in ids],
    )
    _copy(
        connection,
        "onetime.budgets (user_id, purpose, sends)",
        [(user_id, label, [now]) for _, user_id in ids],
    )
    return secrets


def add_verifications(connection: Connection, ring: Keyring, count: int) -> list[str]:
    """Add verifications as StartEmailVerification leaves them, and return `token code` of each."""
    now = datetime.now(UTC)
    made = [(uuid.uuid4(), uuid.uuid4(), new_email_token(), new_code(EMAIL_CODE_LENGTH)) for _ in range(count)]
    hashes = [ring.email_token_hash(token) for _, _, token, _ in made]
    _copy(connection, "public.users (id)", [(user_id,) for _, user_id, _, _ in made])
    _copy(
        connection,
        "public.email_verification_tokens"
        " (id, user_id, email_verification_token, code, created_at, updated_at, expires_at)",
        [
            (
                row_id,
                user_id,
                token_hash,
                ring.seal_code(code, row_id=row_id, user_id=user_id, token_hash=token_hash),
                now,
                now,
                now + timedelta(minutes=15),
            )
            for (row_id, user_id, _, code), token_hash in zip(made, hashes, strict=True)
        ],
    )
    _copy(
        connection,
        "onetime.email_verification_states (token_hash, id, caller, delivery)",
        [(token_hash, each[0], "anonymous", "return_code") for each, token_hash in zip(made, hashes, strict=True)],
    )
    _copy(
        connection,
        "onetime.budgets (user_id, purpose, sends)",
        [(user_id, "email_verification", [now]) for _, user_id, _, _ in made],
    )
    return [f"{token} {code}" for _, _, token, code in made]


def _copy(connection: Connection, table: str, rows: Sequence[Sequence[object]]) -> None:
    with connection.cursor() as cursor, cursor.copy(f"copy {table} from stdin".encode()) as copy:
        for row in rows:
            copy.write_row(row)


# Rows that follow from a number

_UUID: Final = "md5('u' || {n}::text)::uuid"
_LINK_HASH: Final = "'otl1.k00000000.' || left(repeat(md5('u' || {n}::text), 2), 43)"
# A token a millisecond, from somewhere in 2023 on: it begins with its time.
_EMAIL_HASH: Final = (
    "'ev1.{key}.' || lpad(to_hex(1700000000000 + {n}), 12, '0') || left(repeat(md5('u' || {n}::text), 4), 116)"
)
NOBODYS_KEY: Final = "k00000000"

_FILL: Final = """
create temporary table filler as
  select g as n, {uuid} as id from generate_series({first}, {last}) as g
  order by id; -- so that each page of an index is written once a batch, wherever in it the rows belong
insert into public.users select id from filler;
insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)
  select id, id, 'recovery_token', {link_hash}, id || '@example.com', now() at time zone 'utc', now() at time zone 'utc'
  from filler;
insert into onetime.one_time_token_states (user_id, token_type, token_id, ttl, caller)
  select id, 'recovery_token', id, interval '{hours} hours', 'anonymous' from filler;
insert into public.email_verification_tokens (id, user_id, email_verification_token, code, expires_at)
  select id, id, {email_hash}, '123456', now() + interval '{hours} hours' from filler;
insert into onetime.email_verification_states (token_hash, id, caller, delivery)
  select {email_hash}, id, 'anonymous', 'return_code' from filler;
insert into onetime.budgets (user_id, purpose, sends)
  select id, purpose, array[now()]
  from filler, unnest(array['email_verification', 'recovery_token']) as p (purpose);
drop table filler;
"""


def fill(
    connection: Connection,
    first: int,
    count: int,
    *,
    key: str = NOBODYS_KEY,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Add so many links and so many verifications, each of a user of its own, by SQL alone.

    Args:
        connection: One of a superuser, in autocommit mode.
        first: The number that the first follows from.
        count: How many.
        key: What their digests name as their key: with the server's, they lie where its own do.
        progress: Called with the rows that were added, after each batch.
    """
    # No look-up of each user for the foreign key: they are there.
    connection.execute("set session_replication_role = replica")
    for begin in range(first, first + count, BATCH):
        end = min(begin + BATCH, first + count) - 1
        connection.execute(
            _FILL.format(
                uuid=_UUID.format(n="g"),
                link_hash=_LINK_HASH.format(n="n"),
                email_hash=_EMAIL_HASH.format(n="n", key=key),
                hours=LIFETIME // timedelta(hours=1),
                first=begin,
                last=end,
            ).encode()
        )
        progress(end - begin + 1)
    connection.execute("reset session_replication_role")


# pgbench


@dataclass(frozen=True, slots=True)
class Script:
    """What a call does, as pgbench is to do it: its statements, trip by trip."""

    trips: Sequence[Sequence[str]]
    """Statements as `module.name`."""
    values: Mapping[str, str]
    """SQL for the parameters that are not as `_VALUES` has them."""
    transaction: bool = True
    spends: bool = False


_VALUES: Final = {
    "ords": "0",
    "ids": _UUID,
    "user_ids": _UUID,
    "row_ids": _UUID,
    "token_types": "'recovery_token'",
    "purposes": "'recovery_token'",
    "relates_to": "{n}::text || '@example.com'",
    "ttls": "900",
    "callers": "'anonymous'",
    "deliveries": "'return_code'",
    "sealed_codes": "'123456'",
    "request_ids": "md5('r' || :r::text)::uuid",
    "fingerprints": "'k00000000.' || left(repeat(md5(:r::text), 2), 43)",
    "answers": "null",
    "token_hashes": _LINK_HASH,
}
_KEEP: Final = {"keep": "20"}
_EMAIL: Final = {"token_hashes": _EMAIL_HASH.replace("{key}", NOBODYS_KEY), "purposes": "'email_verification'"}
_LOOK: Final = {**_EMAIL, "ids": "null", "callers": "null"}

SCRIPTS: Final = {
    "IssueToken": Script(
        trips=(
            ("receipts.claim_receipts", "budgets.lock_budgets", "budgets.read_budgets"),
            ("one_time_tokens.issue_tokens", "budgets.spend_sends", "receipts.settle_receipts"),
        ),
        values={"rpcs": "'IssueToken'"},
    ),
    "ConsumeToken": Script(
        trips=(("receipts.claim_receipts", "one_time_tokens.consume_links"), ("receipts.settle_receipts",)),
        # A sealed answer is as long.
        values={"rpcs": "'ConsumeToken'", "answers": "convert_to(repeat('x', 240), 'utf8')"},
        spends=True,
    ),
    "CheckToken": Script(trips=(("one_time_tokens.find_links",),), values={}, transaction=False),
    "StartEmailVerification": Script(
        trips=(
            ("email_verification.find_users", "budgets.lock_budgets", "budgets.read_budgets"),
            ("budgets.spend_sends", "email_verification.add_users", "email_verification.start_verifications"),
        ),
        values=_EMAIL,
    ),
    "VerifyCode": Script(
        trips=(
            ("receipts.claim_receipts", "email_verification.lock_verifications"),
            ("email_verification.use_verifications", "receipts.settle_receipts"),
        ),
        values={**_EMAIL, "rpcs": "'VerifyCode'"},
        spends=True,
    ),
    "GetEmailVerification": Script(
        trips=(("email_verification.find_verifications",),), values=_LOOK, transaction=False
    ),
}
"""What the servicers do for a call on its own, by rpc. What there is to be found has the numbers from 0 on."""


def pgbench_script(rpc: str, rows: int) -> str:
    """Return the script that does what a call does.

    Args:
        rpc: Which call.
        rows: How many rows there are for it, from number 0 on. One that spends them fails when they have been used up.
    """
    script = SCRIPTS[rpc]
    lines = ["\\set r random(1, 9000000000000000000)"]
    if script.spends:
        # Each client takes every so-manieth row, so that no two ever want the same.
        lines += [
            "\\set i :i + 1",
            "\\set n :i * :clients + :client_id",
            f"\\if :n >= {rows}",
            "select 1 / 0 as used_up;",
            "\\endif",
        ]
    elif script.transaction:
        lines += ["\\set n random(1000000000000, 9000000000000000000)"]  # nobody has it yet
    else:
        lines += [f"\\set n random(0, {rows - 1})"]
    for number, trip in enumerate(script.trips):
        statements = [_statement(name, script.values) for name in trip]
        if script.transaction:
            first, last = number == 0, number == len(script.trips) - 1
            statements = [*["begin"] * first, *statements, *["commit"] * last]
            lines += ["\\startpipeline", *(f"{each};" for each in statements), "\\endpipeline"]
        else:
            lines += [f"{each};" for each in statements]
    return "\n".join(lines) + "\n"


def _statement(name: str, values: Mapping[str, str]) -> str:
    """Return a statement of the service with SQL in place of its parameters, each of them an array of one element."""
    module, _, statement = name.partition(".")
    # pgbench would take what follows a colon for a variable, in comments too.
    bare = re.sub(r"--.*", "", load_queries(module)[statement])
    finds = statement in {"lock_verifications", "find_verifications"}
    known = {**_VALUES, **values, **(_LOOK if finds else {})}

    def value(found: re.Match[str]) -> str:
        parameter = found[1]
        return _KEEP[parameter] if parameter in _KEEP else f"array[{known[parameter].format(n=':n')}]"

    return re.sub(r"%\((\w+)\)s", value, bare).strip()


def session_options() -> str:
    """Return what connections of the service set for the planner and for commits, as PGOPTIONS has it."""
    configured = re.findall(r"set_config\('(\w+)', '([^']+)', false\)", load_queries("db")["configure_session"])
    return " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in configured)


def make_database(url: str, name: str) -> str:
    """Make an empty database on the server of another one, and return its URL."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
