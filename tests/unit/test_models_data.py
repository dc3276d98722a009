"""What is known of models: the files keep to the schema, each figure has a source, and names are found."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest

from attncheck.errors import UserError
from attncheck.models import data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = sorted(data.FOLDER.glob("*.toml"))
SCHEMA = json.loads((data.FOLDER / "models.schema.json").read_text())

GOOD = """\
as_of = 2026-11-29

[sources]
config = { where = "Config", url = "https://example.org/config.py" }

[[models]]
name = "some-model"
family = "language"

[[models.calls]]
name = "self"
kind = "self"
layers = 2
heads = 8
kv_heads = 2
head_dim = 64
source = "config"
layout = "bhsd"
mask = "window"
window = 16
layout_source = "config"
"""

# Held against the sources a second time, by hand: heads, kv_heads, head_dim, layers, of each call.
FIGURES = {
    "wan2.1-t2v-14b": [(40, 40, 128, 40), (40, 40, 128, 40)],
    "wan2.1-t2v-1.3b": [(12, 12, 128, 30), (12, 12, 128, 30)],
    "wan2.1-i2v-14b": [(40, 40, 128, 40)] * 3,
    "wan2.2-ti2v-5b": [(24, 24, 128, 30)] * 2,
    "hunyuan-video": [(24, 24, 128, 60)],
    "cogvideox-2b": [(30, 30, 64, 30)],
    "cogvideox-5b": [(48, 48, 64, 42)],
    "flux.1-dev": [(24, 24, 128, 57)],
    "flux.2-dev": [(48, 48, 128, 56)],
    "sd3.5-large": [(38, 38, 64, 38)],
    "llama3-8b": [(32, 8, 128, 32)],
    "llama4-scout": [(40, 8, 128, 36), (40, 8, 128, 12)],
    "qwen2.5-7b": [(28, 4, 128, 28)],
    "deepseek-v3": [(128, 128, 192, 61)],
    "kimi-k2": [(64, 64, 192, 61)],
    "gemma2-9b": [(16, 8, 256, 21), (16, 8, 256, 21)],
    "gpt-oss-20b": [(64, 8, 64, 12), (64, 8, 64, 12)],
    "falcon-7b": [(71, 1, 64, 32)],
    "phi-4": [(40, 10, 128, 40)],
}

ASKED = (
    "wan2.1-14b", "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b", "wan2.2-t2v-a14b",
    "hunyuan-video-13b", "hunyuan-video-1.5", "cogvideox-2b", "cogvideox-5b", "flux.1-dev",
    "flux.2", "sd3.5-medium", "sd3.5-large", "ltx-video", "ltx-2", "qwen-image", "mochi",
    "llama3-70b", "llama3.1-405b", "llama3.2-1b", "llama4-scout", "llama4-maverick", "qwen2.5-72b",
    "qwen3-32b", "mistral-7b", "mixtral-8x7b", "deepseek-v3", "gemma2-27b", "gemma3-27b", "phi-3",
    "phi-4", "gpt-oss-120b", "glm-4.5", "kimi-k2", "falcon-7b",
)  # fmt: skip


def document(text: str) -> object:
    return json.loads(json.dumps(tomllib.loads(text), default=str))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_keeps_to_the_schema_and_loads(file: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document(file.read_text(encoding="utf-8")))
    assert data.load_file(file)


def test_the_schema_is_one_and_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(document(GOOD))
    for line in ("heads", "source", "window", "layout_source", "family", "as_of"):
        lines = [text for text in GOOD.splitlines() if not text.startswith(line)]
        assert not validator.is_valid(document("\n".join(lines))), line
    for old, new in (
        ("https://", ""),
        ('"window"', '"sliding"'),
        ("heads = 8", "heads = 0"),
        ("layers", "blocks"),
        ('mask = "window"', 'mask = "causal"'),
        ("head_dim = 64", 'head_dim = 64\ndtype = "bfloat16"'),
        ("head_dim = 64", "head_dim = 64\nsequence = 8192"),
    ):
        assert not validator.is_valid(document(GOOD.replace(old, new))), new


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("[[models.calls]]", "[[models.calls"), "is not valid TOML"),
        (GOOD.replace("kv_heads = 2", "kv_head = 2"), "models[0].calls[0]"),
        (GOOD.replace("kv_heads = 2", "kv_heads = 3"), "kv_heads 3 do not divide heads 8"),
        (GOOD.replace("window = 16\n", ""), "`window` belongs to"),
        (GOOD.replace("https://example", "example"), "address of a public page"),
        (GOOD.replace('"bhsd"', '"sbhd"'), "sbhd"),
        (GOOD.replace('\nsource = "config"', '\nsource = "readme"'), "named by a model"),
        (GOOD.replace("head_dim = 64", "head_dim = 64\nsequence = 8192"), "come together"),
        (GOOD.replace("2026-11-29", '"soon"'), "as_of"),
    ],
)
def test_a_malformed_file_makes_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        data.load_file(file)
    said = str(raised.value)
    assert said.startswith(str(file))
    assert says in said
    assert "\n" not in said
    file.write_text(GOOD)  # the healthy twin
    (model,) = data.load_file(file)
    assert model.sources["config"].where == "Config"
    assert model.as_of.year == 2026


def test_the_models_that_were_asked_for_are_there() -> None:
    assert len(data.load()) >= 45
    for name in ASKED:
        assert data.find(name).calls, name
    assert {model.family for model in data.load()} == {"video", "image", "language"}


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str) -> None:
    calls = data.find(name).calls
    assert [(c.heads, c.kv_heads, c.head_dim, c.layers) for c in calls] == FIGURES[name]


def test_what_makes_a_call_hard_is_written_down() -> None:
    assert data.find("deepseek-v3").calls[0].v_head_dim == 128
    window, full = data.find("gemma2-9b").calls
    assert (window.mask, window.window, window.softcap) == ("window", 4096, 50.0)
    assert (full.mask, full.window, full.softcap) == ("causal", 0, 50.0)
    assert all(call.sinks for call in data.find("gpt-oss-120b").calls)
    assert data.find("gpt-oss-120b").calls[0].window == 128
    # 144 and 168 are what the queries are scaled by the root of, in place of head_dim 128.
    assert data.find("gemma2-27b").calls[0].scale == pytest.approx(144**-0.5)
    assert data.find("gemma3-27b").calls[0].scale == pytest.approx(168**-0.5)
    own, text = data.find("wan2.1-14b").calls
    assert (own.sequence, own.kv_sequence) == (32760, 32760)
    assert (text.kind, text.kv_sequence) == ("cross", 512)


def test_every_figure_has_a_source_at_a_fixed_version() -> None:
    for model in data.load():
        assert model.as_of.year >= 2026
        assert bool(model.dtype) == bool(model.dtype_source), model.name
        for call in model.calls:
            for name in (call.source, call.layout_source):
                assert name in model.sources, (model.name, call.name)
            assert bool(call.sequence) == bool(call.typical), (model.name, call.name)
        for source in model.sources.values():
            assert re.search(r"/blob/[0-9a-f]{40}/|/project/[a-z]+/\d+\.\d+\.\d+/$", source.url), (
                source.url
            )


def test_calls_of_a_model_have_names_of_their_own() -> None:
    for model in data.load():
        names = [call.name for call in model.calls]
        assert len(names) == len(set(names)), model.name


def test_names_are_found_by_alias_and_however_they_are_written() -> None:
    assert data.find("wan2.1-14b") is data.find("WAN2.1-T2V-14B ")
    assert data.find("wan2.1-14b").name == "wan2.1-t2v-14b"
    with pytest.raises(UserError, match=r"Unknown model 'wan2\.1-41b'. Did you mean .*wan2\.1-14b"):
        data.find("wan2.1-41b")
    with pytest.raises(UserError) as raised:
        data.find("gemma2")
    assert str(raised.value) == (
        "Unknown model 'gemma2'. Expected one of: gemma2-27b, gemma2-2b, gemma2-9b."
    )


def test_two_models_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").write_text(
        GOOD.replace('"some-model"', '"other"\naliases = ["some-model"]')
    )
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    data.load.cache_clear()
    try:
        with pytest.raises(UserError, match=r"Two models of .* are called 'some-model'"):
            data.load()
    finally:
        data.load.cache_clear()
