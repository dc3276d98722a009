"""What mends a finding: alternatives that worked in the same scan, and code to try.

A remedy with evidence names the cases of this scan that show it working; one without says that it
was not run. Nothing is claimed in between.

They are ranked by measured cost: the bytes that a rank sends in a call, those of getting to another placement
included, fewest first. Of equals, what this scan saw working comes first, and then what covers more of the
failing calls; what covers less than half of what another one does comes last. That a strategy or `local_map`
costs nothing where each shard is a whole problem is how they work and no measurement: they come behind what
was measured to cost nothing, and before all that costs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from attncheck.model import Case, CaseResult, Remedy, Status
from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
)
from attncheck.rings import redistribution_bytes
from attncheck.rules import wording
from attncheck.rules.base import DTENSOR, Group, is_gradient, traffic, uneven_roles

NOT_RUN = "Not run in this scan."
PLAIN = ("plain",)

_SIZES = (BATCH, HEADS, KV_HEADS, SEQUENCE, KV_SEQUENCE, HEAD_DIM)
_MAX_OPERATORS = 3
_MAX_PLACEMENTS = 4
# Patterns under which each rank's own part is a complete attention problem.
_LOCAL_PATTERNS = ("replicate", "batch", "heads")

# What attncheck/fixes/ has, by name: it needs torch, and this does not. A test holds them together.
# Functions that are no dispatcher ops, or whose backward no strategy mends: `attncheck fix` wraps them.
WRAPPED = frozenset(
    [
        "flash_attn.cute.flash_attn_func",
        "flash_attn.cute.flash_attn_varlen_func",
        "flash_attn.flash_attn_func",
        "flash_attn.flash_attn_kvpacked_func",
        "flash_attn.flash_attn_qkvpacked_func",
        "flash_attn.flash_attn_varlen_func",
        "flash_attn.flash_attn_varlen_kvpacked_func",
        "flash_attn.flash_attn_varlen_qkvpacked_func",
        "flash_attn.flash_attn_with_kvcache",
        "flash_attn_interface.flash_attn_func",
        "flash_attn_interface.flash_attn_varlen_func",
        "sageattention.sageattn",
        "sageattention.sageattn_varlen",
        "xformers.ops.memory_efficient_attention",
    ]
)
# Ops whose strategy in torch is wrong in some versions: `attncheck fix` replaces it there.
OVERRIDDEN: frozenset[str] = frozenset(
    [
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_cudnn_attention_backward.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_backward.default",
    ]
)


@dataclass(frozen=True)
class Priced:
    """A remedy, the bytes that a rank sends with it in a call, and how many failing calls it covers."""

    remedy: Remedy
    bytes: int = 0
    covers: int = 0


def ranked(priced: Iterable[Priced]) -> list[Remedy]:
    """The cheapest first; of equals, what was seen working, then what covers more, then as they come. What
    covers less than half of what another one does comes behind."""
    priced = [*priced]
    most = max((p.covers for p in priced), default=0)

    def order(p: Priced) -> tuple[bool, int, bool, int]:
        return (_is_rare(p.covers, most), p.bytes, not p.remedy.evidence, -p.covers)

    return [p.remedy for p in sorted(priced, key=order)]


def _is_rare(covers: int, most: int) -> bool:
    """Whether a way out is one for few of the failing calls (0: for as many as one likes)."""
    return 0 < 2 * covers < most


def untried(kind: str, text: str, code: str = "") -> Remedy:
    """A remedy that this scan did not run, and that says so."""
    return Remedy(kind, f"{text} {NOT_RUN}", code)


# --- what worked in the same scan ----------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """An operator in one setting on one mesh with one placement, whatever the direction."""

    probe: str
    operator: str
    route: str
    setting: str
    mesh: tuple[tuple[str, int], ...]
    placement: str

    @property
    def who(self) -> tuple[str, str, str]:
        return (self.operator, self.route, self.probe)


@dataclass(frozen=True)
class _Way:
    """One way out: how many of the failing calls it covers, with which cases."""

    name: tuple[str, ...]
    covers: int
    cases: tuple[CaseResult, ...]
    before: int = 0  # bytes sent per rank and call to get there

    @property
    def redistributed(self) -> int:
        return sum(r.outcome.status is Status.REDISTRIBUTED for r in self.cases)

    @property
    def traffic(self) -> int:
        return self.before + max((traffic(r.outcome) for r in self.cases), default=0)

    @property
    def evidence(self) -> tuple[str, ...]:
        return tuple(sorted({r.case.id for r in self.cases}))

    @property
    def cost(self) -> str:
        if not self.traffic:
            return "without communication of its own"
        return f"at the price of up to {wording.size(self.traffic)} sent per rank and call"


_Directions = Mapping[str, CaseResult]


def _call_of(case: Case) -> _Call:
    return _Call(
        case.probe,
        case.operator,
        case.route,
        case.setting_name,
        tuple(case.mesh.items()),
        case.placement,
    )


def _calls(results: Iterable[CaseResult]) -> dict[_Call, dict[str, CaseResult]]:
    calls: dict[_Call, dict[str, CaseResult]] = {}
    for result in sorted(results, key=lambda r: r.case.id):
        calls.setdefault(_call_of(result.case), {})[result.case.direction] = result
    return calls


@dataclass(frozen=True)
class _Survey:
    """What the remedies of every finding look up in the results of a scan: its calls, what each asks, and
    those that have something in common."""

    results: Sequence[CaseResult]
    calls: Mapping[_Call, _Directions]
    asked: Mapping[_Call, _Asked]
    by_place: Mapping[object, Sequence[_Call]]
    by_rest: Mapping[object, Sequence[_Call]]
    names: frozenset[object]


_surveyed: list[_Survey] = []  # of the results that were asked about last


def _survey(results: Sequence[CaseResult]) -> _Survey:
    """Made once for all the findings of a scan: it takes longer than what is looked up in it."""
    if not _surveyed or _surveyed[0].results is not results:
        calls = _calls(results)
        asked = {call: _asked(_any_case(directions)) for call, directions in calls.items()}
        by_place: dict[object, list[_Call]] = {}
        by_rest: dict[object, list[_Call]] = {}
        for call in calls:
            by_place.setdefault((call.mesh, call.placement), []).append(call)
            by_rest.setdefault((call.who, call.setting, call.mesh), []).append(call)
        names = frozenset((call.who, call.setting, call.mesh, call.placement) for call in calls)
        _surveyed[:] = [_Survey(results, calls, asked, by_place, by_rest, names)]
    return _surveyed[0]


def _any_case(directions: _Directions) -> Case:
    return directions[min(directions)].case


def features(setting: Mapping[str, object]) -> frozenset[tuple[str, str]]:
    """What a setting asks of an operator, whatever its name, dtype and sizes."""
    asked = {
        (key, json.dumps(value, sort_keys=True, default=str))
        for key, value in setting.items()
        if key not in (*_SIZES, "name", "dtype") and value not in (None, False, 0, "", [], ())
    }
    for fewer, more in ((KV_HEADS, HEADS), (KV_SEQUENCE, SEQUENCE)):
        if setting.get(fewer, setting.get(more)) != setting.get(more):
            asked.add((fewer, "differs"))
    return frozenset(asked)


@dataclass(frozen=True)
class _Asked:
    """What a case asks of the operator and of the mesh. `uneven`: roles that the ranks do not divide; heads
    that they divide say nothing of heads that they do not."""

    name: str
    causal: bool
    features: frozenset[tuple[str, str]]
    uneven: frozenset[str]

    def like(self, other: _Asked) -> bool:
        """The same setting by name, or another that asks the same."""
        if self.causal != other.causal:
            return False
        same = self.features == other.features and self.uneven == other.uneven
        return same or self.name == other.name


def _asked(case: Case) -> _Asked:
    uneven = frozenset(text.split()[1] for text in uneven_roles(case))
    causal = bool(case.setting.get("causal"))
    return _Asked(case.setting_name, causal, features(case.setting), uneven)


def _works(directions: _Directions, wanted: Iterable[str], free: bool) -> list[CaseResult]:
    """The cases that show a call working in every wanted direction; none if it does not.

    Forward counts always: a backward that works where forward alone does not is no way out. `free`:
    only without communication.
    """
    needed = {*wanted} | ({"forward"} & directions.keys())
    if not needed <= directions.keys():
        return []
    cases = [directions[direction] for direction in sorted(needed)]
    for result in cases:
        if not result.outcome.status.usable:
            return []
        if free and (result.outcome.status is not Status.SUPPORTED or result.outcome.collectives):
            return []
    return cases


def _best_first(ways: Iterable[_Way]) -> list[_Way]:
    found = [w for w in ways if w.covers]
    most = max((w.covers for w in found), default=0)

    def order(w: _Way) -> tuple[bool, int, int, int, tuple[str, ...]]:
        return (_is_rare(w.covers, most), w.traffic, w.redistributed, -w.covers, w.name)

    return sorted(found, key=order)


def _share(covers: int, total: int) -> str:
    if covers == total:
        return "everywhere these cases fail" if total > 1 else "where this one fails"
    return f"in {covers} of the {total} failing combinations of setting, placement and mesh"


def _other_operators(group: Group, results: Sequence[CaseResult], free: bool) -> list[Priced]:
    """Other operators (or routes of the same one) that work where the group's cases fail."""
    failing = _calls(group.results)
    survey = _survey(results)
    shown: dict[tuple[str, str, str], dict[_Call, list[CaseResult]]] = {}
    for need, wanted in failing.items():
        place = (need.setting, need.mesh, need.placement)
        for call in survey.by_place.get((need.mesh, need.placement), ()):
            if call.who == need.who:
                continue
            # Where the setting of the same name ran, it speaks alone; else the first equivalent one.
            if call.setting != need.setting and (call.who, *place) in survey.names:
                continue
            if not survey.asked[need].like(survey.asked[call]):
                continue
            cases = _works(survey.calls[call], wanted, free)
            known = shown.setdefault(call.who, {})
            if cases and need not in known:
                known[need] = cases
    ways = [
        _Way(who, len(covered), tuple(case for cases in covered.values() for case in cases))
        for who, covered in shown.items()
    ]
    own = {call.who for call in failing}
    return [
        Priced(_operator_remedy(way, len(failing), own), way.traffic, way.covers)
        for way in _best_first(ways)[:_MAX_OPERATORS]
    ]


def _operator_remedy(way: _Way, total: int, own: set[tuple[str, str, str]]) -> Remedy:
    operator, route, probe = way.name
    how = "" if route == DTENSOR else f" by the route `{route}`"
    directions = {r.case.direction for r in way.cases}
    which = "forward and backward" if "backward" in directions else "forward"
    function = way.cases[0].case.function
    what = f" (`{function}`)" if function.startswith("torch.ops.") else ""
    stand = ", on stand-in kernels" if any(r.outcome.standins for r in way.cases) else ""
    text = (
        f"`{operator}`{what}{how} works in this scan{stand} {_share(way.covers, total)} ({which}), "
        f"{way.cost}."
    )
    other_route = way.name not in own and (operator, probe) in {(o, p) for o, _, p in own}
    kind = "route" if other_route else "operator"
    return Remedy(kind, text, evidence=way.evidence)


def _other_placements(group: Group, results: Sequence[CaseResult], free: bool) -> list[Priced]:
    """Placements under which the same operator works, and the redistribution that gets there."""
    survey = _survey(results)
    failing = _calls(group.results)
    covered: dict[str, list[tuple[_Call, list[CaseResult]]]] = {}
    for need, wanted in failing.items():
        for call in survey.by_rest.get((need.who, need.setting, need.mesh), ()):
            # PyTorch refuses a redistribution to a partial sum.
            if call.placement == need.placement or "partial" in call.placement:
                continue
            if cases := _works(survey.calls[call], wanted, free):
                covered.setdefault(call.placement, []).append((need, cases))
    ways = []
    for name, shown in covered.items():
        before = max(_getting_there(_any_case(failing[need]), cases) for need, cases in shown)
        ways.append(
            _Way((name,), len(shown), tuple(case for _, cases in shown for case in cases), before)
        )
    ways = _best_first(ways)[:_MAX_PLACEMENTS]
    if not ways:
        return []
    # Among equals, a placement that still shares the work goes before one that gives it up.
    ways.sort(key=lambda w: (w.traffic, -w.covers, _is_replicate(w.name[0])))
    need, cases = covered[ways[0].name[0]][0]
    names = ", ".join(f"{w.name[0]} ({w.covers} of {len(failing)}, {w.cost})" for w in ways)
    text = f"Redistribute before the call: in this scan the same operator works with {names}."
    if not _any_case(failing[need]).tensor_bytes:
        text += " What the redistribution itself sends is not known."
    if _is_replicate(ways[0].name[0]):
        text += " Replicated, every rank computes the whole attention."
    code = _redistribute_code(_any_case(failing[need]), cases[0].case.placements)
    evidence = tuple(sorted({case for way in ways for case in way.evidence}))
    remedy = Remedy("redistribute", text, code, evidence)
    return [Priced(remedy, ways[0].traffic, ways[0].covers)]


def _getting_there(failing: Case, shown: Sequence[CaseResult]) -> int:
    """Bytes a rank sends to bring the tensors to where they work; with a gradient, also the way back."""
    graded = {name for r in shown for name in r.outcome.outputs if is_gradient(name)}
    back = [name.removeprefix("grad.") for name in graded]
    return _redistribution(failing, shown[0].case.placements, back)


def _redistribution(
    failing: Case, target: Mapping[str, Sequence[str]], graded: Iterable[str] = ()
) -> int:
    mesh, sent = tuple(failing.mesh.values()), 0
    for name, wanted in target.items():
        have = failing.placements.get(name, PLAIN)
        whole = failing.tensor_bytes.get(name, 0)
        if PLAIN in (have, tuple(wanted)):
            continue
        sent += redistribution_bytes(whole, have, wanted, mesh)
        if name in graded:
            # The gradient of what was a sum over the ranks is whole.
            back = ["R" if placement.startswith("P") else placement for placement in have]
            sent += redistribution_bytes(whole, wanted, back, mesh)
    return sent


def _seen(group: Group, results: Sequence[CaseResult], free: bool = False) -> list[Priced]:
    return [
        *_other_operators(group, results, free),
        *_other_placements(group, results, free),
    ]


def working(group: Group, results: Sequence[CaseResult], *, free: bool = False) -> list[Remedy]:
    """Everything that this scan has shown to work instead, and `attncheck fix` where torch's own strategy is
    known to be wrong."""
    return ranked([*_seen(group, results, free), *_override(group)])


def instead_of_a_strategy(
    group: Group, results: Sequence[CaseResult], *, backward: bool = False
) -> list[Remedy]:
    """What mends an op that DTensor has no strategy for."""
    return ranked(
        [
            *_seen(group, results),
            *_strategy(group, results, backward),
            *_local_map(group, results),
            *_before_the_call(group, results),
        ]
    )


def on_local_shards(
    group: Group, results: Sequence[CaseResult], why: str, more: Iterable[Remedy] = ()
) -> list[Remedy]:
    """What mends a call that no strategy can; `more` costs nothing. `why` it cannot is a clause, or '' where
    one could."""
    return ranked(
        [
            *_wrapper(group, results, why),
            *_seen(group, results),
            *_local_map(group, results),
            *map(Priced, more),
        ]
    )


def _is_replicate(pattern: str) -> bool:
    return set(pattern.split(",")) == {"replicate"}


# --- code ----------------------------------------------------------------------------------------


def python_placement(text: str) -> str | None:
    """`S(1)` to `Shard(1)`; None for a placement that has no public constructor.

    >>> [python_placement(t) for t in ("R", "S(1)", "P(sum)", "_S(1, 2)")]
    ['Replicate()', 'Shard(1)', 'Partial()', None]
    """
    if text == "R":
        return "Replicate()"
    if text == "P(sum)":
        return "Partial()"
    shard = re.fullmatch(r"S\((\d+)\)", text)
    return f"Shard({shard[1]})" if shard else None


def _python_list(placements: Sequence[str]) -> str | None:
    parts = [python_placement(text) for text in placements]
    return None if None in parts else "[" + ", ".join(str(part) for part in parts) + "]"


def _imports(code: str, *names: str) -> str:
    """The import line for those of `names`, and of the placements, that occur in `code`."""
    found = [n for n in (*names, "Partial", "Replicate", "Shard") if re.search(rf"\b{n}\(", code)]
    found += [n for n in names if n not in found and re.search(rf"\b{n}\b", code)]
    return f"from torch.distributed.tensor import {', '.join(sorted(found))}\n"


def _redistribute_code(failing: Case, wanted: Mapping[str, Sequence[str]]) -> str:
    """Bring each tensor from the failing case's placements to the wanted ones."""
    lines = []
    for tensor, placements in wanted.items():
        if placements == failing.placements.get(tensor) or placements == PLAIN:
            continue
        target = _python_list(placements)
        if target is None or failing.placements.get(tensor, PLAIN) == PLAIN:
            return ""
        lines.append(f"{tensor} = {tensor}.redistribute(placements={target})")
    if not lines:
        return ""
    body = "\n".join(lines)
    return f"{_imports(body)}\n{_where(failing)}\n{body}\n"


def _where(case: Case) -> str:
    return f"# setting {case.setting_name}, mesh {wording.mesh(case.mesh)}"


def wrap_plain(group: Group, results: Sequence[CaseResult]) -> list[Remedy]:
    """Make a DTensor of the ordinary tensor that met DTensors, where the case passes one."""
    case = next((r.case for r in group.results if PLAIN in r.case.placements.values()), None)
    if case is None:
        return []
    names = [name for name, placements in case.placements.items() if placements == PLAIN]
    everywhere = _python_list(("R",) * len(case.mesh))
    body = "\n".join(
        f"{name} = DTensor.from_local({name}, mesh, {everywhere}, run_check=False)"
        for name in names
    )
    code = (
        f"{_imports(body, 'DTensor')}\n# every rank must hold the same {', '.join(names)}\n{body}\n"
    )
    shown = _wrapped_twins(group, results)
    passing = sum(PLAIN in r.case.placements.values() for r in group.results)
    what = f"Pass {', '.join(names)} as a replicated DTensor instead of an ordinary tensor"
    if passing < len(group.results):  # elsewhere the operator makes the ordinary tensor itself
        what += f", in the {passing} of these {len(group.results)} cases that pass one"
    if not shown:
        return [untried("redistribute", f"{what}.", code)]
    cost = _Way((), len(shown), tuple(shown)).cost
    text = f"{what}: {wording.count(len(shown), 'case')} of this scan did so and worked, {cost}."
    return [Remedy("redistribute", text, code, tuple(sorted(r.case.id for r in shown)))]


def _wrapped_twins(group: Group, results: Sequence[CaseResult]) -> list[CaseResult]:
    """Usable cases that are a failing one but for its plain tensors, replicated DTensors there."""
    twins = {}
    for result in results:
        if not result.outcome.status.usable or PLAIN in result.case.placements.values():
            continue
        if any(_is_wrapped(failed.case, result.case) for failed in group.results):
            twins[result.case.id] = result
    return [twins[case] for case in sorted(twins)]


def _is_wrapped(failed: Case, other: Case) -> bool:
    same = ("probe", "operator", "route", "mesh", "placement", "direction")
    if any(getattr(failed, name) != getattr(other, name) for name in same):
        return False
    if (
        PLAIN not in failed.placements.values()
        or failed.placements.keys() != other.placements.keys()
    ):
        return False
    for name, placements in failed.placements.items():
        wanted = ("R",) * len(failed.mesh) if placements == PLAIN else placements
        if other.placements[name] != wanted:
            return False
    # The one option that may differ is the one that says how the tensor is passed.
    options = {key for key in (*failed.setting, *other.setting) if key != "name"}
    return len([key for key in options if failed.setting.get(key) != other.setting.get(key)]) <= 1


def local_map(group: Group, results: Sequence[CaseResult]) -> list[Remedy]:
    """Run the operator on local shards, where its placements make each shard a whole problem."""
    return ranked(_local_map(group, results))


def _local_map(group: Group, results: Sequence[CaseResult]) -> list[Priced]:
    calls = {(r.case.probe, r.case.operator) for r in group.results}
    if any(
        (r.case.probe, r.case.operator) in calls
        and r.case.route == "local_map"
        and r.outcome.status.usable
        for r in results
    ):
        return []  # _other_operators has it, with evidence
    found = _nearest(group, results)
    if found is None:
        return []
    case, target = found
    remedy = _local_map_remedy(case, target, _is_higher_order(group.kernel_op))
    return [Priced(remedy, _redistribution(case, target.placements))]


def _nearest(group: Group, results: Sequence[CaseResult]) -> tuple[Case, _Target] | None:
    """A failing case, and how to lay it out so that each shard is a whole problem: of the operator that is
    hit most often its plainest tensor-parallel case; as it is, by heads, or else replicated."""
    often = Counter(r.case.operator for r in group.results)
    ordered = sorted(group.results, key=lambda r: (-often[r.case.operator], *_of_interest(r)))
    ordered = [r for r in ordered if not r.case.communicates]  # such a one needs all ranks at once
    for pick in (_own_target, _heads_target, _replicated_target):
        for result in ordered:
            if target := pick(result, results):
                return result.case, target
    return None


def _before_the_call(group: Group, results: Sequence[CaseResult]) -> list[Priced]:
    """A placement to redistribute to, where the case's own makes no shard a whole problem and nothing was
    seen working. A strategy would send the same, in every call; one for an op that writes into its arguments
    may not."""
    if any(p.remedy.kind == "redistribute" for p in _other_placements(group, results, False)):
        return []
    ordered = sorted(
        group.results, key=lambda r: (SEQUENCE not in r.case.placement, _of_interest(r))
    )
    for result in ordered:
        if result.case.communicates or _own_target(result, results):
            continue
        target = _heads_target(result, results)
        code = _redistribute_code(result.case, target.placements) if target else ""
        if target and code:
            sent = _redistribution(result.case, target.placements)
            how = f", which sends {wording.size(sent)} per rank" if sent else ""
            text = (
                f"With {result.case.placement} inputs no shard is a whole attention problem: bring them to "
                f"{target.pattern} before the call{how}. There a strategy or `local_map` needs no "
                "communication."
            )
            return [Priced(untried("redistribute", text, code), sent)]
    return []


def _of_interest(result: CaseResult) -> tuple[bool, bool, bool, int, str]:
    """Tensor parallelism first, replication last; the plainest setting."""
    case = result.case
    patterns = case.placement.split(",")
    extras = len(case.placements) + len(case.setting)
    plain = case.setting_name == "plain"
    return (HEADS not in patterns, _is_replicate(case.placement), not plain, extras, case.id)


@dataclass(frozen=True)
class _Target:
    """What `local_map` is told: placements by tensor, as code, and of the output."""

    pattern: str
    placements: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, str]
    output: str
    replicates_beside_shards: bool


def _own_target(result: CaseResult, results: Sequence[CaseResult]) -> _Target | None:
    return _target_from(result)


def _heads_target(result: CaseResult, results: Sequence[CaseResult]) -> _Target | None:
    """The same call with heads sharded: after an all-to-all every rank has whole sequences."""
    call, survey = _call_of(result.case), _survey(results)
    twins = [
        twin
        for c in survey.by_rest.get((call.who, call.setting, call.mesh), ())
        if HEADS in c.placement.split(",") and set(c.placement.split(",")) <= set(_LOCAL_PATTERNS)
        for twin in survey.calls[c].values()
    ]
    # Every axis that shares the work beats one that replicates.
    twins.sort(key=lambda r: (r.case.placement.count("replicate"), r.case.id))
    return next((target for twin in twins if (target := _target_from(twin))), None)


def _replicated_target(result: CaseResult, results: Sequence[CaseResult]) -> _Target | None:
    everywhere = _python_list(("R",) * len(result.case.mesh)) or ""
    inputs = {
        name: "None" if placements == PLAIN else everywhere
        for name, placements in result.case.placements.items()
    }
    whole = {name: ("R",) * len(result.case.mesh) for name in inputs}
    return _Target("replicate", whole, inputs, everywhere, False) if inputs else None


def _target_from(result: CaseResult) -> _Target | None:
    """The case's own placements, if each local shard under them is a whole problem of its own."""
    case = result.case
    if not set(case.placement.split(",")) <= set(_LOCAL_PATTERNS) or uneven_roles(case):
        return None
    # An ordinary tensor may have a dim that the others shard: its shards would no longer fit it.
    if not case.placements or PLAIN in case.placements.values():
        return None
    query = case.placements.get("q", case.placements.get("query"))
    output = result.outcome.outputs.get("out") if result.outcome.status.usable else query
    written = {name: _python_list(placements) for name, placements in case.placements.items()}
    out = _python_list(output) if output and not any(p.startswith("P") for p in output) else None
    if _is_replicate(case.placement):
        out = _python_list(("R",) * len(case.mesh))
    if out is None or None in written.values():
        return None
    sharded = [any("S(" in p for p in placements) for placements in case.placements.values()]
    whole_mask = any(
        not is_sharded and re.search("mask|bias", name)
        for name, is_sharded in zip(case.placements, sharded, strict=True)
    )
    if any(sharded) and whole_mask:  # it may have a dim that the others shard, as above
        return None
    inputs = {name: str(text) for name, text in written.items()}
    beside = any(sharded) and not all(sharded)
    return _Target(case.placement, dict(case.placements), inputs, out, beside)


def _local_map_remedy(case: Case, target: _Target, higher_order: bool) -> Remedy:
    placements = "".join(f"        {text},  # {name}\n" for name, text in target.inputs.items())
    body = (
        "attention = local_map(\n"
        f"    {_callee(case)},  # bind its other arguments with functools.partial\n"
        f"    out_placements={target.output},  # a list: one output\n"
        f"    in_placements=(\n{placements}    ),\n"
        "    device_mesh=mesh,\n"
        "    redistribute_inputs=True,\n"
        ")\n"
        f"out = attention({', '.join(target.inputs)})\n"
    )
    if target.replicates_beside_shards:
        # Forward is right without it; the gradient would silently be one rank's share.
        body = "# for a replicated argument that needs a gradient, give in_grad_placements\n" + body
    code = (
        f"{_imports(body)}from torch.distributed.tensor.experimental import local_map\n\n"
        f"{_where(case)}, inputs {target.pattern}\n{body}"
    )
    text = (
        f"Call it through `local_map` with {target.pattern} inputs: each rank runs the operator on "
        "its own part and DTensor never sees the kernel op."
    )
    if _is_replicate(target.pattern):
        text = "Call it through `local_map` with replicated inputs: every rank computes it all."
    elif higher_order:
        text += f" {_LOCAL_POSITIONS}"
    return untried("route", text, code)


# Measured on torch 2.13: a bias by head index is silently wrong on every rank but the first.
_LOCAL_POSITIONS = (
    "What it calls (`score_mod`, `mask_mod`) then gets positions in the shard, not in the whole."
)


def _is_higher_order(op: str) -> bool:
    return op.startswith("higher_order.")


def _callee(case: Case) -> str:
    """What the operator is called in code; an op of the dispatcher by its whole path."""
    path = case.function or case.operator.partition("[")[0]
    name = path if path.startswith("torch.ops.") else path.rpartition(".")[2]
    return name if name.replace(".", "_").isidentifier() else "attention_function"


def strategy(group: Group, results: Sequence[CaseResult]) -> list[Remedy]:
    """Teach DTensor the op."""
    return ranked(_strategy(group, results, backward=False))


def _strategy(group: Group, results: Sequence[CaseResult], backward: bool) -> list[Priced]:
    op = group.kernel_op
    if not op:
        return []
    found = _nearest(group, results)
    sent = _redistribution(found[0], found[1].placements) if found else 0
    if _is_higher_order(op):
        text = (
            f"No strategy can be registered for `{op}`, a higher-order op: give it a rule for DTensor, "
            f"`torch.ops.{op}.py_impl(DTensor)`, that calls it on the local shards, and the other "
            f"direction's op another. {_LOCAL_POSITIONS}"
        )
        return [Priced(untried("strategy", text), sent)]
    text = (
        f"`attncheck fix` writes a module that gives DTensor strategies for `{op}` and for the other "
        "direction's op, known ones or found by running it on shards, and only what these cases and their "
        "neighbours then show to be right."
    )
    if backward:
        text += (
            " An op that writes into its arguments gets one only where these lie alike: bring q, k and v "
            "to one placement before the call."
        )
    return [Priced(untried("strategy", text, _fix(op)), sent)]


def _override(group: Group) -> list[Priced]:
    """Replace torch's own strategy, where it is known to be wrong."""
    if group.kernel_op not in OVERRIDDEN:
        return []
    text = (
        f"The strategy that torch has for `{group.kernel_op}` is known to be wrong in some versions: "
        "`attncheck fix` writes one that takes its place there, and verifies it."
    )
    return [Priced(untried("strategy", text, _fix(group.kernel_op)))]


def _wrapper(group: Group, results: Sequence[CaseResult], why: str) -> list[Priced]:
    """Take the place of a function that DTensor cannot intercept."""
    names = Counter(r.case.function or r.case.operator for r in group.results)
    known = [name for name, _ in names.most_common() if name in WRAPPED]
    if not known or not why:
        return []
    found = _nearest(group, results)
    sent = _redistribution(found[0], found[1].placements) if found else 0
    text = (
        f"No strategy can mend this: {why}. `attncheck fix` writes a wrapper that takes the place of "
        f"`{known[0]}` and calls it on local shards, and verifies it."
    )
    return [Priced(untried("strategy", text, _fix(known[0])), sent)]


def _fix(name: str) -> str:
    return (
        f"attncheck fix --from report.json --kernel-op '{name}' --write attncheck_fixes.py"
        "  # of --output json:report.json\n"
    )
