"""Authorities and certificates for tests, made anew each time: no key lies in the repository."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

GeneralName = x509.GeneralName
"""A name that a certificate has."""


def uri(text: str) -> GeneralName:
    """Return a URI as a subject alternative name."""
    return x509.UniformResourceIdentifier(text)


def dns(text: str) -> GeneralName:
    """Return a DNS name as a subject alternative name."""
    return x509.DNSName(text)


def email(text: str) -> GeneralName:
    """Return a mail address as a subject alternative name."""
    return x509.RFC822Name(text)


def ip(text: str) -> GeneralName:
    """Return an address as a subject alternative name."""
    return x509.IPAddress(ipaddress.ip_address(text))


@dataclass(frozen=True, slots=True, repr=False)
class Issued:
    """A certificate and its private key, both in PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """An authority that signs whatever it is asked to. A class because it has a key."""

    def __init__(self, name: str = "authority") -> None:
        """Make its key and its own certificate."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _common_name(name)
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(self._name, self._name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1000))
            .not_valid_after(now + timedelta(days=1000))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, SHA256())
        )
        self.certificate = certificate.public_bytes(Encoding.PEM)

    def issue(
        self, *names: GeneralName, common_name: str = "somebody", days: float = 90, starts: float | None = None
    ) -> Issued:
        """Issue a certificate with these subject alternative names, which ends in so many days from now.

        It starts a day before now or before its end, or in so many days.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder(
                self._name, _common_name(common_name), key.public_key(), x509.random_serial_number()
            )
            .not_valid_before(now + timedelta(days=min(0, days) - 1 if starts is None else starts))
            .not_valid_after(now + timedelta(days=days))
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Issued(builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM), private)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
