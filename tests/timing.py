"""Measures whether the time of an answer tells an unknown subject from a wrong code: `make timing`.

Calls of both kinds in turn, by one caller, on a server and a PostgreSQL of its own. No test: a machine that is busy
with something else changes what is measured, so a person looks at it.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import click
import psycopg
from calls import Client, new_id, open_channel, reason, serving, wrong
from onetime.v1 import admin_pb2
from onetime.v1 import one_time_tokens_pb2 as ott
from psycopg.rows import dict_row

from service.devdb import embedded_postgres
from service.migrations import migrate

ROUND: Final = 40
"""Calls of a kind before the limits are lifted: below the default of failures in a day, so that budgets are as long."""

ROOMY: Final = {
    "max_attempts": 100,
    "failures_per_window": 50,
    "sends_per_window": 1000,
    "sends_per_day": 1000,
}
PRODUCTION: Final = {"unsafe_cheap_argon2": None, "argon2_memory_kib": None, "argon2_time_cost": None}
"""Argon2 as it is by default."""

Case = Callable[[], Awaitable[object]]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--calls", default=300, help="Calls of each kind.")
def main(calls: int) -> None:
    """Measure the time of answers to wrong codes and to codes of nobody, in turn."""
    with (
        tempfile.TemporaryDirectory(prefix="onetime-timing-") as folder,
        embedded_postgres(Path(folder, "data")) as url,
    ):
        asyncio.run(_prepare(url))
        with serving(url, Path(folder), **ROOMY, **PRODUCTION) as target:
            asyncio.run(_measure(target, calls))


async def _prepare(url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        await migrate(connection)


async def _measure(target: str, calls: int) -> None:
    async with open_channel(target) as channel:
        client = Client(channel)
        issued = await client.issue(digits=6)
        started = await client.start()
        nobody = ott.IssueTokenResponse(token=issued.token, secret=issued.secret)
        nobody.token.user_id, nobody.token.relates_to = new_id(), "nobody@example.org"
        unknown = type(started)(email_verification_token=started.email_verification_token[::-1], code=started.code)
        pairs: dict[str, tuple[Case, Case]] = {
            "code, by user": (
                lambda: client.consume(issued, wrong(issued.secret)),
                lambda: client.consume(nobody),
            ),
            "code, by address": (
                lambda: client.consume(issued, wrong(issued.secret), by_address=True),
                lambda: client.consume(nobody, by_address=True),
            ),
            "code, with request_id": (
                lambda: client.consume(issued, wrong(issued.secret), request_id=new_id()),
                lambda: client.consume(nobody, request_id=new_id()),
            ),
            "email code": (
                lambda: client.verify(started, wrong(started.code)),
                lambda: client.verify(unknown),
            ),
        }
        click.echo(f"{'':24}{'wrong, median':>16}{'nobody, median':>16}{'ratio':>8}")
        for name, (wrong_code, no_code) in pairs.items():
            times: tuple[list[float], list[float]] = ([], [])
            with click.progressbar(range(calls), label=name, file=sys.stderr) as bar:
                for number in bar:
                    if number % ROUND == 0:
                        user_id, address = issued.token.user_id, issued.token.relates_to
                        issued = await client.issue(user_id, digits=6, relates_to=address)
                        started = await client.start()
                        await client.admin.UnlockSubject(
                            admin_pb2.UnlockSubjectRequest(
                                user_id=user_id, token_type=admin_pb2.UnlockSubjectRequest.TOKEN_TYPE_RECOVERY
                            )
                        )
                    # Who comes first changes from one pair to the next.
                    for kind in (0, 1) if number % 2 else (1, 0):
                        begin = time.perf_counter()
                        told = await reason((wrong_code, no_code)[kind]())
                        times[kind].append(time.perf_counter() - begin)
                        if told != ("CODE_MISMATCH", "TOKEN_NOT_FOUND")[kind]:
                            raise SystemExit(f"{name}: {told}")
            medians = [statistics.median(each) for each in times]
            ratio = medians[1] / medians[0]
            click.echo(f"{name:24}{medians[0] * 1000:>13.2f} ms{medians[1] * 1000:>13.2f} ms{ratio:>8.3f}")


if __name__ == "__main__":
    main()
