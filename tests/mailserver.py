"""A mail server for tests: a real one on a real socket, in a thread of its own, which misbehaves when it is told to.

It knows SMTP, and nothing of the service.
"""

import asyncio
import email
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from email import policy
from email.message import EmailMessage
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from certificates import Issued

Step: TypeAlias = Literal["connect", "ehlo", "mail", "rcpt", "data", "content", "end"]
"""Where it may misbehave: before each of its answers, and when some of a mail's content, or all of it, has come."""

DIE: Final = "(die)"
"""In place of a reply: the connection is lost. A mail that had come to its end is kept all the same."""

Reply: TypeAlias = str | Callable[[str, bytes], str]
"""What it answers, or what makes the answer of a recipient and a mail's content, as far as they are known."""

_THREAD_S: Final = 20.0
_T = TypeVar("_T")


class Hold:
    """Lets connections wait where they are. A class because a test sees them arrive, and releases them."""

    def __init__(self) -> None:
        """Let nobody wait yet."""
        self.count = 0
        """How many have come."""
        self._reply: Future[str] = Future()

    def release(self, reply: str = "") -> None:
        """Let them go on, and those that come later: with this reply, or as if nothing had been."""
        if not self._reply.done():
            self._reply.set_result(reply)

    async def wait(self) -> str:
        """Wait for the release, in the server's thread."""
        self.count += 1
        return await asyncio.shield(asyncio.wrap_future(self._reply))


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail that the server has."""

    connection: int
    """The number of the connection that it came by, from 1."""
    sender: str
    to: str
    options: tuple[str, ...]
    """Of MAIL FROM."""
    content: bytes

    @property
    def message(self) -> EmailMessage:
        """What it says."""
        message = email.message_from_bytes(self.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        return message

    def body(self, kind: Literal["plain", "html"]) -> str:
        """Return its text, or its HTML."""
        part = self.message.get_body((kind,))
        assert part is not None
        text: str = part.get_content()
        return text


class MailServer:
    """The server, at a port that it keeps. A class because the test's thread tells its thread what to do."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        tls: Literal["none", "starttls", "implicit"] = "none",
        context: ssl.SSLContext | None = None,
        login: tuple[str, str] | None = None,
        mechanisms: frozenset[str] = frozenset({"PLAIN", "LOGIN"}),
        smtputf8: bool = True,
    ) -> None:
        """Describe it; `start` runs it.

        Args:
            host: An address of this machine.
            tls: What it takes.
            context: With its certificate, where it takes TLS.
            login: A user and a password that it demands.
            mechanisms: For the login.
            smtputf8: Whether it takes international addresses.
        """
        self.host = host
        self.port = 0
        self.tls = tls
        self.login = login
        self.mechanisms = mechanisms
        self.smtputf8 = smtputf8
        self.context = context
        self.mails_per_connection: int | None = None
        """After so many it answers 421, and hangs up."""
        self.mails: list[Mail] = []
        """What it has, in the order in which it came."""
        self.commands: Counter[str] = Counter()
        """What it was asked for, and how often."""
        self.connections = 0
        """How many there were."""
        self.open: set[_Connection] = set()
        self.errors: list[Exception] = []
        """What went wrong in it, such as handshakes of clients that do not trust its certificate."""
        self._rules: dict[Step, tuple[Reply | Hold, int]] = {}
        self._holds: list[Hold] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._listener: asyncio.Server | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self._thread.start()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it for good."""
        self.behave()
        self.stop()
        self._run(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_THREAD_S)
        self._loop.close()

    def url(self, *, user: str = "", password: str = "", **query: object) -> str:
        """Return the setting that leads here."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user else ""
        scheme = "smtps" if self.tls == "implicit" else "smtp"
        return f"{scheme}://{login}{host}:{self.port}?{urlencode(query)}"

    # What a test tells it

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._run(self._start())

    def stop(self) -> None:
        """Listen no more, and end all connections. What was answered before arrives."""
        self._run(self._stop())

    def hang_up(self, farewell: str = "") -> None:
        """End all connections, with a word or without."""
        self._run(self._hang_up(farewell))

    def misbehave(self, step: Step, action: Reply | Hold, *, times: int = 1_000_000) -> None:
        """Reply something else at a step, or wait there, for so many times."""
        self._rules[step] = (action, times)
        if isinstance(action, Hold):
            self._holds.append(action)

    def behave(self) -> None:
        """Do as a good server does, from now on; who waits goes on."""
        self._rules.clear()
        while self._holds:
            self._holds.pop().release()

    @contextmanager
    def holding(self, step: Step) -> Iterator[Hold]:
        """Let everybody wait at a step, until released or until the block ends."""
        hold = Hold()
        self.misbehave(step, hold)
        try:
            yield hold
        finally:
            if self._rules.get(step, ("", 0))[0] is hold:
                del self._rules[step]
            hold.release()

    def to(self, address: str) -> list[Mail]:
        """Return the mails that came for an address."""
        return [mail for mail in self.mails if mail.to == address]

    # Its own thread

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_THREAD_S)

    async def _start(self) -> None:
        context = self.context if self.tls == "implicit" else None
        self._listener = await self._loop.create_server(self._connection, self.host, self.port, ssl=context)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._hang_up("")

    async def _hang_up(self, farewell: str) -> None:
        for connection in tuple(self.open):
            connection.hang_up(farewell)
        while self.open:  # noqa: ASYNC110 - aiosmtpd tells of no end of its connections otherwise
            await asyncio.sleep(0.001)

    def _connection(self) -> "_Connection":
        return _Connection(self, self._loop)

    def take(self, step: Step) -> Reply | Hold | None:
        """Return what to do at a step, if it is anything special."""
        action, times = self._rules.get(step, ("", 0))
        if times == 0:
            return None
        self._rules[step] = (action, times - 1)
        return action


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Connection(SMTP):
    """One connection. A class because that is how aiosmtpd takes what it is to do."""

    def __init__(self, owner: MailServer, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._greeted = False
        self._number = 0
        self._mails = 0
        super().__init__(
            self,
            hostname="mail.test",
            enable_SMTPUTF8=owner.smtputf8,
            tls_context=owner.context if owner.tls == "starttls" else None,
            require_starttls=owner.tls == "starttls",
            authenticator=self._log_in,
            auth_require_tls=False,
            auth_exclude_mechanism={"PLAIN", "LOGIN"} - owner.mechanisms,
            loop=loop,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._number:
            # Otherwise it is TLS after STARTTLS.
            self._owner.connections += 1
            self._number = self._owner.connections
            self._owner.open.add(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.open.discard(self)
        super().connection_lost(error)

    def eof_received(self) -> bool:
        # aiosmtpd leaves its side open for ever, if it had not greeted yet.
        super().eof_received()
        return False

    def hang_up(self, farewell: str) -> None:
        """End the connection."""
        transport = self.transport
        if isinstance(transport, asyncio.WriteTransport):
            if farewell:
                transport.write(farewell.encode() + b"\r\n")
            transport.close()

    async def push(self, status: str | bytes) -> None:
        line = status if isinstance(status, str) else status.decode()
        if not self._greeted:
            self._greeted = True
            line = await self._at("connect") or line
        await super().push(line)
        if line.startswith("421"):
            self.hang_up("")
        elif line.startswith("354"):
            await self._at("content")

    async def smtp_DATA(self, arg: str) -> None:  # noqa: N802 - aiosmtpd's name, as those below
        self._owner.commands["DATA"] += 1
        reply = await self._at("data")
        if reply:
            await self.push(reply)
        else:
            await super().smtp_DATA(arg)

    async def handle_exception(self, error: Exception) -> str:
        self._owner.errors.append(error)
        return "451 4.3.0 Sorry"

    async def handle_EHLO(  # noqa: N802 - as above
        self, _: SMTP, session: Session, __: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        reply = await self._at("ehlo")
        if reply:
            return [reply]
        return [line for line in responses if self._owner.login or not line.startswith("250-AUTH")]

    async def handle_MAIL(  # noqa: N802 - as above
        self, _: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        self._owner.commands["MAIL"] += 1
        reply = await self._at("mail")
        if reply:
            return reply
        if self._owner.login and not session.authenticated:
            return "530 5.7.0 Authentication required"
        if self._mails == self._owner.mails_per_connection:
            return "421 4.7.0 Enough for now"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(  # noqa: N802 - as above
        self, _: SMTP, __: Session, envelope: Envelope, address: str, ___: list[str]
    ) -> str:
        self._owner.commands["RCPT"] += 1
        reply = await self._at("rcpt", address)
        if reply:
            return reply
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _: SMTP, __: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        content = envelope.original_content or b""
        (to,) = envelope.rcpt_tos
        mail = Mail(self._number, envelope.mail_from or "", to, tuple(envelope.mail_options), content)
        reply = await self._at("end", to, content, mail=mail)
        if reply:
            return reply
        self._keep(mail)
        return "250 OK"

    async def handle_RSET(self, _: SMTP, __: Session, ___: Envelope) -> str:  # noqa: N802 - as above
        self._owner.commands["RSET"] += 1
        return "250 OK"

    async def handle_QUIT(self, _: SMTP, __: Session, ___: Envelope) -> str:  # noqa: N802 - as above
        self._owner.commands["QUIT"] += 1
        return "221 Bye"

    def _keep(self, mail: Mail) -> None:
        self._mails += 1
        self._owner.mails.append(mail)

    def _log_in(self, _: SMTP, __: Session, ___: Envelope, mechanism: str, given: LoginPassword) -> AuthResult:
        self._owner.commands[f"AUTH {mechanism}"] += 1
        right = self._owner.login and tuple(part.encode() for part in self._owner.login)
        return AuthResult(success=(given.login, given.password) == right, handled=False)

    async def _at(self, step: Step, to: str = "", content: bytes = b"", mail: Mail | None = None) -> str:
        """Do what is to be done at a step, and return what to reply, or nothing."""
        action = self._owner.take(step)
        if action is None:
            return ""
        reply = await action.wait() if isinstance(action, Hold) else action
        if callable(reply):
            reply = reply(to, content)
        if reply != DIE:
            return reply
        if step == "content":
            # Some of it has come.
            await self._reader.readuntil(b"\r\n")
        if mail is not None:
            self._keep(mail)
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
        # Until aiosmtpd ends this, as it does when it hears of it.
        await asyncio.Event().wait()
        raise AssertionError


def tls_context(issued: Issued, folder: Path) -> ssl.SSLContext:
    """Return what a server needs to show a certificate."""
    certificate, key = folder / "mail.crt", folder / "mail.key"
    certificate.write_bytes(issued.certificate)
    key.write_bytes(issued.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
