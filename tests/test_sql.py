import asyncio
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from calls import Database, connected, until
from conftest import PostgresServer
from psycopg._queries import PostgresQuery
from psycopg.adapt import Transformer
from psycopg.pq import ExecStatus
from psycopg.rows import DictRow, dict_row

from service.db import load_queries, skipping_locked
from service.migrations import migrate

SERVICE: Final = Path(__file__).parent.parent / "service"
STEMS: Final = sorted(path.stem for path in (SERVICE / "sql").glob("*.sql"))
STATEMENTS: Final = [(stem, name) for stem in STEMS for name in load_queries(stem)]
PLANS: Final = pytest.mark.parametrize(
    "plan",
    [
        "enable_hashjoin = off",
        "enable_nestloop = off",
    ],
)
"""The planner may join either way, as it finds a table small or large."""
EVERY_STATEMENT: Final = pytest.mark.parametrize(
    ("stem", "name"), STATEMENTS, ids=[f"{stem}.{name}" for stem, name in STATEMENTS]
)
MAX_ATTEMPTS: Final = 5
MOMENT: Final = datetime(2026, 3, 8, 6, 30, tzinfo=UTC)
KEY: Final = "k0"
RECOVERY: Final = "recovery_token"


def run(database: Database, stem: str, name: str, **params: object) -> list[DictRow]:
    """Run a statement as the service does."""
    cursor = database.execute(load_queries(stem)[name], params)
    return cursor.fetchall() if cursor.description else []


def by_ord(rows: Sequence[DictRow]) -> Mapping[int, DictRow]:
    """Return the answers by the elements that they answer, of which none has two."""
    answers = {row["ord"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


def by_id(rows: Sequence[DictRow]) -> Mapping[uuid.UUID, DictRow]:
    """Return the answers of what is made or changed by its id, of which none has two."""
    answers = {row["id"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


# All statements


@pytest.fixture(scope="module")
def schema(postgres_18: PostgresServer, template_url: str) -> Iterator[Database]:
    """A connection to a migrated database, to prepare statements on."""
    with postgres_18.database(template_url) as url, connected(url) as database:
        yield database


def prepare(database: Database, query: str) -> str:
    """Let the server prepare a statement, with the placeholders that psycopg makes; return what is wrong with it."""
    converted = PostgresQuery(Transformer(database))
    names = set(re.findall(r"%\((\w+)\)s", query))
    converted.convert(query, dict.fromkeys(names) if names else None)
    result = database.pgconn.prepare(b"", converted.query)
    return "" if result.status == ExecStatus.COMMAND_OK else result.get_error_message()


@EVERY_STATEMENT
def test_the_server_takes_each_statement(schema: Database, stem: str, name: str) -> None:
    """Each statement can be prepared against the migrated schema: its tables, columns and types are there."""
    assert prepare(schema, load_queries(stem)[name]) == ""


def test_every_supported_server_takes_every_statement(postgres: PostgresServer) -> None:
    """All statements can be prepared on each version of PostgreSQL that is supported."""

    async def migrated(url: str) -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
            await migrate(connection)

    with postgres.database() as url:
        asyncio.run(migrated(url))
        with connected(url) as database:
            faults = {f"{stem}.{name}": prepare(database, load_queries(stem)[name]) for stem, name in STATEMENTS}
    assert {name: fault for name, fault in faults.items() if fault} == {}


@EVERY_STATEMENT
def test_each_statement_is_described_and_used(stem: str, name: str) -> None:
    """Each statement begins with a sentence on what it does, and its own module runs it."""
    assert re.match(r"-- [A-Z].{15,}", load_queries(stem)[name])
    assert f'"{name}"' in (SERVICE / f"{stem}.py").read_text("utf-8")


@pytest.mark.parametrize("module", sorted(path.stem for path in SERVICE.glob("*.py")))
def test_each_use_exists(module: str) -> None:
    """What a module asks of its statements is there. Only the doctor asks another's, on what the server trusts."""
    text = (SERVICE / f"{module}.py").read_text("utf-8")
    loaded = set(re.findall(r'load_queries\("(\w+)"\)', text))
    assert loaded <= {module, "app"} if module == "doctor" else loaded <= {module}
    names = set(re.findall(r'_QUERIES\["(\w+)"\]', text))
    assert bool(names) <= (module in loaded)
    if module in loaded:
        assert names <= load_queries(module).keys()


@EVERY_STATEMENT
def test_columns_are_enumerated(stem: str, name: str) -> None:
    """No statement takes whatever columns a table has: a host may have added some. Of our own queries it may."""
    text = re.sub(r"--.*|'[^']*'", "", load_queries(stem)[name])
    assert "returning *" not in text
    assert not re.search(r"insert into [\w.]+(?: as \w+)?\s*(?:select|values)", text)
    own = set(re.findall(r"(\w+)(?: \([\w, ]+\))? as (?:materialized )?\(", text))
    for source in re.findall(r"select \*[^()]*?\bfrom\s+([\w.]+)", text):
        assert source in own | {"unnest"}, f"select * from {source}"
    for alias in set(re.findall(r"\b(\w+)\.\*", text)):
        sources = set(re.findall(rf"(?:from|join|using)\s+([\w.]+)(?:\s+as)?\s+{alias}\b", text))
        assert sources <= own, f"{alias}.* is of {sources}"
        # What is no name stands in parentheses: a function or a query of its own.
        assert sources or re.search(rf"\)(?: with ordinality)? as {alias}\b", text)


# One-time tokens, as sets


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection to a migrated database."""
    with connected(migrated_url) as connection:
        yield connection


@dataclass(frozen=True, slots=True)
class Token:
    """A token in the table."""

    id: uuid.UUID
    user_id: uuid.UUID
    token_type: str
    token_hash: str
    relates_to: str


def tokens(database: Database, *forms: str) -> list[Token]:
    """Issue tokens in one statement, each of a user and for an address of its own; forms are such as otl1."""
    made = [
        Token(uuid.uuid4(), uuid.uuid4(), RECOVERY, f"{form}.{KEY}.{uuid.uuid4()}", f"{uuid.uuid4()}@example.org")
        for form in forms
    ]
    assert by_id(issue(database, made)).keys() == {token.id for token in made}
    return made


def issue(database: Database, made: Sequence[Token]) -> list[DictRow]:
    """Issue these tokens, for 900 seconds."""
    return run(
        database,
        "one_time_tokens",
        "issue_tokens",
        ids=[token.id for token in made],
        user_ids=[token.user_id for token in made],
        token_types=[token.token_type for token in made],
        token_hashes=[token.token_hash for token in made],
        relates_to=[token.relates_to for token in made],
        ttls=[900.0] * len(made),
        callers=["tests"] * len(made),
    )


def expire(database: Database, *expired: Token) -> None:
    """Age tokens by their lifetime."""
    aged = "update auth.one_time_tokens set created_at = created_at - interval '900 s' where id = any(%s)"
    assert database.execute(aged, [[token.id for token in expired]]).rowcount == len(expired)


def exhaust(database: Database, token: Token) -> None:
    """Use up the attempts of a token."""
    spent = "update onetime.one_time_token_states set failed_attempts = %s where token_id = %s"
    assert database.execute(spent, [MAX_ATTEMPTS, token.id]).rowcount == 1


def foreign(database: Database, token_hash: str) -> Token:
    """Write a row as another system does: without our format, or without a state."""
    token = Token(uuid.uuid4(), uuid.uuid4(), RECOVERY, token_hash, f"{uuid.uuid4()}@example.org")
    database.execute(
        "insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)"
        " values (%s, %s, %s, %s, %s, now() at time zone 'utc', now() at time zone 'utc')",
        [token.id, token.user_id, token.token_type, token.token_hash, token.relates_to],
    )
    return token


def left(database: Database, *of: Token) -> list[bool]:
    """Tell which tokens are still there, each with its state."""
    query = (
        "select t.id from auth.one_time_tokens as t join onetime.one_time_token_states as s on s.token_id = t.id"
        " where t.id = any(%s)"
    )
    found = {row["id"] for row in database.execute(query, [[token.id for token in of]])}
    return [token.id in found for token in of]


def test_issue_tokens(database: Database) -> None:
    """Tokens issued together: each in place of its own predecessor, also of another system's."""
    old, kept = tokens(database, "otl1", "otl1")
    exhaust(database, old)
    theirs = foreign(database, "pkce_0123456789")
    fresh = [
        Token(uuid.uuid4(), old.user_id, RECOVERY, f"otc1.{KEY}.1", "new@example.org"),
        Token(uuid.uuid4(), theirs.user_id, RECOVERY, f"otl1.{KEY}.2", "theirs@example.org"),
        Token(uuid.uuid4(), old.user_id, "phone_change_token", f"otc1.{KEY}.3", "+123"),
    ]
    answers = by_id(issue(database, fresh))
    assert {
        token_id: Token(token_id, row["user_id"], row["token_type"], row["token_hash"], row["relates_to"])
        for token_id, row in answers.items()
    } == {token.id: token for token in fresh}
    assert all(row["failed_attempts"] == 0 and row["create_time"] == row["update_time"] for row in answers.values())
    states = database.execute("select token_id, ttl, failed_attempts, caller from onetime.one_time_token_states")
    assert {row["token_id"]: tuple(row.values())[1:] for row in states} == {
        token.id: (timedelta(seconds=900), 0, "tests") for token in (*fresh, kept)
    }
    assert left(database, *fresh, kept, old, theirs) == [True, True, True, True, False, False]


def test_refresh_tokens(database: Database) -> None:
    """Tokens that get fresh secrets together: those that are gone, expired or another system's do not."""
    one, late, other = tokens(database, "otl1", "otl1", "otc1")
    expire(database, late)
    theirs = foreign(database, "pkce_0123456789")
    ids = [one.id, uuid.uuid4(), late.id, theirs.id, other.id]
    answers = by_ord(
        run(database, "one_time_tokens", "refresh_tokens", ids=ids, token_hashes=[f"otl1.{KEY}.{n}" for n in range(5)])
    )
    assert {n: row["expired"] for n, row in answers.items()} == {1: False, 3: True, 5: False}
    rows = database.execute("select id, token_hash from auth.one_time_tokens")
    stored = {row["id"]: row["token_hash"] for row in rows}
    assert stored == {
        one.id: f"otl1.{KEY}.0",
        late.id: late.token_hash,
        theirs.id: theirs.token_hash,
        other.id: f"otl1.{KEY}.4",
    }


def links(*presented: Token | tuple[str, str]) -> dict[str, object]:
    """Return the parameters for links, each with an ord of its own; a pair is a type and what may be stored.

    None has a request_id.
    """
    pairs = [(each.token_type, each.token_hash) if isinstance(each, Token) else each for each in presented]
    return {
        "ords": list(range(1, len(pairs) + 1)),
        "token_types": [token_type for token_type, _ in pairs],
        "token_hashes": [token_hash for _, token_hash in pairs],
        "callers": ["tests"] * len(pairs),
        "request_ids": [None] * len(pairs),
    }


def test_find_and_consume_links(database: Database) -> None:
    """Links presented together: the bad ones get no answer or are told expired, and their neighbours are spent."""
    one, late, other_type, other = tokens(database, "otl1", "otl1", "otl1", "otl1")
    expire(database, late)
    theirs = foreign(database, "pkce_0123456789")
    orphan = foreign(database, f"otl1.{KEY}.without-a-state")
    presented = links(
        one,
        (RECOVERY, f"otl1.{KEY}.unknown"),
        late,
        ("confirmation_token", other_type.token_hash),
        theirs,
        orphan,
        other,
    )
    for name in ("find_links", "consume_links"):
        answers = by_ord(run(database, "one_time_tokens", name, **presented))
        assert {n: (row["id"], row["expired"]) for n, row in answers.items()} == {
            1: (one.id, False),
            3: (late.id, True),
            7: (other.id, False),
        }
    assert left(database, one, late, other_type, other) == [False, True, True, False]
    rows = database.execute("select id from auth.one_time_tokens").fetchall()
    assert {row["id"] for row in rows} == {late.id, other_type.id, theirs.id, orphan.id}


@PLANS
def test_one_link_presented_twice_in_a_set(database: Database, plan: str) -> None:
    """Of two callers who come with one link in one trip, one is answered that it is spent."""
    (token,) = tokens(database, "otl1")
    database.execute(f"set {plan}")
    rows = run(database, "one_time_tokens", "consume_links", **links(token, token))
    assert len([row for row in rows if not row["expired"]]) == 1


def test_a_link_under_several_keys(database: Database) -> None:
    """What may be stored for one link under each key of the ring is asked for as one element."""
    (token,) = tokens(database, "otl1")
    params = links((RECOVERY, "otl1.k1.other"), token) | {"ords": [1, 1]}
    assert by_ord(run(database, "one_time_tokens", "consume_links", **params))[1]["id"] == token.id


def test_a_link_that_somebody_else_has_locked(database: Database) -> None:
    """Where locks are passed over, what is locked gets an answer without an id, and its neighbours are spent."""
    held, late, other = tokens(database, "otl1", "otl1", "otl1")
    expire(database, late)
    consume = skipping_locked(load_queries("one_time_tokens")["consume_links"])
    params = links(held, (RECOVERY, f"otl1.{KEY}.unknown"), late, other)
    with connected(_url_of(database)) as somebody, somebody.transaction():
        lock = "select from auth.one_time_tokens where id = %s for update"
        assert somebody.execute(lock, [held.id]).rowcount == 1
        answers = by_ord(database.execute(consume, params).fetchall())
    assert {n: (row["id"], row["expired"]) for n, row in answers.items()} == {
        1: (None, None),
        3: (late.id, True),
        4: (other.id, False),
    }
    assert left(database, held, late, other) == [True, True, False]


def test_links_whose_receipts_are_answered(database: Database) -> None:
    """What has a request_id is spent only if this transaction has made its receipt: none that a retry has found."""
    first, retried, other_rpc, other_caller, none = tokens(database, *["otl1"] * 5)
    request_ids = [uuid.uuid4() for _ in range(5)]

    def claim(caller: str, rpc: str, *of: uuid.UUID) -> None:
        params = {"callers": [caller] * len(of), "rpcs": [rpc] * len(of), "request_ids": list(of)}
        run(database, "receipts", "claim_receipts", **params, fingerprints=["f"] * len(of))

    claim("tests", "ConsumeToken", *request_ids[:2])
    claim("tests", "ConsumeToken", request_ids[1])
    claim("tests", "IssueToken", request_ids[2])
    claim("somebody-else", "ConsumeToken", request_ids[3])
    params = links(first, retried, other_rpc, other_caller, none) | {"request_ids": request_ids}
    assert by_ord(run(database, "one_time_tokens", "consume_links", **params)).keys() == {1}
    assert left(database, first, retried, other_rpc, other_caller, none) == [False, True, True, True, True]


def codes(*presented: tuple[Token | uuid.UUID | str, str]) -> dict[str, object]:
    """Return the parameters for codes: subjects (a token's user, a user or an address) with the type."""
    users = [
        subject.user_id if isinstance(subject, Token) else None if isinstance(subject, str) else subject
        for subject, _ in presented
    ]
    return {
        "ords": list(range(1, len(presented) + 1)),
        "token_types": [token_type for _, token_type in presented],
        "user_ids": users,
        "relates_to": [subject if isinstance(subject, str) else None for subject, _ in presented],
    }


def attempts(database: Database, *of: Token) -> list[int]:
    """Return how many attempts are counted on each."""
    query = "select token_id, failed_attempts from onetime.one_time_token_states"
    counts = {row["token_id"]: row["failed_attempts"] for row in database.execute(query)}
    return [counts[token.id] for token in of]


def test_lock_codes(database: Database) -> None:
    """Guesses judged together: each answer tells of the token that is meant, and of its budget."""
    one, late, worn, link, by_address = tokens(database, "otc1", "otc1", "oth1", "otl1", "otc1")
    expire(database, late)
    exhaust(database, worn)
    theirs = foreign(database, "pkce_0123456789")
    orphan = foreign(database, f"otc1.{KEY}.without-a-state")
    # A budget of the same user for another purpose is none of this one.
    for token, purpose in ((one, "phone_change_token"), (by_address, RECOVERY), (worn, RECOVERY)):
        budget: dict[str, object] = {"user_ids": [token.user_id], "purposes": [purpose], "charged_ats": [MOMENT]}
        run(database, "budgets", "charge_budgets", **budget, keep=50)
    presented = codes(
        (one, RECOVERY),
        (uuid.uuid4(), RECOVERY),
        (late, RECOVERY),
        (worn, RECOVERY),
        (link, RECOVERY),
        (theirs, RECOVERY),
        (orphan, RECOVERY),
        (one, "phone_change_token"),
        ("nobody@example.org", RECOVERY),
        (by_address.relates_to, RECOVERY),
        (one.relates_to, RECOVERY),
    )
    answers = by_ord(run(database, "one_time_tokens", "lock_codes", **presented))
    judged = {
        n: (row["id"], row["expired"], row["failed_attempts"], row["failures_in_a_row"]) for n, row in answers.items()
    }
    assert judged == {
        1: (one.id, False, 0, None),
        3: (late.id, True, 0, None),
        4: (worn.id, False, MAX_ATTEMPTS, 1),
        10: (by_address.id, False, 0, 1),
        11: (one.id, False, 0, None),
    }
    assert attempts(database, one, late, worn, by_address) == [0, 0, MAX_ATTEMPTS, 0]


def test_codes_that_somebody_else_has_locked(database: Database) -> None:
    """Where locks are passed over, what is locked, or has a budget that is, is told as skipped, and no neighbour is."""
    held, of_budget, with_budget, without = tokens(database, *["otc1"] * 4)
    users = [of_budget.user_id, with_budget.user_id]
    run(database, "budgets", "lock_budgets", user_ids=users, purposes=[RECOVERY] * 2)
    lock = skipping_locked(load_queries("one_time_tokens")["lock_codes"])
    params = codes(*((each, RECOVERY) for each in (held, of_budget, uuid.uuid4(), with_budget, without)))
    with connected(_url_of(database)) as somebody, somebody.transaction():
        state = "select from onetime.one_time_token_states where token_id = %s for update"
        assert somebody.execute(state, [held.id]).rowcount == 1
        budget = "select from onetime.budgets where user_id = %s for update"
        assert somebody.execute(budget, [of_budget.user_id]).rowcount == 1
        answers = by_ord(database.execute(lock, params).fetchall())
    assert {n: (row["id"], row["skipped"], row["token_hash"]) for n, row in answers.items()} == {
        1: (held.id, True, None),
        2: (of_budget.id, True, of_budget.token_hash),
        4: (with_budget.id, False, with_budget.token_hash),
        5: (without.id, False, without.token_hash),
    }


def test_a_code_by_address_means_the_newest_live_one(database: Database) -> None:
    """Of several tokens for one address, the newest live one is meant; where none is live, the newest is told."""
    made = [Token(uuid.uuid4(), uuid.uuid4(), RECOVERY, f"otc1.{KEY}.{n}", "shared@example.org") for n in range(3)]
    for token in made:
        issue(database, [token])
    presented = codes(("shared@example.org", RECOVERY))
    expected = [(made[2], False), (made[1], False), (made[0], False)]
    for token, expired in expected:
        (row,) = run(database, "one_time_tokens", "lock_codes", **presented)
        assert (row["id"], row["expired"]) == (token.id, expired)
        expire(database, token)
    (row,) = run(database, "one_time_tokens", "lock_codes", **presented)
    assert (row["id"], row["expired"]) == (made[2].id, True)


def charge(database: Database, *charged: Token) -> None:
    """Count an attempt on tokens, and on an unknown one."""
    run(
        database,
        "one_time_tokens",
        "charge_codes",
        ids=[uuid.uuid4(), *(token.id for token in charged)],
        user_ids=[uuid.uuid4(), *(token.user_id for token in charged)],
        token_types=[RECOVERY] * (len(charged) + 1),
    )


def test_charge_refund_and_find_codes(database: Database) -> None:
    """Charges made and given back together: to those who have one, and to nobody's successor."""
    one, replaced, other = tokens(database, "otc1", "otc1", "otc1")
    charge(database, one, replaced, other)
    successor = Token(uuid.uuid4(), replaced.user_id, RECOVERY, f"otc1.{KEY}.1", replaced.relates_to)
    issue(database, [successor])
    charge(database, replaced, successor)
    ids = [one.id, uuid.uuid4(), replaced.id, other.id]
    answers = by_ord(run(database, "one_time_tokens", "find_codes", ids=ids))
    assert {n: (row["id"], row["failed_attempts"]) for n, row in answers.items()} == {1: (one.id, 1), 4: (other.id, 1)}
    run(
        database,
        "one_time_tokens",
        "refund_codes",
        ids=ids,
        user_ids=[one.user_id, uuid.uuid4(), replaced.user_id, other.user_id],
        token_types=[RECOVERY] * 4,
    )
    assert attempts(database, one, other, successor) == [0, 0, 1]


def test_consume_codes(database: Database) -> None:
    """Right codes spent together: not where the row holds another secret by now, is gone or has expired."""
    one, changed, late, other = tokens(database, "otc1", "otc1", "otc1", "oth1")
    expire(database, late)
    ids = [one.id, changed.id, uuid.uuid4(), late.id, other.id]
    hashes = [one.token_hash, f"otc1.{KEY}.before", f"otc1.{KEY}.unknown", late.token_hash, other.token_hash]
    answers = by_ord(run(database, "one_time_tokens", "consume_codes", ids=ids, token_hashes=hashes))
    assert {n: row["expired"] for n, row in answers.items()} == {1: False, 4: True, 5: False}
    assert left(database, one, changed, late, other) == [False, True, True, False]


@PLANS
def test_one_code_presented_twice_in_a_set(database: Database, plan: str) -> None:
    """Of two callers who come with one right code in one trip, one is answered that it is spent."""
    (token,) = tokens(database, "otc1")
    database.execute(f"set {plan}")
    params = {"ids": [token.id] * 2, "token_hashes": [token.token_hash] * 2}
    rows = run(database, "one_time_tokens", "consume_codes", **params)
    assert len([row for row in rows if not row["expired"]]) == 1


def test_revoke_and_list_tokens(database: Database) -> None:
    """Users' tokens listed and revoked together: live ones are counted, expired ones go too, others' stay."""
    one, late, bystander = tokens(database, "otl1", "otc1", "otl1")
    expire(database, late)
    theirs = foreign(database, "pkce_0123456789")
    users = [one.user_id, uuid.uuid4(), late.user_id, theirs.user_id]
    listed = run(database, "one_time_tokens", "list_tokens", user_ids=users)
    assert [(row["ord"], row["id"]) for row in listed] == [(1, one.id)]
    answers = by_ord(
        run(
            database,
            "one_time_tokens",
            "revoke_tokens",
            ords=[1, 2, 3, 4],
            user_ids=users,
            token_types=[RECOVERY] * 4,
        )
    )
    assert {n: row["revoked_count"] for n, row in answers.items()} == {1: 1, 3: 0}
    assert left(database, one, late, bystander) == [False, False, True]
    assert database.execute("select from auth.one_time_tokens where id = %s", [theirs.id]).rowcount == 1


# Email verifications, as sets


@dataclass(frozen=True, slots=True)
class Verification:
    """A verification in the table."""

    id: uuid.UUID
    token_hash: str


def start(database: Database, user_ids: Sequence[uuid.UUID], ttl: float = 900.0) -> list[Verification]:
    """Start verifications in one statement."""
    made = [Verification(uuid.uuid4(), f"ev1.{KEY}.{uuid.uuid4().hex * 4}") for _ in user_ids]
    count = len(made)
    rows = run(
        database,
        "email_verification",
        "start_verifications",
        ids=[each.id for each in made],
        user_ids=list(user_ids),
        token_hashes=[each.token_hash for each in made],
        sealed_codes=["123456"] * count,
        ttls=[ttl] * count,
        callers=["tests"] * count,
        deliveries=["return_code"] * count,
    )
    answers = by_id(rows)
    assert {row_id: row["user_id"] for row_id, row in answers.items()} == {
        each.id: user_id for each, user_id in zip(made, user_ids, strict=True)
    }
    return made


def verifications(database: Database, count: int) -> list[Verification]:
    """Start verifications, each of a user of its own."""
    users = [uuid.uuid4() for _ in range(count)]
    run(database, "email_verification", "add_users", user_ids=users)
    return start(database, users)


def test_start_verifications(database: Database) -> None:
    """Verifications started together: who is known is told before, and with an unknown user among them none is."""
    known = [uuid.uuid4(), uuid.uuid4()]
    # Twice in one set, and known already the second time.
    run(database, "email_verification", "add_users", user_ids=[known[0], known[0]])
    run(database, "email_verification", "add_users", user_ids=known)
    asked = [known[0], uuid.uuid4(), known[1], known[0]]
    found = run(database, "email_verification", "find_users", user_ids=asked)
    assert sorted(row["id"] for row in found) == sorted(known)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        start(database, asked)
    start(database, [known[0], known[1], known[0]])
    counts = (
        "select (select count(*) from public.email_verification_tokens) as tokens,"
        " (select count(*) from onetime.email_verification_states) as states"
    )
    assert database.execute(counts).fetchone() == {"tokens": 3, "states": 3}


@pytest.mark.parametrize("name", ["find_verifications", "lock_verifications"])
def test_find_and_lock_verifications(database: Database, name: str) -> None:
    """Verifications asked for together, by id and by digest: each is answered, the unknown and others' are not."""
    one, other, late = verifications(database, 3)
    database.execute("update public.email_verification_tokens set expires_at = now() where id = %s", [late.id])
    theirs = uuid.uuid4()
    user_id = database.execute("insert into public.users values (gen_random_uuid()) returning id").fetchone()
    assert user_id is not None
    database.execute(
        "insert into public.email_verification_tokens (id, user_id, email_verification_token, code)"
        " values (%s, %s, %s, '123456')",
        [theirs, user_id["id"], "x" * 128],
    )
    ids: list[uuid.UUID | None] = [one.id, uuid.uuid4(), None, None, theirs, None, late.id]
    hashes = [None, None, other.token_hash, f"ev1.{KEY}.unknown", None, "x" * 128, None]
    found = {1: (one.id, False), 3: (other.id, False), 7: (late.id, True)}
    asked = {"ords": list(range(1, 8)), "ids": ids, "token_hashes": hashes}
    for callers, seen in (
        ([None] * 7, found),
        (["tests"] * 7, found),
        (["tests", None, "somebody-else", None, None, None, "tests"], {1: found[1], 7: found[7]}),
    ):
        answers = by_ord(run(database, "email_verification", name, **asked, callers=callers))
        assert {n: (row["id"], row["expired"]) for n, row in answers.items()} == seen


def test_verifications_that_somebody_else_has_locked(database: Database) -> None:
    """Where locks are passed over, what is locked, or has a budget that is, is told as skipped, and no neighbour is."""
    held, of_budget, with_budget, without = verifications(database, 4)
    rows = database.execute("select id, user_id from public.email_verification_tokens")
    users = {row["id"]: row["user_id"] for row in rows}
    budgets: dict[str, object] = {
        "user_ids": [users[of_budget.id], users[with_budget.id]],
        "purposes": ["email_verification"] * 2,
    }
    run(database, "budgets", "lock_budgets", **budgets)
    lock = skipping_locked(load_queries("email_verification")["lock_verifications"])
    asked = [held.id, of_budget.id, uuid.uuid4(), with_budget.id, without.id]
    params = {"ords": [1, 2, 3, 4, 5], "ids": asked, "token_hashes": [None] * 5, "callers": [None] * 5}
    with connected(_url_of(database)) as somebody, somebody.transaction():
        states = "select from onetime.email_verification_states where id = %s for update"
        assert somebody.execute(states, [held.id]).rowcount == 1
        budget = "select from onetime.budgets where user_id = %s for update"
        assert somebody.execute(budget, [users[of_budget.id]]).rowcount == 1
        answers = by_ord(database.execute(lock, params).fetchall())
    assert {n: (row["id"], row["skipped"], row["token_hash"]) for n, row in answers.items()} == {
        1: (held.id, True, None),
        2: (of_budget.id, True, of_budget.token_hash),
        4: (with_budget.id, False, with_budget.token_hash),
        5: (without.id, False, without.token_hash),
    }
    assert answers[4]["failures"] == []
    assert answers[5]["failures"] is None


def test_use_verifications(database: Database) -> None:
    """Verifications spent together: none that is used, cancelled, expired or unknown, and none twice."""
    one, used, cancelled, late, other = verifications(database, 5)
    for column, each in (("used_at", used), ("deleted_at", cancelled), ("expires_at", late)):
        database.execute(f"update public.email_verification_tokens set {column} = now() where id = %s", [each.id])
    ids = [one.id, used.id, cancelled.id, late.id, uuid.uuid4(), other.id]
    assert by_id(run(database, "email_verification", "use_verifications", ids=ids)).keys() == {one.id, other.id}
    assert run(database, "email_verification", "use_verifications", ids=ids) == []
    (third,) = verifications(database, 1)
    assert len(run(database, "email_verification", "use_verifications", ids=[third.id, third.id])) == 1


def test_change_verifications(database: Database) -> None:
    """Verifications charged, refreshed, marked and cancelled together, and an unknown one among them."""
    one, other = verifications(database, 2)
    ids = [one.id, uuid.uuid4(), other.id]
    run(database, "email_verification", "charge_verifications", ids=ids)
    fresh = [f"ev1.{KEY}.{n}{'0' * 128}" for n in range(3)]
    refreshed = by_ord(
        run(
            database,
            "email_verification",
            "refresh_verifications",
            ids=ids,
            token_hashes=fresh,
            sealed_codes=["000001", "000002", "000003"],
        )
    )
    assert refreshed.keys() == {1, 3}
    marked = by_ord(run(database, "email_verification", "mark_codes_sent", ids=ids))
    assert {n: row["code_sent"] for n, row in marked.items()} == {1: True, 3: True}
    cancelled = by_ord(run(database, "email_verification", "cancel_verifications", ids=ids))
    assert all(row["deleted_at"] for row in cancelled.values())
    rows = database.execute(
        "select t.email_verification_token, t.code, s.failed_attempts from public.email_verification_tokens as t"
        " join onetime.email_verification_states as s on s.token_hash = t.email_verification_token and s.id = t.id"
        " order by t.code"
    ).fetchall()
    assert [tuple(row.values()) for row in rows] == [(fresh[0], "000001", 1), (fresh[2], "000003", 1)]


def test_mark_resent(database: Database) -> None:
    """The time of the last send is that of the verification that was sent again, and of no other."""
    one, other = verifications(database, 2)
    last_sent = "select id, last_sent_at from onetime.email_verification_states"
    before = {row["id"]: row["last_sent_at"] for row in database.execute(last_sent)}
    run(database, "email_verification", "mark_resent", ids=[one.id, uuid.uuid4()])
    after = {row["id"]: row["last_sent_at"] for row in database.execute(last_sent)}
    assert after[one.id] > before[one.id]
    assert after[other.id] == before[other.id]


# Budgets, as sets


def budget_rows(database: Database) -> dict[tuple[uuid.UUID, str], DictRow]:
    """Return all budgets by their subjects."""
    rows = database.execute("select * from onetime.budgets").fetchall()
    return {(row["user_id"], row["purpose"]): row for row in rows}


def test_budgets(database: Database) -> None:
    """Budgets made, locked, spent, charged and given back together: each by its own subject."""
    user_ids = [uuid.uuid4() for _ in range(3)]
    subjects: dict[str, object] = {"user_ids": user_ids, "purposes": ["a", "b", "c"]}
    first, others = (user_ids[0], "a"), ((user_ids[1], "b"), (user_ids[2], "c"))
    for _ in range(2):
        run(database, "budgets", "lock_budgets", **subjects)
    assert {(row["user_id"], row["purpose"]) for row in run(database, "budgets", "read_budgets", **subjects)} == {
        first,
        *others,
    }
    # Of each subject another one, and each time a later one.
    charges = [
        {subject: MOMENT + timedelta(minutes=number, seconds=n) for n, subject in enumerate((first, *others))}
        for number in range(5)
    ]
    for charge_of in charges:
        run(database, "budgets", "charge_budgets", **subjects, charged_ats=list(charge_of.values()), keep=3)
    for _ in range(5):
        run(database, "budgets", "spend_sends", user_ids=user_ids[:1], purposes=["a"], keep=4)
    rows = budget_rows(database)
    # No more are kept than the limits look at, the newest; in a row all are counted.
    for subject in (first, *others):
        assert rows[subject]["failures"] == [charge_of[subject] for charge_of in charges[2:]]
        assert rows[subject]["failures_in_a_row"] == 5
    assert [len(rows[subject]["sends"]) for subject in (first, *others)] == [4, 0, 0]
    assert rows[first]["sends"] == sorted(rows[first]["sends"])

    run(database, "budgets", "forget_failures", **subjects, charged_ats=[charges[3][s] for s in (first, *others)])
    rows = budget_rows(database)
    for subject in (first, *others):
        assert rows[subject]["failures"] == [charges[2][subject], charges[4][subject]]
        assert rows[subject]["failures_in_a_row"] == 4

    # A right code: what was charged after it is still counted.
    ends = [charges[2][first], charges[4][others[0]], None]
    run(database, "budgets", "end_runs", **subjects, charged_ats=ends)
    rows = budget_rows(database)
    assert [len(rows[subject]["failures"]) for subject in (first, *others)] == [1, 1, 2]
    assert [rows[subject]["failures_in_a_row"] for subject in (first, *others)] == [1, 0, 0]


def test_budgets_that_are_claimed(database: Database) -> None:
    """Those that are not there are made with their send, told as if it were not counted, and forgotten again."""
    user_ids = [uuid.uuid4() for _ in range(4)]
    subjects: dict[str, object] = {"user_ids": user_ids, "purposes": ["a", "b", "c", "a"]}
    of = dict(zip(user_ids, "abca", strict=True))
    charged: dict[str, object] = {"user_ids": user_ids[:1], "purposes": ["a"]}
    run(database, "budgets", "charge_budgets", **charged, charged_ats=[MOMENT], keep=4)
    run(database, "budgets", "spend_sends", **charged, keep=4)
    # Another purpose of a user is another budget.
    run(database, "budgets", "lock_budgets", user_ids=user_ids[:2], purposes=["b", "a"])
    before = budget_rows(database)
    rows = run(database, "budgets", "claim_budgets", **subjects)
    assert len(rows) == len(user_ids)
    told = {(row["user_id"], row["purpose"]): row for row in rows}
    assert told.keys() == set(of.items())
    there = told.pop((user_ids[0], "a"))
    assert (there["made"], there["failures"], there["failures_in_a_row"]) == (False, [MOMENT], 1)
    assert there["sends"] == before[user_ids[0], "a"]["sends"]
    for row in told.values():
        assert (row["made"], row["failures"], row["failures_in_a_row"], row["sends"]) == (True, [], 0, [])
    made = budget_rows(database)
    assert {subject: made.pop(subject) for subject in before} == before
    assert made.keys() == told.keys()
    for row in made.values():
        assert (len(row["sends"]), row["failures"], row["failures_in_a_row"]) == (1, [], 0)
    run(database, "budgets", "drop_budgets", user_ids=user_ids[1:3], purposes=["b", "c"])
    assert budget_rows(database).keys() == {*before, (user_ids[3], "a")}


def test_budgets_that_somebody_else_has_locked(database: Database) -> None:
    """What is locked elsewhere gets no answer when budgets are claimed, and nobody waits for it."""
    user_ids = [uuid.uuid4() for _ in range(3)]
    subjects: dict[str, object] = {"user_ids": user_ids, "purposes": ["a", "b", "c"]}
    run(database, "budgets", "spend_sends", user_ids=user_ids[:2], purposes=["a", "b"], keep=4)
    with connected(_url_of(database)) as somebody, connected(_url_of(database)) as third:
        with somebody.transaction():
            somebody.execute("select from onetime.budgets where user_id = %s for update", [user_ids[1]])
            with third.transaction():
                free = run(third, "budgets", "claim_budgets", **subjects)
                assert {(row["user_id"], row["purpose"], row["made"]) for row in free} == {
                    (user_ids[0], "a", False),
                    (user_ids[2], "c", True),
                }
                there: dict[str, object] = {"user_ids": user_ids[:2], "purposes": ["a", "b"]}
                assert run(database, "budgets", "claim_budgets", **there) == []  # they are locked
        assert len(run(database, "budgets", "claim_budgets", **subjects)) == 3


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_budgets_that_somebody_else_is_making(database: Database, ends: str) -> None:
    """A claim waits for who is making one of them; if he has made it, with a send, it is not told as free of any."""
    user_ids = [uuid.uuid4() for _ in range(2)]
    subjects: dict[str, object] = {"user_ids": user_ids, "purposes": ["a", "b"]}
    with connected(_url_of(database)) as somebody:
        somebody.execute("begin")
        theirs: dict[str, object] = {"user_ids": user_ids[:1], "purposes": ["a"]}
        assert len(run(somebody, "budgets", "claim_budgets", **theirs)) == 1
        claim = asyncio.create_task(asyncio.to_thread(run, database, "budgets", "claim_budgets", **subjects))
        waiting = "select from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
        await until(lambda: somebody.execute(waiting, [database.info.backend_pid]).rowcount == 1)
        somebody.execute(ends.encode())
        told = {(row["user_id"], row["made"]) for row in await claim}
    assert told == {(user_id, True) for user_id in (user_ids if ends == "rollback" else user_ids[1:])}
    assert [len(row["sends"]) for row in budget_rows(database).values()] == [1, 1]


def test_impatience_ends_with_its_transaction(database: Database) -> None:
    """The short wait for locks is that of one transaction, and no setting of the session."""
    (before,) = database.execute("show lock_timeout")
    with database.transaction():
        run(database, "db", "be_impatient", lock_timeout="77")
        assert database.execute("show lock_timeout").fetchone() == {"lock_timeout": "77ms"}
    assert database.execute("show lock_timeout").fetchone() == before


# Receipts, as sets


def test_receipts(database: Database) -> None:
    """Receipts claimed, settled and dropped together: each by its own caller, rpc and request_id."""
    same = uuid.uuid4()
    keys: list[tuple[str, str, uuid.UUID]] = [
        ("a", "X", same),
        ("b", "X", same),
        ("a", "Y", same),
        ("a", "X", uuid.uuid4()),
    ]

    def arrays(*of: tuple[str, str, uuid.UUID]) -> dict[str, Any]:
        callers, rpcs, request_ids = zip(*of, strict=True)
        return {"callers": list(callers), "rpcs": list(rpcs), "request_ids": list(request_ids)}

    assert run(database, "receipts", "claim_receipts", **arrays(keys[0]), fingerprints=["first"]) == []
    row_ids = [uuid.uuid4() for _ in keys]
    claimed = run(database, "receipts", "claim_receipts", **arrays(*keys), fingerprints=["f"] * 4)
    found = [(row["caller"], row["rpc"], row["request_id"], row["fingerprint"]) for row in claimed]
    assert found == [(*keys[0], "first")]
    run(
        database,
        "receipts",
        "settle_receipts",
        **arrays(*keys[1:], ("nobody", "X", same)),
        row_ids=[*row_ids[1:], uuid.uuid4()],
        answers=[b"1", None, b"3", b"4"],
    )
    run(database, "receipts", "drop_receipts", **arrays(keys[2], ("nobody", "X", same)))
    left_over = database.execute("select caller, rpc, request_id, row_id, answer from onetime.receipts").fetchall()
    assert {(row["caller"], row["rpc"], row["request_id"]): (row["row_id"], row["answer"]) for row in left_over} == {
        keys[0]: (None, None),
        keys[1]: (row_ids[1], b"1"),
        keys[3]: (row_ids[3], b"3"),
    }


# The outbox


def queue_mails(database: Database, made: Sequence[Verification]) -> None:
    """Queue a mail for each verification, as if all had been started with send_email."""
    ids = [each.id for each in made]
    database.execute("update onetime.email_verification_states set delivery = 'send_email' where id = any (%s)", [ids])
    run(
        database,
        "outbox",
        "queue_mails",
        verification_ids=ids,
        message_ids=[uuid.uuid4() for _ in ids],
        sealed_addresses=[b"sealed"] * len(ids),
        locales=["en"] * len(ids),
    )


def mails(database: Database) -> Mapping[uuid.UUID, DictRow]:
    """Return all mails, by their verifications."""
    rows = database.execute("select *, due_at > clock_timestamp() as is_later from onetime.outbox").fetchall()
    return {row["verification_id"]: row for row in rows}


def over(database: Database, made: Sequence[Verification]) -> None:
    """End five verifications, each in another way."""
    used, cancelled, expired, locked, gone = (each.id for each in made)
    tokens = "update public.email_verification_tokens set"
    database.execute(f"{tokens} used_at = now() where id = %s", [used])
    database.execute(f"{tokens} deleted_at = now() where id = %s", [cancelled])
    database.execute(f"{tokens} expires_at = now() where id = %s", [expired])
    database.execute("update onetime.email_verification_states set failed_attempts = 5 where id = %s", [locked])
    database.execute("delete from public.email_verification_tokens where id = %s", [gone])


def test_mails_are_claimed_once_and_for_a_time(database: Database) -> None:
    """Each mail that is due goes to one courier, the oldest first, with its try counted; later it is due again."""
    made = verifications(database, 4)
    for each in made:
        queue_mails(database, [each])
    with connected(_url_of(database)) as other, other.transaction():
        first = run(other, "outbox", "claim_mails", count=2, lease=60.0)
        second = run(database, "outbox", "claim_mails", count=10, lease=60.0)
    claimed = {row["verification_id"]: row for row in (*first, *second)}
    assert {row["verification_id"] for row in first} == {each.id for each in made[:2]}
    assert claimed.keys() == {each.id for each in made}
    assert all(row["tries"] == 1 and row["time_left"] > timedelta(minutes=14) for row in claimed.values())
    assert all(row["is_later"] and row["tries"] == 1 for row in mails(database).values())
    assert run(database, "outbox", "claim_mails", count=10, lease=60.0) == []
    database.execute("update onetime.outbox set due_at = now() where verification_id = %s", [made[3].id])
    (again,) = run(database, "outbox", "claim_mails", count=10, lease=60.0)
    assert (again["verification_id"], again["tries"]) == (made[3].id, 2)


def _url_of(database: Database) -> str:
    info = database.info
    return f"postgresql://{info.user}@/{info.dbname}?host={info.host}&port={info.port}"


def test_mails_are_confirmed_while_they_are_wanted(database: Database) -> None:
    """Not for a verification that is over, not in a newer mail's place, not by a try whose time is over, of any set."""
    made = verifications(database, 9)
    queue_mails(database, made)
    claimed = {row["verification_id"]: row for row in run(database, "outbox", "claim_mails", count=20, lease=60.0)}
    over(database, made[:5])
    run(database, "outbox", "requeue_mails", verification_ids=[made[5].id], message_ids=[uuid.uuid4()])
    run(database, "outbox", "claim_mails", count=20, lease=60.0)
    database.execute("update onetime.outbox set due_at = now() where verification_id = %s", [made[6].id])
    asked = {
        "verification_ids": [each.id for each in made],
        "message_ids": [claimed[each.id]["message_id"] for each in made],
        "max_attempts": MAX_ATTEMPTS,
    }
    assert by_ord(run(database, "outbox", "confirm_mails", **asked, tries=[1] * 9)).keys() == {8, 9}
    assert by_ord(run(database, "outbox", "confirm_mails", **asked, tries=[1] * 8 + [2])).keys() == {8}


def test_mails_of_verifications_that_are_over_end(database: Database) -> None:
    """Whatever ended a verification: when its mail is due, its address is forgotten, and no other one is."""
    made = verifications(database, 7)
    queue_mails(database, made)
    over(database, made[:5])
    database.execute(
        "update onetime.outbox set due_at = now() + interval '1 h' where verification_id = %s", [made[0].id]
    )
    asked = {"max_attempts": MAX_ATTEMPTS}
    assert len(run(database, "outbox", "end_due_mails", **asked, count=3)) == 3
    assert len(run(database, "outbox", "end_due_mails", **asked, count=3)) == 1
    found = mails(database)
    for each in made[1:5]:
        row = found[each.id]
        assert (row["sealed_address"], row["state"], row["failure"], row["due_at"]) == (
            *(None, "failed", "verification_over", None),
        )
    assert all(found[each.id]["sealed_address"] for each in (made[0], *made[5:]))
    # At once, as calls do it; of a mail that was sent, that stays told.
    database.execute("update onetime.outbox set state = 'sent' where verification_id = %s", [made[6].id])
    ended = run(database, "outbox", "end_mails", verification_ids=[made[5].id, made[6].id, uuid.uuid4()])
    assert sorted(row["delivery_state"] for row in ended) == ["failed", "sent"]
    assert all(mails(database)[each.id]["sealed_address"] is None for each in made[5:])
    assert run(database, "outbox", "requeue_mails", verification_ids=[made[5].id], message_ids=[uuid.uuid4()]) == []


def test_what_became_of_mails_is_recorded(database: Database) -> None:
    """Sent, to be tried again, or given up; a mail in whose place another was queued changes nothing of that one."""
    made = verifications(database, 5)
    sent, retried, given_up, replaced, late = (each.id for each in made)
    queue_mails(database, made)
    claimed = {row["verification_id"]: row for row in run(database, "outbox", "claim_mails", count=9, lease=60.0)}
    run(database, "outbox", "requeue_mails", verification_ids=[replaced], message_ids=[uuid.uuid4()])
    ids = [sent, replaced]
    told = run(
        database,
        "outbox",
        "mark_mails_sent",
        verification_ids=ids,
        message_ids=[claimed[each]["message_id"] for each in ids],
    )
    assert len(told) == 1
    failed = [retried, given_up, replaced, late]
    told = run(
        database,
        "outbox",
        "mark_mails_failed",
        verification_ids=failed,
        message_ids=[claimed[each]["message_id"] for each in failed],
        tries=[1, 1, 1, 0],
        failures=["deferred", "address_refused", "deferred", "deferred"],
        waits=[5.0, None, 5.0, 5.0],
    )
    assert {row["verification_id"] for row in told} == {retried, given_up}
    found = mails(database)
    assert [(found[each.id]["state"], found[each.id]["failure"]) for each in made] == [
        ("sent", None),
        ("queued", "deferred"),
        ("failed", "address_refused"),
        ("queued", None),
        ("queued", None),
    ]
    tokens = {
        row["id"]: row
        for row in database.execute("select id, code_sent, expires_at from public.email_verification_tokens")
    }
    # The code was sent, if by the mail before.
    assert {each for each, row in tokens.items() if row["code_sent"]} == {sent, replaced}
    # Until the verification is over, the address is kept, since the code may be asked for again.
    assert all(found[each]["due_at"] == tokens[each]["expires_at"] for each in (sent, given_up))
    assert all(found[each]["sealed_address"] == b"sealed" for each in claimed)
    (counted,) = run(database, "outbox", "count_queued_mails")
    assert counted["queued"] == 3
    assert 0 <= counted["oldest"] < 60
