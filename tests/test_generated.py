import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.protobuf.message import Message

from service import errors

ROOT = Path(__file__).parent.parent
PROTOS = sorted((ROOT / "protos").rglob("*.proto"))

SECRET_FIELDS = {"secret", "link_secret", "code", "email_verification_token", "email", "relates_to"}
ALLOWED_IMPORTS = {"google/protobuf/timestamp.proto", "google/protobuf/duration.proto"}

PARTS = {
    "FileDescriptorProto": ("message_type", "enum_type", "service"),
    "DescriptorProto": ("field", "nested_type", "enum_type", "oneof_decl"),
    "EnumDescriptorProto": ("value",),
    "ServiceDescriptorProto": ("method",),
}
"""What each kind of descriptor is made of, by the names of its fields."""


def protoc(*options: str) -> None:
    """Run protoc, with the plugins that stand beside this Python, over every proto."""
    plugins = str(Path(sys.executable).parent)
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Iprotos", *options, *(str(p.relative_to(ROOT)) for p in PROTOS)],
        cwd=ROOT,
        env=os.environ | {"PATH": os.pathsep.join([plugins, os.environ.get("PATH", "")])},
        check=True,
    )


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """What protoc makes of the protos, with nothing but their folder as include path, comments included."""
    path = tmp_path_factory.mktemp("descriptors") / "set.binpb"
    protoc(f"--descriptor_set_out={path}", "--include_source_info")
    files = list(FileDescriptorSet.FromString(path.read_bytes()).file)
    assert len(files) == len(PROTOS) > 0
    return files


def messages(file: FileDescriptorProto) -> Iterator[DescriptorProto]:
    """Yield every message, nested ones too."""
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop()
        yield message
        waiting += message.nested_type


def fields(files: list[FileDescriptorProto]) -> Iterator[tuple[str, FieldDescriptorProto]]:
    """Yield every field with its full name."""
    for file in files:
        for message in messages(file):
            for field in message.field:
                yield f"{message.name}.{field.name}", field


def test_stubs_are_what_the_protos_say(tmp_path: Path) -> None:
    """generated/ holds what protoc and its plugins make of protos/, byte for byte, and no file besides."""
    outputs = ("python_out=", "grpc_python_out=", "mypy_out=quiet:", "mypy_grpc_out=quiet:")
    protoc(*(f"--{output}{tmp_path}" for output in outputs))

    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    generated = ROOT / "generated"
    committed = {
        path.relative_to(generated): path.read_bytes()
        for path in generated.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert committed.keys() == made.keys(), "run: make generate"
    assert [path for path in made if committed[path] != made[path]] == [], "run: make generate"


def test_fields_with_secrets_and_addresses_are_marked(descriptors: list[FileDescriptorProto]) -> None:
    """Every field that carries a secret or an address says `debug_redact`, so that a log of messages leaves it out."""
    found = {name: field for name, field in fields(descriptors) if field.name in SECRET_FIELDS}
    # `code` is also the name of a message-typed member of a oneof; the field inside that message is the marked one.
    strings = {name: field for name, field in found.items() if field.type != FieldDescriptorProto.TYPE_MESSAGE}
    assert {field.name for field in strings.values()} == SECRET_FIELDS
    assert [name for name, field in strings.items() if not field.options.debug_redact] == []


def test_protos_need_no_other_include_path(descriptors: list[FileDescriptorProto]) -> None:
    """The protos import nothing beyond two files that come with every protoc, so that any client can compile them."""
    assert {name for file in descriptors for name in file.dependency} <= ALLOWED_IMPORTS


def parts(thing: Message, path: tuple[int, ...] = (), name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield everything that a file declares: its full name, and its path in SourceCodeInfo."""
    for kind in PARTS.get(thing.DESCRIPTOR.name, ()):
        number = thing.DESCRIPTOR.fields_by_name[kind].number
        for i, part in enumerate(getattr(thing, kind)):
            if kind == "oneof_decl" and part.name.startswith("_"):
                continue  # not declared: protoc makes one for each `optional` field
            full_name, part_path = f"{name}.{part.name}".removeprefix("."), (*path, number, i)
            yield full_name, part_path
            yield from parts(part, part_path, full_name)


def comments(file: FileDescriptorProto) -> dict[str, str]:
    """Return the comment above each thing that a file declares, by full name; empty where there is none."""
    above = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}
    return {name: above[path] for name, path in parts(file)}


def test_everything_in_the_protos_has_a_comment(descriptors: list[FileDescriptorProto]) -> None:
    """Every service, rpc, message, field and enum value says what it means: the protos are the API's documentation."""
    found = {name: comment for file in descriptors for name, comment in comments(file).items()}
    assert "OneTimeTokenService.IssueToken" in found
    assert "OneTimeToken.user_id" in found
    bare = [name for name, comment in found.items() if not comment]
    assert not bare, ", ".join(bare)


def test_comments_name_only_reasons_that_exist(descriptors: list[FileDescriptorProto]) -> None:
    """Each rpc's comment lists its errors, by reasons that service/errors.py has."""
    reasons = {each.reason for each in vars(errors).values() if hasattr(each, "reason") and hasattr(each, "status")}
    for file in descriptors:
        for service in file.service:
            for method in service.method:
                _, _, listed = comments(file)[f"{service.name}.{method.name}"].partition("Errors: ")
                named = set(re.findall(r"\b[A-Z_]{5,}\b", listed))
                assert named, method.name
                assert named <= reasons, method.name
