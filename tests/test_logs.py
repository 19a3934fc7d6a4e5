import asyncio
import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

import psycopg
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FieldOptions, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from onetime.v1 import email_verification_pb2 as ev
from onetime.v1 import one_time_tokens_pb2 as ott
from psycopg.pq import DiagnosticField

from service import logs
from service.call import Call, current_call

ADDRESS: Final = "ada@example.org"
TOKEN: Final = "dG9rZW4tb2YtdGhlLWZyb250ZW5k"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Give what is logged, as the service logs it."""
    ours, root = logging.getLogger("service"), logging.getLogger()
    levels = ours.level, root.level
    stream = io.StringIO()
    logs.configure("INFO", stream)
    yield stream
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, logs.Lines)]:
        root.removeHandler(handler)
    ours.setLevel(levels[0])
    root.setLevel(levels[1])


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return what was logged."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def one(stream: io.StringIO) -> dict[str, Any]:
    """Return the only line."""
    (line,) = lines(stream)
    return line


@contextlib.contextmanager
def serving(request: Message) -> Iterator[None]:
    """Let a request be served."""
    token = current_call.set(Call("service", "method", "id", request=request))
    yield
    current_call.reset(token)


# Lines


def test_a_line_is_json_in_utc(stream: io.StringIO) -> None:
    """A line is one JSON object in ASCII, with its time in UTC, its level, its event, and what it carries."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    logging.getLogger("service.part").info("two\nlines of %s", "Zoë", extra={"count": 3, "what": "\x1b[31m"})
    line = one(stream)
    assert before <= datetime.fromisoformat(line.pop("time")) <= datetime.now(UTC)
    assert line == {
        "level": "INFO",
        "logger": "service.part",
        "event": "two\nlines of Zoë",
        "count": 3,
        "what": "\x1b[31m",
    }
    assert stream.getvalue().isascii()
    assert "\x1b" not in stream.getvalue()
    assert re.search(r'"time":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"', stream.getvalue())


def test_a_line_tells_the_millisecond(stream: io.StringIO) -> None:
    """Lines of one second differ in their milliseconds, of which there are three digits; the next second is another."""
    for milliseconds in (0, 5, 50, 999, 1000, 60_001):
        record = logging.LogRecord("service", logging.INFO, "", 0, "event", (), None)
        record.created, record.msecs = 1_800_000_000 + milliseconds // 1000, milliseconds % 1000
        logging.getLogger("service").handle(record)
    told = ["00:00.000", "00:00.005", "00:00.050", "00:00.999", "00:01.000", "01:00.001"]
    assert [line["time"] for line in lines(stream)] == [f"2027-01-15T08:{each}Z" for each in told]


@pytest.mark.parametrize("library", ["grpc._cython.cygrpc", "psycopg", "psycopg.pool", "asyncio"])
def test_libraries_are_heard_from_warning_on(stream: io.StringIO, library: str) -> None:
    """Libraries' warnings are in the log, and what they say below that is not."""
    logging.getLogger(library).info("chatter")
    logging.getLogger(library).warning("trouble")
    assert one(stream)["event"] == "trouble"


@pytest.mark.parametrize(("level", "events"), [("DEBUG", ["d", "i", "e"]), ("INFO", ["i", "e"]), ("ERROR", ["e"])])
def test_our_level_is_what_was_asked_for(stream: io.StringIO, level: str, events: list[str]) -> None:
    """Ours are logged from the level on that was asked for, once, however often that is done."""
    logs.configure(level, io.StringIO())
    logs.configure(level, stream)
    logger = logging.getLogger("service.part")
    logger.debug("d")
    logger.info("i")
    logger.error("e")
    assert [line["event"] for line in lines(stream)] == events


# Requests


def test_what_is_shown_of_a_request() -> None:
    """Fields that are set are shown, enums by name, without the value of any that the contract marks."""
    request = ott.IssueTokenRequest(
        user_id="0b7c8a52-2c0f-4d2c-8d59-0a7c5f1f1d0e",
        token_type=ott.TOKEN_TYPE_RECOVERY,
        relates_to=ADDRESS,
        secret_format=cast("Any", 77),
        ttl=Duration(seconds=60),
    )
    assert logs.redacted(request) == {
        "user_id": "0b7c8a52-2c0f-4d2c-8d59-0a7c5f1f1d0e",
        "token_type": "TOKEN_TYPE_RECOVERY",
        "relates_to": "[redacted]",
        "secret_format": 77,
        "ttl": {"seconds": 60},
    }


def test_nested_messages_oneofs_and_lists() -> None:
    """Marked fields are found in nested messages, in oneofs and in lists."""
    nested = ott.ConsumeTokenRequest(code=ott.CodeCredential(user_id="the user", code="123456"))
    assert logs.redacted(nested) == {"code": {"user_id": "[8 characters]", "code": "[redacted]"}}
    oneof = ev.GetEmailVerificationRequest(email_verification_token=TOKEN)
    assert logs.redacted(oneof) == {"email_verification_token": "[redacted]"}
    deeper = ev.StartEmailVerificationRequest(send_email=ev.SendEmail(email=ADDRESS, locale="en"))
    assert logs.redacted(deeper) == {"send_email": {"email": "[redacted]", "locale": "en"}}
    messages = ott.ListTokensResponse(tokens=[ott.OneTimeToken(id="a", relates_to=ADDRESS), ott.OneTimeToken(id="b")])
    assert logs.redacted(messages) == {"tokens": [{"id": "a", "relates_to": "[redacted]"}, {"id": "b"}]}
    enums = ott.RevokeTokensRequest(token_types=[ott.TOKEN_TYPE_RECOVERY, ott.TOKEN_TYPE_CONFIRMATION])
    assert logs.redacted(enums) == {"token_types": ["TOKEN_TYPE_RECOVERY", "TOKEN_TYPE_CONFIRMATION"]}


@pytest.mark.parametrize(
    "text", [ADDRESS, TOKEN, TOKEN[:43], "123456", "+15550100", "", "0b7c8a52-2c0f-4d2c-8d59-0a7c5f1f1d0e\n"]
)
def test_what_stands_in_the_wrong_field_is_not_shown(text: str) -> None:
    """A caller that mixes up its fields puts an address or a secret where an id belongs: its length is told."""
    shown = str(logs.redacted(ott.ListTokensRequest(user_id=text)))
    assert shown == (f"{{'user_id': '[{len(text)} characters]'}}" if text else "{}")


def test_a_request_cannot_fill_the_disk() -> None:
    """Long strings and lists are cut: they arrive before anybody has checked them."""
    shown = logs.redacted(ott.RevokeTokensRequest(user_id="x" * 60_000, token_types=[ott.TOKEN_TYPE_RECOVERY] * 60_000))
    assert len(json.dumps(shown)) < 2_000
    assert "60000 in all" in json.dumps(shown)


def test_what_is_packed_away_is_not_shown() -> None:
    """Bytes are told by their length: they may be a message with marked fields."""
    packed = AnyMessage()
    packed.Pack(ott.OneTimeToken(relates_to=ADDRESS))
    assert logs.redacted(packed) == {
        "type_url": "type.googleapis.com/onetime.v1.OneTimeToken",
        "value": f"[{len(packed.value)} bytes]",
    }


def maps_and_more() -> type[Message]:
    """Make a message with marked fields of each sort that the contract has none of yet."""
    of, label = FieldDescriptorProto, FieldDescriptorProto
    marked = FieldOptions(debug_redact=True)

    def entry(name: str, value: FieldDescriptorProto) -> DescriptorProto:
        value.name, value.number, value.label = "value", 2, label.LABEL_OPTIONAL
        key = of(name="key", number=1, type=of.TYPE_STRING, label=label.LABEL_OPTIONAL)
        made = DescriptorProto(name=name, field=[key, value])
        made.options.map_entry = True
        return made

    some = label.LABEL_REPEATED
    text, message = of.TYPE_STRING, of.TYPE_MESSAGE
    inner = DescriptorProto(
        name="Inner",
        field=[
            of(name="open", number=1, type=text, label=label.LABEL_OPTIONAL),
            of(name="shut", number=2, type=text, label=label.LABEL_OPTIONAL, options=marked),
        ],
    )
    outer = DescriptorProto(
        name="Outer",
        nested_type=[
            entry("SecretsEntry", of(type=text)),
            entry("InnersEntry", of(type=message, type_name=".test.Inner")),
        ],
        field=[
            of(
                name="secrets", number=1, type=message, type_name=".test.Outer.SecretsEntry", options=marked, label=some
            ),
            of(name="inners", number=2, type=message, type_name=".test.Outer.InnersEntry", label=some),
            of(name="words", number=3, type=text, options=marked, label=some),
            of(
                name="whole",
                number=4,
                type=message,
                type_name=".test.Inner",
                options=marked,
                label=label.LABEL_OPTIONAL,
            ),
            of(name="raw", number=5, type=of.TYPE_BYTES, options=marked, label=label.LABEL_OPTIONAL),
            of(name="pin", number=6, type=of.TYPE_INT64, options=marked, label=label.LABEL_OPTIONAL),
            of(name="rate", number=7, type=of.TYPE_DOUBLE, label=label.LABEL_OPTIONAL),
        ],
    )
    file = FileDescriptorProto(name="maps.proto", package="test", syntax="proto3", message_type=[inner, outer])
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return GetMessageClass(pool.FindMessageTypeByName("test.Outer"))


def full() -> Message:
    """Make a message with a secret in each of those fields."""
    message: Any = maps_and_more()()
    message.secrets["hush-key"] = "hush-value"
    message.inners["shown-key"].open = "shown-value"
    message.inners["shown-key"].shut = "hush-in-map"
    message.words.extend(["hush-one", "hush-two"])
    message.whole.open = "hush-within"
    message.raw = b"hush-bytes"
    message.pin = 814_277
    message.rate = float("inf")
    return cast("Message", message)


def test_maps_and_whole_messages() -> None:
    """Marked maps, lists, messages, bytes and numbers are hidden whole; maps of messages are looked into."""
    shown = logs.redacted(full())
    assert shown == {
        **dict.fromkeys(["secrets", "words", "whole", "raw", "pin"], "[redacted]"),
        "inners": {"shown-key": {"open": "shown-value", "shut": "[redacted]"}},
        "rate": "inf",
    }
    json.dumps(shown, allow_nan=False)


def test_every_marked_value_is_taken_out_of_texts() -> None:
    """The values of all marked fields, at any depth and of any sort, are taken out of a text."""
    text = "hush-key hush-value hush-in-map hush-one hush-two hush-within hush-bytes 814277 shown-key shown-value"
    assert logs.scrubbed(text, full()) == " ".join(["[redacted]"] * 8 + ["shown-key", "shown-value"])


@given(st.text(), st.text(min_size=3), st.text(), st.text())
def test_no_marked_value_is_left(before: str, secret: str, between: str, after: str) -> None:
    """Wherever a marked value stands in a text, as it came or in a `repr`, it is not there any more."""
    request = ott.CheckTokenRequest(link_secret=secret.encode("utf-8", "replace").decode())
    secret = request.link_secret
    for spelling in (secret, repr(secret)[1:-1], ascii(secret)[1:-1], secret.upper()):
        if len(spelling) == len(secret):
            text = f"{before}\0{spelling}\1{between}\2{spelling}\3{after}"
            assert f"\0{spelling}\1" not in logs.scrubbed(text, request)
            assert f"\2{spelling}\3" not in logs.scrubbed(text, request)


def test_the_longer_of_two_secrets_goes_first() -> None:
    """Of two marked values, of which one holds the other, nothing is left over."""
    request = ev.VerifyCodeRequest(email_verification_token="x123456y", code="123456")
    assert logs.scrubbed("x123456y 123456", request) == "[redacted] [redacted]"


def test_a_normal_form_of_an_address() -> None:
    """An address is taken out as it came and in the normal form that the service gives it."""
    request = ott.IssueTokenRequest(relates_to="  ZOE\u0308@Example.ORG ")
    assert logs.scrubbed("no row for zo\u00eb@example.org", request) == "no row for [redacted]"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgresql://me:pa55-word@host:5432/db", "postgresql://[redacted]@host:5432/db"),
        ("host=db password=pa55-word user=me", "host=db password=[redacted] user=me"),
        ("password='pa55 \\' word' user=me", "password=[redacted] user=me"),
    ],
)
def test_passwords_of_connections(stream: io.StringIO, text: str, left: str) -> None:
    """A connection string in a warning or an error loses its password, and nothing else."""
    assert logs.scrubbed(text, None) == left
    logging.getLogger("psycopg.pool").warning("error connecting in %r: %s", "pool-1", RuntimeError(text))
    assert one(stream)["event"] == f"error connecting in 'pool-1': {left}"


# Tracebacks


def driver_error() -> psycopg.Error:
    """Make an error as the driver does, which quotes a row and says more than it should."""
    told = {
        DiagnosticField.SQLSTATE: b"23505",
        DiagnosticField.MESSAGE_PRIMARY: b"duplicate key value",
        DiagnosticField.MESSAGE_DETAIL: b"Key (token_hash)=(0ddba11) already exists.",
        DiagnosticField.MESSAGE_HINT: b"hint 0ddba11",
        DiagnosticField.CONTEXT: b"COPY t, line 1: 0ddba11",
        DiagnosticField.CONSTRAINT_NAME: b"the_key",
        DiagnosticField.TABLE_NAME: b"the_table",
    }
    text = "duplicate key value\nDETAIL:  Key (token_hash)=(0ddba11) already exists.\nHINT:  0ddba11"
    return psycopg.errors.UniqueViolation(text, info=cast("Any", told))


def caught(fail: Callable[[], None]) -> Exception:
    """Return what a function raises."""
    try:
        fail()
    except Exception as error:  # noqa: BLE001 - that is the point
        return error
    raise AssertionError


def test_a_driver_error_is_told_in_part() -> None:
    """Of a driver's error, class, SQLSTATE, primary message, table and constraint are told, and no more."""
    text = logs.traceback_text(driver_error(), None)
    assert text == (
        "psycopg.errors.UniqueViolation: sqlstate=23505, message=duplicate key value, table=the_table,"
        " constraint=the_key"
    )


def test_a_driver_error_without_diagnosis_says_nothing() -> None:
    """An error that the driver makes up itself is told by its class: it may quote a connection string."""
    error = psycopg.ProgrammingError("missing = after pa55-word in connection info string")
    assert logs.traceback_text(error, None) == "psycopg.ProgrammingError: "


def test_the_whole_chain_is_told() -> None:
    """Causes, contexts and groups are all in the traceback, each without what must not be told."""

    def fail() -> None:
        try:
            try:
                raise driver_error()
            except psycopg.Error as error:
                raise LookupError(str(error)) from error
        except LookupError:
            raise ExceptionGroup("many", [ValueError(f"token {TOKEN}"), driver_error()])  # noqa: B904 - a context

    text = logs.traceback_text(caught(fail), ev.ResendCodeRequest(email_verification_token=TOKEN))
    assert text.count("psycopg.errors.UniqueViolation: sqlstate=23505") == 2
    assert "direct cause" in text
    assert "During handling" in text
    assert "LookupError: duplicate key value\n" in text
    assert "ValueError: token [redacted]" in text
    assert "in fail" in text
    assert "0ddba11" not in text
    assert TOKEN not in text


def test_a_chain_that_bites_its_tail() -> None:
    """A chain of errors that leads back to its start has an end all the same."""
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert logs.traceback_text(one, None).count("RuntimeError: ") == 2


def test_a_context_that_was_put_away() -> None:
    """`raise … from None` keeps its context out of the log, as it does elsewhere."""

    def fail() -> None:
        try:
            raise driver_error()
        except psycopg.Error:
            raise ValueError("plain") from None

    assert "UniqueViolation" not in logs.traceback_text(caught(fail), None)


def test_whoever_logs_an_exception(stream: io.StringIO) -> None:
    """An exception that any logger writes, during a call, loses driver's details and the call's secrets."""
    with serving(ev.ResendCodeRequest(email_verification_token=TOKEN)):
        error = RuntimeError(f"about {TOKEN}")
        error.__cause__ = driver_error()
        logging.getLogger("grpc._cython.cygrpc").error("unexpected %s", error, exc_info=error)
        logging.getLogger("service.part").error("failed with %r", driver_error(), exc_info=error)
    for line in lines(stream):
        assert "RuntimeError: about [redacted]" in line["traceback"]
    assert "0ddba11" not in stream.getvalue()
    assert TOKEN not in stream.getvalue()


async def test_an_exception_that_nobody_heard(stream: io.StringIO) -> None:
    """The exception of a forgotten task is in the log, without what it quotes."""

    async def fail() -> None:
        raise RuntimeError("of a task") from driver_error()

    task: asyncio.Task[None] | None = asyncio.create_task(fail())
    assert task is not None
    await asyncio.wait([task])
    task = None
    line = one(stream)
    assert line["logger"] == "asyncio"
    assert "never retrieved" in line["event"]
    assert "RuntimeError: of a task" in line["traceback"]
    assert "0ddba11" not in stream.getvalue()


def test_what_asyncio_tells_of_a_task(stream: io.StringIO) -> None:
    """A task's result and the text of its exception are left out of what asyncio says of it."""
    message = f"Executing <Task finished name='Task-1' coro=<serve()> result=b'{TOKEN}'> took 0.2 seconds"
    logging.getLogger("asyncio").warning(message)
    assert one(stream)["event"] == "Executing <Task finished name='Task-1' coro=<serve()> …"
