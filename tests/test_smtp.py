import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Final

import pytest
from calls import until
from certificates import Authority, dns, ip
from mailserver import DIE, MailServer, Step, tls_context

from service import smtp
from service.config import parse_smtp_url
from service.errors import DatabaseUnavailable
from service.fields import mailbox
from service.mail import Content, compose
from service.smtp import NotSent, Transport

SENDER: Final = "no-reply@example.com"
ADDRESS: Final = "ada@example.org"
PASSWORD: Final = "p@ss/wörd:?#"
PATIENT: Final = "10s"
HASTY: Final = "300ms"
BOUND_S: Final = 5.0
"""Far more than a hasty client may take, and far less than for ever."""


@pytest.fixture
def server() -> Iterator[MailServer]:
    """A mail server in plain text."""
    with MailServer() as server:
        yield server


@contextlib.asynccontextmanager
async def transport_to(url: str, *, sender: str = SENDER) -> AsyncIterator[Transport]:
    """Make a transport, and close it."""
    transport = Transport(parse_smtp_url(url), sender=sender)
    try:
        yield transport
    finally:
        await transport.close()


def mail(to: str = ADDRESS, *, sender: str = SENDER, text: str = "123456\n") -> EmailMessage:
    """Return a message, unlike all others."""
    content = Content(language="en", subject="123456 is your code", text=text, html="<p>123456</p>\n")
    return compose(
        content, product="Example", sender=sender, to=to, message_id=uuid.uuid4(), date=datetime(2026, 3, 1, tzinfo=UTC)
    )


async def yes() -> bool:
    """Say that a mail is wanted."""
    return True


async def send(transport: Transport, to: str = ADDRESS) -> str:
    """Send a mail to somebody, and return its Message-ID."""
    message = mail(to)
    assert await transport.send(message, to=to, wanted=yes)
    return str(message["Message-ID"])


async def failure(transport: Transport, to: str = ADDRESS) -> NotSent:
    """Return how sending a mail failed."""
    with pytest.raises(NotSent) as caught:
        await send(transport, to)
    return caught.value


def ids(server: MailServer) -> list[str]:
    """Return the Message-IDs of what a server has."""
    return [str(each.message["Message-ID"]) for each in server.mails]


# What arrives


@pytest.mark.parametrize("sender", [SENDER, f"no-reply@{'long.' * 20}example.com"], ids=["short", "long"])
async def test_a_mail_arrives_as_it_was_made(server: MailServer, sender: str) -> None:
    """The server gets the message to the byte, whatever its lines begin with and however long its headers are."""
    message = mail(sender=sender, text="123456\n.\n..\n.dot\nFrom here\n")
    async with transport_to(server.url(timeout=PATIENT), sender=sender) as transport:
        assert await transport.send(message, to=ADDRESS, wanted=yes)
    (arrived,) = server.mails
    assert arrived.content == message.as_bytes()
    assert (arrived.sender, arrived.to, arrived.options) == (sender, ADDRESS, ())


@pytest.mark.parametrize(
    ("sender", "to"),
    [(SENDER, "ädä@example.org"), ("nö-reply@example.com", ADDRESS)],
    ids=["recipient", "sender"],
)
async def test_an_international_address_goes_to_a_server_that_takes_it(
    server: MailServer, sender: str, to: str
) -> None:
    """Where one of the addresses is not ASCII, SMTPUTF8 is asked for, and the mail arrives as it was made."""
    message = mail(to, sender=sender)
    async with transport_to(server.url(timeout=PATIENT), sender=sender) as transport:
        assert await transport.send(message, to=to, wanted=yes)
    (arrived,) = server.mails
    assert arrived.content == message.as_bytes()
    assert (arrived.sender, arrived.to, arrived.options) == (sender, to, ("SMTPUTF8",))


@pytest.mark.parametrize(
    ("sender", "to", "refused"),
    [
        (SENDER, "ädä@example.org", smtp.ADDRESS_REFUSED),
        ("nö-reply@example.com", ADDRESS, smtp.MESSAGE_REFUSED),
    ],
    ids=["recipient", "sender"],
)
async def test_an_international_address_does_not_go_to_a_server_that_does_not(
    sender: str, to: str, refused: str
) -> None:
    """A server without SMTPUTF8 is told of no such mail. It is told of the next one."""
    with MailServer(smtputf8=False) as server:
        async with transport_to(server.url(timeout=PATIENT), sender=sender) as transport:
            with pytest.raises(NotSent) as caught:
                await transport.send(mail(to, sender=sender), to=to, wanted=yes)
            assert (caught.value.failure, caught.value.permanent) == (refused, True)
            assert not server.commands["MAIL"]
            if sender == SENDER:
                await send(transport)
                assert len(server.mails) == 1


async def test_an_international_domain_goes_in_ascii(server: MailServer) -> None:
    """A domain is written in A-labels, which any server takes."""
    server.smtputf8 = False
    to = mailbox("ada@Bücher.example")
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        await send(transport, to)
    (arrived,) = server.mails
    assert arrived.to == "ada@xn--bcher-kva.example"
    assert arrived.message["To"] == arrived.to
    assert arrived.options == ()


# Connections


async def test_many_mails_over_few_connections(server: MailServer) -> None:
    """A connection serves a hundred mails one after the other; of some at once, each has its own, and keeps it."""
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        sent = [await send(transport) for _ in range(smtp.MAILS_PER_CONNECTION + 1)]
        assert server.connections == 2
        for _ in range(5):
            sent += await asyncio.gather(*(send(transport) for _ in range(4)))
        assert server.connections <= 5
    assert sorted(ids(server)) == sorted(sent)
    await until(lambda: not server.open)


@pytest.mark.parametrize("how", ["hung up", "said goodbye", "dies when it is used", "421 when it is used"])
async def test_a_connection_that_the_server_has_ended_costs_no_try(server: MailServer, how: str) -> None:
    """A connection that was kept, and that the server has ended or ends at the next mail, is replaced."""
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        sent = [await send(transport)]
        match how:
            case "hung up":
                server.hang_up()
            case "said goodbye":
                server.hang_up("421 4.4.2 Idle for too long")
            case "dies when it is used":
                server.misbehave("mail", DIE, times=1)
            case _:
                server.mails_per_connection = 1
        sent.append(await send(transport))
    assert ids(server) == sent
    assert [each.connection for each in server.mails] == [1, 2]


async def test_421_on_every_connection_is_told(server: MailServer) -> None:
    """A server that hangs up on new connections too is not asked for ever: it asks to come again later."""
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        await send(transport)
        server.misbehave("mail", "421 4.3.2 Going down")
        assert (await failure(transport)).failure == smtp.DEFERRED
        assert server.connections == 2


@pytest.mark.parametrize("step", ["rcpt", "data", "end"])
async def test_a_connection_is_kept_after_a_refusal(server: MailServer, step: Step) -> None:
    """After a refusal the next mail goes over the same connection, and is not mixed up with the one before."""
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        server.misbehave(step, "550 No", times=1)
        await failure(transport)
        sent = await send(transport, "bob@example.org")
    (arrived,) = server.mails
    assert (ids(server), arrived.to, server.connections) == ([sent], "bob@example.org", 1)


@pytest.mark.parametrize("step", ["rcpt", "data", "content", "end"])
@pytest.mark.parametrize("how", ["dies", "hangs", "given up"])
async def test_no_connection_is_used_that_was_left_in_the_middle_of_a_mail(
    server: MailServer, step: Step, how: str
) -> None:
    """Where a mail ended in its middle, nobody knows what the server would take the next one for: it goes elsewhere."""
    async with transport_to(server.url(timeout=HASTY if how == "hangs" else PATIENT)) as transport:
        if how == "dies":
            server.misbehave(step, DIE, times=1)
            assert (await failure(transport)).failure == smtp.UNREACHABLE
            server.mails.clear()
        else:
            with server.holding(step) as hold:
                trying = asyncio.create_task(send(transport))
                await until(lambda: hold.count == 1)
                if how == "given up":
                    trying.cancel()
                with pytest.raises(asyncio.CancelledError if how == "given up" else NotSent):
                    await trying
                await until(lambda: not server.open)
        sent = await send(transport, "bob@example.org")
    (arrived,) = server.mails
    assert (ids(server), arrived.to, arrived.connection) == ([sent], "bob@example.org", 2)


async def test_a_connection_that_nobody_needs_is_ended(server: MailServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was idle for too long is ended, with a farewell."""
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        await asyncio.gather(*(send(transport) for _ in range(2)))
        await transport.tend()
        assert not server.commands["QUIT"]
        monkeypatch.setattr(smtp, "IDLE_S", 0.0)
        await transport.tend()
        assert server.commands["QUIT"] == server.connections
        await until(lambda: not server.open)


async def test_a_mail_that_is_not_wanted(server: MailServer) -> None:
    """Whether a mail is wanted is asked when its recipient has been accepted; if not, no content is sent."""
    asked: list[int] = []

    async def no() -> bool:
        asked.append(server.commands["RCPT"])
        return False

    async with transport_to(server.url(timeout=PATIENT)) as transport:
        assert not await transport.send(mail(), to=ADDRESS, wanted=no)
        assert (asked, server.commands["DATA"], server.mails) == ([1], 0, [])
        await send(transport)
    assert server.connections == 1


async def test_when_nobody_can_tell_whether_a_mail_is_wanted(server: MailServer) -> None:
    """It is not sent, and the reason comes out; the connection is not kept in the middle of that mail."""

    async def unknown() -> bool:
        raise DatabaseUnavailable

    async with transport_to(server.url(timeout=PATIENT)) as transport:
        with pytest.raises(DatabaseUnavailable):
            await transport.send(mail(), to=ADDRESS, wanted=unknown)
        await send(transport)
    assert (server.commands["DATA"], [each.connection for each in server.mails]) == (1, [2])


# Refusals


@pytest.mark.parametrize(
    ("step", "reply", "failure_class", "code"),
    [
        ("connect", "421 4.3.2 Too busy", smtp.DEFERRED, 421),
        ("connect", "554 5.7.1 You are on a list", smtp.SERVICE_REFUSED, 554),
        ("connect", "Hello?", smtp.SERVICE_REFUSED, None),
        ("mail", "451 4.3.0 Later", smtp.DEFERRED, 451),
        ("mail", "421 4.3.2 Going down", smtp.DEFERRED, 421),
        ("mail", "530 5.7.0 Authentication required", smtp.SERVICE_REFUSED, 530),
        ("mail", "550 5.7.1 Not from there", smtp.MESSAGE_REFUSED, 550),
        ("rcpt", "450 4.2.1 Greylisted", smtp.DEFERRED, 450),
        ("rcpt", "550 5.1.1 No such mailbox", smtp.ADDRESS_REFUSED, 550),
        ("rcpt", "421 4.3.2 Going down", smtp.DEFERRED, 421),
        ("data", "451 4.3.0 Later", smtp.DEFERRED, 451),
        ("data", "554 5.5.1 No", smtp.MESSAGE_REFUSED, 554),
        ("end", "452 4.3.1 Disk full", smtp.DEFERRED, 452),
        ("end", "554 5.7.1 Spam", smtp.MESSAGE_REFUSED, 554),
        ("end", "421 4.3.2 Going down", smtp.DEFERRED, 421),
        ("end", "Well", smtp.DEFERRED, None),
    ],
)
async def test_what_answers_mean(
    server: MailServer, step: Step, reply: str, failure_class: str, code: int | None
) -> None:
    """Each refusal is of the class that the contract names, with the server's code if any, and without its words."""
    server.misbehave(step, reply)
    async with transport_to(server.url(timeout=PATIENT)) as transport:
        error = await failure(transport)
    assert (error.failure, error.code) == (failure_class, code)
    assert error.permanent == (failure_class in (smtp.ADDRESS_REFUSED, smtp.MESSAGE_REFUSED))
    assert str(error) == (f"{failure_class} (reply code {code})" if code else failure_class)
    # Else its text would come out with a traceback.
    assert error.__cause__ is None
    assert error.__suppress_context__


async def test_nobody_there() -> None:
    """Where nobody listens, and where no such host is, the server is unreachable."""
    with MailServer() as server:
        url = server.url(timeout=PATIENT)
    for nowhere in (url, "smtp://host.invalid:25?tls=none"):
        async with transport_to(nowhere) as transport:
            assert (await failure(transport)).failure == smtp.UNREACHABLE


@pytest.mark.parametrize("step", ["connect", "ehlo", "mail", "rcpt", "data", "content", "end"])
async def test_no_wait_is_without_end(server: MailServer, step: Step) -> None:
    """Wherever a server stops to answer, that is unreachable in a time that does not depend on it."""
    with server.holding(step) as hold:
        async with asyncio.timeout(BOUND_S), transport_to(server.url(timeout=HASTY)) as transport:
            assert (await failure(transport)).failure == smtp.UNREACHABLE
            assert hold.count == 1
        await until(lambda: not server.open)
    assert server.mails == []


# TLS and login

AUTHORITY: Final = Authority()


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """The file of the authority that signed the mail server's certificate."""
    path = tmp_path / "ca.crt"
    path.write_bytes(AUTHORITY.certificate)
    return path


@pytest.mark.parametrize(
    ("host", "mode"),
    [
        ("127.0.0.1", "implicit"),
        ("127.0.0.1", "starttls"),
        ("::1", "none"),
        ("::1", "implicit"),
        ("::1", "starttls"),
    ],
)
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
async def test_tls_and_login(host: str, mode: str, mechanism: str, ca: Path, tmp_path: Path) -> None:
    """Over IPv4 and IPv6, with TLS from the start and by STARTTLS, with either login, mails arrive."""
    context = tls_context(AUTHORITY.issue(ip(host)), tmp_path)
    login = ("onetime", PASSWORD)
    with MailServer(
        host=host,
        tls=mode,  # type: ignore[arg-type] # one of the three
        context=context,
        login=login,
        mechanisms=frozenset({mechanism}),
    ) as server:
        demands: dict[str, dict[str, object]] = {"implicit": {"ca": ca}, "starttls": {"ca": ca, "tls": mode}}
        demand = demands.get(mode, {})
        url = server.url(user="onetime", password=PASSWORD, timeout=PATIENT, **demand)
        async with transport_to(url) as transport:
            await transport.check()
            assert not server.commands["MAIL"]
            sent = [await send(transport), await send(transport)]
        assert ids(server) == sent
        assert server.connections == 2
        assert server.commands[f"AUTH {mechanism}"] == 2


@pytest.mark.parametrize("mode", ["implicit", "starttls"])
@pytest.mark.parametrize("wrong", ["authority", "name", "age"])
async def test_a_certificate_that_is_not_right(mode: str, wrong: str, ca: Path, tmp_path: Path) -> None:
    """To a server whose certificate is not right neither password nor mail is sent."""
    authority = Authority() if wrong == "authority" else AUTHORITY
    name = dns("mail.example.com") if wrong == "name" else ip("127.0.0.1")
    context = tls_context(authority.issue(name, days=-1 if wrong == "age" else 90), tmp_path)
    with MailServer(
        tls=mode,  # type: ignore[arg-type] # one of the three
        context=context,
        login=("onetime", PASSWORD),
    ) as server:
        demand = {"ca": ca, "tls": mode} if mode == "starttls" else {"ca": ca}
        url = server.url(user="onetime", password=PASSWORD, timeout=PATIENT, **demand)
        async with transport_to(url) as transport:
            error = await failure(transport)
        assert (error.failure, error.permanent) == (smtp.SERVICE_REFUSED, False)
        assert not server.commands


async def test_a_server_without_starttls(server: MailServer) -> None:
    """Where STARTTLS is demanded and not offered, no password and no mail is sent in plain text."""
    server.login = ("onetime", PASSWORD)
    url = server.url(user="onetime", password=PASSWORD, tls="starttls", timeout=PATIENT)
    async with transport_to(url) as transport:
        error = await failure(transport)
    assert (error.failure, error.permanent) == (smtp.SERVICE_REFUSED, False)
    assert not server.commands


@pytest.mark.parametrize("wrong", ["password", "no login offered", "no login made"])
async def test_a_login_that_is_not_right(server: MailServer, wrong: str) -> None:
    """A wrong password, a login that is not offered, and one that is missing are the service's fault, not a mail's."""
    server.login = None if wrong == "no login offered" else ("onetime", PASSWORD)
    user = "" if wrong == "no login made" else "onetime"
    password = PASSWORD[::-1] if wrong == "password" else PASSWORD
    async with transport_to(server.url(user=user, password=password, timeout=PATIENT)) as transport:
        error = await failure(transport)
        assert (error.failure, error.permanent) == (smtp.SERVICE_REFUSED, False)
        assert PASSWORD not in repr(transport)
        assert server.mails == []


def test_a_file_of_authorities_that_is_none(tmp_path: Path) -> None:
    """What is wrong with the file of authorities is told at the start."""
    empty = tmp_path / "empty.crt"
    empty.touch()
    for path in (empty, tmp_path / "missing.crt"):
        with pytest.raises(ValueError, match="a file of certificates in PEM is right"):
            Transport(parse_smtp_url(f"smtps://mail.example.com?ca={path}"), sender=SENDER)
