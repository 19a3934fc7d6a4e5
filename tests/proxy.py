"""A proxy between onetime and PostgreSQL, which loses connections at the worst moments, or swallows all that is sent.

It knows just as much of PostgreSQL's protocol as it takes to see a statement on its way and a COMMIT come back.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, TypeAlias
from urllib.parse import parse_qs, urlsplit, urlunsplit

_QUESTIONS: Final = (80877103, 80877104)
"""Codes of what a client may ask before it starts a session: for TLS, for GSSAPI."""

_Loses: TypeAlias = Callable[[bytes, bytes], bool]
"""Tells of a message, by its kind and what it says, whether the connection is lost in its place."""


class Proxy:
    """Passes on all that is sent, until it is told not to. A class because its connections share one fate."""

    def __init__(self, url: str) -> None:
        """Take the URL of a database on a server that listens on a socket."""
        self._url = urlsplit(url)
        query = parse_qs(self._url.query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        self._connections: dict[asyncio.Task[None], asyncio.Event] = {}
        """With what is set while they pass on."""
        self._loses: _Loses | None = None
        self._skip = 0
        self._swallows_new = False
        self.url = ""
        """What leads through the proxy, while it runs."""

    @contextlib.asynccontextmanager
    async def run(self, host: str = "127.0.0.1") -> AsyncIterator[None]:
        """Run it, at an address of this machine."""
        listener = await asyncio.start_server(self._serve, host, 0)
        port = listener.sockets[0].getsockname()[1]
        try:
            self.url = urlunsplit(self._url._replace(netloc=f"{self._url.username}@{host}:{port}", query=""))
            yield
        finally:
            listener.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    # What goes wrong

    def losing_before(self, text: bytes) -> AbstractContextManager[None]:
        """Lose one connection as it sends a statement with this text; PostgreSQL does not get it."""
        return self._losing(lambda kind, what: kind == b"B" and text in what, 0)

    def losing_before_commit(self, skip: int = 0) -> AbstractContextManager[None]:
        """Lose one connection as it sends COMMIT, after as many others; PostgreSQL does not get it."""
        return self._losing(lambda kind, what: kind == b"B" and what == b"COMMIT", skip)

    def losing_after_commit(self, skip: int = 0) -> AbstractContextManager[None]:
        """Lose one connection as PostgreSQL tells that it has committed, after as many others; nobody is told."""
        return self._losing(lambda kind, what: kind == b"C" and what == b"COMMIT\0", skip)

    @contextlib.contextmanager
    def _losing(self, loses: _Loses, skip: int) -> Iterator[None]:
        self._loses, self._skip = loses, skip
        yield
        assert self._loses is None, "no connection was lost"

    @contextlib.contextmanager
    def swallowing(self, *, new_ones: bool) -> Iterator[None]:
        """Pass nothing on, on all connections that there are, as if a cable was cut; and on new ones too."""
        self._swallows_new = new_ones
        silenced = list(self._connections.values())
        for passes in silenced:
            passes.clear()
        try:
            yield
        finally:
            self._swallows_new = False
            for passes in self._connections.values():
                passes.set()

    # How it works

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Serve one connection, until either side or a fault ends it."""
        task = asyncio.current_task()
        assert task
        passes = self._connections[task] = asyncio.Event()
        if not self._swallows_new:
            passes.set()
        ways: list[asyncio.Task[None]] = []
        server, to_server = await asyncio.open_unix_connection(self._socket)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await passes.wait()
                await self._start(client, to_client, server, to_server)
                ways.append(asyncio.create_task(self._requests(client, to_server, passes)))
                ways.append(asyncio.create_task(self._answers(server, to_client, passes)))
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._connections[task]
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            # Without a farewell, as connections are lost.
            to_client.transport.abort()
            to_server.transport.abort()

    async def _start(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        """Pass on how a session starts: without kinds of messages, and with questions that get one letter."""
        while True:
            length = await client.readexactly(4)
            body = await client.readexactly(int.from_bytes(length) - 4)
            to_server.write(length + body)
            if int.from_bytes(body[:4]) not in _QUESTIONS:
                return
            to_client.write(await server.readexactly(1))

    async def _requests(
        self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter, passes: asyncio.Event
    ) -> None:
        """Pass on what the client sends."""
        statements: dict[bytes, bytes] = {}
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, message = await _message(client)
                await passes.wait()
                what = b""
                if kind == b"P":
                    name, text, _ = message[5:].split(b"\0", 2)
                    statements[name] = text
                elif kind == b"B":
                    # What runs is named here, by the name that it was prepared under.
                    what = statements[message[5:].split(b"\0", 2)[1]]
                if self._is_lost(kind, what):
                    return
                to_server.write(message)

    async def _answers(
        self, server: asyncio.StreamReader, to_client: asyncio.StreamWriter, passes: asyncio.Event
    ) -> None:
        """Pass on what PostgreSQL sends."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, message = await _message(server)
                await passes.wait()
                if self._is_lost(kind, message[5:]):
                    return
                to_client.write(message)

    def _is_lost(self, kind: bytes, what: bytes) -> bool:
        if self._loses is None or not self._loses(kind, what):
            return False
        if self._skip:
            self._skip -= 1
            return False
        self._loses = None
        return True


async def _message(stream: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read a message, and return its kind and all of it."""
    head = await stream.readexactly(5)
    return head[:1], head + await stream.readexactly(int.from_bytes(head[1:]) - 4)
