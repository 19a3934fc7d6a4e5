"""What a secret is good for: tried on everything else, it is refused, and nothing is consumed or told by the time."""

import itertools
import re
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from calls import LABELS, Client, Database, connected, new_id, reason, wrong
from conftest import OnetimeServer, Serve
from onetime.v1 import one_time_tokens_pb2 as ott
from onetime.v1.email_verification_pb2 import STATE_USED

USERS: Final = 3
BY_ADDRESS: Final = (
    ott.TOKEN_TYPE_CONFIRMATION,
    ott.TOKEN_TYPE_REAUTHENTICATION,
    ott.TOKEN_TYPE_RECOVERY,
    ott.TOKEN_TYPE_EMAIL_CHANGE_CURRENT,
)
"""Types whose codes may be presented with an address."""

UNLIMITED: Final = {
    "max_attempts": 100,
    "failures_per_window": 1000,
    "failures_per_day": 1000,
    "failures_in_a_row": 10_000,
}
"""So that each refusal is for what is wrong, and not for there having been so many."""


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


@pytest.fixture
async def client(serve: Serve, migrated_url: str) -> AsyncIterator[Client]:
    """A client of a server that stops nobody."""
    async with serve(migrated_url, **UNLIMITED) as server, server.channel() as channel:
        yield Client(channel)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a code may be presented: as one of a type, for a user or for an address."""

    token_type: ott.TokenType.ValueType
    user_id: str = ""
    relates_to: str = ""

    def request(self, code: str) -> ott.ConsumeTokenRequest:
        """Return the request that presents a code here."""
        credential = ott.CodeCredential(code=code)
        if self.user_id:
            credential.user_id = self.user_id
        else:
            credential.relates_to = self.relates_to
        return ott.ConsumeTokenRequest(token_type=self.token_type, code=credential)


async def test_only_the_diagonal_is_accepted(client: Client, database: Database) -> None:
    """Codes of every user, type, address and length, each tried in every place: it is accepted in its own, once.

    Every user has a code of every type, and for every type an address of its own.
    """
    users = [new_id() for _ in range(USERS)]
    issued: dict[Place, ott.IssueTokenResponse] = {}
    lengths = itertools.cycle((6, 7, 8, 10))
    for user_id, token_type in itertools.product(users, LABELS):
        issued[Place(token_type, user_id=user_id)] = await client.issue(
            user_id, token_type, digits=next(lengths), relates_to=f"{token_type}@{user_id}.example.org"
        )
    places = [
        *issued,
        *(Place(token_type, relates_to=one.token.relates_to) for token_type in BY_ADDRESS for one in issued.values()),
    ]

    refused = 0
    for own, one in issued.items():
        for place in places:
            if place == own or (place.token_type == own.token_type and place.relates_to == one.token.relates_to):
                continue
            expected = {"CODE_MISMATCH"} if place in issued else {"CODE_MISMATCH", "TOKEN_NOT_FOUND"}
            assert await reason(client.tokens.ConsumeToken(place.request(one.secret))) in expected
            refused += 1
        # In its own place, in other lengths and orders.
        code = one.secret
        for other in (code[:-1], code + "0", "0" + code, code[::-1], code[1:] + code[:1], f"{code[:-1]}٣"):
            if other != code:
                assert await reason(client.tokens.ConsumeToken(own.request(other))) in (
                    "CODE_MISMATCH",
                    "INVALID_REQUEST",
                )
    assert refused > USERS * len(LABELS) * (len(places) - 2)

    # Nothing was consumed, and each is good where it belongs: half of them by their address.
    for number, (own, one) in enumerate(issued.items()):
        by_address = number % 2 == 1 and own.token_type in BY_ADDRESS
        token = await client.consume(one, by_address=by_address)
        assert (token.user_id, token.token_type, token.relates_to) == (
            own.user_id,
            own.token_type,
            one.token.relates_to,
        )
        assert await reason(client.consume(one)) == "TOKEN_NOT_FOUND"
    assert database.execute("select from auth.one_time_tokens").rowcount == 0


async def test_only_the_diagonal_of_links_is_accepted(client: Client) -> None:
    """Links of every user and type, each tried as every type: it is accepted as its own, once."""
    issued = [await client.issue(new_id(), token_type) for token_type in LABELS for _ in range(USERS)]
    for one in issued:
        for token_type in LABELS:
            if token_type != one.token.token_type:
                request = ott.ConsumeTokenRequest(token_type=token_type, link_secret=one.secret)
                assert await reason(client.tokens.ConsumeToken(request)) == "TOKEN_NOT_FOUND"
    for one in issued:
        assert (await client.consume(one)).id == one.token.id
        assert await reason(client.consume(one)) == "TOKEN_NOT_FOUND"


async def test_only_the_diagonal_of_verifications_is_accepted(client: Client) -> None:
    """Tokens and codes of several verifications, of one user and of several: only those of one another are accepted."""
    users = [new_id(), new_id()]
    started = [await client.start(user_id) for user_id in users for _ in range(3)]
    for one, other in itertools.permutations(started, 2):
        if one.code != other.code:
            assert await reason(client.verify(one, other.code)) == "CODE_MISMATCH"
    # A code of one kind is none of the other, for the same user.
    issued = await client.issue(users[0], digits=6)
    assert await reason(client.verify(started[0], issued.secret)) == "CODE_MISMATCH"
    assert await reason(client.consume(issued, started[0].code)) == "CODE_MISMATCH"
    for one in started:
        used = await client.verify(one)
        assert (used.id, used.state) == (one.verification.id, STATE_USED)
        assert await reason(client.verify(one)) == "TOKEN_USED"
    assert (await client.consume(issued)).user_id == users[0]


# The time that it takes


def hashes_made(server: OnetimeServer) -> int:
    """Return how many Argon2 hashes a server has made."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:  # noqa: S310 - our own, over HTTP
        text: str = page.read().decode()
    found = re.search(r"^onetime_argon2_hashes_total (\S+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def flushed(database: Database) -> str:
    """Return up to where the write-ahead log is on disk."""
    (row,) = database.execute("select pg_current_wal_flush_lsn()::text as place").fetchall()
    return str(row["place"])


async def test_unknown_and_wrong_do_the_same_work(serve: Serve, migrated_url: str, database: Database) -> None:
    """A wrong code, and any code of nobody, each take exactly one Argon2 and wait for the disk."""
    async with serve(migrated_url, **UNLIMITED) as server, server.channel() as channel:
        client = Client(channel)
        issued = await client.issue(digits=6)
        link = await client.issue()
        nobody = ott.IssueTokenResponse(token=issued.token, secret=issued.secret)
        nobody.token.user_id, nobody.token.relates_to = new_id(), "nobody@example.org"
        linked = ott.IssueTokenResponse(token=issued.token, secret=issued.secret)
        linked.token.user_id = link.token.user_id

        def wrong_code(*, by_address: bool = False) -> Callable[[str], Awaitable[object]]:
            return lambda name: client.consume(issued, wrong(issued.secret), request_id=name, by_address=by_address)

        def no_code(one: ott.IssueTokenResponse, *, by_address: bool = False) -> Callable[[str], Awaitable[object]]:
            return lambda name: client.consume(one, request_id=name, by_address=by_address)

        cases = {
            "wrong": (wrong_code(), "CODE_MISMATCH"),
            "wrong, by address": (wrong_code(by_address=True), "CODE_MISMATCH"),
            "checked": (lambda _: client.check(issued, wrong(issued.secret)), "CODE_MISMATCH"),
            "nobody": (no_code(nobody), "TOKEN_NOT_FOUND"),
            "nobody, by address": (no_code(nobody, by_address=True), "TOKEN_NOT_FOUND"),
            "nobody, checked": (lambda _: client.check(nobody), "TOKEN_NOT_FOUND"),
            "a link's user": (no_code(linked), "TOKEN_NOT_FOUND"),
        }
        for name, (call, expected) in cases.items():
            for request_id in ("", new_id()):
                hashes, place = hashes_made(server), flushed(database)
                assert await reason(call(request_id)) == expected
                assert hashes_made(server) == hashes + 1, name
                assert flushed(database) != place, name
