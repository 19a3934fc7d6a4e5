"""What is read from files, and again when they change, while calls are served: keys, policy, certificate.

New files are read and checked whole before they are put in force. A broken one leaves in force what is there: a slip
while editing must not stop a service, and metrics and log tell of it until it is put right. Until then it is tried
again at each look: a certificate may become valid, or a disk readable, with nothing changed in the file.

It knows nothing of what the files are for.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Generic, Protocol, Self, TypeAlias, TypeVar

import grpc

from service import metrics
from service.crypto import check_authorities, check_certificate

POLL_S: Final = 1.0
"""Seconds between two looks. Watching for events would be faster, and blind on network file systems."""

WARN_BEFORE: Final = timedelta(days=14)
"""From then on, each day, the log warns of the certificate's end."""

_LOG = logging.getLogger(__name__)

_Signature: TypeAlias = tuple[tuple[int, ...] | None, ...]


class Exchangeable(Protocol):
    """What others hold on to while its content is exchanged."""

    def take(self, other: Self, /) -> None:
        """Become as the other one, at once for everybody."""


T = TypeVar("T", bound=Exchangeable)


class Watched(Generic[T]):
    """Files that make one thing together. A class because it remembers what it has seen of them."""

    def __init__(
        self,
        name: str,
        paths: Mapping[str, Path],
        parse: Callable[..., T],
        *,
        tell: Callable[[T], None] = lambda _: None,
    ) -> None:
        """Read the files.

        Args:
            name: What the metrics call them.
            paths: Where they are, by the names of the settings.
            parse: Makes the thing of their contents, or raises ValueError with a line a fault and no secret.
            tell: Called with the thing, now and whenever it has changed.

        Raises:
            ValueError: They cannot be read, or are not right: a line a fault.
        """
        self._name = name
        self._paths = paths
        self._parse = parse
        self._tell = tell
        # Before they are read, so that a change from now on is noticed.
        self._settled = self._seen = self._signature()
        self._contents = self._read()
        self.in_force = self._parsed(self._contents)
        """What the files made when they were right the last time."""
        # Of the last try, if it failed: while it is so, each look is another try.
        self._faults: list[str] | None = None
        tell(self.in_force)
        metrics.RELOADS.labels(name)
        metrics.RELOAD_FAILURES.labels(name)
        metrics.RELOAD_FAILING.labels(name).set(0)

    def look(self) -> None:
        """Put in force what has changed, if it is right; if it was not, try again. Never raises."""
        signature = self._signature()
        if signature == self._settled and self._faults is None:
            return
        if signature != self._seen:
            # Somebody may be writing still, or be about to write the other file of a pair: wait for a look at which
            # nothing has changed.
            self._seen = signature
            return
        self._settled = signature
        try:
            contents = self._read()
            if self._signature() != signature:
                return  # it changed while it was read: the next looks see that
            if contents == self._contents and self._faults is None:
                return  # touched, no more
            self.in_force.take(self._parsed(contents))
            self._contents = contents
            self._tell(self.in_force)
        except ValueError as error:
            self._fail(str(error).splitlines())
        except Exception as error:  # noqa: BLE001 - a bug of ours, which must not end the watch; its text might quote
            self._fail([f"a bug of onetime: {type(error).__name__}"])
        else:
            self._faults = None
            metrics.RELOADS.labels(self._name).inc()
            metrics.RELOAD_FAILING.labels(self._name).set(0)
            _LOG.info("reloaded", extra={"file": self._name})

    def _fail(self, faults: list[str]) -> None:
        if faults == self._faults:
            return  # told already: a line each second would bury all others
        self._faults = faults
        metrics.RELOAD_FAILURES.labels(self._name).inc()
        metrics.RELOAD_FAILING.labels(self._name).set(1)
        _LOG.error("not reloaded: what was read before stays in force", extra={"file": self._name, "faults": faults})

    def _signature(self) -> _Signature:
        """Return what tells one state of the files from another, without reading them."""
        return tuple(map(_signature_of, self._paths.values()))

    def _read(self) -> tuple[bytes, ...]:
        contents = []
        for setting, path in self._paths.items():
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise ValueError(f"{setting} {path}: {error.strerror}") from None
        return tuple(contents)

    def _parsed(self, contents: tuple[bytes, ...]) -> T:
        try:
            return self._parse(*contents)
        except ValueError as error:
            setting, path = next(iter(self._paths.items()))
            raise ValueError("\n".join(f"{setting} {path}: {line}" for line in str(error).splitlines())) from None


def _signature_of(path: Path) -> tuple[int, ...] | None:
    """Return a file's identity, size and times; None if it is not to be had. Links are followed."""
    try:
        status = path.stat()
    except OSError:
        return None
    # The time of change too: some tools copy the time of modification with the content.
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


async def watch(files: Sequence[Watched[Any]], certificate: "ServerCertificate | None") -> None:
    """Look at the files, and at the certificate's end, for ever."""

    def look() -> None:
        for each in files:
            each.look()
        if certificate is not None:
            certificate.remind()

    while True:
        # In a thread: a network file system may keep it waiting.
        await asyncio.to_thread(look)
        await asyncio.sleep(POLL_S)


class ServerCertificate:
    """What the server shows to clients, and the authorities it takes theirs from. Exchangeable."""

    def __init__(self, chain: bytes, key: bytes, authorities: bytes | None = None) -> None:
        """Take the contents of the files, in PEM; without authorities, clients are asked for no certificate.

        Raises:
            ValueError: They are not right: a line a fault.
        """
        faults: list[str] = []
        try:
            self.not_after = check_certificate(chain, key)
        except ValueError as error:
            faults.append(str(error))
        try:
            if authorities is not None:
                check_authorities(authorities)
        except ValueError as error:
            faults.append(str(error))
        if faults:
            raise ValueError("\n".join(faults))
        self._asks = authorities is not None
        self._configuration = grpc.ssl_server_certificate_configuration([(key, chain)], authorities)
        self._shown = self._configuration
        self._days_told: int | None = None

    def take(self, other: "ServerCertificate") -> None:
        """Show another certificate, and take clients by other authorities, from the next connection on."""
        self.not_after = other.not_after
        self._days_told = None
        self._configuration = other._configuration  # noqa: SLF001 - of the same class

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._fetch,  # type: ignore[arg-type] # it may return None, which its type leaves out
            require_client_authentication=self._asks,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the configuration if it is a new one. gRPC asks at each handshake, one at a time, and waits."""
        new = self._configuration
        if new is self._shown:
            return None
        self._shown = new
        return new

    def remind(self) -> None:
        """Warn in the log of the certificate's end, once a day when it is near."""
        left = self.not_after - datetime.now(UTC)
        if left < WARN_BEFORE and left.days != self._days_told:
            self._days_told = left.days
            _LOG.warning(
                "the certificate has expired" if left < timedelta() else "the certificate expires soon",
                extra={"not_after": self.not_after.isoformat()},
            )
