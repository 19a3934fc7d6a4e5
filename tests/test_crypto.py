import ast
import base64
import collections
import dataclasses
import itertools
import os
import re
import string
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pytest
from argon2.exceptions import InvalidHashError, VerificationError  # noqa: TID251 - what the module promises to raise
from calls import memory_limited
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.crypto import (
    NO_VERDICT,
    CodeHasher,
    CodeSubject,
    Key,
    Keyring,
    argon2_parameters,
    binds_row,
    chance,
    equal,
    is_slow,
    jittered,
    new_code,
    new_email_token,
    new_key,
    new_link_secret,
    new_row_id,
)

SERVICE: Final = Path(__file__).parent.parent / "service"

PROPERTY: Final = settings(deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])

KEY: Final = Key("k1", bytes(range(32)))
OTHER: Final = Key("k2", bytes(range(1, 33)))
SAME_ID: Final = Key("k1", bytes(range(2, 34)))
RING: Final = Keyring([KEY])
ROW: Final = uuid.UUID(int=1)
USER: Final = uuid.UUID(int=2)
SUBJECT: Final = CodeSubject(ROW, "recovery_token", USER, "ada@example.org")
CHEAP: Final = argon2_parameters(64, 1, 1)
TOKEN: Final = "B" * 128
TOKEN_HASH: Final = RING.email_token_hash(TOKEN)
BASE64URL: Final = set(string.ascii_letters + string.digits + "-_")

keys: Final = st.builds(Key, st.from_regex("[a-z0-9]{1,16}", fullmatch=True), st.binary(min_size=32, max_size=32))
rings: Final = st.lists(keys, min_size=1, max_size=4, unique_by=lambda key: key.id).map(Keyring)
codes: Final = st.from_regex("[0-9]{6}", fullmatch=True)
long_codes: Final = st.from_regex("[0-9]{6,10}", fullmatch=True)
uuids: Final = st.uuids()


def encoded(key: Key) -> str:
    """Return a key as a file of keys has it."""
    return base64.urlsafe_b64encode(key.secret).decode().rstrip("=")


def chi_square(counts: Iterable[int], expected: float) -> float:
    """Return how far counts are from what is expected of each."""
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.fixture(params=["argon2id", "hmac"])
def hasher_of(request: pytest.FixtureRequest) -> Callable[[Keyring], CodeHasher]:
    """Make a hasher for a ring, with Argon2 and without."""
    return lambda ring: ring.code_hasher(CHEAP if request.param == "argon2id" else None)


# Formats. A change of one of these values makes every stored secret worthless: it needs a new format name.


def test_stored_formats_stay_as_they_are() -> None:
    """What is stored for given secrets, as computed from the documented formats by other code, once and for all."""
    assert RING.link_hash("recovery_token", "A" * 43) == "otl1.k1.XEbpMjjaq0Hw5yqd-v0HsM9nVi1DLL0hONmZMDnDeIs"
    assert TOKEN_HASH == (
        "ev1.k1.041041041041"
        "72a617c48d33f490936e899faa106b08cb537aeefcaa6e15549bb370cc09a4c7"
        "c1eba0475ee6ecb75886a9fafd3958a74df108f6b6f645ef5ecf"
    )
    assert RING.seal_code("012345", row_id=ROW, user_id=USER, token_hash=TOKEN_HASH) == "632129"
    hmac_only = RING.code_hasher(None)
    assert hmac_only.hash("012345", SUBJECT) == "oth1.k1.k9at3JzC21wtCnEszGTkZMCWtKRuYnH-EH_eVAqqjzQ"
    argon2id = "otc1.k1.$argon2id$v=19$m=64,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$4WE2ir5ENH6uDbhCIZv8foyZMyEe567HJB0PxrrO4QI"
    assert hmac_only.matches("012345", argon2id, SUBJECT)
    assert RING.fingerprint(b"message") == "k1.X5g4cEklWMxRcBC6MFQtMR2ystRdz9EYPkfN9R2EBXU"


def test_argon2_costs_what_was_asked_for() -> None:
    """A new code's hash carries the parameters given, in Argon2id of version 1.3 with 16 bytes of salt, 32 of hash."""
    stored = RING.code_hasher(argon2_parameters(72, 3, 2)).hash("012345", SUBJECT)
    assert re.fullmatch(r"otc1\.k1\.\$argon2id\$v=19\$m=72,t=3,p=2\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}", stored)


# Keys


def test_one_key_has_a_key_for_each_purpose() -> None:
    """What was made for one purpose says nothing in another: no two sub-keys are equal, nor is one the key itself."""
    derived = [KEY.link, KEY.code, KEY.email_token, KEY.email_code, KEY.fingerprint, KEY.secret]
    assert len(set(derived)) == len(derived)
    assert all(len(each) == 32 for each in derived)


def test_what_is_sealed_for_one_purpose_is_nothing_in_another() -> None:
    """Answers kept for retries and addresses of mails have keys of their own: neither opens as the other."""
    content = b"ada@example.org"
    nonce = bytes(12)
    assert KEY.answer.encrypt(nonce, content, b"") != KEY.address.encrypt(nonce, content, b"")
    with pytest.raises(KeyError):
        RING.open_address(RING.seal_answer(content, place=str(ROW)), row_id=ROW)
    with pytest.raises(KeyError):
        RING.open_answer(RING.seal_address("ada@example.org", row_id=ROW), place=str(ROW))


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r:>99}".format])
def test_no_key_is_shown(show: Callable[[object], str]) -> None:
    """Whatever is put into a log or an error by mistake, no key and no sub-key is in it, in any usual writing."""
    ring = Keyring([KEY, OTHER])
    shown = "".join(show(each) for each in (KEY, ring, ring.keys, ring.code_hasher(CHEAP), [KEY], {"key": KEY}))
    assert "k1" in shown
    for key in ring.keys:
        for secret in (key.secret, key.link, key.code, key.email_token, key.email_code, key.fingerprint):
            assert repr(secret)[2:-1] not in shown
            assert secret.hex() not in shown
            assert base64.urlsafe_b64encode(secret).decode().rstrip("=") not in shown


def test_new_keys_differ() -> None:
    """Two new keys share neither id nor bytes, and fit one ring."""
    made = [new_key() for _ in range(4)]
    assert len({key.id for key in made}) == len({key.secret for key in made}) == 4
    Keyring(made)


@PROPERTY
@given(rings)
def test_ring_survives_its_file(ring: Keyring) -> None:
    """What `format` writes, `parse` reads: the same keys, in the same order."""
    again = Keyring.parse(ring.format())
    assert [(key.id, key.secret) for key in again.keys] == [(key.id, key.secret) for key in ring.keys]


def test_comments_and_white_space_in_a_file_of_keys() -> None:
    """A file that people edit may have comments, empty lines and other systems' line ends."""
    text = f"# the newest makes\r\n\r\n  k2\t{encoded(OTHER)}  # since May\r\nk1 {encoded(KEY)}"
    assert [(key.id, key.secret) for key in Keyring.parse(text).keys] == [("k2", OTHER.secret), ("k1", KEY.secret)]


SECRET_TEXT: Final = encoded(KEY)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "0 keys: 1 to 4 are right"),
        ("# nothing\n", "0 keys: 1 to 4 are right"),
        ("".join(f"k{number} {SECRET_TEXT}\n" for number in range(5)), "5 keys: 1 to 4 are right"),
        (f"k1 {SECRET_TEXT}\nk1 {SECRET_TEXT}", "two keys have the same id"),
        (f"k1 {SECRET_TEXT[:-1]}", "line 1: an id and 43 characters of base64url are right"),
        (f"k1 {SECRET_TEXT}\nk2 {SECRET_TEXT[:-4]}", "line 2: key k2: 32 bytes"),
        (f"\n\nk1 {SECRET_TEXT}AAAA", "line 3: key k1: 32 bytes"),
        (f"{SECRET_TEXT}", "line 1: an id and 43 characters"),
        (f"{SECRET_TEXT} k1", "line 1: an id and 43 characters"),
        (f"{SECRET_TEXT} {SECRET_TEXT}", "line 1: key id: 1 to 16 characters"),
        (f"K1 {SECRET_TEXT}", "line 1: key id: 1 to 16 characters"),
        (f"k.1 {SECRET_TEXT}", "line 1: key id: 1 to 16 characters"),
        (f"{'k' * 17} {SECRET_TEXT}", "line 1: key id: 1 to 16 characters"),
        (f"k\u0661 {SECRET_TEXT}", "line 1: key id: 1 to 16 characters"),
        (f"k1 {SECRET_TEXT} extra", "line 1: an id and 43 characters"),
        (f"k1 {SECRET_TEXT[:-1]}!", "line 1: an id and 43 characters"),
    ],
)
def test_fault_in_a_file_of_keys(text: str, fault: str) -> None:
    """A fault is told by its line, and no key stands in the text: it ends in a terminal, or in a log."""
    with pytest.raises(ValueError, match=re.escape(fault)) as caught:
        Keyring.parse(text)
    for start in range(len(SECRET_TEXT) - 8):
        assert SECRET_TEXT[start : start + 8] not in str(caught.value)


def test_all_faults_in_a_file_of_keys() -> None:
    """Every line that is wrong is told at once."""
    with pytest.raises(ValueError, match=r"line 1: .*; line 3: ") as caught:
        Keyring.parse(f"wrong\nk1 {SECRET_TEXT}\nKEY {SECRET_TEXT}")
    assert "line 2" not in str(caught.value)


# Secrets


def test_secrets_are_long_and_never_the_same() -> None:
    """A link has 43 characters of base64url, an email token 128; of ten thousand, no two are the same."""
    for make, length in ((new_link_secret, 43), (new_email_token, 128)):
        made = [make() for _ in range(10_000)]
        assert len(set(made)) == len(made)
        assert {len(each) for each in made} == {length}
        assert set("".join(made)) == BASE64URL


@pytest.mark.parametrize("length", [6, 7, 8, 9, 10])
def test_codes_are_uniform(length: int) -> None:
    """Each digit is equally likely at each place, the first included: a leading zero is one code in ten.

    The bound on chi-square with 9 degrees of freedom is passed by chance once in 20 million times.
    """
    number = 10_000
    made = [new_code(length) for _ in range(number)]
    assert {len(code) for code in made} == {length}
    for place in range(length):
        counts = collections.Counter(code[place] for code in made)
        assert set(counts) == set(string.digits)
        assert chi_square(counts.values(), number / 10) < 55


def test_codes_do_not_follow_from_one_another() -> None:
    """Of ten thousand codes of ten digits, hardly two are the same, and neighbours are not closer than chance."""
    made = [int(new_code(10)) for _ in range(10_000)]
    # By chance, two are the same once in 200 times, and three pairs once in 50 million.
    assert len(set(made)) >= len(made) - 2
    rising = sum(before < after for before, after in itertools.pairwise(made))
    assert 4_500 < rising < 5_500


def test_chance() -> None:
    """A probability of 0 is never, 1 is always, and a half is about every other time."""
    assert not any(chance(0) for _ in range(1000))
    assert all(chance(1) for _ in range(1000))
    assert 300 < sum(chance(0.5) for _ in range(1000)) < 700


def test_jitter_is_a_quarter_at_most() -> None:
    """Waits are up to a quarter shorter or longer, about the same on average, and differ from one another."""
    made = [jittered(8.0) for _ in range(2000)]
    assert 6 <= min(made) < 6.2
    assert 9.8 < max(made) <= 10
    assert 7.85 < sum(made) / len(made) < 8.15
    assert len(set(made)) > 1900
    assert jittered(0) == 0


def test_row_ids_stand_in_order() -> None:
    """They are UUIDs of version 7, unique, and those made later stand after those made before."""
    before = time.time_ns() // 1_000_000
    ids = [new_row_id() for _ in range(10_000)]
    after = time.time_ns() // 1_000_000
    assert {(each.version, each.variant) for each in ids} == {(7, uuid.RFC_4122)}
    moments = [each.int >> 80 for each in ids]
    assert before <= moments[0] <= moments[-1] <= after
    assert moments == sorted(moments)
    assert len({each.int & (2**80 - 1) for each in ids}) == len(ids)


def test_equal() -> None:
    """Equal strings are, others are not, whatever their lengths."""
    assert equal("012345", "012345")
    assert not equal("012345", "012346")
    assert not equal("012345", "0123456")
    assert not equal("", "0")


@pytest.mark.parametrize(
    ("module", "function"),
    [("crypto", "equal"), ("crypto", "matches"), ("crypto", "same_fingerprint"), ("email_verification", "_judge")],
)
def test_secrets_are_compared_in_constant_time(module: str, function: str) -> None:
    """What compares secrets does so by `compare_digest`. Read from the source: no test's clock is fine enough."""
    tree = ast.parse((SERVICE / f"{module}.py").read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    (body,) = (node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == function)
    called = {ast.unparse(node.func) for node in ast.walk(body) if isinstance(node, ast.Call)}
    assert called & {"hmac.compare_digest", "equal"}
    assert not [ast.unparse(node) for node in ast.walk(body) if isinstance(node, (ast.Eq, ast.NotEq))]


# Links and email tokens


@PROPERTY
@given(st.text("ab", max_size=4), st.text("ab", max_size=4), st.text("ab", max_size=4), st.text("ab", max_size=4))
def test_two_different_links_are_never_stored_alike(type_a: str, secret_a: str, type_b: str, secret_b: str) -> None:
    """Type and secret are framed: no letter moved from one to the other gives the same digest."""
    alike = RING.link_hash(type_a, secret_a) == RING.link_hash(type_b, secret_b)
    assert alike is ((type_a, secret_a) == (type_b, secret_b))


@PROPERTY
@given(rings)
def test_link_is_found_by_the_digest_under_any_key(ring: Keyring) -> None:
    """What any one key of the ring has stored is among what is looked up, one digest a key."""
    secret, token = new_link_secret(), new_email_token()
    hashes, email_hashes = ring.link_hashes("recovery_token", secret), ring.email_token_hashes(token)
    assert len(set(hashes)) == len(set(email_hashes)) == len(ring.keys)
    for key in ring.keys:
        assert Keyring([key]).link_hash("recovery_token", secret) in hashes
        assert Keyring([key]).email_token_hash(token) in email_hashes
    assert ring.link_hash("recovery_token", secret) == hashes[0]
    assert ring.email_token_hash(token) == email_hashes[0]


def test_link_of_a_retired_key_is_not_found() -> None:
    """Without its key, what is stored for a link is not looked up; nor under another key of the same id."""
    stored, email_stored = RING.link_hash("recovery_token", "A" * 43), RING.email_token_hash(TOKEN)
    for ring in (Keyring([OTHER]), Keyring([SAME_ID])):
        assert stored not in ring.link_hashes("recovery_token", "A" * 43)
        assert email_stored not in ring.email_token_hashes(TOKEN)


@PROPERTY
@given(rings)
def test_email_token_is_long_enough_for_its_table(ring: Keyring) -> None:
    """What is stored for an email token has the table's least length of 128, and fits its 255, under any key."""
    stored = ring.email_token_hash(new_email_token())
    assert re.fullmatch(r"ev1\.[a-z0-9]{1,16}\.[0-9a-f]{128}", stored)
    assert 128 <= len(stored) <= 255


def test_email_tokens_stand_in_the_order_of_their_time() -> None:
    """Of two tokens, what is stored for the later one is the greater, and no part of either is in it."""
    tokens = []
    for _ in range(20):
        tokens.append(new_email_token())
        # More than the millisecond that a token's time is told to.
        time.sleep(0.002)
    stored = [RING.email_token_hash(token) for token in tokens]
    assert stored == sorted(stored)
    assert not [
        place
        for token, digest in zip(tokens, stored, strict=True)
        for place in range(len(token) - 7)
        if token[place : place + 8] in digest
    ]


def test_email_tokens_do_not_differ_by_their_time_alone() -> None:
    """Without its time, a token is 120 random characters; and what is stored depends on each character."""
    token = new_email_token()
    assert len({new_email_token()[:-8] for _ in range(10_000)}) == 10_000
    others = {f"{token[:place]}{'B' if token[place] == 'A' else 'A'}{token[place + 1 :]}" for place in range(128)}
    assert len({RING.email_token_hash(each)[-116:] for each in {token, *others}}) == 129


# Codes of one-time tokens


@PROPERTY
@given(code=long_codes, other=long_codes, address=st.text(min_size=1, max_size=8), row=uuids, user=uuids)
def test_code_is_accepted_and_no_other(code: str, other: str, address: str, row: uuid.UUID, user: uuid.UUID) -> None:
    """A code matches what was stored for it, by either way of hashing, and another code does not."""
    subject = CodeSubject(row, "phone_change_token", user, address)
    for hasher in (RING.code_hasher(CHEAP), RING.code_hasher(None)):
        stored = hasher.hash(code, subject)
        assert hasher.matches(code, stored, subject)
        assert hasher.matches(other, stored, subject) is (other == code)


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SUBJECT, token_type="confirmation_token"),
        dataclasses.replace(SUBJECT, user_id=uuid.UUID(int=3)),
        dataclasses.replace(SUBJECT, relates_to="eve@example.org"),
        dataclasses.replace(SUBJECT, relates_to=""),
    ],
    ids=["type", "user", "address", "no address"],
)
def test_code_is_good_for_its_subject_only(hasher_of: Callable[[Keyring], CodeHasher], other: CodeSubject) -> None:
    """A code's hash, copied into another row by whoever can write to the database, is worth nothing there."""
    hasher = hasher_of(RING)
    stored = hasher.hash("012345", SUBJECT)
    assert hasher.matches("012345", stored, SUBJECT)
    assert not hasher.matches("012345", stored, other)


def test_code_without_argon2_is_good_for_its_row_only() -> None:
    """Without a salt, the row's id stands in for it: two equal codes of one user are stored differently."""
    hasher = RING.code_hasher(None)
    stored = hasher.hash("012345", SUBJECT)
    other = dataclasses.replace(SUBJECT, token_id=uuid.UUID(int=3))
    assert binds_row(stored)
    assert not hasher.matches("012345", stored, other)
    assert hasher.hash("012345", other) != stored


def test_code_with_argon2_is_salted() -> None:
    """Equal codes of one subject are stored differently each time."""
    hasher = RING.code_hasher(CHEAP)
    one, other = hasher.hash("012345", SUBJECT), hasher.hash("012345", SUBJECT)
    assert one != other
    assert not binds_row(one)
    assert hasher.matches("012345", one, SUBJECT)
    assert hasher.matches("012345", other, SUBJECT)


@PROPERTY
@given(st.text("01", max_size=4), st.text("01", max_size=4), st.text("01", max_size=4), st.text("01", max_size=4))
def test_no_digit_moves_between_address_and_code(address_a: str, code_a: str, address_b: str, code_b: str) -> None:
    """Address and code are framed: a phone number's last digit is never the code's first."""
    hasher = RING.code_hasher(None)
    stored = hasher.hash(code_a, dataclasses.replace(SUBJECT, relates_to=address_a))
    matched = hasher.matches(code_b, stored, dataclasses.replace(SUBJECT, relates_to=address_b))
    assert matched is ((address_a, code_a) == (address_b, code_b))


def test_code_made_under_an_old_key_is_accepted(hasher_of: Callable[[Keyring], CodeHasher]) -> None:
    """A ring with a new key first accepts what its older key made, and makes under the new one."""
    stored = hasher_of(RING).hash("012345", SUBJECT)
    rotated = hasher_of(Keyring([OTHER, KEY]))
    assert rotated.matches("012345", stored, SUBJECT)
    assert not rotated.matches("012346", stored, SUBJECT)
    assert rotated.hash("012345", SUBJECT).split(".")[1] == "k2"


def test_code_of_a_retired_key_is_no_wrong_code(hasher_of: Callable[[Keyring], CodeHasher]) -> None:
    """Without its key there is no verdict, so that no attempt is counted; another key of that id matches nothing."""
    stored = hasher_of(RING).hash("012345", SUBJECT)
    with pytest.raises(KeyError):
        hasher_of(Keyring([OTHER])).matches("012345", stored, SUBJECT)
    assert not hasher_of(Keyring([SAME_ID])).matches("012345", stored, SUBJECT)


def test_either_way_of_hashing_is_checked_whatever_the_setting(hasher_of: Callable[[Keyring], CodeHasher]) -> None:
    """Codes made before `code_hashing` was changed are good until they expire."""
    hasher = hasher_of(RING)
    for maker in (RING.code_hasher(CHEAP), RING.code_hasher(None)):
        stored = maker.hash("012345", SUBJECT)
        assert is_slow(stored) is maker.slow
        assert hasher.matches("012345", stored, SUBJECT)
        assert not hasher.matches("012346", stored, SUBJECT)


@pytest.mark.parametrize(
    "stored", ["", "x", "otc1.", "otl1.k1." + "A" * 43, "d" * 56, "otc2.k1.x", "otc1.K1.x", "012345"]
)
def test_foreign_row_is_no_wrong_code(hasher_of: Callable[[Keyring], CodeHasher], stored: str) -> None:
    """What has not our format matches nothing, and is no verdict on a code."""
    with pytest.raises(KeyError):
        hasher_of(RING).matches("012345", stored, SUBJECT)


@pytest.mark.parametrize(
    "phc",
    [
        "",
        "x",
        "$argon2id$",
        "$argon2id$v=19$m=64,t=1,p=1$",
        "$argon2id$v=19$m=64,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$!",
        "$argon2id$v=19$m=1,t=1,p=1$MDEyMzQ1Njc4OWFiY2RlZg$4WE2ir5ENH6uDbhCIZv8foyZMyEe567HJB0PxrrO4QI",
        "$argon2id$v=19$m=64,t=0,p=1$MDEyMzQ1Njc4OWFiY2RlZg$4WE2ir5ENH6uDbhCIZv8foyZMyEe567HJB0PxrrO4QI",
        "$argon2id$v=19$m=64,t=1,p=1$MDEy$4WE2ir5ENH6uDbhCIZv8foyZMyEe567HJB0PxrrO4QI",
        "$2b$12$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234",
    ],
)
def test_damaged_row_is_no_wrong_code(phc: str) -> None:
    """A stored code that cannot be read is a fault of ours: neither a wrong code, nor a shortage that will pass."""
    with pytest.raises(InvalidHashError):
        RING.code_hasher(CHEAP).matches("012345", f"otc1.k1.{phc}", SUBJECT)


def test_want_of_memory_is_no_wrong_code() -> None:
    """Where Argon2 gets no memory there is no verdict: neither a wrong code, nor a damaged row, nor a right one."""
    hasher = RING.code_hasher(CHEAP)
    gibibyte = hasher.hash("012345", SUBJECT).replace("m=64,", "m=1048576,")
    with memory_limited(os.getpid(), 256), pytest.raises(VerificationError, match="Memory allocation error") as caught:
        hasher.matches("012345", gibibyte, SUBJECT)
    assert isinstance(caught.value, NO_VERDICT)


def test_pretending_ends_well(hasher_of: Callable[[Keyring], CodeHasher]) -> None:
    """The work for a subject that does not exist ends without a word."""
    hasher_of(RING).pretend()


# Email verification codes


@PROPERTY
@given(code=codes, row=uuids, user=uuids, ring=rings)
def test_sealed_code_comes_out_as_it_went_in(code: str, row: uuid.UUID, user: uuid.UUID, ring: Keyring) -> None:
    """Every code, leading zeros included, is six digits at rest, and itself again with the row's id, user and token."""
    token_hash = ring.email_token_hash(TOKEN)
    sealed = ring.seal_code(code, row_id=row, user_id=user, token_hash=token_hash)
    assert re.fullmatch("[0-9]{6}", sealed)
    assert ring.unseal_code(sealed, row_id=row, user_id=user, token_hash=token_hash) == code


@pytest.mark.parametrize("what", ["row", "user", "token", "key"])
def test_sealed_code_is_worth_nothing_elsewhere(what: str) -> None:
    """Under a thousand other rows, users, tokens or keys, a sealed code opens to other codes: each has its own pad."""
    sealed = RING.seal_code("012345", row_id=ROW, user_id=USER, token_hash=TOKEN_HASH)
    opened = set()
    for number in range(10, 1010):
        row = uuid.UUID(int=number) if what == "row" else ROW
        user = uuid.UUID(int=number) if what == "user" else USER
        token_hash = RING.email_token_hash(f"{number:0128d}") if what == "token" else TOKEN_HASH
        ring = Keyring([Key("k1", number.to_bytes(32, "big"))]) if what == "key" else RING
        opened.add(ring.unseal_code(sealed, row_id=row, user_id=user, token_hash=token_hash))
    assert "012345" not in opened
    # Nothing is left to chance here, so that this holds always or never.
    assert len(opened) > 990


def test_row_and_user_are_not_interchangeable() -> None:
    """A pad made with row and user swapped is another one."""
    sealed = RING.seal_code("012345", row_id=ROW, user_id=USER, token_hash=TOKEN_HASH)
    assert RING.unseal_code(sealed, row_id=USER, user_id=ROW, token_hash=TOKEN_HASH) != "012345"


def test_sealed_codes_tell_nothing_of_the_code() -> None:
    """One code, sealed in ten thousand rows, gives every digit at every place equally often."""
    sealed = [
        RING.seal_code("000000", row_id=uuid.UUID(int=number), user_id=USER, token_hash=TOKEN_HASH)
        for number in range(10_000)
    ]
    for place in range(6):
        counts = collections.Counter(each[place] for each in sealed)
        assert chi_square(counts.values(), 1000) < 55


@pytest.mark.parametrize(
    ("sealed", "token_hash"),
    [
        ("919639", "ev1.k2." + "0" * 128),
        ("919639", "T" * 128),
        ("919639", ""),
    ],
)
def test_foreign_code_is_not_opened(sealed: str, token_hash: str) -> None:
    """A row that is not ours, or whose key is retired, gives no code."""
    with pytest.raises(KeyError):
        RING.unseal_code(sealed, row_id=ROW, user_id=USER, token_hash=token_hash)


@pytest.mark.parametrize("sealed", ["91963", "919639\n", "\uff19\uff11\uff19\uff16\uff13\uff19", "A1B2C3"])
def test_damaged_code_is_not_taken_for_a_wrong_one(sealed: str) -> None:
    """A row of ours whose code is no sealed code is damaged: a bug or an accident, to be looked at."""
    with pytest.raises(ValueError, match="not a sealed code"):
        RING.unseal_code(sealed, row_id=ROW, user_id=USER, token_hash=TOKEN_HASH)


def test_code_sealed_under_an_old_key_is_opened() -> None:
    """The stored token names the key, so that a rotation leaves every pad as it was."""
    sealed = RING.seal_code("012345", row_id=ROW, user_id=USER, token_hash=TOKEN_HASH)
    rotated = Keyring([OTHER, KEY])
    assert rotated.unseal_code(sealed, row_id=ROW, user_id=USER, token_hash=TOKEN_HASH) == "012345"


# Receipts


@PROPERTY
@given(st.binary(), st.binary(), rings)
def test_fingerprint_tells_requests_apart(message: bytes, other: bytes, ring: Keyring) -> None:
    """A request has the fingerprint that was kept for it, and no other request has, under any key of the ring."""
    for key in ring.keys:
        stored = Keyring([key]).fingerprint(message)
        assert ring.same_fingerprint(stored, message)
        assert ring.same_fingerprint(stored, other) is (other == message)


def test_fingerprint_of_a_retired_key_is_nobodys() -> None:
    """Under a retired key, or another of its id, no request is the same: a retry is refused, never mixed up."""
    stored = RING.fingerprint(b"message")
    assert not Keyring([OTHER]).same_fingerprint(stored, b"message")
    assert not Keyring([SAME_ID]).same_fingerprint(stored, b"message")
    assert not RING.same_fingerprint("", b"message")


@PROPERTY
@given(st.binary(), st.text(max_size=20), st.text(max_size=20), rings)
def test_kept_answer_opens_in_its_place_only(answer: bytes, place: str, other: str, ring: Keyring) -> None:
    """A sealed answer opens for the receipt that it was sealed for, and for no other."""
    sealed = ring.seal_answer(answer, place=place)
    assert ring.open_answer(sealed, place=place) == answer
    if other != place:
        with pytest.raises(KeyError):
            ring.open_answer(sealed, place=other)


def test_kept_answer_is_not_to_be_read_or_changed() -> None:
    """What is sealed holds nothing in clear, differs each time, and opens neither changed nor without its key."""
    answer = b"ada@example.org, who holds 012345"
    sealed, again = (RING.seal_answer(answer, place="here") for _ in range(2))
    assert sealed != again
    assert b"ada" not in sealed
    assert b"012345" not in sealed
    for place in range(len(sealed)):
        changed = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        with pytest.raises(KeyError):
            RING.open_answer(changed, place="here")
    assert Keyring([OTHER, KEY]).open_answer(sealed, place="here") == answer
    for ring in (Keyring([OTHER]), Keyring([SAME_ID])):
        with pytest.raises(KeyError):
            ring.open_answer(sealed, place="here")


# Addresses in the outbox


@PROPERTY
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), uuids, uuids, rings)
def test_sealed_address_opens_in_its_row_only(address: str, row: uuid.UUID, other: uuid.UUID, ring: Keyring) -> None:
    """A sealed address opens for the verification that it was sealed for, and for no other; it names its key."""
    sealed = ring.seal_address(address, row_id=row)
    assert ring.open_address(sealed, row_id=row) == address
    assert sealed.partition(b".")[0] == ring.keys[0].id.encode()
    if other != row:
        with pytest.raises(KeyError):
            ring.open_address(sealed, row_id=other)


def test_sealed_address_is_not_to_be_read_or_changed() -> None:
    """What is sealed holds nothing in clear, differs each time, and opens neither changed nor cut short."""
    address = "ada@example.org"
    sealed, again = (RING.seal_address(address, row_id=ROW) for _ in range(2))
    assert sealed != again
    assert b"ada" not in sealed
    assert b"example" not in sealed
    damaged = [sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :] for place in range(len(sealed))]
    damaged += [sealed[:length] for length in range(len(sealed))]
    damaged += [sealed + b"\0", b"\xff\xfe." + sealed, b"." + sealed, sealed.replace(b"k1.", b"k2."), b"k1."]
    for value in damaged:
        for ring in (RING, Keyring([OTHER, KEY])):
            with pytest.raises(KeyError):
                ring.open_address(value, row_id=ROW)


def test_address_sealed_under_an_old_key_is_opened() -> None:
    """Behind a new key that seals, the old one opens what it sealed; once it is retired, nothing does."""
    sealed = RING.seal_address("ada@example.org", row_id=ROW)
    ring = Keyring([OTHER, KEY])
    assert ring.open_address(sealed, row_id=ROW) == "ada@example.org"
    assert ring.seal_address("ada@example.org", row_id=ROW).startswith(b"k2.")
    for retired in (Keyring([OTHER]), Keyring([SAME_ID])):
        with pytest.raises(KeyError):
            retired.open_address(sealed, row_id=ROW)
