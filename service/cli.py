"""The command `onetime`: its commands, their options and help, and what they say and exit with.

It owns the terminal and the file of keys. Exit codes: 0 for success, 1 for a problem that was found or a failure, 2 for
wrong usage or settings. What goes wrong is one message on standard error, without a traceback.

It knows nothing of calls and tables.
"""

import asyncio
import contextlib
import fcntl
import importlib.metadata
import inspect
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Never, TypeVar
from uuid import UUID, uuid4

import click
import psycopg
import uvloop
from onetime.v1 import email_verification_pb2, one_time_tokens_pb2
from psycopg.rows import dict_row

from service import logs, migrations
from service.budgets import EMAIL_VERIFICATION
from service.config import (
    ENV_PREFIX,
    IDENTIFYING,
    MailServer,
    Settings,
    SettingsError,
    describe,
    exposed_passwords,
    load,
    option_of,
    parse_smtp_url,
    variable_of,
)
from service.crypto import Keyring, api_key_hash, certificate_host, new_api_key, new_key
from service.db import Database
from service.devdb import EmbeddedPostgresError, embedded_postgres
from service.errors import OnetimeError
from service.fields import STORED_TYPES, mailbox

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130  # as shells have it: 128 + SIGINT

_CONNECT_TIMEOUT_S: Final = 5
_HEALTH_TIMEOUT_S: Final = 3

_EXAMPLE_USER: Final = "7d4f0f6a-3c1e-4b7e-9a55-0d2f6c1b8e21"

_Function = TypeVar("_Function", bound=Callable[..., Any])


class CommandError(Exception):
    """A command that cannot do what it is asked to. The text is for a terminal, and says what helps."""


# Options


class _SettingOption(click.Option):
    """An option that stands for a setting. A class because help is grouped by what it carries."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:  # noqa: ANN401 - click's own
        """Take the section of the help text that the option belongs to."""
        super().__init__(*args, **kwargs)
        self.section = section


def _keep_examples(help_text: str | None) -> str:
    """Mark the paragraphs with indented lines as those that click must not wrap."""
    paragraphs = inspect.cleandoc(help_text or "").split("\n\n")
    return "\n\n".join(f"\b\n{each}" if "\n  " in f"\n{each}" else each for each in paragraphs)


class _Group(click.Group):
    """A group of commands with examples in its help. A class because click asks for one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - click's own
        """Take what click takes."""
        super().__init__(*args, **kwargs)
        self.help = _keep_examples(self.help)


class _Command(click.Command):
    """A command with examples in its help, and its settings in sections. A class because click asks for one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - click's own
        """Take what click takes."""
        super().__init__(*args, **kwargs)
        self.help = _keep_examples(self.help)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of the command itself first."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                title = parameter.section if isinstance(parameter, _SettingOption) else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _settings(*names: str) -> Callable[[_Function], _Function]:
    """Give a command an option for each of these settings, and for the file that may hold them.

    The options are not checked here: `config.load` tells everything that is wrong at once.
    """

    def decorate(function: _Function) -> _Function:
        for setting in reversed(describe()):
            if setting.option and setting.name in (*names, "config"):
                default = f"  [default: {setting.default}]" if setting.default else ""
                function = click.option(
                    setting.option,
                    setting.name,
                    cls=_SettingOption,
                    section=setting.group,
                    metavar=setting.unit if setting.unit == "KiB" else (setting.unit or "value").upper(),
                    help=f"{setting.description}{default}",
                )(function)
        return function

    return decorate


def _load(
    options: Mapping[str, str | None],
    *,
    require: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
    plain_text: bool = False,
) -> Settings:
    """Read the settings, and warn of passwords that everybody can read."""
    given = {name: value for name, value in options.items() if value is not None}
    for warning in exposed_passwords(given):
        click.echo(f"warning: {warning}", err=True)
    return load(given, require=require, defaults=defaults, plain_text=plain_text)


_CALLERS: Final = tuple(setting.name for setting in describe() if setting.group == "Callers")
"""What `serve` alone takes: `dev` asks nobody who they are."""

_SERVING: Final = tuple(
    setting.name
    for setting in describe()
    if setting.name not in ("database_url", "data_dir", "keys", "config", *_CALLERS)
)
"""What both `dev` and `serve` take."""

_EPILOG: Final = f"""
Each option in a section of its own is a setting. It may be set in the environment too (--max-attempts as
{ENV_PREFIX}MAX_ATTEMPTS) or in a TOML file named by --config (max_attempts = 5). The command line goes before the
environment, and that before the file.
"""


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `onetime dev`: it needs nothing else.",
)
@click.version_option(importlib.metadata.version("onetime"), prog_name="onetime")
def cli() -> None:
    """One-time tokens and email verification codes, over gRPC, with their state in PostgreSQL.

    Try it on this machine:
      onetime dev

    Run it on a database of yours:
      onetime keys init --keys-file keys
      export ONETIME_KEYS_FILE=keys ONETIME_DATABASE_URL=postgresql://onetime@localhost/app
      onetime migrate
      onetime doctor
      onetime serve --insecure-loopback

    To let others than this machine's own call it, `onetime serve --help`.
    """


# dev and serve


@cli.command(cls=_Command, epilog=_EPILOG)
@_settings("data_dir", *_SERVING)
def dev(**options: str | None) -> None:
    """Serve with all that it takes, for development: an embedded PostgreSQL, new keys, reflection.

    Database and keys stay in the data folder from one run to the next. Calls are plain text, from this machine only.

    Examples:
      onetime dev
      onetime dev --listen 127.0.0.1:50052 --data-dir /tmp/other
      onetime dev --max-attempts 3 --recovery-lifetime 2m --recovery-max-ttl 10m
    """
    # Nobody balances load over it, so nobody needs to be told before it stops.
    settings = _load(options, defaults={"drain_delay": timedelta(0)}, plain_text=True)
    logs.configure(settings.log_level.upper(), sys.stderr)
    if os.environ.get(variable_of("database_url")):
        click.echo(f"onetime dev brings its own database: {variable_of('database_url')} is not used", err=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Until the server heeds signals itself: so that the database that was started is stopped.
        signal.signal(number, _end)
    with embedded_postgres(settings.data_dir) as url:
        keys_file = settings.keys_file
        if settings.keys is None and keys_file is None:
            keys_file = settings.data_dir / "keys"
            if not keys_file.exists():
                _write_keys(keys_file, Keyring([new_key()]).format(), replace=False)
        ready = settings.model_copy(update={"database_url": url, "keys_file": keys_file})
        # Not become a new process if gRPC can serve no more: the database is this one's.
        _run_server(ready, plain_text=True, migrate=True, on_ready=lambda target: _greet(ready, target), daemon=False)


def _end(number: int, frame: object) -> Never:
    del frame
    raise SystemExit(128 + number)


def _greet(settings: Settings, target: str) -> None:
    """Say where it is, and how to try it."""
    one_time_tokens, email_verification = (
        file.DESCRIPTOR.services_by_name[name].full_name
        for file, name in (
            (one_time_tokens_pb2, "OneTimeTokenService"),
            (email_verification_pb2, "EmailVerificationService"),
        )
    )
    heading = f"onetime {importlib.metadata.version('onetime')} is ready at {target}"
    calls = (
        (
            f"{one_time_tokens}/IssueToken",
            {"user_id": _EXAMPLE_USER, "token_type": "TOKEN_TYPE_RECOVERY", "relates_to": "ada@example.com"},
        ),
        (
            f"{one_time_tokens}/ConsumeToken",
            {"token_type": "TOKEN_TYPE_RECOVERY", "link_secret": "<the secret that came back>"},
        ),
        (f"{email_verification}/StartEmailVerification", {"user_id": _EXAMPLE_USER, "return_code": {}}),
    )
    tries = "\n\n".join(
        f"  grpcurl -plaintext -d '{json.dumps(message)}' \\\n    {target} {method}" for method, message in calls
    )
    lines = f"""
{click.style(heading, bold=True)}

  database   {settings.database_url}
  data       {settings.data_dir.resolve()}
  callers    anyone on this machine, in plain text: for development only

Try it:

  grpcurl -plaintext {target} list

{tries}

Ctrl-C stops it; what it stored stays."""
    click.echo(lines.lstrip("\n"))


@cli.command(cls=_Command, epilog=_EPILOG)
@click.option(
    "--insecure-loopback",
    is_flag=True,
    help="Serve plain text on loopback, to callers whom nobody asks who they are, instead of the settings of Callers.",
)
@click.option(
    "--migrate/--no-migrate",
    "migrates",
    default=True,
    show_default=True,
    help="Migrate the database first. Without, the role that serves needs no right to create anything.",
)
@_settings("database_url", *_SERVING, *_CALLERS)
def serve(*, insecure_loopback: bool, migrates: bool, **options: str | None) -> None:
    r"""Serve from a database of yours, to callers whom a policy names.

    Callers come over TLS, with a client certificate (its URI or DNS name is the caller) or with an API key that
    `onetime keys api` has made. The policy is a TOML file:

      [callers."spiffe://example.org/accounts"]
      rpcs = ["OneTimeTokenService/*", "EmailVerificationService/VerifyCode"]
      token_types = ["TOKEN_TYPE_RECOVERY"]     # "*" for all

      [callers.signup]
      api_keys = ["sha256:..."]                 # two while one takes the other's place
      rpcs = ["EmailVerificationService/*"]
      return_code = true                        # it mails codes itself
      send_email = false                        # it has codes mailed
      any_caller = false                        # it sees the verifications that others started

    What is not granted is refused. Policy, certificates and the file of keys are read again when they change, within
    seconds; of a broken one the log tells, and what was read before stays in force.

    The first SIGTERM or SIGINT lets calls under way end, a second one ends at once.

    Examples:
      onetime serve --insecure-loopback --database-url postgresql:///app --keys-file keys
      ONETIME_CONFIG=onetime.toml onetime serve --no-migrate
      onetime serve --config onetime.toml --listen 0.0.0.0:50051 --policy-file policy.toml \
        --tls-cert server.pem --tls-key server.key --tls-client-ca clients.pem
    """
    require = ("database_url", "keys", *(() if insecure_loopback else IDENTIFYING))
    settings = _load(options, require=require, plain_text=insecure_loopback)
    logs.configure(settings.log_level.upper(), sys.stderr)
    _run_server(settings, plain_text=insecure_loopback, migrate=migrates, on_ready=lambda _: None, daemon=True)


def _run_server(
    settings: Settings, *, plain_text: bool, migrate: bool, on_ready: Callable[[str], None], daemon: bool
) -> None:
    """Serve until a signal. A daemon outlives its terminal, and starts again where it can serve no more."""
    # gRPC alone takes as long to import as the rest: the other commands do without.
    from service import app  # noqa: PLC0415

    def hang_up() -> None:
        # To a daemon it means "read your files again", which is done when they change.
        if not daemon:
            os.kill(os.getpid(), signal.SIGTERM)

    def start_again() -> None:
        """Become a new process, of the same number, with the same arguments and environment."""
        if daemon:
            sys.stderr.flush()
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - no shell, and our own arguments

    async def run() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
        await app.serve(settings, plain_text=plain_text, migrate=migrate, on_ready=on_ready, on_lost=start_again)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    except app.StartError as error:
        raise CommandError(str(error)) from error


# migrate, cleanup, unlock and doctor


@contextlib.asynccontextmanager
async def _connection(settings: Settings) -> Any:  # noqa: ANN401 - see migrations.Connection
    """Yield a connection to the database."""
    try:
        connection = await psycopg.AsyncConnection.connect(
            settings.database_url,
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT_S,
            application_name="onetime",
            row_factory=dict_row,
        )
    except psycopg.OperationalError as error:
        reason = logs.scrubbed(str(error).partition("\n")[0], None)
        raise CommandError(f"the database is not to be had: {reason}; check database_url, and that it runs") from error
    async with connection:
        yield connection


@cli.command(cls=_Command, epilog=_EPILOG)
@_settings("database_url")
def migrate(**options: str | None) -> None:
    """Bring the database to the state that this version needs, whole or not at all.

    Tables that are there already are taken over if they are as documented; otherwise every difference is listed, and
    nothing is changed. To run it again does no harm.

    Example:
      onetime migrate --database-url postgresql://owner@localhost/app
    """
    settings = _load(options, require=("database_url",))
    report = asyncio.run(_migrate(settings))
    for verb, names in (("created", report.created), ("took over", report.adopted), ("applied", report.applied)):
        for name in names:
            click.echo(f"{verb} {name}")
    for sentence in report.tolerated:
        click.echo(f"note: {sentence}")
    if not (report.created or report.adopted or report.applied):
        click.echo("the database is up to date")


async def _migrate(settings: Settings) -> migrations.MigrationReport:
    async with _connection(settings) as connection:
        return await migrations.migrate(connection)


@cli.command(cls=_Command, epilog=_EPILOG)
@_settings("database_url", "retention", "receipt_retention")
def cleanup(**options: str | None) -> None:
    """Remove everything that has expired, at once.

    The server does the same in passing, a little after each write: this is for impatience, and for a database that
    nobody writes to any more. It waits for nobody's lock, and nobody waits for it.

    Example:
      onetime cleanup --retention 1h
    """
    settings = _load(options, require=("database_url",))
    removed = asyncio.run(_cleanup(settings))
    width = max(len(table) for table in removed)
    for table, rows in removed.items():
        click.echo(f"{table:{width}}  {rows:>8} {'row' if rows == 1 else 'rows'} removed")


async def _refuse_if_pending(settings: Settings) -> None:
    """Refuse a database that is not as this version needs it."""
    async with _connection(settings) as connection:
        pending = await migrations.pending(connection)
    if pending:
        listed = "".join(f"\n  {what}" for what in pending)
        raise CommandError(f"the database is not up to date; `onetime migrate` helps:{listed}")


async def _cleanup(settings: Settings) -> Mapping[str, int]:
    from service import cleanup as sweeping  # noqa: PLC0415 - it registers metrics, which the other commands do without

    await _refuse_if_pending(settings)
    with click.progressbar(length=1, label="blocks", show_pos=True, file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        return await sweeping.sweep_all(settings, advance)


_PURPOSES: Final = (*STORED_TYPES.values(), EMAIL_VERIFICATION)


@cli.command(cls=_Command, epilog=_EPILOG)
@click.argument("user_id", metavar="USER", type=click.UUID)
@click.argument("purpose", metavar="PURPOSE", type=click.Choice(_PURPOSES))
@_settings("database_url")
def unlock(user_id: UUID, purpose: str, **options: str | None) -> None:
    """Let codes of a user be tried and sent again, before the limits would.

    USER is the user's UUID, PURPOSE one of those below. Wrong codes are forgotten, and sends but for the newest. A
    token on which too many wrong codes were tried stays refused: issue a new one.

    Purposes:
      confirmation_token
      reauthentication_token
      recovery_token
      email_change_token_new
      email_change_token_current
      phone_change_token
      email_verification

    Example:
      onetime unlock 7d4f0f6a-3c1e-4b7e-9a55-0d2f6c1b8e21 recovery_token
    """
    settings = _load(options, require=("database_url",))
    count = asyncio.run(_unlock(settings, user_id, purpose))
    click.echo(f"unlocked: {count} wrong {'code' if count == 1 else 'codes'} in a row forgotten")


async def _unlock(settings: Settings, user_id: UUID, purpose: str) -> int:
    from service import admin  # noqa: PLC0415 - as in `_run_server`

    await _refuse_if_pending(settings)
    database = Database(settings.database_url, pool_size=1)
    await database.open()
    try:
        return await admin.unlock(database, user_id, purpose)
    finally:
        await database.close()


@cli.command(cls=_Command, epilog=_EPILOG)
@_settings("database_url", *_SERVING, *_CALLERS)
def doctor(**options: str | None) -> None:
    """Look at settings, keys and database, and tell what is wrong and what helps.

    A line for each check; it only reads. The exit code is 1 if a check fails; a warning is no failure.

    Example:
      ONETIME_CONFIG=onetime.toml onetime doctor
    """
    try:
        settings = _load(options, require=("database_url",))
    except SettingsError as error:
        for problem in error.problems:
            _show("settings", "fail", problem)
        raise SystemExit(FAILED) from None
    _show("settings", "ok", "every setting is right")
    if asyncio.run(_examine(settings)):
        raise SystemExit(FAILED)


async def _examine(settings: Settings) -> bool:
    """Show the findings as they come, and return whether any check failed."""
    from service import doctor as checks  # noqa: PLC0415 - as in `_run_server`

    failed = False
    async for finding in checks.examine(settings):
        failed |= finding.verdict == "fail"
        _show(finding.check, finding.verdict, finding.text, finding.cure)
    return failed


_COLORS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


def _show(check: str, verdict: str, text: str, cure: str = "") -> None:
    """Write the line of a check."""
    helps = f" -> {cure}" if cure else ""
    click.echo(f"{click.style(f'{verdict:4}', fg=_COLORS[verdict])}  {check:12}  {text}{helps}")


@cli.command(cls=_Command, epilog=_EPILOG)
@_settings("listen", "health_listen", "tls_cert")
def health(**options: str | None) -> None:
    """Ask a running server on this machine whether it serves; the exit code is 0 if it does.

    For the health checks of containers. It asks at --health-listen if that is set; otherwise at --listen, over TLS if
    there is a --tls-cert, which it trusts and no other.

    Examples:
      onetime health --listen 127.0.0.1:50051
      onetime health --health-listen 127.0.0.1:50052
    """
    settings = _load(options)
    target = settings.health_listen or settings.listen
    # As in `_run_server`.
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    with _health_channel(settings, target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)  # type: ignore[attr-defined] # not in types-grpcio
        except grpc.RpcError as error:
            raise CommandError(f"no answer from {target}: {error.code().name}") from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    click.echo(status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(FAILED)


def _health_channel(settings: Settings, target: str) -> Any:  # noqa: ANN401 - grpc is imported late
    """Open a channel to where health is served."""
    import grpc  # noqa: PLC0415 - as above

    if settings.health_listen or settings.tls_cert is None:
        return grpc.insecure_channel(target)
    if settings.tls_client_ca is not None:
        raise CommandError(
            f"{target} wants a client certificate, which this command has not: set {option_of('health_listen')}, where"
            " health alone is served, in plain text"
        )
    try:
        certificate = settings.tls_cert.read_bytes()
        # The server is on this machine, under an address that its certificate need not name.
        host = certificate_host(certificate)
    except OSError as error:
        raise CommandError(f"{option_of('tls_cert')} {settings.tls_cert}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{option_of('tls_cert')} {settings.tls_cert}: {error}") from None
    credentials = grpc.ssl_channel_credentials(certificate)
    return grpc.secure_channel(target, credentials, options=[("grpc.ssl_target_name_override", host)])


# mail

_SAMPLE_CODE: Final = "123456"
_SAMPLE_ADDRESS: Final = "ada@example.com"
_MAIL_WORDS: Final = ("mail_from", "mail_product", "mail_locale", "mail_templates")


@cli.group(cls=_Group)
def mail() -> None:
    """See the mails that carry codes, and try the mail server.

    Codes are mailed for StartEmailVerification with send_email, if there is an --smtp-url.
    """


@mail.command("preview", cls=_Command, epilog=_EPILOG)
@click.option("--locale", metavar="LANGUAGE", help="Of this language only, or the one that it falls back to.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mail-preview"),
    show_default=True,
    help="The folder to write to.",
)
@_settings(*_MAIL_WORDS)
def mail_preview(locale: str | None, out: Path, **options: str | None) -> None:
    """Write the mails that would be sent, with a code made up: LANGUAGE.eml, .html and .txt for each language.

    A folder of your own templates (--mail-templates) goes before ours, file by file:

      layout.html         the look of all languages
      de/subject.txt      one line, with the code
      de/body.txt         plain text, with the code
      de/body.html        HTML, with the code; ours fill the blocks of layout.html

    A language needs the three of its files, each from your folder or from ours. They are Jinja templates, with the
    variables code, product, minutes (that are left), language and direction (ltr or rtl). What is wrong with them is
    told here, and at the start of a server; changed ones are read at the next start.

    Examples:
      onetime mail preview --mail-product Example --locale de
      onetime mail preview --mail-templates templates --out /tmp/mails
    """
    settings = _load(options)
    templates = _templates(settings)
    languages = (templates.language(locale),) if locale else templates.languages
    try:
        out.mkdir(parents=True, exist_ok=True)
        for language in languages:
            content, message = _sample_mail(settings, templates, language, _SAMPLE_ADDRESS)
            for suffix, data in (
                (".eml", message.as_bytes()),
                (".html", content.html.encode()),
                (".txt", content.text.encode()),
            ):
                (out / f"{language}{suffix}").write_bytes(data)
            click.echo(f"{out / language}.eml, .html, .txt   {content.subject}")
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from None


@mail.command("test", cls=_Command, epilog=_EPILOG)
@click.argument("address", metavar="ADDRESS")
@click.option("--locale", metavar="LANGUAGE", default="", help="The language of the mail.")
@_settings("smtp_url", *_MAIL_WORDS)
def mail_test(address: str, locale: str, **options: str | None) -> None:
    """Send one mail to ADDRESS, with a code made up, by the mail server of --smtp-url.

    Example:
      ONETIME_SMTP_URL=smtps://onetime:...@mail.example.com onetime mail test ada@example.com
    """
    from service import smtp  # noqa: PLC0415 - as in `_run_server`

    settings = _load(options, require=("smtp_url",))
    try:
        to = mailbox(address)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ADDRESS") from None
    server = parse_smtp_url(settings.smtp_url or "")
    _, message = _sample_mail(settings, _templates(settings), locale, to)
    try:
        asyncio.run(_send_sample(settings, server, message, to))
    except smtp.NotSent as error:
        where = f"{server.host}:{server.port}"
        raise CommandError(f"{where} did not take the mail: {error}; {smtp.CURES[error.failure]}") from None
    click.echo(f"{server.host}:{server.port} has accepted the mail")


def _templates(settings: Settings) -> Any:  # noqa: ANN401 - `mail` is imported late
    from service.mail import Templates  # noqa: PLC0415 - as in `_run_server`

    try:
        return Templates(settings.mail_templates, locale=settings.mail_locale)
    except ValueError as error:
        raise SettingsError([f"mail_templates: {line}" for line in str(error).splitlines()]) from None


def _sample_mail(settings: Settings, templates: Any, locale: str, to: str) -> Any:  # noqa: ANN401 - as above
    """Return the content and the message of a mail as it would be sent."""
    from service.mail import compose  # noqa: PLC0415 - as above

    lifetime, _ = settings.lifetime(EMAIL_VERIFICATION)
    product = settings.mail_product
    content = templates.write(code=_SAMPLE_CODE, locale=locale, product=product, lifetime=lifetime)
    message = compose(
        content, product=product, sender=settings.mail_from, to=to, message_id=uuid4(), date=datetime.now(UTC)
    )
    return content, message


async def _send_sample(settings: Settings, server: MailServer, message: Any, to: str) -> None:  # noqa: ANN401 - as above
    from service import smtp  # noqa: PLC0415 - as above

    async def wanted() -> bool:
        return True

    try:
        transport = smtp.Transport(server, sender=settings.mail_from)
    except ValueError as error:
        raise SettingsError([f"smtp_url: {error}"]) from None
    try:
        await transport.send(message, to=to, wanted=wanted)
    finally:
        await transport.close()


# keys


@cli.group(cls=_Group)
def keys() -> None:
    """Make and change the file of keys.

    Every secret at rest is made under a key: without the keys, a dump of the database gives nothing; and without the
    keys, no token is accepted. Keep a copy of the file where the database's backups are not.

    The first key of the file makes, all of them check. Up to four fit in. To replace a key, change the file that every
    server has, step by step. Servers take a changed file within seconds; the metric onetime_keys tells which keys each
    of them has (with the keys in the environment, restart them):

      onetime keys add            a new key, which only checks
      onetime keys switch ID      now it makes
      onetime keys retire OLD     when the tokens made under the old one have expired

    The file has a key a line, `<id> <43 characters of base64url>`; `#` begins a comment. No command shows such a key.

    API keys are something else: `onetime keys api` makes one, for a caller, who is known by it.
    """


@keys.command("init", cls=_Command, epilog=_EPILOG)
@_settings("keys_file")
def keys_init(**options: str | None) -> None:
    """Make a file with one new key, for this user's eyes only. A file that is there stays as it is.

    Example:
      onetime keys init --keys-file /etc/onetime/keys
    """
    path = _keys_file(options)
    key = new_key()
    _write_keys(path, Keyring([key]).format(), replace=False)
    click.echo(f"made {path} with the key {key.id}")


@keys.command("list", cls=_Command, epilog=_EPILOG)
@_settings("keys_file")
def keys_list(**options: str | None) -> None:
    """List the ids of the keys, and which one makes."""
    _, ring = _read_keys(_keys_file(options))
    for key in ring.keys:
        click.echo(f"{key.id:16}  {'makes and checks' if key is ring.keys[0] else 'checks'}")


@keys.command("add", cls=_Command, epilog=_EPILOG)
@_settings("keys_file")
def keys_add(**options: str | None) -> None:
    """Add a new key, which only checks: the first step of replacing a key."""
    key = new_key()
    path = _keys_file(options)
    with _changing(path) as lines:
        lines.append(Keyring([key]).format())
    click.echo(f"added {key.id}, which checks; once every server has it, `onetime keys switch {key.id}`")


@keys.command("switch", cls=_Command, epilog=_EPILOG)
@click.argument("key_id", metavar="ID")
@_settings("keys_file")
def keys_switch(key_id: str, **options: str | None) -> None:
    """Let the key ID make from now on: the second step.

    Every server must have it already: one that has not refuses what the others make.
    """
    path = _keys_file(options)
    with _changing(path) as lines:
        line = lines.pop(_line_of(lines, key_id, path))
        first = next((number for number, other in enumerate(lines) if _id_in(other)), 0)
        lines.insert(first, line)
    click.echo(f"{key_id} makes, from when a server has read it")


@keys.command("retire", cls=_Command, epilog=_EPILOG)
@click.argument("key_id", metavar="ID")
@_settings("keys_file")
def keys_retire(key_id: str, **options: str | None) -> None:
    """Take the key ID out: the last step. What was made under it is refused from then on.

    `onetime doctor` tells how many rows still name a key that is not in the file.
    """
    path = _keys_file(options)
    with _changing(path) as lines:
        number = _line_of(lines, key_id, path)
        if not any(map(_id_in, lines[:number])):
            raise CommandError(f"{key_id} is the key that makes: `onetime keys switch` to another one first")
        lines.pop(number)
    click.echo(f"retired {key_id}")


@keys.command("api", cls=_Command)
def keys_api() -> None:
    """Make an API key for a caller, and show it this once: nothing is stored.

    The key goes to the caller, who sends it with each call as `authorization: Bearer KEY`, over TLS only. Its hash goes
    into the policy file, where one is right, and a second while it takes the first one's place. Whoever sees the policy
    has no key.

    Example:
      onetime keys api
    """
    key = new_api_key()
    click.echo(key)
    click.echo("\nThis is shown once. For the policy file, in the caller's table:\n", err=True)
    click.echo(f'  api_keys = ["{api_key_hash(key)}"]', err=True)


def _keys_file(options: Mapping[str, str | None]) -> Path:
    settings = _load(options, require=("keys_file",))
    if settings.keys_file is None:
        raise SettingsError([f"{option_of('keys_file')} is missing: a path is right"])
    # The file itself, so that a link to it stays one.
    return settings.keys_file.resolve()


def _read_keys(path: Path) -> tuple[str, Keyring]:
    """Return the text of a file of keys, and what it says."""
    try:
        text = path.read_text("ascii")
        return text, Keyring.parse(text)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}; `onetime keys init` makes it") from None
    except UnicodeDecodeError:
        # Its text quotes what it could not decode.
        raise CommandError(f"{path}: this is no file of keys") from None
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None


def _id_in(line: str) -> str:
    """Return the id of the key in a line, or nothing for a comment."""
    return (line.partition("#")[0].split() or [""])[0]


def _line_of(lines: list[str], key_id: str, path: Path) -> int:
    for number, line in enumerate(lines):
        if key_id and _id_in(line) == key_id:
            return number
    # Not quoted: whoever mixes up the two words of a line has put the key here.
    raise CommandError(f"{path} has no key of this id; `onetime keys list` shows the ids")


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[str]]:
    """Yield the lines of a file of keys to be changed, comments and all, and write them if they are still a ring."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CommandError(f"{path.parent}: {error.strerror}") from None
    try:
        # Two changes at once would each write without the other's: a key that is lost takes its tokens with it.
        fcntl.flock(folder, fcntl.LOCK_EX)
        text, _ = _read_keys(path)
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        yield lines
        try:
            Keyring.parse("".join(lines))
        except ValueError as error:
            raise CommandError(f"{path} would not be right: {error}") from None
        _write_keys(path, "".join(lines), replace=True)
    finally:
        os.close(folder)


def _write_keys(path: Path, text: str, *, replace: bool) -> None:
    """Write a file of keys, whole or not at all, for its owner's eyes only.

    Raises:
        CommandError: The file is there and is not to be replaced, or cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=".keys-", dir=path.parent)
    except OSError as error:
        raise CommandError(f"{path.parent}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fchmod(handle, 0o600)  # which it is already, unless a umask takes even that
            if replace:
                # The service's account may own it, and whoever runs this be root.
                owner = path.stat()
                if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(handle, owner.st_uid, owner.st_gid)
            os.fsync(handle)
        if replace:
            Path(temporary).replace(path)
        else:
            # Unlike a rename, a link never replaces what is there.
            path.hardlink_to(temporary)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise CommandError(f"{path} is there already, and tokens were made under its keys: it stays as it is") from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


# The entry


def main() -> Never:
    """Run the command line, and exit."""
    sys.exit(_run())


def _run() -> int:
    """Run the command line and return its exit code. Every error of ours becomes one message here."""
    try:
        result = cli.main(prog_name="onetime", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except SettingsError as error:
        return _fail(str(error), USAGE)
    except (CommandError, EmbeddedPostgresError, migrations.MigrationRefused, OnetimeError) as error:
        return _fail(str(error), FAILED)
    except Exception as error:  # noqa: BLE001 - the last resort, and the driver's own words would quote rows
        return _fail(f"this is a bug of onetime:\n{logs.traceback_text(error, None)}", FAILED)
    return result if isinstance(result, int) else 0


def _fail(text: str, code: int) -> int:
    click.echo(f"onetime: {text}", err=True)
    return code
