import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service import config

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

LICENCES = {
    "MIT",
    "MIT-0",
    "ISC",
    "Unlicense",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "Apache-2.0",
    "PSF-2.0",
    "LGPL-3.0-only",
}
"""What the packages that are served with may be under. LGPL: psycopg, used as it is, as a library."""

OLD_NAMES = {
    "MIT License": "MIT",
    "3-Clause BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",  # of Jinja: its text has three clauses
}
"""What some packages still say instead of an SPDX expression."""


# The locked requirements


def locked(name: str) -> Mapping[str, Requirement]:
    """Return the pins of a requirements file, by name, that apply to this machine."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert lines
    pins = [Requirement(line.partition(" --hash")[0]) for line in lines]
    assert all("--hash=sha256:" in line for line in lines)
    assert all(re.fullmatch("==[^*,]+", str(pin.specifier)) for pin in pins)
    return {str(canonicalize_name(pin.name)): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}


def needed(requirements: list[str]) -> set[str]:
    """Return the names of the packages that these requirements need, those that the needed ones need included."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for text in importlib.metadata.requires(key[0]) or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in (*key[1], "")):
                waiting.append(further)
    return {name for name, _ in found}


@pytest.mark.parametrize("extras", [[], ["dev", "test"]], ids=["serve", "dev"])
def test_lock_has_what_is_needed_and_nothing_more(extras: list[str]) -> None:
    """The locked packages are those that pyproject.toml asks for and what these need: none is missing, none is left."""
    asked = PROJECT["dependencies"] + [each for extra in extras for each in PROJECT["optional-dependencies"][extra]]
    assert set(locked("dev" if extras else "serve")) == needed(asked)


def test_locks_agree() -> None:
    """The tests run on the versions that are served with, and the image is built with the setuptools of the tests."""
    dev = {name: str(pin.specifier) for name, pin in locked("dev").items()}
    for each in ("serve", "build"):
        pins = {name: str(pin.specifier) for name, pin in locked(each).items()}
        assert pins.items() <= dev.items()


def test_this_environment_is_the_locked_one() -> None:
    """What these tests import is what is locked."""
    wrong = {
        name: importlib.metadata.version(name)
        for name, pin in locked("dev").items()
        if not pin.specifier.contains(importlib.metadata.version(name), prereleases=True)
    }
    assert wrong == {}


def test_every_dependency_is_imported() -> None:
    """Each package that pyproject.toml asks for is one that the service imports."""
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "service").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", sources, re.MULTILINE))
    unused = []
    for requirement in map(Requirement, PROJECT["dependencies"]):
        files = importlib.metadata.files(requirement.name) or []
        modules = {
            str(path.parent / path.stem).replace("/", ".").removesuffix(".__init__")
            for path in files
            if path.suffix == ".py"
        }
        if not modules & imported:
            unused.append(requirement.name)
    assert unused == []


def test_licences_allow_what_we_do() -> None:
    """Every package that is served with has a licence that we know and can keep."""
    for name in locked("serve"):
        metadata = importlib.metadata.metadata(name)
        classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
        said = str((metadata.get_all("License-Expression") or metadata.get_all("License") or classifiers or [""])[0])
        names = {OLD_NAMES.get(said, each) for each in re.split(" (?:AND|OR) ", said)}
        assert names <= LICENCES, f"{name}: {said!r}"


@pytest.mark.parametrize(
    ("package", "pattern"),
    [("protobuf", r"^# Protobuf Python Version: (\S+)$"), ("grpcio", r"^GRPC_GENERATED_VERSION = '(\S+)'$")],
)
def test_stubs_work_with_every_version_allowed(package: str, pattern: str) -> None:
    """The oldest runtime that pyproject.toml allows is not older than the generated code, which refuses such a one."""
    texts = [path.read_text("utf-8") for path in (ROOT / "generated").rglob("*.py")]
    generated = {Version(found) for text in texts for found in re.findall(pattern, text, re.MULTILINE)}
    assert generated
    requirement = next(each for each in map(Requirement, PROJECT["dependencies"]) if each.name == package)
    oldest = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
    assert max(oldest) >= max(generated)


# The Dockerfile


@dataclass(slots=True)
class Stage:
    """One stage of the Dockerfile: what its instructions say, in order."""

    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        """Return the arguments of every instruction of this name."""
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def environment(self) -> dict[str, str]:
        """Return what ENV sets."""
        return dict(pair.split("=", 1) for arguments in self.all("ENV") for pair in arguments.split())


def stages() -> list[Stage]:
    """Read the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    found: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line:
            continue
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            found.append(Stage())
        elif found:
            found[-1].instructions.append((instruction, arguments))
    assert len(found) == 2
    return found


@dataclass(frozen=True, slots=True)
class Image:
    """What the Dockerfile builds, in a folder instead of an image."""

    root: Path
    """Stands for /."""
    python: Path
    """The interpreter of the environment."""

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the image would: with its PATH and its environment, outside of the checkout."""
        settings = stages()[-1].environment()
        path = settings.pop("PATH").replace("/opt/", f"{self.root}/opt/").replace("$PATH", os.defpath)
        return subprocess.run(
            command,
            cwd="/",
            env={"PATH": path} | settings | environment,
            stdin=subprocess.DEVNULL,
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def files(self) -> dict[str, tuple[int, int]]:
        """Return every file with its size and the time of its last change."""
        return {
            str(path.relative_to(self.root)): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.root.rglob("*")
        }

    def json(self, code: str) -> Any:  # noqa: ANN401 - what the code prints
        """Run Python code that prints JSON."""
        done = self.run(str(self.python), "-c", f"import json\n{code}")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def base_python() -> str:
    """Return the image's version of Python where this machine has it, or else the one of these tests."""
    found = re.search(r"python:(3\.\d+)", (ROOT / "Dockerfile").read_text("utf-8"))
    assert found
    for command in (f"python{found[1]}", *map(str, Path.home().glob(f".pyenv/versions/{found[1]}.*/bin/python3"))):
        probe = [command, "-c", "import ensurepip, sys; print(sys._base_executable)"]
        if shutil.which(command):
            run = subprocess.run(probe, check=False, capture_output=True, text=True)
            if run.returncode == 0:
                return run.stdout.strip()
    return sys.executable


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Run the builder's instructions, with the image's folders under one of ours; write-protect what comes out."""
    root = tmp_path_factory.mktemp("image")
    subprocess.run([base_python(), "-m", "venv", root / "usr/local"], check=True)
    context = docker_context(root / "context")

    def inside(text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt|src|wheels)\b", rf"{root}/\1", text)

    builder = stages()[0]
    environment = os.environ | builder.environment() | {"PATH": f"{root}/usr/local/bin:{os.environ['PATH']}"}
    folder = root
    for instruction, arguments in builder.instructions:
        if instruction == "WORKDIR":
            folder = Path(inside(arguments))
            folder.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, target = arguments.split()
            assert target.endswith("/"), "a folder"
            for source in sources:
                copy(context / source, folder / target / ("" if source.endswith("/") else source.rpartition("/")[2]))
        elif instruction == "RUN":
            script = inside(arguments)
            done = subprocess.run(
                ["sh", "-ec", script], cwd=folder, env=environment, check=False, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, script
        else:
            assert instruction == "ENV"
    assert stages()[1].all("COPY") == ["--from=builder /opt/onetime /opt/onetime"]
    for leftover in ("context", "src", "wheels"):
        shutil.rmtree(root / leftover)
    protect(root / "opt", 0o555)
    yield Image(root, root / "opt/onetime/bin/python")
    protect(root / "opt", 0o755)


def docker_context(target: Path) -> Path:
    """Copy what .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out that is not named"
    ignored = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    target.mkdir()
    for rule in rules:
        if rule.startswith("!"):
            copy(ROOT / rule[1:], target / rule[1:])
    for path in sorted(target.rglob("*"), reverse=True):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            shutil.rmtree(path)
    return target


def copy(source: Path, target: Path) -> None:
    """Copy a file, or what is in a folder."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def protect(folder: Path, mode: int) -> None:
    """Set the permissions of a folder and of all in it."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(mode)


@pytest.mark.timeout(600)
def test_image_starts_from_anywhere_and_writes_nothing(image: Image) -> None:
    """The installed command works outside the checkout, from write-protected files, and leaves none behind."""
    before = image.files()
    for command in (
        ["onetime", "--help"],
        [str(image.python), "-m", "service", "--help"],
        ["onetime", "serve", "--help"],
    ):
        done = image.run(*command)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
        assert done.stderr == ""
    modules = [f"service.{path.stem}" for path in (ROOT / "service").glob("*.py") if path.stem != "__main__"]
    image.json(f"import importlib\nfor name in {modules}: importlib.import_module(name)\nprint(json.dumps(True))")
    assert image.files() == before


@pytest.mark.timeout(600)
def test_image_sets_nothing_that_the_service_refuses(image: Image) -> None:
    """With what the image's environment sets, and nothing else, the settings are right."""
    assert image.json("from service.config import load\nload({})\nprint(json.dumps('loaded'))") == "loaded"


@pytest.mark.timeout(600)
def test_image_has_the_locked_packages_and_no_others(image: Image) -> None:
    """Only what serve.txt locks is installed: no pip, no embedded PostgreSQL, no test tool."""
    packages = "import importlib.metadata as m\nprint(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = {str(canonicalize_name(name)): version for name, version in image.json(packages).items()}
    assert installed.pop("onetime") == PROJECT["version"]
    pins = locked("serve")
    assert installed.keys() == pins.keys()
    assert all(pins[name].specifier.contains(version, prereleases=True) for name, version in installed.items())


@pytest.mark.timeout(600)
def test_image_has_every_file_of_the_service(image: Image) -> None:
    """SQL, migrations and type information are installed too, not only the modules."""
    purelib = Path(image.json("import sysconfig\nprint(json.dumps(sysconfig.get_path('purelib')))"))
    for folder, installed in (
        (ROOT / "service", purelib / "service"),
        (ROOT / "generated/onetime", purelib / "onetime"),
    ):
        ours = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        theirs = {
            path.relative_to(installed) for path in installed.rglob("*") if path.suffix != ".pyc" and path.is_file()
        }
        assert theirs == ours
    assert list(purelib.glob("service/sql/migrations/*.sql"))
    assert (purelib / "service/py.typed").exists()


@pytest.mark.timeout(600)
def test_image_knows_the_commands_that_the_dockerfile_starts(image: Image) -> None:
    """ENTRYPOINT with CMD, and HEALTHCHECK, are commands that exist, started without a shell."""
    final = stages()[-1]
    (entrypoint,), (command,), (health,) = (final.all(name) for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"))
    for started in (json.loads(entrypoint) + json.loads(command), json.loads(health.partition(" CMD ")[2])):
        done = image.run(*started, "--help")
        assert done.returncode == 0, done.stderr


def test_dockerfile_runs_unprivileged_on_the_port_of_the_service() -> None:
    """The image runs as a fixed number that is not root, stops as the service does, and names the service's port."""
    final = stages()[-1]
    assert [int(number) > 0 for number in final.all("USER")[-1].split(":")] == [True, True]
    _, port = config.parse_listen(config.Settings.model_fields["listen"].default)
    assert final.all("EXPOSE") == [str(port)]
    assert final.all("STOPSIGNAL") == ["SIGTERM"]
    assert not set(final.environment()) & {config.variable_of("keys"), config.variable_of("database_url")}


def test_dockerfile_installs_only_what_is_hash_checked() -> None:
    """Every pip install of the Dockerfile checks hashes, except of the wheel that was just built from this folder."""
    installs = [
        each for stage in stages() for run in stage.all("RUN") for each in run.split("&&") if " install " in each
    ]
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or ("--no-deps" in install and "/wheels/onetime-" in install)
    assert re.search(
        r"^ARG PYTHON_IMAGE=python:\S+@sha256:[0-9a-f]{64}$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE
    )


# The Makefile


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and an empty lock, with a space in its path."""
    folder = tmp_path / "a checkout"
    (folder / "requirements").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "requirements/dev.txt").touch()
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make, which is told nothing by a make that runs these tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=inherited | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def interpreter(folder: Path, before: str = "pass") -> Path:
    """Make an interpreter that runs a statement before its code, and whose environments are made fast, without pip."""
    path = folder / "python of ours"
    before = f"import sys; sys._base_executable = {str(path)!r}; {before}; exec(sys.argv[1])"
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$2" = venv ] && shift 2 && exec "{sys.executable}" -m venv --without-pip "$@"\n'
        f'shift\nexec "{sys.executable}" -c "{before}" "$@"\n',
        "utf-8",
    )
    path.chmod(0o755)
    return path


def test_make_tells_its_targets(checkout: Path) -> None:
    """`make` alone changes nothing and lists the targets that are for people."""
    done = make(checkout)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  make (\w+) +\S", done.stdout, re.MULTILINE)
    assert listed == ["help", "serve", "test", "fuzz", "timing", "bench", "check", "generate", "lock", "clean"]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("target", ["serve", "test", "fuzz", "timing", "bench", "check", "generate", "lock", "clean"])
def test_make_can_tell_what_it_would_do(checkout: Path, target: str) -> None:
    """`make -n` prints the commands of a target and runs none."""
    done = make(checkout, "-n", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.version_info = (3, 9, 2)", "is Python 3.9. onetime needs 3.11 or newer"),
        ("sys.modules['ensurepip'] = None", "has no venv module"),
        ("sys.exit(1)", "does not run. onetime needs Python 3.11 or newer"),
    ],
    ids=["too old", "without venv", "broken"],
)
def test_make_says_what_is_wrong_with_an_interpreter(checkout: Path, before: str, message: str) -> None:
    """An interpreter that does not fit is refused in a sentence, and nothing is set up."""
    done = make(checkout, "test", f"PYTHON={interpreter(checkout, before)}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_sets_up_again_what_does_not_fit(checkout: Path) -> None:
    """A set-up that failed half-way, whose lock has changed, or that was moved is done anew; a good one stays."""
    target = (".venv/.requirements", f"PYTHON={interpreter(checkout)}")
    pip = {"PYTHONPATH": str(importlib.metadata.distribution("pip").locate_file("")), "PIP_NO_INDEX": "1"}
    lock = checkout / "requirements/dev.txt"
    lock.write_text("onetime-has-no-such-dependency==1 --hash=sha256:" + "0" * 64 + "\n", "utf-8")
    done = make(checkout, *target, **pip)
    assert done.returncode != 0
    assert "onetime-has-no-such-dependency" in done.stderr
    half_made = checkout / ".venv/half-made"
    half_made.touch()  # the folder is there: what failed was the step after it
    lock.write_text("", "utf-8")
    done = make(checkout, "-j4", *target, **pip)
    assert done.returncode == 0, done.stderr
    assert not half_made.exists()

    up_to_date = ("--question", target[0])
    assert make(checkout, *up_to_date).returncode == 0
    moved = checkout.rename(checkout.parent / "moved")
    assert make(moved, *up_to_date).returncode == 1
    moved.rename(checkout)
    assert make(checkout, *up_to_date).returncode == 0
    lock.touch()
    assert make(checkout, *up_to_date).returncode == 0
    lock.write_text("# another lock\n", "utf-8")
    assert make(checkout, *up_to_date).returncode == 1
