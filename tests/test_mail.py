import email
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email import policy
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import parseaddr
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service import mail
from service.mail import Content, Templates, compose

# No deadline: a machine may be busy. No database of examples: what was found goes into a test.
PROPERTY: Final = settings(deadline=None, database=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])

OURS: Final = Templates(None, locale="en")
SHIPPED: Final = ("de", "en", "es", "fr", "it", "nl", "pl", "pt")
SOURCES: Final = Path(mail.__file__).parent / "templates"

ID: Final = uuid.UUID("9e6b3a5e-6f0c-4a8e-8f59-0c6f6a5d1b7e")
DATE: Final = datetime(2026, 11, 22, 9, 30, 15, tzinfo=UTC)

CODES: Final = st.from_regex("[0-9]{6}", fullmatch=True)
PRODUCTS: Final = st.one_of(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=64),
    st.text(
        st.sampled_from("aZ0 \"\\<>&'=?_.,:;()@[]{}%#\u00e9\u0141\u20ac\U0001f511\u00a0\u200d"), min_size=1, max_size=64
    ),
)

RTL_BODY: Final = '{% extends "layout.html" %}{% block purpose %}{{ product }}{% endblock %}'


def written(
    code: str = "012345", *, locale: str = "en", product: str = "Example", minutes: float = 15, by: Templates = OURS
) -> Content:
    """Return what a mail says."""
    return by.write(code=code, locale=locale, product=product, lifetime=timedelta(minutes=minutes))


def composed(
    content: Content,
    *,
    product: str = "Example",
    sender: str = "no-reply@example.com",
    to: str = "ada@example.org",
    date: datetime = DATE,
) -> EmailMessage:
    """Return a message."""
    return compose(content, product=product, sender=sender, to=to, message_id=ID, date=date)


def received(message: EmailMessage) -> EmailMessage:
    """Return a message as its recipient's program reads it."""
    return email.message_from_bytes(message.as_bytes(), policy=policy.SMTPUTF8)


def put(folder: Path, files: Mapping[str, str]) -> Path:
    """Write templates into a folder, and return it."""
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
    return folder


def faults(folder: Path | None, *, locale: str = "en") -> list[str]:
    """Return what is said of templates that are refused, without the folder's path."""
    with pytest.raises(ValueError, match="right") as caught:
        Templates(folder, locale=locale)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# Looking at HTML

Style = dict[str, str]


def declarations(text: str) -> Style:
    """Return the declarations of a style."""
    pairs = (each.split(":", 1) for each in text.split(";") if each.strip())
    return {name.strip(): value.removesuffix("!important").strip() for name, value in pairs}


class Page(HTMLParser):
    """A document as its reader sees it. A class because that is how Python's parser is used."""

    VOID: Final = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self, html: str, *, is_dark: bool = False) -> None:
        """Read a document, in the light colour scheme or in the dark one."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.styles: list[Style] = []
        """Of each text."""
        dark = re.search(r"prefers-color-scheme: dark\) \{(.*?)\n\}", html, re.DOTALL)
        rules = re.findall(r"\.(\w+) \{(.*?)\}", dark[1]) if dark and is_dark else []
        self._rules = {name: declarations(body) for name, body in rules}
        self._open: list[tuple[str, Style]] = [("", {"background": "#ffffff", "color": "#000000"})]
        self.feed(html)
        self.close()
        assert len(self._open) == 1, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element, and what its style is."""
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        style = self._open[-1][1] | declarations(attributes.get("style") or "")
        for name in (attributes.get("class") or "").split():
            style |= self._rules.get(name, {})
        if tag not in self.VOID:
            self._open.append((tag, style))

    def handle_endtag(self, tag: str) -> None:
        """See that elements are nested."""
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        """Note a text that is shown."""
        if data.strip() and not {"head", "style"} & {tag for tag, _ in self._open}:
            self.texts.append(data)
            self.styles.append(self._open[-1][1])

    def attributes(self, tag: str) -> dict[str, str | None]:
        """Return the attributes of the first element of a name."""
        return next(attributes for name, attributes in self.elements if name == tag)


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    assert re.fullmatch("#[0-9a-f]{6}", colour)
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(style: Style) -> float:
    """Return the contrast ratio of a text (WCAG 2.2)."""
    lighter, darker = sorted((luminance(style["color"]), luminance(style["background"])), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


# What a mail says


def test_the_shipped_languages_are_complete() -> None:
    """Eight languages have all their templates, and these are right."""
    assert OURS.languages == SHIPPED


def test_english_says_what_it_is_to_say() -> None:
    """The purpose, the code, its time, that nobody asks for it, and what to do with a mail not asked for."""
    content = written()
    assert content.language == "en"
    assert content.subject == "012345 is your Example code"
    assert content.text == (
        "To verify this email address with Example, enter this code:\n"
        "\n"
        "    012345\n"
        "\n"
        "The code is good for 15 minutes. Nobody from Example will ever ask you for it.\n"
        "\n"
        "If you did not ask for this code, ignore this mail: somebody may have mistyped their address.\n"
    )


@pytest.mark.parametrize("language", SHIPPED)
def test_both_bodies_say_the_same(language: str) -> None:
    """Who reads plain text misses nothing: paragraph by paragraph it has the words of the HTML below its heading."""
    content = written(locale=language)
    heading, *paragraphs = Page(content.html).texts
    assert heading == "Example"
    assert paragraphs == [paragraph.strip() for paragraph in content.text.split("\n\n")]


@pytest.mark.parametrize("language", SHIPPED)
def test_subject_tells_code_and_product(language: str) -> None:
    """A list of mails is enough to read the code and whose it is."""
    assert written(locale=language).subject.startswith("012345 ")
    assert "Example" in written(locale=language).subject


@pytest.mark.parametrize(
    ("language", "plurals"),
    [
        ("de", ["1 Minute.", "2 Minuten.", "5 Minuten.", "12 Minuten.", "22 Minuten.", "25 Minuten."]),
        ("en", ["1 minute.", "2 minutes.", "5 minutes.", "12 minutes.", "22 minutes.", "25 minutes."]),
        ("es", ["1 minuto.", "2 minutos.", "5 minutos.", "12 minutos.", "22 minutos.", "25 minutos."]),
        ("fr", ["1 minute.", "2 minutes.", "5 minutes.", "12 minutes.", "22 minutes.", "25 minutes."]),
        ("it", ["1 minuto.", "2 minuti.", "5 minuti.", "12 minuti.", "22 minuti.", "25 minuti."]),
        ("nl", ["1 minuut ", "2 minuten ", "5 minuten ", "12 minuten ", "22 minuten ", "25 minuten "]),
        ("pl", ["1 minutę.", "2 minuty.", "5 minut.", "12 minut.", "22 minuty.", "25 minut."]),
        ("pt", ["1 minuto.", "2 minutos.", "5 minutos.", "12 minutos.", "22 minutos.", "25 minutos."]),
    ],
)
def test_minutes_have_their_plural(language: str, plurals: list[str]) -> None:
    """Each number has the form that the language asks for, in both bodies."""
    for minutes, plural in zip((1, 2, 5, 12, 22, 25), plurals, strict=True):
        content = written(locale=language, minutes=minutes)
        assert f" {plural}" in content.text
        assert f" {plural}" in content.html


@pytest.mark.parametrize(
    ("lifetime", "minutes"),
    [
        (timedelta(minutes=15), "15 minutes"),
        (timedelta(minutes=14, seconds=59, milliseconds=999), "14 minutes"),
        (timedelta(seconds=119), "1 minute."),
        (timedelta(seconds=1), "1 minute."),
        (timedelta(0), "1 minute."),
        (-timedelta(minutes=3), "1 minute."),
    ],
)
def test_minutes_are_rounded_down(lifetime: timedelta, minutes: str) -> None:
    """A mail promises no more time than there is, and one minute at least."""
    content = OURS.write(code="012345", locale="en", product="Example", lifetime=lifetime)
    assert f"is good for {minutes}" in content.text


@PROPERTY
@given(code=CODES, product=PRODUCTS, language=st.sampled_from(SHIPPED))
@example(code="000000", product='<b>&"Ex ample', language="en")
@example(code="000001", product="{{ code }}{% raw %}&amp;", language="en")
@example(code="000001", product="</p><script>", language="de")
def test_any_product_and_code_come_out_as_they_went_in(code: str, product: str, language: str) -> None:
    """Names are text wherever they stand: never markup, and never a template."""
    content = written(code, product=product, locale=language)
    assert product.strip() in content.subject
    assert product in content.text
    page = Page(content.html)
    assert code in page.texts
    assert page.texts[0] == product or not product.strip()
    assert page.elements == Page(written(locale=language).html).elements


def test_content_shows_no_code_when_it_is_printed() -> None:
    """What ends in a traceback or a log by mistake has no secret."""
    assert "012345" not in f"{written()!r} {written()} {[written()]}"


def test_product_with_a_line_break_makes_no_content() -> None:
    """The subject stays one line; the refusal does not tell the code."""
    with pytest.raises(ValueError, match="no mail with the code") as caught:
        written(product="Example\r\nBcc: eve@example.net")
    assert "012345" not in str(caught.value)


# The look


@pytest.mark.parametrize("language", SHIPPED)
def test_html_is_a_complete_document(language: str) -> None:
    """It names its language, direction, charset and colour schemes, fits a phone, and is small."""
    content = written(locale=language)
    page = Page(content.html)
    assert content.html.startswith("<!doctype html>\n")
    assert page.attributes("html") == {"lang": language, "dir": "ltr"}
    metas = {attributes.get("name"): attributes.get("content") for tag, attributes in page.elements if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == metas["supported-color-schemes"] == "light dark"
    assert page.attributes("meta") == {"charset": "utf-8"}
    assert ":root { color-scheme: light dark; supported-color-schemes: light dark; }" in content.html
    assert {attributes.get("role") for tag, attributes in page.elements if tag == "table"} == {"presentation"}
    assert len(content.html.encode()) < 10_000


@pytest.mark.parametrize("is_dark", [False, True])
def test_text_can_be_read(is_dark: bool) -> None:  # noqa: FBT001 - pytest gives arguments by name
    """Every text has WCAG's contrast for AA in both colour schemes, and 14 px at least."""
    page = Page(written().html, is_dark=is_dark)
    assert len(page.texts) == 5
    for style in page.styles:
        assert contrast(style) >= 4.5
        assert int(style["font-size"].removesuffix("px")) >= 14
    assert (luminance(page.styles[0]["background"]) < 0.1) == is_dark


def test_contrast_is_that_of_wcag() -> None:
    """The measure is right: the ratios that are known are found."""
    assert contrast({"color": "#000000", "background": "#ffffff"}) == pytest.approx(21)
    assert contrast({"color": "#777777", "background": "#ffffff"}) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("language", SHIPPED)
def test_code_is_one_text(language: str) -> None:
    """Copying the code gives its digits and nothing else; what spreads them is style. It is the largest text."""
    page = Page(written(locale=language).html)
    place = page.texts.index("012345")
    assert "letter-spacing" in page.styles[place]
    sizes = [int(style["font-size"].removesuffix("px")) for style in page.styles]
    assert sizes[place] == max(sizes) >= 2 * sorted(sizes)[-2]


def test_nothing_is_fetched_and_nothing_can_be_clicked() -> None:
    """No picture, link, script or font: a mail tells nobody that it was read, and teaches nobody to click."""
    sources = [path.read_text("utf-8") for path in SOURCES.rglob("*.*")]
    assert len(sources) == 1 + 3 * len(SHIPPED)
    forbidden = re.compile(
        r"https?:|//|src|href|url\(|@import|@font-face|<(a|img|link|script|iframe|form|object)\b", re.IGNORECASE
    )
    assert [found[0] for source in sources if (found := forbidden.search(source))] == []


# Languages


@pytest.mark.parametrize(
    ("locale", "language"),
    [
        ("de", "de"),
        ("DE", "de"),
        ("de-AT", "de"),
        ("de-Latn-DE-1996", "de"),
        ("pt-BR", "pt"),
        ("pt_BR", "pt"),
        ("pt-x-private", "pt"),
        ("en-GB", "en"),
        ("cs", "en"),
        ("deu", "en"),
        ("", "en"),
        ("*", "en"),
        ("-", "en"),
        ("x", "en"),
        ("../de", "en"),
        ("de/../fr", "en"),
    ],
)
def test_closest_language_is_taken(locale: str, language: str) -> None:
    """It is RFC 4647's lookup, without regard to case; what leads nowhere leads to the language of last resort."""
    assert OURS.language(locale) == language


def test_closest_of_an_operators_languages_is_taken(tmp_path: Path) -> None:
    """A longer tag goes before a shorter one, and a part that only announced another goes with that."""
    ours = {name: (SOURCES / "pt" / name).read_text("utf-8") for name in ("subject.txt", "body.txt", "body.html")}
    files = {f"{tag}/{name}": source for tag in ("pt-BR", "zh-Hant") for name, source in ours.items()}
    templates = Templates(put(tmp_path, files), locale="de-CH")
    assert templates.languages == (*SHIPPED, "pt-BR", "zh-Hant")
    found = [
        templates.language(each) for each in ("pt-br-x-any", "pt-br", "pt-PT", "zh-hant-TW", "zh-a-b", "zh-TW", "zh")
    ]
    assert found == ["pt-BR", "pt-BR", "pt", "zh-Hant", "de", "de", "de"]


@given(st.text(max_size=40))
@PROPERTY
def test_any_text_leads_to_a_language(locale: str) -> None:
    """A locale from a request never fails, whatever is in it."""
    assert OURS.language(locale) in SHIPPED


def test_locale_without_templates_is_refused() -> None:
    """The refusal names the languages there are."""
    assert faults(None, locale="tlh") == [
        "there are no templates for the locale 'tlh': de, en, es, fr, it, nl, pl, pt are right"
    ]


# An operator's own templates


def test_layout_of_an_operator_is_used_for_all_languages(tmp_path: Path) -> None:
    """Only the look is another: the words are ours."""
    layout = "<!doctype html>\n<p>{{ code }}<p>{% block purpose %}{% endblock %}"
    templates = Templates(put(tmp_path, {"layout.html": layout}), locale="en")
    assert templates.languages == SHIPPED
    content = written(locale="it", product="B&B", by=templates)
    assert content.html == (
        "<!doctype html>\n<p>012345<p>Inserisca questo codice per verificare questo indirizzo email su B&amp;B:\n"
    )
    assert content.text == written(locale="it", product="B&B").text


def test_one_file_of_an_operator_is_used_beside_ours(tmp_path: Path) -> None:
    """File by file: its subject, our bodies."""
    templates = Templates(put(tmp_path, {"en/subject.txt": "\n  {{ product }}: {{ code }}\n\n"}), locale="en")
    assert written(by=templates).subject == "Example: 012345"
    assert (written(by=templates).text, written(by=templates).html) == (written().text, written().html)


def test_language_of_an_operator_is_added(tmp_path: Path) -> None:
    """A new folder is a new language, in its direction; our layout serves it."""
    arabic = {"subject.txt": "{{ code }} رمزك في {{ product }}", "body.txt": "{{ code }}", "body.html": RTL_BODY}
    templates = Templates(put(tmp_path, {f"ar/{name}": source for name, source in arabic.items()}), locale="en")
    content = written(locale="ar-EG", by=templates)
    assert (content.language, content.subject, content.text) == ("ar", "012345 رمزك في Example", "012345\n")
    page = Page(content.html)
    assert page.attributes("html") == {"lang": "ar", "dir": "rtl"}
    assert page.styles[0]["text-align"] == "right"
    assert received(composed(content)).get_all("Content-Language") == ["ar"]


@pytest.mark.parametrize(
    ("tag", "direction"),
    [("he", "rtl"), ("fa-AF", "rtl"), ("az-Arab", "rtl"), ("ur-Latn", "ltr"), ("zh-Hant-TW", "ltr"), ("cs", "ltr")],
)
def test_direction_follows_language_and_script(tmp_path: Path, tag: str, direction: str) -> None:
    """The script decides where the tag names one."""
    files = {"subject.txt": "{{ code }}", "body.txt": "{{ code }}", "body.html": "{{ code }} {{ direction }}"}
    templates = Templates(put(tmp_path, {f"{tag}/{name}": source for name, source in files.items()}), locale="en")
    assert written(locale=tag, by=templates).html == f"012345 {direction}\n"


def test_templates_are_read_once(tmp_path: Path) -> None:
    """What was checked at the start is what is used: a change afterwards needs another start."""
    put(tmp_path, {"en/subject.txt": "Your code: {{ code }}"})
    templates = Templates(tmp_path, locale="en")
    put(tmp_path, {"en/subject.txt": "{{ broken"})
    assert written(by=templates).subject == "Your code: 012345"


def test_templates_are_found_the_way_kubernetes_mounts_them(tmp_path: Path) -> None:
    """Links to files and folders are followed, and the hidden folder that they lead to is no language."""
    put(tmp_path / "..2026_11_22", {"en/subject.txt": "Linked: {{ code }}"})
    (tmp_path / "..data").symlink_to("..2026_11_22")
    (tmp_path / "en").symlink_to("..data/en")
    assert written(by=Templates(tmp_path, locale="en")).subject == "Linked: 012345"


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    """Notes and what editors leave behind may lie there, in any encoding; a byte order mark is no text."""
    put(tmp_path, {"README.md": "{{", "en/subject.txt~": "{{", "en/.body.txt.swp": "{{", ".git/config.txt": "{{"})
    (tmp_path / "en" / "subject.txt").write_bytes("\ufeffDear {{ code }}".encode())
    assert written(by=Templates(tmp_path, locale="en")).subject == "Dear 012345"


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    """File, line, what is wrong, and what would be right; each fault once."""
    put(
        tmp_path,
        {
            "layuot.html": "{{ code }}",
            "de/body.txt": "{{ code }}\n\n{% if minutes > 1 %}{{ minuten }}{% endif %}\n{{ Code }}",
            "en/body.html": '\n{% extends "layouts.html" %}',
            "en/body.txt": "Your code is {{ code }}\n\n{% if minutes == 1 %}...",
            "en/subject.txt": "Your code\n\nfor {{ product }}: {{ code }}",
            "es/subject.txt": "{{ product }}",
            "fr/body.txt": "{{ code|int }}",
            "it/body.html": '{% extends "layout.html" %}\n{% block lifetime %}{{ minutes / 0 }}{% endblock %}',
            "nl/body.txt": "{{ code }}\n{{ code|bold }}",
            "pl/body.html": "<!doctype html><p>{{ product }}",
            "pl/bdoy.html": "",
            "pl/subject.txt": "{{ code }}\n{{ code.digits }}",
            "pt-br/subject.txt": "{{ code }}",
            "zh-Hant/subject.txt": "{{ code }}",
            "images/logo.txt": "",
            "en-x/body.txt": "",
        },
    )
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "body.txt").write_bytes(b"{{ code }}\n\xff")
    (tmp_path / "pt" / "body.html").symlink_to("nowhere")
    right = "code, product, minutes, language and direction are right"
    files = "subject.txt, body.txt, body.html are right"
    unfinished = (
        "Unexpected end of template. Jinja was looking for the following tags: 'elif' or 'else' or 'endif'. The"
        " innermost block that needs to be closed is 'if'."
    )
    undefined = "UndefinedError: 'str object' has no attribute 'digits'"
    assert sorted(faults(tmp_path)) == sorted(
        [
            "layuot.html: nothing uses it: layout.html is right here",
            f"de/body.txt:3: there is no variable 'minuten': {right}",
            f"de/body.txt:4: there is no variable 'Code': {right}",
            "en/body.html:2: there is no template 'layouts.html': layout.html is right",
            f"en/body.txt:3: a Jinja template is right: {unfinished}",
            "en/subject.txt: it makes 3 lines: one is right",
            "es/subject.txt: it does not show the code: {{ code }} in it is right",
            "fr/body.txt: it does not show the code: {{ code }} in it is right",
            "it/body.html:2: a template that can be rendered is right: ZeroDivisionError: division by zero",
            "nl/body.txt:2: a Jinja template is right: No filter named 'bold'.",
            f"pl/bdoy.html: nothing uses it: {files} here",
            "pl/body.html: it does not show the code: {{ code }} in it is right",
            f"pl/subject.txt:2: a template that can be rendered is right: {undefined}",
            "pt-br: pt-BR is right",
            "pt/body.html: No such file or directory: a file that can be read is right",
            "pt/body.txt:2: a text in UTF-8 is right",
            f"zh-Hant: without body.txt and body.html: {files}",
            "images: not a language's tag: one such as en, pt-BR or zh-Hant is right",
            "en-x: not a language's tag: one such as en, pt-BR or zh-Hant is right",
        ]
    )


def test_layout_without_the_code_is_one_fault(tmp_path: Path) -> None:
    """Our bodies leave the code to the layout: it is told of that, and not each of our files."""
    put(tmp_path, {"layout.html": "{% block purpose %}{% endblock %}"})
    assert faults(tmp_path) == ["layout.html: it does not show the code: {{ code }} in it is right"]


def test_broken_layout_is_one_fault(tmp_path: Path) -> None:
    """It is told once, and not for each language that it serves."""
    put(tmp_path, {"layout.html": "<p>\n{{ code }"})
    assert faults(tmp_path) == ["layout.html:2: a Jinja template is right: unexpected '}'"]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    """A path that was mistyped does not pass for a folder without templates."""
    put(tmp_path, {"file": ""})
    (fault,) = faults(tmp_path / name)
    assert fault.startswith(f"{tmp_path / name}: ")
    assert fault.endswith(": a folder of templates is right")


@pytest.mark.parametrize(
    "source",
    [
        '{% include "/etc/passwd" %}',
        '{% include "../secret.txt" %}',
        '{% include "en/../../secret.txt" %}',
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        '{{ "%s" | attr("__class__") }}',
    ],
)
def test_template_stays_in_its_sandbox(tmp_path: Path, source: str) -> None:
    """It reads no file but templates, and reaches nothing of Python's."""
    put(tmp_path, {"secret.txt": "secret"})
    folder = put(tmp_path / "templates", {"en/body.txt": "{{ code }}" + source})
    (fault,) = faults(folder)
    assert fault.startswith("en/body.txt:1: ")


# The message


def test_message_has_its_headers() -> None:
    """Those that say what it is, each once, and no others; most fit into a line as they are."""
    message = composed(written(), product="Example Inc.")
    head = message.as_bytes().partition(b"\r\n\r\n")[0].decode("ascii")
    assert head.split("\r\n") == [
        'From: "Example Inc." <no-reply@example.com>',
        "To: ada@example.org",
        "Subject: 012345 is your Example code",
        "Date: Sun, 22 Nov 2026 09:30:15 +0000",
        "Message-ID: <9e6b3a5e-6f0c-4a8e-8f59-0c6f6a5d1b7e@example.com>",
        "Auto-Submitted: auto-generated",
        "X-Auto-Response-Suppress: All",
        "MIME-Version: 1.0",
        "Content-Type: multipart/alternative;",
        ' boundary="=_9e6b3a5e6f0c4a8e8f590c6f6a5d1b7e"',
        "Content-Language: en",
    ]


@pytest.mark.parametrize("language", SHIPPED)
def test_recipient_reads_what_was_written(language: str) -> None:
    """Plain text comes first and HTML, which is better, after it; both arrive letter by letter."""
    content = written(locale=language, product="Żółć & Söhne™")
    message = received(composed(content, product="Żółć & Söhne™"))
    assert message.get_content_type() == "multipart/alternative"
    parts = list(message.iter_parts())
    assert [part.get_content_type() for part in parts] == ["text/plain", "text/html"]
    assert [part.get_content_charset() for part in parts] == ["utf-8", "utf-8"]
    assert [part.get_content().replace("\r\n", "\n") for part in parts] == [content.text, content.html]
    assert message["Subject"] == content.subject
    assert message["From"].addresses[0].display_name == "Żółć & Söhne™"
    assert message["Content-Language"] == language
    assert not message.defects
    assert not any(header.defects for _, header in message.items())


@PROPERTY
@given(product=PRODUCTS, code=CODES, language=st.sampled_from(SHIPPED))
@example(product='<b>&"Ex ample', code="000000", language="en")
@example(product="=?utf-8?q?a=0D=0ABcc:_eve=40example=2Enet?=", code="000000", language="de")
@example(product="eve@example.net>, <mallory@example.net", code="000000", language="de")
@example(product="\\", code="000000", language="en")
@example(product="  two  spaces  ", code="000000", language="pt")
@example(product="\U0001f511" * 64, code="000000", language="en")
@example(product="a" * 64, code="000000", language="en")
@example(product="a b" * 100, code="000000", language="en")
@example(product="\u00a0", code="000000", language="fr")
def test_any_product_travels_in_headers(product: str, code: str, language: str) -> None:
    """The name of the sender and the subject arrive as they were; no name makes a header, or another address."""
    content = written(code, product=product, locale=language)
    message = composed(content, product=product)
    content_on_the_wire = message.as_bytes()
    lines = content_on_the_wire.decode("ascii").split("\r\n")
    assert max(map(len, lines)) <= 78
    assert not any("\r" in line or "\n" in line for line in lines)
    read = email.message_from_bytes(content_on_the_wire, policy=policy.compat32)
    assert read.keys() == composed(written()).keys()
    name, address = parseaddr(read["From"])
    assert str(make_header(decode_header(name))) == product
    assert address == "no-reply@example.com"
    assert str(make_header(decode_header(read["Subject"]))) == content.subject
    bodies = [part.get_payload(decode=True) for part in read.walk() if not part.is_multipart()]
    assert bodies == [body.replace("\n", "\r\n").encode() for body in (content.text, content.html)]


@pytest.mark.parametrize("control", ["\r\nBcc: eve@example.net", "\n", "\r", "\0", "\x0b", "\x85", "\u2028", "\ud800"])
@pytest.mark.parametrize("place", ["product", "sender", "to", "subject"])
def test_control_characters_make_no_header(place: str, control: str) -> None:
    """Line breaks of every kind are refused, and the refusal does not show what it refused."""
    values = {"product": "Example", "sender": "no-reply@example.com", "to": "ada@example.org", "subject": "012345"}
    values[place] += control
    content = Content(language="en", subject=values["subject"], text="012345\n", html="012345\n")
    with pytest.raises(ValueError, match="line break or a control character") as caught:
        composed(content, product=values["product"], sender=values["sender"], to=values["to"])
    assert not re.search("eve|ada|012345", str(caught.value))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ada",
        "ada@",
        "@example.org",
        "ada@exämple.org",
        "ada@example.org, eve@example.net",
        "ada@example.org,eve@example.net",
        "<ada@example.org>",
        "Ada <ada@example.org>",
        "ada@eve@example.net",
        '"ada eve"@example.org',
        "ada eve@example.org",
        "ada\u00a0eve@example.org",
        "ada(eve)@example.org",
        "ada@example.org;",
        "ada@[192.0.2.1]",
        f"{'a' * 320}@example.org",
    ],
)
@pytest.mark.parametrize("place", ["sender", "to"])
def test_what_is_not_one_address_is_refused(place: str, address: str) -> None:
    """A message goes to one mailbox, whatever the checks before this one let through; the refusal does not show it."""
    values = {"sender": "no-reply@example.com", "to": "ada@example.org"} | {place: address}
    with pytest.raises(ValueError, match="not an address") as caught:
        composed(written(), sender=values["sender"], to=values["to"])
    assert "ada" not in str(caught.value)


def test_international_address_travels_in_utf_8() -> None:
    """An address with other letters is written as it is: that is what SMTPUTF8 is for."""
    message = composed(written(), to="jörg.łoś@xn--exmple-cua.org")
    assert "To: jörg.łoś@xn--exmple-cua.org\r\n".encode() in message.as_bytes()
    read = email.message_from_string(message.as_bytes().decode(), policy=policy.SMTPUTF8)
    assert read["To"].addresses[0].addr_spec == "jörg.łoś@xn--exmple-cua.org"
    assert "<größe@example.com>".encode() in composed(written(), sender="größe@example.com").as_bytes()


@pytest.mark.parametrize("language", SHIPPED)
def test_message_to_an_ascii_address_is_ascii(language: str) -> None:
    """Any mail server can take it, one without 8BITMIME too."""
    message = composed(written(locale=language, product="Ünïcode"), product="Ünïcode")
    assert message.as_bytes().isascii()


def test_short_texts_are_encoded_too() -> None:
    """Of a text whose lines are short enough to stand as they are, the other letters are encoded all the same."""
    content = Content(language="fr", subject="012345", text="à 012345\n", html="<p>à 012345\n")
    message = composed(content)
    assert message.as_bytes().isascii()
    parts = received(message).iter_parts()
    assert [part.get_content().replace("\r\n", "\n") for part in parts] == [content.text, content.html]


def test_long_addresses_are_neither_broken_nor_encoded() -> None:
    """Addresses and the message's id stay whole, however long."""
    domain = ".".join(["d" * 60] * 4) + ".example"
    sender, to = f"{'s' * 64}@{domain}", f"{'r' * 64}@{domain}"
    message = composed(written(), sender=sender, to=to)
    lines = message.as_bytes().decode("ascii").split("\r\n")
    assert lines[:3] == ['From: "Example"', f" <{sender}>", f"To: {to}"]
    assert f"Message-ID: <{ID}@{domain}>" in lines
    assert received(message)["From"].addresses[0].addr_spec == sender


def test_same_mail_twice_is_the_same() -> None:
    """What is sent again after a lost answer can be told to be the same, by its id and by every byte."""
    assert composed(written()).as_bytes() == composed(written()).as_bytes()


def test_date_keeps_its_zone() -> None:
    """The date is the moment given."""
    moment = datetime.fromisoformat("2026-03-29T03:00:00+02:00")
    assert received(composed(written(), date=moment))["Date"].datetime == moment


def test_standard_policies_leave_headers_as_they_are() -> None:
    """What a library does that sends messages by Python's own policies: headers that fit in a line stay the same."""
    message = composed(written(locale="de", product="Ünïcode"), product="Ünïcode")
    assert message.as_bytes(policy=policy.SMTP.clone(cte_type="7bit")) == message.as_bytes()
