"""What a view says of a report's environment: free-form JSON that may come from elsewhere, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from attncheck.model import Report
from attncheck.text import count, one_line, seconds

# What decides how attention behaves, in the order in which a maintainer looks for it.
_FIRST_PACKAGES = ("torch", "flash-attn", "flash-attn-3", "flash-attn-4", "triton", "xformers")


def environment(report: Report) -> tuple[tuple[str, str], ...]:
    env = report.environment
    seen = dict.fromkeys(s for r in report.cases for s in r.outcome.standins)
    lines = [
        ("attncheck", in_words(env.get("attncheck"))),
        ("packages", _packages(env.get("packages"))),
        ("python", in_words(env.get("python"))),
        ("platform", in_words(env.get("platform"))),
        ("device", in_words(env.get("device"))),
        ("gpu", in_words(env.get("gpu"))),
        ("ranks", in_words(env.get("ranks"))),
        ("mesh", _meshes(env.get("mesh"))),
        ("level", in_words(env.get("level"))),
        ("engine", in_words(env.get("engine"))),
        ("seed", in_words(env.get("seed"))),
        ("hash seeds", in_words(env.get("hash_seeds"))),
        ("stand-ins", in_words(env.get("standins")) or ", ".join(seen)),
        ("wall time", _show_number(env.get("wall_seconds"), seconds)),
        ("peak memory", _peak(env.get("peak_rss_mib"))),
        ("command", in_words(env.get("command"))),
    ]
    return tuple((label, one_line(text, 1000)) for label, text in lines if text)


def _packages(value: Any) -> str:
    if not isinstance(value, Mapping):
        return in_words(value)
    first = [name for name in _FIRST_PACKAGES if name in value]
    rest = sorted((name for name in value if name not in first), key=str)
    return ", ".join(f"{name} {in_words(value[name])}" for name in [*first, *rest])


def _meshes(value: Any) -> str:
    """`tp=2`; several are kept apart: `tp=2; dp=2, tp=2`."""
    return "; ".join(map(in_words, value)) if isinstance(value, (list, tuple)) else in_words(value)


def in_words(value: Any) -> str:
    """Any JSON value in a few words; empty for nothing."""
    if value is None or value == "":
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={in_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(in_words(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _show_number(value: Any, show: Callable[[float], str]) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return show(value) if number and 0 <= value < 1e12 else in_words(value)


def _peak(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, (int, float)) for v in value):
        return f"{max(value):.0f} MiB in the largest of {count(len(value), 'rank')}"
    return in_words(value)


def phases(env: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    phases = env.get("phases")
    if not isinstance(phases, Mapping):
        return ()
    return tuple(
        (one_line(str(name).replace("_", " "), 40), one_line(_show_number(value, seconds), 40))
        for name, value in phases.items()
    )


def notices(env: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader must know before trusting the rest: broken probes, fixes in place, restarts, which part
    of a scan it is, what is ignored, notes."""
    notices = [f"Probe not loaded: {text}" for text in _texts(env.get("probe_errors"))]
    notices += _fixes(env.get("fixes"))
    restarts = env.get("restarts")
    if isinstance(restarts, int) and restarts > 0:
        notices.append(f"Workers were restarted {count(restarts, 'time')}.")
    notices += _shard(env.get("shard"))
    notices += _ignored(env.get("ignored"))
    return tuple(one_line(notice, 1000) for notice in (*notices, *_texts(env.get("notes"))))


def _shard(value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return []
    index, of, planned = (in_words(value.get(key)) for key in ("index", "of", "planned"))
    return [f"Shard {index} of {of} of a scan of {planned} cases: `attncheck merge` joins them."]


def _ignored(value: Any) -> list[str]:
    """What each waiver silenced, why, and until when; and which ones do nothing any more."""
    records = value if isinstance(value, (list, tuple)) else ()
    return [_waiver(record) for record in records if isinstance(record, Mapping)]


_BESIDE_GLOBS = ("rule", "reason", "until", "state", "cases")


def _waiver(record: Mapping[str, Any]) -> str:
    """`Ignored until 2027-01-31: 12 cases of ATN101 (operator flash_attn*), vendor ticket 123`."""
    said = {key: in_words(item) for key, item in record.items()}
    globs = ", ".join(f"{key} {text}" for key, text in said.items() if key not in _BESIDE_GLOBS)
    what = said.get("rule", "") + (f" ({globs})" if globs else "")
    cases = f"{said.get('cases', '0')} case{'' if said.get('cases') == '1' else 's'}"
    reason, until = said.get("reason", ""), said.get("until", "")
    if said.get("state") == "expired":
        return f"Ignored until {until}, and counts again: {cases} of {what}, {reason}"
    if said.get("state") == "stale":
        return f"Nothing is ignored by {what}, which no finding of this report meets: {reason}"
    return f"Ignored{f' until {until}' if until else ''}: {cases} of {what}, {reason}"


def _fixes(value: Any) -> list[str]:
    """What became of the ops in each fix file: none of these results are those of torch alone."""
    out = []
    for file, ops in value.items() if isinstance(value, Mapping) else ():
        became = Counter(map(in_words, ops.values())) if isinstance(ops, Mapping) else Counter()
        counts = ", ".join(f"{number} {state}" for state, number in sorted(became.items()))
        out.append(f"With the fix {PurePath(str(file)).name} in place: {counts or 'nothing'}.")
    return out


def _texts(value: Any) -> list[str]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return [text for text in map(in_words, items) if text]
