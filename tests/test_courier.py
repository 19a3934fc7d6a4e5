import asyncio
import contextlib
import json
import re
import signal
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import grpc
import grpc.aio
import pytest
from calls import (
    Client,
    connected,
    contents,
    ended,
    expire,
    moment,
    new_id,
    open_channel,
    reason,
    refused,
    seconds,
    serving,
    until,
    wrong,
)
from certificates import Authority, ip
from conftest import OnetimeServer, PostgresServer, Serve, free_port
from google.protobuf.duration_pb2 import Duration
from mailserver import DIE, Hold, Mail, MailServer, Step, tls_context
from onetime.v1 import email_verification_pb2 as pb
from onetime.v1.admin_pb2 import PurgeUserRequest
from psycopg import sql
from psycopg.rows import DictRow
from test_leaks import Canaries

from service.devdb import wheel_programs

TIMEOUT_S: Final = 60.0
AT_ONCE_S: Final = 2.0
"""Far more than a mail takes, and far less than until the courier looks by itself."""
PASSWORD: Final = "canary-of-a-password"

QUEUED: Final = pb.DELIVERY_STATE_QUEUED
SENT: Final = pb.DELIVERY_STATE_SENT
FAILED: Final = pb.DELIVERY_STATE_FAILED

Started = pb.StartEmailVerificationResponse


# What the tests run on


@dataclass(frozen=True, slots=True)
class Office:
    """A service, its database, and the mail server that it sends by."""

    client: Client
    url: str
    mail: MailServer
    log: Path
    metrics_url: str = ""

    def rows(self, started: Started | None = None) -> list[DictRow]:
        """Return the rows of the outbox, or that of one verification."""
        with connected(self.url) as database:
            return database.execute(
                "select * from onetime.outbox where %(id)s::uuid is null or verification_id = %(id)s",
                {"id": started.verification.id if started else None},
            ).fetchall()

    def execute(self, statement: str, *parameters: object) -> None:
        """Change something."""
        with connected(self.url) as database:
            database.execute(statement.encode(), parameters)

    def let_time_pass(self) -> None:
        """Let the times come at which something is to be done about mails that are queued."""
        self.execute(
            "update onetime.outbox set due_at = clock_timestamp() where state = 'queued' and due_at is not null"
        )

    async def start(self, address: str, **more: Any) -> Started:  # noqa: ANN401 - of `start`
        """Start a verification, whose code is mailed to an address."""
        return await start(self.client, address, **more)

    async def stands(self, started: Started, state: int, failure: int = pb.DELIVERY_FAILURE_UNSPECIFIED) -> None:
        """Wait until the mail of a verification stands so."""
        await stands(self.client, started, state, failure)

    async def one_more(self) -> None:
        """Send one more mail: with it, the courier has seen all that was queued before and is due."""
        address = new_address()
        await self.start(address)
        await self.mailed(address)

    async def mailed(self, address: str, count: int = 1) -> Mail:
        """Wait until so many mails to an address have arrived, and return the newest; there are no more."""
        await until(lambda: len(self.mail.to(address)) >= count)
        assert len(self.mail.to(address)) == count
        return self.mail.to(address)[-1]

    def logged(self, started: Started) -> list[Mapping[str, str]]:
        """Return what the log tells of the mails of a verification."""
        lines = [json.loads(line) for line in self.log.read_text("utf-8").splitlines(keepends=True) if line[-1] == "\n"]
        return [
            line for line in lines if line["event"] == "mail" and line["verification_id"] == started.verification.id
        ]

    def metrics(self) -> str:
        """Return the page of the metrics."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as page:  # noqa: S310 - our own, over HTTP
            text: str = page.read().decode()
        return text

    def counted(self) -> Counter[tuple[str, str]]:
        """Return how many tries ended in which way, by outcome and failure."""
        line = r'^onetime_mails_total\{failure="(\w*)",outcome="(\w+)"\} (\S+)$'
        found = re.findall(line, self.metrics(), re.MULTILINE)
        return Counter({(outcome, failure): int(float(count)) for failure, outcome, count in found})


@pytest.fixture(scope="module")
def shared_url(postgres_18: PostgresServer, template_url: str) -> Iterator[str]:
    """One database for most tests of this module, each of which takes users and addresses of its own."""
    with postgres_18.database(template_url) as url:
        yield url


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the keys and the log of the server on it are."""
    return tmp_path_factory.mktemp("shared")


@dataclass(frozen=True, slots=True)
class _Shared:
    target: str
    log: Path
    mail: MailServer
    metrics_url: str


@pytest.fixture(scope="module")
def shared(shared_url: str, shared_folder: Path) -> Iterator[_Shared]:
    """One server for most tests of this module, and its mail server: patient, so that mails can be held."""
    metrics = f"127.0.0.1:{free_port()}"
    with (
        MailServer() as mail,
        serving(
            shared_url,
            shared_folder,
            smtp_url=mail.url(timeout="10s", connections=4),
            mail_product="Example",
            metrics_listen=metrics,
        ) as target,
    ):
        (log,) = shared_folder.glob("server-*.log")
        yield _Shared(target, log, mail, f"http://{metrics}/metrics")


@pytest.fixture
async def office(shared: _Shared, shared_url: str) -> AsyncIterator[Office]:
    """The shared server; at the end its mail server behaves again, and nothing is left to be sent."""
    async with open_channel(shared.target) as channel:
        office = Office(Client(channel), shared_url, shared.mail, shared.log, shared.metrics_url)
        yield office
        shared.mail.behave()
        office.execute("delete from onetime.outbox")


@contextlib.asynccontextmanager
async def office_of(server: OnetimeServer, url: str, mail: MailServer) -> AsyncIterator[Office]:
    """Return the office of a test's own server."""
    async with server.channel() as channel:
        yield Office(Client(channel), url, mail, server.log, server.metrics_url)


@pytest.fixture
def mail() -> Iterator[MailServer]:
    """A mail server of the test's own."""
    with MailServer() as server:
        yield server


def new_address() -> str:
    """Return an address that no other test knows."""
    return f"ada.{new_id()}@example.org"


async def start(
    client: Client,
    address: str,
    *,
    user_id: str = "",
    ttl: Duration | None = None,
    request_id: str = "",
    locale: str = "",
) -> Started:
    """Start a verification, whose code is mailed to an address."""
    request = pb.StartEmailVerificationRequest(
        user_id=user_id or new_id(),
        send_email=pb.SendEmail(email=address, locale=locale),
        ttl=ttl,
        request_id=request_id,
    )
    return await client.verifications.StartEmailVerification(request)


async def stands(client: Client, started: Started, state: int, failure: int = pb.DELIVERY_FAILURE_UNSPECIFIED) -> None:
    """Wait until the mail of a verification stands so."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            verification = await client.get(started)
            if (verification.delivery_state, verification.delivery_failure) == (state, failure):
                return
            await asyncio.sleep(0.02)


def code_in(mail: Mail) -> str:
    """Return the code in a mail, which is the same in its subject, its text and its HTML."""
    texts = (
        str(mail.message["Subject"]),
        mail.body("plain"),
        re.sub(r"<style.*?</style>|<[^>]*>", " ", mail.body("html")),
    )
    (code,) = {str(code) for text in texts for code in re.findall(r"(?<![\w#.])\d{6}(?!\w)", text)}
    return code


def message_id(mail: Mail) -> str:
    """Return the Message-ID of a mail."""
    return str(mail.message["Message-ID"])


# Sent


async def test_the_code_is_in_the_mail(office: Office) -> None:
    """The code is in the mail and not in the answer; until the server has accepted the mail, nobody says it is sent."""
    address = new_address()
    with office.mail.holding("end") as hold:
        started = await office.start(address, locale="de-AT")
        assert started.code == ""
        assert started.verification.delivery_state == QUEUED
        await until(lambda: hold.count == 1)
        verification = await office.client.get(started)
        assert (verification.code_sent, verification.delivery_state) == (False, QUEUED)
        mark = office.client.mark_sent(started)
        assert (await refused(mark)).violations.keys() == {"id"}
        assert office.mail.to(address) == []
    await office.stands(started, SENT)
    verification = await office.client.get(started)
    assert verification.code_sent
    assert (await refused(office.client.mark_sent(started))).reason == "INVALID_REQUEST"
    mail = await office.mailed(address)
    assert mail.message["To"] == address
    assert mail.message["Content-Language"] == "de"
    assert "15 Minuten" in mail.body("plain")
    used = await office.client.verify(started, code_in(mail))
    assert (used.state, used.delivery_state, used.code_sent) == (pb.STATE_USED, SENT, True)
    # All is done with the address.
    (row,) = office.rows(started)
    assert (row["sealed_address"], row["due_at"]) == (None, None)


async def test_a_start_wakes_the_courier(office: Office) -> None:
    """A mail goes out at once, and not when the courier next looks by itself; however many there are."""
    await office.one_more()
    async with asyncio.timeout(AT_ONCE_S):
        await office.one_more()
    addresses = [new_address() for _ in range(20)]
    await asyncio.gather(*(office.start(address) for address in addresses))
    async with asyncio.timeout(2 * AT_ONCE_S):
        for address in addresses:
            await office.mailed(address)


async def test_a_free_place_is_taken_at_once(office: Office) -> None:
    """While some mails are stuck, each place that becomes free is taken by a mail that waits, at once."""
    holds = []
    for _ in range(4):
        holds.append(hold := Hold())
        office.mail.misbehave("end", hold, times=1)
        await office.start(new_address())
        await until(lambda: holds[-1].count == 1)
    waiting = new_address()
    await office.start(waiting)
    holds[0].release()
    async with asyncio.timeout(AT_ONCE_S):
        await office.mailed(waiting)


async def test_without_a_mail_server(office: Office, serve: Serve, shared_folder: Path) -> None:
    """Without a mail server send_email is refused, and so is to send again what was sent before; nothing is written."""
    address = new_address()
    started = await office.start(address)
    await office.stands(started, SENT)
    async with serve(office.url, keys_file=shared_folder / "keys") as server, server.channel() as channel:
        client = Client(channel)
        with connected(office.url) as database:
            before = contents(database), office.rows()
            for request_id in ("", new_id()):
                assert await reason(start(client, new_address(), request_id=request_id)) == "MAIL_NOT_CONFIGURED"
                assert await reason(client.resend(started, request_id=request_id)) == "MAIL_NOT_CONFIGURED"
            assert (contents(database), office.rows()) == before
        # What needs no mail goes on.
        verification = await client.verify(started, code_in(await office.mailed(address)))
        assert verification.state == pb.STATE_USED


# Not sent, or not at once


async def test_a_mail_server_that_was_down(serve: Serve, migrated_url: str, mail: MailServer) -> None:
    """While the mail server is down mails are queued, and it is told why; when it is up, each is sent once."""
    smtp_url = mail.url(timeout="500ms")
    mail.stop()
    async with serve(migrated_url, smtp_url=smtp_url) as server, office_of(server, migrated_url, mail) as office:
        addresses = [new_address() for _ in range(5)]
        started = [await office.start(address) for address in addresses]
        for each in started:
            await office.stands(each, QUEUED, pb.DELIVERY_FAILURE_UNREACHABLE)
        mail.start()
        for each, address in zip(started, addresses, strict=True):
            await office.stands(each, SENT)
            await office.mailed(address)


async def test_a_mail_server_that_hangs(serve: Serve, migrated_url: str, mail: MailServer) -> None:
    """Wherever the mail server stops to answer, the mail is tried again, and other mails go on."""
    steps: tuple[Step, ...] = ("connect", "ehlo", "mail", "rcpt", "data", "content", "end")
    smtp_url = mail.url(timeout="500ms", connections=len(steps))
    async with serve(migrated_url, smtp_url=smtp_url) as server, office_of(server, migrated_url, mail) as office:
        holds = [Hold() for _ in steps]
        for step, hold in zip(steps, holds, strict=True):
            mail.misbehave(step, hold, times=1)
        addresses = [new_address() for _ in steps]
        started = await asyncio.gather(*(office.start(address) for address in addresses))
        for each, address in zip(started, addresses, strict=True):
            await office.stands(each, SENT)
            await office.mailed(address)
        assert [hold.count for hold in holds] == [1] * len(steps)
        assert office.counted() == {("retry", "unreachable"): len(steps), ("sent", ""): len(steps)}


@pytest.mark.parametrize(
    ("step", "reply", "failure"),
    [
        ("rcpt", "550 5.1.1 No such mailbox", pb.DELIVERY_FAILURE_ADDRESS_REFUSED),
        ("mail", "550 5.7.1 Not from there", pb.DELIVERY_FAILURE_MESSAGE_REFUSED),
        ("data", "554 5.5.1 No", pb.DELIVERY_FAILURE_MESSAGE_REFUSED),
        ("end", "554 5.7.1 Spam", pb.DELIVERY_FAILURE_MESSAGE_REFUSED),
    ],
)
async def test_a_mail_that_is_refused_for_good(office: Office, step: Step, reply: str, failure: int) -> None:
    """It is given up at once; contract, metric and log tell its class. ResendCode tries anew."""
    name = pb.DeliveryFailure.Name(failure).removeprefix("DELIVERY_FAILURE_").lower()  # type: ignore[arg-type] # any is right
    before = office.counted()
    address = new_address()
    office.mail.misbehave(step, reply)
    started = await office.start(address)
    await office.stands(started, FAILED, failure)
    assert office.counted() - before == {("failed", name): 1}
    assert not (await office.client.get(started)).code_sent
    (line,) = office.logged(started)
    assert (line["outcome"], line["failure"], line["smtp_code"]) == ("failed", name, reply[:3])
    office.mail.behave()
    resent = await office.client.resend(started)
    assert (resent.verification.delivery_state, resent.verification.delivery_failure) == (QUEUED, 0)
    await office.stands(started, SENT)
    used = await office.client.verify(started, code_in(await office.mailed(address)))
    assert used.state == pb.STATE_USED


@pytest.mark.parametrize("step", ["connect", "mail", "rcpt", "data", "end"])
async def test_a_mail_that_is_deferred(office: Office, step: Step) -> None:
    """It is tried again, and told meanwhile; when it is sent, that is forgotten."""
    before = office.counted()
    address = new_address()
    office.mail.hang_up()
    office.mail.misbehave(step, "451 4.3.0 Later")
    started = await office.start(address)
    await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_DEFERRED)
    office.mail.behave()
    await office.stands(started, SENT)
    await office.mailed(address)
    assert (office.counted() - before)["sent", ""] == 1
    assert (office.counted() - before)["retry", "deferred"] >= 1


@pytest.mark.parametrize("wrong", ["password", "no STARTTLS", "certificate"])
async def test_a_service_that_is_refused(
    serve: Serve, migrated_url: str, mail: MailServer, tmp_path: Path, wrong: str
) -> None:
    """No mail is given up for what the operator can mend. The password is in no log."""
    authority = Authority()
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.certificate)
    right = tls_context(authority.issue(ip("127.0.0.1")), tmp_path)
    mail.login = ("onetime", PASSWORD[::-1] if wrong == "password" else PASSWORD)
    mail.tls = "none" if wrong == "no STARTTLS" else "starttls"
    mail.context = tls_context(Authority().issue(ip("127.0.0.1")), tmp_path) if wrong == "certificate" else right
    smtp_url = mail.url(user="onetime", password=PASSWORD, tls="starttls", ca=ca, timeout="5s")
    address = new_address()
    async with (
        serve(migrated_url, smtp_url=smtp_url, log_level="debug") as server,
        office_of(server, migrated_url, mail) as office,
    ):
        started = await office.start(address)
        await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_SERVICE_REFUSED)
        assert not mail.commands["MAIL"]
        mail.login, mail.tls, mail.context = ("onetime", PASSWORD), "starttls", right
        await office.stands(started, SENT)
        await office.mailed(address)
        assert office.counted()["retry", "service_refused"] >= 1
    assert Canaries({PASSWORD}).found_in(server.log.read_bytes()) == []


async def test_a_mail_is_given_up(serve: Serve, migrated_url: str, mail: MailServer) -> None:
    """After as many tries as are set a mail is given up, also where the last one ended with its server."""
    settings = {"smtp_url": mail.url(timeout="10s"), "mail_tries": 2}
    async with serve(migrated_url, **settings) as server, office_of(server, migrated_url, mail) as office:
        mail.misbehave("rcpt", "451 4.3.0 Later")
        started = await office.start(new_address())
        await until(lambda: len(office.logged(started)) == 2)
        assert [line["outcome"] for line in office.logged(started)] == ["retry", "failed"]
        await office.stands(started, FAILED, pb.DELIVERY_FAILURE_DEFERRED)
        assert office.counted() == {("retry", "deferred"): 1, ("failed", "deferred"): 1}

        mail.misbehave("rcpt", "451 4.3.0 Later", times=1)
        address = new_address()
        with mail.holding("end") as hold:
            started = await office.start(address)
            await until(lambda: hold.count == 1)
            await server.kill()
            await until(lambda: not mail.open)
        office.let_time_pass()
    async with serve(migrated_url, **settings) as server, office_of(server, migrated_url, mail) as office:
        await office.stands(started, FAILED, pb.DELIVERY_FAILURE_DEFERRED)
        assert office.counted() == {("failed", "deferred"): 1}
        assert mail.mails == []


@pytest.mark.parametrize("step", ["content", "end"])
async def test_a_mail_whose_end_is_not_known(office: Office, step: Step) -> None:
    """Where the server died in a mail, it is sent again by the same name: who gets it twice sees that it is one."""
    address = new_address()
    office.mail.misbehave(step, DIE, times=1)
    started = await office.start(address)
    await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_UNREACHABLE)
    assert not (await office.client.get(started)).code_sent
    (row,) = office.rows(started)
    await office.stands(started, SENT)
    newest = await office.mailed(address, 1 if step == "content" else 2)
    assert message_id(newest).startswith(f"<{row['message_id']}@")
    assert newest.message["Date"].datetime == row["queued_at"].replace(microsecond=0)
    assert len({(message_id(each), each.message["Date"], code_in(each)) for each in office.mail.to(address)}) == 1


# Not wanted any more

_MAX_ATTEMPTS: Final = 5


async def _cancel(office: Office, started: Started, code: str) -> None:
    del code
    await office.client.cancel(started)


async def _use(office: Office, started: Started, code: str) -> None:
    await office.client.verify(started, code)


async def _let_expire(office: Office, started: Started, code: str) -> None:
    del code
    with connected(office.url) as database:
        expire(database, started)


async def _lock(office: Office, started: Started, code: str) -> None:
    for n in range(_MAX_ATTEMPTS):
        assert await reason(office.client.verify(started, wrong(code, by=n + 1))) == "CODE_MISMATCH"


async def _purge(office: Office, started: Started, code: str) -> None:
    del code
    await office.client.admin.PurgeUser(PurgeUserRequest(user_id=started.verification.user_id))


async def _host_deletes(office: Office, started: Started, code: str) -> None:
    del code
    office.execute("delete from public.email_verification_tokens where id = %s", started.verification.id)


_End = Callable[[Office, Started, str], Awaitable[None]]
_ENDS: Final[Mapping[str, _End]] = {
    "cancelled": _cancel,
    "used": _use,
    "expired": _let_expire,
    "locked": _lock,
    "purged": _purge,
    "deleted by the host": _host_deletes,
}
EVERY_END: Final = pytest.mark.parametrize("end", _ENDS.values(), ids=_ENDS)


async def _is_over(office: Office, started: Started, end: _End) -> None:
    """See that an unsent mail's verification is over, and its address forgotten."""
    if end is _purge:
        assert office.rows(started) == []
        return
    await until(lambda: office.rows(started)[0]["sealed_address"] is None)
    (row,) = office.rows(started)
    assert (row["due_at"], row["state"], row["failure"]) == (None, "failed", "verification_over")
    if end is not _host_deletes:
        await office.stands(started, FAILED, pb.DELIVERY_FAILURE_VERIFICATION_OVER)


@EVERY_END
async def test_no_mail_that_is_queued_for_a_verification_that_is_over(office: Office, end: _End) -> None:
    """What is queued when its verification ends is not sent any more, and the address is forgotten."""
    address = new_address()
    started = await office.start(address)
    code = code_in(await office.mailed(address))
    await office.stands(started, SENT)
    office.mail.misbehave("rcpt", "451 4.2.1 Later")
    await office.client.resend(started)
    await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_DEFERRED)
    (row,) = office.rows(started)
    assert row["sealed_address"] is not None
    await end(office, started, code)
    office.mail.behave()
    office.let_time_pass()
    await office.one_more()
    await _is_over(office, started, end)
    await office.mailed(address)


@EVERY_END
async def test_no_mail_that_is_on_its_way_for_a_verification_that_is_over(office: Office, end: _End) -> None:
    """What has been claimed, but not handed over, when its verification ends is not sent either."""
    address = new_address()
    started = await office.start(address)
    code = code_in(await office.mailed(address))
    await office.stands(started, SENT)
    with office.mail.holding("rcpt") as hold:
        await office.client.resend(started)
        await until(lambda: hold.count == 1)
        before = office.mail.commands.copy()
        await end(office, started, code)
    await until(lambda: any(office.mail.commands[each] > before[each] for each in ("RSET", "DATA")))
    assert office.mail.commands["DATA"] == before["DATA"]
    await until(lambda: [line["outcome"] for line in office.logged(started)][1:] == ["withdrawn"])
    office.let_time_pass()
    await office.one_more()
    await _is_over(office, started, end)
    await office.mailed(address)


@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "refused"])
async def test_a_verification_that_the_host_deletes_while_its_mail_is_sent(office: Office, *, accepted: bool) -> None:
    """The address is forgotten soon after, and does not wait for an end that nobody will tell of."""
    with office.mail.holding("end") as hold:
        started = await office.start(new_address())
        await until(lambda: hold.count == 1)
        await _host_deletes(office, started, "")
        hold.release("" if accepted else "554 No")
    await until(lambda: office.logged(started) != [])
    await office.one_more()
    await until(lambda: office.rows(started)[0]["sealed_address"] is None)
    (row,) = office.rows(started)
    assert (row["due_at"], row["state"]) == (None, "sent" if accepted else "failed")


async def test_an_address_is_forgotten_when_its_verification_expires(office: Office) -> None:
    """Until then it is kept, for ResendCode; then the courier looks for it by itself."""
    started = await office.start(new_address(), ttl=seconds(1.5))
    await office.stands(started, SENT)
    (row,) = office.rows(started)
    assert row["sealed_address"] is not None
    assert row["due_at"] == moment(started.verification.expire_time)
    await until(lambda: office.rows(started)[0]["sealed_address"] is None)
    assert office.rows(started)[0]["due_at"] is None
    verification = await office.client.get(started)
    assert (verification.state, verification.delivery_state) == (pb.STATE_EXPIRED, SENT)


# Sent again


async def test_a_code_that_is_sent_again(office: Office) -> None:
    """ResendCode sends the same code by a mail of a new name; a retry of it, or of the start, sends nothing."""
    address, user_id, request_id, resend_id = new_address(), new_id(), new_id(), new_id()
    await office.start(address, user_id=user_id, request_id=request_id)
    first = await office.mailed(address)
    started = await office.start(address, user_id=user_id, request_id=request_id)
    assert started.code == ""
    resent = [await office.client.resend(started, request_id=resend_id) for _ in range(2)]
    assert [each.code for each in resent] == ["", ""]
    second = await office.mailed(address, 2)
    await office.stands(started, SENT)
    await office.client.resend(started, request_id=resend_id)
    await office.one_more()
    await office.mailed(address, 2)
    assert code_in(first) == code_in(second)
    assert message_id(first) != message_id(second)
    assert (await office.client.verify(started, code_in(second))).state == pb.STATE_USED


async def test_a_code_that_may_not_be_sent_again(office: Office, serve: Serve, shared_folder: Path) -> None:
    """What is refused as too soon, or as too much, sends nothing."""
    address = new_address()
    started = await office.start(address)
    await office.mailed(address)
    settings = {"keys_file": shared_folder / "keys", "smtp_url": office.mail.url(timeout="10s")}
    async with serve(office.url, **settings, send_interval="1m") as server, server.channel() as channel:
        assert await reason(Client(channel).resend(started)) == "TOO_SOON"
    sent = 1
    while (how := await ended(office.client.resend(started))) == "OK":
        sent += 1
        await office.mailed(address, sent)
    assert how == "TOO_MANY_SENDS"
    more = start(office.client, address, user_id=started.verification.user_id)
    assert await reason(more) == "TOO_MANY_SENDS"
    await office.one_more()
    await office.mailed(address, sent)


async def test_a_code_that_is_sent_again_while_it_is_queued(office: Office) -> None:
    """Of a mail that was not sent yet, and the one in its place, one is sent."""
    address = new_address()
    office.mail.misbehave("rcpt", "451 4.2.1 Later")
    started = await office.start(address)
    await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_DEFERRED)
    (row,) = office.rows(started)
    await office.client.resend(started)
    office.mail.behave()
    office.let_time_pass()
    await office.one_more()
    await office.stands(started, SENT)
    await office.one_more()
    assert str(row["message_id"]) not in message_id(await office.mailed(address))


@pytest.mark.parametrize("reply", ["", "554 No", "451 Later", DIE], ids=["accepted", "refused", "deferred", "lost"])
async def test_what_is_heard_late_of_an_earlier_mail(office: Office, reply: str) -> None:
    """Whatever becomes of a mail in whose place another was sent does not count any more."""
    address = new_address()
    slow = Hold()
    office.mail.misbehave("end", slow, times=1)
    started = await office.start(address)
    await until(lambda: slow.count == 1)
    await office.client.resend(started)
    await office.stands(started, SENT)
    (row,) = office.rows(started)
    slow.release(reply)
    await until(lambda: len(office.logged(started)) == 2)
    await office.one_more()
    assert office.rows(started) == [row]
    verification = await office.client.get(started)
    assert (verification.delivery_state, verification.delivery_failure, verification.code_sent) == (SENT, 0, True)
    await office.mailed(address, 2 if reply in ("", DIE) else 1)
    assert len({message_id(each) for each in office.mail.to(address)}) == len(office.mail.to(address))


async def test_what_is_heard_late_while_the_next_is_queued(office: Office) -> None:
    """A mail that is accepted late makes the code a sent one, and is not the one that is to be sent."""
    address = new_address()
    slow = Hold()
    office.mail.misbehave("end", slow, times=1)
    started = await office.start(address)
    await until(lambda: slow.count == 1)
    office.mail.misbehave("rcpt", "451 4.2.1 Later")
    await office.client.resend(started)
    await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_DEFERRED)
    slow.release()
    await office.mailed(address)
    await until(lambda: [line["outcome"] for line in office.logged(started)].count("sent") == 1)
    verification = await office.client.get(started)
    assert (verification.delivery_state, verification.code_sent) == (QUEUED, True)
    office.mail.behave()
    await office.stands(started, SENT)
    await office.mailed(address, 2)


# Many servers, and their ends


async def test_each_mail_is_sent_once(office: Office, serve: Serve, shared_folder: Path) -> None:
    """Two servers with many mails send each of them once."""
    settings = {"keys_file": shared_folder / "keys", "smtp_url": office.mail.url(timeout="10s")}
    async with serve(office.url, **settings) as server, server.channel() as channel:
        clients = (office.client, Client(channel))
        slow = Hold()
        office.mail.misbehave("end", slow, times=2)
        addresses = [new_address() for _ in range(60)]
        started = [await start(clients[n], address) for n, address in enumerate(addresses[:2])]
        await until(lambda: slow.count == 2)
        # While these two are under way, nobody else takes them, however often it looks.
        for n, address in enumerate(addresses[2:12]):
            started.append(await start(clients[n % 2], address))
            await office.mailed(address)
        rest = addresses[len(started) :]
        started += await asyncio.gather(*(start(clients[n % 2], address) for n, address in enumerate(rest)))
        slow.release()
        for each, address in zip(started, addresses, strict=True):
            await office.stands(each, SENT)
            await office.mailed(address)
        sent_by = [json.loads(line) for line in server.log.read_text("utf-8").splitlines()]
        assert any(line["event"] == "mail" for line in sent_by)


async def test_a_mail_of_a_server_that_died(office: Office, serve: Serve, shared_folder: Path) -> None:
    """A mail that a server has queued, could not send, and left, is found by another, which nobody told of it."""
    nowhere = f"smtp://127.0.0.1:{free_port()}?timeout=500ms"
    address = new_address()
    async with (
        serve(office.url, keys_file=shared_folder / "keys", smtp_url=nowhere) as server,
        server.channel() as channel,
    ):
        started = await start(Client(channel), address)
        await stands(Client(channel), started, QUEUED, pb.DELIVERY_FAILURE_UNREACHABLE)
        await server.kill()
    await office.mailed(address)
    await office.stands(started, SENT)


class _Replica:
    """A server that is killed and started again. A class because what it is now changes."""

    def __init__(self, make: Callable[[], contextlib.AbstractAsyncContextManager[OnetimeServer]]) -> None:
        self._make = make
        self._stack = contextlib.AsyncExitStack()
        self._server: OnetimeServer | None = None
        self.client: Client | None = None
        """None while it is dead."""

    async def start(self) -> None:
        self._server = await self._stack.enter_async_context(self._make())
        self.client = Client(await self._stack.enter_async_context(self._server.channel()))

    async def kill(self) -> None:
        assert self._server is not None
        self.client = None
        await self._server.kill()
        await self._stack.aclose()

    async def stop(self) -> None:
        await self._stack.aclose()


@dataclass(frozen=True, slots=True)
class _Load:
    """Callers that start verifications, by whichever server is alive, until they are told that it is done."""

    replicas: list[_Replica]
    started: dict[str, Started] = field(default_factory=dict)
    """By address."""

    @property
    def client(self) -> Client:
        """A client of a server that is alive."""
        return next(replica.client for replica in self.replicas if replica.client is not None)

    async def start(self, count: int) -> None:
        """Start so many at once."""
        await asyncio.gather(*(self._start(n) for n in range(count)))

    async def _start(self, number: int) -> None:
        address, user_id, request_id = new_address(), new_id(), new_id()
        async with asyncio.timeout(TIMEOUT_S):
            while address not in self.started:
                number += 1
                client = self.replicas[number % 2].client
                if client is not None:
                    try:
                        self.started[address] = await start(client, address, user_id=user_id, request_id=request_id)
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - it is retried
                    except (grpc.aio.UsageError, asyncio.CancelledError):
                        assert client is not self.replicas[number % 2].client
                await asyncio.sleep(0.01)


async def test_no_mail_is_lost_when_servers_die(serve: Serve, migrated_url: str, mail: MailServer) -> None:
    """Servers that are killed and a mail server that restarts lose no mail, and send few of them twice.

    No mail has two names, and none goes out for a verification that was cancelled before.
    """
    connections, kills = 4, 0
    settings = {"smtp_url": mail.url(timeout="200ms", connections=connections), "mail_tries": 100}
    replicas = [_Replica(lambda: serve(migrated_url, **settings)) for _ in range(2)]
    load = _Load(replicas)
    cancelled: list[str] = []

    async def kill_in_the_middle(*victims: _Replica, after: int) -> None:
        enough = len(mail.mails) + after
        await until(lambda: len(mail.mails) >= enough)
        await asyncio.gather(*(victim.kill() for victim in victims))

    try:
        await asyncio.gather(*(replica.start() for replica in replicas))
        for victim, after in zip(replicas * 2, (1, 9, 4, 6), strict=True):
            await asyncio.gather(load.start(15), kill_in_the_middle(victim, after=after))
            kills += 1
            if kills == 2:
                # The mail server is restarted too; some are cancelled while it is down.
                mail.stop()
                known = set(load.started)
                await load.start(10)
                cancelled = sorted(set(load.started) - known)[:5]
                await asyncio.gather(*(load.client.cancel(load.started[address]) for address in cancelled))
                mail.start()
            await victim.start()
        last = asyncio.create_task(load.start(15))
        await kill_in_the_middle(*replicas, after=3)
        kills += 2
        # What was claimed by the dead is free after a while, which is over now.
        with connected(migrated_url) as database:
            database.execute("update onetime.outbox set due_at = clock_timestamp() where state = 'queued'")
        await asyncio.gather(*(replica.start() for replica in replicas))
        await last
        for address in load.started.keys() - set(cancelled):
            await stands(load.client, load.started[address], SENT)
    finally:
        await asyncio.gather(*(replica.stop() for replica in replicas))
    names = {address: [message_id(each) for each in mail.to(address)] for address in load.started}
    assert len(names) == 85
    assert sorted(address for address, ids in names.items() if not ids) == cancelled
    assert [ids for ids in names.values() if len(set(ids)) > 1] == []
    assert len(mail.mails) - (len(names) - len(cancelled)) <= kills * connections


async def test_a_server_that_is_stopped_in_the_middle_of_a_mail(
    serve: Serve, migrated_url: str, mail: MailServer
) -> None:
    """At SIGTERM mails under way are sent, and that is recorded: after the next start none is sent again."""
    settings = {"smtp_url": mail.url(timeout="10s")}
    address = new_address()
    with mail.holding("end") as hold:
        async with serve(migrated_url, **settings) as server, office_of(server, migrated_url, mail) as office:
            started = await office.start(address)
            await until(lambda: hold.count == 1)
            server.process.send_signal(signal.SIGTERM)
            await until(lambda: b'"event":"draining"' in server.log.read_bytes())
            hold.release()
            await asyncio.wait_for(server.process.wait(), TIMEOUT_S)
    await office.mailed(address)
    (row,) = office.rows(started)
    assert (row["state"], row["tries"]) == ("sent", 1)
    async with serve(migrated_url, **settings) as server, office_of(server, migrated_url, mail) as office:
        await office.stands(started, SENT)
        await office.one_more()
        await office.mailed(address)


async def test_a_database_that_is_lost_in_the_middle_of_a_mail(
    serve: Serve, migrated_url: str, mail: MailServer
) -> None:
    """A mail that is accepted while the database is away is recorded when it is back, and not sent again."""
    name = sql.Identifier(urlsplit(migrated_url).path.removeprefix("/"))
    maintenance_url = urlunsplit(urlsplit(migrated_url)._replace(path="/postgres"))
    address = new_address()
    async with (
        serve(migrated_url, smtp_url=mail.url(timeout="10s")) as server,
        office_of(server, migrated_url, mail) as office,
    ):
        with mail.holding("end") as hold, connected(maintenance_url) as maintenance:
            started = await office.start(address)
            await until(lambda: hold.count == 1)
            maintenance.execute(sql.SQL("alter database {} allow_connections false").format(name))
            maintenance.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = %s",
                [urlsplit(migrated_url).path.removeprefix("/")],
            )
            hold.release()
            await office.mailed(address)
            # For as long as health, which is patient, takes to see it.
            await until(lambda: b'"serving":false' in server.log.read_bytes())
            maintenance.execute(sql.SQL("alter database {} allow_connections true").format(name))
        await until(lambda: office.rows(started)[0]["state"] == "sent")
        await office.stands(started, SENT)
        await office.one_more()
        await office.mailed(address)
        assert office.rows(started)[0]["tries"] == 1


# Secrets


async def _dumps(url: str) -> bytes:
    """Return the whole database as `pg_dump` writes it, in three ways."""
    texts = []
    for options in ((), ("--inserts",), ("--data-only",)):
        process = await asyncio.create_subprocess_exec(
            *(str(wheel_programs() / "pg_dump"), *options, f"--dbname={url}"), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert b"onetime.outbox" in output
        texts.append(output)
    return b"\n".join(texts)


async def test_no_code_and_no_address_is_anywhere_but_in_the_mail(
    serve: Serve, migrated_url: str, mail: MailServer, log_statements: Callable[[str], Path]
) -> None:
    """No dump holds them, at any time, and no log, metric or answer, whatever the mail server quotes."""
    postgres_log = log_statements(migrated_url)
    log_start = postgres_log.stat().st_size
    canaries = Canaries()
    address = canaries.address(f"Ada-Canary-{new_id()}@example.org")

    def quoting(to: str, content: bytes) -> str:
        code = re.search(rb"^Subject: (\d{6}) ", content, re.MULTILINE)
        return f"{'554' if code else '451'} 5.7.1 <{to}> {code[1].decode() if code else ''} 'No'"

    places: dict[str, bytes] = {}
    settings = {"smtp_url": mail.url(timeout="10s"), "log_level": "debug"}
    async with serve(migrated_url, **settings) as server, office_of(server, migrated_url, mail) as office:
        mail.misbehave("rcpt", quoting)
        started = await office.start(address)
        await office.stands(started, QUEUED, pb.DELIVERY_FAILURE_DEFERRED)
        places["a dump while it is queued"] = await _dumps(migrated_url)
        mail.behave()
        hold = Hold()
        mail.misbehave("end", hold, times=1)
        await until(lambda: hold.count == 1)
        places["a dump while it is sent"] = await _dumps(migrated_url)
        mail.misbehave("end", quoting, times=1)
        hold.release("451 4.3.0 Later")
        await office.stands(started, FAILED, pb.DELIVERY_FAILURE_MESSAGE_REFUSED)
        places["a dump when it has failed"] = await _dumps(migrated_url)
        await office.client.resend(started)
        await office.stands(started, SENT)
        places["a dump when it was sent"] = await _dumps(migrated_url)
        code = canaries.code(code_in(await office.mailed(address)))
        canaries.secrets.add(started.email_verification_token)
        verification = await office.client.verify(started, code)
        places["a dump when it was used"] = await _dumps(migrated_url)
        places["an answer"] = str(verification).encode()
        places["the metrics"] = office.metrics().encode()
    places["the service's log"] = server.log.read_bytes()
    with postgres_log.open("rb") as log:
        log.seek(log_start)
        places["PostgreSQL's log"] = log.read()
    # The controls: what is looked for is found where it may be, and the logs are those of these calls.
    assert canaries.found_in(mail.mails[0].content) == [address, code]
    assert places["the service's log"].count(b'"event":"mail"') == 4
    assert b"insert into onetime.outbox" in places["PostgreSQL's log"]
    assert {place: found for place, text in places.items() if (found := canaries.found_in(text))} == {}
