"""How parameters reach the database, and on which connection. What becomes of calls when it fails: `test_faults.py`."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, Final

import psycopg
import pytest
from calls import Database, connected
from conftest import PostgresServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.db import ArrayDumper
from service.db import Database as Pool

PROPERTY: Final = settings(deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])

TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ELEMENTS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "text": TEXTS,
    "uuid": st.uuids(),
    "bytea": st.binary(),
    "int": st.integers(-(2**31), 2**31 - 1),
    "float8": st.floats(allow_nan=False),
    "timestamptz": st.datetimes(timezones=st.just(UTC)),
}
"""By the types of the statements' arrays, what may be in them."""


class Number(IntEnum):
    """A type that has not been thought of."""

    ONE = 1


@pytest.fixture(scope="module")
def database(postgres_18: PostgresServer, template_url: str) -> Iterator[Database]:
    """A connection that writes arrays as the service does."""
    with postgres_18.database(template_url) as url, connected(url) as connection:
        connection.adapters.register_dumper(list, ArrayDumper)
        connection.execute("set timezone = 'UTC'")
        yield connection


def sent(database: Database, elements: list[Any], of: str) -> list[Any]:
    """Send an array, and return it as the database understood it."""
    row = database.execute(f"select %(elements)s::{of}[] as got", {"elements": elements}).fetchone()
    assert row is not None
    got: list[Any] = row["got"]
    return got


@PROPERTY
@given(data=st.data(), of=st.sampled_from(sorted(ELEMENTS)))
def test_arrays_arrive_as_they_are(database: Database, data: st.DataObject, of: str) -> None:
    """Neither an element's characters nor its neighbours change what the database makes of it."""
    elements = data.draw(st.lists(st.none() | ELEMENTS[of]))
    assert sent(database, elements, of) == elements


@PROPERTY
@given(texts=st.lists(st.text('{}",\\NULnul \t\n', max_size=6)))
@example(texts=['a","b', "NULL", "null", "", " ", "\\", '\\"', "{}", "a,b", "'"])
def test_no_text_becomes_two(database: Database, texts: list[str]) -> None:
    """An address may hold whatever array literals are written with."""
    assert sent(database, texts, "text") == texts


@pytest.mark.parametrize("texts", [["a\0b"], ["a", "\0"]])
def test_a_nul_character_is_refused(database: Database, texts: list[str]) -> None:
    """Libpq would cut the array off there."""
    with pytest.raises(psycopg.DataError, match="NUL"):
        sent(database, texts, "text")


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
@pytest.mark.parametrize("option", ["", "client_encoding=LATIN1"])
async def test_every_encoding_is_spoken(postgres_18: PostgresServer, encoding: str, option: str) -> None:
    """Texts arrive, alone and in arrays, whatever the database's encoding is, and whatever the URL asks for."""
    address = 'jos\u00e9\u00f1"\\@example.com'
    with postgres_18.database(encoding=encoding) as url:
        pool = Pool(f"{url}{'&' if '?' in url else '?'}{option}", pool_size=1)
        await pool.open()
        try:
            (row,) = await pool.fetch(
                "select %(one)s::text as one, %(some)s::text[] as some",
                {"one": address, "some": [address, "b"]},
            )
        finally:
            await pool.close()
    assert (row["one"], row["some"]) == (address, [address, "b"])


@pytest.mark.parametrize("element", [["nested"], True, Number.ONE, object(), datetime(2026, 3, 8, tzinfo=UTC).date()])
def test_other_types_are_refused(database: Database, element: object) -> None:
    """What nobody has thought of is no guess."""
    with pytest.raises(TypeError, match=type(element).__name__):
        sent(database, [element], "text")


async def test_the_connection_that_came_back_last_goes_out_first(postgres_18: PostgresServer) -> None:
    """Calls one after the other are all on one, whatever was before; those at the same time have each their own."""
    with postgres_18.database() as url:
        pool = Pool(url, pool_size=4)

        async def backend(seconds: float = 0) -> int:
            (row,) = await pool.fetch("select pg_backend_pid() as pid, pg_sleep(%(s)s)", {"s": seconds})
            pid: int = row["pid"]
            return pid

        await pool.open()
        try:
            await pool.pool.wait()
            for _ in range(3):
                *others, last = [await each for each in asyncio.as_completed([backend(n / 10) for n in range(1, 5)])]
                assert len({*others, last}) == 4
                assert {await backend() for _ in range(8)} == {last}
        finally:
            await pool.close()
