"""`[tool.attncheck]` in pyproject.toml. Unknown keys are errors that name the expected ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attncheck import waivers
from attncheck.errors import UserError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Key -> kind: the options of `attncheck scan` under the same names; `probes`, `imports` and `fixes`
# hold what `--probe`, `--import` and `--fix` give one by one. `baseline`, `allow` and `strict` are those of
# `attncheck gate`. Besides rules, `ignore` holds tables: see `attncheck.waivers`.
KEYS: Mapping[str, type] = {
    "level": str,
    "ranks": int,
    "mesh": list,
    "repeats": int,
    "engine": str,
    "device": str,
    "seed": int,
    "operator": list,
    "setting": list,
    "placement": list,
    "direction": list,
    "select": list,
    "ignore": list,
    "with": list,
    "probes": list,
    "imports": list,
    "fixes": list,
    "case-timeout": float,
    "fail-on": str,
    "baseline": str,
    "allow": list,
    "strict": bool,
}


def load(folder: Path) -> dict[str, Any]:
    """The table of the nearest pyproject.toml at or above `folder`, checked; {} where there is none."""
    for parent in (folder, *folder.parents):
        file = parent / "pyproject.toml"
        if file.is_file():
            return parse(file)
    return {}


def parse(file: Path) -> dict[str, Any]:
    """The values by key; what `ignore` has of tables is under `waivers`, where there are any.

    Raises UserError naming the file, the key and what was expected.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}.") from None
    tool = document.get("tool", {})
    table = tool.get("attncheck", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UserError(f"{file}: tool.attncheck must be a table.")
    out: dict[str, Any] = {}
    for key, value in table.items():
        if key not in KEYS:
            raise unknown(f"key in [tool.attncheck] of {file}:", key, KEYS)
        if key == "ignore" and isinstance(value, list):
            tables, value = _waivers(file, value)
            out |= {"waivers": tables} if tables else {}
        out[key] = _checked(file, key, value)
    # A path in a file is meant from that file, wherever the command is run. Of fixes, `known` is none.
    if "baseline" in out:
        out["baseline"] = str(file.parent / out["baseline"])
    for key, names in (("probes", ()), ("fixes", ("known",))):
        if key in out:
            out[key] = tuple(p if p in names else str(file.parent / p) for p in out[key])
    return out


def _waivers(file: Path, entries: list[Any]) -> tuple[tuple[waivers.Waiver, ...], list[Any]]:
    """The tables among the entries of `ignore`, and the rest."""
    tables = tuple(
        waivers.parse(entry, f"{file}, entry {number} of ignore")
        for number, entry in enumerate(entries, 1)
        if isinstance(entry, dict)
    )
    return tables, [entry for entry in entries if not isinstance(entry, dict)]


def _checked(file: Path, key: str, value: Any) -> Any:
    kind = KEYS[key]
    if kind is list:
        value = (
            [value] if key == "mesh" and isinstance(value, str) else value
        )  # most scans have one
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise UserError(f"{file}: {key} must be a list of strings, found {value!r}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{file}: {key} must be {kind.__name__}, found {value!r}.")
    return value
