"""The mail server: connections to it, and what its answers mean.

It knows nothing of verifications and outboxes. No text of the mail server leaves this module: it may quote addresses.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable
from email.message import EmailMessage
from typing import Final

import aiosmtplib

from service.config import MailServer

IDLE_S: Final = 20.0
"""How long a connection is kept open for the next mail. Servers begin to hang up after 30 s."""

MAILS_PER_CONNECTION: Final = 100
"""Many servers hang up after so many."""

ADDRESS_REFUSED: Final = "address_refused"
MESSAGE_REFUSED: Final = "message_refused"
SERVICE_REFUSED: Final = "service_refused"
DEFERRED: Final = "deferred"
UNREACHABLE: Final = "unreachable"

CURES: Final = {
    ADDRESS_REFUSED: "check the address; the server may take mail for its own domains only, or only after a login",
    MESSAGE_REFUSED: "check that the server lets this user send from mail_from",
    SERVICE_REFUSED: "check user and password in smtp_url, and the server's certificate; ca=FILE names its authority",
    DEFERRED: "try again later; the server's own log tells why",
    UNREACHABLE: "check host and port in smtp_url, and that the server runs and can be reached from here",
}
"""What helps the operator, by class."""

_BAD_LOGIN: Final = frozenset({530, 534, 535, 538})
_GOING: Final = 421
"""The server hangs up (RFC 5321, 3.8)."""


class NotSent(Exception):
    """A mail was not accepted; where the server's answer was lost, it may have been all the same."""

    def __init__(self, failure: str, code: int | None = None) -> None:
        """Take one of the classes above, and the server's reply code (RFC 5321, 4.2), if it gave one."""
        if code is not None and code < 0:
            code = None  # so aiosmtplib calls what is no reply at all
        super().__init__(f"{failure} (reply code {code})" if code else failure)
        self.failure = failure
        self.code = code

    @property
    def permanent(self) -> bool:
        """Whether to try again is useless."""
        return self.failure in (ADDRESS_REFUSED, MESSAGE_REFUSED)


class _Connection:
    """A connection with what decides whether it may serve once more. A class because both go together."""

    def __init__(self, client: aiosmtplib.SMTP) -> None:
        self.client = client
        self.mails = 0
        self.used_at = time.monotonic()

    def usable(self) -> bool:
        fresh = time.monotonic() - self.used_at < IDLE_S
        return self.client.is_connected and fresh and self.mails < MAILS_PER_CONNECTION


class Transport:
    """Sends mails. A class because connections are kept for the next mail: TLS and login cost more than a mail does."""

    def __init__(self, server: MailServer, *, sender: str) -> None:
        """Take where the mail server is, and the address that mails come from.

        Raises:
            ValueError: The file of authorities cannot be read, or holds none.
        """
        self._server = server
        self._sender = sender
        self._context = _tls_context(server)
        self._idle: list[_Connection] = []

    async def send(self, message: EmailMessage, *, to: str, wanted: Callable[[], Awaitable[bool]]) -> bool:
        """Send a mail, and return whether the server accepted it. Of those not wanted any more it is not told.

        Args:
            message: The mail.
            to: Where to.
            wanted: Asked when the server is ready to take the mail, which may have taken long.

        Raises:
            NotSent: It did not accept it.
        """
        # By its own policy: another one folds long headers anew, and makes encoded words of a Message-ID.
        content = message.as_bytes()
        while True:
            connection = self._take_idle() or await self._connect()
            try:
                return await self._deliver(connection, content, to, wanted)
            except _StaleError:
                # The server hung up while the connection was idle. Nothing of this mail was sent.
                continue

    async def check(self) -> None:
        """Connect and log in, and send nothing.

        Raises:
            NotSent: That failed.
        """
        connection = await self._connect()
        await self._quit(connection)

    async def close(self) -> None:
        """Take leave of the server."""
        idle, self._idle = self._idle, []
        await asyncio.gather(*map(self._quit, idle))

    async def tend(self) -> None:
        """Take leave on the connections that have been idle for too long."""
        usable = [each for each in self._idle if each.usable()]
        stale = [each for each in self._idle if not each.usable()]
        self._idle = usable
        # At once: a server that does not answer makes each of them wait.
        await asyncio.gather(*map(self._quit, stale))

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            connection.client.close()
        return None

    async def _connect(self) -> _Connection:
        server = self._server
        client = aiosmtplib.SMTP(
            hostname=server.host,
            port=server.port,
            username=server.user,
            password=server.password,
            # Otherwise the name of this machine is looked up, which may take long and is nobody's business.
            local_hostname=self._sender.rpartition("@")[2],
            timeout=server.timeout.total_seconds(),
            use_tls=server.tls == "implicit",
            start_tls=server.tls == "starttls",
            tls_context=self._context,
        )
        try:
            # One limit for all of it: a server that answers each command at the last moment is not there either.
            async with asyncio.timeout(2 * server.timeout.total_seconds()):
                await client.connect()
                if client.is_ehlo_or_helo_needed:
                    await client.ehlo()
        except BaseException as error:
            client.close()
            if isinstance(error, (aiosmtplib.SMTPException, OSError, TimeoutError)):
                raise _connecting(error) from None
            raise
        return _Connection(client)

    async def _deliver(
        self,
        connection: _Connection,
        content: bytes,
        to: str,
        wanted: Callable[[], Awaitable[bool]],
    ) -> bool:
        client = connection.client
        international = not (self._sender + to).isascii()
        reused = connection.mails > 0
        accepted = ready = False
        try:
            if international and not client.supports_extension("smtputf8"):
                ready = True  # for another mail
                # And it will not learn to.
                raise NotSent(MESSAGE_REFUSED if to.isascii() else ADDRESS_REFUSED)
            encoding = "utf-8" if international else "ascii"
            try:
                await client.mail(self._sender, options=["SMTPUTF8"] if international else [], encoding=encoding)
            except (aiosmtplib.SMTPServerDisconnected, aiosmtplib.SMTPSenderRefused) as error:
                if reused and getattr(error, "code", _GOING) == _GOING:
                    raise _StaleError from None
                raise
            await client.rcpt(to, encoding=encoding)
            accepted = await wanted()
            if accepted:
                await client.data(content)
            ready = accepted or await self._reset(connection)
        except aiosmtplib.SMTPResponseException as error:
            ready = await self._reset(connection)
            raise _answered(error) from None
        except (aiosmtplib.SMTPException, OSError, TimeoutError):
            raise NotSent(UNREACHABLE) from None
        finally:
            connection.mails += 1
            connection.used_at = time.monotonic()
            # Of a connection that was left in the middle of a mail, nobody knows what it would take the next one for.
            if ready and connection.usable():
                self._idle.append(connection)
            else:
                client.close()
        return accepted

    async def _reset(self, connection: _Connection) -> bool:
        """Make a connection ready for another mail after one that was not sent, if it can be."""
        try:
            await connection.client.rset()
        except (aiosmtplib.SMTPException, OSError, TimeoutError):
            return False
        return True

    async def _quit(self, connection: _Connection) -> None:
        with contextlib.suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
            async with asyncio.timeout(1):
                await connection.client.quit()
        connection.client.close()


class _StaleError(Exception):
    """A connection that was kept open had been closed by the server."""


def _tls_context(server: MailServer) -> ssl.SSLContext | None:
    if server.tls == "none":
        return None
    try:
        return ssl.create_default_context(cafile=server.ca)
    except (OSError, ssl.SSLError):
        raise ValueError(f"ca={server.ca}: a file of certificates in PEM is right") from None


def _connecting(error: BaseException) -> NotSent:
    """Return what it means that a connection was not had, or no login. All of it may be mended meanwhile."""
    if isinstance(error, aiosmtplib.SMTPResponseException):
        deferred = error.code // 100 == 4  # noqa: PLR2004 - RFC 5321, 4.2.1: transient
        return NotSent(DEFERRED if deferred else SERVICE_REFUSED, error.code)
    # Of the bare class: it does not offer STARTTLS, or no login that we know.
    if type(error) is aiosmtplib.SMTPException or isinstance(error.__cause__ or error, ssl.SSLError):
        return NotSent(SERVICE_REFUSED)
    return NotSent(UNREACHABLE)


def _answered(error: aiosmtplib.SMTPResponseException) -> NotSent:
    """Return what a server's answer to a mail means."""
    if error.code // 100 != 5:  # noqa: PLR2004 - as above: permanent
        return NotSent(DEFERRED, error.code)
    if error.code in _BAD_LOGIN:
        return NotSent(SERVICE_REFUSED, error.code)
    refused = ADDRESS_REFUSED if isinstance(error, aiosmtplib.SMTPRecipientRefused) else MESSAGE_REFUSED
    return NotSent(refused, error.code)
