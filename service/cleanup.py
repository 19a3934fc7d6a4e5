"""Clean-up: removes what has expired, in passing after writes, and on demand.

A table is swept a range of blocks at a time, with a cursor that all replicas share, since not every table has an index
on time: the costs of a sweep do not depend on a table's size. Nothing here makes a request wait, and no failure here
reaches a caller.

Each write has a 1 in 10 chance to start a sweep of 256 blocks of each table, a second after the last one at the least.
Ten writes fill about one block, so a steady load is swept faster than it writes, and an idle service does nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from service.config import Settings
from service.crypto import chance
from service.db import Database, Params, Transaction, load_queries
from service.errors import OnetimeError
from service.metrics import CLEANUP_ROWS, CLEANUP_RUNS

_LOG = logging.getLogger(__name__)
_QUERIES = load_queries("cleanup")

BLOCKS_IN_PASSING: Final = 256
"""Blocks of each table that one sweep looks at: two milliseconds where nothing has expired."""

PAUSE_S: Final = 1.0
"""From the end of a sweep to the next one. It still looks at as many blocks as 2,500 writes a second fill."""

BLOCKS_ON_DEMAND: Final = 256
"""Blocks to a transaction of `sweep_all`."""

_GRACE: Final = timedelta(hours=1)
"""Age at which a state without its token is an orphan. Any that outlasts a statement would do."""

_TRANSACTION: Final = timedelta(seconds=30)
"""Longer than any of ours lasts. A send is counted as its transaction begins, and its token made as it ends."""

_DAY: Final = timedelta(days=1)
_YEAR: Final = timedelta(days=366)

_TABLES: Final = {
    "auth.one_time_tokens": "sweep_one_time_tokens",
    "public.email_verification_tokens": "sweep_email_verification_tokens",
    "onetime.one_time_token_states": "sweep_one_time_token_states",
    "onetime.email_verification_states": "sweep_email_verification_states",
    "onetime.outbox": "sweep_outbox",
    "onetime.receipts": "sweep_receipts",
    "onetime.budgets": "sweep_budgets",
}
"""What is swept, and by which statement."""


class Cleanup:
    """Sweeps in passing. A class because a process runs one sweep at a time, on a connection of its own.

    With a connection of the calls' pool, a sweep would make calls wait, or, under load, never get its turn.
    """

    def __init__(self, settings: Settings) -> None:
        """Take the retentions, and where the database is."""
        self._settings = settings
        self._database = Database(settings.database_url, pool_size=1)
        self._sweep: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start to connect."""
        await self._database.open()

    def maybe(self, writes: int) -> None:
        """Start a sweep with the chance that the settings name, for each of so many writes, unless one is under way."""
        if self._sweep is None and chance(1 - (1 - self._settings.cleanup_probability) ** writes):
            self._sweep = asyncio.create_task(self._run())
            self._sweep.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del task
        self._sweep = None

    async def _run(self) -> None:
        try:
            for table in _TABLES:
                await sweep(self._settings, self._database, table, BLOCKS_IN_PASSING)
        except OnetimeError as error:
            CLEANUP_RUNS.labels(outcome="failed").inc()
            _LOG.warning("clean-up failed", extra={"reason": error.reason})
        except Exception:  # noqa: BLE001 - logged; a clean-up has no caller to tell
            CLEANUP_RUNS.labels(outcome="failed").inc()
            _LOG.exception("clean-up failed")
        else:
            CLEANUP_RUNS.labels(outcome="done").inc()
        await asyncio.sleep(PAUSE_S)

    async def close(self) -> None:
        """Wait for the sweep under way."""
        if self._sweep is not None:
            await asyncio.wait([self._sweep])
        await self._database.close()


async def sweep(settings: Settings, database: Database, table: str, blocks: int) -> int:
    """Sweep the next blocks of one table, and return how many rows went; 0 if another replica is at it."""

    async def work(transaction: Transaction) -> int:
        *_, cursors = await transaction.fetch_all(
            (_QUERIES["limit_time"], {}),
            (_QUERIES["join_by_hash"], {}),
            (_QUERIES["lock_cursor"], {"table_name": table}),
        )
        if not cursors:
            await transaction.commit()
            return 0
        total = cursors[0]["blocks"]
        first = cursors[0]["next_block"] if cursors[0]["next_block"] < total else 0
        end = first + blocks
        move: Params = {"table_name": table, "next_block": end if end < total else 0}
        rows, _ = await transaction.commit(_range(settings, table, first, end), (_QUERIES["move_cursor"], move))
        return int(rows[0]["removed"])

    removed = await database.run(work)
    CLEANUP_ROWS.labels(table=table).inc(removed)
    return removed


async def sweep_all(settings: Settings, progress: Callable[[int, int], None]) -> Mapping[str, int]:
    """Sweep every table from its first to its last block, and return how many rows went from each.

    `progress` is called with the blocks done and the blocks in all.

    Raises:
        OnetimeError: The database did not answer.
    """
    database = Database(settings.database_url, pool_size=1)
    await database.open()
    try:
        totals = {
            table: (await database.fetch(_QUERIES["count_blocks"], {"table_name": table}))[0]["blocks"]
            for table in _TABLES
        }
        removed = dict.fromkeys(_TABLES, 0)
        done, total = 0, sum(totals.values())
        progress(done, total)
        for table, blocks in totals.items():
            for first in range(0, blocks, BLOCKS_ON_DEMAND):
                removed[table] += await _sweep_range(settings, database, table, first)
                done += min(BLOCKS_ON_DEMAND, blocks - first)
                progress(done, total)
        return removed
    finally:
        await database.close()


async def _sweep_range(settings: Settings, database: Database, table: str, first: int) -> int:
    _, (row,) = await database.commit(
        (_QUERIES["join_by_hash"], {}), _range(settings, table, first, first + BLOCKS_ON_DEMAND)
    )
    return int(row["removed"])


def _range(settings: Settings, table: str, first: int, end: int) -> tuple[str, Params]:
    """Return the statement that sweeps the blocks from `first` up to, not including, `end`."""
    return _QUERIES[_TABLES[table]], {
        "first": f"({first},0)",
        "end": f"({end},0)",
        "longest_ttl": settings.longest_ttl().total_seconds(),
        "retention": settings.retention.total_seconds(),
        "receipt_retention": settings.receipt_retention.total_seconds(),
        "grace": _GRACE.total_seconds(),
        "longest_send": (max(_DAY, settings.longest_ttl()) + _TRANSACTION).total_seconds(),
        "longest_failure": _DAY.total_seconds(),
        "longest_run": _YEAR.total_seconds(),
    }
