"""The data every part of attncheck passes on: cases, outcomes, findings, reports, and their JSON.

Frozen dataclasses and one codec. This module owns the report's schema: `SCHEMA_VERSION` changes when
a field changes its meaning or goes away, never when one is added. Imports neither torch nor anything
else of ours but the error type and the data of an audit.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from attncheck.audited import PRESET, Audit
from attncheck.errors import UserError

SCHEMA_VERSION = 1

T = TypeVar("T")


class Status(str, Enum):
    """What happened when a case ran, worst first; the last two stand beside the scale."""

    HANG = "hang"
    CRASH = "crash"
    DIVERGED = "diverged"
    WRONG = "wrong"
    MISSING_STRATEGY = "missing_strategy"
    MIXED_TENSOR = "mixed_tensor"
    ERROR = "error"
    DRIFT = "drift"
    REDISTRIBUTED = "redistributed"
    SUPPORTED = "supported"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"

    @property
    def rank(self) -> int:
        """0 is the worst. `unknown` and `unavailable` rank after everything that ran."""
        return _STATUS_ORDER[self]

    @property
    def ran(self) -> bool:
        return self not in (Status.UNAVAILABLE, Status.UNKNOWN)

    @property
    def usable(self) -> bool:
        """The result is right; it may cost communication."""
        return self in (Status.SUPPORTED, Status.REDISTRIBUTED)


_STATUS_ORDER = {status: i for i, status in enumerate(Status)}


class Severity(str, Enum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        return ("error", "warning", "info").index(self.value)


class Reason(str, Enum):
    """Why a case is `unavailable`."""

    PACKAGE_MISSING = "package_missing"
    PACKAGE_CLASH = "package_clash"
    EXTENSION_NOT_LOADABLE = "extension_not_loadable"
    VERSION_UNSUPPORTED = "version_unsupported"
    DEVICE_MISSING = "device_missing"
    SETTING_REFUSED = "setting_refused"
    PROBE_NOT_LOADABLE = "probe_not_loadable"
    OP_MISSING = "op_missing"
    SIGNATURE_UNKNOWN = "signature_unknown"
    NOT_SIMULATED = "not_simulated"
    NOT_RUN = "not_run"


@dataclass(frozen=True)
class Case:
    """The unit that is run: an operator in one setting, on a mesh, with placements, in a direction.

    `placement` is the layout-independent pattern (`heads`; one name per mesh axis, joined by `,`);
    `placements` is what it means for each tensor, written as PyTorch prints it (`S(1)`, `R`, `P(sum)`),
    one entry per mesh axis; `["plain"]` for an argument passed as an ordinary tensor. `function` is the
    import path of what the operator calls, where `operator` is a shorthand. `communicates`: the operator
    exists to communicate (a ring), so its collectives are asked for. `tensor_bytes`: what each tensor
    takes, all of it; `tensor_dims` names the role of each of its dims (`heads`; `-` for none), and
    `tensor_sizes` gives the size of each.
    """

    id: str
    probe: str
    operator: str
    route: str
    setting: Mapping[str, Any]
    mesh: Mapping[str, int]
    placement: str
    placements: Mapping[str, tuple[str, ...]]
    direction: str
    function: str = ""
    communicates: bool = False
    tensor_bytes: Mapping[str, int] = field(default_factory=dict)
    tensor_dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tensor_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def setting_name(self) -> str:
        return str(self.setting["name"])


# The `exception_type` of a case in which a DTensor was kept from a function that is no dispatcher op.
BYPASSES_DISPATCHER = "BypassesDispatcher"

# Rules about cases that have no verdict: they make a scan inconclusive, never failed.
UNJUDGED = ("ATN505", "ATN506")

# The fact of a case on which real processes and simulated ranks disagree.
ENGINES_DISAGREE = "engines_disagree"

# The probe of the case that is a whole model; its setting is how it was looked at.
MODEL = "model"

# Stands for setting, placement and direction in the entry of what no case could be planned of: a probe
# file that does not load, an op that nobody knows how to call.
UNPLANNED = "-"


def case_id(
    probe: str,
    operator: str,
    setting: str,
    route: str,
    mesh: Mapping[str, int],
    placement: str,
    direction: str,
) -> str:
    """A stable, readable id: no versions, no counters.

    >>> case_id("sdpa", "sdpa[MATH]", "causal", "dtensor", {"tp": 2}, "heads", "forward")
    'sdpa/sdpa[MATH]/causal/dtensor/tp=2/heads/forward'
    """
    return "/".join([probe, operator, setting, route, mesh_id(mesh), placement, direction])


def mesh_id(mesh: Mapping[str, int]) -> str:
    """
    >>> mesh_id({"dp": 2, "tp": 4})
    'dp=2xtp=4'
    """
    return "x".join(f"{axis}={size}" for axis, size in mesh.items())


@dataclass(frozen=True)
class KernelOp:
    """A dispatcher op that met a DTensor, as PyTorch writes it (`aten.bmm.default`).

    `inputs` and `outputs` hold one entry per tensor: its placements, or `plain`.
    """

    op: str
    phase: str
    inputs: tuple[tuple[str, ...], ...] = ()
    outputs: tuple[tuple[str, ...], ...] = ()
    calls: int = 1


@dataclass(frozen=True)
class MissingOp:
    """A kernel op that DTensor refused. `kind`: `strategy`, `mixed` or `propagation`."""

    op: str
    phase: str
    kind: str
    message: str


@dataclass(frozen=True)
class Collective:
    """Communication caused by `kernel_op` in one `phase`, summed over its calls.

    `name` is the collective that was asked for, even where the backend emulates it. `bytes` is what
    one rank sends (the largest over ranks) under a ring algorithm: see `runner.observe`.
    """

    name: str
    kernel_op: str
    phase: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Place:
    """Where the worst element of a tensor lies, and the others beyond the bound.

    `index` is global; `owners` are the ranks that hold it; `border` is how many elements lie between it and
    the nearest border between two shards (0: next to one; None: nothing is sharded). Of the `beyond`
    elements beyond the bound, `beyond_at_border` are next to a border, as is the share `at_border` of all
    elements; `beyond_on` is the rank that holds every one of them, if it is one.
    """

    index: tuple[int, ...]
    owners: tuple[int, ...] = ()
    border: int | None = None
    beyond: int = 0
    beyond_at_border: int = 0
    at_border: float = 0.0
    beyond_on: int | None = None


@dataclass(frozen=True)
class ErrorStat:
    """Errors of one output or gradient against the float64 reference (absolute, in the tensor's unit).

    `unsharded_max` and `unsharded_rms` are what the same operator shows on whole tensors in the same dtype,
    `unsharded_ratio` is `max / unsharded_max`; `bound` is `2 * unsharded_max + atol(dtype, ranks)`, `ratio`
    is `max / bound`, `scale` is `max |reference|`. `ulps`: the largest error in units in the last place of
    the reference there, `ulps_median`: the median of all. `row`: the worst RMS error of a row (last dim)
    over what rounding explains; above 1 it is wrong. Of what sharding changed (the value less that of the
    unsharded operator), `sign_bias` is the part that goes up, and `size_bias` the part that goes away from
    zero, less what goes the other way, over all of it: near 0 for rounding, 1 or -1 where all go one way.
    """

    max: float
    mean: float
    rms: float
    unsharded_max: float
    bound: float
    ratio: float
    scale: float
    note: str = ""
    unsharded_rms: float = 0.0
    unsharded_ratio: float = 0.0
    ulps: float = 0.0
    ulps_median: float = 0.0
    row: float = 0.0
    sign_bias: float = 0.0
    size_bias: float = 0.0
    worst: Place | None = None


@dataclass(frozen=True)
class Spread:
    """How the errors of one tensor vary over `repeats` sets of values (seed, seed + 1, ...).

    Ratios are `ErrorStat.ratio`; `worst_seed` made the largest. `beyond`: how many were beyond the bound.
    `same_place`: in how many of these the worst element was at the most frequent place; `at_border`: next
    to a border between shards. The biases are means. `repeatable`: the same values gave the same bits
    again. `nature`: what makes the errors differ from the unsharded operator's, `rounding`, `order` (the
    order of a reduction changes from call to call) or `systematic` (a bug), empty where nothing is beyond
    the bound or too few repeats were run to say.
    """

    repeats: int
    ratio_min: float
    ratio_median: float
    ratio_max: float
    worst_seed: int
    beyond: int
    repeatable: bool
    same_place: int = 0
    at_border: int = 0
    sign_bias: float = 0.0
    size_bias: float = 0.0
    nature: str = ""


# Codes of facts that say where errors lie, or who is not to blame: beside a verdict, and changing none.
DIAGNOSES = ("at_border", "on_one_rank", "order_dependent", "around_the_ops")


@dataclass(frozen=True)
class Fact:
    """Something the oracle saw that is not a number: `code` is stable, `subject` names the tensor.

    Codes: `wrong_result`, `wrong_gradient`, `drift_result`, `drift_gradient`, `nonfinite`,
    `replicas_differ`, `replica_wrong` (they differ by more than rounding), `local_shape` (a local
    tensor's shape is not what its placement says),
    `second_call_differs` (the warm call gave another result than the first), `gradient_missing`,
    `dropout_rate`, `dropout_shared` (shards drew the same random mask), `dropout_values`,
    `plain_result` (DTensors went in, an ordinary tensor came out), `process_changed` (the case left
    something changed for every call after it; the workers were started afresh), `order_dependent` (the same
    values gave other bits in another call), `engines_disagree` (what real processes and what simulated ranks
    said), `not_compared` (why the two could not be held against each other). Diagnoses beside them:
    `at_border`, `on_one_rank` (where the elements beyond the bound lie), `around_the_ops` (no kernel op is
    at fault).
    """

    code: str
    subject: str = ""
    detail: str = ""


@dataclass(frozen=True)
class RankState:
    """What one rank was doing: its hash seed, the last op it entered, and how it ended."""

    rank: int
    hash_seed: int
    last_op: str = ""
    exception: str = ""
    collectives: int = 0


@dataclass(frozen=True)
class Outcome:
    """What happened when a case ran: facts, no judgement beyond the status.

    `kernel_op` is the op that the status is about: the first missing one, the one that raised, the last
    one entered before a hang or crash, the operator's own kernel op for a wrong value; empty where no
    single op stands out. `outputs` holds the placements of `out` and of each gradient (`grad.q`);
    `errors` and, where the case was repeated, `spread` have the same keys. `timings` are milliseconds:
    `first` and `warm` call.
    """

    status: Status
    message: str = ""
    kernel_op: str = ""
    reason: Reason | None = None
    exception_type: str = ""
    kernel_ops: tuple[KernelOp, ...] = ()
    missing_ops: tuple[MissingOp, ...] = ()
    collectives: tuple[Collective, ...] = ()
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    errors: Mapping[str, ErrorStat] = field(default_factory=dict)
    spread: Mapping[str, Spread] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    ranks: tuple[RankState, ...] = ()
    standins: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class CaseResult:
    """A case and what came of it: one entry of the report's `cases`.

    `before`: where a fix was verified, the status without it; None where that is not known.
    """

    case: Case
    outcome: Outcome
    before: Status | None = None


@dataclass(frozen=True)
class Remedy:
    """What mends a finding. `kind`: `strategy`, `redistribute`, `operator`, `route`, `install`, `report`.

    `evidence` lists ids of cases of the same report that show it working; empty means that this scan
    did not run it, and renderers must say so.
    """

    kind: str
    text: str
    code: str = ""
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    rule: str
    name: str
    severity: Severity
    title: str
    kernel_op: str
    cases: tuple[str, ...]
    fingerprint: str
    message: str = ""
    remedies: tuple[Remedy, ...] = ()


def fingerprint(rule: str, subject: str) -> str:
    """Stable across versions, seeds and machines: made of what is tested, never of what was measured."""
    return hashlib.sha256(f"{rule}\0{subject}".encode()).hexdigest()[:16]


class ChangeKind(str, Enum):
    """What became of a case since a baseline, or an older report; in the order in which it is told."""

    NEW = "new"  # a finding that was not known
    WORSE = "worse"  # down the status order
    DRIFTED = "drifted"  # the error grew beyond noise, within its bound
    COSTLIER = "costlier"  # more bytes of collectives
    NOT_RUN = "not_run"  # known, and could not be run now
    BETTER = "better"  # up the status order, or cheaper; findings remain
    FIXED = "fixed"  # it had findings, and has none
    ADDED = "added"  # was not there before, and has no finding
    IGNORED = "ignored"  # went down, and every finding of it is ignored by configuration
    UNCHANGED = "unchanged"

    @property
    def regressed(self) -> bool:
        return self in REGRESSIONS


REGRESSIONS = (ChangeKind.NEW, ChangeKind.WORSE, ChangeKind.DRIFTED, ChangeKind.COSTLIER)


@dataclass(frozen=True)
class CaseChange:
    """A case, then and now. `before`, `after`: None where it was not there. `rules`: ids of the rules that
    the change is about; `detail`: its numbers in words; `reason` and `until`: what people wrote of it in
    the baseline; `gates`: it is one for which a gate fails."""

    case: str
    kind: ChangeKind
    before: Status | None = None
    after: Status | None = None
    rules: tuple[str, ...] = ()
    detail: str = ""
    reason: str = ""
    until: str = ""
    gates: bool = False


@dataclass(frozen=True)
class Difference:
    """Something of the environment that is not as it was; empty where it was not there."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """A report held against a baseline or an older report. `against` names it; `changes` are all cases but
    the `unchanged` ones of which nobody wrote anything, in the order of `ChangeKind`; `stale` counts entries
    of a baseline that were fixed or are no longer run; `verdict` says in words what a gate decides
    (`exit_code`), empty for a mere diff."""

    against: str
    environment: tuple[Difference, ...] = ()
    changes: tuple[CaseChange, ...] = ()
    unchanged: int = 0
    stale: int = 0
    verdict: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Report:
    """One scan. `environment` is free-form JSON: versions, device, seeds, stand-ins, phase times.

    `comparison`: where it was held against another (`attncheck gate`, `attncheck diff`). `audit`: the model
    whose attention calls the cases are (`attncheck audit`).
    """

    environment: Mapping[str, Any]
    cases: tuple[CaseResult, ...]
    findings: tuple[Finding, ...]
    schema_version: int = SCHEMA_VERSION
    comparison: Comparison | None = None
    audit: Audit | None = None

    @property
    def summary(self) -> dict[str, int]:
        """Cases per status, worst first; only statuses that occur."""
        counts = Counter(result.outcome.status for result in self.cases)
        return {status.value: counts[status] for status in Status if counts[status]}

    @property
    def inconclusive(self) -> bool:
        """Too little ran to call it clean: less than half, a check failed, or nothing of a known model.

        How much of a shard ran is chance: that is for the joined report to say.
        """
        statuses = [result.outcome.status for result in self.cases]
        ran = sum(status.ran for status in statuses)
        few = 2 * ran < len(statuses) and "shard" not in self.environment
        nothing = not ran and self.audit is not None and self.audit.kind == PRESET
        return few or nothing or Status.UNKNOWN in statuses


# --- codec ---------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Dataclasses, enums, tuples and mappings to plain JSON values; empty optional fields are left out."""
    kind: Any = type(value)
    if kind is str or kind is int or value is None:
        return value  # nearly all of a report
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, CaseResult):
        entry = {**to_json(value.case), "outcome": to_json(value.outcome)}
        return entry if value.before is None else {**entry, "before": to_json(value.before)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for f in _fields(kind):
            item = getattr(value, f.name)
            if _is_default(f, item):
                continue
            out[f.name] = to_json(item)
        if isinstance(value, Report):
            out = {"schema_version": value.schema_version, **out, "summary": value.summary}
        return out
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, float) and value != value:
        return "nan"  # JSON has no NaN or infinity; the decoder reads these three words back
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return value


@functools.cache
def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _is_default(f: dataclasses.Field[Any], item: Any) -> bool:
    if f.default is not dataclasses.MISSING:
        return bool(item == f.default)
    if f.default_factory is not dataclasses.MISSING:
        return bool(item == f.default_factory())
    return False


def from_json(cls: type[T], value: Any, where: str = "") -> T:
    """The inverse of `to_json`. Raises UserError naming the place where the document is not as expected."""
    return typing.cast("T", _decode(cls, value, where or cls.__name__))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _decode(next(a for a in typing.get_args(kind) if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list, found {_short(value)}.")
        item = typing.get_args(kind)[0]
        return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, found {_short(value)}.")
        item = typing.get_args(kind)[1]
        return {k: _decode(item, v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            known = ", ".join(str(m.value) for m in kind)
            raise UserError(f"{where}: expected one of {known}; found {_short(value)}.") from None
    if kind is CaseResult:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, found {_short(value)}.")
        rest = {k: v for k, v in value.items() if k not in ("outcome", "before")}
        before = value.get("before")
        return CaseResult(
            _decode(Case, rest, where),
            _decode(Outcome, value.get("outcome"), f"{where}.outcome"),
            None if before is None else _decode(Status, before, f"{where}.before"),
        )
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind is float and isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {kind.__name__}, found {_short(value)}.")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {_short(value)}.")
    hints = _hints(kind)
    given = {}
    for f in dataclasses.fields(kind):
        if f.name in value:
            given[f.name] = _decode(hints[f.name], value[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: the field {f.name!r} is missing.")
    return kind(**given)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def dump_report(report: Report) -> str:
    """The report as JSON text, keys in the order of the fields."""
    return json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def worst(statuses: Iterable[Status]) -> Status:
    """The worst of some statuses (at least one)."""
    return min(statuses, key=lambda s: s.rank)
