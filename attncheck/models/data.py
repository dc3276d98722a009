"""The attention calls of known models, as data: TOML files beside this one, each figure with its source.

`models.schema.json` describes the files. They grow old, and say so: `as_of` is the day on which somebody last
held a file against its sources. Imports nothing of ours but the error type; no torch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from attncheck.errors import UserError, unknown

FOLDER = Path(__file__).parent

Count = Annotated[int, msgspec.Meta(ge=1)]

# Who sees whom. `window`: causal, and a query sees `window` keys, its own and those before. `chunked`: causal
# within chunks of `window`. `padding`: all keys but those that fill a sequence up.
Mask = Literal["none", "causal", "window", "chunked", "padding"]


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A public page that figures were read from, and where on it: a class, a table, a file in a package."""

    url: str
    where: str

    def __post_init__(self) -> None:
        if not self.url.startswith("https://"):
            raise ValueError(f"expected the https:// address of a public page, found {self.url!r}")


class Call(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An attention call that `layers` layers of a model make.

    `kind`: `self`, `cross` (keys and values of another sequence), `joint` (text and image or video as one
    sequence). `kv_heads` is what the model's projections hold; `v_head_dim` is 0 where values are as wide as
    keys. `layout`: of q, k and v as the function that is called takes them; `packed` is (tokens, heads,
    head_dim) with cu_seqlens. `scale`: of the scores, 0.0 for 1 / sqrt(head_dim). `softcap`: 0.0 for none.
    `sinks`: each head has a learned number that joins its softmax. `sequence`, `kv_sequence`: a typical
    number of tokens, `typical` says of what; 0 where it depends on the request. `source` names what heads,
    layers and head_dim were read from, `layout_source` layout and mask, `typical_source` the lengths.
    """

    name: str
    kind: Literal["self", "cross", "joint"]
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    source: str
    layout: Literal["bhsd", "bshd", "packed"]
    layout_source: str
    mask: Mask
    window: int = 0
    v_head_dim: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    sequence: int = 0
    kv_sequence: int = 0
    typical: str = ""
    typical_source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: kv_heads {self.kv_heads} do not divide heads {self.heads}"
            )
        if (self.mask in ("window", "chunked")) != (self.window > 0):
            raise ValueError(f"{self.name}: `window` belongs to the masks window and chunked")
        lengths = bool(self.sequence), bool(self.kv_sequence), bool(self.typical_source)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{self.name}: `sequence`, `kv_sequence` and `typical_source` come together"
            )

    @property
    def causal(self) -> bool:
        return self.mask in ("causal", "window", "chunked")


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A known model. `dtype`: what its own code computes in, empty where that was not read. `sources`: what
    its figures were read from, by the names that its calls give; `as_of`: when somebody last looked."""

    name: str
    family: Literal["video", "image", "language"]
    calls: tuple[Call, ...]
    aliases: tuple[str, ...] = ()
    dtype: Literal["", "bfloat16", "float16", "float32"] = ""
    dtype_source: str = ""
    sources: Mapping[str, Source] = {}
    as_of: date = date.min


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    as_of: date
    sources: dict[str, Source]
    models: tuple[Model, ...]


@functools.cache
def load() -> tuple[Model, ...]:
    """Every known model, by name. Raises UserError for a file that is not as it should be."""
    models = [model for file in sorted(FOLDER.glob("*.toml")) for model in load_file(file)]
    taken: set[str] = set()
    for model in models:
        for name in (model.name, *model.aliases):
            if name in taken:
                raise UserError(f"Two models of {FOLDER} are called {name!r}; expected one.")
            taken.add(name)
    return tuple(sorted(models, key=lambda model: model.name))


def load_file(file: Path) -> tuple[Model, ...]:
    """The models of one file. Raises UserError, one sentence that names the file, the place and what was
    expected."""
    # Only an audit of a known model needs it.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        content = msgspec.convert(document, _File)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}.") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{file} does not describe models: {error}.") from None
    used = {name for model in content.models for name in _source_names(model)}
    if missing := sorted(used ^ set(content.sources)):
        raise UserError(
            f"{file}: expected each source to be named by a model, and each that is named to be there: "
            f"{', '.join(missing)}."
        )
    return tuple(
        msgspec.structs.replace(
            model,
            sources={name: content.sources[name] for name in _source_names(model)},
            as_of=content.as_of,
        )
        for model in content.models
    )


def _source_names(model: Model) -> Iterator[str]:
    names = [model.dtype_source]
    for call in model.calls:
        names += [call.source, call.layout_source, call.typical_source]
    return iter(dict.fromkeys(name for name in names if name))


def find(name: str) -> Model:
    """The model of that name or alias, however it is capitalised. Raises UserError with the nearest names."""
    by_name = {known: model for model in load() for known in (model.name, *model.aliases)}
    asked = name.strip().lower()
    if model := by_name.get(asked):
        return model
    if asked and (family := [model.name for model in load() if model.name.startswith(asked)]):
        raise UserError(f"Unknown model {name!r}. Expected one of: {', '.join(family)}.")
    raise unknown("model", name, by_name)
