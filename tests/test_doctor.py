"""What `onetime doctor` finds: each thing that an operator can get wrong, with its cure."""

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from calls import Database, connected, write_keys
from certificates import Authority, dns, uri
from mailserver import MailServer, tls_context
from proxy import Proxy
from psycopg import sql
from psycopg.pq import ExecStatus
from psycopg.rows import dict_row

from service.config import Settings
from service.crypto import Keyring, new_api_key, new_key
from service.devdb import embedded_postgres
from service.doctor import Finding, examine, is_too_open
from service.migrations import migrate

SERVER: Final = "spiffe://example.org/onetime"
POLICY: Final = """
[callers."spiffe://example.org/accounts"]
rpcs = ["EmailVerificationService/VerifyCode"]
"""


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """A connection of the test's own to the database."""
    with connected(migrated_url) as one:
        yield one


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    """The files of a service that identifies its callers, all of them right."""
    authority = Authority()
    issued = authority.issue(uri(SERVER))
    contents = {
        "tls_cert": issued.certificate,
        "tls_key": issued.key,
        "tls_client_ca": authority.certificate,
        "policy_file": POLICY.encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


async def findings(url: str, keys_file: Path, **settings: Any) -> list[Finding]:  # noqa: ANN401 - any setting
    """Return what the doctor finds."""
    return [finding async for finding in examine(Settings(database_url=url, keys_file=keys_file, **settings))]


def bad(found: list[Finding]) -> list[tuple[str, str]]:
    """Return the checks that are not ok, with their verdicts. Each must name its cure."""
    assert all(finding.cure for finding in found if finding.verdict != "ok")
    assert all(finding.text for finding in found)
    return [(finding.check, finding.verdict) for finding in found if finding.verdict != "ok"]


def text_of(found: list[Finding], check: str) -> str:
    """Return all that is said of one check."""
    return "\n".join(f"{finding.text} -> {finding.cure}" for finding in found if finding.check == check)


async def test_nothing_is_wrong(migrated_url: str, keys_file: Path, files: Mapping[str, Path]) -> None:
    """With all the files of a service for others, everything is ok, and it is told who may call until when."""
    found = await findings(migrated_url, keys_file, **files)
    assert bad(found) == []
    assert "1 caller, known by certificate or API key" in text_of(found, "callers")
    assert "expires at" in text_of(found, "certificate")


async def test_half_of_what_identifies_callers(migrated_url: str, keys_file: Path, files: Mapping[str, Path]) -> None:
    """A setting that is missing beside the others is told by its option."""
    found = await findings(migrated_url, keys_file, tls_cert=files["tls_cert"], tls_key=files["tls_key"])
    assert bad(found) == [("callers", "fail")]
    assert "--policy-file" in text_of(found, "callers")


async def test_files_that_are_not_right(migrated_url: str, tmp_path: Path, files: Mapping[str, Path]) -> None:
    """Faults of keys, policy and certificate are told together, and no content of theirs."""
    api_key = new_api_key()
    files["policy_file"].write_text(f'[callers.x]\nrpcs = ["AdminService/Purge"]\napi_keys = ["{api_key}"]\n', "utf-8")
    files["tls_key"].write_bytes(Authority().issue(uri(SERVER)).key)
    found = await findings(migrated_url, tmp_path / "none", **files)
    assert ("keys", "fail") in bad(found)
    told = text_of(found, "callers")
    assert "AdminService/PurgeUser" in told
    assert "tls_key is not the key" in told
    assert api_key not in told


async def test_a_mail_server_that_takes_our_login(migrated_url: str, keys_file: Path, tmp_path: Path) -> None:
    """It is told where mails go and how they travel there; none is sent, and no password is told."""
    authority = Authority()
    (tmp_path / "ca").write_bytes(authority.certificate)
    context = tls_context(authority.issue(dns("localhost")), tmp_path)
    with MailServer(tls="starttls", context=context, login=("onetime", "geheim")) as mail:
        # The certificate names the host, and not its number.
        url = mail.url(user="onetime", password="geheim", ca=tmp_path / "ca").replace("127.0.0.1", "localhost")
        found = await findings(migrated_url, keys_file, smtp_url=url, mail_from="no-reply@example.com")
        assert bad(found) == []
        assert "answers, over STARTTLS, with a login" in text_of(found, "mail")
        wrong = url.replace("geheim", "falsch")
        found = await findings(migrated_url, keys_file, smtp_url=wrong, mail_from="no-reply@example.com")
        assert bad(found) == [("mail", "fail")]
        assert "service_refused (reply code 535)" in text_of(found, "mail")
        assert "falsch" not in str(found)
        assert mail.mails == []


async def test_no_mail_server_there(migrated_url: str, keys_file: Path, files: Mapping[str, Path]) -> None:
    """A mail server out of reach fails; one that is not set is ok, unless somebody may have codes mailed by it."""
    found = await findings(migrated_url, keys_file, smtp_url="smtp://127.0.0.1:1")
    assert bad(found) == [("mail", "fail")]
    assert "127.0.0.1:1: unreachable" in text_of(found, "mail")
    found = await findings(migrated_url, keys_file, **files)
    assert "none is sent" in text_of(found, "mail")
    mailing = '[callers.signup]\nrpcs = ["EmailVerificationService/*"]\nsend_email = true\n'
    files["policy_file"].write_text(mailing, "utf-8")
    found = await findings(migrated_url, keys_file, **files)
    assert bad(found) == [("mail", "warn")]
    assert "signup may have codes mailed" in text_of(found, "mail")


async def test_templates_that_are_not_right(migrated_url: str, keys_file: Path, tmp_path: Path) -> None:
    """What a server would refuse at its start is told before."""
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "subject.txt").write_text("{{ kode }}", "utf-8")
    found = await findings(migrated_url, keys_file, mail_templates=tmp_path)
    assert bad(found) == [("mail", "fail")]
    assert "de/subject.txt" in text_of(found, "mail")


@pytest.mark.parametrize(
    ("name", "mode", "right"),
    [
        ("tls_key", 0o640, 0o600),
        ("policy_file", 0o664, 0o644),
        ("policy_file", 0o646, 0o644),
        ("tls_client_ca", 0o666, 0o644),
    ],
)
async def test_files_that_are_open_to_others(  # noqa: PLR0917 - three of them are the case
    migrated_url: str, keys_file: Path, files: Mapping[str, Path], name: str, mode: int, right: int
) -> None:
    """Who may read the key or write the policy is a caller like any other, or the server itself."""
    files[name].chmod(mode)
    found = await findings(migrated_url, keys_file, **files)
    assert bad(found) == [("callers", "fail")]
    assert f"chmod {right:o} {files[name]}" in text_of(found, "callers")
    files[name].chmod(right)
    assert bad(await findings(migrated_url, keys_file, **files)) == []


@pytest.mark.parametrize(
    ("owner", "mode", "reader", "too_open"),
    [
        (0, 0o440, 1000, False),
        (0, 0o640, 1000, False),
        (0, 0o660, 1000, True),
        (0, 0o444, 1000, True),
        (0, 0o640, 0, True),
        (1000, 0o640, 1000, True),
        (1000, 0o600, 1000, False),
    ],
)
def test_a_secret_that_root_hands_to_a_group(owner: int, mode: int, reader: int, *, too_open: bool) -> None:
    """Kubernetes with fsGroup makes such files, and no service could change their mode."""
    status = os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, 1000, 0, 0, 0, 0))
    assert is_too_open(status, stat.S_IRWXG | stat.S_IRWXO, reader=reader) == too_open


async def test_a_certificate_that_ends_soon(migrated_url: str, keys_file: Path, files: Mapping[str, Path]) -> None:
    """Two weeks before, it is a warning; afterwards nothing can be served."""
    for days, expected in ((13, [("certificate", "warn")]), (-1, [("callers", "fail")])):
        issued = Authority().issue(uri(SERVER), days=days)
        files["tls_cert"].write_bytes(issued.certificate)
        files["tls_key"].write_bytes(issued.key)
        assert bad(await findings(migrated_url, keys_file, **files)) == expected


async def test_limits_that_allow_too_much(migrated_url: str, keys_file: Path) -> None:
    """Each limit above what NIST asks for is a warning with the figures."""
    found = await findings(
        migrated_url,
        keys_file,
        failures_in_a_row=101,
        failures_per_day=500,
        reauthentication_max_ttl="11m",
        email_verification_max_ttl="25h",
    )
    assert bad(found) == [("limits", "warn")] * 4
    told = text_of(found, "limits")
    assert "100 at most" in told
    assert "a chance of 16.7%" in told  # 1 - (1 - 1e-6) ** (365 * 500)
    assert "10m at most" in told
    assert "24h at most" in told
    assert "a chance of 1.8% at most" in text_of(await findings(migrated_url, keys_file), "limits")


async def test_settings_that_hurt_once_it_runs(migrated_url: str, keys_file: Path) -> None:
    """No clean-up, more Argon2 than there is memory, metrics for everybody."""
    found = await findings(
        migrated_url,
        keys_file,
        cleanup_probability=0,
        argon2_memory_kib=4 * 1024 * 1024,
        argon2_threads=256,
        metrics_listen="0.0.0.0:9464",
    )
    assert bad(found) == [("clean-up", "warn"), ("memory", "fail"), ("metrics", "warn")]


async def test_the_steps_of_replacing_a_key(migrated_url: str, tmp_path: Path, database: Database) -> None:
    """After each step the operator sees what the keys do, and what the next step is."""
    old, new = new_key(), new_key()
    keys_file = tmp_path / "keys"

    def issue(key_id: str) -> None:
        database.execute(
            "with t as (insert into auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to, created_at,"
            " updated_at) select gen_random_uuid(), gen_random_uuid(), 'recovery_token', %s, '', now, now from"
            " (select clock_timestamp() at time zone 'utc') as c (now) returning id, user_id, token_type)"
            " insert into onetime.one_time_token_states (user_id, token_type, token_id, ttl, caller)"
            " select user_id, token_type, id, '15 min', 'tests' from t",
            [f"otl1.{key_id}.x"],
        )

    async def told(*ring: Any) -> str:  # noqa: ANN401 - keys
        keys_file.unlink(missing_ok=True)
        write_keys(keys_file, *ring)
        found = await findings(migrated_url, keys_file)
        assert bad(found) in ([], [("keys in use", "warn")])
        return text_of(found, "keys in use")

    assert f"{old.id} makes; 0 live tokens and kept answers so far" in await told(old)
    issue(old.id)
    assert f"{old.id} makes; 1 live token or kept answer so far" in await told(old)
    text = await told(old, new)
    assert (
        f"{new.id} checks, and no live token or kept answer needs it: `onetime keys switch {new.id}` if it is new"
        in text
    )
    text = await told(new, old)
    assert f"{old.id} checks 1 live token or kept answer until" in text
    assert f"1 live token or kept answer made under key {old.id}, which the ring does not have" in await told(new)
    database.execute("update auth.one_time_tokens set created_at = created_at - interval '1 d'")
    issue(new.id)
    text = await told(new, old)
    assert f"`onetime keys retire {old.id}` if it is old" in text
    assert f"{new.id} makes; 1 live token or kept answer so far" in text
    assert old.id not in await told(new)
    assert not any(Keyring([key]).format().split()[1] in text for key in (old, new))


async def test_a_key_that_receipts_need(migrated_url: str, tmp_path: Path, database: Database) -> None:
    """A retry under a key that is gone would be told REQUEST_ID_REUSED: the key stays until its answers are dropped."""
    old, new = new_key(), new_key()
    keys_file = tmp_path / "keys"
    keys_file.touch(0o600)
    keys_file.write_text(Keyring([new, old]).format(), "ascii")
    database.execute(
        "insert into onetime.receipts (caller, rpc, request_id, fingerprint, created_at)"
        " select 'tests', 'VerifyCode', gen_random_uuid(), %s, clock_timestamp() - minutes * interval '1 minute'"
        " from unnest(array[1, 2, 16]) as minutes",
        [Keyring([old]).fingerprint(b"x")],
    )
    told = text_of(await findings(migrated_url, keys_file), "keys in use")
    assert f"{old.id} checks 2 live tokens and kept answers until" in told
    told = text_of(await findings(migrated_url, keys_file, receipt_retention="17m"), "keys in use")
    assert f"{old.id} checks 3 live tokens and kept answers until" in told
    database.execute("delete from onetime.receipts where created_at > clock_timestamp() - interval '15 minutes'")
    told = text_of(await findings(migrated_url, keys_file), "keys in use")
    assert f"{old.id} checks, and no live token or kept answer needs it" in told


async def test_subjects_that_are_stopped(migrated_url: str, keys_file: Path, database: Database) -> None:
    """Somebody is guessing: a warning with the number."""
    database.execute(
        "insert into onetime.budgets (user_id, purpose, failures, failures_in_a_row)"
        " select gen_random_uuid(), 'recovery_token', array[now()], n from generate_series(98, 101) as n"
    )
    found = await findings(migrated_url, keys_file)
    assert bad(found) == [("limits", "warn")]
    assert "2 users had" in text_of(found, "limits")


async def test_a_large_table_without_an_index_on_users(migrated_url: str, keys_file: Path, database: Database) -> None:
    """From some hundred thousand rows on, the deletion of a user wants an index."""
    database.execute("update pg_class set reltuples = 1e6 where oid = 'public.email_verification_tokens'::regclass")
    found = await findings(migrated_url, keys_file)
    assert bad(found) == [("index", "warn")]
    assert "1000000 rows" in text_of(found, "index")
    assert "PurgeUser may not end in the 4 s" in text_of(found, "index")
    database.execute("create index on public.email_verification_tokens (user_id)")
    database.execute("update pg_class set reltuples = 1e6 where oid = 'public.email_verification_tokens'::regclass")
    assert bad(await findings(migrated_url, keys_file)) == []


def own_address() -> str | None:
    """Return an address of this machine that is not its loopback, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))  # sends nothing: it chooses the address to send from
        except OSError:
            return None
        address: str = one.getsockname()[0]
        return None if address.startswith("127.") else address


@pytest.fixture(scope="module")
def neglected_url() -> Iterator[str]:
    """A server of its own, which lets few in, and vacuums nothing."""
    settings = {
        "max_connections": "12",
        "superuser_reserved_connections": "2",
        "autovacuum": "off",
        "wal_level": "logical",
    }
    with (
        tempfile.TemporaryDirectory(prefix="onetime-neglected-") as folder,
        embedded_postgres(Path(folder), settings=settings) as url,
    ):
        asyncio.run(_prepare(url))
        yield url


async def _prepare(url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, row_factory=dict_row) as connection:
        await migrate(connection)


async def test_a_neglected_server(neglected_url: str, keys_file: Path) -> None:
    """Too few connections, no vacuum, and a synchronous standby that is not there."""
    found = await findings(neglected_url, keys_file)
    assert bad(found) == [("operation", "warn")] * 2
    told = text_of(found, "operation")
    assert "lets 10 connections in, and each server takes 9" in told
    assert "autovacuum is off" in told
    found = await findings(neglected_url, keys_file, smtp_url="smtp://127.0.0.1:1", mail_from="no-reply@example.com")
    assert "each server takes 11" in text_of(found, "operation")
    with psycopg.connect(neglected_url, autocommit=True) as connection:
        try:
            connection.execute("alter system set synchronous_standby_names = 'nosuch'")
            connection.execute("select pg_reload_conf()")
            await asyncio.sleep(0.5)
            found = await findings(neglected_url, keys_file)
        finally:
            connection.execute("alter system reset synchronous_standby_names")
            connection.execute("select pg_reload_conf()")
    assert ("operation", "fail") in bad(found)
    assert "every write will be OUTCOME_UNKNOWN" in text_of(found, "operation")


@contextmanager
def replicating(url: str, command: str, name: str) -> Iterator[None]:
    """Take what a server sends to a standby, a subscriber or a tool, by a command of the replication protocol."""
    kind = "database" if "LOGICAL" in command else "true"
    with closing(psycopg.connect(url, autocommit=True, replication=kind, application_name=name)) as connection:
        result = connection.pgconn.exec_(command.encode())
        assert result.status == ExecStatus.COPY_BOTH, result.error_message
        yield
        with psycopg.connect(url) as other:
            other.execute("select pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])  # and waits


async def test_only_standbys_are_standbys(neglected_url: str, keys_file: Path) -> None:
    """A consumer of changes and a base backup are nothing that a failover goes to; a standby is."""

    async def told() -> str:
        return text_of(await findings(neglected_url, keys_file), "operation")

    with psycopg.connect(neglected_url, autocommit=True) as connection:
        connection.execute("create publication of_changes")
        connection.execute("select pg_create_logical_replication_slot('changes', 'pgoutput')")
        [(at,)] = connection.execute("select pg_current_wal_flush_lsn()").fetchall()
        changes = "START_REPLICATION SLOT changes LOGICAL 0/0 (proto_version '1', publication_names 'of_changes')"
        standby = f"START_REPLICATION PHYSICAL {at}"
        with replicating(neglected_url, changes, "consumer"), replicating(neglected_url, standby, "pg_basebackup"):
            assert connection.execute("select count(*) from pg_stat_replication").fetchall() == [(2,)]
            assert "replication is asynchronous" not in await told()
        with replicating(neglected_url, standby, "standby"):
            assert "replication is asynchronous" in await told()


async def test_a_pooler(migrated_url: str, keys_file: Path, database: Database) -> None:
    """Behind one the connection's process is another than it says. How it pools is not to be seen from here."""
    database.execute("create schema pooled")
    database.execute("create function pooled.pg_backend_pid() returns int language sql return 0")
    name = sql.Identifier(database.info.dbname)
    database.execute(sql.SQL("alter database {} set search_path = pooled, pg_catalog, public").format(name))
    found = await findings(migrated_url, keys_file)
    assert bad(found) == [("operation", "warn")]
    assert "if it pools by transaction" in text_of(found, "operation")


@pytest.fixture
def lesser_role(migrated_url: str, database: Database) -> Iterator[str]:
    """The URL of a database for a role that lacks one privilege, on a server that has not all functions."""
    name = f"lesser_{os.getpid()}"
    role = sql.Identifier(name)
    database.execute(sql.SQL("create role {} login").format(role))
    database.execute(sql.SQL("grant usage on schema auth, public, onetime to {}").format(role))
    database.execute(sql.SQL("grant all on all tables in schema auth, public, onetime to {}").format(role))
    database.execute(sql.SQL("revoke select on onetime.budgets from {}").format(role))
    yield migrated_url.replace("://onetime@", f"://{name}@")
    database.execute(sql.SQL("drop owned by {}").format(role))
    database.execute(sql.SQL("drop role {}").format(role))


async def test_a_privilege_that_is_missing(lesser_role: str, keys_file: Path, database: Database) -> None:
    """The grant that cures is told, whatever else cannot be looked at; with it, and no more, all is well."""
    # As in PostgreSQL 14, which has no such function.
    database.execute("alter function has_parameter_privilege(name, text, text) rename to of_later_versions")
    found = await findings(lesser_role, keys_file)
    assert bad(found) == [("trust", "fail"), ("server log", "fail")]
    [trust] = [finding for finding in found if finding.check == "trust"]
    assert trust.cure.startswith("grant select on onetime.budgets to ")
    assert "has_parameter_privilege(name, text, unknown) does not exist" in text_of(found, "server log")
    assert {"migrations", "schema"} <= {finding.check for finding in found}
    database.execute(trust.cure)
    found = await findings(lesser_role, keys_file)
    assert bad(found) == [("server log", "fail")]
    assert "keys in use" in {finding.check for finding in found}


async def test_a_connection_that_is_lost(migrated_url: str, keys_file: Path, database: Database) -> None:
    """What was found before is told, and that the connection is lost, once: nothing more can be asked."""
    found = []
    async for finding in examine(Settings(database_url=migrated_url, keys_file=keys_file)):
        found.append(finding)
        if finding.check == "trust":
            database.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name = 'onetime doctor'"
                " and datname = current_database()"
            )
    assert bad(found) == [("database", "fail")]
    assert [finding.check for finding in found][-2:] == ["trust", "database"]


async def test_plain_text_on_the_way_to_the_database(migrated_url: str, keys_file: Path) -> None:
    """Not from this machine to itself, but over a network it is a failure."""
    address = own_address()
    if address is None:
        reason = "this machine has no address but its loopback"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    for host, expected in ((address, [("database TLS", "fail")]), ("127.0.0.1", [])):
        proxy = Proxy(migrated_url)
        async with proxy.run(host):
            assert bad(await findings(proxy.url, keys_file)) == expected
