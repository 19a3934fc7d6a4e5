"""Files that change while calls are served: certificate, authorities, policy, keys. No call fails, no token is lost."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from calls import LABELS, Client, new_id, reason, refused
from certificates import Authority, Issued, dns, ip, uri
from conftest import OnetimeServer, Serve
from onetime.v1 import one_time_tokens_pb2 as ott

from service import metrics
from service.config import parse_keys
from service.crypto import CodeSubject, Keyring, api_key_hash, new_api_key, new_key
from service.reload import WARN_BEFORE, ServerCertificate, Watched

ACCOUNTS: Final = "spiffe://example.org/accounts"
READER: Final = "spiffe://example.org/reader"
KEY: Final = new_api_key()
NEXT_KEY: Final = new_api_key()

ACCOUNTS_TABLE: Final = f"""
[callers."{ACCOUNTS}"]
rpcs = ["OneTimeTokenService/*"]
token_types = ["*"]
"""
READER_TABLE: Final = f"""
[callers."{READER}"]
rpcs = ["OneTimeTokenService/ListTokens"]
token_types = ["*"]
"""


def keyed_table(*keys: str) -> str:
    """Return the table of a caller with these API keys."""
    hashes = ", ".join(f'"{api_key_hash(key)}"' for key in keys)
    return f"""
[callers.billing]
api_keys = [{hashes}]
rpcs = ["OneTimeTokenService/ListTokens"]
token_types = ["*"]
"""


def replace(path: Path, content: bytes) -> None:
    """Replace a file at once, as tools do that know of readers."""
    beside = path.with_name(f"{path.name}.new")
    beside.touch(0o600)
    beside.write_bytes(content)
    beside.replace(path)


@dataclass
class Rotation:
    """The files of servers, and what goes with them. A class because tests change it step by step."""

    folder: Path
    servers: Authority = field(default_factory=lambda: Authority("servers"))
    clients: Authority = field(default_factory=lambda: Authority("clients"))

    def __post_init__(self) -> None:
        """Write the first files."""
        self.certify(self.servers)
        self.trust(self.clients)
        self.policy(ACCOUNTS_TABLE + READER_TABLE + keyed_table(KEY))
        self.keys([new_key()])

    @property
    def settings(self) -> dict[str, object]:
        """The settings that name the files."""
        names = ("tls_cert", "tls_key", "tls_client_ca", "policy_file", "keys_file")
        return {name: self.folder / name for name in names}

    def certify(self, authority: Authority, *, days: float = 90) -> None:
        """Give the server a new certificate and key, one after the other."""
        issued = authority.issue(dns("onetime.example.org"), ip("127.0.0.1"), days=days)
        replace(self.folder / "tls_cert", issued.certificate)
        replace(self.folder / "tls_key", issued.key)

    def trust(self, *authorities: Authority) -> None:
        """Let the server take certificates of these authorities."""
        replace(self.folder / "tls_client_ca", b"".join(each.certificate for each in authorities))

    def policy(self, text: str) -> None:
        """Change the policy."""
        replace(self.folder / "policy_file", text.encode())

    def keys(self, keys: list[Any]) -> None:
        """Change the file of keys, the one that makes first."""
        replace(self.folder / "keys_file", Keyring(keys).format().encode())

    def channel(self, server: OnetimeServer, client: Issued) -> grpc.aio.Channel:
        """Open a channel."""
        credentials = grpc.ssl_channel_credentials(self.servers.certificate, client.key, client.certificate)
        return grpc.aio.secure_channel(server.target, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


@pytest.fixture
def rotation(tmp_path: Path) -> Rotation:
    """Files that are right."""
    folder = tmp_path / "etc"
    folder.mkdir()
    return Rotation(folder)


def read_metrics(server: OnetimeServer) -> dict[str, float]:
    """Return the values on the server's page of metrics, by name and labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=20) as page:  # noqa: S310 - our own
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


async def shown(server: OnetimeServer, metric: str, value: float | None) -> None:
    """Wait until a server shows a metric at a value, or not at all."""
    async with asyncio.timeout(20):
        while (await asyncio.to_thread(read_metrics, server)).get(metric) != value:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


def reloads(file: str) -> str:
    """Return the name of the metric that counts what was put in force."""
    return f'onetime_reloads_total{{file="{file}"}}'


def failing(file: str) -> str:
    """Return the name of the metric that tells of a broken file."""
    return f'onetime_reload_failing{{file="{file}"}}'


def failures(file: str) -> str:
    """Return the name of the metric that counts broken files."""
    return f'onetime_reload_failures_total{{file="{file}"}}'


def events(server: OnetimeServer, event: str) -> list[dict[str, Any]]:
    """Return the lines of one kind from a server's log."""
    lines = [json.loads(line) for line in server.log.read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"].startswith(event)]


class Load:
    """Clients that call all the time. A class because it counts what comes of it."""

    def __init__(self) -> None:
        """Start with nothing done."""
        self.outcomes: Counter[str] = Counter()
        self._stop = asyncio.Event()

    async def run(self, work: Callable[[], Awaitable[str]]) -> None:
        """Do something again and again, until it is enough."""
        while not self._stop.is_set():
            try:
                self.outcomes[await work()] += 1
            except grpc.aio.AioRpcError as error:
                self.outcomes[f"{error.code().name}: {error.details()}"] += 1
            await asyncio.sleep(0.005)

    @contextlib.asynccontextmanager
    async def of(self, *works: Callable[[], Awaitable[str]]) -> AsyncIterator[None]:
        """Have work done for as long as the block lasts."""
        tasks = [asyncio.create_task(self.run(work)) for work in works]
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.gather(*tasks)


def on_one_connection(channel: grpc.aio.Channel) -> Callable[[], Awaitable[str]]:
    """Issue and consume over one channel."""

    async def work() -> str:
        client = Client(channel)
        issued = await client.issue()
        return "OK" if await client.consume(issued) == issued.token else "another token"

    return work


def on_new_connections(open_channel: Callable[[], grpc.aio.Channel]) -> Callable[[], Awaitable[str]]:
    """Issue and consume, over a new connection each time."""

    async def work() -> str:
        async with open_channel() as channel:
            return await on_one_connection(channel)()

    return work


# Under load


async def test_certificates_and_authorities_change_under_load(
    serve: Serve, migrated_url: str, rotation: Rotation
) -> None:
    """The server's certificate is replaced, then the clients' authority, step by step: no call fails meanwhile."""
    successor = Authority("clients, next year")
    old, new = rotation.clients.issue(uri(ACCOUNTS)), successor.issue(uri(ACCOUNTS))
    client = old  # which new connections show
    async with serve(migrated_url, **rotation.settings, max_connection_age="2s") as server:
        before = read_metrics(server)['onetime_certificate_not_after_seconds{file="certificate"}']
        load = Load()
        async with contextlib.AsyncExitStack() as stack:
            lasting = await stack.enter_async_context(rotation.channel(server, old))
            load_of_all = load.of(
                on_one_connection(lasting), on_new_connections(lambda: rotation.channel(server, client))
            )
            async with load_of_all:
                rotation.certify(rotation.servers, days=200)
                await shown(server, reloads("certificate"), 1)
                after = read_metrics(server)['onetime_certificate_not_after_seconds{file="certificate"}']
                assert round((after - before) / 86_400) == 110
                rotation.trust(rotation.clients, successor)
                await shown(server, reloads("certificate"), 2)
                client = new
                # The lasting one goes over to a new connection, with its old certificate, when its own is too old.
                await asyncio.sleep(3)
                assert load.outcomes["OK"] > 100
        assert list(load.outcomes) == ["OK"], load.outcomes

        # Now without the old authority: who still comes from there is gone when the connection is too old, no later.
        async with rotation.channel(server, old) as channel:
            assert await on_one_connection(channel)() == "OK"
            rotation.trust(successor)
            await shown(server, reloads("certificate"), 3)
            async with asyncio.timeout(20):
                status = "OK"
                while status == "OK":
                    status = await outcome(on_one_connection(channel)())
            assert status == "UNAVAILABLE"
        async with rotation.channel(server, old) as channel:
            assert await outcome(on_one_connection(channel)()) == "UNAVAILABLE"
        async with rotation.channel(server, new) as channel:
            assert await outcome(on_one_connection(channel)()) == "OK"


async def outcome(work: Awaitable[str]) -> str:
    """Return what came of a work, or the status with which it was refused."""
    try:
        return await work
    except grpc.aio.AioRpcError as error:
        return error.code().name


async def test_keys_change_under_load(serve: Serve, migrated_url: str, rotation: Rotation) -> None:
    """Over two servers a key is added, switched to, and the old one retired: every token stays good all the time."""
    old, new = new_key(), new_key()
    rotation.keys([old])
    certificate = rotation.clients.issue(uri(ACCOUNTS))
    async with (
        serve(migrated_url, **rotation.settings) as one,
        serve(migrated_url, **rotation.settings) as other,
        rotation.channel(one, certificate) as to_one,
        rotation.channel(other, certificate) as to_other,
    ):
        load = Load()

        def crossing(issuer: Client, consumer: Client, digits: int) -> Callable[[], Awaitable[str]]:
            async def work() -> str:
                issued = await issuer.issue(digits=digits)
                return "OK" if await consumer.consume(issued) == issued.token else "another token"

            return work

        clients = Client(to_one), Client(to_other)
        lasting = [await clients[0].issue(token_type=token_type, digits=6) for token_type in LABELS]
        works = [crossing(a, b, digits) for a, b in (clients, clients[::-1]) for digits in (0, 6)]
        async with load.of(*works):
            for keys, makes in (([old, new], old), ([new, old], new)):
                rotation.keys(keys)
                for server in (one, other):
                    for key in keys:
                        role = "makes" if key is makes else "checks"
                        await shown(server, f'onetime_keys{{id="{key.id}",role="{role}"}}', 1)
            assert load.outcomes["OK"] > 50
        assert list(load.outcomes) == ["OK"], load.outcomes
        for issued in lasting:
            assert await clients[1].consume(issued) == issued.token

        late = await clients[0].issue()
        rotation.keys([new])
        for server in (one, other):
            await shown(server, f'onetime_keys{{id="{old.id}",role="checks"}}', None)
        assert await clients[1].consume(late) == late.token
        for server in (one, other):
            for key in (old, new):
                assert Keyring([key]).format().split()[1] not in server.log.read_text("utf-8")


# The policy


async def test_the_policy_changes_from_one_call_to_the_next(
    serve: Serve, migrated_url: str, rotation: Rotation
) -> None:
    """On open connections: what is granted may be done, what is withdrawn may not; others notice nothing."""
    reader, accounts = rotation.clients.issue(uri(READER)), rotation.clients.issue(uri(ACCOUNTS))
    by_key = rotation.clients.issue(dns("proxy.example.org"))
    first, second = ((("authorization", f"Bearer {key}"),) for key in (KEY, NEXT_KEY))
    async with (
        serve(migrated_url, **rotation.settings) as server,
        rotation.channel(server, reader) as to_reader,
        rotation.channel(server, accounts) as to_accounts,
        rotation.channel(server, by_key) as to_key,
    ):
        request = ott.ListTokensRequest(user_id=new_id())
        load = Load()
        async with load.of(on_one_connection(to_accounts)):
            assert await Client(to_reader).list(new_id()) == []
            await Client(to_key).tokens.ListTokens(request, metadata=first)
            assert await reason(Client(to_key).tokens.ListTokens(request, metadata=second)) == "CALLER_UNKNOWN"

            rotation.policy(ACCOUNTS_TABLE + keyed_table(KEY, NEXT_KEY))
            await shown(server, reloads("policy"), 1)
            told = await refused(Client(to_reader).tokens.ListTokens(request))
            assert (told.reason, told.sentence) == ("CALLER_NOT_ALLOWED", "the policy does not name this caller")
            await Client(to_key).tokens.ListTokens(request, metadata=first)
            await Client(to_key).tokens.ListTokens(request, metadata=second)

            rotation.policy(ACCOUNTS_TABLE + READER_TABLE + keyed_table(NEXT_KEY))
            await shown(server, reloads("policy"), 2)
            assert await Client(to_reader).list(new_id()) == []
            assert await reason(Client(to_key).tokens.ListTokens(request, metadata=first)) == "CALLER_UNKNOWN"
            await Client(to_key).tokens.ListTokens(request, metadata=second)
        assert list(load.outcomes) == ["OK"], load.outcomes


BREAKAGES: Final[Mapping[str, tuple[str, bytes]]] = {
    # By the metrics' name: a file, and what it is broken to. test_callers has every other way to break one.
    "policy": ("policy_file", b"[callers.a]\nrpcs = []\n"),
    "keys": ("keys_file", b"k1 c2VjcmV0\n"),
    "certificate": ("tls_key", Authority().issue().key),
}


async def test_a_broken_file_changes_nothing(serve: Serve, migrated_url: str, rotation: Rotation) -> None:
    """Of each broken file metric and log tell, once; what was read before holds; the right file ends the alarm."""
    certificate = rotation.clients.issue(uri(ACCOUNTS))

    async def check_calls() -> None:
        async with rotation.channel(server, certificate) as channel:
            assert await on_one_connection(channel)() == "OK"

    async with serve(migrated_url, **rotation.settings) as server:
        page = read_metrics(server)
        for file in BREAKAGES:
            assert [page[name(file)] for name in (reloads, failing, failures)] == [0, 0, 0]
        right = {setting: (rotation.folder / setting).read_bytes() for setting, _ in BREAKAGES.values()}
        for setting, content in BREAKAGES.values():
            replace(rotation.folder / setting, content)
        for file in BREAKAGES:
            await shown(server, failing(file), 1)
        await check_calls()
        for setting, _ in BREAKAGES.values():
            os.utime(rotation.folder / setting)  # touched, and no other content: no other failure
        await asyncio.sleep(3)
        page = read_metrics(server)
        for file in BREAKAGES:
            assert [page[name(file)] for name in (reloads, failing, failures)] == [0, 1, 1]
        for setting, content in right.items():
            replace(rotation.folder / setting, content)
        for file in BREAKAGES:
            await shown(server, failing(file), 0)
        await check_calls()
        told = events(server, "not reloaded")
        assert sorted(line["file"] for line in told) == sorted(BREAKAGES)
        assert all(line["level"] == "ERROR" and line["faults"] for line in told)
        assert "c2VjcmV0" not in server.log.read_text("utf-8")


async def test_the_links_of_kubernetes_are_followed(serve: Serve, migrated_url: str, rotation: Rotation) -> None:
    """Where files are links into a folder that is itself a link, changing that one link changes all of them."""
    volume = rotation.folder
    for number in (1, 2):
        (volume / f"..{number}").mkdir()
        other = Rotation(volume / f"..{number}", rotation.servers, rotation.clients)
        other.policy(ACCOUNTS_TABLE if number == 1 else ACCOUNTS_TABLE + READER_TABLE)
    data = volume / "..data"
    data.symlink_to("..1")
    for name in ("tls_cert", "tls_key", "tls_client_ca", "policy_file"):
        (volume / name).unlink()
        (volume / name).symlink_to(f"..data/{name}")
    async with (
        serve(migrated_url, **rotation.settings) as server,
        rotation.channel(server, rotation.clients.issue(uri(READER))) as channel,
    ):
        assert await reason(Client(channel).tokens.ListTokens(ott.ListTokensRequest())) == "CALLER_NOT_ALLOWED"
        (volume / "..data_tmp").symlink_to("..2")
        (volume / "..data_tmp").replace(data)
        await shown(server, reloads("policy"), 1)
        await shown(server, reloads("certificate"), 1)
        assert await Client(channel).list(new_id()) == []


async def test_plain_text_reloads_its_keys_too(serve: Serve, migrated_url: str, keys_file: Path) -> None:
    """The file of keys is watched whoever calls."""
    async with serve(migrated_url) as server:
        key = new_key()
        replace(keys_file, Keyring([key]).format().encode())
        await shown(server, f'onetime_keys{{id="{key.id}",role="makes"}}', 1)


# One look at a time


class Text:
    """Something exchangeable. A class because Watched asks for one."""

    def __init__(self, *contents: bytes) -> None:
        """Take the contents of files; "bad" is not right."""
        if b"bad" in contents:
            raise ValueError("bad is not right\nnor is this")
        if b"bug" in contents:
            raise LookupError(contents)
        self.contents = contents

    def take(self, other: "Text") -> None:
        """Take another's contents."""
        self.contents = other.contents


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two files that belong together."""
    paths = tmp_path / "a", tmp_path / "b"
    for path in paths:
        path.write_bytes(b"1")
    return paths


def watched(pair: tuple[Path, Path]) -> Watched[Text]:
    """Watch the pair."""
    return Watched("test", {"one": pair[0], "other": pair[1]}, Text)


def test_a_change_is_taken_at_the_second_look(pair: tuple[Path, Path]) -> None:
    """Files that change from one look to the next may be half-written; they are read once they have settled."""
    file = watched(pair)
    file.look()
    assert file.in_force.contents == (b"1", b"1")
    pair[0].write_bytes(b"2")
    file.look()
    assert file.in_force.contents == (b"1", b"1")
    pair[1].write_bytes(b"2")
    file.look()
    assert file.in_force.contents == (b"1", b"1")
    file.look()
    assert file.in_force.contents == (b"2", b"2")


def test_a_change_between_reading_and_the_first_look_is_seen(pair: tuple[Path, Path]) -> None:
    """What changes right after the start is not taken for what was there from the start."""

    def late(*contents: bytes) -> Text:
        pair[0].write_bytes(b"22")
        return Text(*contents)

    file = Watched("test", {"one": pair[0], "other": pair[1]}, late)
    file.look()
    file.look()
    assert file.in_force.contents == (b"22", b"1")


def test_a_change_while_reading_is_not_taken(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file changes between two reads of a pair, the pair waits."""
    file = watched(pair)
    pair[0].write_bytes(b"22")
    file.look()
    read = Path.read_bytes

    def read_and_change(path: Path) -> bytes:
        content = read(path)
        if path == pair[0] and content == b"22":
            pair[0].write_bytes(b"333")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_change)
    file.look()
    assert file.in_force.contents == (b"1", b"1")
    file.look()
    file.look()
    assert file.in_force.contents == (b"333", b"1")


@pytest.mark.parametrize("content", [b"bad", b"bug", None])
def test_what_is_broken_and_comes_back_is_in_force(
    pair: tuple[Path, Path], content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken file, a bug and a file that is gone: told once, and no more when the old content is back."""
    caplog.set_level(logging.INFO, "service.reload")
    file = watched(pair)
    for wanted, state in ((content, 1), (b"1", 0)):
        if wanted is None:
            pair[0].unlink()
        else:
            pair[0].write_bytes(wanted)
        for _ in range(4):
            file.look()
        assert file.in_force.contents == (b"1", b"1")
        assert metrics.REGISTRY.get_sample_value("onetime_reload_failing", {"file": "test"}) == state
    assert [record.message for record in caplog.records] == [
        "not reloaded: what was read before stays in force",
        "reloaded",
    ]
    assert "bug'" not in str(caplog.records[0].__dict__["faults"])  # an exception's text might hold a secret


def test_a_fault_of_the_moment_passes(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be read is taken as soon as it can be, with nothing changed in the file; a fault is told once."""
    caplog.set_level(logging.INFO, "service.reload")
    file = watched(pair)
    before = metrics.REGISTRY.get_sample_value("onetime_reload_failures_total", {"file": "test"}) or 0
    pair[0].write_bytes(b"22")
    read = Path.read_bytes
    for number in (errno.EIO, errno.EMFILE):

        def fail(_: Path, number: int = number) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "read_bytes", fail)
        for _ in range(4):
            file.look()
    monkeypatch.setattr(Path, "read_bytes", read)
    assert file.in_force.contents == (b"1", b"1")
    file.look()
    assert file.in_force.contents == (b"22", b"1")
    for _ in range(3):
        file.look()
    first, second, last = caplog.records
    assert [os.strerror(errno.EIO) in str(first.__dict__), os.strerror(errno.EMFILE) in str(second.__dict__)] == [
        True
    ] * 2
    assert last.message == "reloaded"
    assert metrics.REGISTRY.get_sample_value("onetime_reload_failures_total", {"file": "test"}) == before + 2
    assert metrics.REGISTRY.get_sample_value("onetime_reload_failing", {"file": "test"}) == 0


def test_a_certificate_that_is_early_is_shown_once_it_is_valid(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Issued ahead of its time, or by a clock that is ahead, it is refused, and taken when its time has come."""
    authority = Authority()

    def certify(issued: Issued) -> None:
        for path, content in zip(pair, (issued.certificate, issued.key), strict=True):
            replace(path, content)

    certify(authority.issue(dns("x"), days=1))
    file = Watched("test", {"tls_cert": pair[0], "tls_key": pair[1]}, ServerCertificate)
    first = file.in_force.not_after
    certify(authority.issue(dns("x"), days=2, starts=timedelta(seconds=3) / timedelta(days=1)))
    file.look()
    file.look()
    assert file.in_force.not_after == first
    assert metrics.REGISTRY.get_sample_value("onetime_reload_failing", {"file": "test"}) == 1
    deadline = time.monotonic() + 20
    while file.in_force.not_after == first and time.monotonic() < deadline:
        time.sleep(0.1)
        file.look()
    assert file.in_force.not_after > first
    assert metrics.REGISTRY.get_sample_value("onetime_reload_failing", {"file": "test"}) == 0
    [record] = caplog.records
    assert "is not valid before" in str(record.__dict__["faults"])


def test_the_ends_of_certificates_are_told_each_day(caplog: pytest.LogCaptureFixture) -> None:
    """From two weeks before the end on, once a day; a new certificate ends it."""
    authority = Authority()

    def made(days: float) -> ServerCertificate:
        issued = authority.issue(dns("x"), days=days)
        return ServerCertificate(issued.certificate, issued.key)

    certificate = made(WARN_BEFORE.days + 0.1)
    certificate.remind()
    assert not caplog.records
    certificate.take(made(WARN_BEFORE.days - 0.1))
    for _ in range(3):
        certificate.remind()
    [record] = caplog.records
    assert record.message == "the certificate expires soon"
    certificate.take(made(WARN_BEFORE.days - 1.1))
    certificate.remind()
    certificate.take(made(90))
    certificate.remind()
    assert len(caplog.records) == 2


# The ring


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Let threads take turns so often that what is not done at once is seen half-done."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("restless_threads")
def test_a_ring_is_exchanged_whole() -> None:
    """Threads that hash while the ring changes back and forth find each key that they made under."""
    first, second = Keyring([new_key()]), Keyring([new_key()])
    both = [Keyring([*first.keys, *second.keys]), Keyring([*second.keys, *first.keys])]
    ring = Keyring(both[0].keys)
    hasher = ring.code_hasher(None)
    subject = CodeSubject(uuid.uuid4(), "recovery_token", uuid.uuid4(), "a@example.org")
    stop = threading.Event()
    faults: list[BaseException] = []

    def hash_codes() -> None:
        try:
            while not stop.is_set():
                assert hasher.matches("123456", hasher.hash("123456", subject), subject)
                assert ring.open_answer(ring.seal_answer(b"x", place="p"), place="p") == b"x"
                assert ring.same_fingerprint(ring.fingerprint(b"m"), b"m")
                assert set(ring.link_hashes("recovery_token", "s")) >= {ring.link_hash("recovery_token", "s")}
        except BaseException as error:  # noqa: BLE001 - told by the test
            faults.append(error)

    threads = [threading.Thread(target=hash_codes) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(20_000):
        ring.take(both[number % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults
    ring.take(second)
    assert ring.keys == second.keys
    assert hasher.hash("123456", subject).split(".")[1] == second.keys[0].id
    with pytest.raises(KeyError):
        ring.key(first.keys[0].id)


def test_keys_in_a_file_are_read_from_its_bytes() -> None:
    """What is no ASCII is told, and not quoted."""
    with pytest.raises(ValueError, match="no file of keys") as caught:
        parse_keys("k1 gehéim".encode())
    assert "geh" not in str(caught.value)
