"""The start, what a database must be before it is served from, and how calls are taken up."""

import asyncio
import gc
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import psycopg
import pytest
from calls import Client, reason
from conftest import OnetimeServer, Serve, clean_environment, free_port
from grpc._cython import cygrpc  # type: ignore[attr-defined] # it ships no types
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from onetime.v1 import email_verification_pb2 as ev
from psycopg import sql

from service.app import AHEAD, Files, _start_server
from service.config import Settings
from service.crypto import Keyring, new_key
from service.db import Database
from service.devdb import embedded_postgres

TIMEOUT_S = 20.0
"""For a call, and a multiple of what a stop takes."""

GRANTS = (
    "grant usage on schema auth, onetime to {role}",
    "grant select, insert, update, delete on auth.one_time_tokens, public.email_verification_tokens to {role}",
    "grant select, insert, update, delete on all tables in schema onetime to {role}",
    "grant select, insert on public.users to {role}",
)
"""As README documents them."""


@pytest.fixture
def role(migrated_url: str) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    name = f"serving_{free_port()}"
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        yield name
        connection.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
        connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def grant(url: str, role: str) -> None:
    """Give a role what README says that it needs."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in GRANTS:
            connection.execute(sql.SQL(statement).format(role=sql.Identifier(role)))


def as_role(url: str, role: str) -> str:
    """Return the URL for another role."""
    return url.replace("//onetime@", f"//{role}@")


def refused(url: str, keys_file: Path, listen: str = "") -> str:
    """Start a server that must not start, and return what it says."""
    result = subprocess.run(
        [sys.executable, "-m", "service", "serve", "--insecure-loopback", "--no-migrate"],
        env=clean_environment(database_url=url, keys_file=keys_file, listen=listen or f"127.0.0.1:{free_port()}"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_role_without_privileges_is_told_all_that_it_lacks(migrated_url: str, role: str, keys_file: Path) -> None:
    """The service does not start only to fail at its first call, and names every grant that helps."""
    told = refused(as_role(migrated_url, role), keys_file)
    for cure in (
        f"grant usage on schema auth to {role}",
        f"grant usage on schema onetime to {role}",
        f"grant select, insert, update, delete on auth.one_time_tokens to {role}",
        f"grant select, insert, update, delete on onetime.receipts to {role}",
        f"grant select on public.users to {role}",
    ):
        assert cure in told


async def test_a_role_with_the_documented_privileges_serves(serve: Serve, migrated_url: str, role: str) -> None:
    """What README asks for is enough for every call and for the clean-up."""
    grant(migrated_url, role)
    async with serve(as_role(migrated_url, role), cleanup_probability=1) as server, server.channel() as channel:
        client = Client(channel)
        for digits in (0, 6):
            issued = await client.issue(digits=digits)
            await client.check(issued)
            assert await client.consume(issued) == issued.token
            assert await reason(client.consume(issued)) == "TOKEN_NOT_FOUND"
        started = await client.start()
        assert (await client.verify(started)).state == ev.STATE_USED
        await asyncio.sleep(0.5)  # for the clean-up, which would complain in the log
        assert "ERROR" not in server.log.read_text("utf-8")
        assert "clean-up failed" not in server.log.read_text("utf-8")


def test_row_level_security_that_hides_rows_is_refused(migrated_url: str, role: str, keys_file: Path) -> None:
    """A policy that hides rows from the service would make live tokens unknown."""
    grant(migrated_url, role)
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute("alter table auth.one_time_tokens enable row level security")
    told = refused(as_role(migrated_url, role), keys_file)
    assert "row level security hides rows of auth.one_time_tokens" in told


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes", "default_transaction_read_only"])
def test_a_database_that_cannot_be_trusted_is_refused(setting: str, data_dir: Path, keys_file: Path) -> None:
    """What would lose acknowledged tokens, or take none, is refused at the start with its cure."""
    value = "on" if setting.startswith("default") else "off"
    with embedded_postgres(data_dir, settings={setting: value} if value == "off" else {}) as url:
        if value == "on":
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("alter role onetime set default_transaction_read_only = on")
        told = refused(url, keys_file)
    assert ("it takes no writes" if value == "on" else f"{setting} is off: set it on") in told


@pytest.mark.parametrize(("given", "held"), [("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")])
async def test_commits_are_on_disk_whatever_the_database_says(migrated_url: str, given: str, held: str) -> None:
    """A default that would lose acknowledged tokens in a crash does not hold for the service; a stricter one does."""
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("alter database {} set synchronous_commit = {}").format(name, sql.Literal(given)))
    database = Database(migrated_url, pool_size=1)
    await database.open()
    try:
        assert await database.fetch("show synchronous_commit", {}) == [{"synchronous_commit": held}]
    finally:
        await database.close()


async def test_a_taken_address_is_told(serve: Serve, migrated_url: str, keys_file: Path) -> None:
    """A second server on one address is a mistake, and is told so."""
    async with serve(migrated_url) as server:
        told = await asyncio.to_thread(refused, migrated_url, keys_file, server.target)
        assert f"cannot listen on {server.target}" in told


async def test_servers_share_a_port(serve: Serve, migrated_url: str) -> None:
    """Asked to, several servers take connections at one address, and each counts its own calls."""
    address = f"127.0.0.1:{free_port()}"
    shared = {"listen": address, "share_port": True}
    async with serve(migrated_url, **shared) as one, serve(migrated_url, **shared) as other:
        issued = []
        # The kernel deals connections out by their ports; and the second server may still be starting.
        while not (calls_counted(one) and calls_counted(other)):
            async with one.channel() as channel:
                issued.append(await Client(channel).issue())
            assert len(issued) < 500
        assert calls_counted(one) + calls_counted(other) == len(issued)
        async with other.channel() as channel:
            for each in issued:
                assert await Client(channel).consume(each) == each.token


def calls_counted(server: OnetimeServer) -> int:
    """Return how many calls of IssueToken a server counts; none while it starts."""
    try:
        with urllib.request.urlopen(server.metrics_url, timeout=10) as page:  # noqa: S310 - our own, over HTTP
            text = page.read().decode()
    except urllib.error.URLError:
        return 0
    found = re.search(
        r'^grpc_server_handled_total{grpc_code="OK",grpc_method="IssueToken",.*} ([0-9]+)', text, re.MULTILINE
    )
    return int(found[1]) if found else 0


def test_a_database_that_is_not_there_is_told(keys_file: Path) -> None:
    """The message names what to check, and no password."""
    told = refused("postgresql://app:geheim@127.0.0.1:1/app", keys_file)
    assert "check database_url" in told
    assert "geheim" not in told


def test_a_database_that_is_not_migrated_is_told(database_url: str, keys_file: Path) -> None:
    """Without the right to migrate, the service says what helps."""
    assert "`onetime migrate` helps" in refused(database_url, keys_file)


# How calls are taken up


@pytest.fixture
async def taker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    """A server as `onetime serve` has it, in this process, with health alone, and its address."""
    monkeypatch.setattr(cygrpc, "AioServer", cygrpc.AioServer)  # what it is afterwards
    settings = Settings(listen=f"127.0.0.1:{free_port()}")
    files = Files(Keyring([new_key()]), None, None, [])
    servicers = [(health_pb2_grpc.add_HealthServicer_to_server, health.aio.HealthServicer())]
    server, accepting = await _start_server(settings, files, servicers)
    yield server, settings.listen
    await server.stop(0)
    assert accepting.done()
    await asyncio.sleep(0)
    gc.collect()
    assert not caplog.records  # asyncio's, of waits that ended with an error which nobody looked at


def waits() -> int:
    """Return how many calls are waited for."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return sum(name.endswith("._request_call") for name in names)


async def test_many_calls_are_waited_for_at_once(taker: tuple[grpc.aio.Server, str]) -> None:
    """And as many again once some have come."""
    _, address = taker
    await asyncio.sleep(0)
    assert waits() == AHEAD
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined] # its stubs leave it out
        request = health_pb2.HealthCheckRequest()
        await asyncio.gather(*(check(request, timeout=TIMEOUT_S) for _ in range(2 * AHEAD)))
    assert waits() == AHEAD


async def test_calls_that_come_at_the_stop_do_not_hold_it_up(taker: tuple[grpc.aio.Server, str]) -> None:
    """What gRPC has handed over and nobody has taken up ends at once, and not with the grace."""
    server, address = taker
    # A client with threads of its own: the event loop is kept from taking anything up.
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined] # as above
        request = health_pb2.HealthCheckRequest()
        await asyncio.to_thread(check, request, timeout=TIMEOUT_S)
        calls = [check.future(request, timeout=TIMEOUT_S) for _ in range(AHEAD // 2)]
        time.sleep(0.5)  # noqa: ASYNC251 - which is the point
        await asyncio.wait_for(server.stop(10 * TIMEOUT_S), TIMEOUT_S / 2)
        ends = {await asyncio.to_thread(call.code) for call in calls}
    assert ends <= {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
