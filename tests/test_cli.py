import asyncio
import contextlib
import email
import email.policy
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from conftest import OnetimeServer, PostgresServer, Serve, clean_environment, free_port
from google.protobuf import json_format
from mailserver import MailServer
from onetime.v1 import email_verification_pb2, one_time_tokens_pb2, one_time_tokens_pb2_grpc
from psycopg import sql

from service.config import describe
from service.crypto import Keyring

TIMEOUT_S = 60.0
USER = "7d4f0f6a-3c1e-4b7e-9a55-0d2f6c1b8e21"
UNREACHABLE = "postgresql://app:geheim@127.0.0.1:1/app"

COMMANDS = [
    (),
    ("dev",),
    ("serve",),
    ("migrate",),
    ("cleanup",),
    ("unlock",),
    ("doctor",),
    ("health",),
    ("mail",),
    ("mail", "preview"),
    ("mail", "test"),
    ("keys",),
    ("keys", "init"),
    ("keys", "list"),
    ("keys", "add"),
    ("keys", "switch"),
    ("keys", "retire"),
    ("keys", "api"),
]


def run(*arguments: str, umask: int = -1, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run `onetime` to its end."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "service", *arguments],
        env=clean_environment(**settings) | {"COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        umask=umask,
    )


def done(*arguments: str, **settings: object) -> str:
    """Run `onetime`, see that it succeeds without a word of complaint, and return what it printed."""
    result = run(*arguments, umask=-1, **settings)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr + result.stdout
    return result.stdout


def refused(*arguments: str, code: int = 1, **settings: object) -> str:
    """Run `onetime`, see that it fails with one message and no traceback, and return the message."""
    result = run(*arguments, umask=-1, **settings)
    assert result.returncode == code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert "bug of onetime" not in result.stderr
    assert result.stdout == ""
    return result.stderr


def mode(path: Path) -> int:
    """Return the permissions of a file."""
    return stat.S_IMODE(path.stat().st_mode)


# Help and settings


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "onetime")
def test_help_teaches(command: tuple[str, ...]) -> None:
    """Every command explains itself, its options and its settings; those that do something show how."""
    text = done(*command, "--help")
    assert text.startswith(f"Usage: onetime {' '.join(command)}".rstrip())
    assert text == done(*command, "-h")
    if command not in (
        (),
        ("mail",),
        ("keys",),
        ("keys", "list"),
        ("keys", "add"),
        ("keys", "switch"),
        ("keys", "retire"),
    ):
        assert re.search(r"\n  Examples?:\n    .*onetime ", text)


def test_help_of_serve_has_every_setting() -> None:
    """What `serve` heeds can be found in its help, with its default."""
    text = " ".join(done("serve", "--help").split())
    for setting in describe():
        if setting.option and setting.name != "data_dir":
            assert f" {setting.option} " in text
            assert setting.description in text
            if setting.default:
                assert f"[default: {setting.default}]" in text


def test_version() -> None:
    """The version is that of the package."""
    assert re.fullmatch(r"onetime, version \d+\.\d+\.\d+\n", done("--version"))


def test_wrong_usage_is_exit_code_2() -> None:
    """Unknown commands and options are wrong usage, told without a traceback."""
    assert "No such command 'sevre'" in refused("sevre", code=2)
    assert "No such option" in refused("serve", "--max-atempts", "3", code=2)
    assert "Missing argument 'ID'" in refused("keys", "switch", code=2)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    """One run names each wrong setting, from wherever it came; nothing was started."""
    file = tmp_path / "onetime.toml"
    file.write_text("max_attemps = 3\n")
    told = refused("serve", "--listen", "nowhere", "--config", str(file), code=2, pool_size=0, call_timout="5s")
    assert told.startswith("onetime: 7 settings are wrong:\n")
    for part in (
        "ONETIME_TLS_CERT, ONETIME_TLS_KEY, ONETIME_POLICY_FILE are missing: ",
        "--listen 'nowhere': host:port or [IPv6]:port",
        "ONETIME_POOL_SIZE '0': a whole number from 1 to 100 is right",
        "ONETIME_CALL_TIMOUT: there is no such setting; did you mean ONETIME_CALL_TIMEOUT?",
        f"max_attemps in {file}: there is no such setting; did you mean max_attempts?",
        "ONETIME_DATABASE_URL is missing: ",
        "ONETIME_KEYS_FILE is missing: ",
    ):
        assert f"\n  {part}" in told


def test_plain_text_must_be_asked_for(keys_file: Path) -> None:
    """Nobody serves without identity by mistake."""
    told = refused("serve", code=2, database_url=UNREACHABLE, keys_file=keys_file)
    assert "ONETIME_TLS_CERT, ONETIME_TLS_KEY, ONETIME_POLICY_FILE are missing" in told
    assert "or add --insecure-loopback, to serve this machine only, in plain text" in told
    told = refused("serve", "--insecure-loopback", "--listen", "0.0.0.0:1", code=2, database_url="", keys="")
    assert "only a loopback address is right in plain text" in told


@pytest.mark.parametrize("command", [("migrate",), ("cleanup",), ("doctor",), ("serve", "--insecure-loopback")])
def test_no_secret_in_any_output(command: tuple[str, ...], keys_file: Path) -> None:
    """Neither the database's password nor a key is in what a failing command says, however it fails."""
    secret = keys_file.read_text().split()[1]
    for url in (UNREACHABLE, "postgresql://app:geheim@db:x/app", "host=127.0.0.1 password=geheim bad=geheim"):
        result = run(*command, database_url=url, keys=keys_file.read_text(), log_level="debug")
        assert result.returncode != 0
        for secret_part in ("geheim", secret):
            assert secret_part not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
    result = run(*command, "--database-url", UNREACHABLE, keys_file=keys_file)
    assert "its password can be read by every user" in result.stdout + result.stderr
    assert "geheim" not in result.stdout + result.stderr


async def test_health_asks_a_running_server(server: OnetimeServer) -> None:
    """The exit code tells a container's health check whether the server serves."""
    assert await asyncio.to_thread(done, "health", "--listen", server.target) == "SERVING\n"
    told = await asyncio.to_thread(refused, "health", "--listen", f"127.0.0.1:{free_port()}")
    assert "UNAVAILABLE" in told


# mail


def test_mails_can_be_looked_at(tmp_path: Path) -> None:
    """The mails of all languages, or of one, are written as they would be sent."""
    out = tmp_path / "mails"
    told = done("mail", "preview", "--out", str(out), mail_product="Example", mail_from="no-reply@example.com")
    languages = {path.stem for path in out.iterdir()}
    assert {"en", "de", "fr"} <= languages
    assert {path.name for path in out.iterdir()} == {
        f"{language}{suffix}" for language in languages for suffix in (".eml", ".html", ".txt")
    }
    assert "123456 is your Example code" in told
    message = email.message_from_bytes((out / "de.eml").read_bytes(), policy=email.policy.default)
    assert message["From"] == "Example <no-reply@example.com>"
    assert message["Content-Language"] == "de"
    assert "123456" in (out / "de.html").read_text("utf-8")
    assert "123456" in (out / "de.txt").read_text("utf-8")
    one = done("mail", "preview", "--locale", "pt-BR", "--out", str(tmp_path / "one"))
    assert "pt.eml" in one
    assert len(list((tmp_path / "one").iterdir())) == 3


def test_templates_that_are_not_right_are_told(tmp_path: Path) -> None:
    """Every fault at once, by its file, and nothing is written."""
    (tmp_path / "xx").mkdir()
    (tmp_path / "xx" / "subject.txt").write_text("{{ kode }}", "utf-8")
    told = refused("mail", "preview", "--out", str(tmp_path / "mails"), code=2, mail_templates=tmp_path)
    assert "xx/subject.txt" in told
    assert "xx: without body.txt and body.html" in told
    assert not (tmp_path / "mails").exists()


def test_a_mail_can_be_sent_to_try_the_server() -> None:
    """It arrives, with a code made up; what is wrong is told with what helps, and without password and address."""
    with MailServer(login=("onetime", "geheim")) as server:
        url = server.url(user="onetime", password="geheim")
        assert "has accepted the mail" in done("mail", "test", "ada@example.com", smtp_url=url)
        (mail,) = server.mails
        assert mail.to == "ada@example.com"
        assert "123456" in mail.message["Subject"]
        told = refused("mail", "test", "ada@example.com", smtp_url=url.replace("geheim", "falsch"))
        assert "service_refused" in told
        assert "check user and password" in told
        assert "falsch" not in told
        server.misbehave("rcpt", "550 no such mailbox <ada@example.com>")
        told = refused("mail", "test", "ada@example.com", smtp_url=url)
        assert "address_refused (reply code 550)" in told
        assert "ada@example.com" not in told
    assert "unreachable" in refused("mail", "test", "ada@example.com", smtp_url="smtp://127.0.0.1:1")
    assert "ONETIME_SMTP_URL is missing" in refused("mail", "test", "ada@example.com", code=2)
    assert "one address" in refused(
        "mail", "test", "ada@example.com,eve@example.com", code=2, smtp_url="smtp://127.0.0.1:1"
    )


def test_a_password_of_the_mail_server_on_the_command_line_is_noticed() -> None:
    """Every user of the machine can read it there; the warning does not repeat it."""
    result = run("mail", "test", "ada@example.com", "--smtp-url", "smtp://onetime:geheim@127.0.0.1:1")
    assert "warning: --smtp-url: its password can be read by every user" in result.stderr
    assert "geheim" not in result.stderr + result.stdout


# keys


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where there is no file of keys yet."""
    return tmp_path / "etc" / "keys"


@pytest.fixture
def made(file: Path) -> Path:
    """A file that `keys init` made."""
    file.parent.mkdir()
    done("keys", "init", "--keys-file", str(file))
    return file


def ids(file: Path) -> list[str]:
    """Return the ids in a file, the one that makes first."""
    return [key.id for key in Keyring.parse(file.read_text()).keys]


def test_the_life_of_a_key(made: Path) -> None:
    """A new key first checks, then makes, and the old one is retired; every step leaves a file that servers read."""
    [old] = ids(made)
    done("keys", "add", keys_file=made)
    assert ids(made)[0] == old
    new = ids(made)[1]
    assert done("keys", "list", keys_file=made) == f"{old:16}  makes and checks\n{new:16}  checks\n"
    done("keys", "switch", new, keys_file=made)
    assert ids(made) == [new, old]
    assert "onetime keys switch" in refused("keys", "retire", new, keys_file=made)
    done("keys", "retire", old, keys_file=made)
    assert ids(made) == [new]
    assert "is the key that makes" in refused("keys", "retire", new, keys_file=made)


def test_keys_are_for_their_owner_only(file: Path) -> None:
    """The file's mode is 0600 from its first moment on, under every umask, and stays so; nothing is left beside it."""
    file.parent.mkdir()
    for umask in (0o000, 0o777):
        assert run("keys", "init", "--keys-file", str(file), umask=umask).returncode == 0
        assert mode(file) == 0o600
        file.chmod(0o644)
        assert run("keys", "add", "--keys-file", str(file), umask=umask).returncode == 0
        assert mode(file) == 0o600
        assert [path.name for path in file.parent.iterdir()] == ["keys"]
        file.unlink()


def test_keys_are_never_overwritten(made: Path) -> None:
    """`keys init` leaves a file alone that is there, whatever is in it: lost keys are lost tokens."""
    for content in (made.read_text(), "", "something else\n"):
        made.write_text(content)
        assert "it stays as it is" in refused("keys", "init", keys_file=made)
        assert made.read_text() == content


def test_at_most_four_keys(made: Path) -> None:
    """A fifth key is refused, and the file is as it was."""
    for _ in range(3):
        done("keys", "add", keys_file=made)
    content = made.read_text()
    assert "5 keys: 1 to 4 are right" in refused("keys", "add", keys_file=made)
    assert made.read_text() == content


def test_comments_stay(made: Path) -> None:
    """What people wrote into the file is theirs."""
    made.write_text(f"# ours\n\n{made.read_text().strip()}  # the first")
    done("keys", "add", keys_file=made)
    old, new = ids(made)
    done("keys", "switch", new, keys_file=made)
    lines = made.read_text().splitlines()
    assert lines[:2] == ["# ours", ""]
    assert [line.split()[0] for line in lines[2:]] == [new, old]
    assert lines[3].endswith("# the first")


def test_a_link_stays_one(made: Path, tmp_path: Path) -> None:
    """Where the file is a link, what it leads to is changed."""
    link = tmp_path / "link"
    link.symlink_to(made)
    done("keys", "add", keys_file=link)
    assert link.is_symlink()
    assert len(ids(made)) == 2


def test_the_owner_stays(made: Path) -> None:
    """Where root changes the keys of the service's account, that account can still read them."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(made, 12345, 54321)
    done("keys", "add", keys_file=made)
    assert (made.stat().st_uid, made.stat().st_gid, mode(made)) == (12345, 54321, 0o600)


def test_changes_at_once_lose_no_key(made: Path) -> None:
    """Three people who add a key at the same moment have four keys."""
    threads = [threading.Thread(target=done, args=("keys", "add"), kwargs={"keys_file": made}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(ids(made)) == 4


def test_no_command_shows_a_key(made: Path) -> None:
    """Neither on success nor on failure is a key in the output, also where somebody gives it as an id."""
    secret = made.read_text().split()[1]
    texts = [done("keys", "list", keys_file=made), done("keys", "add", keys_file=made)]
    # One in 64 keys begins as an option does.
    texts += [refused("keys", command, "--", secret, keys_file=made) for command in ("switch", "retire")]
    for damaged in (f"{secret} k1\n", f"k1 {secret}\nk1 {secret}\n", f"k1 {secret[:-1]}\n", secret):
        made.write_text(damaged)
        texts += [refused("keys", command, keys_file=made) for command in ("list", "add")]
        assert made.read_text() == damaged
    secrets = [secret[:-1], *(line.split()[-1] for line in made.read_text().splitlines())]
    for text in texts:
        assert not any(one in text for one in secrets)


def test_a_missing_file_or_folder_is_told(file: Path) -> None:
    """The message names the path and the cure."""
    assert f"{file.parent}: No such file or directory" in refused("keys", "init", keys_file=file)
    file.parent.mkdir()
    assert "`onetime keys init` makes it" in refused("keys", "add", keys_file=file)
    assert "ONETIME_KEYS_FILE is missing" in refused("keys", "list", code=2)


# migrate, cleanup and doctor


def test_migrate_tells_what_it_did(database_url: str) -> None:
    """The first run creates, and says what; the second has nothing to do."""
    first = done("migrate", database_url=database_url)
    assert "created auth.one_time_tokens\n" in first
    assert "created public.email_verification_tokens\n" in first
    assert done("migrate", database_url=database_url) == "the database is up to date\n"


def test_migrate_refuses_with_every_difference(database_url: str) -> None:
    """A table that is not as documented is left as it is, with exit code 1."""
    with psycopg.connect(database_url) as connection:
        connection.execute("create schema auth")
        connection.execute("create table auth.one_time_tokens (id int)")
    told = refused("migrate", database_url=database_url)
    assert "was not changed" in told
    assert "user_id" in told


def insert_token(url: str, token_hash: str, age: str) -> None:
    """Write a recovery token into the table."""
    with psycopg.connect(url) as connection:
        connection.execute(
            """
            insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at, updated_at)
            select gen_random_uuid(), gen_random_uuid(), 'recovery_token', %s, 'ada@example.com', t, t
            from (select clock_timestamp() at time zone 'utc' - %s::interval as t) as time
            """,
            [token_hash, age],
        )


def test_cleanup_removes_what_has_expired(migrated_url: str) -> None:
    """Expired rows of ours go, live ones and those of others stay; the summary has a line for each table."""
    insert_token(migrated_url, "otl1.k1.expired", "8 days")
    insert_token(migrated_url, "otl1.k1.live", "0 s")
    insert_token(migrated_url, "foreign", "8 days")
    result = run("cleanup", database_url=migrated_url)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^auth\.one_time_tokens +1 row removed$", result.stdout, re.MULTILINE)
    assert re.search(r"^public\.email_verification_tokens +0 rows removed$", result.stdout, re.MULTILINE)
    assert "onetime.receipts" in result.stdout
    with psycopg.connect(migrated_url) as connection:
        left = connection.execute("select token_hash from auth.one_time_tokens order by token_hash").fetchall()
    assert left == [("foreign",), ("otl1.k1.live",)]


def test_cleanup_needs_a_migrated_database(database_url: str) -> None:
    """Elsewhere it says what helps."""
    assert "`onetime migrate` helps" in refused("cleanup", database_url=database_url)


def test_unlock_forgets_wrong_codes(migrated_url: str) -> None:
    """Of the user and the purpose that are named, and of no other."""
    user_id = str(uuid.uuid4())
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        for purpose in ("recovery_token", "email_verification"):
            connection.execute(
                "insert into onetime.budgets (user_id, purpose, failures, failures_in_a_row)"
                " values (%s, %s, array[now(), now()], 2)",
                [user_id, purpose],
            )
        told = done("unlock", user_id, "recovery_token", database_url=migrated_url)
        assert told == "unlocked: 2 wrong codes in a row forgotten\n"
        left = connection.execute("select purpose from onetime.budgets where failures_in_a_row > 0").fetchall()
        assert left == [("email_verification",)]
    assert "0 wrong codes" in done("unlock", USER, "recovery_token", database_url=migrated_url)
    assert "not a valid UUID" in refused("unlock", "ada", "recovery_token", code=2, database_url=migrated_url)
    assert "recovery_token" in refused("unlock", user_id, "recovery", code=2, database_url=migrated_url)


def test_unlock_needs_a_migrated_database(database_url: str) -> None:
    """Otherwise it says what helps."""
    told = refused("unlock", USER, "recovery_token", database_url=database_url)
    assert "`onetime migrate` helps" in told


def findings(text: str) -> dict[str, set[str]]:
    """Return the checks that the doctor's lines are about, by verdict."""
    found: dict[str, set[str]] = {"ok": set(), "warn": set(), "fail": set()}
    for line in text.splitlines():
        verdict, check = line[:4].strip(), line[6:18].strip()
        found[verdict].add(check)
    return found


def test_doctor_finds_nothing_wrong(migrated_url: str, keys_file: Path) -> None:
    """On a migrated database with good keys every check is ok, and the exit code 0."""
    insert_token(migrated_url, f"otl1.{ids(keys_file)[0]}.x", "0 s")
    text = done("doctor", database_url=migrated_url, keys_file=keys_file)
    assert findings(text) == {
        "ok": {
            "settings",
            "keys",
            "hashing",
            "database",
            "trust",
            "server log",
            "schema",
            "migrations",
            "foreign rows",
            "keys in use",
            "callers",
            "limits",
            "operation",
            "mail",
        },
        "warn": set(),
        "fail": set(),
    }


def test_doctor_fails_on_open_keys(migrated_url: str, keys_file: Path) -> None:
    """A file that others may read is a failure, with its cure."""
    for permissions in (0o640, 0o604, 0o620):
        keys_file.chmod(permissions)
        result = run("doctor", database_url=migrated_url, keys_file=keys_file)
        assert result.returncode == 1
        assert findings(result.stdout)["fail"] == {"keys"}
        assert f"chmod 600 {keys_file}" in result.stdout


def test_doctor_goes_on_after_a_failure(database_url: str, tmp_path: Path) -> None:
    """Without keys, without tables, on cheap hashing: each is told in one run."""
    result = run(
        "doctor",
        database_url=database_url,
        keys_file=tmp_path / "none",
        unsafe_cheap_argon2=True,
        argon2_memory_kib=64,
    )
    assert result.returncode == 1
    assert findings(result.stdout)["fail"] == {"keys", "hashing", "migrations"}
    assert "-> onetime migrate" in result.stdout


def test_doctor_fails_on_a_second_system(migrated_url: str, keys_file: Path) -> None:
    """Foreign rows that are younger than the adoption mean that somebody else goes on writing; older ones do not."""
    insert_token(migrated_url, "pkce_0123456789", "1 day")
    assert findings(done("doctor", database_url=migrated_url, keys_file=keys_file))["fail"] == set()
    insert_token(migrated_url, "pkce_9876543210", "0 s")
    result = run("doctor", database_url=migrated_url, keys_file=keys_file)
    assert result.returncode == 1
    assert findings(result.stdout)["fail"] == {"foreign rows"}
    assert "auth.one_time_tokens has 1 row that another system wrote" in result.stdout
    assert "pkce" not in result.stdout


def test_doctor_warns_of_rows_under_a_lost_key(migrated_url: str, keys_file: Path) -> None:
    """Rows whose key is not in the file are counted, which is no failure."""
    for _ in range(2):
        insert_token(migrated_url, "otc1.gone.x", "0 s")
    text = done("doctor", database_url=migrated_url, keys_file=keys_file)
    assert findings(text)["warn"] == {"keys in use"}
    assert "2 live tokens and kept answers made under key gone" in text


def test_doctor_warns_of_cheaper_hashing(migrated_url: str, keys_file: Path) -> None:
    """HMAC alone is a choice, and a warning."""
    text = done("doctor", "--code-hashing", "hmac", database_url=migrated_url, keys_file=keys_file)
    assert findings(text)["warn"] == {"hashing"}


@pytest.fixture
def plain_role(migrated_url: str, postgres_18: PostgresServer) -> Iterator[str]:
    """The URL of a migrated database, for a role that may no more than serve."""
    with psycopg.connect(migrated_url) as connection:
        name = sql.Identifier(f"plain_{os.getpid()}")
        connection.execute(sql.SQL("create role {} login").format(name))
        for schema in ("auth", "public", "onetime"):
            connection.execute(sql.SQL("grant usage on schema {} to {}").format(sql.Identifier(schema), name))
            connection.execute(
                sql.SQL("grant select, insert, update, delete on all tables in schema {} to {}").format(
                    sql.Identifier(schema), name
                )
            )
    yield migrated_url.replace("://onetime@", f"://plain_{os.getpid()}@")
    with psycopg.connect(migrated_url) as connection:
        connection.execute(sql.SQL("drop owned by {}").format(name))
        connection.execute(sql.SQL("drop role {}").format(name))
    del postgres_18


def test_doctor_warns_of_parameters_in_the_servers_log(plain_role: str, migrated_url: str, keys_file: Path) -> None:
    """A role that may not keep them out is told the grant that cures; with the grant, all is well."""
    text = done("doctor", database_url=plain_role, keys_file=keys_file)
    assert findings(text)["warn"] == {"server log"}
    cures = re.findall(r"-> (grant set on parameter \S+ to \S+); as a superuser", text)
    assert len(cures) == 3
    with psycopg.connect(migrated_url) as connection:
        for cure in cures:
            connection.execute(cure)
    try:
        assert findings(done("doctor", database_url=plain_role, keys_file=keys_file))["warn"] == set()
    finally:
        with psycopg.connect(migrated_url) as connection:
            for cure in cures:
                connection.execute(cure.replace("grant", "revoke").replace(" to ", " from "))


def test_doctor_fails_on_settings_and_on_no_database(keys_file: Path) -> None:
    """What cannot even be looked at is a failure, too: a line each, and exit code 1."""
    result = run("doctor", database_url=UNREACHABLE, keys_file=keys_file)
    assert result.returncode == 1
    assert findings(result.stdout)["fail"] == {"database"}
    result = run("doctor", pool_size=0)
    assert result.returncode == 1
    assert result.stdout.count("\n") == 2
    assert findings(result.stdout) == {"ok": set(), "warn": set(), "fail": {"settings"}}


def test_doctor_writes_nothing(migrated_url: str, keys_file: Path) -> None:
    """It can be run by a role that may only read."""
    name = urlpath(migrated_url)
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute(
            sql.SQL("alter database {} set default_transaction_read_only = on").format(sql.Identifier(name))
        )
    result = run("doctor", database_url=migrated_url, keys_file=keys_file)
    assert findings(result.stdout)["fail"] <= {"trust"}
    assert "bug" not in result.stderr


def urlpath(url: str) -> str:
    """Return the name of a URL's database."""
    found = re.search(r"/([^/?]+)\?", url)
    assert found
    return found[1]


# serve


def test_serve_fails_in_a_sentence(migrated_url: str, database_url: str, keys_file: Path) -> None:
    """No database, an old one, an address that is taken: exit code 1 and what helps."""
    command = ("serve", "--insecure-loopback")
    result = run(*command, database_url=UNREACHABLE, keys_file=keys_file)
    assert result.returncode == 1
    assert "onetime: the database is not to be had" in result.stderr
    result = run(*command, "--no-migrate", database_url=database_url, keys_file=keys_file)
    assert result.returncode == 1
    assert "`onetime migrate`" in result.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run(*command, "--listen", listen, database_url=migrated_url, keys_file=keys_file)
    assert result.returncode == 1
    assert f"cannot listen on {listen}" in result.stderr


# dev


@dataclass
class Dev:
    """A running `onetime dev`."""

    process: subprocess.Popen[str]
    target: str
    banner: str


@contextlib.contextmanager
def dev(data_dir: Path, **settings: object) -> Iterator[Dev]:
    """Run `onetime dev` until the block ends."""
    target = f"127.0.0.1:{free_port()}"
    log = data_dir.with_name(f"dev-{target}.log")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "service", "dev", "--data-dir", str(data_dir), "--listen", target],
            env=clean_environment(**settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        banner = ""
        # The banner is the first and the last that it prints; the pipe ends with the process.
        while "Ctrl-C" not in banner:
            line = process.stdout.readline()
            assert line, f"it ended: {log.read_text()}"
            banner += line
        alarm.cancel()
        yield Dev(process, target, banner)
    finally:
        alarm.cancel()
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode in (0, -signal.SIGKILL), log.read_text()


def recovery(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 - fields of several types
    """Return the fields of a request about a recovery token."""
    return {"token_type": one_time_tokens_pb2.TOKEN_TYPE_RECOVERY, **fields}


def issue(target: str, user_id: str = USER) -> str:
    """Issue a link."""
    with grpc.insecure_channel(target) as channel:
        stub = one_time_tokens_pb2_grpc.OneTimeTokenServiceStub(channel)
        request = one_time_tokens_pb2.IssueTokenRequest(**recovery(user_id=user_id, relates_to="ada@example.com"))
        return stub.IssueToken(request, timeout=TIMEOUT_S).secret


def consume(target: str, secret: str) -> str:
    """Consume a link, and return whose it was."""
    with grpc.insecure_channel(target) as channel:
        stub = one_time_tokens_pb2_grpc.OneTimeTokenServiceStub(channel)
        request = one_time_tokens_pb2.ConsumeTokenRequest(**recovery(link_secret=secret))
        return stub.ConsumeToken(request, timeout=TIMEOUT_S).token.user_id


def test_dev_keeps_its_tokens_from_run_to_run(data_dir: Path) -> None:
    """A token issued in one run is good in the next: database and keys stay; once, as ever."""
    with dev(data_dir) as first:
        secret = issue(first.target)
        keys = (data_dir / "keys").read_text()
        assert mode(data_dir / "keys") == 0o600
    with dev(data_dir) as second:
        assert (data_dir / "keys").read_text() == keys
        assert consume(second.target, secret) == USER
        with pytest.raises(grpc.RpcError):
            consume(second.target, secret)


def test_dev_survives_being_killed(data_dir: Path) -> None:
    """After SIGKILL the next run has the folder for itself, with every token that was acknowledged."""
    with dev(data_dir) as first:
        secret = issue(first.target)
        first.process.kill()
        first.process.wait(TIMEOUT_S)
    with dev(data_dir) as second:
        assert consume(second.target, secret) == USER


def test_a_second_dev_on_the_same_folder_is_refused(data_dir: Path) -> None:
    """It is told whose folder it is and what helps, and the first goes on."""
    with dev(data_dir) as first:
        told = refused("dev", "--data-dir", str(data_dir), "--listen", f"127.0.0.1:{free_port()}")
        assert f"in use by another onetime (process {first.process.pid})" in told
        assert "--data-dir" in told
        assert consume(first.target, issue(first.target)) == USER


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_dev_stops_its_database(data_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and a closed terminal all end it well, and no server is left running."""
    with dev(data_dir) as running:
        pid_file = data_dir / "postgres" / "postmaster.pid"
        assert pid_file.exists()
        running.process.send_signal(number)
        assert running.process.wait(TIMEOUT_S) == 0
        assert not pid_file.exists()


def test_the_lines_that_dev_prints_work(data_dir: Path) -> None:
    """Each grpcurl line of the banner names a method that is served and a request that it takes."""
    with dev(data_dir) as running:
        lines = re.sub(r"\\\n +", "", running.banner)
        calls = re.findall(r"^  grpcurl -plaintext -d '(.+)' (\S+) (\S+)$", lines, re.MULTILINE)
        assert f"  grpcurl -plaintext {running.target} list\n" in running.banner
        assert len(calls) == 3
        secret = ""
        for message, target, path in calls:
            assert target == running.target
            service_name, _, method_name = path.partition("/")
            service = next(
                file.DESCRIPTOR.services_by_name[service_name.rpartition(".")[2]]
                for file in (one_time_tokens_pb2, email_verification_pb2)
                if service_name.rpartition(".")[2] in file.DESCRIPTOR.services_by_name
            )
            assert service.full_name == service_name
            method = service.methods_by_name[method_name]
            module = one_time_tokens_pb2 if "OneTimeToken" in service_name else email_verification_pb2
            request = json_format.Parse(
                message.replace("<the secret that came back>", secret), getattr(module, method.input_type.name)()
            )
            response = call(target, f"/{path}", request, getattr(module, method.output_type.name))
            secret = json.loads(json_format.MessageToJson(response)).get("secret", secret)


def call(target: str, path: str, request: Any, response_type: Any) -> Any:  # noqa: ANN401 - any message
    """Make one call."""
    with grpc.insecure_channel(target) as channel:
        method = channel.unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=response_type.FromString
        )
        return method(request, timeout=TIMEOUT_S)


def test_dev_takes_settings_and_keys_from_elsewhere(data_dir: Path, keys_file: Path) -> None:
    """Settings hold in `dev` too; where there are keys already, none are made; another database is not used."""
    with dev(data_dir, keys_file=keys_file, database_url=UNREACHABLE, recovery_max_ttl="20m") as running:
        assert consume(running.target, issue(running.target)) == USER
        assert not (data_dir / "keys").exists()
        assert "geheim" not in running.banner
    assert "ONETIME_DATABASE_URL is not used" in data_dir.with_name(f"dev-{running.target}.log").read_text()


def test_dev_serves_loopback_only(data_dir: Path) -> None:
    """There is no way to let others in."""
    assert "only a loopback address is right" in refused(
        "dev", "--data-dir", str(data_dir), "--listen", "0.0.0.0:1", code=2
    )
    assert not data_dir.exists()


async def test_a_token_is_good_until_its_key_is_retired(serve: Serve, migrated_url: str, keys_file: Path) -> None:
    """Through the life of a key, with restarts between: added it checks, switched to it makes, retired it is gone."""
    users = [f"00000000-0000-4000-8000-{number:012}" for number in range(3)]

    async def keys(*arguments: str) -> None:
        await asyncio.to_thread(done, "keys", *arguments, keys_file=keys_file)

    async with serve(migrated_url) as server:
        under_old = await asyncio.to_thread(issue, server.target, users[0])
    await keys("add")
    old, new = ids(keys_file)
    await keys("switch", new)
    async with serve(migrated_url) as server:
        assert await asyncio.to_thread(consume, server.target, under_old) == users[0]
        under_new = await asyncio.to_thread(issue, server.target, users[1])
        assert await asyncio.to_thread(consume, server.target, under_new) == users[1]
        under_new = await asyncio.to_thread(issue, server.target, users[2])
    await keys("switch", old)
    await keys("retire", new)
    async with serve(migrated_url) as server:
        with pytest.raises(grpc.RpcError):
            await asyncio.to_thread(consume, server.target, under_new)
    text = await asyncio.to_thread(done, "doctor", database_url=migrated_url, keys_file=keys_file)
    assert f"1 live token or kept answer made under key {new}" in text
