"""The database: its pool, its transactions, its statements, and what its errors mean.

Every connection is in autocommit mode and in UTC. The driver's errors end here: what leaves this module is one of
`service.errors`, without the driver's text.

It knows nothing of tokens.
"""

import asyncio
import contextlib
import itertools
import logging
import re
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from datetime import datetime
from functools import partial
from importlib import resources
from typing import Any, Final, TypeVar

import psycopg
from psycopg.adapt import Dumper
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from service.call import Call, calls_served, current_call
from service.errors import DatabaseUnavailable, InternalError, OnetimeError, OutcomeUnknown

Connection = psycopg.AsyncConnection[DictRow]
Params = Mapping[str, object]
T = TypeVar("T")

LOCK_TIMEOUT_MS: Final = 2_000
"""A row lock is held for milliseconds. Less than the statement's time, so that the error names the cause."""

IMPATIENCE_MS: Final = 100
"""How long a transaction waits for a lock in which several calls share, before it is done in parts."""

STATEMENT_TIMEOUT_MS: Final = 4_000
"""Less than the server's cap on a call (5 s), so that the database gives up first."""

TRIP_TIMEOUT_S: Final = 4.5
"""How long a trip to the database may take by our own clock. The database's own limits come first, except in COMMIT,
where it waits for a synchronous standby as long as that takes, and where it is frozen or out of reach. Less than the
server's cap on a call (5 s) too, so that the caller can still be told what happened."""

IDLE_IN_TRANSACTION_TIMEOUT_MS: Final = 10_000
"""Ends the transaction of a process that was stopped in its middle, and with it its locks."""

POOL_TIMEOUT_S: Final = 2.0
"""How long a call waits for a free connection."""

CONNECT_TIMEOUT_S: Final = 3

RECONNECT_TIMEOUT_S: Final = 2.0
"""How long the pool itself tries to replace a lost connection; after that, each call that finds none starts it anew. By
default it tries for minutes, with ever longer pauses, and in such a pause nobody notices that the database is back."""


def skipping_locked(query: str) -> str:
    """Return a statement that passes over rows which others have locked, where as it stands it waits for them."""
    return query.replace("/* skip locked */", "skip locked")


def load_queries(stem: str) -> Mapping[str, str]:
    """Return the named statements of `service/sql/<stem>.sql`.

    A statement starts at a line `-- name: its_name`, and goes up to the next such line. Its comments go along: they
    are read in the server's log too.
    """
    text = resources.files("service").joinpath("sql", f"{stem}.sql").read_text("utf-8")
    blocks = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    names = blocks[::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{stem}.sql: two statements have the same name")
    return dict(zip(names, (block.strip() for block in blocks[1::2]), strict=True))


_LOG = logging.getLogger(__name__)
_QUERIES = load_queries("db")
_numbers = itertools.count()

CHARGE_NOBODY: Final[tuple[str, Params]] = (_QUERIES["charge_nobody"], {})
"""The statement that costs as much as counting a wrong guess, where there is nothing to count on."""


class StatementFailed(DatabaseUnavailable):
    """The server refused a statement; nothing happened."""


class Transaction:
    """One transaction on one connection. A class because only it knows whether a lost connection leaves doubt."""

    def __init__(self, connection: Connection) -> None:
        """Take a connection in autocommit mode, on which BEGIN has not been sent yet."""
        self._connection = connection
        self.begun = False
        self.committed = False
        self.impatient = False
        """Whether to fail on a lock soon, and not to wait for as long as a call on its own would."""
        self.in_doubt = False
        """Whether COMMIT was sent and its outcome not heard."""
        self._cut_short = False
        """Whether a trip failed, so that statements after the one at fault were sent and not run."""

    async def fetch(self, query: str, params: Params) -> list[DictRow]:
        """Run a statement in this transaction, and return its rows."""
        return (await self.fetch_all((query, params)))[0]

    async def fetch_all(self, *statements: tuple[str, Params]) -> list[list[DictRow]]:
        """Run statements in one trip, and return the rows of each."""
        return await self._trip(statements, commit=False)

    async def read(self, query: str, params: Params) -> list[DictRow]:
        """Run a statement that only reads, outside of any transaction block, and return its rows."""
        async with asyncio.timeout(TRIP_TIMEOUT_S):
            return await (await self._connection.execute(query, params)).fetchall()

    async def commit(self, *statements: tuple[str, Params]) -> list[list[DictRow]]:
        """Run statements and COMMIT in one trip, and return their rows. What was asked for is then on disk.

        Raises:
            OutcomeUnknown: A synchronous standby did not confirm.
        """
        warnings: list[str] = []

        def heed(diagnostic: psycopg.errors.Diagnostic) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(diagnostic.sqlstate or "")

        self._connection.add_notice_handler(heed)
        try:
            rows = await self._trip(statements, commit=True)
        except psycopg.Error as error:
            if not _connection_lost(error, self._connection):
                # The server told which statement failed, so COMMIT became a rollback.
                self._tell(in_doubt=False)
            raise
        finally:
            self._connection.remove_notice_handler(heed)
        if warnings:
            # The only warning that COMMIT gives: it stopped waiting for a synchronous standby.
            raise OutcomeUnknown
        self.committed = True
        self._tell(in_doubt=False)
        return rows

    async def _trip(self, statements: Sequence[tuple[str, Params]], *, commit: bool) -> list[list[DictRow]]:
        begin = not self.begun
        self.begun = self._cut_short = True
        # At the limit psycopg asks the server to cancel. A COMMIT that waits for a standby then ends, with a warning,
        # and the connection is as good as before. Where the server does not hear, psycopg closes it after 10 s.
        async with asyncio.timeout(TRIP_TIMEOUT_S), self._connection.pipeline():
            if begin:
                await self._connection.execute("BEGIN")
                if self.impatient:
                    await self._connection.execute(_QUERIES["be_impatient"], {"lock_timeout": f"{IMPATIENCE_MS}"})
            cursors = [await self._connection.execute(query, params) for query, params in statements]
            if commit:
                # From here on the server may have committed, whatever we hear of it. Not before: a connection that was
                # stale shows it at BEGIN, and then the work can be done again on another one.
                self._tell(in_doubt=True)
                await self._connection.execute("COMMIT")
        self._cut_short = False
        # Fetched after the pipeline's end: a fetch inside it would be a trip of its own.
        return [[] if cursor.rownumber is None else await cursor.fetchall() for cursor in cursors]

    async def roll_back(self) -> None:
        """End the transaction without effect, if it has begun and is not committed."""
        if self.begun and not self.committed:
            with contextlib.suppress(psycopg.Error, TimeoutError):
                async with asyncio.timeout(TRIP_TIMEOUT_S):
                    await self._connection.execute("ROLLBACK")
                    if self._cut_short:
                        # Where one of them was to be prepared, psycopg takes it for prepared, and each later use of it
                        # on this connection would fail. At this command it forgets all of them, if its text is new.
                        await self._connection.execute(f"DEALLOCATE ALL -- {next(_numbers)}".encode())

    def _tell(self, *, in_doubt: bool) -> None:
        """Remember whether there is doubt, and tell the calls, which may reach their time limits meanwhile."""
        self.in_doubt = in_doubt
        for call in calls_served():
            call.in_doubt = in_doubt


def _connection_lost(error: psycopg.Error, connection: Connection) -> bool:
    """Tell whether the connection, rather than the statement, is at fault."""
    return connection.broken or connection.closed or (error.sqlstate or "").startswith(("57P", "08"))


class _Idle(deque[Connection]):
    """The pool's idle connections, the one that came back last first.

    The pool takes the first one, and so would take them in turn. But each is a process of PostgreSQL with caches of its
    own, and maps each shared page that it comes upon for itself: a few that are busy are faster than many that are
    seldom so, the more the larger the database is.
    """

    def append(self, connection: Connection) -> None:
        """Take a connection back."""
        self.appendleft(connection)


class Database:
    """The pool, and the tasks that no caller can cancel. A class because both live as long as the server."""

    def __init__(self, url: str, *, pool_size: int, after_write: Callable[[int], None] = lambda _: None) -> None:
        """Describe the pool; `open` fills it. `after_write` is called after each transaction, with its writes."""
        self._after_write = after_write
        self._tasks: set[asyncio.Task[Any]] = set()
        self.pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            min_size=pool_size,
            max_size=pool_size,
            open=False,
            timeout=POOL_TIMEOUT_S,
            reconnect_timeout=RECONNECT_TIMEOUT_S,
            configure=_configure,
            # No check= here: after a restart of the server it sleeps for every stale connection. See `_transact`.
            kwargs={
                "autocommit": True,
                "row_factory": dict_row,
                "client_encoding": "utf8",  # whatever the database's own; `ArrayDumper` writes no other
                "connect_timeout": CONNECT_TIMEOUT_S,
                "application_name": "onetime",
                "keepalives_idle": 30,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 10_000,
                "target_session_attrs": "read-write",
            },
            name="onetime",
        )
        self.pool._pool = _Idle()  # noqa: SLF001 - it has no setting for its order

    async def open(self) -> None:
        """Start to fill the pool. Returns before it is full: health tells when the database answers."""
        await self.pool.open(wait=False)

    async def close(self) -> None:
        """Wait for the transactions under way, then close the pool."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self.pool.close()

    async def run(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run work in a transaction that a caller who hangs up cannot undo, as `transact` does.

        Raises:
            DatabaseUnavailable: Nothing happened.
            OutcomeUnknown: Nobody can know whether it happened.
        """
        return await self.protect(self.transact(work))

    async def transact(self, work: Callable[[Transaction], Awaitable[T]], *, writes: int = 1) -> T:
        """Run work in a transaction, in a task that nobody cancels.

        `work` decides: it ends with `commit`, or leaves the transaction to be rolled back by raising or by returning
        without. It is called once more, on a new connection, if the first was lost before anything was sent to be
        committed, or led to a server that takes no writes.

        Args:
            work: What to do.
            writes: How many calls it does it for.

        Raises:
            StatementFailed: Nothing happened, since the server refused a statement.
            DatabaseUnavailable: Nothing happened.
            OutcomeUnknown: Nobody can know whether it happened.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for mypy: a coroutine runs in one
        self._tasks.add(task)
        try:
            result = await self._transact(work)
        finally:
            self._tasks.discard(task)
        # In a context of its own: what it starts belongs to no call.
        Context().run(self._after_write, writes)
        return result

    async def commit(self, *statements: tuple[str, Params]) -> list[list[DictRow]]:
        """Run statements in a transaction of their own, as `run` does, and return their rows.

        Raises:
            DatabaseUnavailable: Nothing happened.
            OutcomeUnknown: Nobody can know whether it happened.
        """

        async def work(transaction: Transaction) -> list[list[DictRow]]:
            return await transaction.commit(*statements)

        return await self.run(work)

    async def ping(self) -> bool:
        """Tell whether the database answers and takes writes.

        Raises:
            DatabaseUnavailable: It does not answer.
        """
        (row,) = await self.fetch(_QUERIES["ping"], {})
        if not row["writable"]:
            # Look for the new primary, even if no calls come: a balancer sends none to where health is bad.
            await self.pool.drain()
        return bool(row["writable"])

    async def protect(self, work: Coroutine[Any, Any, T], *, decides: bool = True) -> T:
        """Let work go on to its end, even if the caller of this is cancelled, and log what it then decided.

        Otherwise a caller could see that a guess is wrong by the time it takes, hang up before it is counted, and
        guess for ever. And a caller that is cancelled gets away at once: psycopg, cancelled while its server is frozen,
        takes 10 s.
        """
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            leave_unheard(task, decides=decides)
            raise

    async def _transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        try:
            return await self._attempt(work)
        except _WrongConnectionError:
            # The database was restarted, or another server has become the primary: every connection of the pool is as
            # stale as this one.
            await self.pool.drain()
        try:
            return await self._attempt(work)
        except _WrongConnectionError as error:
            raise DatabaseUnavailable from error

    async def _attempt(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        try:
            async with self.pool.connection() as connection:
                transaction = Transaction(connection)
                try:
                    return await work(transaction)
                except (psycopg.Error, TimeoutError) as error:
                    raise _translated(error, transaction, connection) from error
                except Exception as error:
                    if not transaction.committed or isinstance(error, OnetimeError):
                        raise
                    # A bug of ours, after all was done: it must not look as if it could be done again.
                    _LOG.exception("a bug after COMMIT")
                    raise InternalError from error
                finally:
                    await transaction.roll_back()
        except (PoolTimeout, TooManyRequests, PoolClosed) as error:
            raise DatabaseUnavailable from error

    async def fetch(self, query: str, params: Params) -> list[DictRow]:
        """Run a statement that only reads, and return its rows. A caller that is cancelled gets away at once.

        Raises:
            DatabaseUnavailable: The database did not answer.
        """
        return await self.protect(self.read(query, params), decides=False)

    async def read(self, query: str, params: Params) -> list[DictRow]:
        """Do what `fetch` does, in a task that nobody cancels."""

        async def read(transaction: Transaction) -> list[DictRow]:
            return await transaction.read(query, params)

        return await self._transact(read)


def leave_unheard(work: asyncio.Future[Any], *, decides: bool = True) -> None:
    """Note that the current call's caller has gone while this work goes on, and have it logged what it decides."""
    call = current_call.get(None)
    if call is not None:
        call.unheard = work
    work.add_done_callback(partial(_log_unheard, call if decides else None))


def _log_unheard(call: Call | None, task: asyncio.Future[Any]) -> None:
    """Log how work ended whose caller has gone: what was decided is on record, though nobody heard it."""
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        outcome = "OK"
    elif isinstance(error, OnetimeError):
        outcome = error.reason
    else:
        outcome = InternalError.reason
        _LOG.error("work of a cancelled call failed", exc_info=error)
    if call is not None:
        line = {
            "event": "audit",
            "call_id": call.call_id,
            "service": call.service,
            "method": call.method,
            "caller": call.caller,
            "outcome": outcome,
            "heard": False,
            **call.subject,
        }
        # As all audit events, whatever level is set.
        _LOG.handle(logging.LogRecord(_LOG.name, logging.INFO, "", 0, line, (), None))


class _WrongConnectionError(Exception):
    """Nothing was sent to be committed, and on another connection it may succeed: the work can be done again."""


def _translated(error: psycopg.Error | TimeoutError, transaction: Transaction, connection: Connection) -> Exception:
    """Return what a failure means. Errors that are bugs of ours are returned as they are."""
    if transaction.in_doubt:
        return OutcomeUnknown()
    if isinstance(error, TimeoutError):
        # No second try: the call's own time is over as well.
        return DatabaseUnavailable()
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction) or _connection_lost(error, connection):
        # A server that takes no writes was the primary until a moment ago.
        return _WrongConnectionError()
    if isinstance(error, psycopg.OperationalError):
        # Timeouts of a lock or a statement, a full disk: the statement failed whole.
        return StatementFailed()
    return error


def _quoted(text: str) -> str:
    """Return a text as an element of an array literal."""
    if "\\" in text or '"' in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


_LITERALS: Final[Mapping[type, Callable[[Any], str]]] = {
    type(None): lambda _: "NULL",
    int: str,
    float: str,
    str: _quoted,
    bytes: lambda octets: f'"\\\\x{octets.hex()}"',
    uuid.UUID: str,
    datetime: lambda time: f'"{time.isoformat()}"',
}
"""How elements of arrays are written."""


class ArrayDumper(Dumper):
    """Writes lists as array literals, whose type is that to which the statement casts them.

    A class because psycopg asks for one. Its own finds out a type first, and then looks into each element for
    characters to quote: for texts that takes 5 to 19 times as long.
    """

    def dump(self, obj: list[Any]) -> bytes:
        """Return the literal of a flat list, in UTF-8. Encodings exist in which the quoting would not be safe.

        Raises:
            TypeError: An element is of a type that no statement takes.
            psycopg.DataError: A text has a NUL character, at which libpq would cut the literal off.
        """
        try:
            literal = f"{{{','.join([_LITERALS[type(element)](element) for element in obj])}}}"
        except KeyError as error:
            raise TypeError(f"no statement takes arrays of {error}") from None
        if "\0" in literal:
            raise psycopg.DataError("a text with a NUL character cannot be stored")
        return literal.encode()


async def _configure(connection: Connection) -> None:
    """Set what every statement relies on. Not in the connection string: poolers refuse start-up options."""
    connection.adapters.register_dumper(list, ArrayDumper)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        await connection.execute(
            _QUERIES["configure_session"],
            {
                "statement_timeout": str(STATEMENT_TIMEOUT_MS),
                "lock_timeout": str(LOCK_TIMEOUT_MS),
                "idle_timeout": str(IDLE_IN_TRANSACTION_TIMEOUT_MS),
            },
        )
