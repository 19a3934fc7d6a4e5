"""The fields of messages: what is right in a request and what to say of what is not, and how an answer tells times.

All faults of a request are collected and told at once. It knows nothing of what a request is for.
"""

import re
import unicodedata
import uuid
from datetime import UTC, datetime, timedelta
from typing import Final

import email_validator
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from onetime.v1 import one_time_tokens_pb2 as pb

from service.errors import InvalidRequest

# Which hosts take mail is the mail server's business: in a network of one's own, .local and .test may well.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()

STORED_TYPES: Final = {
    pb.TOKEN_TYPE_CONFIRMATION: "confirmation_token",
    pb.TOKEN_TYPE_REAUTHENTICATION: "reauthentication_token",
    pb.TOKEN_TYPE_RECOVERY: "recovery_token",
    pb.TOKEN_TYPE_EMAIL_CHANGE_NEW: "email_change_token_new",
    pb.TOKEN_TYPE_EMAIL_CHANGE_CURRENT: "email_change_token_current",
    pb.TOKEN_TYPE_PHONE_CHANGE: "phone_change_token",
}
"""The labels of auth.one_time_token_type."""

MESSAGE_TYPES: Final = {stored: token_type for token_type, stored in STORED_TYPES.items()}

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
_LINK_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_EMAIL_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{128}", re.ASCII)
_LANGUAGE_TAG: Final = re.compile(r"(?=.{2,35}$)[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*", re.ASCII)
_ADDRESS_LENGTH: Final = 320
"""Of an email address: 64 for the local part, one for the @, 255 for the domain (RFC 3696, erratum 1690)."""
_REFUSED_CATEGORIES: Final = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's control, format (invisible, or turning the direction), surrogate and line-separating characters."""
_NIL: Final = uuid.UUID(int=0)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_VIOLATIONS: Final = 10
"""More than any message has fields. A repeated field may hold thousands of faults, and clients drop a refusal with
more than 8 KiB of metadata, its reason too."""


_CHEROKEE: Final = (
    "\u13a0\u13a1\u13a2\u13a5\u13a9\u13aa\u13ab\u13ac\u13b3\u13b7\u13bb\u13bd\u13c0\u13c2\u13c3\u13cf\u13d2\u13d4"
    "\u13d5\u13d9\u13da\u13de\u13df\u13e2\u13e6\u13e7\u13f3\u13f4"
)

_LOOK_ALIKES: Final = {
    "ARMENIAN": frozenset("\u0561\u0566\u056c\u0570\u0575\u0578\u057d\u0581\u0585\u054d\u0555"),
    "CHEROKEE": frozenset(_CHEROKEE + _CHEROKEE.lower()),
    "CYRILLIC": frozenset(
        "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u04cf\u043e\u0440\u0517\u051b\u0455\u051d\u0445\u0443\u044a\u044c\u04bd\u043f\u0433\u0475\u0461"
        "\u04af\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423\u051a\u051c\u04c0\u04ae"
    ),
    "GREEK": frozenset(
        "\u03b1\u03b9\u03ba\u03bd\u03c1\u03c5\u03c9\u03b7\u03bf\u03c4\u03f2\u03b3"
        "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    ),
    "LISU": frozenset(map(chr, range(0xA4D0, 0xA4F8))),
}
"""Letters that most fonts draw like Latin ones: in a word of these alone, nobody sees the other script."""

_LATIN_LOOK_ALIKES: Final = frozenset(
    "\u0185\u01c0\u01c3\u0251\u0261\u0269\u026a\u1d04\u1d0f\u1d1c\u1d20\u1d21\u1d22\ua731\ua78c\uab4e\uab52\uab5a"
)
"""Letters of phonetic alphabets, and some rare ones, that are drawn like those of ASCII."""

_EXTRA_DOT: Final = re.compile("[ij\u0131\u0237l]\u0307")
"""A dot above a letter that has one is drawn in its place; above one that has none, it makes an i or a j."""

_EAST_ASIAN: Final = ({"CJK", "HIRAGANA", "KATAKANA"}, {"CJK", "BOPOMOFO"}, {"CJK", "HANGUL"})
"""Scripts that are written together, and with Latin (Unicode TR 39, "highly restrictive")."""

_SCRIPTS: Final = {"ARABIC-INDIC": "ARABIC", "EXTENDED": "ARABIC", "IDEOGRAPHIC": "CJK", "KATAKANA-HIRAGANA": None}
"""What the first word of a character's name means where it names no script; None where many scripts have it."""

_INVISIBLE: Final = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0000-\U000e0fff]")
"""Letters and marks that nobody sees (Unicode's Default_Ignorable_Code_Point); the other ones are of category Cf, or
NFKC changes them. In domains they would be left out."""

_ROUTE: Final = re.compile(r"[!%]|=\?")
"""What mail servers may read another address out of: bang paths, the percent hack, encoded words (RFC 2047)."""

_NUMBER: Final = re.compile("[0-9]+|0x[0-9a-f]*", re.ASCII)

_LOCAL_PART_OCTETS: Final = 64
"""RFC 5321, 4.5.3.1.1."""


def mailbox(text: str) -> str:
    """Return an address that mail can be sent to: the local part as it stands, the domain in ASCII (A-labels).

    What Unicode would turn into another address is refused, and so is what people or mail servers would take for
    another one, since the code would go to somebody else than they read. No address is looked up.

    Raises:
        ValueError: It is none, or looks like another. The text says what is right, and quotes nothing of it.
    """
    normal = _normal(text)
    try:
        found = email_validator.validate_email(
            normal,
            allow_quoted_local=False,
            allow_domain_literal=False,
            allow_display_name=False,
            check_deliverability=False,
            globally_deliverable=False,  # an internal service may mail to hosts of its own network
        )
    except email_validator.EmailNotValidError:
        # Its text quotes the address.
        raise ValueError("one address, such as ada@example.com, without a name, quotes or comments is right") from None
    local_part, labels = found.local_part, found.domain.split(".")
    if len(local_part.encode()) > _LOCAL_PART_OCTETS:
        raise ValueError(f"an address with at most {_LOCAL_PART_OCTETS} octets before the @ is right")
    if _ROUTE.search(local_part) or _NUMBER.fullmatch(labels[-1]):
        raise ValueError("an address at a host's name, without !, % and =? before the @, is right")
    if not all(character.isascii() or _of_words(character) for character in local_part) or _INVISIBLE.search(normal):
        raise ValueError("an address of letters, marks and digits that can be seen, and of ASCII, is right")
    if any(_deceives(label, labels[-1]) for label in (local_part, *labels)):
        raise ValueError("an address is right of whose parts none mixes scripts or looks like one in Latin letters")
    return f"{local_part}@{found.ascii_domain}"


def _normal(text: str) -> str:
    """Return an address trimmed and in NFC.

    Raises:
        ValueError: NFKC would change that, or it is far too long. The text says what is right.
    """
    trimmed = text.strip()
    # To order many marks takes a time that grows with their square. Composed, four characters at most become one.
    if len(trimmed) > 4 * _ADDRESS_LENGTH:
        raise ValueError(f"an address of 1 to {_ADDRESS_LENGTH} characters is right")
    normal = unicodedata.normalize("NFC", trimmed)
    if unicodedata.normalize("NFKC", normal) != normal:
        # U+FF20 would become a second @, U+017F an s: two addresses that a later step takes for one.
        raise ValueError("an address whose characters NFKC leaves as they are is right")
    return normal


def _of_words(character: str) -> bool:
    """Tell whether words are written with a character: letters, marks, digits. Symbols look like each other."""
    return unicodedata.category(character) in {"Ll", "Lm", "Lo", "Lt", "Lu", "Mc", "Mn", "Nd", "Nl"}


def _deceives(label: str, last: str) -> bool:
    """Tell whether a part of an address may look like another one. `last` is the domain's last label."""
    if _EXTRA_DOT.search(label) or not _LATIN_LOOK_ALIKES.isdisjoint(label):
        return True
    scripts = _scripts(label)
    if len(scripts) > 1:
        return not any(scripts - {"LATIN"} <= written_together for written_together in _EAST_ASIAN)
    # Who reads a domain of another script to its end knows which one it is, unless that end deceives as well.
    return _looks_latin(label) and (_scripts(last) != scripts or _looks_latin(last))


def _looks_latin(label: str) -> bool:
    """Tell whether all letters of a label are of another script, and drawn like Latin ones."""
    letters = {character for character in label if character.isalpha()}
    return any(letters and letters <= look_alikes for look_alikes in _LOOK_ALIKES.values())


def _scripts(label: str) -> set[str]:
    """Return the scripts of a label. Unicode names a character by its script first, but for those of many scripts."""
    found = set()
    for character in label:
        if character.isalpha() or (not character.isascii() and _of_words(character)):
            word = unicodedata.name(character, "?").split()[0]
            found.add(_SCRIPTS.get(word, None if word == "COMBINING" else word))
    return {script for script in found if script}


def set_time(timestamp: Timestamp, time: datetime | None) -> None:
    """Set a field of a message to a time; without one, leave it unset.

    protobuf does so too where a message is made of datetimes, in four times the time.
    """
    if time is not None:
        since = time - _EPOCH
        timestamp.seconds = since.days * 86_400 + since.seconds
        timestamp.nanos = since.microseconds * 1000


class Fields:
    """Collects what is wrong with one request. A class because every check adds to the same list.

    A check returns the field's value, or a stand-in of the right type; `done` raises if any check failed, so that no
    stand-in gets past it.
    """

    def __init__(self) -> None:
        """Start with no fault."""
        self.violations: dict[str, str] = {}

    def refuse(self, field: str, right: str) -> None:
        """Note that a field is wrong, and what would be right. The first word on a field stands."""
        if len(self.violations) < _MOST_VIOLATIONS:
            self.violations.setdefault(field, right)

    def done(self) -> None:
        """End the checks.

        Raises:
            InvalidRequest: With every fault.
        """
        if self.violations:
            raise InvalidRequest(self.violations)

    def identifier(self, field: str, value: str) -> uuid.UUID:
        """Check a UUID in its canonical 36 characters."""
        if _UUID.fullmatch(value):
            return uuid.UUID(value)
        self.refuse(field, "a UUID in its canonical 36 characters is required")
        return _NIL

    def token_type(self, field: str, value: int) -> str:
        """Check a type of one-time tokens, and return what the table calls it."""
        stored = STORED_TYPES.get(pb.TokenType.ValueType(value))
        if stored is None:
            self.refuse(field, f"one of {', '.join(map(pb.TokenType.Name, STORED_TYPES))} is required")
            return next(iter(MESSAGE_TYPES))
        return stored

    def request_id(self, value: str) -> str | None:
        """Check a request_id, which may be left out, and return its normal form: a UUID may be spelt in two cases."""
        if not value:
            return None
        if _UUID.fullmatch(value):
            return value.lower()
        self.refuse("request_id", "a UUID in its canonical 36 characters, or nothing, is right")
        return None

    def code(self, field: str, value: str, *, shortest: int, longest: int) -> str:
        """Check a code: ASCII digits only. `str.isdigit` alone and `int` take the digits of other scripts too."""
        if not (value.isascii() and value.isdigit() and shortest <= len(value) <= longest):
            length = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
            self.refuse(field, f"{length} ASCII digits are required")
        return value

    def link_secret(self, field: str, value: str) -> str:
        """Check the secret of a link."""
        if not _LINK_SECRET.fullmatch(value):
            self.refuse(field, "43 characters of base64url, as IssueToken returned them, are required")
        return value

    def email_token(self, field: str, value: str) -> str:
        """Check an email verification token, and return it, or nothing of one that has not its form."""
        if not _EMAIL_TOKEN.fullmatch(value):
            self.refuse(field, "128 characters of base64url, as StartEmailVerification returned them, are required")
            return ""
        return value

    def address(self, field: str, value: str) -> str:
        """Check an address and return its normal form: trimmed, NFC, lower-cased."""
        try:
            normal = _normal(value)
        except ValueError as error:
            self.refuse(field, str(error))
            return ""
        # Lower-casing may take a string out of NFC; the normal form of a normal form must be itself.
        normal = unicodedata.normalize("NFC", normal.lower())
        if not 1 <= len(normal) <= _ADDRESS_LENGTH:
            self.refuse(field, f"an address of 1 to {_ADDRESS_LENGTH} characters is required")
        # What can be printed has none of them, and most addresses can.
        if not normal.isprintable() and any(unicodedata.category(each) in _REFUSED_CATEGORIES for each in normal):
            self.refuse(field, "an address without control characters is required")
        return normal

    def mailbox(self, field: str, value: str) -> str:
        """Check an address that mail is to be sent to, and return the form to send to."""
        try:
            return mailbox(value)
        except ValueError as error:
            self.refuse(field, str(error))
            return ""

    def locale(self, field: str, value: str) -> str:
        """Check a language tag, which may be left out."""
        if value and not _LANGUAGE_TAG.fullmatch(value):
            self.refuse(field, 'a BCP 47 language tag such as "en" or "pt-BR", or nothing, is right')
        return value

    def ttl(self, value: Duration | None, *, default: timedelta, ceiling: timedelta) -> timedelta:
        """Check a lifetime, which may be left out."""
        if value is None:
            return default
        # In nanoseconds and in integers: neither a float's rounding nor a huge number may slip past.
        nanoseconds = value.seconds * 10**9 + value.nanos
        well_formed = abs(value.nanos) < 10**9 and value.seconds * value.nanos >= 0
        if not well_formed or not 10**9 <= nanoseconds <= ceiling // timedelta(microseconds=1) * 1000:
            self.refuse("ttl", f"1 s to {ceiling.total_seconds():.10g} s, or nothing, is right")
            return default
        return timedelta(microseconds=nanoseconds // 1000)
