"""What is known of packages: the files keep to the schema, and a malformed one makes one sentence."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import jsonschema
import pytest
from packaging.version import Version

from attncheck import knowledge
from attncheck.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = sorted(knowledge.FOLDER.glob("*.toml"))
SCHEMA = json.loads((knowledge.FOLDER / "knowledge.schema.json").read_text())

GOOD = """\
package = "some-kernel"
as_of = 2026-11-29

[[needs]]
versions = "==1.0"
package = "torch"
requires = "==2.6.0"
why = "it is compiled against it"
source = "https://pypi.org/project/some-kernel/1.0/"
"""


def document(text: str) -> object:
    return json.loads(json.dumps(tomllib.loads(text), default=str))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_keeps_to_the_schema_and_loads(file: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document(file.read_text(encoding="utf-8")))
    assert knowledge.load(file).package == file.stem


def test_the_schema_is_one_and_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(document(GOOD))
    for line in ("source", "why", "versions"):
        lines = [text for text in GOOD.splitlines() if not text.startswith(line)]
        assert not validator.is_valid(document("\n".join(lines))), line
    assert not validator.is_valid(document(GOOD.replace("https://", "")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("[[needs]]", "[[needs"), "is not valid TOML"),
        (GOOD.replace("requires", "require"), "needs[0]"),
        (GOOD.replace('"==2.6.0"', '"2.6.0"'), "Invalid specifier: '2.6.0'"),
        (GOOD.replace("https://pypi.org", "pypi.org"), "address of a public page"),
        (GOOD.replace("2026-11-29", '"soon"'), "as_of"),
        (GOOD.replace('"some-kernel"', '"Other"'), "one (normalised) name"),
        (GOOD + '[[symbols]]\nname = "_Z1fv"\nsource = "https://x.org"\n', "neither `since`"),
        (
            GOOD.replace(
                "\n[[needs]]",
                'releases = [{ version = "2", source = "https://x.org" }, '
                '{ version = "1", source = "https://x.org" }]\n[[needs]]',
            ),
            "oldest first",
        ),
    ],
)
def test_a_malformed_file_makes_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "some-kernel.toml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        knowledge.load(file)
    said = str(raised.value)
    assert said.startswith(str(file))
    assert says in said
    assert "\n" not in said
    file.write_text(GOOD)  # the healthy twin
    assert knowledge.load(file).needs[0].met_by("2.6.0+cu124")


def test_releases_are_there_for_a_search_in_time() -> None:
    for name, oldest in (
        ("torch", "2.5.0"),
        ("flash-attn", "2.5.9.post1"),
        ("xformers", "0.0.27.post2"),
    ):
        versions = knowledge.releases(name)
        assert versions[0] == oldest
        assert list(versions) == sorted(versions, key=Version)
    assert "2.15.0" in knowledge.releases("torch")
    assert knowledge.releases("Flash_Attn") == knowledge.releases("flash-attn")
    assert knowledge.releases("numpy") == ()


def test_every_torch_release_says_what_its_wheel_is() -> None:
    package = knowledge.of("torch")
    assert package is not None
    for release in package.releases:
        assert release.python
        assert release.cuda
        assert release.cxx11abi is not None


def test_it_says_when_it_is_old_and_where_it_ends() -> None:
    package = knowledge.of("xformers")
    assert package is not None
    day = package.as_of
    assert not package.stale(day + datetime.timedelta(days=knowledge.STALE_DAYS))
    assert package.stale(day + datetime.timedelta(days=knowledge.STALE_DAYS + 1))
    assert package.knows(package.releases[-1].version + "+local")
    assert not package.knows("9.0")
    assert not package.knows("built yesterday")


def test_needs_of_one_package_do_not_contradict_each_other() -> None:
    """Each release is under at most one line for each package that it needs."""
    for package in knowledge.known().values():
        for release in package.releases:
            lines = [n.package for n in package.needs if n.applies_to(release.version)]
            assert len(lines) == len(set(lines)), (package.package, release.version)
            assert len([w for w in package.wheels if w.applies_to(release.version)]) <= 1
