"""The log: one JSON object a line, in UTC, and no secret in it.

It owns what a line looks like, and what is taken out of messages, tracebacks and requests before they are written.
It knows nothing of what is worth a line.
"""

import functools
import json
import logging
import re
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import psycopg
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from pythonjsonlogger.core import RESERVED_ATTRS, LogData
from pythonjsonlogger.json import JsonFormatter

from service.call import current_call

REDACTED: Final = "[redacted]"

_HARMLESS: Final = re.compile(
    r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"  # a UUID
    r"|[a-z]{1,20}([./][A-Za-z0-9_]{1,40}){1,8}"  # the name of a service, a message or a file
    r"|[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,3}"  # a language tag
)
"""Texts that are shown. A caller that mixes up its fields puts an address or a secret where an id belongs."""

_LONGEST_LIST: Final = 16
"""What is shown of a field. A caller must not fill our disk by filling a field that is refused anyway."""

_SHORTEST_SECRET: Final = 3
"""Shorter values are left in texts: taking out every "e" would hide nothing, and make a traceback unreadable."""

_RESERVED: Final = frozenset(RESERVED_ATTRS)

_DRIVER_DETAILS: Final = re.compile(r"(?:\n|\\n)(?:DETAIL|CONTEXT|HINT|QUERY|STATEMENT):.*", re.DOTALL)
"""What PostgreSQL adds to an error, as it is or in a `repr`. DETAIL holds rows: `Key (token_hash)=(…) exists.`"""

_ASYNCIO_VALUES: Final = re.compile(r" (?:result|exception)=.*", re.DOTALL)
"""What asyncio tells of a task that has ended: its response, or its exception with all of its text."""

_PASSWORDS: Final = re.compile(r"(?i)(?<=://)[^\s/@]*(?=@)|(?<=password=)(?:'(?:[^'\\]|\\.)*'|\S+)")
"""In a connection string, as a URL or as key words."""

_CAUSE: Final = "\nThe above exception was the direct cause of the following exception:\n\n"
_CONTEXT: Final = "\nDuring handling of the above exception, another exception occurred:\n\n"


def configure(level: int | str, stream: TextIO) -> None:
    """Write the log to a stream: ours from `level` on, that of libraries from WARNING on.

    Again is OK, and replaces what was set before.
    """
    # They cost a system call or a look-up a line each, and no line shows them.
    logging.logThreads = False
    logging.logProcesses = False
    logging.logMultiprocessing = False

    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, Lines)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines())
    handler.addFilter(_deserves_a_line)
    root.addHandler(handler)

    ours = logging.getLogger("service")
    ours.setLevel(level)
    # gRPC, psycopg, its pool and asyncio have no level of their own, and so take this one.
    root.setLevel(max(logging.WARNING, ours.level))


def _deserves_a_line(record: logging.LogRecord) -> bool:
    """Tell whether a record is to be written.

    Not the one about a header that is not UTF-8: gRPC quotes it in full, and an API key in `authorization` is a header.
    Any client could write such errors, one for each of its headers; the call has its own line all the same.
    """
    return record.name != "grpc._cython.cygrpc" or not str(record.msg).startswith("Invalid encoding on ")


class Lines(JsonFormatter):
    """Turns a record into a line. A class because logging asks for one."""

    def __init__(self) -> None:
        """Take no options."""
        super().__init__()
        self._encode = json.JSONEncoder(default=str, separators=(",", ":")).encode

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record; of one whose message is a dict, at once: there is one for every call."""
        if isinstance(record.msg, dict):
            return self._encode({**_head(record), **record.msg})
        return super().format(record)

    def add_fields(self, log_data: LogData, record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        """Put time, level, logger and event first, then whatever the record carries."""
        log_data.update(_head(record), event=_event(record))
        log_data.update({key: value for key, value in record.__dict__.items() if key not in _RESERVED})
        log_data.update(message_dict)
        if "exc_info" in log_data:
            log_data["traceback"] = log_data.pop("exc_info")

    def jsonify_log_record(self, log_data: LogData) -> str:
        """Encode a line. ASCII only, so that no terminal obeys it."""
        return self._encode(log_data)

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 - logging's name and type
        """Return the traceback without secrets, whoever logs it."""
        return traceback_text(ei[1], _current_request())


def _head(record: logging.LogRecord) -> dict[str, object]:
    """Return what every line starts with."""
    time = f"{_second(int(record.created))}.{int(record.msecs):03}Z"
    return {"time": time, "level": record.levelname, "logger": record.name}


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    """Return a time to the second, which many lines have in common."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def _event(record: logging.LogRecord) -> str:
    """Return a record's message, without secrets."""
    if record.levelno < logging.WARNING:
        # Only our own, which are made of nothing but what may be shown. They are many.
        return record.message
    message = record.message
    if record.name == "asyncio":
        message = _ASYNCIO_VALUES.sub(" …", message)
    return scrubbed(_DRIVER_DETAILS.sub("", message), _current_request())


def _current_request() -> Message | None:
    """Return the request that is being served, if any is."""
    call = current_call.get(None)
    return None if call is None else call.request


@functools.cache
def _is_secret(field: FieldDescriptor) -> bool:
    """Tell whether the contract marks a field as one that carries a secret."""
    return bool(field.GetOptions().debug_redact)


@functools.cache
def _map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field of a map's values, or None for a field that is no map."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None


def redacted(message: Message) -> dict[str, object]:
    """Return the fields that are set, to be logged: those that `debug_redact` marks without their value.

    `str(message)` shows them, in Python.
    """
    return {
        field.name: REDACTED if _is_secret(field) else _shown(field, value) for field, value in message.ListFields()
    }


def _shown(field: FieldDescriptor, value: Any) -> object:  # noqa: ANN401 - a field has any type
    """Return the value of a field, which may hold fields that are not to be shown."""
    if not field.is_repeated:
        return _one_shown(field, value)
    of_map = _map_value(field)
    if of_map is not None:
        first = sorted(value, key=str)[:_LONGEST_LIST]
        shown: dict[str, object] = {str(_cut(key)): _one_shown(of_map, value[key]) for key in first}
        return shown if len(value) == len(first) else {**shown, "…": f"{len(value)} in all"}
    some = [_one_shown(field, each) for each in value[:_LONGEST_LIST]]
    return some if len(value) == len(some) else [*some, f"… {len(value)} in all"]


def _one_shown(field: FieldDescriptor, value: Any) -> object:  # noqa: ANN401 - a field has any type
    """Return one element of a field."""
    if isinstance(value, Message):
        return redacted(value)
    if field.enum_type is not None:
        # A newer client may send a value that has no name yet.
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    if isinstance(value, bytes):
        return f"[{len(value)} bytes]"
    if isinstance(value, float):
        # JSON has no word for infinity.
        return str(value)
    return _cut(value)


def _cut(value: object) -> object:
    """Return a value; of a text that is none of those to be shown, its length."""
    return f"[{len(value)} characters]" if isinstance(value, str) and not _HARMLESS.fullmatch(value) else value


def _secrets(message: Message) -> Iterator[str]:
    """Give the value of every field that `debug_redact` marks, at any depth."""
    for field, value in message.ListFields():
        yield from _leaves(field, value, secret=_is_secret(field))


def _leaves(field: FieldDescriptor, value: Any, *, secret: bool) -> Iterator[str]:  # noqa: ANN401 - a field has any type
    """Give what is secret in a field's value."""
    of_map = _map_value(field)
    if of_map is not None:
        for key, each in value.items():
            yield from [str(key)] if secret else []
            yield from _leaves_of_one(of_map, each, secret=secret)
    else:
        for each in value if field.is_repeated else [value]:
            yield from _leaves_of_one(field, each, secret=secret)


def _leaves_of_one(field: FieldDescriptor, value: Any, *, secret: bool) -> Iterator[str]:  # noqa: ANN401 - as above
    """Give what is secret in one element of a field."""
    if isinstance(value, Message):
        for inner, inner_value in value.ListFields():
            yield from _leaves(inner, inner_value, secret=secret or _is_secret(inner))
    elif secret and field.enum_type is None and not isinstance(value, bool):
        yield value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _spellings(secret: str) -> Iterator[str]:
    """Give the ways in which a text may spell a secret: as it came, in its normal form, and as `repr` escapes it."""
    for form in (secret, secret.strip(), unicodedata.normalize("NFC", secret.strip())):
        yield form
        yield repr(form)[1:-1]
        yield ascii(form)[1:-1]


def scrubbed(text: str, request: Message | None) -> str:
    """Return a text without passwords of connections, and without any secret of a request, in whichever case."""
    text = _PASSWORDS.sub(REDACTED, text)
    if request is None:
        return text
    spellings = {spelling for secret in _secrets(request) for spelling in _spellings(secret)}
    # The longest first: of two that overlap, the shorter would leave the rest of the longer behind.
    wanted = sorted((each for each in spellings if len(each) >= _SHORTEST_SECRET), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, wanted)), REDACTED, text, flags=re.IGNORECASE) if wanted else text


def traceback_text(error: BaseException | None, request: Message | None) -> str:
    """Return the traceback of an error and of all that led to it, without secrets.

    The driver's errors are told by class, SQLSTATE, primary message and the names of what they are about: their other
    words quote rows and parameters.
    """
    return scrubbed("".join(_chain(error, set())), request).rstrip("\n")


def _chain(error: BaseException | None, seen: set[int]) -> Iterable[str]:
    """Give the parts of a traceback, oldest first, as Python prints them."""
    if error is None or id(error) in seen:
        # A chain may bite its own tail.
        return
    seen.add(id(error))
    if error.__cause__ is not None:
        yield from _chain(error.__cause__, seen)
        yield _CAUSE
    elif error.__context__ is not None and not error.__suppress_context__:
        yield from _chain(error.__context__, seen)
        yield _CONTEXT
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from traceback.format_tb(error.__traceback__)
    of = type(error)
    module = "" if of.__module__ == "builtins" else f"{of.__module__}."
    yield f"{module}{of.__qualname__}: {_words(error)}\n"
    if isinstance(error, BaseExceptionGroup):
        for number, each in enumerate(error.exceptions, 1):
            yield f"\nIn the group above, exception {number}:\n\n"
            yield from _chain(each, seen)


def _words(error: BaseException) -> str:
    """Return what an error says, as far as it may be shown."""
    if isinstance(error, psycopg.Error):
        told = {
            "sqlstate": error.sqlstate,
            "message": error.diag.message_primary,
            "schema": error.diag.schema_name,
            "table": error.diag.table_name,
            "constraint": error.diag.constraint_name,
        }
        return ", ".join(f"{name}={value}" for name, value in told.items() if value)
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - an exception that cannot say what it is must not hide where it was raised
        return "(it cannot be printed)"
    # Somebody may have put a driver's error into the text of another.
    return _DRIVER_DETAILS.sub("", words)
