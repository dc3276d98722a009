"""Hypothesis strategies for the model: any `Report` that the codec can carry.

`reports(finite=False)` adds NaN and infinities, which the codec writes as words.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from attncheck.audited import (
    FAKE,
    OBSERVED,
    AttentionCall,
    Audit,
    Degrees,
    Fit,
    ModuleCommunication,
    ModuleOp,
    Numeric,
    RankDifference,
    Uncompared,
    Unequal,
    UnevenShard,
)
from attncheck.cells import Bisection, Cell, Matrix, Turn
from attncheck.model import (
    Case,
    CaseResult,
    Collective,
    ErrorStat,
    Fact,
    Finding,
    KernelOp,
    MissingOp,
    Outcome,
    RankState,
    Reason,
    Remedy,
    Report,
    Severity,
    Status,
)
from attncheck.probing import PATTERNS

# Lone surrogates are no text that a UTF-8 file can hold; reports/json.py has a test of its own.
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
OPERATORS = st.sampled_from(["sdpa", "sdpa[MATH]", "flash_attn_func", "fallback.matmul", "a|b"])
OPS = st.sampled_from(["", "aten.bmm.default", "flash_attn._flash_attn_forward.default"])
PHASES = st.sampled_from(["forward", "backward"])
COUNTS = st.integers(0, 2**40)
PLACEMENTS = st.lists(st.sampled_from(["R", "S(0)", "S(1)", "P(sum)", "plain"]), max_size=2).map(
    tuple
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: not _has_infinity(value))


def _has_infinity(value: Any) -> bool:
    """Free-form values lose their type: an infinity would come back as the word."""
    if isinstance(value, float):
        return value in (float("inf"), float("-inf"))
    if isinstance(value, dict):
        return any(map(_has_infinity, value.values()))
    return isinstance(value, list) and any(map(_has_infinity, value))


def tuples(items: st.SearchStrategy[Any], size: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=size).map(tuple)


def floats(finite: bool) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=not finite, allow_infinity=not finite)


def cases() -> st.SearchStrategy[Case]:
    named = st.dictionaries(TEXT, COUNTS).map(lambda sizes: {**sizes, "name": "plain"})
    return st.builds(
        Case,
        id=TEXT,
        probe=TEXT,
        operator=OPERATORS,
        route=st.sampled_from(["dtensor", "local_map", "ulysses"]),
        setting=named,
        mesh=st.dictionaries(TEXT, st.integers(1, 8), max_size=2),
        placement=st.lists(st.sampled_from(sorted(PATTERNS)), min_size=1, max_size=2).map(",".join),
        placements=st.dictionaries(TEXT, PLACEMENTS, max_size=2),
        direction=PHASES,
    )


def error_stats(finite: bool = True) -> st.SearchStrategy[ErrorStat]:
    names = ("max", "mean", "rms", "unsharded_max", "bound", "ratio", "scale")
    return st.builds(ErrorStat, **dict.fromkeys(names, floats(finite)), note=TEXT)


def outcomes(finite: bool = True) -> st.SearchStrategy[Outcome]:
    return st.builds(
        Outcome,
        status=st.sampled_from(Status),
        message=TEXT,
        kernel_op=OPS,
        reason=st.none() | st.sampled_from(Reason),
        exception_type=TEXT,
        kernel_ops=tuples(
            st.builds(KernelOp, OPS, PHASES, tuples(PLACEMENTS), tuples(PLACEMENTS), COUNTS), 2
        ),
        missing_ops=tuples(
            st.builds(
                MissingOp, OPS, PHASES, st.sampled_from(["strategy", "mixed", "propagation"]), TEXT
            ),
            2,
        ),
        collectives=tuples(st.builds(Collective, TEXT, OPS, PHASES, COUNTS, COUNTS), 2),
        outputs=st.dictionaries(TEXT, PLACEMENTS, max_size=2),
        errors=st.dictionaries(TEXT, error_stats(finite), max_size=2),
        facts=tuples(st.builds(Fact, TEXT, TEXT, TEXT), 2),
        timings=st.dictionaries(TEXT, floats(finite), max_size=2),
        ranks=tuples(st.builds(RankState, COUNTS, COUNTS, TEXT, TEXT, COUNTS), 2),
        standins=tuples(TEXT, 2),
        seed=COUNTS,
    )


def findings() -> st.SearchStrategy[Finding]:
    remedies = st.builds(Remedy, TEXT, TEXT, TEXT, tuples(TEXT, 2))
    return st.builds(
        Finding,
        rule=st.sampled_from(["ATN101", "ATN201", "ATN505"]),
        name=TEXT,
        severity=st.sampled_from(Severity),
        title=TEXT,
        kernel_op=OPS,
        cases=tuples(TEXT),
        fingerprint=TEXT,
        message=TEXT,
        remedies=tuples(remedies, 2),
    )


_KEYS = (
    *("attncheck", "python", "platform", "packages", "device", "ranks", "mesh", "seed", "level"),
    *("hash_seeds", "standins", "phases", "peak_rss_mib", "wall_seconds", "restarts", "command"),
    *("notes", "probe_errors"),
)


def environments() -> st.SearchStrategy[dict[str, Any]]:
    """Any JSON under the known names too: reports may come from elsewhere."""
    return st.dictionaries(st.sampled_from(_KEYS) | TEXT, JSON_VALUES, max_size=5)


def audits(finite: bool = True) -> st.SearchStrategy[Audit]:
    modules = st.sampled_from(["", "blocks.*.attn", "blocks.0.attn"]) | TEXT
    problems = st.sampled_from(["", "strategy", "mixed", "propagation", "error"]) | TEXT
    sizes = st.dictionaries(TEXT, COUNTS, max_size=2)
    placed = tuples(PLACEMENTS, 2)
    number = floats(finite)
    numeric = st.builds(
        Numeric,
        *(COUNTS, TEXT, COUNTS),
        tuples(st.builds(Unequal, TEXT, TEXT, modules, number, number, TEXT), 2),
        tuples(st.builds(Uncompared, TEXT, TEXT), 2),
        TEXT,
        tuples(TEXT, 1),
    )
    return st.builds(
        Audit,
        target=TEXT,
        mesh=st.dictionaries(TEXT, st.integers(1, 8), max_size=2),
        kind=st.sampled_from([FAKE, OBSERVED]) | TEXT,
        inputs=TEXT,
        parameters=COUNTS,
        parameter_bytes=COUNTS,
        layers=sizes,
        steps=COUNTS,
        ops=tuples(
            st.builds(ModuleOp, modules, OPS, PHASES, placed, placed, COUNTS, problems, TEXT, TEXT),
            2,
        ),
        communication=tuples(
            st.builds(
                ModuleCommunication,
                *(modules, TEXT, PHASES, COUNTS, COUNTS, OPS, st.booleans(), TEXT),
            ),
            2,
        ),
        uneven=tuples(
            st.builds(UnevenShard, TEXT, COUNTS, COUNTS, TEXT, COUNTS, COUNTS, COUNTS), 1
        ),
        differences=tuples(st.builds(RankDifference, modules, TEXT, TEXT), 1),
        attention=tuples(
            st.builds(
                AttentionCall,
                *(tuples(modules, 2), TEXT, OPS, COUNTS, sizes),
                st.dictionaries(TEXT, JSON_VALUES, max_size=2),
                st.dictionaries(TEXT, PLACEMENTS, max_size=2),
                *(OPERATORS, TEXT, tuples(TEXT, 2), TEXT),
            ),
            2,
        ),
        numeric=st.none() | numeric,
        fits=tuples(st.builds(Fit, TEXT, TEXT, COUNTS, COUNTS, TEXT, TEXT), 1),
        degrees=tuples(st.builds(Degrees, TEXT, *[tuples(COUNTS, 2)] * 3), 1),
        notes=tuples(TEXT, 1),
        failure=TEXT,
        seconds=number,
        peak_mib=number,
    )


def reports(finite: bool = True, audited: bool = True) -> st.SearchStrategy[Report]:
    """`audited`: of scans and of audits; the reports of a matrix are of scans alone."""
    results = st.builds(CaseResult, cases(), outcomes(finite))
    audit = st.none() | audits(finite) if audited else st.none()
    return st.builds(Report, environments(), tuples(results, 5), tuples(findings(), 3), audit=audit)


def matrices(finite: bool = True) -> st.SearchStrategy[Matrix]:
    """Cells of any versions: packages may be missing, and a combination may be there twice."""
    versions = st.dictionaries(
        st.sampled_from(["torch", "flash-attn", "xformers"]) | TEXT,
        st.sampled_from(["2.9.1", "2.13.0", ""]) | TEXT,
        max_size=3,
    )
    cells = st.builds(Cell, versions, st.none() | reports(finite, audited=False), TEXT, COUNTS)
    turns = st.builds(Turn, TEXT, st.sampled_from(Status), st.sampled_from(Status))
    names = st.sampled_from(["2.9.1", "2.13.0"]) | TEXT
    bisections = st.builds(
        Bisection,
        *(TEXT, TEXT, tuples(names), tuples(names), TEXT | names, TEXT | names, tuples(turns)),
        st.dictionaries(TEXT, TEXT, max_size=2),
    )
    return st.builds(Matrix, environments(), tuples(cells), st.none() | bisections)
