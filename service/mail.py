"""What a mail says, and its shape: the templates with its words, and the message made of them.

A folder of templates has `layout.html`, the look, and for each language a folder with its tag, such as `pt-BR`, with
`subject.txt`, `body.txt` and `body.html`. They are Jinja's, in its sandbox, and know the code, the product, the whole
minutes it is good for, the language, and the direction it is written in: `ltr` or `rtl`.

It knows nothing of requests, settings, outboxes and mail servers.
"""

import itertools
import re
import traceback
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.header import Header
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime
from pathlib import Path
from typing import Final

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import SandboxedEnvironment

_OURS: Final = Path(__file__).parent / "templates"

_LAYOUT: Final = "layout.html"
_SUBJECT: Final = "subject.txt"
_TEXT: Final = "body.txt"
_HTML: Final = "body.html"
_OF_A_LANGUAGE: Final = (_SUBJECT, _TEXT, _HTML)

_VARIABLES: Final = ("code", "product", "minutes", "language", "direction")
_SAMPLE_CODE: Final = "012345"  # a template that takes it for a number loses its zero
_SAMPLE_PRODUCT: Final = 'B & O "Sample" <1>'
_SAMPLE_MINUTES: Final = (1, 2, 5, 12, 22, 60, 1440)  # one of each plural that there is

_RIGHT_TO_LEFT: Final = frozenset("ar arc ckb dv fa he nqo ps sd syr ug ur yi".split())  # noqa: SIM905 - easier to read
_RIGHT_TO_LEFT_SCRIPTS: Final = frozenset({"Adlm", "Arab", "Aran", "Hebr", "Mand", "Nkoo", "Rohg", "Syrc", "Thaa"})
_SCRIPT: Final = re.compile("[A-Z][a-z]{3}")
_TAG: Final = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*(?<!-[A-Za-z0-9])", re.ASCII)


# The words


@dataclass(frozen=True, slots=True, repr=False)
class Content:
    """What one mail says. It has no repr: there is a code in it."""

    language: str
    subject: str
    text: str
    html: str


@dataclass(frozen=True, slots=True)
class _File:
    """A template, as it was read."""

    path: Path
    source: str
    is_ours: bool


class Templates:
    """The templates in force. A class because they are read and checked once, at the start, and used for every mail."""

    def __init__(self, folder: Path | None, *, locale: str) -> None:
        """Read all templates, and render each with samples.

        Args:
            folder: The operator's templates. They go before ours, file by file.
            locale: The language of last resort.

        Raises:
            ValueError: They are not right: every fault, a line each, with what would be right.
        """
        # A dict, since it keeps the order, and a fault of the layout is found once for each language.
        faults: dict[str, None] = {}
        files: dict[str, _File] = {}
        for origin in (_OURS, folder):
            if origin is not None:
                files |= _read(origin, faults)
        languages = sorted({name.partition("/")[0] for name in files if "/" in name})
        self._environment = _environment(files)
        sound = {name for name, file in files.items() if not _add(faults, self._mistakes(file))}
        self._languages: dict[str, str] = {}
        for language in languages:
            missing = [name for name in _OF_A_LANGUAGE if f"{language}/{name}" not in files]
            if missing:
                # Only of the operator's: a test sees to ours.
                _add(
                    faults,
                    [f"{folder}/{language}: without {' and '.join(missing)}: {', '.join(_OF_A_LANGUAGE)} are right"],
                )
                continue
            self._languages[language.lower()] = language
            _add(faults, self._failures(language, files, sound))
        # Only now: of a language that is not complete, that is what is wrong.
        last_resort = self._find(locale)
        if last_resort is None and locale.lower() not in map(str.lower, languages):
            faults[f"there are no templates for the locale {locale!r}: {', '.join(languages)} are right"] = None
        if faults:
            raise ValueError("\n".join(faults))
        self._last_resort = str(last_resort)

    @property
    def languages(self) -> tuple[str, ...]:
        """The tags of the languages that there are templates for, sorted."""
        return tuple(self._languages.values())

    def language(self, locale: str) -> str:
        """Return the language of mails to somebody who reads `locale`: the closest one, else that of last resort.

        It is RFC 4647's lookup, so `pt-BR` is served by `pt` where it has no templates of its own. Any text will do.
        """
        return self._find(locale) or self._last_resort

    def write(self, *, code: str, locale: str, product: str, lifetime: timedelta) -> Content:
        """Write a mail.

        Args:
            code: Its digits.
            locale: What its recipient reads.
            product: What the code is for. In HTML it is escaped.
            lifetime: How long the code is good from now on. The mail says whole minutes, one at least.

        Raises:
            ValueError: The subject is not one line with the code: a template, or the product, has line breaks where
                the samples had none.
        """
        language = self.language(locale)
        variables = _variables(language, code=code, product=product, minutes=lifetime // timedelta(minutes=1))
        subject, text, html = (self._render(f"{language}/{name}", variables) for name in _OF_A_LANGUAGE)
        if _fault_of_subject(subject, code) or any(code not in body for body in (text, html)):
            raise ValueError(f"the templates of {language!r} make no mail with the code for this product")
        return Content(language=language, subject=subject, text=text, html=html)

    def _find(self, locale: str) -> str | None:
        """Return the tag closest to one (RFC 4647, 3.4), or None."""
        # POSIX and Java write pt_BR.
        parts = locale.replace("_", "-").lower().split("-")
        while parts:
            language = self._languages.get("-".join(parts))
            if language is not None:
                return language
            # A part of one letter goes with the one after it: no tag of ours ends with such a part, so none is found.
            parts.pop()
        return None

    def _render(self, name: str, variables: Mapping[str, object]) -> str:
        text = self._environment.get_template(name).render(variables).strip()
        return text if name.endswith(_SUBJECT) else text + "\n"

    def _mistakes(self, file: _File) -> Iterator[str]:
        """Yield what can be seen of a template without rendering it, in branches too that are seldom taken."""
        try:
            tree = self._environment.parse(file.source, filename=str(file.path))
            unknown = meta.find_undeclared_variables(tree)
        except jinja2.TemplateSyntaxError as error:
            yield f"{file.path}:{error.lineno}: a Jinja template is right: {error.message}"
            return
        unknown -= {*_VARIABLES, *self._environment.globals}
        for found in tree.find_all(nodes.Name):
            if found.name in unknown:
                right = f"{', '.join(_VARIABLES[:-1])} and {_VARIABLES[-1]} are right"
                yield f"{file.path}:{found.lineno}: there is no variable {found.name!r}: {right}"

    def _failures(self, language: str, files: Mapping[str, _File], sound: set[str]) -> Iterator[str]:
        """Yield what is wrong with what the templates of a language make."""
        for name, minutes in itertools.product(_OF_A_LANGUAGE, _SAMPLE_MINUTES):
            full_name = f"{language}/{name}"
            if not {full_name, _LAYOUT if name == _HTML else full_name} <= sound:
                continue  # that is told already
            file = files[full_name]
            if name == _HTML and file.is_ours:
                file = files[_LAYOUT]  # with our layout it would be right
            sample = _variables(language, code=_SAMPLE_CODE, product=_SAMPLE_PRODUCT, minutes=minutes)
            try:
                made = self._render(full_name, sample)
            except Exception as error:  # noqa: BLE001 - a template may do anything that its sandbox lets it
                yield _failure(error, files)
                continue
            fault = _fault_of_subject(made, _SAMPLE_CODE) if name == _SUBJECT else _fault_of_body(made, _SAMPLE_CODE)
            if fault:
                yield f"{file.path}: {fault}"


def _add(faults: dict[str, None], more: Iterable[str]) -> bool:
    """Add what is not among the faults yet, and return whether there was anything."""
    found = dict.fromkeys(more)
    faults |= found
    return bool(found)


def _read(folder: Path, faults: dict[str, None]) -> dict[str, _File]:
    """Return the templates of a folder, by their names.

    They are read once and found in memory from then on, so no template can name a file elsewhere, and none changes
    under a running server. Links are followed, and hidden names passed over: that is how Kubernetes mounts files.
    """
    files: dict[str, _File] = {}
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        nested = [
            (f"{entry.name}/{file.name}", file)
            for entry in entries
            if entry.is_dir() and not _fault_of_tag(entry, faults)
            for file in sorted(entry.iterdir())
        ]
    except OSError as error:
        faults[f"{error.filename}: {error.strerror}: a folder of templates is right"] = None
        return {}
    for name, path in [*((entry.name, entry) for entry in entries if not entry.is_dir()), *nested]:
        right = _OF_A_LANGUAGE if "/" in name else (_LAYOUT,)
        if path.name in right:
            try:
                files[name] = _File(path, path.read_text("utf-8-sig"), is_ours=folder == _OURS)
            except OSError as error:
                faults[f"{path}: {error.strerror}: a file that can be read is right"] = None
            except UnicodeDecodeError as error:
                line = error.object[: error.start].count(b"\n") + 1
                faults[f"{path}:{line}: a text in UTF-8 is right"] = None
        elif path.suffix in (".html", ".txt") and not path.name.startswith("."):
            # A slip in its name: it would be passed over, and ours sent.
            faults[f"{path}: nothing uses it: {', '.join(right)} {'is' if len(right) == 1 else 'are'} right here"] = (
                None
            )
    return files


def _fault_of_tag(folder: Path, faults: dict[str, None]) -> bool:
    """Add what is wrong with the name of a language's folder. One way to write it, so that none is there twice."""
    tag = folder.name
    if not _TAG.fullmatch(tag):
        return _add(faults, [f"{folder}: not a language's tag: one such as en, pt-BR or zh-Hant is right"])
    if tag != _canonical(tag):
        return _add(faults, [f"{folder}: {_canonical(tag)} is right"])
    return False


def _canonical(tag: str) -> str:
    """Write a language's tag as RFC 5646 (2.1.1) does: zh-Hant-TW."""
    parts = tag.lower().split("-")
    written = parts[:1]
    for before, part in itertools.pairwise(parts):
        if len(before) > 1 and len(part) == 2:  # noqa: PLR2004 - a region
            written.append(part.upper())
        elif len(before) > 1 and len(part) == 4:  # noqa: PLR2004 - a script
            written.append(part.title())
        else:
            written.append(part)
    return "-".join(written)


def _environment(files: Mapping[str, _File]) -> SandboxedEnvironment:
    """Return Jinja with these templates."""

    def load(name: str) -> tuple[str, str, None] | None:
        file = files.get(name)
        return (file.source, str(file.path), None) if file else None

    return SandboxedEnvironment(
        loader=jinja2.FunctionLoader(load),
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name is not None and name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        cache_size=-1,  # all of them
    )


def _variables(language: str, *, code: str, product: str, minutes: int) -> dict[str, object]:
    primary, *others = language.split("-")
    scripts = [part for part in others if _SCRIPT.fullmatch(part)]
    right_to_left = scripts[0] in _RIGHT_TO_LEFT_SCRIPTS if scripts else primary in _RIGHT_TO_LEFT
    return {
        "code": code,
        "product": product,
        "minutes": max(minutes, 1),
        "language": language,
        "direction": "rtl" if right_to_left else "ltr",
    }


def _fault_of_subject(subject: str, code: str) -> str | None:
    lines = len(subject.splitlines())
    if lines > 1:
        return f"it makes {lines} lines: one is right"
    return _fault_of_body(subject, code)


def _fault_of_body(body: str, code: str) -> str | None:
    return None if code in body else "it does not show the code: {{ code }} in it is right"


def _failure(error: Exception, files: Mapping[str, _File]) -> str:
    """Return the line on a template that cannot be rendered. It quotes samples at most."""
    paths = {str(file.path) for file in files.values()}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in paths]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a template"
    if isinstance(error, jinja2.TemplateNotFound):
        return f"{place}: there is no template {error.name!r}: {_LAYOUT} is right"
    return f"{place}: a template that can be rendered is right: {type(error).__name__}: {error}"


# The message


class _AsWritten(EmailPolicy):
    """Sends headers as they are set here, folded and encoded. A class because that is how Python takes a policy.

    Its own folding takes encoded words for what they stand for, so that a name such as `=?utf-8?q?=0A?=` becomes a line
    break; loses the quotes around a name when it folds it; and encodes message ids that are long.
    """

    def header_store_parse(self, name: str, value: str) -> tuple[str, str]:
        """Take a header as it is, unless it has a line break that would end it."""
        if any(not line.startswith(" ") for line in re.split(r"\r\n|\r|\n", value)[1:]):
            raise ValueError("a header of one line, or folded ones, is right")
        return name, value


_POLICY: Final = _AsWritten(linesep="\r\n", cte_type="7bit", refold_source="none")

_LONGEST_LINE: Final = 78  # RFC 5322, 2.1.1
_LONGEST_ADDRESS: Final = 320  # octets: RFC 5321, 4.5.3.1
_PLAIN: Final = re.compile("[!-~]+( [!-~]+)*", re.ASCII)
# What cannot stand in an address without quotes, other than controls and spaces: RFC 5322, 3.2.3.
_ADDRESS: Final = re.compile(r"""[^\s()<>\[\]:;@\\,"]+@[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?""")


def compose(  # noqa: PLR0913 - what a mail is made of, by name
    content: Content, *, product: str, sender: str, to: str, message_id: uuid.UUID, date: datetime
) -> EmailMessage:
    """Make a message. The same arguments make the same bytes.

    `message.as_bytes()` is what to send. Where that is not ASCII, an address is not, and only a server with SMTPUTF8
    (RFC 6531) can take it.

    Args:
        content: What it says.
        product: In whose name it comes.
        sender: The address that it comes from.
        to: Where it goes.
        message_id: Its name, for all times that it is sent.
        date: The time it was written, with its zone.

    Raises:
        ValueError: An address is none, or there are line breaks or controls in what stands in headers. The text quotes
            nothing of it.
    """
    _check_address("the sender", sender)
    _check_address("the recipient", to)
    _check_line("the product", product)
    _check_line("the subject", content.subject)
    message = EmailMessage(_POLICY.clone(utf8=not (sender + to).isascii()))
    message["From"] = _mailbox(product, sender)
    message["To"] = to
    message["Subject"] = _text("Subject", content.subject)
    message["Date"] = format_datetime(date)
    message["Message-ID"] = f"<{message_id}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's holiday notice answers it
    message["X-Auto-Response-Suppress"] = "All"  # the same, for Exchange
    message.set_content(content.text)
    message.add_alternative(content.html, subtype="html")
    message["Content-Language"] = content.language  # last: add_alternative would move it into the first part
    # Python's own would be another one each time. No text can hold this one, since none knows the id.
    message.replace_header("Content-Type", f'multipart/alternative;\r\n boundary="=_{message_id.hex}"')
    return message


def _check_address(what: str, address: str) -> None:
    _check_line(what, address)
    if not _ADDRESS.fullmatch(address) or len(address.encode()) > _LONGEST_ADDRESS:
        raise ValueError(f"{what} is not an address with a domain in ASCII")


def _check_line(what: str, text: str) -> None:
    """Refuse what could end a header, and what cannot be encoded."""
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
        raise ValueError(f"{what} has a line break or a control character in it")


def _mailbox(name: str, address: str) -> str:
    """Return a mailbox with a display name, as it stands in a header."""
    quoted = '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
    name = quoted if _is_plain("From", quoted) else _encoded("From", name)
    fits = "\n" not in name and len(f"From: {name} <{address}>") <= _LONGEST_LINE
    return f"{name} <{address}>" if fits else f"{name}\r\n <{address}>"


def _text(header: str, text: str) -> str:
    """Return unstructured text, as it stands in a header."""
    return text if _is_plain(header, text) else _encoded(header, text)


def _is_plain(header: str, text: str) -> bool:
    """Tell whether a text can stand in a header as it is: nobody takes it for encoded words, nor changes its spaces."""
    fits = len(f"{header}: {text}") <= _LONGEST_LINE
    return fits and "=?" not in text and _PLAIN.fullmatch(text) is not None


def _encoded(header: str, text: str) -> str:
    """Return text in encoded words (RFC 2047), whose lines are short enough."""
    return Header(text, "utf-8", header_name=header).encode(linesep="\r\n")
