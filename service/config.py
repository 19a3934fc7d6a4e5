"""The settings: their names, defaults and limits, where they come from, and what to say of a wrong one.

Every setting is one field of `Settings`. Its option (`--max-attempts`), its environment variable
(`ONETIME_MAX_ATTEMPTS`) and its key in the TOML file (`max_attempts`) follow from its name; the tables of `--help` and
README are made from `describe()`.

It knows nothing of what the settings are for: a limit is stated here and kept elsewhere.
"""

import contextlib
import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import BeforeValidator, Field, JsonValue, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.crypto import Keyring
from service.fields import Fields, mailbox

ENV_PREFIX: Final = "ONETIME_"

OWASP_ARGON2: Final = ((47104, 1), (19456, 2), (12288, 3), (9216, 4), (7168, 5))
"""Memory in KiB and passes that OWASP's Password Storage Cheat Sheet asks of Argon2id at least, with one lane."""

_MAX_TTL: Final = timedelta(days=7)
_LANE_KIB: Final = 8  # Argon2's own minimum (RFC 9106, 3.1)
_LONGEST_PRODUCT: Final = 64
_SHOWN: Final = 80  # characters of a wrong value

_PURPOSES: Final = {
    "confirmation_token": "confirmation",
    "recovery_token": "recovery",
    "email_change_token_new": "email_change_new",
    "email_change_token_current": "email_change_current",
    "phone_change_token": "phone_change",
    "reauthentication_token": "reauthentication",
    "email_verification": "email_verification",
}
"""The settings' names for the labels of auth.one_time_token_type, and for email verifications."""


class SettingsError(Exception):
    """Settings that are wrong or missing. The text has all of them, a line each, and no secret."""

    def __init__(self, problems: Iterable[str]) -> None:
        """Take a line for each setting."""
        self.problems = tuple(problems)
        count = "a setting is" if len(self.problems) == 1 else f"{len(self.problems)} settings are"
        super().__init__("\n".join([f"{count} wrong:", *(f"  {problem}" for problem in self.problems)]))


# Forms of values

_DURATION: Final = re.compile(
    r"""
    (?P<bare> \d{1,9} (?:\.\d{1,6})? )
    |
    P? (?: (?P<days> \d{1,5} ) D )? T?
    (?: (?P<hours> \d{1,9} ) H )?
    (?: (?P<minutes> \d{1,9} ) M )?
    (?: (?P<seconds> \d{1,9} (?:\.\d{1,6})? ) S )?
    (?: (?P<milliseconds> \d{1,9} ) MS )?
    """,
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)


def parse_duration(text: str) -> timedelta:
    """Read a duration: `900` or `0.5` (seconds), `15m`, `1h30m`, `2d`, `500ms`, `PT15M`.

    Raises:
        ValueError: It is none of these.
    """
    found = _DURATION.fullmatch(text.strip())
    parts = {unit: float(amount) for unit, amount in found.groupdict().items() if amount} if found else {}
    if not parts:
        raise ValueError("not a duration")
    parts["seconds"] = parts.get("seconds", 0) + parts.pop("bare", 0)
    return timedelta(**parts)


def format_duration(duration: timedelta) -> str:
    """Return the short form that `parse_duration` reads, such as `1h30m`."""
    if not duration:
        return "0s"
    milliseconds = duration // timedelta(milliseconds=1)
    text = ""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        amount, milliseconds = divmod(milliseconds, size)
        # A day is 24h, the way people write it; from two days on, days are clearer.
        if unit == "d" and amount == 1:
            milliseconds += size
        elif amount:
            text += f"{amount}{unit}"
    return text


def parse_listen(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port` into host and port; the host of IPv6 has no brackets.

    Raises:
        ValueError: It is neither.
    """
    found = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>\d{1,5})", text, re.ASCII)
    if found is None or not 1 <= int(found["port"]) <= 65535:  # noqa: PLR2004 - the last TCP port
        raise ValueError("not host:port")
    if found["v6"]:
        ipaddress.IPv6Address(found["v6"])
    return found["v6"] or found["host"], int(found["port"])


@dataclass(frozen=True, slots=True)
class MailServer:
    """What a URL says of a mail server."""

    host: str
    port: int
    tls: Literal["implicit", "starttls", "none"]
    user: str | None
    password: str | None = dataclasses.field(repr=False)
    ca: Path | None
    """The authorities of its certificate, in PEM; the system's if None."""
    timeout: timedelta
    """For each of its answers."""
    connections: int
    """To be open at once at most."""


_SMTP_PORTS: Final = {"implicit": 465, "starttls": 587, "none": 25}
_RIGHT_SMTP_URL: Final = (
    "smtp://user:password@host:port or smtps://user:password@host:port, without a path, is right; in a password, %2F,"
    " %3F, %23, %40 and %25 for /, ?, #, @ and % are right"
)
_SMTP_PARAMETERS: Final = {"tls", "ca", "timeout", "connections"}
_MAX_CONNECTIONS: Final = 100


def parse_smtp_url(text: str) -> MailServer:
    """Read `smtps://user:password@host:port?ca=...&timeout=...&connections=...`; of `smtp://`, `tls` as well.

    Without `tls`, `smtp` demands STARTTLS; on loopback, and without `ca`, it does without.

    Raises:
        ValueError: It is none. The text quotes nothing of it, since there may be a password anywhere.
    """
    parts = _split_smtp_url(text)
    on_loopback, asked = is_loopback(parts.host), dict(parts.asked)
    known = asked.keys() <= _SMTP_PARAMETERS and len(asked) == len(parts.asked)
    _demand(known, "after the question mark, tls, ca, timeout and connections, each once, are right")
    right_tls = "tls" not in asked or (parts.scheme == "smtp" and asked["tls"] in ("starttls", "none"))
    _demand(right_tls, "smtps:// without tls, or smtp:// with tls=starttls or tls=none, is right")
    usual = "none" if on_loopback and "ca" not in asked else "starttls"
    tls = "implicit" if parts.scheme == "smtps" else asked.get("tls", usual)
    _demand(bool(parts.user) == bool(parts.password), "a user and a password are right, or neither")
    guarded = not parts.user or tls != "none" or on_loopback
    _demand(guarded, "a password must not travel in plain text: smtp:// without tls=none is right")
    authorities = asked.get("ca", "")
    useful = "ca" not in asked or (authorities and tls != "none")
    _demand(bool(useful), "ca=FILE, without tls=none, is right")
    try:
        timeout = parse_duration(asked.get("timeout", "10s"))
    except ValueError:
        timeout = timedelta()
    _demand(timedelta(milliseconds=100) <= timeout <= timedelta(minutes=1), "a timeout from 100ms to 1m is right")
    connections = asked.get("connections", "4")
    some = re.fullmatch("[0-9]{1,3}", connections) and 1 <= int(connections) <= _MAX_CONNECTIONS
    _demand(bool(some), f"1 to {_MAX_CONNECTIONS} connections are right")
    return MailServer(
        host=parts.host,
        port=_SMTP_PORTS[tls] if parts.port is None else parts.port,
        tls=cast("Literal['implicit', 'starttls', 'none']", tls),
        user=parts.user or None,
        password=parts.password or None,
        ca=Path(authorities) if authorities else None,
        timeout=timeout,
        connections=int(connections),
    )


class _SmtpUrl(NamedTuple):
    scheme: str
    host: str
    port: int | None
    user: str
    password: str
    asked: list[tuple[str, str]]


def _split_smtp_url(text: str) -> _SmtpUrl:
    try:
        url = urlsplit(text)
        port = url.port
        host = url.hostname or ""
        if ":" in host:
            ipaddress.IPv6Address(host)
        user, password = (unquote(part or "", errors="strict") for part in (url.username, url.password))
        # In a path, a plus is a plus.
        query = url.query.replace("+", "%2B")
        asked = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        # Its text may quote what it did not understand.
        raise ValueError(_RIGHT_SMTP_URL) from None
    a_host = re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9]|[0-9a-f.]*:[0-9a-f:.]*", host, re.ASCII)
    # Line breaks would be left out.
    _demand(url.scheme in ("smtp", "smtps") and bool(a_host) and text.isprintable(), _RIGHT_SMTP_URL)
    _demand(url.path in ("", "/") and not url.fragment and port != 0, _RIGHT_SMTP_URL)
    return _SmtpUrl(url.scheme, host, port, user, password, asked)


def _demand(holds: bool, right: str) -> None:  # noqa: FBT001 - what is asserted
    if not holds:
        raise ValueError(right)


def is_loopback(host: str) -> bool:
    """Tell whether a host's name or address is this machine's own, out of reach of others."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _no_truth(value: object) -> object:
    """Refuse true and false where a number is meant: Python takes them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("not a number")  # noqa: TRY004 - what pydantic expects of a validator
    return value


def _duration(value: object) -> object:
    if isinstance(value, str):
        return parse_duration(value)
    return _no_truth(value)


Number = Annotated[int, BeforeValidator(_no_truth)]
Fraction = Annotated[float, BeforeValidator(_no_truth)]
Duration = Annotated[timedelta, BeforeValidator(_duration)]


class _WrongError(ValueError):
    """A value of the right form that is wrong nevertheless. Its text says why, and what would be right."""


# The settings


def _setting(  # noqa: PLR0913 - what is known of a setting, by name
    default: Any,  # noqa: ANN401 - of any field
    description: str,
    *,
    right: str,
    group: str,
    unit: str = "",
    env_only: bool = False,
    shown_default: str | None = None,
    **limits: Any,  # noqa: ANN401 - passed on
) -> Any:  # noqa: ANN401 - stands for a field's default, as pydantic's own Field
    """Declare a setting: `right` completes the sentence "... is right"."""
    known: dict[str, JsonValue] = {
        "right": right,
        "group": group,
        "unit": unit,
        "env_only": env_only,
        "shown_default": shown_default,
    }
    make = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**make, description=description, json_schema_extra=known, **limits)


def _whole(default: Any, description: str, least: int, most: int, *, group: str, **more: Any) -> Any:  # noqa: ANN401
    right = f"a whole number from {least} to {most}"
    return _setting(default, description, right=right, group=group, ge=least, le=most, **more)


def _time(default: str, description: str, least: str, most: str, *, group: str) -> Any:  # noqa: ANN401
    return _setting(
        parse_duration(default),
        description,
        right=f"a duration from {least} to {most}, such as 90, 15m, 1h30m or PT15M,",
        group=group,
        unit="duration",
        ge=parse_duration(least),
        le=parse_duration(most),
    )


def _lifetime(default: str, what: str) -> Any:  # noqa: ANN401
    return _time(default, f"How long {what} lives, unless its call asks otherwise.", "1s", "7d", group="Lifetimes")


def _max_ttl(default: str, what: str) -> Any:  # noqa: ANN401
    return _time(default, f"The longest life that a call may ask for {what}.", "1s", "7d", group="Lifetimes")


def _cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """All settings. Frozen: what was checked at the start holds until the end."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,  # a variable that compose files pass on empty is not set
        extra="forbid",
        frozen=True,
        validate_default=True,  # a default may conflict with what was set
        hide_input_in_errors=True,
    )

    # Where

    listen: str = _setting(
        "127.0.0.1:50051",
        "Where calls are served. In plain text, a loopback address only.",
        right="host:port or [IPv6]:port, such as 127.0.0.1:50051,",
        group="Where",
    )
    metrics_listen: str | None = _setting(
        None,
        "Where Prometheus reads the metrics, over HTTP. Off if unset.",
        right="host:port or [IPv6]:port, such as 127.0.0.1:9464,",
        group="Where",
    )
    database_url: str = _setting(
        "",
        "The PostgreSQL database, 15 or newer. Never put a password on the command line: everyone can read it there.",
        right="postgresql://user@host:5432/database",
        group="Where",
        repr=False,  # it may hold a password
    )
    data_dir: Path = _setting(
        Path(".onetime"),
        "The folder of `onetime dev`: its database and its keys.",
        right="a path",
        group="Where",
    )
    keys_file: Path | None = _setting(
        None,
        "The file with the keys; `onetime keys` makes and changes it.",
        right="a path",
        group="Where",
    )
    keys: SecretStr | None = _setting(
        None,
        "The keys themselves, instead of a file: its lines, separated by newlines or commas.",
        right="one to four of `<id> <43 characters of base64url>`, separated by newlines or commas,",
        group="Where",
        env_only=True,
        repr=False,
    )
    config: Path | None = _setting(None, "A TOML file with settings.", right="a path", group="Where")

    # Callers

    policy_file: Path | None = _setting(
        None,
        "The TOML file that says who may call what. Read again when it changes.",
        right="a path",
        group="Callers",
    )
    tls_cert: Path | None = _setting(
        None,
        "The server's certificate and those that lead to its authority, in PEM. Read again when it changes.",
        right="a path",
        group="Callers",
    )
    tls_key: Path | None = _setting(
        None,
        "The private key of that certificate, in PEM. Read again when it changes.",
        right="a path",
        group="Callers",
    )
    tls_client_ca: Path | None = _setting(
        None,
        "The authorities whose client certificates are taken, in PEM: with it, every caller must have one."
        " Read again when it changes.",
        right="a path",
        group="Callers",
    )
    health_listen: str | None = _setting(
        None,
        "Where health alone is served, in plain text, for probes that have neither certificate nor key. Off if unset.",
        right="host:port or [IPv6]:port, such as 127.0.0.1:50052,",
        group="Callers",
    )
    max_connection_age: Duration = _time(
        "10m",
        "How long a connection lives: so long may a withdrawn certificate be of use on one that is open.",
        "1s",
        "1d",
        group="Callers",
    )

    # Codes

    code_hashing: Literal["argon2id", "hmac"] = _setting(
        "argon2id",
        "How codes are kept. `hmac` is much faster, but a dump of the database with the keys then gives the codes.",
        right="argon2id or hmac",
        group="Codes",
    )
    unsafe_cheap_argon2: bool = _setting(
        False,  # noqa: FBT003 - the default of a field
        "For tests only: let Argon2 cost less than OWASP asks for.",
        right="true or false",
        group="Codes",
        env_only=True,
    )
    argon2_memory_kib: Number = _whole(
        19456, "Memory of one Argon2 hash.", _LANE_KIB, 4 * 1024 * 1024, group="Codes", unit="KiB"
    )
    argon2_parallelism: Number = _whole(1, "Lanes of one Argon2 hash.", 1, 16, group="Codes")
    argon2_time_cost: Number = _whole(2, "Passes of one Argon2 hash over its memory.", 1, 100, group="Codes")
    argon2_threads: Number = _whole(
        _cores,
        "Argon2 hashes made at once. Each needs the memory above.",
        1,
        256,
        group="Codes",
        shown_default="number of processors",
    )
    argon2_queue: Number = _whole(
        64, "Calls that wait for an Argon2 hash before more are refused.", 0, 10_000, group="Codes"
    )
    max_attempts: Number = _whole(5, "Wrong codes that are compared for one token.", 1, 100, group="Codes")

    # Limits

    failures_per_window: Number = _whole(
        10,
        "Wrong codes that are compared for one user and purpose in any time of --failure-window.",
        1,
        1000,
        group="Limits",
    )
    failure_window: Duration = _time(
        "15m", "The time in which --failures-per-window are counted.", "1s", "1d", group="Limits"
    )
    failures_per_day: Number = _whole(
        50, "Wrong codes that are compared for one user and purpose in any 24 hours.", 1, 1000, group="Limits"
    )
    failures_in_a_row: Number = _whole(
        100,
        "Wrong codes in a row, without a right one, that stop the codes of one user and purpose.",
        1,
        10_000,
        group="Limits",
    )
    stop_time: Duration = _time(
        "24h", "How long such a stop lasts. Each further wrong code doubles it.", "1s", "365d", group="Limits"
    )
    longest_stop: Duration = _time("7d", "The longest such stop.", "1s", "365d", group="Limits")
    send_interval: Duration = _time(
        "1m", "The least time between two sends of one verification's code.", "0s", "1d", group="Limits"
    )
    sends_per_window: Number = _whole(
        5,
        "Tokens and codes issued and sent for one user and purpose in any time of --send-window.",
        1,
        1000,
        group="Limits",
    )
    send_window: Duration = _time(
        "10m", "The time in which --sends-per-window are counted.", "1s", "1d", group="Limits"
    )
    sends_per_day: Number = _whole(
        20, "Tokens and codes issued and sent for one user and purpose in any 24 hours.", 1, 1000, group="Limits"
    )

    # Lifetimes. The ceilings come first: a lifetime is held against its ceiling.

    confirmation_max_ttl: Duration = _max_ttl("24h", "a confirmation token")
    confirmation_lifetime: Duration = _lifetime("1h", "a confirmation token")
    recovery_max_ttl: Duration = _max_ttl("15m", "a recovery token")
    recovery_lifetime: Duration = _lifetime("15m", "a recovery token")
    email_change_new_max_ttl: Duration = _max_ttl("15m", "a token for the new address of an email change")
    email_change_new_lifetime: Duration = _lifetime("15m", "a token for the new address of an email change")
    email_change_current_max_ttl: Duration = _max_ttl("15m", "a token for the current address of an email change")
    email_change_current_lifetime: Duration = _lifetime("15m", "a token for the current address of an email change")
    phone_change_max_ttl: Duration = _max_ttl("5m", "a phone change token")
    phone_change_lifetime: Duration = _lifetime("5m", "a phone change token")
    reauthentication_max_ttl: Duration = _max_ttl("5m", "a reauthentication token")
    reauthentication_lifetime: Duration = _lifetime("5m", "a reauthentication token")
    email_verification_max_ttl: Duration = _max_ttl("15m", "an email verification")
    email_verification_lifetime: Duration = _lifetime("15m", "an email verification")

    # Mail

    smtp_url: str | None = _setting(
        None,
        "The mail server that codes are sent with; none are sent if unset. `smtps` is TLS from the start, `smtp`"
        " demands STARTTLS except on loopback. Behind a `?`: ca=FILE, timeout=10s, connections=4, tls=none. Never put"
        " a password on the command line.",
        right="smtps://user:password@host or smtp://user:password@host:587",
        group="Mail",
        repr=False,  # it may hold a password
    )
    mail_from: str = _setting(
        "no-reply@localhost",
        "The address that mails come from.",
        right="an address such as no-reply@example.com",
        group="Mail",
    )
    mail_product: str = _setting(
        "onetime",
        "What mails call the product that the code is for. They come in its name.",
        right="1 to 64 printable characters",
        group="Mail",
    )
    mail_locale: str = _setting(
        "en",
        "The language of mails where a call asks for none, or for one without a template.",
        right='a language with a template, such as "en",',
        group="Mail",
    )
    mail_templates: Path | None = _setting(
        None,
        "A folder of templates that go before our own; `onetime mail preview --help` tells how.",
        right="a path",
        group="Mail",
    )
    mail_tries: Number = _whole(10, "How often sending a mail is tried before it is given up.", 1, 100, group="Mail")

    # Clean-up

    cleanup_probability: Fraction = _setting(
        0.1,
        "The chance that a write starts a clean-up.",
        right="a number from 0 to 1",
        group="Clean-up",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )
    retention: Duration = _time(
        "24h", "How long used and cancelled verifications are kept.", "15m", "365d", group="Clean-up"
    )
    receipt_retention: Duration = _time(
        "15m", "How long answers are kept for calls repeated with their request_id.", "15m", "7d", group="Clean-up"
    )

    # Running

    call_timeout: Duration = _time("5s", "The longest that a call may take.", "100ms", "1m", group="Running")
    max_concurrent_calls: Number = _whole(
        512,
        "Calls under way at once, before more are refused. A caller alone gets four fifths of them.",
        5,
        100_000,
        group="Running",
    )
    pool_size: Number = _whole(
        8, "Connections to the database for calls. The clean-up has one more, and mail two.", 1, 100, group="Running"
    )
    share_port: bool = _setting(
        False,  # noqa: FBT003 - the default of a field
        "Let other servers on this machine serve at the same address, one a processor. Each needs a --metrics-listen"
        " and a --health-listen of its own.",
        right="true or false",
        group="Running",
    )
    drain_delay: Duration = _time(
        "2s",
        "From SIGTERM on, health says NOT_SERVING for so long before new calls are refused. None in `onetime dev`.",
        "0s",
        "5m",
        group="Running",
    )
    shutdown_grace: Duration = _time(
        "10s", "How long calls under way may take to end after that.", "0s", "10m", group="Running"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "What is logged: this and worse.", right="debug, info, warning or error", group="Running"
    )

    def lifetime(self, token_type: str) -> tuple[timedelta, timedelta]:
        """Return the lifetime and its ceiling, of a label of auth.one_time_token_type or of `email_verification`."""
        purpose = _PURPOSES[token_type]
        return getattr(self, f"{purpose}_lifetime"), getattr(self, f"{purpose}_max_ttl")

    def longest_ttl(self) -> timedelta:
        """Return the longest life that any token may have."""
        return max(self.lifetime(token_type)[1] for token_type in _PURPOSES)

    @field_validator("listen", "metrics_listen", "health_listen")
    @classmethod
    def _listen_form(cls, value: str | None) -> str | None:
        if value is not None:
            parse_listen(value)
        return value

    @field_validator("database_url")
    @classmethod
    def _database_url_form(cls, value: str) -> str:
        try:
            port = str(conninfo_to_dict(value).get("port", "1"))
        except psycopg.Error:
            # libpq's text quotes what it does not understand, a password perhaps.
            port = ""
        # libpq looks at ports when it connects, and quotes what stands there: after a password with an @ in it, say.
        if not re.fullmatch(r"\d{1,5}(,\d{1,5})*", port, re.ASCII):
            raise ValueError("not a URL")
        return value

    @field_validator("smtp_url")
    @classmethod
    def _smtp_url_form(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_smtp_url(value)
            except ValueError as error:
                raise _WrongError(str(error)) from None
        return value

    @field_validator("mail_from")
    @classmethod
    def _mail_from_form(cls, value: str, info: ValidationInfo) -> str:
        address = mailbox(value)
        smtp_url = info.data.get("smtp_url")
        if smtp_url and address.endswith("@localhost") and not is_loopback(parse_smtp_url(smtp_url).host):
            raise _WrongError("no mail server takes mail from there: an address such as no-reply@example.com is right")
        return address

    @field_validator("mail_product")
    @classmethod
    def _mail_product_form(cls, value: str) -> str:
        name = value.strip()
        if not 1 <= len(name) <= _LONGEST_PRODUCT or not name.isprintable():
            raise ValueError("not a name")
        return name

    @field_validator("mail_locale")
    @classmethod
    def _mail_locale_form(cls, value: str) -> str:
        fields = Fields()
        # POSIX writes pt_BR.
        fields.locale("mail_locale", value.replace("_", "-"))
        if not value or fields.violations:
            raise ValueError("not a language")
        return value

    @field_validator("keys")
    @classmethod
    def _one_source_of_keys(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None:
            return None
        if info.data.get("keys_file"):
            raise _WrongError(f"keys_file is set too; one of them is right: unset {ENV_PREFIX}KEYS, or keys_file")
        try:
            Keyring.parse(_lines_of_keys(value))
        except ValueError as error:
            raise _WrongError(str(error)) from None
        return value

    @field_validator("argon2_parallelism")
    @classmethod
    def _enough_for_each_lane(cls, value: int, info: ValidationInfo) -> int:
        memory = info.data.get("argon2_memory_kib", value * _LANE_KIB)
        if memory < value * _LANE_KIB:
            raise _WrongError(f"each lane needs {_LANE_KIB} KiB, and argon2_memory_kib is {memory}")
        return value

    @field_validator("argon2_time_cost")
    @classmethod
    def _not_cheap(cls, value: int, info: ValidationInfo) -> int:
        # What is missing in info.data is wrong itself, and told already.
        memory = info.data.get("argon2_memory_kib")
        hashing = info.data.get("code_hashing")
        if memory and hashing == "argon2id" and not info.data.get("unsafe_cheap_argon2") and is_cheap(memory, value):
            enough = ", ".join(f"{kib} KiB with {passes}" for kib, passes in OWASP_ARGON2)
            raise _WrongError(
                f"too few passes for argon2_memory_kib = {memory}: OWASP asks for at least one of {enough} passes"
            )
        return value

    @field_validator("longest_stop")
    @classmethod
    def _no_shorter_than_a_stop(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        stop_time = info.data.get("stop_time", value)
        if value < stop_time:
            raise _WrongError(
                f"{format_duration(value)} is shorter than stop_time, {format_duration(stop_time)}: lengthen this one"
                " or shorten the other"
            )
        return value

    @field_validator(*(f"{purpose}_lifetime" for purpose in _PURPOSES.values()))
    @classmethod
    def _within_ceiling(cls, value: timedelta, info: ValidationInfo) -> timedelta:
        ceiling_name = str(info.field_name).replace("_lifetime", "_max_ttl")
        ceiling = info.data.get(ceiling_name, _MAX_TTL)
        if value > ceiling:
            raise _WrongError(
                f"{format_duration(value)} is longer than {ceiling_name}, {format_duration(ceiling)}: shorten this one "
                "or raise the other"
            )
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but the arguments: `load` is where the other sources are."""
        del cls, settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @classmethod
    def from_sources(cls, *sources: PydanticBaseSettingsSource) -> Self:
        """Make settings from these sources, the first of which goes before the others."""
        return cls(_build_sources=(sources, {}))


def is_cheap(memory_kib: int, time_cost: int) -> bool:
    """Tell whether Argon2id costs less than OWASP's minimum. More than one lane makes nothing cheaper to attack."""
    return not any(memory_kib >= memory and time_cost >= passes for memory, passes in OWASP_ARGON2)


def _lines_of_keys(keys: SecretStr) -> str:
    """Return the keys as the file has them. Many ways to set a variable do not allow for a newline."""
    return keys.get_secret_value().replace(",", "\n")


def load_keyring(settings: Settings) -> Keyring:
    """Return the keys.

    Raises:
        SettingsError: There are none, or they are malformed. The text holds no key.
    """
    if settings.keys is not None:
        return Keyring.parse(_lines_of_keys(settings.keys))
    if settings.keys_file is None:
        raise SettingsError([_MISSING_KEYS])
    try:
        return read_keys(settings.keys_file)
    except ValueError as error:
        raise SettingsError([f"keys_file: {error}"]) from None


def read_keys(path: Path) -> Keyring:
    """Return the keys in a file.

    Raises:
        ValueError: It cannot be read, or is malformed. The text holds no key.
    """
    try:
        return parse_keys(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; `onetime keys init` makes a file of keys") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_keys(content: bytes) -> Keyring:
    """Return the keys that a file holds.

    Raises:
        ValueError: It is malformed. The text holds no key.
    """
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        # Its text quotes what it could not decode.
        raise ValueError("this is no file of keys; `onetime keys init` makes one") from None
    return Keyring.parse(text)


# Loading


def option_of(name: str) -> str:
    """Return a setting's command-line option."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """Return a setting's environment variable."""
    return ENV_PREFIX + name.upper()


_MISSING_KEYS: Final = (
    f"{variable_of('keys_file')} is missing: the path of a file made by `onetime keys init` is right, or the keys "
    f"themselves in {variable_of('keys')}"
)

IDENTIFYING: Final = ("tls_cert", "tls_key", "policy_file")
"""What it takes to identify callers."""

_FOR_IDENTIFIED_CALLERS: Final = (*IDENTIFYING, "tls_client_ca", "health_listen")
"""What has a meaning only where callers are identified. In plain text, `health_listen` would serve everything."""


def load(
    options: Mapping[str, object],
    *,
    require: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
    plain_text: bool = False,
) -> Settings:
    """Read the settings: options go before the environment, that before the TOML file, that before the defaults.

    Args:
        options: What the command line gave, by the settings' names.
        require: Settings that must be there. `keys` stands for `keys` or `keys_file`.
        defaults: Defaults other than the settings' own.
        plain_text: Whether calls are to be served to whoever comes: then on loopback only, and what would identify
            callers must not be set, lest somebody relies on it.

    Raises:
        SettingsError: With every setting that is wrong, unknown or missing.
    """
    problems = _unknown_variables()
    environment = EnvSettingsSource(Settings)
    given_environment = environment()
    config = options.get("config") or given_environment.get("config")
    given_file: Mapping[str, Any] = {}
    if config:
        given_file, problems_of_file = _read_file(Path(str(config)))
        problems += problems_of_file

    def place(name: str) -> str:
        """Name a setting the way it was given."""
        if name in options:
            return option_of(name)
        if name in given_environment:
            return variable_of(name)
        return f"{name} in {config}" if name in given_file else f"{name} (default)"

    given = {**given_file, **given_environment, **options}
    problems += _missing(require, given)
    problems += _not_for_plain_text(given, place) if plain_text else []
    if "keys" in require and given.get("keys_file"):
        try:
            read_keys(Path(str(given["keys_file"])))
        except ValueError as error:
            problems.append(f"{place('keys_file')}: {error}")
    sources = [InitSettingsSource(Settings, dict(source)) for source in (options, given_file, defaults or {})]
    try:
        settings = Settings.from_sources(sources[0], environment, *sources[1:])
    except ValidationError as error:
        for detail in error.errors():
            name = str(detail["loc"][0])
            problems.append(_problem(place(name), given.get(name), detail))
        raise SettingsError(problems) from None
    if problems:
        raise SettingsError(problems)
    return settings


def _problem(place: str, given: object, detail: ErrorDetails) -> str:
    """Return the line on a wrong setting."""
    field = Settings.model_fields[str(detail["loc"][0])]
    shown = "" if given is None or not field.repr else f" {given!r}"[:_SHOWN]
    cause = detail.get("ctx", {}).get("error")
    reason = str(cause) if isinstance(cause, _WrongError) else f"{_known(field)['right']} is right"
    return f"{place}{shown}: {reason}"


def _known(field: FieldInfo) -> dict[str, Any]:
    return cast("dict[str, Any]", field.json_schema_extra)


def _missing(require: Iterable[str], given: Mapping[str, object]) -> list[str]:
    """Return a line for each required setting that was not given."""
    lines = []
    unidentified = [variable_of(name) for name in IDENTIFYING if name in require and not given.get(name)]
    if unidentified:
        lines.append(
            f"{', '.join(unidentified)} {'is' if len(unidentified) == 1 else 'are'} missing: the paths of a certificate"
            " and its key, both in PEM, and of a policy are right; or add --insecure-loopback, to serve this machine"
            " only, in plain text, to whoever is on it"
        )
    for name in require:
        if name in IDENTIFYING:
            continue
        if name == "keys":
            if not given.get("keys") and not given.get("keys_file"):
                lines.append(_MISSING_KEYS)
        elif not given.get(name):
            lines.append(f"{variable_of(name)} is missing: {_known(Settings.model_fields[name])['right']} is right")
    return lines


def _not_for_plain_text(given: Mapping[str, object], place: Callable[[str], str]) -> list[str]:
    """Return a line for each setting with which plain text must not be served."""
    lines = [
        f"{place(name)}: it has no use in plain text, where nobody is asked who they are: leave out one of the two"
        for name in _FOR_IDENTIFIED_CALLERS
        if given.get(name)
    ]
    listen = str(given.get("listen") or Settings.model_fields["listen"].default)
    with contextlib.suppress(ValueError):  # which is told as malformed
        if not is_loopback(parse_listen(listen)[0]):
            lines.append(
                f"{place('listen')} {listen!r}: only a loopback address is right in plain text: whoever reaches it may"
                " issue and consume every token; take 127.0.0.1, [::1] or localhost, or identify callers by"
                f" {', '.join(IDENTIFYING)}"
            )
    return lines


_SERVICE_LINK: Final = re.compile(
    r"""
    (\w+_)?
    (
      service_host=.* | service_port(_\w+)?=\d+
      | port(_\d+_(tcp|udp|sctp))?=(tcp|udp|sctp)://.*
      | port_\d+_(tcp|udp|sctp)_(proto|port|addr)=.*
    )
    """,
    re.VERBOSE | re.ASCII,
)
"""What Kubernetes sets in every pod for a service called `onetime` or `onetime-...`, after the prefix."""


def _unknown_variables() -> list[str]:
    """Return a line for each variable that looks like a setting and is none."""
    problems = []
    for variable, value in sorted(os.environ.items()):
        name = variable.lower().removeprefix(ENV_PREFIX.lower())
        if name == variable.lower() or name in Settings.model_fields or _SERVICE_LINK.fullmatch(f"{name}={value}"):
            continue
        meant = _close(name, Settings.model_fields)
        problems.append(f"{variable}: there is no such setting{_did_you_mean(meant and variable_of(meant))}")
    return problems


def _close(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, 1)), None)


def _did_you_mean(name: str | None) -> str:
    return f"; did you mean {name}?" if name else ""


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return what to add to the refusal of a name: the one that may be meant, or nothing."""
    return _did_you_mean(_close(name, names))


def _read_file(path: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return what a TOML file sets, and a line for each key in it that is no setting."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        return {}, [f"config {path}: {error.strerror}"]
    except UnicodeDecodeError:
        return {}, [f"config {path}: a TOML file in UTF-8 is right"]
    except tomllib.TOMLDecodeError as error:
        # Its text has the place, and at most the one character that was not expected.
        return {}, [f"config {path}: a TOML file is right: {error}"]
    right = {name for name, field in Settings.model_fields.items() if not _known(field)["env_only"]} - {"config"}
    problems = []
    for name in content.keys() - right:
        if name in Settings.model_fields:
            problems.append(f"{name} in {path}: this is for the environment only, as {variable_of(name)}")
        else:
            problems.append(f"{name} in {path}: there is no such setting{suggestion(name, right)}")
    return {name: value for name, value in content.items() if name in right}, sorted(problems)


def exposed_passwords(options: Mapping[str, object]) -> list[str]:
    """Return what to say of each password that the command line holds, where every user can read it."""
    try:
        database = conninfo_to_dict(str(options.get("database_url", ""))).get("password")
    except psycopg.Error:
        database = None  # told as malformed
    try:
        mail = urlsplit(str(options.get("smtp_url", ""))).password
    except ValueError:
        mail = None  # as above
    read = "its password can be read by every user of this machine;"
    lines = []
    if database:
        right = f"{variable_of('database_url')}, the TOML file or a password file (PGPASSFILE) is right"
        lines.append(f"{option_of('database_url')}: {read} {right}")
    if mail:
        lines.append(f"{option_of('smtp_url')}: {read} {variable_of('smtp_url')} or the TOML file is right")
    return lines


# Documentation


@dataclass(frozen=True, slots=True)
class SettingDescription:
    """A setting, as tables and help texts show it."""

    name: str
    option: str | None
    """None where it is for the environment only."""
    variable: str
    default: str
    """Empty if there is none."""
    unit: str
    group: str
    description: str


def describe() -> list[SettingDescription]:
    """Return every setting, in the order of this module."""
    return [
        SettingDescription(
            name=name,
            option=None if _known(field)["env_only"] else option_of(name),
            variable=variable_of(name),
            default=_shown_default(field),
            unit=_known(field)["unit"],
            group=_known(field)["group"],
            description=str(field.description),
        )
        for name, field in Settings.model_fields.items()
    ]


def _shown_default(field: FieldInfo) -> str:
    shown = _known(field)["shown_default"]
    if shown is not None:
        return str(shown)
    match field.default:
        case None:
            return ""
        case bool(truth):
            return str(truth).lower()
        case timedelta() as duration:
            return format_duration(duration)
        case default:
            return str(default)
