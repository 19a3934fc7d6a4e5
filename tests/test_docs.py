import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import clean_environment, free_port
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onetime.v1 import one_time_tokens_pb2

from service import config
from service.app import SERVICES
from service.callers import Callers, Contract
from service.errors import OnetimeError
from service.fields import STORED_TYPES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
START_TIMEOUT_S = 60.0
"""Making the database of `onetime dev` comes first."""

Row = dict[str, str]


def tracked_files() -> list[Path]:
    """Return the files that git has or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert Path(__file__) in paths
    return [path for path in paths if path.is_file()]  # one may be deleted, and not committed yet


def docs() -> list[Path]:
    """Return all documents."""
    found = [path for path in tracked_files() if path.suffix == ".md"]
    assert README in found
    return found


# Reading Markdown


def section(heading: str) -> list[str]:
    """Return README's lines under a heading of the second level."""
    lines = README.read_text("utf-8").splitlines()
    assert f"## {heading}" in lines, f"README has no heading `## {heading}`"
    start = lines.index(f"## {heading}") + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
    return lines[start:end]


def rows(heading: str) -> list[Row]:
    """Return the rows of all tables under a heading, each by its columns' names."""
    found: list[Row] = []
    header: list[str] = []
    for line in section(heading):
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if not header:
            header = [cell.lower() for cell in cells]
        elif not all(re.fullmatch(":?-+:?", cell) for cell in cells):
            found.append(dict(zip(header, cells, strict=True)))
    assert found, f"README has no table under `## {heading}`"
    return found


def quoted(cell: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall("`([^`]+)`", cell)


def fences(text: str, language: str = "[a-z]*") -> list[str]:
    """Return the contents of the fenced blocks."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


# README against the code


def contract() -> list[FileDescriptor]:
    """Return the descriptors of the contract's files."""
    stubs = sorted((ROOT / "generated" / "onetime" / "v1").glob("*_pb2.py"))
    return [importlib.import_module(f"onetime.v1.{stub.stem}").DESCRIPTOR for stub in stubs]


def test_readme_lists_every_rpc() -> None:
    """README's table of RPCs has the rpcs of the contract: none is missing, none is made up."""
    served = [
        f"{service.name}/{method.name}"
        for file in contract()
        for service in file.services_by_name.values()
        for method in service.methods
    ]
    # A row names `Service/Rpc`, or `Rpc` alone, which is clear as long as no two services share a name.
    methods = [name.partition("/")[2] for name in served]
    assert len(set(methods)) == len(methods)
    listed = [quoted(next(iter(row.values())))[0] for row in rows("RPCs")]
    full = {name.partition("/")[2]: name for name in served}
    assert sorted(full.get(name, name.removeprefix("onetime.v1.")) for name in listed) == sorted(served)


def test_readme_lists_every_error() -> None:
    """README's table of errors has the status and the reason of every error that the service makes."""
    errors: set[type[OnetimeError]] = set()  # a set, since an error may have two parents
    waiting = OnetimeError.__subclasses__()
    while waiting:
        error = waiting.pop()
        waiting += error.__subclasses__()
        if "reason" in vars(error):
            errors.add(error)
    assert errors
    listed = []
    for row in rows("Errors"):
        reasons = quoted(row["reason"])
        if reasons:  # a row without one is about statuses that gRPC itself makes
            (status,) = quoted(row["status"])
            listed += [(status, reason) for reason in reasons]
    assert sorted(listed) == sorted((error.status.name, error.reason) for error in errors)


def test_readme_describes_every_setting() -> None:
    """README's table of settings has every setting, in its order, with the default and the description of the code."""
    settings = config.describe()
    wanted = [
        {
            "setting": f"`{setting.option or setting.variable}`",
            "default": f"`{setting.default}`" if setting.default else "",
            "description": setting.description.replace("\n", " "),
        }
        for setting in settings
    ]
    assert all(row["description"] for row in wanted)
    have = [{name: row[name] for name in ("setting", "default", "description")} for row in rows("Settings")]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row.values()) + " |" for row in wanted)
    assert have == wanted, f"the rows are to be:\n{table}"


def test_readme_tells_where_each_setting_comes_from() -> None:
    """Each option has the environment variable and the TOML key that README's rule derives from its name."""
    for setting in config.describe():
        assert setting.variable == config.ENV_PREFIX + setting.name.upper()
        assert setting.option in {None, "--" + setting.name.replace("_", "-")}
    text = "\n".join(section("Settings"))
    assert config.ENV_PREFIX in text
    assert "TOML" in text


# README's examples


@pytest.fixture
def dev_target() -> Iterator[str]:
    """The address of a running `onetime dev`, in a new data folder: what `make serve` starts."""
    target = f"127.0.0.1:{free_port()}"
    # Not pytest's own folder: under root, PostgreSQL runs as another account, which must be able to reach it.
    with tempfile.TemporaryDirectory(prefix="onetime-docs-") as folder, (Path(folder) / "log").open("w+b") as log:
        dev = subprocess.Popen(
            [sys.executable, "-m", "service", "dev", "--listen", target, "--data-dir", f"{folder}/data"],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            wait_until_serving(dev, target, Path(log.name))
            yield target
        finally:
            dev.terminate()
            exit_code = dev.wait(30)
        assert exit_code == 0, Path(log.name).read_text("utf-8")


def wait_until_serving(process: subprocess.Popen[bytes], target: str, log: Path) -> None:
    """Wait until health says SERVING, or fail with the server's log."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with grpc.insecure_channel(target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1)  # type: ignore[attr-defined] # not in types-grpcio
            except grpc.RpcError:
                time.sleep(0.05)
                continue
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
    pytest.fail(f"onetime dev is not serving; its log:\n{log.read_text('utf-8')}")


@pytest.mark.timeout(180)
def test_readme_snippets_run(request: pytest.FixtureRequest) -> None:
    """All of README's shell blocks that call grpcurl run, in order, in one shell, on what `make serve` starts."""
    snippets = [block for block in fences(README.read_text("utf-8"), "sh") if "grpcurl" in block]
    script = "\n".join(snippets)
    default = "127.0.0.1:50051"
    calls = re.findall(r"^[^#\n]*\bgrpcurl\b", script, re.MULTILINE)
    assert calls
    assert script.count(default) >= len(calls), f"every call goes to {default}"
    if shutil.which("grpcurl") is None:
        if "CI" in os.environ:
            pytest.fail("grpcurl is not on PATH, and CI must have it")
        pytest.skip("grpcurl is not on PATH")

    target: str = request.getfixturevalue("dev_target")
    run = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script.replace(default, target)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
        text=True,
    )
    assert run.returncode == 0, run.stdout


# All documents


def code_of(text: str) -> list[str]:
    """Return the code in a document: its fenced blocks and what stands in backticks."""
    spans = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return fences(text) + quoted(spans)


def test_the_policy_that_readme_shows_is_right() -> None:
    """The policy in README is one that a server takes."""
    (shown,) = fences((ROOT / "README.md").read_text("utf-8"), "toml")
    types = {one_time_tokens_pb2.TokenType.Name(number): label for number, label in STORED_TYPES.items()}
    callers = Callers(shown.encode(), Contract.of(SERVICES, types), certificates=True)
    assert set(callers.names()) == {"spiffe://example.org/accounts", "signup"}


def test_each_promise_has_tests_that_exist() -> None:
    """docs/security.md names a test for each promise, and each of them is there."""
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    promises = re.findall(r"^\| (.+?) \| ((?:`test_\w+\.py::\w+` ?)+)\|$", text, re.MULTILINE)
    assert len(promises) > 15
    assert len(promises) == text.partition("## Promises")[2].partition("## ")[0].count("\n|") - 2
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", text))
    missing = {
        (file, name)
        for file, name in named
        if f"def {name}("
        not in ((ROOT / "tests" / file).read_text("utf-8") if (ROOT / "tests" / file).exists() else "")
    }
    assert missing == set()


def test_documents_name_only_targets_that_make_has() -> None:
    """Every `make …` in a document is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert "test" in targets
    named = {
        (path.name, target)
        for path in docs()
        for code in code_of(path.read_text("utf-8"))
        for target in re.findall(r"(?:^|[;&] *)make(?: +[A-Z]+=\S+)* +([a-z][a-z-]*)", code, re.MULTILINE)
    }
    assert {("README.md", "serve"), ("README.md", "test")} <= named
    assert [(name, target) for name, target in sorted(named) if target not in targets] == []


def test_relative_links_lead_somewhere() -> None:
    """Every relative link in a document leads to a file, and to a heading where it names one."""
    broken = []
    for path in docs():
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
            if re.match("[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            file = path.parent / name if name else path
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert broken == []


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# Patterns, so that this file does not name what it forbids.
FORBIDDEN = {
    "a package registry's host": re.compile(
        r"pypi\.org|pythonhosted\.org|(?:proxy|sum)\.golang\.org|npmjs\.(?:org|com)|crates\.io|maven\.org"
        r"|maven\.apache\.org|deb\.debian\.org|docker\.(?:io|com)|ghcr\.io|gcr\.io|quay\.io"
    ),
    "an index for pip": re.compile(r"--(?:(?:extra-)?index-ur[l]|find-link[s]|trusted-hos[t])"),
    "a path of one machine": re.compile(r"(?<![\w.$}~*-])/(?:root|work|home|Users|opt/wheels)/"),
}


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    """Nothing in the tree binds it to one package registry or to one machine."""
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {what}: {hit}"
            for what, pattern in FORBIDDEN.items()
            for hit in pattern.findall(text)
        ]
    assert found == []
