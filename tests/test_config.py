import dataclasses
import os
import re
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.config import (
    OWASP_ARGON2,
    Settings,
    SettingsError,
    describe,
    exposed_passwords,
    format_duration,
    is_cheap,
    is_loopback,
    load,
    load_keyring,
    parse_duration,
    parse_listen,
    parse_smtp_url,
)
from service.crypto import Keyring, new_key

PATHS = (Path, Path | None)
"""Types of settings that take any text."""

ANY_NAME = ("mail_product",)
"""Settings that take any printable text."""

TOKEN_TYPES = {
    "confirmation_token": "confirmation",
    "reauthentication_token": "reauthentication",
    "recovery_token": "recovery",
    "email_change_token_new": "email_change_new",
    "email_change_token_current": "email_change_current",
    "phone_change_token": "phone_change",
    "email_verification": "email_verification",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting comes from the environment that the tests run in."""
    for name in os.environ:
        if name.startswith("ONETIME_"):
            monkeypatch.delenv(name)


def problems_of(options: dict[str, str], *, require: tuple[str, ...] = (), plain_text: bool = False) -> str:
    """Return what is said of settings that are refused."""
    with pytest.raises(SettingsError) as caught:
        load(options, require=require, plain_text=plain_text)
    return str(caught.value)


# Sources


def test_the_command_line_goes_before_the_environment_before_the_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source gives way to the ones before it, setting by setting."""
    file = tmp_path / "onetime.toml"
    file.write_text('max_attempts = 2\npool_size = 2\nargon2_queue = 2\nretention = "2h"\n')
    monkeypatch.setenv("ONETIME_MAX_ATTEMPTS", "3")
    monkeypatch.setenv("ONETIME_POOL_SIZE", "3")
    settings = load({"max_attempts": "4", "config": str(file)}, defaults={"argon2_queue": 1, "argon2_threads": 1})
    assert (settings.max_attempts, settings.pool_size, settings.argon2_queue) == (4, 3, 2)
    assert (settings.argon2_threads, settings.retention) == (1, timedelta(hours=2))
    assert settings.call_timeout == timedelta(seconds=5)


def test_the_file_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONETIME_CONFIG stands for --config, which goes before it."""
    for number, name in ((1, "a.toml"), (2, "b.toml")):
        (tmp_path / name).write_text(f"max_attempts = {number}\n")
    monkeypatch.setenv("ONETIME_CONFIG", str(tmp_path / "a.toml"))
    assert load({}).max_attempts == 1
    assert load({"config": str(tmp_path / "b.toml")}).max_attempts == 2


def test_settings_made_in_code_read_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Settings(...)` depends on its arguments alone; only `load` looks around."""
    monkeypatch.setenv("ONETIME_MAX_ATTEMPTS", "3")
    assert Settings().max_attempts == 5


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass variables on that nobody set."""
    monkeypatch.setenv("ONETIME_MAX_ATTEMPTS", "")
    monkeypatch.setenv("ONETIME_METRICS_LISTEN", "")
    assert load({}).max_attempts == 5


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster with services called onetime and onetime-db, every pod has such variables."""
    for name, value in {
        "ONETIME_SERVICE_HOST": "10.0.0.1",
        "ONETIME_SERVICE_PORT": "50051",
        "ONETIME_SERVICE_PORT_GRPC": "50051",
        "ONETIME_PORT": "tcp://10.0.0.1:50051",
        "ONETIME_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "ONETIME_PORT_50051_TCP_ADDR": "10.0.0.1",
        "ONETIME_PORT_50051_TCP_PORT": "50051",
        "ONETIME_PORT_50051_TCP_PROTO": "tcp",
        "ONETIME_DB_SERVICE_HOST": "10.0.0.2",
        "ONETIME_DB_PORT": "tcp://10.0.0.2:5432",
    }.items():
        monkeypatch.setenv(name, value)
    load({})
    monkeypatch.setenv("ONETIME_PORT", "6000")
    assert "ONETIME_PORT: there is no such setting" in problems_of({})


# What is wrong


def test_all_that_is_wrong_is_told_at_once_by_the_names_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message has every wrong, unknown and missing setting, whichever source it came from."""
    file = tmp_path / "onetime.toml"
    file.write_text(
        'retention = "soon"\nmax_attemps = 3\nkeys = "k"\nconfig = "x"\npool_size = true\n[limits]\nx = 1\n'
    )
    monkeypatch.setenv("ONETIME_LISTEN", "0.0.0.0:50051")
    monkeypatch.setenv("ONETIME_CALL_TIMOUT", "5s")
    monkeypatch.setenv("ONETIME_ARGON2_TIME_COST", "1")
    told = problems_of(
        {"config": str(file), "log_level": "loud", "tls_cert": "x"}, require=("database_url", "keys"), plain_text=True
    )
    assert told.splitlines()[0] == "13 settings are wrong:"
    for line in (
        f"retention in {file} 'soon': a duration from 15m to 365d, such as 90, 15m, 1h30m or PT15M, is right",
        f"max_attemps in {file}: there is no such setting; did you mean max_attempts?",
        f"keys in {file}: this is for the environment only, as ONETIME_KEYS",
        f"config in {file}: this is for the environment only, as ONETIME_CONFIG",
        f"limits in {file}: there is no such setting",
        f"pool_size in {file} True: a whole number from 1 to 100 is right",
        "ONETIME_CALL_TIMOUT: there is no such setting; did you mean ONETIME_CALL_TIMEOUT?",
        "ONETIME_LISTEN '0.0.0.0:50051': only a loopback address is right in plain text: whoever reaches it may",
        "--tls-cert: it has no use in plain text, where nobody is asked who they are: leave out one of the two",
        "ONETIME_ARGON2_TIME_COST '1': too few passes for argon2_memory_kib = 19456",
        "--log-level 'loud': debug, info, warning or error is right",
        "ONETIME_DATABASE_URL is missing: postgresql://user@host:5432/database is right",
        "ONETIME_KEYS_FILE is missing",
    ):
        assert f"\n  {line}" in told


@pytest.mark.parametrize(
    "variable",
    [
        one.variable
        for one in describe()
        if Settings.model_fields[one.name].annotation not in PATHS and one.name not in ANY_NAME
    ],
)
def test_nonsense_is_refused_in_every_setting(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting with a form refuses what has it not, by the variable's name, with what would be right."""
    monkeypatch.setenv(variable, "§ nonsense")
    told = problems_of({})
    assert re.search(rf"^  {variable}( '§ nonsense')?: .+ (is|are) right$", told, re.MULTILINE), told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file or directory"),
        (b"max_attempts = ", "a TOML file is right"),
        (b"\xff\xfe", "a TOML file in UTF-8 is right"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    """A --config that is not there, or is no TOML, is never passed over."""
    file = tmp_path / "onetime.toml"
    if content is not None:
        file.write_bytes(content)
    assert f"config {file}: {told}" in problems_of({"config": str(file)})


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:geheim@db:x:y/d",
        "postgresql://app:geheim@db/d?no_such_option=geheim",
        "host=db password=geheim no_such_option=geheim",
        "geheim",
    ],
)
def test_a_wrong_database_url_is_not_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """It may hold a password: what is said of it shows nothing of it."""
    monkeypatch.setenv("ONETIME_DATABASE_URL", url)
    assert "geheim" not in problems_of({})


def test_a_password_on_the_command_line_is_noticed() -> None:
    """Every user of the machine can read it there; the warning does not repeat it, and tells where it belongs."""
    exposed = ("postgresql://app:geheim@db/d", "host=db password=geheim", "postgresql://db/d?password=geheim")
    for url in exposed:
        (warning,) = exposed_passwords({"database_url": url})
        assert warning.startswith("--database-url: its password can be read by every user")
        assert "geheim" not in warning
    for url in ("smtp://app:geheim@mail", "smtps://app:geheim@mail:465?timeout=5s", "smtp://app:geh%40eim@[::1]"):
        (warning,) = exposed_passwords({"smtp_url": url})
        assert warning.startswith("--smtp-url: its password can be read by every user")
        assert "ONETIME_SMTP_URL" in warning
        assert "geh" not in warning
    both = exposed_passwords({"smtp_url": "smtp://app:geheim@mail", "database_url": exposed[0]})
    assert [warning.partition(":")[0] for warning in both] == ["--database-url", "--smtp-url"]
    for url in ("postgresql://app@db/d", "postgresql://app:@db/d", "", "not a url"):
        assert exposed_passwords({"database_url": url}) == []
    for url in ("smtp://mail", "smtp://app@mail", "smtp://app:@mail", "", "not a url", "smtp://[::1"):
        assert exposed_passwords({"smtp_url": url}) == []
    assert exposed_passwords({}) == []


def test_secrets_are_in_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings can be logged whole."""
    ring = Keyring([new_key()])
    monkeypatch.setenv("ONETIME_DATABASE_URL", "postgresql://app:geheim@db/d")
    monkeypatch.setenv("ONETIME_SMTP_URL", "smtp://app:geheim@mail")
    monkeypatch.setenv("ONETIME_MAIL_FROM", "no-reply@example.com")
    monkeypatch.setenv("ONETIME_KEYS", ring.format())
    settings = load({}, require=("database_url", "keys"))
    assert settings.database_url == "postgresql://app:geheim@db/d"
    assert settings.smtp_url == "smtp://app:geheim@mail"
    server = parse_smtp_url(settings.smtp_url)
    assert server.password == "geheim"
    for text in (repr(settings), str(settings), repr(server), str(server)):
        assert "geheim" not in text
        assert ring.format().split()[1] not in text


# Keys


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring may stand in a variable, on lines or, where a variable cannot have lines, with commas."""
    ring = Keyring([new_key(), new_key()])
    for text in (ring.format(), ring.format().strip().replace("\n", ","), "# made by me\n" + ring.format()):
        monkeypatch.setenv("ONETIME_KEYS", text)
        assert load_keyring(load({}, require=("keys",))).format() == ring.format()


def test_keys_from_a_file(keys_file: Path) -> None:
    """The ring is what the file says."""
    ring = load_keyring(load({"keys_file": str(keys_file)}, require=("keys",)))
    assert ring.format() == keys_file.read_text()


def test_keys_from_two_places_are_refused(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell which ones hold."""
    monkeypatch.setenv("ONETIME_KEYS", keys_file.read_text())
    assert "ONETIME_KEYS: keys_file is set too" in problems_of({"keys_file": str(keys_file)})


def test_malformed_keys_are_told_by_their_line_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a key is said without the key, also where its id and itself were swapped."""
    good = Keyring([new_key()]).format()
    key_id, secret = good.split()
    file = tmp_path / "keys"
    for text in (f"{secret} {key_id}", f"{key_id} {secret[:-1]}", f"{good}{key_id}{secret}", secret):
        file.write_text(text)
        told = problems_of({"keys_file": str(file)}, require=("keys",))
        assert f"--keys-file: {file}: line " in told
        assert secret[:-1] not in told
        with pytest.raises(SettingsError) as caught:
            load_keyring(load({"keys_file": str(file)}))
        assert secret[:-1] not in str(caught.value)
        monkeypatch.setenv("ONETIME_KEYS", text)
        told = problems_of({})
        assert "ONETIME_KEYS: line " in told
        assert secret[:-1] not in told
        monkeypatch.delenv("ONETIME_KEYS")


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\x00geheim", "k1 gehéim".encode()])
def test_a_file_without_keys_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing, empty or foreign file is told as such, together with the other problems, and never shown."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    told = problems_of({"keys_file": str(file), "max_attempts": "0"}, require=("keys",))
    assert f"--keys-file: {file}: " in told
    assert "--max-attempts '0'" in told
    assert "geh" not in told.replace(str(file), "")


# Limits


def test_settings_are_frozen() -> None:
    """What was checked holds."""
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.max_attempts = 1000  # type: ignore[misc] # it is what mypy says


@pytest.mark.parametrize("listen", ["127.0.0.1:50051", "[::1]:50051", "localhost:1", "127.8.8.8:65535"])
def test_loopback_is_listened_on_in_plain_text(listen: str) -> None:
    """These reach no further than this machine."""
    assert load({"listen": listen}, plain_text=True).listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:50051", "onetime.example:1"])
def test_nothing_but_loopback_is_listened_on_in_plain_text(listen: str) -> None:
    """Where callers are not identified, nobody else may reach the service."""
    told = problems_of({"listen": listen}, plain_text=True)
    assert told.count("\n") == 1
    assert "--listen" in told
    assert "loopback" in told
    assert load({"listen": listen}).listen == listen


@pytest.mark.parametrize("listen", ["*:1", "127.0.0.1", "127.0.0.1:0", ""])
def test_what_is_no_address_is_told_once(listen: str) -> None:
    """What cannot be read as an address is not told as one that is not loopback."""
    for plain_text in (False, True):
        told = problems_of({"listen": listen}, plain_text=plain_text)
        assert told.count("\n") == 1
        assert "host:port or [IPv6]:port" in told


def test_metrics_may_be_read_from_elsewhere() -> None:
    """They hold no secret, and Prometheus runs on another machine."""
    assert load({"metrics_listen": "0.0.0.0:9464"}).metrics_listen == "0.0.0.0:9464"


@pytest.mark.parametrize(
    ("text", "parts"),
    [("127.0.0.1:50051", ("127.0.0.1", 50051)), ("[::1]:1", ("::1", 1)), ("localhost:65535", ("localhost", 65535))],
)
def test_parse_listen(text: str, parts: tuple[str, int]) -> None:
    """Host and port are split at the last colon, IPv6 loses its brackets."""
    assert parse_listen(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1",
        ":50051",
        "::1:50051",
        "[::1]",
        "[x]:1",
        "h:0",
        "h:65536",
        "h:\u0665",
        "h:1 ",
        "a b:1",
        "[1::2::3]:1",
    ],
)
def test_parse_listen_refuses(text: str) -> None:
    """What is no address with a port is an error."""
    with pytest.raises(ValueError, match=r".+"):
        parse_listen(text)


def test_argon2_is_held_to_owasp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of OWASP's pairs is taken, and each with a little less is refused, unless the unsafe switch is thrown."""
    for memory, passes in OWASP_ARGON2:
        load({"argon2_memory_kib": str(memory), "argon2_time_cost": str(passes)})
        problems_of({"argon2_memory_kib": str(memory - 1), "argon2_time_cost": str(passes)})
        if passes > 1:
            problems_of({"argon2_memory_kib": str(memory), "argon2_time_cost": str(passes - 1)})
    load({"argon2_memory_kib": "8", "argon2_time_cost": "1", "code_hashing": "hmac"})
    monkeypatch.setenv("ONETIME_UNSAFE_CHEAP_ARGON2", "true")
    assert load({"argon2_memory_kib": "8", "argon2_time_cost": "1"}).argon2_memory_kib == 8
    assert "each lane needs 8 KiB" in problems_of({"argon2_memory_kib": "8", "argon2_parallelism": "2"})


def test_the_default_argon2_is_not_cheap() -> None:
    """The defaults are one of OWASP's pairs."""
    settings = Settings()
    assert not is_cheap(settings.argon2_memory_kib, settings.argon2_time_cost)


def test_lifetimes_are_those_documented() -> None:
    """Lifetime and ceiling of each type, as the contract's comments tell callers."""
    minutes = {
        "confirmation_token": (60, 24 * 60),
        "reauthentication_token": (5, 5),
        "recovery_token": (15, 15),
        "email_change_token_new": (15, 15),
        "email_change_token_current": (15, 15),
        "phone_change_token": (5, 5),
        "email_verification": (15, 15),
    }
    settings = Settings()
    assert {name: settings.lifetime(name) for name in TOKEN_TYPES} == {
        name: (timedelta(minutes=lifetime), timedelta(minutes=ceiling)) for name, (lifetime, ceiling) in minutes.items()
    }
    assert settings.longest_ttl() == timedelta(hours=24)


@pytest.mark.parametrize("token_type", TOKEN_TYPES)
def test_a_lifetime_is_at_most_its_ceiling(token_type: str) -> None:
    """Neither may a lifetime be raised over its ceiling, nor a ceiling be lowered under its lifetime."""
    name = TOKEN_TYPES[token_type]
    option = f"--{name.replace('_', '-')}-lifetime"
    assert f"{option} '7d': 7d is longer than {name}_max_ttl" in problems_of({f"{name}_lifetime": "7d"})
    assert f"{name}_lifetime (default): " in problems_of({f"{name}_max_ttl": "1m"})
    settings = load({f"{name}_lifetime": "1m", f"{name}_max_ttl": "7d"})
    assert settings.lifetime(token_type) == (timedelta(minutes=1), timedelta(days=7))
    assert settings.longest_ttl() == timedelta(days=7)


def test_receipts_outlive_the_retries_that_callers_were_promised() -> None:
    """A receipt is kept for 15 minutes at least."""
    assert "--receipt-retention '14m'" in problems_of({"receipt_retention": "14m"})


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1.1"])
def test_a_probability_is_one(value: str) -> None:
    """What is no probability is refused, NaN too."""
    assert "a number from 0 to 1 is right" in problems_of({"cleanup_probability": value})


# Mail

MAIL: Final = {"host": "mail.example", "port": 587, "tls": "starttls", "user": None, "password": None, "ca": None}
MAIL_DEFAULTS: Final = {**MAIL, "timeout": timedelta(seconds=10), "connections": 4}


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("smtp://mail.example", {}),
        ("SMTP://Mail.Example/", {}),
        ("smtp://mail.example:", {}),
        ("smtps://mail.example", {"port": 465, "tls": "implicit"}),
        ("smtps://mail.example:2465", {"port": 2465, "tls": "implicit"}),
        ("smtp://mail.example?tls=starttls", {}),
        ("smtp://mail.example?tls=none", {"port": 25, "tls": "none"}),
        ("smtp://mail.example:65535?tls=none", {"port": 65535, "tls": "none"}),
        # Nobody else reads what goes over loopback.
        ("smtp://localhost", {"host": "localhost", "port": 25, "tls": "none"}),
        ("smtp://127.8.8.8:1025", {"host": "127.8.8.8", "port": 1025, "tls": "none"}),
        ("smtp://[::1]:1025", {"host": "::1", "port": 1025, "tls": "none"}),
        ("smtp://localhost?tls=starttls", {"host": "localhost"}),
        ("smtp://localhost?ca=ca.pem", {"host": "localhost", "ca": Path("ca.pem")}),
        ("smtps://localhost", {"host": "localhost", "port": 465, "tls": "implicit"}),
        ("smtp://a:b@localhost", {"host": "localhost", "port": 25, "tls": "none", "user": "a", "password": "b"}),
        ("smtp://[2001:DB8::1]", {"host": "2001:db8::1"}),
        ("smtps://[2001:db8::1]:2465", {"host": "2001:db8::1", "port": 2465, "tls": "implicit"}),
        ("smtp://10.0.0.1", {"host": "10.0.0.1"}),
        ("smtp://app:geheim@mail.example", {"user": "app", "password": "geheim"}),
        ("smtp://app%40example.org:p%2F%3F%23%40%25%3A+;&=%C3%A4@mail.example", {
            "user": "app@example.org", "password": "p/?#@%:+;&=\u00e4",
        }),
        ("smtp://mail.example?timeout=2.5s&connections=100", {"timeout": timedelta(seconds=2.5), "connections": 100}),
        ("smtp://mail.example?timeout=100ms", {"timeout": timedelta(seconds=0.1)}),
        ("smtp://mail.example?timeout=1m&connections=1", {"timeout": timedelta(minutes=1), "connections": 1}),
        ("smtp://mail.example?ca=/etc/a+b%20c%26.pem", {"ca": Path("/etc/a+b c&.pem")}),
        ("smtps://mail.example?ca=ca.pem", {"port": 465, "tls": "implicit", "ca": Path("ca.pem")}),
    ],
)  # fmt: skip
def test_parse_smtp_url(url: str, parts: dict[str, object]) -> None:
    """Scheme and `tls` say which TLS is demanded, and that the port; what is encoded in a password is decoded once."""
    assert dataclasses.asdict(parse_smtp_url(url)) == {**MAIL_DEFAULTS, **parts}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "geheim",
        "geheim.example:25",
        "http://geheim.example",
        "smtp:geheim.example",
        "smtp://",
        "smtp://:25",
        "smtp://app:geheim@",
        "smtp://...",
        "smtp://geheim example",
        "smtp://geheim;example",
        "smtp://geh\u00e4im.example",
        "smtp://geheim\u2100.example",
        "smtp://geh\neim.example",
        "smtp://app:geh\neim@mail.example",
        "smtp://app:geh\teim@mail.example",
        "smtp://mail.example:geheim",
        "smtp://mail.example:0",
        "smtp://mail.example:65536",
        "smtp://mail.example:-1",
        "smtp://mail.example:\u0662\u0665",
        "smtp://::1",
        "smtp://[::1",
        "smtp://[geheim]",
        "smtp://[1:2:3]",
        "smtp://[::1%25geheim]",
        "smtp://mail.example/geheim",
        "smtp://mail.example#geheim",
        # A password that is not encoded.
        "smtp://app:ge/heim@mail.example",
        "smtp://app:ge?heim@mail.example",
        "smtp://app:ge#heim@mail.example",
        "smtp://app:heim\u2100@mail.example",
        "smtp://app:%ffgeheim@mail.example",
        "smtp://app:1/geheim@mail.example",
        # Of user and password only one; a password in plain text.
        "smtp://geheim@mail.example",
        "smtp://geheim:@mail.example",
        "smtp://:geheim@mail.example",
        "smtp://app:geheim@mail.example?tls=none",
        "smtp://app:geheim@mail.example:25?tls=none",
        # Parameters.
        "smtp://mail.example?geheim",
        "smtp://mail.example?geheim=1",
        "smtp://mail.example?timeout=5s&geheim=1",
        "smtp://mail.example?TLS=none",
        "smtp://mail.example?tls=geheim",
        "smtp://mail.example?tls=",
        "smtp://mail.example?tls=implicit",
        "smtps://mail.example?tls=none",
        "smtps://mail.example?tls=starttls",
        "smtp://mail.example?tls=starttls&tls=none",
        "smtp://mail.example?tls=none&tls=none",
        "smtp://mail.example?timeout=5s&timeout=geheim",
        "smtp://mail.example?timeout=geheim",
        "smtp://mail.example?timeout=",
        "smtp://mail.example?timeout=0",
        "smtp://mail.example?timeout=99ms",
        "smtp://mail.example?timeout=61s",
        "smtp://mail.example?connections=",
        "smtp://mail.example?connections=0",
        "smtp://mail.example?connections=101",
        "smtp://mail.example?connections=-1",
        "smtp://mail.example?connections=4.0",
        "smtp://mail.example?connections=\u0664",
        "smtp://mail.example?ca=",
        "smtp://mail.example?ca=geheim&tls=none",
        "smtp://mail.example?ca=%ffgeheim",
    ],
)
def test_parse_smtp_url_refuses(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no such URL, or contradicts itself, is refused, and nothing of it is shown: all may be a password."""
    with pytest.raises(ValueError, match=r"(is|are) right") as caught:
        parse_smtp_url(url)
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    if url:
        monkeypatch.setenv("ONETIME_SMTP_URL", url)
        told = problems_of({})
        assert told.count("\n") == 1
        assert f"  ONETIME_SMTP_URL: {caught.value}" in told
        shown += told
    assert "heim" not in shown
    assert "geh" not in shown


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("0.0.0.0", False),  # noqa: S104 - refused
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("", False),
    ],
)
def test_what_is_loopback(host: str, own: bool) -> None:  # noqa: FBT001 - a table's column
    """This machine alone: only there passwords and codes may travel in plain text."""
    assert is_loopback(host) is own


def test_mails_come_from_an_address_that_mail_servers_take() -> None:
    """One mailbox, its domain in ASCII; the default one only where the mail server is on this machine."""
    assert load({"mail_from": " No-Reply@Ex\u00e4mple.com "}).mail_from == "No-Reply@xn--exmple-cua.com"
    assert load({"smtp_url": "smtp://localhost"}).mail_from == "no-reply@localhost"
    told = problems_of({"smtp_url": "smtp://mail.example"})
    assert "  mail_from (default): no mail server takes mail from there" in told
    for address in ("ada@localhost", "ada@LOCALHOST ", "ada@localhost\n"):
        assert "--mail-from" in problems_of({"smtp_url": "smtps://mail.example", "mail_from": address})
    settings = load({"smtp_url": "smtps://mail.example", "mail_from": "ada@example.org"})
    assert settings.mail_from == "ada@example.org"
    for address in (
        "",
        "ada",
        "Ada <ada@example.org>",
        "a@b.c,d@e.f",
        "a@b.c\r\nBcc: d@e.f",
        "p\u0430ypal@example.org",
    ):
        assert "--mail-from" in problems_of({"mail_from": address})
    # A mail server that is wrong itself is told once.
    assert problems_of({"smtp_url": "smtp://"}).count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "\t",
        "a" * 65,
        "A\nBcc: eve@example.net",
        "A\ra",
        "Ada\0",
        "A\x7f",
        "A\u202ecme",
        "A\u200bcme",
        "\u2028",
    ],
)
def test_what_is_no_name_of_a_product(name: str) -> None:
    """It stands in headers and subjects: 1 to 64 printable characters, nothing that breaks a line or turns it."""
    assert "1 to 64 printable characters is right" in problems_of({"mail_product": name})


def test_name_of_a_product() -> None:
    """Any script, quotes too; what surrounds it is trimmed."""
    for name in ("Acme", "a" * 64, "Fl\u00fcge & \u201cS\u00f6hne\u201d", "\u65e5\u672c\u8a9e", 'a "b" \\ <c>'):
        assert load({"mail_product": f" {name} "}).mail_product == name


@pytest.mark.parametrize("locale", ["en", "de", "pt-BR", "pt_BR", "zh-Hant-TW"])
def test_language_of_mails(locale: str) -> None:
    """A language's tag, also as POSIX writes it; whether there is a template for it is told at the start."""
    assert load({"mail_locale": locale}).mail_locale == locale


@pytest.mark.parametrize("locale", ["", "e", "en-", "../en", "en\n", "en/../de", "a" * 36])
def test_what_is_no_language_of_mails(locale: str) -> None:
    """Nothing that could name a file elsewhere."""
    assert "--mail-locale" in problems_of({"mail_locale": locale})


@pytest.mark.parametrize("tries", ["0", "101", "true", "1.5"])
def test_what_is_no_number_of_tries(tries: str) -> None:
    """A mail is tried once at least, and not for ever."""
    assert "--mail-tries" in problems_of({"mail_tries": tries})


# Durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("900", 900),
        ("0", 0),
        ("0.5", 0.5),
        ("15m", 900),
        ("1h30m", 5400),
        ("PT15M", 900),
        ("P1DT2H", 93600),
        ("7d", 604800),
        ("90s", 90),
        ("1.5s", 1.5),
        ("500ms", 0.5),
        ("1m500ms", 60.5),
        (" 15m ", 900),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """Seconds, the short form and ISO 8601 are read."""
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", " ", "P", "PT", "m", "-5m", "15 m", "1e3", "1m1h", "٣m", "15min", "5m5", "9" * 400]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=365)))
def test_the_short_form_is_read_back(duration: timedelta) -> None:
    """What is shown of a duration, to the millisecond, is read as the same."""
    whole = duration // timedelta(milliseconds=1) * timedelta(milliseconds=1)
    assert parse_duration(format_duration(whole)) == whole


def test_numbers_in_a_file_are_seconds(tmp_path: Path) -> None:
    """TOML's own numbers do for durations."""
    file = tmp_path / "onetime.toml"
    file.write_text("retention = 9000\ncall_timeout = 2.5\n")
    settings = load({"config": str(file)})
    assert (settings.retention, settings.call_timeout) == (timedelta(seconds=9000), timedelta(seconds=2.5))


# Documentation


def test_every_setting_is_described() -> None:
    """Each has its names, a sentence, a group; and its default, as shown, is taken for the same value."""
    described = describe()
    assert [one.name for one in described] == list(Settings.model_fields)
    defaults = Settings()
    for one in described:
        assert one.variable == f"ONETIME_{one.name.upper()}"
        assert one.option in (None, "--" + one.name.replace("_", "-"))
        assert one.description.endswith(".")
        assert one.group
        if one.option and one.default and one.name != "argon2_threads":
            assert getattr(load({one.name: one.default}), one.name) == getattr(defaults, one.name)


def test_secrets_are_for_the_environment_only() -> None:
    """Keys have no option: arguments can be read by every user of the machine."""
    assert [one.name for one in describe() if one.option is None] == ["keys", "unsafe_cheap_argon2"]
