"""From a finding to its reproduction: choose a case, write a script, run it, and keep only what it showed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.requirements import Requirement

from attncheck import environment, plugins, provision
from attncheck.errors import UserError
from attncheck.model import Finding, Report
from attncheck.triage import calls, confirming, scripts
from attncheck.triage.choosing import Candidate, candidates
from attncheck.triage.claims import EXPECTED, KINDS, Claim, Kind
from attncheck.triage.scripts import Header
from attncheck.triage.subject import NotWritten, Subject

# Cases of a finding to try before giving up.
TRIES = 3
# Stand-ins that take the place of a compiled module, which may be empty where the call never comes to it.
STUBS: Mapping[str, str] = {"flash_attn_2_cuda": "flash_attn_2_cuda"}

# An op that is refused however its tensors are placed is so on any number of ranks.
_ANY_RANKS = 2

Log = Callable[[str], None]


@dataclass(frozen=True)
class Reproduction:
    """What became of a finding: a script that was seen to show it, or why there is none.

    `title`: what it shows, in our words; `case`: the one shown; `how`: where it was confirmed, in a sentence;
    `expected` in a sentence, `actual` as printed.
    """

    finding: Finding
    title: str = ""
    script: str = ""
    case: str = ""
    ranks: int = 0
    expected: str = ""
    actual: str = ""
    how: str = ""
    why_not: str = ""

    @property
    def confirmed(self) -> bool:
        return bool(self.script)


@dataclass(frozen=True)
class Workshop:
    """What reproductions are made with. `folder`: where scripts are run; `path`: folders of provisioned
    packages, and `versions` of these by name; `seconds`: how long a script may take."""

    report: Report
    shelf: plugins.ProbeShelf
    folder: Path
    path: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = confirming.SECONDS


def workshop(
    report: Report,
    findings: Iterable[Finding],
    shelf: plugins.ProbeShelf,
    given: Sequence[str],
    folder: Path,
    log: Log,
) -> Workshop:
    """With the packages in place that the operators of these findings need.

    They are those that are `given`, else those that the report was made with, in its versions. Raises
    UserError for a given one that cannot be provisioned.
    """
    path, versions = [], {}
    wanted = [provision.parse(one) for one in given]
    for one in wanted or _as_in(report, _packages_of(report, findings, shelf), log):
        try:
            path.append(str(provision.ensure(one, log=log)))
            versions[one.package] = one.version
        except UserError as error:
            if given:
                raise
            log(str(error))
    return Workshop(report, shelf, folder, tuple(path), versions)


def _packages_of(
    report: Report, findings: Iterable[Finding], shelf: plugins.ProbeShelf
) -> set[str]:
    """The distributions that the operators of these findings need, as their probes say."""
    ids = {case for finding in findings for case in finding.cases}
    names = {r.case.operator for r in report.cases if r.case.id in ids}
    operators = [o for p in shelf.probes for o in p.operators if o.name in names]
    return {Requirement(text).name for operator in operators for text in operator.packages}


def _as_in(report: Report, packages: set[str], log: Log) -> list[provision.Provision]:
    """What a report says was provisioned for its scan: of its text only versions that we know count."""
    told, versions = report.environment.get("with"), report.environment.get("packages")
    said = [str(one) for one in told] if isinstance(told, (list, tuple)) else []
    found = []
    for name, recipe in provision.RECIPES.items():
        if name not in packages or not any(one.partition("=")[0] == name for one in said):
            continue
        version = versions.get(name) if isinstance(versions, Mapping) else None
        if version in recipe.versions:
            found.append(provision.Provision(name, str(version)))
        else:
            log(f"the report is about a {name} that is not known here: name one with --with")
    return found


def reproduce(shop: Workshop, finding: Finding, log: Log) -> Reproduction:
    """The shortest script that shows the finding, run here to see that it does."""
    if finding.rule not in KINDS:
        return Reproduction(
            finding, why_not="it is about the environment: there is nothing to call"
        )
    if importlib.util.find_spec("torch") is None:
        return Reproduction(finding, why_not="torch is not installed here")
    reasons: dict[str, None] = {}
    tries = 0
    for candidate in itertools.islice(candidates(shop.report, finding, shop.shelf), 3 * TRIES):
        if tries == TRIES:
            break
        try:
            done = _attempt(shop, finding, candidate)
        except NotWritten as error:
            reasons[f"{candidate.case.id}: {error}"] = None
            continue
        tries += 1
        told = "shows it" if done.confirmed else f"does not show it: {done.why_not}"
        log(f"{finding.rule} {candidate.case.id} {told}")
        if done.confirmed:
            return done
        reasons[f"{candidate.case.id}: {done.why_not}"] = None
    if not reasons:
        reasons[
            "no such case here: none of its cases can be planned from the probes that are loaded"
        ] = None
    return Reproduction(finding, why_not="; ".join([*reasons][:TRIES]))


@dataclass(frozen=True)
class Draft:
    """A script, and how it is to be run: `on_standins`, with ours in the place of what is not here;
    `on_gpus`: it takes some where there are some. `alone`: it calls nothing but the kernel op."""

    text: str
    ranks: int
    on_standins: bool = False
    on_gpus: bool = False
    alone: bool = False


def _attempt(shop: Workshop, finding: Finding, candidate: Candidate) -> Reproduction:
    """The scripts of one case, run one after the other until one shows the finding. Raises NotWritten."""
    op = candidate.claim.op if candidate.claim.kind is Kind.REFUSED else ""
    transcript = calls.transcribe(
        candidate.file, candidate.operator, candidate.setting, op, shop.path
    )
    done = Reproduction(finding, case=candidate.case.id)
    for draft in _drafts(candidate, transcript):
        done = _confirm(shop, finding, candidate, draft)
        if done.confirmed:
            break
    return done


def _drafts(candidate: Candidate, transcript: calls.Transcript) -> Iterator[Draft]:
    """What to try, the simplest to run first. Raises NotWritten."""
    claim, operator = candidate.claim, candidate.operator
    if candidate.by_itself:
        yield from _by_itself(candidate, transcript)
        return
    if claim.kind is Kind.DRIFT and not transcript.float64:
        raise NotWritten("the operator takes no float64, which drift is measured against")
    try:
        call = calls.written(transcript, operator, candidate.setting)
    except NotWritten:
        if transcript.op is None:
            raise
        yield from _by_itself(candidate, transcript)
        return
    subject = Subject(
        candidate.case,
        candidate.setting,
        operator.tensors(candidate.setting),
        claim,
        call,
        _title(claim, candidate),
        compiled=_compiled(candidate),
    )
    if not operator.standins:
        text = scripts.script(subject)
        yield Draft(text, subject.ranks)
        # As a scan has it; a module may take another path where nothing requires a gradient.
        with_leaves = scripts.script(replace(subject, leaves=True))
        if with_leaves != text:
            yield Draft(with_leaves, subject.ranks)
        return
    if claim.kind in (Kind.REFUSED, Kind.RAISES):
        # The call fails in front of the kernel: then nothing needs to stand in for that.
        text = scripts.script(replace(subject, stubs=_stubs(candidate)))
        yield Draft(text, subject.ranks)
        yield Draft(text, subject.ranks, on_standins=True)
    if claim.kind is not Kind.REFUSED:
        text = scripts.script(replace(subject, own_device=True))
        if environment.gpu() != "none":
            yield Draft(text, subject.ranks, on_gpus=True)
        yield Draft(text, subject.ranks, on_standins=True, on_gpus=True)


def _by_itself(candidate: Candidate, transcript: calls.Transcript) -> Iterator[Draft]:
    """The kernel op alone, which is refused however its tensors are placed. Raises NotWritten."""
    claim = candidate.claim
    if transcript.op is None:
        raise NotWritten(f"{claim.op} is not reached by the call of {candidate.operator.name}")
    imports = calls.registering(claim.op.partition(".")[0])
    header = Header(_title(claim, candidate), _ANY_RANKS, imports, _stubs(candidate))
    text = scripts.of_an_op(header, transcript.op, _plain(candidate))
    yield Draft(text, _ANY_RANKS, alone=True)
    if candidate.operator.standins:
        yield Draft(text, _ANY_RANKS, on_standins=True, alone=True)


def _confirm(shop: Workshop, finding: Finding, candidate: Candidate, draft: Draft) -> Reproduction:
    file = shop.folder / "repro.py"
    file.write_text(draft.text, encoding="utf-8")
    through = ["-m", "attncheck.runner.stage", str(candidate.file), candidate.operator.name]
    run = confirming.run(
        file,
        draft.ranks,
        shop.path,
        through if draft.on_standins else (),
        crash=candidate.claim.kind is Kind.CRASH,
        seconds=shop.seconds,
    )
    case = candidate.case.id
    if not run.shows:
        why = run.why or "the script does not show it here"
        return Reproduction(finding, case=case, why_not=why)
    return Reproduction(
        finding,
        title=_says(candidate.claim, candidate),
        script=draft.text,
        case=case,
        ranks=draft.ranks,
        expected=EXPECTED[candidate.claim.kind],
        actual=run.output,
        how=_how(shop, candidate, draft),
    )


def _how(shop: Workshop, candidate: Candidate, draft: Draft) -> str:
    """Where it was confirmed: `Confirmed with torch 2.13.0 on a CPU, as it is.`"""
    needed = {Requirement(text).name for text in candidate.operator.packages}
    versions = {"torch": importlib.metadata.version("torch"), **shop.versions}
    named = [f"{name} {v}" for name, v in versions.items() if name == "torch" or name in needed]
    told = f"Confirmed with {' and '.join(named)}"
    if draft.on_standins:
        told += (
            " on a CPU, with attncheck's stand-ins in the place of what is not there. The script itself "
            "knows nothing of them"
        )
        told += ", and takes GPUs where there are some." if draft.on_gpus else "."
    elif draft.on_gpus:
        told += ", as it is."
    elif candidate.operator.standins:
        told += " on a CPU, as it is: the call fails before it comes to a kernel."
    else:
        told += " on a CPU, as it is."
    if draft.alone:
        told += (
            " The op is called by itself: in the operator another one is refused in front of it."
        )
    packages = shop.report.environment.get("packages")
    of = str(packages.get("torch", "")) if isinstance(packages, Mapping) else ""
    return told if of in ("", versions["torch"]) else f"{told} (The report is of torch {of}.)"


def _plain(candidate: Candidate) -> tuple[bool, ...]:
    """Which tensors of the op were ordinary ones, in its own order, where that is what is wrong."""
    if not candidate.claim.mixed:
        return ()
    ops = [k for k in candidate.result.outcome.kernel_ops if k.op == candidate.claim.op]
    return tuple("plain" in placements for placements in ops[0].inputs) if ops else ()


def _stubs(candidate: Candidate) -> tuple[str, ...]:
    return tuple(STUBS[name] for name in candidate.operator.standins if name in STUBS)


def _compiled(candidate: Candidate) -> tuple[str, ...]:
    if candidate.claim.kind is not Kind.NO_OP:
        return ()
    modules = [target.partition(":")[0] for target in candidate.operator.bypasses]
    if not modules or not all(re.fullmatch(r"\w+(\.\w+)*", m, re.ASCII) for m in modules):
        raise NotWritten("the probe does not say which functions are compiled")
    return tuple(modules)


_SAYS: Mapping[Kind, str] = {
    Kind.REFUSED: "`{op}` has no sharding strategy",
    Kind.RAISES: "`{op}` raises {exception}",
    Kind.NO_OP: "`{op}` is no dispatcher op and is handed DTensors",
    Kind.WRONG: "`{op}` gives wrong {values} without an error",
    Kind.DRIFT: "`{op}` is less exact than on whole tensors",
    Kind.REPLICAS: "`{op}` leaves ranks with different replicas",
    Kind.DROPOUT: "`{op}` drops the same elements of every shard",
    Kind.SHAPE: "`{op}` gives local shapes that contradict their placements",
    Kind.STALE: "`{op}` gives another result on the second call",
    Kind.PLAIN: "`{op}` gives ordinary tensors for DTensors",
    Kind.COMMUNICATES: "`{op}` communicates unasked",
    Kind.SLOW: "`{op}`: the first call takes seconds",
    Kind.CRASH: "`{op}` kills the process",
    Kind.DIVERGES: "`{op}`: ranks take different paths",
}


def _says(claim: Claim, candidate: Candidate) -> str:
    says = _SAYS[claim.kind] if not claim.mixed else "`{op}` gets ordinary tensors with DTensors"
    return says.format(
        op=claim.bare_op or candidate.operator.name,
        exception=claim.exception or "an exception",
        values="gradients" if claim.gradients else "values",
    )


def _title(claim: Claim, candidate: Candidate) -> str:
    where = f"{candidate.setting.name}, {candidate.case.placement}, {candidate.case.direction}"
    says = _says(claim, candidate).replace("`", "")
    return f"{says} ({candidate.operator.name}, {where})."
