import asyncio
import base64
import functools
import json
import re
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import grpc.aio
import pytest
from calls import LABELS, Client, Database, connected, consume_request, new_id, wrong
from conftest import OnetimeServer, Serve
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott
from psycopg import sql

from service.config import Settings, load_keyring
from service.crypto import Key, Keyring, argon2_parameters, new_key
from service.db import Database as Pool
from service.devdb import wheel_programs

PASSWORD: Final = "canary-of-a-password"
TIMEOUT_S: Final = 60.0


# What must not be found


@functools.cache
def encodings(secret: str) -> frozenset[bytes]:
    """Return how a secret may be written, in lower case: also as a part of something longer that was encoded."""
    forms = [secret.encode()]
    if re.fullmatch(r"[A-Za-z0-9_-]{43,}", secret):
        # It is base64url itself.
        forms.append(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4)))
    found = {quote(secret, safe="").encode(), quote(secret).encode(), json.dumps(secret)[1:-1].encode()}
    for form in forms:
        found |= {form, form.hex().encode()}
        for before in range(3):
            # In base64 three bytes become four characters; those at the edges depend on the neighbours.
            encoded = base64.b64encode(b"\0" * before + form)
            whole = encoded[(0, 2, 3)[before] : len(encoded) // 4 * 4 - 4]
            found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return frozenset(each.lower() for each in found)


@dataclass
class Canaries:
    """All that was issued, presented or configured, and must be found nowhere."""

    secrets: set[str] = field(default_factory=set)
    """Long enough to be found by themselves."""
    short_codes: set[str] = field(default_factory=set)
    """Of so few digits that they may stand within another number by chance."""
    addresses: set[str] = field(default_factory=set)

    def code(self, code: str) -> str:
        """Remember a code, issued or presented."""
        (self.short_codes if len(code) < 10 else self.secrets).add(code)
        return code

    def address(self, address: str) -> str:
        """Remember an address."""
        self.addresses.add(address)
        return address

    def found_in(self, text: bytes) -> list[str]:
        """Return which of them a text holds."""
        lower = text.lower()
        # PostgreSQL writes the ids of its processes in brackets.
        numbers = set(re.findall(rb"(?<![\w.-])\d{6,9}(?![\w-])", re.sub(rb"\[\d+\]", b"", text)))
        return [
            *(secret for secret in self.secrets if any(form in lower for form in encodings(secret))),
            *(address for address in self.addresses if any(form in lower for form in encodings(address))),
            *(code for code in self.short_codes if code.encode() in numbers),
        ]


def test_encodings_are_found() -> None:
    """The search finds what it is to find: the control of the tests below."""
    canaries = Canaries({"Xy-_" * 10 + "abc", "0123456789"}, {"123456"}, {"Ada.Canary@example.org"})
    link = b"Xy-_" * 10 + b"abc"
    raw = base64.urlsafe_b64decode(link + b"=")
    for leak in (
        link,
        link.upper(),
        link.hex().encode(),
        raw.hex().upper().encode(),
        base64.b64encode(link),
        base64.b64encode(b"x" + link + b"xyz"),
        base64.urlsafe_b64encode(b"xx" + link + b"x"),
        base64.b64encode(raw),
        base64.b64encode(b"before" + raw + b"after"),
        b"the code is 0123456789",
        base64.b64encode(b'{"code": "0123456789"}'),
        b'"123456"',
        b"code=123456,",
        b"ADA.CANARY@EXAMPLE.ORG",
        b"Ada.Canary%40example.org",
    ):
        assert canaries.found_in(b"text " + leak + b" text"), leak
    for harmless in (b"1234567", b"0.123456", b"a123456", b"[123456]", b"ada@example.org", link[:20]):
        assert not canaries.found_in(b"text " + harmless + b" text"), harmless


# All rpcs, right and wrong


class Scenario:
    """Makes all kinds of calls, and remembers what they were about. A class because every call adds to it."""

    def __init__(self, channel: grpc.aio.Channel, canaries: Canaries) -> None:
        """Take the channel, and where to remember."""
        self.channel = channel
        self.client = Client(channel)
        self.canaries = canaries
        self.errors: list[bytes] = []
        """All that callers can see of refusals."""
        self.ends: Counter[str] = Counter()
        self.started: list[ev.StartEmailVerificationResponse] = []
        self._numbers = iter(range(1000))

    async def try_(self, call: Awaitable[Any]) -> Any:  # noqa: ANN401 - of any rpc
        """Make a call; remember its refusal, or the secrets of its answer."""
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            trailing = list(error.trailing_metadata() or ())
            self.errors += [str(error).encode(), repr(error).encode(), (error.details() or "").encode()]
            self.errors += [value if isinstance(value, bytes) else str(value).encode() for _, value in trailing]
            self.ends[str(dict(trailing).get("onetime-reason", error.code().name))] += 1
            return None
        self.ends["OK"] += 1
        if isinstance(answer, ott.IssueTokenResponse):
            if answer.token.HasField("attempts_remaining"):
                self.canaries.code(answer.secret)
            else:
                self.canaries.secrets.add(answer.secret)
        if isinstance(answer, ev.StartEmailVerificationResponse):
            self.canaries.secrets.add(answer.email_verification_token)
            self.canaries.code(answer.code)
            self.started.append(answer)
        return answer

    def address(self) -> str:
        """Make up an address, not in its normal form, and remember both."""
        number = next(self._numbers)
        self.canaries.address(f"ädd-{number}-canary@exämple.org")
        self.canaries.address(f"Ädd-{number}-Canary@xn--exmple-cua.org")  # as mail is sent to it
        return self.canaries.address(f" Ädd-{number}-Canary@Exämple.ORG ".strip()) + " "

    async def one_time_tokens(self, *token_types: ott.TokenType.ValueType) -> None:
        """Call the rpcs of one-time tokens."""
        client = self.client
        for token_type in token_types:
            for digits in (0, 6, 10):
                user_id, request_id, address = new_id(), new_id(), self.address()
                issue = functools.partial(client.issue, user_id, token_type, digits=digits, relates_to=address)
                await self.try_(issue(request_id=request_id))
                issued = await self.try_(issue(request_id=request_id))
                if issued is None:
                    continue
                if digits:
                    for guess in (wrong(issued.secret), wrong(issued.secret, by=2)):
                        self.canaries.code(guess)
                        for call_id in ("", request_id, request_id):
                            await self.try_(client.consume(issued, guess, request_id=call_id))
                        await self.try_(client.check(issued, guess))
                    await self.try_(client.check(issued, by_address=True))
                await self.try_(client.list(user_id))
                await self.try_(client.check(issued))
                # Another content under the same request_id.
                await self.try_(client.issue(user_id, token_type, relates_to=self.address(), request_id=request_id))
                for call_id in (new_id(), "", new_id()):
                    await self.try_(client.consume(issued, request_id=call_id))
                await self.try_(issue())
                await self.try_(client.revoke(user_id))
                kept = await self.try_(client.issue(new_id(), token_type, digits=digits, relates_to=self.address()))
                if kept is not None:
                    self.canaries.address(kept.token.relates_to)

    async def email_verifications(self, rounds: int) -> None:
        """Call the rpcs of email verifications."""
        client = self.client
        for _ in range(rounds):
            request_id = new_id()
            user_id = new_id()
            await self.try_(client.start(user_id, request_id=request_id))
            started = await self.try_(client.start(user_id, request_id=request_id))
            kept = await self.try_(client.start())
            cancelled = await self.try_(client.start())
            if started is None or kept is None or cancelled is None:
                continue
            guess = self.canaries.code(wrong(started.code))
            for call_id in ("", request_id, request_id):
                await self.try_(client.verify(started, guess, request_id=call_id))
            for call_id in ("", new_id()):
                await self.try_(client.resend(started, request_id=call_id))
            await self.try_(client.mark_sent(started))
            await self.try_(client.get(started))
            by_token = ev.GetEmailVerificationRequest(email_verification_token=started.email_verification_token)
            await self.try_(client.verifications.GetEmailVerification(by_token))
            for call_id in (request_id, new_id(), ""):
                await self.try_(client.verify(started, request_id=call_id))
            for _ in range(2):
                await self.try_(client.cancel(cancelled))
            cancel = ev.CancelEmailVerificationRequest(email_verification_token=cancelled.email_verification_token)
            await self.try_(client.verifications.CancelEmailVerification(cancel))
            await self.try_(client.verify(cancelled))
        mailed = await self.try_(client.start_by_mail(email=self.address(), locale="de", request_id=new_id()))
        if mailed is not None:
            await self.try_(client.resend(mailed))
            await self.try_(client.get(mailed))
            await self.try_(client.verify(mailed, "000000"))

    async def malformed(self) -> None:
        """Make calls that are refused for their form, with secrets in them."""
        client, secrets = self.client, self.canaries.secrets
        recovery = ott.TOKEN_TYPE_RECOVERY
        for link in ("canary-of-a-link-that-is-too-short", "canary-of-a-link-with-ümläuts" + "x" * 14, "x" * 42 + "!"):
            secrets.add(link)
            await self.try_(client.tokens.ConsumeToken(ott.ConsumeTokenRequest(token_type=recovery, link_secret=link)))
            await self.try_(client.tokens.CheckToken(ott.CheckTokenRequest(link_secret=link)))
            token = secrets_add(secrets, link * 3)
            await self.try_(client.verifications.ResendCode(ev.ResendCodeRequest(email_verification_token=token)))
            verify = ev.VerifyCodeRequest(email_verification_token=token, code="12x456")
            await self.try_(client.verifications.VerifyCode(verify))
        for code in ("canary-of-a-code", "77777777777", "1234 67890", "\uff11\uff12\uff13\uff14\uff15\uff16"):
            secrets.add(code)
            typed = ott.CodeCredential(relates_to=self.address(), code=code)
            await self.try_(client.tokens.ConsumeToken(ott.ConsumeTokenRequest(token_type=recovery, code=typed)))
            typed = ott.CodeCredential(user_id="no-user", code=code)
            await self.try_(client.tokens.CheckToken(ott.CheckTokenRequest(token_type=recovery, code=typed)))
        for address in (self.address() * 30, self.address() + "\0", self.address() + "\n", self.address() + "\uff20x"):
            self.canaries.address(address)
            await self.try_(client.issue(relates_to=address))
            send = ev.SendEmail(email=address)
            await self.try_(
                client.verifications.StartEmailVerification(
                    ev.StartEmailVerificationRequest(user_id=new_id(), send_email=send)
                )
            )
        # No message at all: the string is not UTF-8, and the rest is cut off.
        garbage = secrets_add(secrets, "canary-of-garbage-in-a-request").encode()
        for path in ("OneTimeTokenService/ConsumeToken", "EmailVerificationService/VerifyCode"):
            call: Any = self.channel.unary_unary(f"/onetime.v1.{path}")
            for raw in (garbage, b"\x12\xff" + garbage, b"\x0a\x20\xff\xfe" + garbage + b"\xff"):
                await self.try_(call(raw))
        # In a hurry.
        issued = await self.try_(client.issue(digits=10, relates_to=self.address()))
        for seconds in (0.0001, 0.002, 0.004):
            if issued is not None:
                await self.try_(client.tokens.ConsumeToken(consume_request(issued), timeout=seconds))

    async def everything(self) -> None:
        """Make every kind of call."""
        await self.one_time_tokens(*LABELS)
        await self.email_verifications(4)
        await self.malformed()


def secrets_add(secrets: set[str], secret: str) -> str:
    """Remember a secret, and return it."""
    secrets.add(secret)
    return secret


FAULTS: Final = (
    (
        "alter table onetime.one_time_token_states rename column ttl to elsewhere",
        "alter table onetime.one_time_token_states rename column elsewhere to ttl",
    ),
    (
        "alter table onetime.email_verification_states rename column delivery to elsewhere",
        "alter table onetime.email_verification_states rename column elsewhere to delivery",
    ),
    (
        "alter table onetime.outbox rename to elsewhere",
        "alter table onetime.elsewhere rename to outbox",
    ),
    (
        "alter table onetime.receipts rename to elsewhere",
        "alter table onetime.elsewhere rename to receipts",
    ),
    (
        """
        create function public.fails() returns trigger language plpgsql as
        $$ begin raise exception 'the row is %', new using detail = 'the row is ' || new::text; end $$;
        create trigger fails before insert or update on public.email_verification_tokens
        for each row execute function public.fails()
        """,
        "drop function public.fails() cascade",
    ),
    (
        # Too short for what we store; the error's DETAIL quotes the row.
        "alter table public.email_verification_tokens add constraint short check (length(code) < 6) not valid",
        "alter table public.email_verification_tokens drop constraint short",
    ),
)
"""What makes statements fail in ways that nobody foresaw, and what undoes it."""


@pytest.fixture
def canaries(keys_file: Path) -> Canaries:
    """What must not be found, from the start."""
    return Canaries({PASSWORD, *(line.split()[1] for line in keys_file.read_text("ascii").splitlines())})


async def test_nothing_leaks(
    serve: Serve, migrated_url: str, canaries: Canaries, log_statements: Callable[[str], Path]
) -> None:
    """After all kinds of calls and failures no secret is anywhere, and addresses are in `relates_to` alone."""
    postgres_log = log_statements(migrated_url)
    log_start = postgres_log.stat().st_size
    parts = urlsplit(migrated_url)
    url = urlunsplit(parts._replace(netloc=parts.netloc.replace("@", f":{PASSWORD}@")))
    # The clean-up runs too, and there is too little room for some of the calls.
    crowded = {
        "cleanup_probability": 1,
        "argon2_threads": 1,
        "argon2_queue": 0,
        "argon2_memory_kib": 8192,  # so that two of twenty hashes are sure to meet
        "pool_size": 4,
        # Where nobody is: addresses stay in the outbox, and the courier has much to tell.
        "smtp_url": f"smtp://app:{PASSWORD}@127.0.0.1:1",
    }
    places: dict[str, bytes] = {}
    async with (
        asyncio.timeout(2 * TIMEOUT_S),
        serve(url, log_level="debug", drain_delay="0s", **crowded) as server,
        server.channel() as channel,
    ):
        scenario = Scenario(channel, canaries)
        await scenario.everything()
        assert scenario.ends.keys() >= {
            "OK", "INVALID_REQUEST", "TOKEN_NOT_FOUND", "TOKEN_USED", "TOKEN_CANCELLED", "CODE_MISMATCH",
            "ATTEMPTS_EXHAUSTED", "REQUEST_ID_REUSED", "DEADLINE_EXCEEDED",
        }  # fmt: skip
        assert "INTERNAL" not in scenario.ends
        with connected(migrated_url) as database:
            for fault, cure in FAULTS:
                before = scenario.ends["INTERNAL"]
                database.execute(fault)
                await scenario.one_time_tokens(ott.TOKEN_TYPE_RECOVERY)
                await scenario.email_verifications(1)
                database.execute(cure)
                assert scenario.ends["INTERNAL"] > before, fault
            await asyncio.gather(*(scenario.try_(scenario.client.issue(digits=10)) for _ in range(20)))
            assert scenario.ends["OVERLOADED"] > 0
            await _lock_out(scenario, database, migrated_url)
            assert scenario.ends["DATABASE_UNAVAILABLE"] > 0

            places["the metrics"] = await asyncio.to_thread(_page, server.metrics_url)
            places |= _command_lines(server)
            _check_rows(database, scenario)
        places["the dump"] = await _dump(migrated_url)
        places["PostgreSQL's log"] = _since(postgres_log, log_start)
    places["the service's log"] = server.log.read_bytes()
    places["an error"] = b"\n".join(scenario.errors)

    # The control: the log and PostgreSQL's log are those of these calls.
    assert places["the service's log"].count(b'"IssueToken"') > 100
    assert b"Traceback" in places["the service's log"]
    assert places["PostgreSQL's log"].count(b"insert into auth.one_time_tokens") > 100
    assert b"INSERT INTO auth.one_time_tokens" in places["the dump"]
    # Rows with their addresses are looked at by `_check_rows`.
    ours = [line for line in places["the dump"].splitlines() if b"INSERT INTO auth.one_time_tokens" not in line]
    places["the dump"] = b"\n".join(ours)
    assert {place: found for place, text in places.items() if (found := canaries.found_in(text))} == {}


def _since(log: Path, start: int) -> bytes:
    with log.open("rb") as file:
        file.seek(start)
        return file.read()


def _page(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310 - our own, over HTTP
        content: bytes = page.read()
        return content


def _command_lines(server: OnetimeServer) -> dict[str, bytes]:
    """Return the command line of the server, and of every other process that may be seen here."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[f"the command line of process {path.parent.name}"] = path.read_bytes()
        except OSError:
            continue
    assert b"serve" in lines[f"the command line of process {server.process.pid}"]
    return lines


async def _lock_out(scenario: Scenario, database: Database, url: str) -> None:
    """Let the service lose its database for a while."""
    name = sql.Identifier(urlsplit(url).path.removeprefix("/"))
    # Not by itself, which is connected to it.
    with connected(urlunsplit(urlsplit(url)._replace(path="/postgres"))) as maintenance:
        maintenance.execute(sql.SQL("alter database {} allow_connections false").format(name))
        database.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        await asyncio.gather(
            *(
                scenario.try_(call)
                for call in (
                    scenario.client.issue(relates_to=scenario.address()),
                    scenario.client.issue(relates_to=scenario.address(), digits=10),
                    *(scenario.client.consume(each) for each in await _links(scenario)),
                    *(scenario.client.verify(each) for each in scenario.started[:3]),
                )
            )
        )
        maintenance.execute(sql.SQL("alter database {} allow_connections true").format(name))


async def _links(scenario: Scenario) -> list[ott.IssueTokenResponse]:
    """Make up links that nobody issued."""
    links = []
    for letter in "abc":
        token = ott.OneTimeToken(token_type=ott.TOKEN_TYPE_RECOVERY)
        secret = secrets_add(scenario.canaries.secrets, letter + "canary-of-a-link-that-nobody-issued" + "0" * 7)
        links.append(ott.IssueTokenResponse(token=token, secret=secret))
    return links


async def _dump(url: str) -> bytes:
    """Return the whole database as `pg_dump` writes it."""
    process = await asyncio.create_subprocess_exec(
        *(str(wheel_programs() / "pg_dump"), "--inserts", f"--dbname={url}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors
    return output


def _check_rows(database: Database, scenario: Scenario) -> None:
    """See that no row holds its own code, and that addresses are in `relates_to` alone, in their normal form."""
    codes = {
        str(row["id"]): row["code"] for row in database.execute("select id, code from public.email_verification_tokens")
    }
    kept = {each.verification.id: each.code for each in scenario.started if each.verification.id in codes}
    assert len(kept) >= 8
    # One in a million is sealed to itself.
    assert sum(codes[row_id] == code for row_id, code in kept.items()) <= 1

    # Mails were queued; their addresses, sealed, are looked for in the dump.
    assert database.execute("select from onetime.outbox where sealed_address is not null").rowcount > 0
    rows = database.execute("select t.*, t::text as whole from auth.one_time_tokens as t").fetchall()
    assert len(rows) >= len(LABELS) * 3
    for row in rows:
        address, whole = str(row.pop("relates_to")), str(row.pop("whole"))
        assert address in scenario.canaries.addresses | {"ada@example.org"}
        assert address == address.strip().lower()
        rest = [*map(str, row.values()), whole.replace(address, "", 1)]
        assert scenario.canaries.found_in("\n".join(rest).encode()) == []


async def _meet_a_hosts_rules(serve: Serve, url: str) -> tuple[OnetimeServer, Scenario]:
    """Make calls that a host's own index and column refuse, of which PostgreSQL's errors quote the row."""
    async with serve(url, drain_delay="0s") as server, server.channel() as channel:
        scenario = Scenario(channel, Canaries())
        with connected(url) as database:
            database.execute("create unique index of_the_host on auth.one_time_tokens (relates_to)")
            address = scenario.address()
            for _ in range(2):
                await scenario.try_(scenario.client.issue(relates_to=address))
            database.execute("drop index auth.of_the_host")
            database.execute("alter table auth.one_time_tokens add column of_the_host text")
            database.execute("delete from auth.one_time_tokens")
            database.execute("alter table auth.one_time_tokens alter column of_the_host set not null")
            await scenario.try_(scenario.client.issue(relates_to=scenario.address()))
    assert scenario.ends["INTERNAL"] == 2
    return server, scenario


async def test_an_error_of_the_database_quotes_no_row(serve: Serve, migrated_url: str) -> None:
    """Where a host's own index or column makes a statement fail, neither the caller nor the log hears of the row."""
    server, scenario = await _meet_a_hosts_rules(serve, migrated_url)
    assert b"UniqueViolation" in server.log.read_bytes()
    assert scenario.canaries.found_in(server.log.read_bytes()) == []
    assert scenario.canaries.found_in(b"\n".join(scenario.errors)) == []


async def test_an_error_tells_postgresqls_log_no_address(
    serve: Serve, migrated_url: str, log_statements: Callable[[str], Path]
) -> None:
    """Where a host's own index or column makes a statement fail, PostgreSQL's log does not quote the row."""
    log = log_statements(migrated_url)
    start = log.stat().st_size
    _, scenario = await _meet_a_hosts_rules(serve, migrated_url)
    assert scenario.canaries.found_in(_since(log, start)) == []


async def test_a_secret_in_a_wrong_field_is_not_logged(serve: Serve, migrated_url: str) -> None:
    """A caller that mixes up two fields, and gives a secret for an id, does not put it into the log."""
    async with serve(migrated_url, drain_delay="0s", log_level="debug") as server, server.channel() as channel:
        canaries = Canaries()
        scenario = Scenario(channel, canaries)
        started = await scenario.client.start()
        issued = await scenario.client.issue()
        token = secrets_add(canaries.secrets, started.email_verification_token)
        secret = secrets_add(canaries.secrets, issued.secret)
        address = canaries.address("canary@example.org")
        verifications, tokens = scenario.client.verifications, scenario.client.tokens
        for call in (
            verifications.MarkCodeSent(ev.MarkCodeSentRequest(id=token)),
            verifications.GetEmailVerification(ev.GetEmailVerificationRequest(id=token)),
            verifications.CancelEmailVerification(ev.CancelEmailVerificationRequest(id=token)),
            verifications.VerifyCode(ev.VerifyCodeRequest(email_verification_token=token, request_id=token)),
            tokens.ListTokens(ott.ListTokensRequest(user_id=address)),
            tokens.RevokeTokens(ott.RevokeTokensRequest(user_id=secret)),
            tokens.IssueToken(ott.IssueTokenRequest(user_id=address, relates_to=address, request_id=secret)),
        ):
            await scenario.try_(call)
    assert scenario.ends == {"INVALID_REQUEST": 7}
    assert canaries.found_in(b"\n".join(scenario.errors)) == []
    assert canaries.found_in(server.log.read_bytes()) == []


# Objects


def test_objects_show_no_secret(tmp_path: Path) -> None:
    """What is printed of the objects that hold secrets, by a debugger or a traceback, shows none."""
    key = new_key()
    ring = Keyring([key])
    url = f"postgresql://onetime:{PASSWORD}@localhost/app"
    keys_file = tmp_path / "keys"
    keys_file.write_text(ring.format(), "ascii")
    in_file = Settings(database_url=url, keys_file=keys_file)
    in_environment = Settings(database_url=url, keys=ring.format())
    pool = Pool(url, pool_size=1)
    objects: list[object] = [
        key,
        ring,
        load_keyring(in_file),
        load_keyring(in_environment),
        ring.code_hasher(argon2_parameters(64, 1, 1)),
        ring.code_hasher(None),
        in_file,
        in_environment,
        in_environment.model_dump(exclude={"database_url"}),
        pool,
        pool.pool,
    ]
    canaries = Canaries({PASSWORD, *(line.split()[1] for line in ring.format().splitlines())})
    for each in objects:
        for text in _texts(each):
            assert canaries.found_in(text.encode()) == [], type(each)
            assert not any(secret in text for secret in _sub_keys(key)), type(each)
    # The control: it is there to be shown.
    assert canaries.found_in(ring.format().encode())
    assert canaries.found_in(in_file.database_url.encode())
    assert in_file.lifetime("recovery_token")[0] == timedelta(minutes=15)


def _texts(each: object) -> Iterator[str]:
    """Give what is printed of an object."""
    yield repr(each)
    yield str(each)
    yield f"{each}"
    yield repr([each])


def _sub_keys(key: Key) -> list[str]:
    """Return the bytes of a key and of what is derived from it, as `repr` would show them."""
    secrets = [key.secret, key.link, key.code, key.email_token, key.email_code, key.fingerprint]
    return [repr(secret)[2:-1] for secret in secrets]
