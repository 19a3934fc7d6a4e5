"""Who calls, and what the policy lets them do.

A caller is named by the evidence of its connection and its call: the URIs and DNS names of its certificate, and an API
key. All of it must lead to one caller of the policy. What the policy does not grant is refused.

It knows nothing of calls: `interceptors` asks it for each.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.descriptor import ServiceDescriptor

from service.call import ANONYMOUS, NOTHING, Permissions
from service.config import suggestion
from service.crypto import api_key_hash, certificate_expired, certificate_names
from service.errors import CallerUnknown

_LONGEST_NAME: Final = 200
_SHOWN: Final = 80  # characters of what is wrong
_MOST_KEYS: Final = 2
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)

_OF_TOKEN_TYPES: Final = frozenset(
    f"OneTimeTokenService/{name}" for name in ("IssueToken", "CheckToken", "ConsumeToken", "RevokeTokens", "ListTokens")
)
"""Rpcs of which nothing is left without `token_types`."""
_OF_DELIVERIES: Final = "EmailVerificationService/StartEmailVerification"
"""The rpc of which nothing is left without `return_code` and `send_email`."""

_FLAGS: Final = ("return_code", "send_email", "any_caller")
_RIGHT_KEYS: Final = ("api_keys", "rpcs", "token_types", *_FLAGS)


# The policy


@dataclass(frozen=True, slots=True)
class Contract:
    """What a policy can speak of."""

    rpcs: Mapping[str, str]
    """Full names of rpcs, by their names in the policy, such as `OneTimeTokenService/IssueToken`."""
    token_types: Mapping[str, str]
    """Labels of auth.one_time_token_type, by their names in the proto."""

    @classmethod
    def of(cls, services: Iterable[ServiceDescriptor], token_types: Mapping[str, str]) -> "Contract":
        """Take the rpcs from their descriptors, so that the policy cannot know others than the server."""
        rpcs = {
            f"{service.name}/{method.name}": f"{service.full_name}/{method.name}"
            for service in services
            for method in service.methods
        }
        return cls(rpcs, token_types)


@dataclass(frozen=True, slots=True)
class _Policy:
    permissions: Mapping[str, Permissions]
    """By caller."""
    certified: frozenset[str]
    """The callers who are known by a certificate of their name."""
    key_owners: Mapping[str, str]
    """The other callers, by the hashes of their API keys."""


class Callers:
    """Tells who calls, by the policy in force. A class because the policy is exchanged while calls are served."""

    def __init__(self, content: bytes, contract: Contract, *, certificates: bool) -> None:
        """Read a policy.

        Args:
            content: The TOML file.
            contract: What there is to be granted.
            certificates: Whether callers show certificates.

        Raises:
            ValueError: It is not right: every fault, a line each, with what would be right, and no secret.
        """
        # All in one attribute: see `take`.
        self._policy = _parse(content, contract, certificates=certificates)

    def take(self, other: "Callers") -> None:
        """Hold another policy from the next call on. One assignment: no call sees half of it."""
        self._policy = other._policy  # noqa: SLF001 - of the same class

    def names(self) -> tuple[str, ...]:
        """Return the callers that the policy in force names."""
        return tuple(self._policy.permissions)

    def with_send_email(self) -> list[str]:
        """Return the callers that may have codes mailed."""
        return [name for name, permissions in self._policy.permissions.items() if permissions.send_email]

    def identify(
        self, connection: Mapping[str, Iterable[bytes]], authorizations: Sequence[str]
    ) -> tuple[str, Permissions]:
        """Return who calls, and what it may do.

        NOTHING is what a caller may do whose certificate is good and whose names the policy does not have.

        Args:
            connection: What gRPC knows of the connection.
            authorizations: Every value of `authorization` in the call's metadata.

        Raises:
            CallerUnknown: The evidence names nobody, or more than one.
        """
        policy = self._policy  # once: it may be exchanged meanwhile
        if list(connection.get("transport_security_type", ())) != [b"ssl"]:
            # Whoever listens on the wire would have the key.
            raise CallerUnknown("callers are identified over TLS only; on this port there is health, and nothing else")
        certificates = list(connection.get("x509_pem_cert", ()))
        resumed = list(connection.get("ssl_session_reused", ())) == [b"true"]
        if resumed and any(map(certificate_expired, certificates)):
            # A TLS session can be resumed for two days, and then nobody looks at the certificate's time again.
            raise CallerUnknown("the certificate has expired")
        names = [name for pem in certificates for name in certificate_names(pem)]
        named = policy.certified & set(names)
        if authorizations:
            named |= {_key_owner(policy, authorizations)}
        match sorted(named):
            case [caller]:
                return caller, policy.permissions[caller]
            case [_, *_]:
                raise CallerUnknown("the certificate and the API key must name one caller, and they name several")
        if not names:
            raise CallerUnknown
        # Not the name of somebody whom it is not, which the log would then accuse.
        shown = (name for name in names if not _fault_of_name(name) and name not in policy.permissions)
        return next(shown, ANONYMOUS), NOTHING


def _key_owner(policy: _Policy, authorizations: Sequence[str]) -> str:
    """Return the caller whose API key this is.

    It is found by its hash. How long that takes tells something of a hash, from which there is no way to a key.
    """
    if len(authorizations) > 1:
        # One hop might look at the first, another at the last.
        raise CallerUnknown("more than one authorization was sent; one is right")
    scheme, _, key = authorizations[0].partition(" ")
    presented = api_key_hash(key.strip(" ")) if scheme.lower() == "bearer" else None
    owner = None if presented is None else policy.key_owners.get(presented)
    if owner is None:
        raise CallerUnknown("this API key is not known; `authorization: Bearer otk_...` with one that is, is right")
    return owner


def _fault_of_name(name: str) -> str | None:
    """Return what would be right in place of a caller's name, or None."""
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        return f"1 to {_LONGEST_NAME} printable characters are right"
    if name == ANONYMOUS:
        return "this stands for callers whom nobody asked; another name is right"
    return None


# Its file


def _parse(content: bytes, contract: Contract, *, certificates: bool) -> _Policy:
    """Read a policy, or raise ValueError with every fault."""
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("a TOML file in UTF-8 is right") from None
    except tomllib.TOMLDecodeError as error:
        # Its text has the place, and at most the one character that was not expected.
        raise ValueError(f"a TOML file is right: {error}") from None
    faults = [
        f"{_quoted(name)}: there is no such key{suggestion(name, ['callers'])}"
        for name in document
        if name != "callers"
    ]
    tables = document.get("callers", {})
    if not isinstance(tables, dict) or not tables:
        faults.append('callers: at least one table, such as [callers."spiffe://example.org/accounts"], is right')
        tables = {}
    permissions: dict[str, Permissions] = {}
    key_owners: dict[str, str] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            faults.append(f"callers.{_quoted(name)}: a table with rpcs is right")
            continue
        reader = _Reader(name, table, contract, faults.append)
        permissions[name] = reader.permissions()
        hashes = reader.key_hashes()
        for key_hash in hashes:
            other = key_owners.setdefault(key_hash, name)
            if other != name:
                reader.refuse("api_keys", f"one of them is {_quoted(other)}'s too: a key of its own is right for each")
        if not hashes and not certificates and "api_keys" not in reader.table:
            reader.refuse(
                "api_keys",
                "without tls_client_ca nobody shows a certificate, so an API key is what it takes to know this caller:"
                " `onetime keys api` makes one",
            )
    if faults:
        raise ValueError("\n".join(faults))
    return _Policy(permissions, frozenset(permissions.keys() - key_owners.values()), key_owners)


class _Reader:
    """Reads one caller's table. A class because every check tells of the same table, into the same list."""

    def __init__(self, name: str, table: Mapping[str, Any], contract: Contract, tell: Callable[[str], None]) -> None:
        """Check the name, and that the keys of the table are known."""
        self._place = f"callers.{_quoted(name)}"
        self._contract = contract
        self._tell = tell
        self.table = table
        fault = _fault_of_name(name)
        if fault:
            tell(f"{self._place}: {fault}")
        for key in table:
            if key not in _RIGHT_KEYS:
                tell(f"{self._place}: {_quoted(key)}: there is no such key{suggestion(key, _RIGHT_KEYS)}")

    def refuse(self, key: str, right: str) -> None:
        """Tell a fault."""
        self._tell(f"{self._place}.{key}: {right}")

    def permissions(self) -> Permissions:
        """Return what is granted."""
        rpcs = self._rpcs()
        token_types = self._token_types()
        flags = {key: self._flag(key) for key in _FLAGS}
        typed = sorted(rpcs & _OF_TOKEN_TYPES)
        if typed and "token_types" not in self.table:
            self.refuse("token_types", f'this is missing, and {", ".join(typed)} can do nothing without; "*" is all')
        if _OF_DELIVERIES in rpcs and not (flags["return_code"] or flags["send_email"]):
            self._tell(
                f"{self._place}: {_OF_DELIVERIES} can do nothing without return_code = true or send_email = true; or"
                " list the other rpcs by their names"
            )
        return Permissions(
            rpcs=frozenset(self._contract.rpcs[rpc] for rpc in rpcs),
            token_types=token_types,
            return_code=flags["return_code"],
            send_email=flags["send_email"],
            any_caller=flags["any_caller"],
        )

    def key_hashes(self) -> list[str]:
        """Return the hashes of the caller's API keys. What is wrong with one is told without it: it may be a key."""
        if "api_keys" not in self.table:
            return []
        hashes = self._texts("api_keys", "one or two hashes, as `onetime keys api` prints them, are right")
        if len(hashes) > _MOST_KEYS:
            self.refuse("api_keys", f"there are {len(hashes)}: one is right, and a second while it takes its place")
        if len(set(hashes)) < len(hashes):
            self.refuse("api_keys", "one stands here twice")
        for number, key_hash in enumerate(hashes, 1):
            if api_key_hash(key_hash):
                self.refuse(
                    "api_keys",
                    f"number {number} is a key itself, and no secret any more: its hash is right, of a new one",
                )
            elif not _HASH.fullmatch(key_hash):
                self.refuse("api_keys", f"number {number}: sha256: and 64 digits of 0-9 and a-f are right")
        return hashes

    def _rpcs(self) -> frozenset[str]:
        """Return the granted rpcs, by their names in the policy."""
        known = self._contract.rpcs
        right = 'rpcs such as ["OneTimeTokenService/IssueToken", "EmailVerificationService/*"] are right'
        if "rpcs" not in self.table:
            self.refuse("rpcs", f"this is missing: {right}")
            return frozenset()
        granted: set[str] = set()
        for text in self._texts("rpcs", right):
            service, slash, method = text.partition("/")
            meant = {rpc for rpc in known if rpc.startswith(f"{service}/")} if method == "*" else {text} & known.keys()
            if not meant:
                wanted = [*known, *(f"{rpc.partition('/')[0]}/*" for rpc in known)]
                hint = suggestion(text, wanted) if slash else "; Service/Method or Service/* is right"
                self.refuse("rpcs", f"there is no {_quoted(text)}{hint}")
            granted |= meant
        return frozenset(granted)

    def _token_types(self) -> frozenset[str] | None:
        """Return the labels of the granted types, or None for all."""
        known = self._contract.token_types
        if "token_types" not in self.table:
            return frozenset()
        names = self._texts("token_types", 'names such as ["TOKEN_TYPE_RECOVERY"], or ["*"] for all, are right')
        if names == ["*"]:
            return None
        for name in names:
            if name == "*":
                self.refuse("token_types", '"*" is right alone: it stands for all')
            elif name not in known:
                self.refuse("token_types", f"there is no {_quoted(name)}{suggestion(name, known)}")
        return frozenset(known[name] for name in names if name in known)

    def _texts(self, key: str, right: str) -> list[str]:
        """Return a list of texts that is not empty, or an empty one after telling what would be right."""
        value = self.table[key]
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            return value
        self.refuse(key, right)
        return []

    def _flag(self, key: str) -> bool:
        value = self.table.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, "true or false is right")
        return value is True


def _quoted(text: str) -> str:
    """Return a text in quotes, on one line and not too long."""
    return f'"{ascii(text)[1:-1][:_SHOWN]}"'
