"""The courier: sends the mails of the outbox, on as many replicas as there are.

A mail is claimed for a time, and the try is counted, before it is sent: so no two couriers send it at once, and one on
which they die is not tried for ever. Where a courier dies after the mail server has the mail, nobody knows of it: then
it is sent once more, with the same Message-ID. Just before a mail is handed over, it is asked whether it is still
wanted: none goes out for a verification that is over.

A mail that is queued in its own process wakes it; it looks for others' every few seconds.

It knows the order of things, and leaves words, SMTP and SQL to `mail`, `smtp` and `outbox`.
"""

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final

from service import outbox
from service.config import MailServer, Settings
from service.crypto import Keyring, jittered
from service.db import Database
from service.errors import OnetimeError
from service.mail import Templates, compose
from service.metrics import MAIL_SECONDS, MAILS, MAILS_OLDEST, MAILS_QUEUED
from service.smtp import UNREACHABLE, NotSent, Transport

_LOG = logging.getLogger(__name__)

POLL_S: Final = 5.0
"""How often it looks for mails that another process has queued, and left."""

FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 60.0
"""From the first failed try to the next, doubling up to the longest."""

_RECORD_S: Final = 10.0
"""Beyond the longest try: how much longer a mail is claimed, so that what became of it can be recorded."""

_VERIFICATION_OVER: Final = "verification_over"
_HURRY: Final = timedelta(seconds=5)
"""Of 15 minutes, a moment has gone when the mail is made; it is not to say 14."""

_CLOSE_S: Final = 5.0
_ENDED_AT_ONCE: Final = 500
_RECORD_PAUSE_S: Final = 0.5

Row = Mapping[str, Any]


class Courier:
    """Sends mails until it is closed. A class because it knows which are under way, and is woken."""

    def __init__(
        self, settings: Settings, ring: Keyring, server: MailServer, transport: Transport, templates: Templates
    ) -> None:
        """Take what mails are made of, and what sends them."""
        self._settings = settings
        self._ring = ring
        self._transport = transport
        self._templates = templates
        self._places = server.connections
        # A try is a connection, a login and four commands, each of which has its own limit; all of them together this.
        self._longest_try = 3 * server.timeout.total_seconds()
        self._database = Database(settings.database_url, pool_size=2)
        self._woken = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._crowded = False
        """Whether there may be mails that found no place."""
        self._loop: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start to send."""
        await self._database.open()
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Let mails under way be sent, but not for long. What is left is for another courier, when its time is over."""
        if self._loop is not None:
            self._loop.cancel()
        if self._under_way:
            _, left = await asyncio.wait(self._under_way, timeout=_CLOSE_S)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        await self._transport.close()
        await self._database.close()

    def wake(self) -> None:
        """Look for mails at once: there may be a new one."""
        self._woken.set()

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                more = await self._collect()
                # Afterwards: to take leave of a server may take a moment.
                await self._transport.tend()
            except OnetimeError as error:
                more = False
                _LOG.warning("the outbox cannot be read", extra={"reason": error.reason})
            except Exception:  # noqa: BLE001 - logged; it must go on
                more = False
                _LOG.exception("the courier failed")
            if not more:
                await self._pause()

    async def _pause(self) -> None:
        """Wait until woken, or for the next look."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(jittered(POLL_S)):
                await self._woken.wait()

    async def _collect(self) -> bool:
        """Claim as many mails as there is room for, and start to send them. Return whether to look again at once."""
        free = self._places - len(self._under_way)
        if free == 0:
            # Whichever ends next wakes it.
            self._crowded = True
            return False
        ended, claimed, (counted,) = await self._database.commit(
            outbox.end_due(self._settings, count=_ENDED_AT_ONCE),
            outbox.claim(count=free, lease=self._longest_try + _RECORD_S),
            outbox.count_queued(),
        )
        MAILS_QUEUED.set(counted["queued"])
        MAILS_OLDEST.set(counted["oldest"])
        for row in ended:
            if row["failure"] == _VERIFICATION_OVER:
                _tell(row, "withdrawn", _VERIFICATION_OVER)
        self._crowded = len(claimed) == free
        for row in claimed:
            task = asyncio.create_task(self._deliver(row))
            self._under_way.add(task)
            task.add_done_callback(self._ended)
        # A place may have become free meanwhile.
        return len(ended) == _ENDED_AT_ONCE or (self._crowded and len(self._under_way) < self._places)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if self._crowded:
            self.wake()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # Without its words, which may quote the address. When the mail's time is over, it is tried again.
            stack = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("a mail was not sent, or not recorded", extra={"failure": f"{stack}{type(error).__name__}"})

    async def _deliver(self, row: Row) -> None:
        mail = (row["verification_id"], row["message_id"])
        try:
            accepted = await self._send(row)
        except NotSent as error:
            wait = None
            if not error.permanent and row["tries"] < self._settings.mail_tries:
                wait = jittered(min(FIRST_WAIT_S * 2 ** (row["tries"] - 1), LONGEST_WAIT_S))
            await self._record(outbox.mark_failed(*mail, row["tries"], failure=error.failure, wait=wait))
            _tell(row, "failed" if wait is None else "retry", error.failure, error.code)
            if wait is not None:
                asyncio.get_running_loop().call_later(wait, self.wake)
        else:
            if not accepted:
                # The verification is over, or its code is sent again by a newer mail.
                _tell(row, "withdrawn")
                return
            for recorded in await self._record(outbox.mark_sent(*mail)):
                MAIL_SECONDS.observe(recorded["seconds"])
            _tell(row, "sent")

    async def _send(self, row: Row) -> bool:
        """Send a mail, and return whether it was accepted; it is not sent if nobody wants it any more.

        Raises:
            NotSent: It was not accepted.
        """
        if row["tries"] > self._settings.mail_tries:
            # How the last one ended was never recorded: its courier died, of this mail perhaps.
            raise NotSent(row["failure"] or UNREACHABLE)
        verification_id = row["verification_id"]
        try:
            address = self._ring.open_address(row["sealed_address"], row_id=verification_id)
            code = self._ring.unseal_code(
                row["sealed_code"], row_id=verification_id, user_id=row["user_id"], token_hash=row["token_hash"]
            )
        except KeyError:
            # The key was retired, and with it the verification.
            return False
        product = self._settings.mail_product
        lifetime = row["time_left"] + _HURRY
        content = self._templates.write(code=code, locale=row["locale"], product=product, lifetime=lifetime)
        message = compose(
            content,
            product=product,
            sender=self._settings.mail_from,
            to=address,
            message_id=row["message_id"],
            date=row["queued_at"],
        )
        try:
            async with asyncio.timeout(self._longest_try):
                return await self._transport.send(message, to=address, wanted=partial(self._wanted, row))
        except TimeoutError:
            raise NotSent(UNREACHABLE) from None

    async def _wanted(self, row: Row) -> bool:
        """Tell whether a mail is still to be sent, and by this try: its preparation may have taken long."""
        (found,) = await self._database.commit(
            outbox.confirm(self._settings, row["verification_id"], row["message_id"], row["tries"])
        )
        return bool(found)

    async def _record(self, statement: outbox.Statement) -> list[Row]:
        """Record what became of a mail, for as long as it is claimed: what is not recorded is sent again."""
        loop = asyncio.get_running_loop()
        end = loop.time() + _RECORD_S
        while True:
            try:
                (rows,) = await self._database.commit(statement)
            except OnetimeError:
                if loop.time() > end:
                    raise
                await asyncio.sleep(_RECORD_PAUSE_S)
            else:
                return list(rows)


def _tell(row: Row, outcome: str, failure: str = "", code: int | None = None) -> None:
    """Count what became of a try, and log it, without address and code."""
    MAILS.labels(outcome, failure).inc()
    line = {"outcome": outcome, "verification_id": str(row["verification_id"])}
    if failure:
        line["failure"] = failure
    if code is not None:
        line["smtp_code"] = str(code)
    if "message_id" in row:
        line |= {"user_id": str(row["user_id"]), "message_id": str(row["message_id"]), "tries": str(row["tries"])}
    _LOG.log(logging.WARNING if outcome in ("retry", "failed") else logging.INFO, "mail", extra=line)
