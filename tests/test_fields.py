import unicodedata
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.fields import Fields

# No deadline: a machine may be busy. No database of examples: what was found goes into a test.
PROPERTY: Final = settings(deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])

QUARTER: Final = timedelta(minutes=15)
NANOS: Final = 10**9

# Letters with case, accents in both forms, and letters whose lower case has another length.
TRICKY: Final = st.text(
    st.sampled_from(
        "aAzZ@.+-'\"0\u00c5\u00c9\u00df\u1e9e\u03a3\u03c3\u03c2\u0130\u0131\u01c5"
        "\u0301\u0307\u030a\u0325\u0345\u017f\u2126\u212a\uff20\ufb01\u2460\u3000 \t\n\u00a0\u200b\u202e\u0000"
    ),
    max_size=12,
)


def normal_form(value: str) -> str | None:
    """Return an address's normal form, or None where it is refused."""
    fields = Fields()
    normal = fields.address("address", value)
    return None if fields.violations else normal


def duration(nanoseconds: int) -> Duration:
    """Return a well-formed duration."""
    sign = -1 if nanoseconds < 0 else 1
    whole, rest = divmod(abs(nanoseconds), NANOS)
    return Duration(seconds=sign * whole, nanos=sign * rest)


def ttl_of(value: Duration, ceiling: timedelta = QUARTER) -> timedelta | None:
    """Return the lifetime asked for, or None where it is refused."""
    fields = Fields()
    ttl = fields.ttl(value, default=timedelta(seconds=77), ceiling=ceiling)
    return None if fields.violations else ttl


# Addresses


@PROPERTY
@given(st.one_of(st.text(max_size=12), TRICKY))
def test_normal_form_of_a_normal_form_is_itself(value: str) -> None:
    """What is stored, and returned, is accepted as it is: otherwise a caller could not name an address it was told."""
    normal = normal_form(value)
    if normal is not None:
        assert normal_form(normal) == normal


@PROPERTY
@given(st.one_of(st.text(max_size=12), TRICKY))
def test_what_is_stored_has_one_form_only(value: str) -> None:
    """An accepted address is trimmed, lower-cased, in NFC and in NFKC, of a length that fits, and visible."""
    normal = normal_form(value)
    if normal is not None:
        assert normal == normal.strip() != ""
        assert normal == normal.lower()
        assert unicodedata.is_normalized("NFC", normal)
        assert unicodedata.is_normalized("NFKC", normal)
        assert all(unicodedata.category(character) not in {"Cc", "Cf", "Zl", "Zp"} for character in normal)


@pytest.mark.parametrize(
    ("value", "normal"),
    [
        ("ada@example.org", "ada@example.org"),
        ("  Ada@Example.ORG\r\n", "ada@example.org"),
        ("\u3000ada@example.org\u00a0", "ada@example.org"),
        ("ADÉ@example.org", "adé@example.org"),
        ("ADE\u0301@example.org", "adé@example.org"),
        # The Kelvin sign is, by Unicode's canonical equivalence, the letter K: it is no look-alike.
        ("\u212aate@example.org", "kate@example.org"),
        # Capital dotted I: lower-cased it has another length, and stays apart from a plain i.
        ("\u0130van@example.org", "i\u0307van@example.org"),
        # Lower-casing takes this one out of NFC: two marks would stand in the wrong order.
        ("\u0130\u0325@example.org", "i\u0325\u0307@example.org"),
        # Dotless i, which upper-cases to a plain I: never upper-cased here.
        ("\u0131van@example.org", "\u0131van@example.org"),
        ("STRA\u1e9eE@example.org", "stra\u00dfe@example.org"),
        ("\u03a3\u03a9\u03a3@example.org", "\u03c3\u03c9\u03c2@example.org"),
        ("+49 30 901820", "+49 30 901820"),
        ("\U0001f600", "\U0001f600"),
        # Nothing is cut off, looked up or split here: the whole string is one address, and nobody else's.
        ('"e@attacker.com"@victim.com', '"e@attacker.com"@victim.com'),
        ("victim@example.com,attacker@example.net", "victim@example.com,attacker@example.net"),
    ],
)
def test_normal_form(value: str, normal: str) -> None:
    """Writings of one address have one form, and addresses that are not the same stay apart."""
    assert normal_form(value) == normal


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("ada\uff20evil.org@example.org", id="fullwidth @, a second @ under NFKC (CVE-2026-73420)"),
        pytest.param("\u017fteve@example.org", id="long s, an s under NFKC and casefold"),
        pytest.param("\ufb01ona@example.org", id="ligature fi"),
        pytest.param("a\u2460@example.org", id="circled one"),
        pytest.param("ada@example\uff0eorg", id="fullwidth full stop"),
        pytest.param("\uff11\uff12\uff13", id="fullwidth digits"),
        pytest.param("ada\u00b2@example.org", id="superscript two"),
        pytest.param("ada\u00a0b@example.org", id="no-break space inside"),
        pytest.param("\u00aada@example.org", id="feminine ordinal"),
        pytest.param("ada\u2025@example.org", id="two dot leader"),
        pytest.param("\u212f@example.org", id="script e"),
    ],
)
def test_refused_where_nfkc_changes_it(value: str) -> None:
    """A later step that normalises, such as a mail server, can never take one address for another."""
    assert normal_form(value) is None


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("ada@example.org\r\nBcc: eve@example.net", id="a line break inside"),
        pytest.param("ada@example.org\x00", id="NUL at the end"),
        pytest.param("a\x00da@example.org", id="NUL inside"),
        pytest.param("ada\x7f@example.org", id="delete"),
        pytest.param("ada\x85b@example.org", id="next line"),
        pytest.param("ada\u2028b@example.org", id="line separator"),
        pytest.param("ada\u2029b@example.org", id="paragraph separator"),
        pytest.param("ada\u200b@example.org", id="zero width space"),
        pytest.param("ada\u00ad@example.org", id="soft hyphen"),
        pytest.param("ada\u202egro.elpmaxe@", id="right-to-left override"),
        pytest.param("\ufeffada@example.org", id="byte order mark"),
    ],
)
def test_refused_with_control_characters(value: str) -> None:
    """No address adds a header to a mail, is cut at a NUL, or looks like another on a screen."""
    assert normal_form(value) is None


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ("", False),
        (" \t\u3000", False),
        ("a", True),
        ("a" * 320, True),
        (" " + "a" * 320 + " ", True),
        ("a" * 321, False),
        # 320 characters in NFC, more before it.
        ("e\u0301" * 320, True),
        ("e\u0301" * 321, False),
        # 160 characters that lower-casing doubles.
        ("\u0130" * 160, True),
        ("\u0130" * 161, False),
        # Characters, not bytes.
        ("\U0001f600" * 320, True),
    ],
)
def test_length_is_that_of_the_normal_form(value: str, accepted: bool) -> None:  # noqa: FBT001 - a table's column
    """1 to 320 characters, counted where they are stored."""
    assert (normal_form(value) is not None) is accepted


# Lifetimes


@PROPERTY
@given(st.integers(-2 * NANOS, 1000 * NANOS), st.sampled_from([timedelta(seconds=1), QUARTER, timedelta(seconds=1.5)]))
@example(1_500_000_001, timedelta(seconds=1.5))
@example(1_500_000_000, timedelta(seconds=1.5))
def test_lifetime_is_accepted_from_a_second_to_its_ceiling(nanoseconds: int, ceiling: timedelta) -> None:
    """A lifetime is kept to the microsecond, rounded down, if it is 1 s to the ceiling, and refused otherwise."""
    ttl = ttl_of(duration(nanoseconds), ceiling)
    if NANOS <= nanoseconds <= ceiling / timedelta(microseconds=1) * 1000:
        assert ttl == timedelta(microseconds=nanoseconds // 1000)
    else:
        assert ttl is None


@PROPERTY
@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31 - 1))
def test_no_two_numbers_make_a_lifetime_out_of_bounds(whole: int, nanos: int) -> None:
    """Whatever a duration's fields hold, up to their types' limits, it is a lifetime in bounds, or refused."""
    ttl = ttl_of(Duration(seconds=whole, nanos=nanos))
    if ttl is not None:
        assert timedelta(seconds=1) <= ttl <= QUARTER
        assert 0 <= nanos < NANOS
        assert ttl // timedelta(microseconds=1) == (whole * NANOS + nanos) // 1000


@pytest.mark.parametrize(
    ("whole", "nanos", "accepted"),
    [
        (1, 0, True),
        (0, 999_999_999, False),
        (0, 0, False),
        (-1, 0, False),
        (900, 0, True),
        (899, 999_999_999, True),
        (900, 1, False),
        (2**63 - 1, 0, False),
        (-(2**63), 0, False),
        # Not well-formed: nanoseconds of a second or more, or of another sign.
        (1, 10**9, False),
        (0, 2 * 10**9, False),
        (5, -1, False),
        (-5, 1, False),
        (901, -(2**31), False),
    ],
)
def test_edges_of_a_lifetime(whole: int, nanos: int, accepted: bool) -> None:  # noqa: FBT001 - a table's column
    """The edges, one by one, as Duration's own documentation has them."""
    assert (ttl_of(Duration(seconds=whole, nanos=nanos)) is not None) is accepted


def test_lifetime_left_out() -> None:
    """Without a lifetime, the default holds, which is not held against the ceiling: the settings were."""
    fields = Fields()
    assert fields.ttl(None, default=timedelta(seconds=77), ceiling=timedelta(seconds=1)) == timedelta(seconds=77)
    fields.done()


# Ids, codes and secrets


def _identifier(fields: Fields, value: str) -> object:
    return fields.identifier("field", value)


def _request_id(fields: Fields, value: str) -> object:
    return fields.request_id(value)


def _short_code(fields: Fields, value: str) -> object:
    return fields.code("field", value, shortest=6, longest=6)


def _long_code(fields: Fields, value: str) -> object:
    return fields.code("field", value, shortest=6, longest=10)


def _link_secret(fields: Fields, value: str) -> object:
    return fields.link_secret("field", value)


def _email_token(fields: Fields, value: str) -> object:
    return fields.email_token("field", value)


def _locale(fields: Fields, value: str) -> object:
    return fields.locale("field", value)


Check = Callable[[Fields, str], object]

UUID_TEXT: Final = "0b0e3d0e-8a5c-4f5e-9d0a-6a3f6a2b1c0d"
PATTERNS: Final[Mapping[Check, str]] = {
    _identifier: r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    _short_code: r"[0-9]{6}",
    _long_code: r"[0-9]{6,10}",
    _link_secret: r"[0-9A-Za-z_\-]{43}",
    _email_token: r"[0-9A-Za-z_\-]{128}",
}


@PROPERTY
@given(st.data(), st.sampled_from(list(PATTERNS)))
def test_right_form_is_accepted(data: st.DataObject, check: Check) -> None:
    """Every value of the right form is accepted, and comes back unchanged."""
    value = data.draw(st.from_regex(PATTERNS[check], fullmatch=True))
    fields = Fields()
    result = check(fields, value)
    fields.done()
    assert result == (uuid.UUID(value) if check is _identifier else value)


@PROPERTY
@given(st.data(), st.sampled_from(list(PATTERNS)))
def test_anything_beside_the_right_form_is_refused(data: st.DataObject, check: Check) -> None:
    """One character more, one less, or one that is not ASCII, and it is refused: none is trimmed or translated."""
    value = data.draw(st.from_regex(PATTERNS[check], fullmatch=True))
    place = data.draw(st.integers(0, len(value)))
    strange = data.draw(st.sampled_from("\n\r\0 \u00b2\uff11\u0661\u200b=+/%'"))
    for broken in (value[:place] + strange + value[place:], value[:place] + strange + value[place + 1 :]):
        fields = Fields()
        check(fields, broken)
        with pytest.raises(InvalidRequest):
            fields.done()


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (_identifier, ""),
        (_identifier, "{" + UUID_TEXT + "}"),
        (_identifier, "urn:uuid:" + UUID_TEXT),
        (_identifier, UUID_TEXT.replace("-", "")),
        (_identifier, UUID_TEXT[:-1]),
        (_identifier, UUID_TEXT + "\n"),
        (_identifier, UUID_TEXT.replace("0", "\uff10")),
        (_request_id, UUID_TEXT + "\n"),
        (_request_id, " "),
        (_request_id, UUID_TEXT.replace("-", "")),
        (_short_code, ""),
        (_short_code, "12345"),
        (_short_code, "1234567"),
        (_short_code, "123456\n"),
        (_short_code, "\uff11\uff12\uff13\uff14\uff15\uff16"),
        (_short_code, "12345\u00b2"),
        (_short_code, "+12345"),
        (_short_code, "1_2345"),
        (_short_code, "-12345"),
        (_short_code, "0x1234"),
        (_short_code, "1e4567"),
        (_short_code, " 12345"),
        (_long_code, "12345"),
        (_long_code, "12345678901"),
        (_link_secret, ""),
        (_link_secret, "A" * 42),
        (_link_secret, "A" * 44),
        (_link_secret, "A" * 42 + "="),
        (_link_secret, "A" * 42 + "+"),
        (_email_token, ""),
        (_email_token, "A" * 127),
        (_email_token, "A" * 129),
        (_email_token, "' or 1=1 --".ljust(128, "A")),
        (_locale, "e"),
        (_locale, "en_GB"),
        (_locale, "en-"),
        (_locale, "en\n"),
        (_locale, "-en"),
        (_locale, "en-" + "a" * 9),
        (_locale, "../../etc/passwd"),
        (_locale, "en" + "-abcdefgh" * 4),
    ],
)
def test_refused(check: Check, value: str) -> None:
    """Values that a laxer check takes: other scripts' digits, signs, white space, a newline at the end."""
    fields = Fields()
    check(fields, value)
    with pytest.raises(InvalidRequest) as caught:
        fields.done()
    assert list(caught.value.violations) == (["request_id"] if check is _request_id else ["field"])
    # A secret with a typing error is still nearly a secret.
    assert len(value) < 5 or value not in str(caught.value)


@pytest.mark.parametrize("value", ["", "en", "pt-BR", "zh-Hant-TW", "de-CH-1996", "es-419"])
def test_language_tags(value: str) -> None:
    """The usual forms of BCP 47 are accepted, and nothing."""
    fields = Fields()
    assert fields.locale("field", value) == value
    fields.done()


def test_request_id_may_be_left_out() -> None:
    """An empty request_id means none, and no other value does."""
    fields = Fields()
    assert fields.request_id("") is None
    assert fields.request_id(UUID_TEXT) == uuid.UUID(UUID_TEXT)
    assert fields.request_id(UUID_TEXT.upper()) == uuid.UUID(UUID_TEXT)
    fields.done()


def test_every_fault_is_told_at_once() -> None:
    """A developer mends a request in one go; of two words on one field, the first stands."""
    fields = Fields()
    fields.identifier("user_id", "nobody")
    fields.address("relates_to", "\0\u017f")
    fields.code("code.code", "", shortest=6, longest=10)
    fields.request_id("again")
    fields.refuse("user_id", "a second word")
    with pytest.raises(InvalidRequest) as caught:
        fields.done()
    assert list(caught.value.violations) == ["user_id", "relates_to", "code.code", "request_id"]
    assert caught.value.violations["user_id"] == "a UUID in its canonical 36 characters is required"


def test_a_list_of_faults_fits_into_a_refusal() -> None:
    """Clients throw away a refusal with more than 8 KiB of metadata, and then nobody learns what was wrong."""
    fields = Fields()
    for index in range(30_000):
        fields.token_type(f"token_types[{index}]", 99)
    with pytest.raises(InvalidRequest) as caught:
        fields.done()
    # As base64, in which some carry it.
    carried = sum(len(value) * 4 // 3 for _, value in caught.value.trailing_metadata())
    assert len(str(caught.value)) + carried < 8 * 1024 - 256
