"""Everything cryptographic: the key ring, how secrets are made and how they rest in the database, and certificates.

The one module that imports hmac, secrets, argon2 and cryptography. It knows nothing of requests and of SQL.

What is stored names its format and the id of its key:

    otl1.<key>.<43 characters>     link: HMAC-SHA-256 over type and secret, base64url
    otc1.<key>.<PHC string>        code: Argon2id over an HMAC of the code with its type, user and address
    oth1.<key>.<43 characters>     code, hashed without Argon2: HMAC-SHA-256, over the row's id too
    ev1.<key>.<12><116 characters> email verification token, in hex: the time in it, and 464 bits of HMAC-SHA-512
    6 digits                       email verification code, sealed: see `seal_code`

The first key of the ring makes; all of them check. From each key, HKDF derives one sub-key a purpose, so that what was
made for one purpose says nothing in another.
"""

import base64
import functools
import hashlib
import hmac
import re
import secrets
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Self

import argon2
from argon2.exceptions import HashingError, InvalidHashError, VerificationError, VerifyMismatchError
from cryptography import x509
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import PublicKeyAlgorithmOID

KEY_BYTES: Final = 32
MAX_KEYS: Final = 4
NO_VERDICT: Final = (HashingError, VerificationError, MemoryError)
"""What hashing or checking a code raises where it could not be done, so that nothing is known of the code."""
_SHORTAGES: Final = tuple(map(argon2.low_level.error_to_str, (-22, -33)))
"""argon2.h: ARGON2_MEMORY_ALLOCATION_ERROR, ARGON2_THREAD_FAIL. Later, the same check may succeed."""
_KEY_ID: Final = re.compile(r"[a-z0-9]{1,16}", re.ASCII)
_LINK_BYTES: Final = 32
_EMAIL_TOKEN_BYTES: Final = 90
_EMAIL_TOKEN_TIME_BYTES: Final = 6
_EMAIL_TOKEN_TIME_LENGTH: Final = 8
"""In characters of base64url."""
_EMAIL_TOKEN_MAC_LENGTH: Final = 116
"""In hex. With the time, it has the 128 characters that the table asks for."""
_NONCE_BYTES: Final = 12
_RSA_BITS: Final = 2048
EMAIL_CODE_LENGTH: Final = 6
_SEALED_CODE: Final = re.compile(f"[0-9]{{{EMAIL_CODE_LENGTH}}}")
_STORED: Final = re.compile(r"(?P<form>[a-z0-9]+)\.(?P<key_id>[a-z0-9]{1,16})\.")
"""What everything that is stored begins with."""


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _frame(*parts: str | bytes) -> bytes:
    """Join parts so that no two lists of parts give the same bytes: each is preceded by its length."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join([len(part).to_bytes(4, "big") + part for part in encoded])


@dataclass(frozen=True, slots=True, repr=False)
class Key:
    """A key of the ring with its derived sub-keys. Its `repr` shows the id only."""

    id: str
    secret: bytes
    link: bytes = field(init=False, compare=False)
    code: bytes = field(init=False, compare=False)
    email_token: bytes = field(init=False, compare=False)
    email_code: bytes = field(init=False, compare=False)
    fingerprint: bytes = field(init=False, compare=False)
    answer: AESGCM = field(init=False, compare=False)
    address: AESGCM = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Check the form, and derive a sub-key for each purpose."""
        if not _KEY_ID.fullmatch(self.id):
            # Not quoted: whoever swaps the two words of a line has put the key here.
            raise ValueError("key id: 1 to 16 characters of a-z and 0-9 are right")
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"key {self.id}: {KEY_BYTES} bytes in base64url (43 characters) are right")
        for purpose in ("link", "code", "email_token", "email_code", "fingerprint"):
            object.__setattr__(self, purpose, self._derive(purpose))
        for purpose in ("answer", "address"):
            object.__setattr__(self, purpose, AESGCM(self._derive(purpose)))

    def _derive(self, purpose: str) -> bytes:
        # The ring's keys are uniformly random, so HKDF's extraction step has nothing to add (RFC 5869, 3.3).
        return HKDFExpand(SHA256(), KEY_BYTES, f"onetime/v1/{purpose}".encode()).derive(self.secret)

    def __repr__(self) -> str:
        """Name the key without showing it."""
        return f"Key({self.id!r})"


def new_key() -> Key:
    """Make a key from the system's random source. Its id is random too, so that no two keys ever share one."""
    return Key("k" + secrets.token_hex(4), secrets.token_bytes(KEY_BYTES))


class Keyring:
    """One to four keys. A class because every operation needs the same keys, and none must be passed around bare."""

    def __init__(self, keys: Iterable[Key]) -> None:
        """Take the keys, the one that makes first.

        Raises:
            ValueError: There are none, more than four, or two of one id. The text holds no key.
        """
        given = tuple(keys)
        # The first one makes. All in one attribute, so that a change while others use the ring is whole: see `take`.
        self._by_id = {key.id: key for key in given}
        if not 1 <= len(given) <= MAX_KEYS:
            raise ValueError(f"{len(given)} keys: 1 to {MAX_KEYS} are right")
        if len(self._by_id) != len(given):
            raise ValueError("two keys have the same id")

    def __repr__(self) -> str:
        """Name the keys without showing them."""
        return f"Keyring({', '.join(self._by_id)})"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a ring: a key a line, `<id> <43 characters of base64url>`, the one that makes first; `#` comments.

        Raises:
            ValueError: With every fault by its line, and no key.
        """
        keys: list[Key] = []
        faults: list[str] = []
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                key_id, encoded = words
                keys.append(Key(key_id, base64.b64decode(encoded + "=", altchars=b"-_", validate=True)))
            except ValueError as error:
                # The texts of base64 and of unpacking are not ours, and might one day quote what they read.
                ours = str(error).startswith("key ")
                faults.append(f"line {number}: {error if ours else 'an id and 43 characters of base64url are right'}")
        if faults:
            raise ValueError("; ".join(faults))
        return cls(keys)

    def format(self) -> str:
        """Return the text that `parse` reads. It holds the keys."""
        return "".join(f"{key.id} {_encode(key.secret)}\n" for key in self.keys)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys, the one that makes first."""
        return tuple(self._by_id.values())

    def take(self, other: "Keyring") -> None:
        """Hold the keys of another ring from now on, for all who share this one.

        Threads hash meanwhile. Each operation looks at the keys once, and this is one assignment: none sees half of it.
        """
        self._by_id = other._by_id  # noqa: SLF001 - of the same class

    @property
    def _maker(self) -> Key:
        return next(iter(self._by_id.values()))

    # Links

    def link_hash(self, token_type: str, secret: str) -> str:
        """Return what is stored for a new link."""
        return _link_hash(self._maker, token_type, secret)

    def link_hashes(self, token_type: str, secret: str) -> list[str]:
        """Return what may be stored for a presented link, one a key: a link does not name its key."""
        return [_link_hash(key, token_type, secret) for key in self.keys]

    # Codes of one-time tokens

    def code_hasher(self, parameters: argon2.Parameters | None) -> "CodeHasher":
        """Return the hasher of codes: Argon2id with these parameters, or HMAC alone if None."""
        return CodeHasher(self, parameters)

    # Email verifications

    def email_token_hash(self, token: str) -> str:
        """Return what is stored for a new email verification token: at least 128 characters."""
        return _email_token_hash(self._maker, token)

    def email_token_hashes(self, token: str) -> list[str]:
        """Return what may be stored for a presented token, one a key. Its form must have been checked."""
        return [_email_token_hash(key, token) for key in self.keys]

    def seal_code(self, code: str, *, row_id: uuid.UUID, user_id: uuid.UUID, token_hash: str) -> str:
        """Hide a 6-digit code in 6 digits: (code + pad) mod 10^6.

        The pad comes from a 256-bit HMAC over the row's id, its user and the whole stored token string, under the key
        which that string names. So it serves this row and this code only: sealed twice with one pad, two codes would
        tell their difference.
        """
        return f"{(int(code) + self._pad(row_id, user_id, token_hash)) % 10**EMAIL_CODE_LENGTH:06d}"

    def unseal_code(self, sealed: str, *, row_id: uuid.UUID, user_id: uuid.UUID, token_hash: str) -> str:
        """Return the code that `seal_code` hid.

        Raises:
            KeyError: The ring no longer has the row's key, or the row is not ours.
            ValueError: The row is damaged.
        """
        pad = self._pad(row_id, user_id, token_hash)
        if not _SEALED_CODE.fullmatch(sealed):
            raise ValueError("not a sealed code")
        return f"{(int(sealed) - pad) % 10**EMAIL_CODE_LENGTH:06d}"

    def _pad(self, row_id: uuid.UUID, user_id: uuid.UUID, token_hash: str) -> int:
        # 10^6 does not divide 2^256, but the excess is less than 2^-236.
        key = self._by_id[_key_id(token_hash, "ev1")]
        return int.from_bytes(
            hmac.digest(key.email_code, _frame(row_id.bytes, user_id.bytes, token_hash), "sha256"), "big"
        )

    # Receipts

    def fingerprint(self, message: bytes) -> str:
        """Return a keyed digest of a request, by which a retry is told from another request."""
        return _fingerprint(self._maker, message)

    def same_fingerprint(self, stored: str, message: bytes) -> bool:
        """Tell whether a stored fingerprint is this request's. Under a retired key nothing is the same."""
        key = self._by_id.get(stored.partition(".")[0])
        return key is not None and hmac.compare_digest(_fingerprint(key, message), stored)

    def seal_answer(self, answer: bytes, *, place: str) -> bytes:
        """Encrypt an answer that is kept for retries, bound to the row that it lies in."""
        key = self._maker
        return _seal(key, key.answer, answer, _frame("answer", key.id, place))

    def open_answer(self, sealed: bytes, *, place: str) -> bytes:
        """Return what `seal_answer` hid.

        Raises:
            KeyError: The ring no longer has its key, or it was not made for this place.
        """
        key = self._key_of(sealed)
        return _open(key.answer, sealed, _frame("answer", key.id, place))

    # The outbox

    def seal_address(self, address: str, *, row_id: uuid.UUID) -> bytes:
        """Encrypt an address that mail is to be sent to, bound to the row of the outbox that it lies in."""
        key = self._maker
        return _seal(key, key.address, address.encode(), _frame("address", key.id, row_id.bytes))

    def open_address(self, sealed: bytes, *, row_id: uuid.UUID) -> str:
        """Return what `seal_address` hid.

        Raises:
            KeyError: The ring no longer has its key, or it was not made for this row.
        """
        key = self._key_of(sealed)
        return _open(key.address, sealed, _frame("address", key.id, row_id.bytes)).decode()

    def _key_of(self, sealed: bytes) -> Key:
        return self._by_id[sealed.partition(b".")[0].decode("ascii", "replace")]

    def key(self, key_id: str) -> Key:
        """Return a key by its id, or raise KeyError."""
        return self._by_id[key_id]


def _seal(key: Key, cipher: AESGCM, content: bytes, bound_to: bytes) -> bytes:
    """Encrypt under a key that the result names."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return key.id.encode() + b"." + nonce + cipher.encrypt(nonce, content, bound_to)


def _open(cipher: AESGCM, sealed: bytes, bound_to: bytes) -> bytes:
    rest = sealed.partition(b".")[2]
    try:
        return cipher.decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], bound_to)
    except (InvalidTag, ValueError) as error:  # ValueError: too short to hold a nonce
        raise KeyError("not sealed for this place") from error


def _link_hash(key: Key, token_type: str, secret: str) -> str:
    return f"otl1.{key.id}.{_encode(hmac.digest(key.link, _frame(token_type, secret), 'sha256'))}"


def _email_token_hash(key: Key, token: str) -> str:
    # The table's unique index would else spread new tokens over all of its pages: in one that outgrows memory, each
    # insert would wait for a disk. In hex, since nothing that is stored may be a part of the token itself.
    made = base64.urlsafe_b64decode(token[-_EMAIL_TOKEN_TIME_LENGTH:])
    mac = hmac.digest(key.email_token, _frame(token), "sha512").hex()
    return f"ev1.{key.id}.{made.hex()}{mac[:_EMAIL_TOKEN_MAC_LENGTH]}"


def _fingerprint(key: Key, message: bytes) -> str:
    return f"{key.id}.{_encode(hmac.digest(key.fingerprint, message, 'sha256'))}"


def _key_id(stored: str, form: str) -> str:
    """Return the key id in a stored secret of this form, or raise KeyError."""
    found = _STORED.match(stored)
    if found is None or found["form"] != form:
        raise KeyError("not a secret of ours")
    return found["key_id"]


# Secrets


def new_link_secret() -> str:
    """Return 256 random bits in base64url: 43 characters."""
    return _encode(secrets.token_bytes(_LINK_BYTES))


def new_email_token() -> str:
    """Return 720 random bits and the milliseconds since 1970 in base64url: 128 characters, the least the table takes.

    The time is no secret, and nothing is decided by it: for tokens that are made together to be stored together.
    """
    return _encode(secrets.token_bytes(_EMAIL_TOKEN_BYTES) + _milliseconds().to_bytes(_EMAIL_TOKEN_TIME_BYTES, "big"))


def new_row_id() -> uuid.UUID:
    """Return an id for a new row: a UUID of version 7 (RFC 9562), the milliseconds since 1970 and 74 random bits.

    It is unique and no secret. Ids that are made together stand together in an index, so that an insert into a large
    table touches a page less that nobody else does.
    """
    moment, random = _milliseconds(), secrets.randbits(74)
    return uuid.UUID(int=moment << 80 | 7 << 76 | random >> 62 << 64 | 0b10 << 62 | random & (1 << 62) - 1)


def _milliseconds() -> int:
    """Return those since 1970 by this host's clock: for what is made together to stand together, and nothing else."""
    return time.time_ns() // 1_000_000


def new_code(length: int) -> str:
    """Return a uniformly random code of so many decimal digits, leading zeros kept."""
    return f"{secrets.randbelow(10**length):0{length}d}"


def equal(presented: str, stored: str) -> bool:
    """Compare two ASCII strings in a time that does not tell where they differ."""
    return hmac.compare_digest(presented, stored)


def chance(probability: float) -> bool:
    """Return true with this probability."""
    return secrets.randbelow(10**9) < probability * 10**9


def jittered(seconds: float) -> float:
    """Return a time that is up to a quarter shorter or longer, so that those who wait do not all come at once."""
    return seconds * (0.75 + secrets.randbelow(10**6) / 10**6 / 2)


# API keys

_API_KEY: Final = re.compile(r"otk_[A-Za-z0-9_-]{43}", re.ASCII)


def new_api_key() -> str:
    """Return a new API key: `otk_` and 256 random bits in base64url."""
    return f"otk_{_encode(secrets.token_bytes(KEY_BYTES))}"


def api_key_hash(key: str) -> str | None:
    """Return what the policy holds of an API key, `sha256:` and 64 hexadecimal digits; None for what is none.

    A plain hash is enough where nobody can try all keys. Who made one up, a short one perhaps, is not let in with it.
    """
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" if _API_KEY.fullmatch(key) else None


# Certificates


@functools.lru_cache(maxsize=1024)  # a connection shows one certificate for all of its calls
def certificate_names(pem: bytes) -> tuple[str, ...]:
    """Return the URIs and DNS names among a certificate's subject alternative names, as they stand there.

    Never its common name, nor names of another kind. gRPC's own list is not used: it ends each name at its first NUL,
    and so takes one that an authority gave to the owner of evil.example, `accounts` NUL `.evil.example`, for
    `accounts`. A certificate that cannot be read has no names.
    """
    try:
        names = _alternative_names(x509.load_pem_x509_certificate(pem))
    except (ValueError, *_UNREADABLE):
        return ()
    return (*names.get_values_for_type(x509.UniformResourceIdentifier), *names.get_values_for_type(x509.DNSName))


def certificate_expired(pem: bytes) -> bool:
    """Tell whether a certificate's time is over. One that cannot be read has none."""
    try:
        return datetime.now(UTC) > x509.load_pem_x509_certificate(pem).not_valid_after_utc
    except (ValueError, *_UNREADABLE):
        return True


def certificate_host(pem: bytes) -> str:
    """Return a host for which a server's certificate is good.

    Raises:
        ValueError: It cannot be read, or names none.
    """
    try:
        names = _alternative_names(x509.load_pem_x509_certificate(pem))
    except (ValueError, *_UNREADABLE):
        raise ValueError("this is no certificate in PEM that names a host") from None
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    if not hosts:
        raise ValueError("this certificate names no host")
    return hosts[0].replace("*", "any")


_UNREADABLE: Final = (
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What reading a certificate may raise beside ValueError."""


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def check_certificate(chain: bytes, key: bytes) -> datetime:
    """Check a server's certificate, the first of a chain, and its private key. Return when the certificate ends.

    Raises:
        ValueError: They are unreadable, not of each other, not of this time, or of a kind that gRPC cannot serve: a
            line a fault, nothing of the key.
    """
    faults: list[str] = []
    try:
        certificate = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        certificate = None
        faults.append("tls_cert holds no certificate in PEM")
    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Its text might quote what it read. TypeError: the key is encrypted.
        private = None
        faults.append("tls_key holds no private key in PEM; one without a passphrase is right")
    if certificate and not _can_serve(certificate):
        faults.append(
            "tls_cert has a key that gRPC cannot serve with: RSA of 2048 bits or more, P-256 or P-384 is right"
        )
    elif certificate and private and certificate.public_key() != private.public_key():
        faults.append("tls_key is not the key of tls_cert's first certificate, which must be the server's own")
    if certificate:
        faults += [f"tls_cert {fault}" for fault in _out_of_time(certificate)]
    if certificate is None or faults:
        raise ValueError("\n".join(faults))
    return certificate.not_valid_after_utc


def _can_serve(certificate: x509.Certificate) -> bool:
    """Tell whether gRPC can serve with a certificate's key, and should.

    It takes Ed25519 and P-521 without a word, and then fails each handshake; other curves, and RSA that is bound to
    PSS, keep it from opening its port; RSA of 1024 bits is too short for anybody's good.
    """
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False
    if isinstance(key, rsa.RSAPublicKey):
        plain = certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5
        return plain and key.key_size >= _RSA_BITS
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)


def check_authorities(bundle: bytes) -> None:
    """Check a bundle of authorities.

    Raises:
        ValueError: It cannot be read, or none of them is of this time.
    """
    try:
        authorities = x509.load_pem_x509_certificates(bundle)
    except ValueError:
        raise ValueError("tls_client_ca holds no certificate in PEM") from None
    faults = [fault for authority in authorities for fault in _out_of_time(authority)]
    if len(faults) == len(authorities):
        raise ValueError(f"tls_client_ca {faults[0]}, so no client's certificate would be taken")


def _out_of_time(certificate: x509.Certificate) -> list[str]:
    """Return what to say of a certificate that is not valid now: one line, or none."""
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        return [f"expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it"]
    if now < certificate.not_valid_before_utc:
        return [f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: is the clock right?"]
    return []


# Codes of one-time tokens


@dataclass(frozen=True, slots=True)
class CodeSubject:
    """What a code is good for. Everything here comes from the row, or goes into it."""

    token_id: uuid.UUID
    token_type: str
    user_id: uuid.UUID
    relates_to: str


def argon2_parameters(memory_kib: int, time_cost: int, parallelism: int) -> argon2.Parameters:
    """Return parameters for Argon2id, version 1.3, with a hash of 32 bytes and a salt of 16 (RFC 9106, 4)."""
    return argon2.Parameters(
        argon2.Type.ID, argon2.low_level.ARGON2_VERSION, 16, 32, time_cost, memory_kib, parallelism
    )


class CodeHasher:
    """Hashes and checks codes. A class because it holds the cost parameters beside the ring.

    Its methods are slow on purpose (20 ms and 19 MiB by default): call them off the event loop, few at a time.
    """

    def __init__(self, ring: Keyring, parameters: argon2.Parameters | None) -> None:
        """Take the ring, and Argon2's parameters for new codes; without them, new codes get an HMAC only."""
        self._ring = ring
        self._parameters = parameters
        self._hasher = (
            argon2.PasswordHasher(
                time_cost=parameters.time_cost,
                memory_cost=parameters.memory_cost,
                parallelism=parameters.parallelism,
            )
            if parameters
            else None
        )
        # What an unknown subject's code is checked against, so that it takes as long as a wrong one.
        self._decoy = self._hasher.hash(secrets.token_bytes(_LINK_BYTES)) if self._hasher else None

    @property
    def slow(self) -> bool:
        """Whether new codes are hashed with Argon2."""
        return self._hasher is not None

    def hash(self, code: str, subject: CodeSubject) -> str:
        """Return what is stored for a new code.

        Raises:
            NO_VERDICT: Memory ran out.
        """
        key = self._ring.keys[0]
        if self._hasher is None:
            return f"oth1.{key.id}.{_encode(_code_mac(key, code, subject, with_row=True))}"
        return f"otc1.{key.id}.{self._hasher.hash(_code_mac(key, code, subject))}"

    def matches(self, code: str, stored: str, subject: CodeSubject) -> bool:
        """Tell whether a code is the stored one.

        Raises:
            KeyError: The ring no longer has the row's key, or the row holds no code of ours.
            NO_VERDICT: It could not be checked, since memory ran out.
            argon2.exceptions.InvalidHashError: The row is damaged.
        """
        if stored.startswith("oth1."):
            key = self._ring.key(_key_id(stored, "oth1"))
            expected = stored.rpartition(".")[2]
            return hmac.compare_digest(_encode(_code_mac(key, code, subject, with_row=True)), expected)
        key_id = _key_id(stored, "otc1")
        key = self._ring.key(key_id)
        phc = stored[len(f"otc1.{key_id}.") :]
        try:
            # The parameters come from the hash, so any hasher checks it.
            return argon2.PasswordHasher().verify(phc, _code_mac(key, code, subject))
        except VerifyMismatchError:
            # Its parent VerificationError means "could not check", which must never count as a wrong code.
            return False
        except VerificationError as error:
            if str(error) in _SHORTAGES:
                raise
            raise InvalidHashError("the stored code cannot be read") from error

    def pretend(self) -> None:
        """Do the work of `matches` for a subject that has no code."""
        if self._decoy is None:
            return
        try:
            argon2.PasswordHasher().verify(self._decoy, secrets.token_bytes(_LINK_BYTES))
        except VerifyMismatchError:
            return


def is_slow(stored: str) -> bool:
    """Tell whether a stored code is checked with Argon2, off the event loop."""
    return stored.startswith("otc1.")


def binds_row(stored: str) -> bool:
    """Tell whether what is stored for a secret depends on its row's id."""
    return stored.startswith("oth1.")


def _code_mac(key: Key, code: str, subject: CodeSubject, *, with_row: bool = False) -> bytes:
    row = (subject.token_id.bytes,) if with_row else ()
    parts = (subject.token_type, subject.user_id.bytes, subject.relates_to, code, *row)
    return hmac.digest(key.code, _frame(*parts), "sha256")
