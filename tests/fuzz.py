"""Hostile requests in great number against a real server: `make fuzz`, and a part of it in the tests.

`storm` starts `onetime serve` on a database, and sends it what no honest client sends: messages of wrong types, sizes
and encodings, broken bytes, other callers' secrets in wrong places, strange metadata, deadlines that have passed, calls
that are hung up, and on the bare connection what is no HTTP/2. In between, honest callers see to it that the service
goes on working. A judge looks at all that comes back, at the log, the metrics, the memory, and in the end at the rows.

A request is made from the seed and its number alone, but for the ids and secrets that the server makes up.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import resource
import statistics
import struct
import sys
import tempfile
import time
import unicodedata
import urllib.request
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, LiteralString, TypeAlias, TypeVar

import click
import grpc
import grpc.aio
import uvloop
from calls import Client, Database, connected, new_id, open_channel, refusal, write_keys, wrong
from conftest import clean_environment, free_port
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott

from service.app import SERVICES
from service.crypto import new_key
from service.devdb import embedded_postgres
from service.fields import Fields
from service.interceptors import ServiceDescription

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
T = TypeVar("T")

MARK: Final = "canary0marked"
"""Stands in every address that is sent, and must be in no refusal, no metadata, no log and no metric."""

PRIVATE: Final = f"{MARK}0private"
"""Stands in the addresses of honest callers: hostile ones do not know them, and must not be shown them either."""

CALL_TIMEOUT_S: Final = 20.0
"""Above the server's own limit, so that a call which it never ends is told from one that it ends."""

START_TIMEOUT_S: Final = 60.0


# The judge

LEAK: Final = re.compile(
    rb"Traceback|Exception\b|[A-Za-z]Error\b|Errno|<class |object at 0x|/service/|\.py\b|psycopg|sqlstate|DETAIL:"
    rb"|\b(?:SELECT|INSERT|UPDATE|DELETE) |pg_sleep|token_hash|\b(?:ot[lch]1|ev1)\.(?=[a-z0-9]{1,16}\.)|\$argon2"
    rb"|postgresql:"
)
"""What a text is made of that shows our insides: an exception, a path, a statement, a stored secret."""

_LONG_RUN: Final = re.compile(rb"[A-Za-z0-9_-]{43,}")
_SECRET_START: Final = 20
"""Characters by which a secret is known again: 120 bits."""

_CODE: Final = re.compile(r"(?<![\w.-])\d{6,10}(?![\w.-])")

_LONGEST_LINE: Final = 4096
"""Of the log. A caller must not fill our disk with what is refused."""

_CORE_LINE: Final = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ \w+\.cc:\d+\] |WARNING: All log messages before absl::")
"""How the lines start that gRPC's own library writes."""

GROWTH: Final = 16 * 2**20
GROWTH_PER_REQUEST: Final = 16
"""Bytes that the server may grow by in the second half, at once and with each request. The least that Python keeps of
anything is larger than the second."""

_LATE_SHARE: Final = 0.001
"""Of all requests, how many may meet a database or a server that is late: the machine has other work too."""

_LATE: Final = frozenset({"DATABASE_UNAVAILABLE", "OVERLOADED"})

_HURRIED: Final = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})
"""Statuses of calls whose client let them no time, or hung up."""

_OF_THE_CLIENT: Final = (grpc.StatusCode.INTERNAL, "Internal error from Core")
"""What the client's own library makes of a call that ends before it is sent. The server's count tells of the rest."""

_PLAIN: Final = (
    # Statuses without a reason of ours, with what they say.
    (grpc.StatusCode.UNIMPLEMENTED, re.compile("this server has no such method")),
    (grpc.StatusCode.NOT_FOUND, re.compile("")),  # of health, for a service that it does not know
    (grpc.StatusCode.RESOURCE_EXHAUSTED, re.compile(r"SERVER: Received message larger than max \(\d+ vs\. 65536\)")),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, re.compile("received metadata size exceeds (?:soft|hard) limit.*")),
)

_CHECKS: Final[Mapping[str, LiteralString]] = {
    "a token without its state": (
        "select count(*) as n from auth.one_time_tokens as t where not exists"
        " (select from onetime.one_time_token_states as s"
        " where s.token_id = t.id and s.user_id = t.user_id and s.token_type = t.token_type)"
    ),
    "a state without its token": (
        "select count(*) as n from onetime.one_time_token_states as s where not exists"
        " (select from auth.one_time_tokens as t where t.id = s.token_id)"
    ),
    "a verification without its state": (
        "select count(*) as n from public.email_verification_tokens as t where not exists"
        " (select from onetime.email_verification_states as s"
        " where s.id = t.id and s.token_hash = t.email_verification_token)"
    ),
    "a state without its verification": (
        "select count(*) as n from onetime.email_verification_states as s where not exists"
        " (select from public.email_verification_tokens as t where t.id = s.id)"
    ),
    "a stored secret of another format": (
        "select count(*) as n from auth.one_time_tokens where token_hash !~ '^ot[lc]1\\.[a-z0-9]{1,16}\\.'"
    ),
    "a stored code of another format": (
        "select count(*) as n from public.email_verification_tokens"
        " where code !~ '^[0-9]{6}$' or email_verification_token !~ '^ev1\\.[a-z0-9]{1,16}\\.[0-9a-f]{128}$'"
    ),
    "a count of attempts out of its range": (
        "select count(*) as n from ("
        "select failed_attempts from onetime.one_time_token_states"
        " union all select failed_attempts from onetime.email_verification_states"
        ") as s where failed_attempts not between 0 and 5"
    ),
    "a lifetime out of its range": (
        "select count(*) as n from onetime.one_time_token_states"
        " where ttl not between interval '1 second' and interval '24 hours'"
    ),
    "a verification both used and cancelled": (
        "select count(*) as n from public.email_verification_tokens"
        " where used_at is not null and deleted_at is not null"
    ),
    "a mail without its verification": (
        "select count(*) as n from onetime.outbox as o where not exists"
        " (select from public.email_verification_tokens as t where t.id = o.verification_id)"
    ),
    "a mail of a code that was returned": (
        "select count(*) as n from onetime.outbox as o"
        " join onetime.email_verification_states as s on s.id = o.verification_id where s.delivery <> 'send_email'"
    ),
    "an address of a verification that is over": (
        "select count(*) as n from onetime.outbox as o"
        " join public.email_verification_tokens as t on t.id = o.verification_id"
        " where o.sealed_address is not null and (t.used_at is not null or t.deleted_at is not null)"
    ),
    "a mail that was sent by nobody": (
        "select count(*) as n from onetime.outbox as o"
        " join public.email_verification_tokens as t on t.id = o.verification_id"
        " join onetime.email_verification_states as s on s.id = t.id"
        " where o.state = 'sent' or (s.delivery = 'send_email' and t.code_sent)"
    ),
    "a receipt that was never settled": "select count(*) as n from onetime.receipts where row_id is null",
}
"""What no row may be, each with the query that counts such rows."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent, to be told with what is wrong with its answer."""

    number: int
    path: str
    payload: bytes = b""
    metadata: Metadata = ()
    method: MethodDescriptor | None = None
    """None for a method that is not served."""
    hurried: bool = False
    """Whether it was given too little time, or hung up."""

    def __str__(self) -> str:
        """Return the number, by which it can be sent again, and the bytes."""
        shown = self.payload[:600].hex() + ("…" if len(self.payload) > 600 else "")
        return f"request {self.number}, {self.path}, metadata {list(self.metadata)!r:.600}, bytes {shown or 'none'}"


class Judge:
    """Knows what may come back, and keeps what must not. A class because all that is found goes into one list."""

    def __init__(self) -> None:
        """Start with nothing found."""
        self.requests = 0
        self.findings: list[str] = []
        """The first three of each kind, in full."""
        self.found: Counter[str] = Counter()
        """All, by what they are."""
        self.ends: Counter[str] = Counter()
        """How requests ended, by reason, or by status where there is none."""
        self.late = 0
        self.lines: Counter[str] = Counter()
        """Lines of the log, by level; gRPC's own by their form."""
        self.memory: list[tuple[int, int]] = []
        """Bytes of the server's memory, after so many requests."""
        self.slope = 0.0
        self._secrets: set[bytes] = set()

    def find(self, what: str, where: object) -> None:
        """Keep something that must not be."""
        self.found[what] += 1
        if self.found[what] <= 3:
            self.findings.append(f"{what}: {where}")

    def remember(self, secret: str) -> None:
        """Learn a secret that was issued. Codes of a few digits are not worth it: they stand in every number."""
        if len(secret) > _SECRET_START:
            self._secrets.add(secret.encode()[:_SECRET_START])

    def text(self, text: bytes, where: object) -> None:
        """Look for what no text may hold: our insides, an address, a secret."""
        leak = LEAK.search(text)
        if leak:
            self.find(f"shows {leak[0].decode()!r}", f"{text[:2000]!r} in {where}")
        if MARK.encode() in text.lower():
            self.find("shows an address", f"{text[:2000]!r} in {where}")
        for run in _LONG_RUN.findall(text):
            starts = (run[at : at + _SECRET_START] for at in range(len(run) - _SECRET_START + 1))
            if not self._secrets.isdisjoint(starts):
                self.find("shows a secret", f"{text[:2000]!r} in {where}")

    def answer(self, sent: Sent, payload: bytes) -> None:
        """Judge an OK answer to a hostile request."""
        self.ends["OK"] += 1
        if PRIVATE.encode() in payload:
            self.find("answers with what belongs to another", sent)
        if sent.method is None:
            self.find("answers for a method that is not there", sent)
            return
        try:
            GetMessageClass(sent.method.output_type).FromString(payload)
        except DecodeError:
            self.find("answers with another message", f"{sent}: {payload[:600].hex()}")

    def refused(self, sent: Sent, error: grpc.aio.AioRpcError) -> None:
        """Judge a refusal."""
        code, sentence = error.code(), error.details() or ""
        received = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
        self.text(sentence.encode(), sent)
        for key, value in received:
            self.text(value if isinstance(value, bytes) else str(value).encode(), sent)
            self.text(str(key).encode(), sent)
        try:
            reason = refusal(error).reason
        except (AssertionError, KeyError, ValueError, DecodeError) as wrong_shape:
            self.find(
                "a refusal that the contract does not promise", f"{error!r:.2000}, {wrong_shape!r:.300}, to {sent}"
            )
            reason = ""
        if reason and _CODE.search(sentence):
            self.find("shows a code", f"{sentence[:2000]!r} to {sent}")
        if (code, sentence) == _OF_THE_CLIENT:
            self.ends["failed in the client"] += 1
            return
        self.ends[reason or code.name] += 1
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            self.find(code.name, f"{sentence[:2000]!r} to {sent}")
        elif reason in _LATE or (code is grpc.StatusCode.DEADLINE_EXCEEDED and not sent.hurried):
            self.late += 1
        elif not reason and not self._plain(sent, code, sentence):
            self.find(f"{code.name} without a reason", f"{sentence[:2000]!r} to {sent}")

    def _plain(self, sent: Sent, code: grpc.StatusCode, sentence: str) -> bool:
        """Tell whether a refusal may do without a reason."""
        if code in _HURRIED:
            return sent.hurried
        return any(code is known and form.fullmatch(sentence) for known, form in _PLAIN)

    def line(self, line: bytes) -> None:
        """Judge a line of the log."""
        self.text(line, "the log")
        if len(line) > _LONGEST_LINE:
            self.find("a long line", f"{len(line)} bytes in the log: {line[:2000]!r}")
        if _CORE_LINE.match(line):
            self.lines[f"gRPC: {re.sub(rb'[0-9]+', b'0', line)[:120].decode(errors='replace').strip()}"] += 1
            return
        try:
            told = json.loads(line)
            level, event = str(told["level"]), str(told["event"])
        except (ValueError, TypeError, KeyError):
            self.find("a line that is not ours", f"the log: {line[:2000]!r}")
            return
        if not line.isascii():
            self.find("a line that a terminal may obey", f"the log: {line[:2000]!r}")
        if level in ("ERROR", "CRITICAL"):
            self.find("an error in the log", line[:4000].decode("utf-8", "replace"))
        self.lines[level if level == "INFO" else f"{level}: {event[:100]}"] += 1

    def page(self, page: bytes) -> None:
        """Judge the page of metrics, which also tells how calls ended whose client had gone."""
        self.text(page, "the metrics")
        for line in page.decode().splitlines():
            bad = 'grpc_code="Internal"' in line or 'grpc_code="Unknown"' in line or 'reason="INTERNAL"' in line
            if bad and not line.endswith(" 0.0"):
                self.find("an internal error in the metrics", line)

    def growth(self) -> None:
        """Judge the server's memory, in the second half: in the first it has things to make that it keeps."""
        second = self.memory[len(self.memory) // 2 :]
        if len(second) < 5:
            if self.requests >= 1000:
                self.find("too few looks at the memory", len(second))
            return
        done, held = zip(*second, strict=True)
        self.slope = statistics.linear_regression(done, held).slope
        span = done[-1] - done[0]
        if self.slope * span > GROWTH + GROWTH_PER_REQUEST * span:
            self.find("memory grows", f"by {self.slope:.0f} bytes with each request, over {span:,} requests")

    def rows(self, database: Database) -> None:
        """Judge the rows that are left."""
        for what, query in _CHECKS.items():
            (row,) = database.execute(query).fetchall()
            if row["n"]:
                self.find(what, f"{row['n']} rows")
        for row in database.execute("select distinct relates_to from auth.one_time_tokens"):
            fields = Fields()
            if fields.address("relates_to", row["relates_to"]) != row["relates_to"] or fields.violations:
                self.find("an address that is not in its normal form", ascii(row["relates_to"]))

    def finish(self, exit_code: int) -> None:
        """Judge how the server ended, and whatever can be judged only then."""
        if exit_code != 0:
            self.find("the server ended badly", f"exit code {exit_code}")
        if self.late > max(5, _LATE_SHARE * self.requests):
            self.find("too many late answers", self.late)
        self.growth()


# Bytes of a message


def varint(number: int) -> bytes:
    """Return a number as protobuf writes it: a negative one in its two's complement of 64 bits."""
    number &= 2**64 - 1
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def tagged(number: int, wire_type: int, value: bytes) -> bytes:
    """Return a field: its number, the type of what follows, and that."""
    return varint(number << 3 | wire_type) + value


def text_field(number: int, text: bytes) -> bytes:
    """Return a field with a length: a text, bytes or a message."""
    return tagged(number, 2, varint(len(text)) + text)


_NUMBERS: Final = (
    *(0, 1, 2, 3, 5, 6, 7, 10, 11, 60, 86_400, 999_999_999, 1_000_000_000, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(315_576_000_000, 315_576_000_001, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -1, -5, -999_999_999, -(2**31)),
)

_ADDRESSES: Final = (
    "x" * 64 + "@" + "x" * 63 + ".org",
    "ada@example.org\r\nBcc: eve@example.net",
    "Ada <ada@example.org>",
    "=?utf-8?q?ada=40example.net=3e?=@example.org",
    "ada%example.net@example.org",
    "ada@[127.0.0.1]",
    "ada@xn--80ak6aa92e.com",
    "ada@xn--" + "9" * 50 + ".org",
    "ada@localhost",
    "ada@ex\u00e4mple.org",
    "\u0430\u0434\u0430@\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444",
    "ad\u0430@example.org",
    "a" + "\u0315\u0300" * 15_000 + "@example.org",  # marks in a wrong order
)
"""What is, and what is not, an address to send mail to."""

_TEXTS: Final[Sequence[bytes]] = (
    b"",
    b"\0",
    b"a\0b",
    b" ",
    b"\n",
    b"\r\nonetime-reason: OK\r\n",
    b"%s%n%x%1000000d",
    b"{0.__class__.__init__.__globals__}",
    b"${jndi:ldap://127.0.0.1/a}",
    b"' or '1'='1",
    b"'; DELETE FROM auth.one_time_tokens; --",
    b"1); SELECT pg_sleep(3); --",
    b"$$ || UPDATE users $$ \\",
    b"../../../../etc/passwd",
    b"<script>alert(1)</script>",
    b"psycopg.errors.UniqueViolation: DETAIL: Key (token_hash)=(1) already exists.",
    b"Traceback (most recent call last):",
    b"123456\n",
    b" 123456",
    b"+12345",
    b"-12345",
    b"1e5",
    b"0x1234",
    b"000000",
    b"0000000000",
    b"00000000-0000-0000-0000-000000000000",
    b"ffffffff-ffff-ffff-ffff-ffffffffffff",
    b"\xff\xfe",
    b"\xc0\x80",  # NUL, written too long
    b"\xed\xa0\x80",  # half of a surrogate pair
    b"\xed\xa0\xbd\xed\xb8\x80",  # both halves, each by itself
    b"\xf4\x90\x80\x80",  # beyond Unicode
    b"\xe2\x80",  # cut off
    "\u202eadmin@example.org\u202c".encode(),
    "a\u200b\u200d\ufeffb@example.org".encode(),
    "１２３４５６".encode(),  # noqa: RUF001 - digits, but not of ASCII
    "٣٤٥٦٧٨".encode(),
    "²²²²²²".encode(),
    "user＠example.org".encode(),  # noqa: RUF001 - an @ to NFKC
    "\u212a\u017f\u0130\u0131@example.org".encode(),  # letters that change when their case does
    "e\u0301".encode(),
    "👩‍👩‍👧‍👦\U000e0001\ufffe\uffff".encode(),
    b"a@b@c",
    b'"a@b"@example.org',
    b"a@example.org,b@example.org",
    *(address.encode() for address in _ADDRESSES),
    b"x" * 319 + b"@",
    b"x" * 321,
    b"@" + "ﬃ".encode() * 300,
    b"a" + "\u0301".encode() * 1000,
    "ΐ".encode() * 320,  # longer in lower case, normalised
)

_KNOWN: Final[Sequence[bytes]] = (
    b"*",
    b"onetime.v1.OneTimeTokenService",
    b"onetime.v1.EmailVerificationService.VerifyCode",
    b"onetime/v1/one_time_tokens.proto",
    b"grpc.health.v1.Health",
    b"google.protobuf.Duration",
    b"en",
    b"pt-BR",
)


@dataclass(frozen=True, slots=True)
class Bait:
    """A token and a verification of one user, for hostile requests to be about."""

    user_id: str
    address: str
    token_type: int
    token_id: str
    secret: str
    """A link's or a code."""
    verification_id: str
    email_token: str
    email_code: str

    def texts(self) -> tuple[str, ...]:
        """Return all that may get into a wrong place."""
        return (
            *(self.user_id, self.address, self.token_id, self.secret),
            *(self.verification_id, self.email_token, self.email_code),
        )


class Forger:
    """Makes messages from their descriptors. A class because it takes real ids and secrets from the bait of all."""

    def __init__(self, seed: int) -> None:
        """Make up the few users whom many requests are about, so that these meet their limits."""
        chance = random.Random(seed)
        self._few = [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in range(8)]
        self._bait: deque[Bait] = deque(maxlen=200)
        for user_id in self._few:
            self.learn(
                Bait(user_id, f"{user_id}-{MARK}@example.org", 3, user_id, "0" * 43, user_id, "0" * 128, "0" * 6)
            )

    def learn(self, bait: Bait) -> None:
        """Take a bait, and forget the oldest one."""
        self._bait.append(bait)

    def message(self, chance: random.Random, of: Descriptor, *, spite: float, bait: Bait | None = None) -> bytes:
        """Return the bytes of a message; each field is hostile with a probability of `spite`. At 0, all is in order."""
        bait = bait or chance.choice(self._bait)
        arms = {oneof.name: chance.choice(oneof.fields).number for oneof in of.oneofs}
        parts = []
        for each in of.fields:
            other_arm = each.containing_oneof is not None and arms[each.containing_oneof.name] != each.number
            if chance.random() < (1 - spite / 4 if other_arm else 0.05):
                continue
            if chance.random() < spite:
                parts.append(self._hostile(chance, each, bait))
            else:
                parts.append(self._sound(chance, each, bait, spite))
        if chance.random() < spite:
            parts.append(_extra(chance))
        if chance.random() < spite:
            parts += parts
            chance.shuffle(parts)
        return b"".join(parts)

    def broken(self, chance: random.Random, of: Descriptor) -> bytes:
        """Return a message that was in order until somebody broke its bytes."""
        raw = bytearray(self.message(chance, of, spite=0))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            at = chance.randrange(len(raw) + 1)
            match chance.randrange(7):
                case 0 if raw:
                    raw[at - 1] ^= 1 << chance.randrange(8)
                case 1:
                    raw[at:at] = chance.randbytes(chance.choice((1, 1, 2, 16)))
                case 2:
                    del raw[at : at + chance.choice((1, 1, 2, 16))]
                case 3:
                    del raw[at:]
                case 4:
                    raw += self.message(chance, of, spite=0)
                case 5 if raw:
                    other = chance.randrange(len(raw))
                    raw[at - 1], raw[other] = raw[other], raw[at - 1]
                case _:
                    raw[at : at + 1] = bytes((chance.choice((0, 127, 128, 255)),))
        return bytes(raw)

    def text(self, chance: random.Random, bait: Bait) -> bytes:
        """Return a hostile text."""
        match chance.randrange(12):
            case 0 | 1 | 2 | 3:
                return chance.choice(_TEXTS)
            case 4 | 5:
                # Something real, in a wrong place.
                return chance.choice(bait.texts()).encode()
            case 6:
                return _almost(chance, chance.choice(bait.texts()))
            case 7:
                return chance.choice((chance.choice(_TEXTS), bait.address.encode())) + chance.choice(_TEXTS)
            case 8:
                return chance.randbytes(chance.choice((1, 6, 16, 43, 128)))
            case 9:
                return chance.choice(_KNOWN)
            case 10 if chance.random() < 0.1:
                return chance.choice((b"a", b"0", b"\xff", "é".encode(), b"\0")) * chance.choice((1000, 20_000, 32_000))
            case _:
                return "".join(
                    chr(chance.choice((32, 65, 0x300, 0x4E00, 0x10000)) + chance.randrange(90))
                    for _ in range(chance.randrange(1, 40))
                ).encode()

    def _sound(self, chance: random.Random, of: FieldDescriptor, bait: Bait, spite: float) -> bytes:
        """Return a field as an honest caller would set it, as far as its name and type tell."""
        if of.message_type is not None:
            if of.message_type.full_name == "google.protobuf.Duration":
                return text_field(of.number, tagged(1, 0, varint(chance.choice((1, 2, 60, 300)))))
            return text_field(of.number, self.message(chance, of.message_type, spite=spite, bait=bait))
        if of.enum_type is not None:
            known = [value.number for value in of.enum_type.values]
            number = bait.token_type if of.name == "token_type" and chance.random() < 0.8 else chance.choice(known)
            return tagged(of.number, 0, varint(number))
        if of.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            return tagged(of.number, 0, varint(chance.choice((0, 0, 1, 6, 8))))
        match of.name:
            case "user_id":
                text = chance.choice((bait.user_id, bait.user_id, bait.user_id, *self._few[:1]))
            case "id":
                text = bait.verification_id
            case "request_id":
                # From a few, so that some are used again, with the same content or another.
                text = str(uuid.UUID(int=chance.randrange(2000), version=4)) if chance.random() < 0.5 else ""
            case "relates_to" | "email":
                sound = of.name == "relates_to" or chance.random() < 0.5
                text = bait.address if sound else chance.choice(_ADDRESSES)
            case "link_secret":
                text = bait.secret
            case "email_verification_token":
                text = bait.email_token
            case "code":
                text = chance.choice((bait.email_code, bait.secret, f"{chance.randrange(10**6):06}"))
            case _:
                text = chance.choice(_KNOWN).decode()
        return text_field(of.number, text.encode())

    def _hostile(self, chance: random.Random, of: FieldDescriptor, bait: Bait) -> bytes:
        """Return a field as nobody should set it."""
        if chance.random() < 0.15:
            return _mistyped(chance, of.number)
        if of.message_type is not None:
            match chance.randrange(4):
                case 0:
                    return text_field(of.number, self.text(chance, bait))
                case 1:
                    numbers = (
                        tagged(1, 0, varint(chance.choice(_NUMBERS))),
                        tagged(2, 0, varint(chance.choice(_NUMBERS))),
                    )
                    return text_field(of.number, b"".join(numbers))
                case 2:
                    nested = b""
                    for _ in range(chance.choice((10, 99, 101, 1000))):
                        nested = text_field(of.number, nested)
                    return nested
                case _:
                    return text_field(of.number, self.message(chance, of.message_type, spite=1, bait=bait))
        if of.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            return text_field(of.number, self.text(chance, bait))
        if of.is_repeated and chance.random() < 0.5:
            many = b"".join(varint(chance.choice(_NUMBERS)) for _ in range(20)) * chance.choice((1, 1, 1, 100, 400))
            return text_field(of.number, many) if chance.random() < 0.5 else tagged(of.number, 0, b"\1") * 20_000
        return tagged(of.number, 0, varint(chance.choice(_NUMBERS)))


def _almost(chance: random.Random, text: str) -> bytes:
    """Return a text that is nearly the same."""
    at = chance.randrange(len(text))
    match chance.randrange(7):
        case 0:
            text = text[:at] + text[at + 1 :]
        case 1:
            text = text[:at] + text[at] + text[at:]
        case 2:
            text = text[:at] + chance.choice("g0-_é\0٣\u200b") + text[at + 1 :]
        case 3:
            text = text.upper()
        case 4:
            text = chance.choice(("{%s}", "urn:uuid:%s", "%s\n", " %s", "%s=", '"%s"')) % text
        case 5:
            text = text.replace("-", "")
        case _:
            text = unicodedata.normalize("NFD", text) + "\u0301"
    return text.encode()


def _mistyped(chance: random.Random, number: int) -> bytes:
    """Return a field whose bytes are of any type, or that does not end."""
    match chance.randrange(9):
        case 0:
            return tagged(number, 0, varint(chance.choice(_NUMBERS)))
        case 1:
            return tagged(number, 1, chance.choice((struct.pack("<d", float("nan")), chance.randbytes(8))))
        case 2:
            return tagged(number, 5, chance.choice((struct.pack("<f", float("-inf")), chance.randbytes(4))))
        case 3:
            return tagged(number, 2, varint(chance.choice((1, 2**31 - 1, 2**32 - 1, -1))) + b"x")
        case 4:
            return tagged(number, chance.choice((6, 7)), b"\0")
        case 5:
            return tagged(number, 3, b"") * chance.choice((1, 100, 10_000))
        case 6:
            return tagged(number, 4, b"")
        case 7:
            return tagged(number, 0, b"\x80" * chance.choice((9, 10, 11, 70)) + b"\1")
        case _:
            return text_field(number, chance.randbytes(chance.randrange(40)))


def _extra(chance: random.Random) -> bytes:
    """Return a field that no message has."""
    match chance.randrange(5):
        case 0:
            return text_field(chance.randrange(1000, 2**29), chance.randbytes(20))
        case 1:
            return tagged(0, 0, b"\1")
        case 2:
            return varint(2**35 - 8) + b"\1"
        case 3:
            depth = chance.choice((3, 200))
            return tagged(1000, 3, b"") * depth + tagged(1000, 4, b"") * depth
        case _:
            return text_field(1001, b"") * chance.choice((10, 10, 10, 15_000))


# Bytes of a connection

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """Return a header as HPACK writes one that is in no table."""

    def counted(text: bytes) -> bytes:
        return (bytes((len(text),)) if len(text) < 127 else b"\x7f" + varint(len(text) - 127)) + text

    return b"\0" + counted(name) + counted(value)


OPENED: Final = _PREFACE + frame(_SETTINGS, 0, 0, b"")
"""What a client sends first."""


def call_headers(path: bytes) -> dict[bytes, bytes]:
    """Return the headers of a call."""
    return {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }


def started_call(stream: int, headers: Mapping[bytes, bytes]) -> bytes:
    """Return the frame that starts a call."""
    return frame(_HEADERS, _END_HEADERS, stream, b"".join(itertools.starmap(header, headers.items())))


def _bare(chance: random.Random, path: str, payload: bytes) -> bytes:
    """Return what is sent on a connection of its own, below gRPC's library, which would refuse to send it."""
    junk = chance.randbytes(chance.choice((1, 9, 100, 5000)))
    match chance.randrange(12):
        case 0:
            return junk
        case 1:
            return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        case 2:
            return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500)
        case 3:
            return OPENED + junk
        case 4:
            return OPENED + started_call(1, call_headers(path.encode()))[: chance.randrange(1, 60)]
        case 5:
            # Calls that are taken back at once: rapid reset.
            call = call_headers(path.encode())
            return OPENED + b"".join(
                started_call(stream, call) + frame(_RESET, 0, stream, struct.pack(">I", 8))
                for stream in range(1, 400, 2)
            )
        case 6:
            return OPENED + frame(_HEADERS, 0, 1, b"") + frame(_CONTINUATION, 0, 1, header(b"x", b"y" * 90)) * 500
        case 7:
            return OPENED + chance.choice(
                (
                    frame(_PING, 0, 0, bytes(8)) * 500,
                    frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31 - 1)) * 200,
                    frame(_SETTINGS, 0, 0, b"12345"),
                    frame(_WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
                    frame(_WINDOW, 0, 0, bytes(4)),
                    frame(_PUSH, 4, 1, junk),
                    frame(_GOAWAY, 0, 0, bytes(8)),
                    frame(_DATA, 0, 0, junk),
                    frame(_PRIORITY, 0, 1, b"\x80\0\0\1\0"),
                    frame(chance.randrange(256), chance.randrange(256), chance.randrange(2**31), junk),
                )
            )
        case _:
            return OPENED + _bare_call(chance, path, payload)


def _bare_call(chance: random.Random, path: str, payload: bytes) -> bytes:
    """Return a call with strange headers, or whose messages are cut strangely."""
    message = b"\0" + struct.pack(">I", len(payload)) + payload
    body = chance.choice(
        (
            message,
            message,
            message,
            b"",
            message * 3,
            message[:-1],
            b"\1" + message[1:],  # said to be compressed
            b"\2" + message[1:],
            b"\0\xff\xff\xff\xff" + payload,
            message + b"\0\0",
        )
    )
    end = chance.choice((_END_STREAM, _END_STREAM, _END_STREAM, 0))
    sent = started_call(1, _strange_headers(chance, path))
    if len(body) > 16_000:
        return sent + frame(_DATA, 0, 1, body[:16_000]) + frame(_DATA, end, 1, body[16_000:32_000])
    return sent + frame(_DATA, end, 1, body) + chance.choice((b"", b"", frame(_RESET, 0, 1, bytes(4))))


def _strange_headers(chance: random.Random, path: str) -> Mapping[bytes, bytes]:
    """Return the headers of a call, one of them strange."""
    headers = call_headers(path.encode())
    junk = chance.choice((b"", b"\0", b"\xff\xfe", b"-1", b" ", b"a" * 300, b"\r\n\r\n", MARK.encode()))
    name, value = chance.choice(
        (
            *(
                (b"grpc-timeout", value)
                for value in (b"1n", b"0S", b"-1S", b"99999999H", b"999999999S", b"1", b"S", junk)
            ),
            *((name, junk) for name in headers),
            (b":method", b"GET"),
            (b"content-type", b"application/json"),
            (b"grpc-encoding", chance.choice((b"gzip", b"identity", b"snappy", junk))),
            (b"grpc-accept-encoding", junk),
            (b"grpc-previous-rpc-attempts", chance.choice((b"1", b"-1", b"99999999999999999999", junk))),
            (b"user-agent", junk),
            # Not the mark: this is the call's name, which a caller chooses, and is told.
            (b"x-request-id", chance.choice((junk.replace(MARK.encode(), b"mark"), b"a" * 129))),
            (b"X-Upper-Case", b"1"),
            (b"grpc-status", b"0"),
            (b"grpc-tags-bin", junk),
            (b"authorization", b"Bearer " + junk),
            (b"content-length", chance.choice((b"0", b"99", junk))),
            (b"connection", b"close"),
            (b"", junk),
            (b"many", b"x" * chance.choice((100, 7000, 20_000))),
        )
    )
    if chance.random() < 0.1:
        headers.pop(name, None)
    elif name != b":path":
        # One that is not UTF-8 ends gRPC's server: test_fuzz has that by itself.
        headers[name] = value
    return headers


# The storm

_SERVICES: Final[Sequence[ServiceDescription]] = (
    *SERVICES,
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
_METHODS: Final = [method for service in _SERVICES for method in service.methods]
_OURS: Final = [method for service in SERVICES for method in service.methods]


def _tells_secrets(of: Descriptor) -> bool:
    """Tell whether a message has a field for an address or a secret."""
    return any(
        each.GetOptions().debug_redact or (each.message_type is not None and _tells_secrets(each.message_type))
        for each in of.fields
    )


_SILENT: Final = [method for method in _OURS if not _tells_secrets(method.output_type)]
"""Methods of which no answer, right or wrong, may show an address or a secret."""

_STRANGE_PATHS: Final = (
    "/onetime.v1.OneTimeTokenService/IssueTokens",
    "/onetime.v1.OneTimeTokenService/issuetoken",
    "/onetime.v1.OneTimeTokenService/",
    "/onetime.v1.OneTimeTokenService/IssueToken/",
    "//IssueToken",
    "/",
    "/a/b/c",
    "/onetime.v1.Nobody/Nothing",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/%2e%2e/%00",
    "/" + "long" * 1000 + "/path",
)


class _LateError(Exception):
    """An honest call met a server that had no time. It is counted, and no finding."""


def chance_of(seed: int, number: int) -> random.Random:
    """Return what decides on a request: not on one generator for all, since requests end in no certain order."""
    return random.Random((seed << 64) + number)


class Storm:
    """Makes the requests of one run. A class because they share channels, bait and judge."""

    def __init__(self, target: str, judge: Judge, seed: int, stack: contextlib.AsyncExitStack) -> None:
        """Take where to, who judges, what to begin with, and what closes the channels."""
        self._target = target
        self._judge = judge
        self._seed = seed
        self._stack = stack
        self._forger = Forger(seed)
        self._calm: list[grpc.aio.Channel] = []
        """For honest callers alone: what a server does about a connection that it is flooded on is not theirs."""
        self._rough: list[grpc.aio.Channel] = []
        self._kinds: Mapping[Callable[[int, random.Random], Awaitable[None]], float] = {
            self._unary: 88,
            self._stream: 4,
            self._lay_bait: 2,
            self._honest: 5,
            self._on_a_bare_connection: 1,
        }

    async def run(self, first: int, requests: int, in_flight: int) -> None:
        """Make requests, so many at a time, from the one of the number `first` on."""
        for channels, number in ((self._calm, 1), (self._rough, 4)):
            for _ in range(number):
                channels.append(await self._stack.enter_async_context(open_channel(self._target)))
        numbers = itertools.count(first)

        async def work() -> None:
            while self._judge.requests < requests:
                number = next(numbers)
                chance = chance_of(self._seed, number)
                (kind,) = chance.choices(list(self._kinds), list(self._kinds.values()))
                await kind(number, chance)

        async with asyncio.TaskGroup() as workers:
            for _ in range(in_flight):
                workers.create_task(work())

    def _request(self, number: int, chance: random.Random) -> Sent:
        """Make a request up."""
        method = chance.choice(_OURS if chance.random() < 0.8 else _METHODS)
        if chance.random() < 0.3:
            payload = self._forger.broken(chance, method.input_type)
        else:
            spite = chance.choice((0, 0.1, 0.2, 0.5, 1))
            payload = self._forger.message(chance, method.input_type, spite=spite)
        metadata = self._metadata(chance) if chance.random() < 0.1 else ()
        if chance.random() < 0.02:
            return Sent(number, chance.choice(_STRANGE_PATHS), payload, metadata)
        return Sent(number, f"/{method.containing_service.full_name}/{method.name}", payload, metadata, method)

    def _metadata(self, chance: random.Random) -> Metadata:
        """Make metadata up, such as gRPC's library lets through."""
        value = chance.choice(("", " ", "%s%n", "a" * 500, "~!@#$%^&*()_+", "' or 1=1 --", "\x20\x7e", f"x {MARK}"))
        raw = chance.choice((b"", b"\0\xff", chance.randbytes(200), MARK.encode()))
        known: tuple[tuple[str, str | bytes], ...] = (
            ("authorization", f"Bearer {value}"),
            ("authorization", value),
            ("x-request-id", chance.choice(("a.b-c_1", "a" * 129, "../x", "", "a b"))),
            ("x-request-id", "again"),
            ("onetime-reason", "TOKEN_USED"),
            ("grpc-previous-rpc-attempts", chance.choice(("1", "-1", "x" * 100))),
            ("traceparent", value),
            ("a" * chance.choice((1, 100)), value),
            ("key-bin", raw),
            ("grpc-status-details-bin", raw),
            ("grpc-trace-bin", raw),
            ("large", "x" * chance.choice((1000, 4000, 7000, 20_000))),
        )
        return [chance.choice(known) for _ in range(chance.choice((1, 2, 20)))]

    async def _unary(self, number: int, chance: random.Random) -> None:
        """Make a unary call; with some, give it no time, or hang up."""
        sent = self._request(number, chance)
        channel = chance.choice(self._rough)
        # A stream need not end by itself: Health/Watch does not.
        streams = sent.method is not None and sent.method.server_streaming
        timeout, hang_up = (0.2 if streams else CALL_TIMEOUT_S), None
        match chance.randrange(20):
            case 0:
                timeout = chance.choice((0, 0.0001, 0.005, 0.011, 0.02))
            case 1:
                hang_up = chance.choice((0, 0.0001, 0.002, 0.01))
        sent = replace(sent, hurried=timeout < 1 or hang_up is not None)
        self._judge.requests += 1
        make: grpc.aio.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(sent.path)
        call = make(sent.payload, timeout=timeout, metadata=tuple(sent.metadata) or None)
        if hang_up is not None:
            await asyncio.sleep(hang_up)
            call.cancel()
        try:
            self._judge.answer(sent, await call)
        except grpc.aio.AioRpcError as error:
            self._judge.refused(sent, error)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            self._judge.ends["hung up"] += 1

    async def _stream(self, number: int, chance: random.Random) -> None:
        """Treat any method as one that streams: no message, or several; the end said, or not."""
        sent = self._request(number, chance)
        messages = [sent.payload] * chance.choice((0, 1, 1, 2, 5))
        says_end = chance.random() < 0.7
        sent = replace(sent, hurried=True)
        self._judge.requests += 1
        make: grpc.aio.StreamStreamMultiCallable[Any, Any] = chance.choice(self._rough).stream_stream(sent.path)
        call = make(timeout=CALL_TIMEOUT_S, metadata=tuple(sent.metadata) or None)
        try:
            async with asyncio.timeout(chance.choice((0.01, 0.2))):
                for message in messages:
                    await call.write(message)
                if says_end:
                    await call.done_writing()
                for _ in range(5):
                    answer = await call.read()
                    if not isinstance(answer, bytes):
                        break
                    self._judge.answer(sent, answer)
        except (TimeoutError, grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            # It is judged by its status.
            pass
        call.cancel()
        error = grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            details=await call.details(),
        )
        if error.code() is not grpc.StatusCode.OK:
            self._judge.refused(sent, error)

    async def _on_a_bare_connection(self, number: int, chance: random.Random) -> None:
        """Open a connection, send what is no call, and drop it."""
        method = chance.choice(_SILENT)
        payload = self._forger.message(chance, method.input_type, spite=0)
        raw = _bare(chance, f"/{method.containing_service.full_name}/{method.name}", payload)
        sent = Sent(number, "a bare connection", raw)
        self._judge.requests += 1
        self._judge.ends["bare connection"] += 1
        patience, half_closes = chance.choice((0, 0.05, 0.3)), chance.random() < 0.3
        if chance.random() < 0.1:
            # A crowd at the door, none of which gets to the end of its first sentence.
            sent = replace(sent, payload=raw[:50])
            await asyncio.gather(*(self._connect(sent, patience, half_closes=half_closes) for _ in range(20)))
        else:
            await self._connect(sent, patience, half_closes=half_closes)

    async def _connect(self, sent: Sent, patience: float, *, half_closes: bool) -> None:
        """Send bytes on a connection of their own, and judge what comes back in some time."""
        host, port = self._target.split(":")
        received = b""
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except OSError as error:
            self._judge.find("the server takes no connection", f"{error} at {sent}")
            return
        try:
            writer.write(sent.payload)
            if half_closes:
                writer.write_eof()
            async with asyncio.timeout(patience):
                while chunk := await reader.read(65536):
                    received += chunk
        except (TimeoutError, OSError):
            # The server may hang up on this.
            pass
        finally:
            writer.transport.abort()
        self._judge.text(received, sent)

    async def _lay_bait(self, number: int, chance: random.Random) -> None:
        """Issue what hostile requests are then about."""
        client = Client(chance.choice(self._calm))
        user_id, address = new_id(), f"{number}-{MARK}@example.org"
        token_type = chance.choice(ott.TokenType.values()[1:])
        digits = chance.choice((0, 6, 6, 10))
        with self._no_findings_but(number, "bait"):
            issued = await self._ok(client.issue(user_id, token_type, digits=digits, relates_to=address))
            started = await self._ok(client.start(user_id))
            self._judge.remember(issued.secret)
            self._judge.remember(started.email_verification_token)
            self._forger.learn(
                Bait(
                    user_id,
                    address,
                    token_type,
                    issued.token.id,
                    issued.secret,
                    started.verification.id,
                    started.email_verification_token,
                    started.code,
                )
            )

    async def _honest(self, number: int, chance: random.Random) -> None:
        """Use the service as it is meant to be used, as a user whom nobody else knows, and see that it works."""
        flow = chance.choice(
            (
                *(self._honest_link, self._honest_code, self._honest_verification, self._honest_retry),
                *(self._honest_mail, self._guesses),
            )
        )
        with self._no_findings_but(number, flow.__name__):
            await flow(Client(chance.choice(self._calm)), f"{new_id()}-{PRIVATE}@example.org")

    @contextlib.contextmanager
    def _no_findings_but(self, number: int, what: str) -> Iterator[None]:
        """Keep it as a finding if an honest caller is not served."""
        try:
            yield
        except _LateError:
            pass
        except (AssertionError, grpc.aio.AioRpcError) as error:
            self._judge.find("an honest caller is not served", f"request {number}, {what}: {error!r:.1000}")

    async def _ok(self, call: Awaitable[T]) -> T:
        """Return the answer of an honest call."""
        self._judge.requests += 1
        late = self._judge.late
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            self._judge.refused(Sent(-1, "an honest call"), error)
            if self._judge.late > late:
                raise _LateError from None
            raise
        self._judge.ends["OK"] += 1
        return answer

    async def _no(self, reason: str, call: Awaitable[object]) -> None:
        """See an honest call refused, for this reason."""
        try:
            await self._ok(call)
        except grpc.aio.AioRpcError as error:
            told = refusal(error).reason
        else:
            told = "OK"
        assert told == reason, f"{told} instead of {reason}"

    async def _honest_link(self, client: Client, address: str) -> None:
        """A link is good for one use."""
        issued = await self._ok(client.issue(relates_to=address))
        self._judge.remember(issued.secret)
        assert (await self._ok(client.check(issued))).relates_to == address
        assert [token.id for token in await self._ok(client.list(issued.token.user_id))] == [issued.token.id]
        consumed = await self._ok(client.consume(issued))
        assert (consumed.id, consumed.user_id) == (issued.token.id, issued.token.user_id)
        await self._no("TOKEN_NOT_FOUND", client.consume(issued))

    async def _honest_code(self, client: Client, address: str) -> None:
        """A code is good for one use, after a wrong one, and for none once it is revoked."""
        issued = await self._ok(client.issue(digits=6, relates_to=address))
        await self._no("CODE_MISMATCH", client.consume(issued, wrong(issued.secret)))
        assert (await self._ok(client.check(issued))).attempts_remaining == 4
        assert (await self._ok(client.consume(issued, by_address=True))).id == issued.token.id
        await self._no("TOKEN_NOT_FOUND", client.consume(issued))
        again = await self._ok(client.issue(issued.token.user_id, digits=8, relates_to=address))
        assert await self._ok(client.revoke(issued.token.user_id)) == 1
        await self._no("TOKEN_NOT_FOUND", client.consume(again))

    async def _honest_verification(self, client: Client, _: str) -> None:
        """A verification is used once, or cancelled."""
        started = await self._ok(client.start())
        self._judge.remember(started.email_verification_token)
        await self._no("CODE_MISMATCH", client.verify(started, wrong(started.code)))
        assert (await self._ok(client.get(started))).state == ev.STATE_PENDING
        assert (await self._ok(client.mark_sent(started))).code_sent
        assert (await self._ok(client.verify(started))).state == ev.STATE_USED
        await self._no("TOKEN_USED", client.verify(started))
        other = await self._ok(client.start(started.verification.user_id))
        self._judge.remember(other.email_verification_token)
        assert (await self._ok(client.cancel(other))).state == ev.STATE_CANCELLED
        await self._no("TOKEN_CANCELLED", client.verify(other))

    async def _honest_mail(self, client: Client, address: str) -> None:
        """A mail is queued, for as long as its verification is not over, and nobody hears its code."""
        started = await self._ok(client.start_by_mail(email=address))
        self._judge.remember(started.email_verification_token)
        assert not started.code
        assert started.verification.delivery_state == ev.DELIVERY_STATE_QUEUED
        assert (await self._ok(client.get(started))).delivery_state == ev.DELIVERY_STATE_QUEUED
        await self._no("INVALID_REQUEST", client.mark_sent(started))
        cancelled = await self._ok(client.cancel(started))
        assert cancelled.delivery_failure == ev.DELIVERY_FAILURE_VERIFICATION_OVER
        await self._no("TOKEN_CANCELLED", client.resend(started))

    async def _honest_retry(self, client: Client, address: str) -> None:
        """A call that is repeated with its request_id gets its answer again."""
        issued = await self._ok(client.issue(relates_to=address))
        self._judge.remember(issued.secret)
        request_id = new_id()
        consumed = await self._ok(client.consume(issued, request_id=request_id))
        assert await self._ok(client.consume(issued, request_id=request_id)) == consumed
        other = issued.secret[::-1]
        await self._no("REQUEST_ID_REUSED", client.consume(issued, other, request_id=request_id))

    async def _guesses(self, client: Client, address: str) -> None:
        """Five wrong codes are compared, and then not even the right one."""
        issued = await self._ok(client.issue(digits=6, relates_to=address))
        started = await self._ok(client.start())
        self._judge.remember(started.email_verification_token)
        for by in range(1, 6):
            await self._no("CODE_MISMATCH", client.consume(issued, wrong(issued.secret, by=by)))
            await self._no("CODE_MISMATCH", client.verify(started, wrong(started.code, by=by)))
        await self._no("ATTEMPTS_EXHAUSTED", client.consume(issued))
        await self._no("ATTEMPTS_EXHAUSTED", client.verify(started))


# The run


@dataclass(slots=True)
class Report:
    """What a run did and found."""

    seed: int
    judge: Judge
    seconds: float = 0.0

    def __str__(self) -> str:
        """Return it for a terminal."""
        judge = self.judge
        rate = judge.requests / max(self.seconds, 0.001)
        lines = [
            f"{judge.requests:,} requests in {self.seconds:.0f} s, {rate:,.0f} a second; seed {self.seed}",
            "",
            *(f"{number:>11,}  {end}" for end, number in judge.ends.most_common()),
            "",
            "the log:",
            *(f"{number:>11,}  {form}" for form, number in judge.lines.most_common()),
            "",
        ]
        if judge.memory:
            held = [judge.memory[at][1] >> 20 for at in (0, len(judge.memory) // 2, -1)]
            lines += [f"memory: {held[0]} MiB at first, {held[1]} MiB half-way, {held[2]} MiB at last"]
            lines += [f"        {judge.slope:+.1f} bytes with each request of the second half", ""]
        lines += [f"found {number:,} times: {what}" for what, number in judge.found.most_common()] or ["found nothing"]
        return "\n".join([*lines, *(f"- {finding}" for finding in judge.findings)])


async def storm(
    url: str,
    folder: Path,
    *,
    requests: int,
    seed: int,
    first: int = 0,
    in_flight: int = 64,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Start a server on a database, send hostile requests, and judge.

    Args:
        url: A database with nothing else in it.
        folder: For the server's keys.
        requests: How many. A few more are made, since honest callers finish what they began.
        seed: Whatever is left to chance follows from it.
        first: The number of the first request.
        in_flight: How many at once.
        progress: Called with how many are done.
    """
    judge = Judge()
    started = time.monotonic()
    async with _serving(url, folder, judge) as server:
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as beside:
            watch = beside.create_task(_watch(server, judge, requests, progress))
            await Storm(server.target, judge, seed, stack).run(first, requests, in_flight)
            watch.cancel()
        report = Report(seed, judge, time.monotonic() - started)
        await _serves_on(server, judge)
    with connected(url) as database:
        judge.rows(database)
    judge.finish(server.process.returncode or 0)
    return report


@dataclass(frozen=True, slots=True)
class _Server:
    target: str
    metrics_url: str
    process: asyncio.subprocess.Process
    last: deque[bytes] = field(default_factory=lambda: deque(maxlen=200))
    """The last lines of its log."""

    def memory(self) -> int:
        """Return the bytes of memory that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1])
        return pages * resource.getpagesize()


@contextlib.asynccontextmanager
async def _serving(url: str, folder: Path, judge: Judge) -> AsyncIterator[_Server]:
    """Run `onetime serve`, with every line of its log judged; stop it by SIGTERM."""
    keys_file = folder / "keys"
    write_keys(keys_file, new_key())
    target, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    environment = clean_environment(
        database_url=url,
        keys_file=keys_file,
        listen=target,
        metrics_listen=metrics,
        drain_delay="0s",
        smtp_url="smtp://127.0.0.1:1",  # where nobody is: what is to be mailed stays in the outbox
        unsafe_cheap_argon2=True,
        argon2_memory_kib=64,
        argon2_time_cost=1,
    )
    # A pipe, since the log of a million calls is half a gigabyte; a large one, so that the server need not wait for us.
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "service", "serve", "--insecure-loopback"),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    server = _Server(target, f"http://{metrics}/metrics", process)
    reader = asyncio.StreamReader(limit=2**20)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
    )

    async def judge_lines() -> None:
        async for line in reader:
            server.last.append(line)
            judge.line(line)

    reading_log = asyncio.create_task(judge_lines())
    try:
        await _until_serving(server)
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.wait()
                await reading_log
        except TimeoutError:
            process.kill()
            await process.wait()
        reading_log.cancel()
        transport.close()


async def _healthy(server: _Server) -> bool:
    async with open_channel(server.target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined] # its stubs leave it out
        try:
            answer = await check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _until_serving(server: _Server) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while server.process.returncode is None:
            if await _healthy(server):
                return
            await asyncio.sleep(0.05)
    raise AssertionError("onetime did not start:\n" + b"".join(server.last).decode("utf-8", "replace"))


async def _watch(server: _Server, judge: Judge, requests: int, progress: Callable[[int], None]) -> None:
    """Look at the memory two hundred times in all, and tell how far it is; fail if the server has gone."""
    step = max(requests // 200, 1)
    wanted = 0
    while True:
        await asyncio.sleep(0.05)
        progress(min(judge.requests, requests))
        if server.process.returncode is not None:
            raise AssertionError("the server has gone:\n" + b"".join(server.last).decode("utf-8", "replace"))
        if judge.requests >= wanted:
            wanted = judge.requests + step
            judge.memory.append((judge.requests, server.memory()))


async def _serves_on(server: _Server, judge: Judge) -> None:
    """See that the server is well, after all that."""
    if not await _healthy(server):
        judge.find("health does not say SERVING", "at the end")
    page = await asyncio.to_thread(_fetch, server.metrics_url)
    judge.page(page)


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - the server's own address
        body: bytes = response.read()
        return body


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--requests", type=click.IntRange(1), default=1_000_000, show_default=True, help="How many.")
@click.option("--seed", type=click.IntRange(0), help="Makes the same requests again. [default: by chance]")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first request.")
@click.option("--in-flight", type=click.IntRange(1, 400), default=64, show_default=True, help="How many at once.")
def main(requests: int, seed: int | None, first: int, in_flight: int) -> None:
    """Send hostile requests to a server on a database of its own, and judge what comes back. For Linux.

    Exits with 1 if anything is found. What is found names the seed and the request's number: --seed 7 --first 12345
    --requests 1 makes that request again, on a new database.
    """
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    with (
        tempfile.TemporaryDirectory(prefix="onetime-fuzz-") as name,
        embedded_postgres(Path(name, "data")) as url,
        click.progressbar(length=requests, label=f"seed {seed}", show_pos=True, file=sys.stderr) as bar,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        report = runner.run(
            storm(
                url,
                Path(name),
                requests=requests,
                seed=seed,
                first=first,
                in_flight=in_flight,
                progress=lambda done: bar.update(done - bar.pos),
            )
        )
    click.echo(report)
    sys.exit(1 if report.judge.found else 0)


if __name__ == "__main__":
    main()
