"""The mutation score: every planted bug is scanned for real, and each must be found and rightly named.

    python tests/oracle/score.py            # from a clone, in an environment with attncheck and torch
    python tests/oracle/score.py --write    # and put the tables into the README and reports/published/trust/
    python tests/oracle/score.py 'aten_*'   # some mutants only

A mutant is found where its case gets a finding of each rule that its catalogue entry names, of no other
rule, and with the kernel op that carries the mistake. Its twin, the same code without the mistake, must
be `supported` without any finding. Exit code 1 where a mutant is missed or a twin raises an alarm.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # `-m tests.oracle.score` does not put it there

import catalogue
from catalogue import Mutant

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PUBLISHED = ROOT / "reports" / "published" / "trust"
BEGIN, END = "<!-- mutation score: begin -->", "<!-- mutation score: end -->"

SEED = 5
# A rank that never comes back is waited for: not longer than a loaded machine needs to call a hang one.
CASE_TIMEOUT = {"process": 15.0}
ANY_TIMEOUT = 60.0
SCAN_SECONDS = 1500.0


@dataclass(frozen=True)
class Scan:
    """One run of `attncheck scan`: mutants that share a mesh. What ends processes has runs of its own, one
    for each direction: in the other one it would end them once more, for nothing."""

    mesh: str
    family: str
    direction: str  # '' for both
    mutants: tuple[Mutant, ...]


@dataclass(frozen=True)
class Seen:
    """What a scan says of one operator in one direction: `cases` that ran, findings as (rule, kernel op),
    and for the reader each case's status with its message."""

    cases: int
    findings: tuple[tuple[str, str], ...]
    statuses: tuple[str, ...]
    story: str

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(sorted({rule for rule, _ in self.findings}))

    @property
    def kernel_ops(self) -> tuple[str, ...]:
        return tuple(sorted({op for _, op in self.findings}))


@dataclass(frozen=True)
class Verdict:
    """A mutant and its twin. `missed` and `alarm` say what is wrong, '' where all is well."""

    mutant: Mutant
    seen: Seen
    missed: str
    alarm: str

    @property
    def twin(self) -> tuple[str, str, str]:
        """Twins are shared, and run once on each mesh and in each direction."""
        return self.mutant.twin.name, self.mutant.mesh, self.mutant.direction


@dataclass(frozen=True)
class Score:
    verdicts: tuple[Verdict, ...]
    seed: int
    seconds: float
    cases: int
    date: str
    versions: Mapping[str, str]

    @property
    def missed(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.missed)

    @property
    def alarms(self) -> dict[tuple[str, str, str], str]:
        return {v.twin: v.alarm for v in self.verdicts if v.alarm}


# --- measuring -------------------------------------------------------------------------------------


def scans(mutants: Iterable[Mutant]) -> list[Scan]:
    """As few as there can be: one for each mesh, and for what ends processes, one more a direction."""
    groups: dict[tuple[bool, str, str], list[Mutant]] = {}
    for mutant in mutants:
        ends = mutant.family == "process"
        key = (ends, mutant.mesh, mutant.direction if ends else "")
        groups.setdefault(key, []).append(mutant)
    # The longest first, so that no core is left with it alone.
    ordered = sorted(groups.items(), key=lambda item: (not item[0][0], *item[0][1:]))
    return [
        Scan(mesh, "process" if ends else "values", direction, tuple(group))
        for (ends, mesh, direction), group in ordered
    ]


def measure(
    by_file: Mapping[Path, Sequence[Mutant]],
    folder: Path,
    seed: int = SEED,
    log: Callable[[str], None] = lambda text: None,
) -> Score:
    """Scan every mutant and its twin, in new folders below `folder`. Raises RuntimeError where a scan
    itself fails."""
    began = time.monotonic()
    file_of = {mutant.name: file for file, mutants in by_file.items() for mutant in mutants}
    mutants = [mutant for group in by_file.values() for mutant in group]
    duplicates = len(mutants) - len(file_of)
    assert not duplicates, f"{duplicates} mutants share a name with another"
    verdicts: dict[str, Verdict] = {}
    cases = 0

    def run(numbered: tuple[int, Scan]) -> tuple[Scan, dict[str, Any], float]:
        number, scan = numbered
        started = time.monotonic()
        files = dict.fromkeys(file_of[mutant.name] for mutant in scan.mutants)
        report = run_scan(scan, list(files), folder / f"scan{number}", seed)
        return scan, report, time.monotonic() - started

    # Two at a time: a scan of hangs and deaths mostly waits.
    with ThreadPoolExecutor(2) as pool:
        for scan, report, seconds in pool.map(run, enumerate(scans(mutants))):
            what = f"{len(scan.mutants)} mutants on {scan.mesh} ranks {scan.direction}".rstrip()
            log(f"{what}: {len(report['cases'])} cases in {seconds:.0f} s")
            cases += len(report["cases"])
            for mutant in scan.mutants:
                verdicts[mutant.name] = judge(mutant, report)
    return Score(
        verdicts=tuple(verdicts[mutant.name] for mutant in mutants),
        seed=seed,
        seconds=time.monotonic() - began,
        cases=cases,
        date=datetime.date.today().isoformat(),
        versions={
            "attncheck": version("attncheck"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
    )


def run_scan(scan: Scan, files: Sequence[Path], folder: Path, seed: int) -> dict[str, Any]:
    """The report of `attncheck scan` on the operators of these mutants and twins, at the default level."""
    folder.mkdir(parents=True)
    output = folder / "report.json"
    timeout = CASE_TIMEOUT.get(scan.family, ANY_TIMEOUT)
    command = [
        sys.executable, "-m", "attncheck", "scan", "--level", "default", "--mesh", scan.mesh,
        "--seed", str(seed), "--case-timeout", str(timeout), "-q", "--run-dir", str(folder / "run"),
        "--output", f"json:{output}",
    ]  # fmt: skip
    for file in files:
        command += ["--probe", str(file)]
    if scan.direction:
        command += ["--direction", scan.direction]
    for name in dict.fromkeys(o.name for m in scan.mutants for o in (m.operator, m.twin)):
        command += ["--operator", name]
    # Away from any pyproject.toml, whose options are not part of the measurement.
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=SCAN_SECONDS, env=environment()
    )
    if done.returncode not in (0, 1, 3) or not output.exists():
        raise RuntimeError(f"the scan on {scan.mesh} ranks failed: {done.stderr.strip()[-2000:]}")
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return report


def environment() -> dict[str, str]:
    """The checkout that this file is of is what is measured."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def judge(mutant: Mutant, report: Mapping[str, Any]) -> Verdict:
    seen = look(report, mutant.operator.name, mutant.direction)
    twin = look(report, mutant.twin.name, mutant.direction)
    return Verdict(mutant, seen, _missed(mutant, seen), _alarm(twin))


def look(report: Mapping[str, Any], operator: str, direction: str) -> Seen:
    cases = [
        case
        for case in report["cases"]
        if case["operator"] == operator and case["direction"] == direction
    ]
    ids = {case["id"] for case in cases}
    findings = [
        (finding["rule"], finding.get("kernel_op", ""))
        for finding in report["findings"]
        if ids & set(finding["cases"])
    ]
    return Seen(
        cases=len(cases),
        findings=tuple(sorted(set(findings))),
        statuses=tuple(case["outcome"]["status"] for case in cases),
        story="; ".join(
            f"{case['outcome']['status']}: {case['outcome'].get('message', '')[:200]}".rstrip(": ")
            for case in cases
        ),
    )


def _missed(mutant: Mutant, seen: Seen) -> str:
    if not seen.cases:
        return "it did not run"
    if set(seen.rules) != set(mutant.rules):
        return f"{_names(seen.rules)} instead of {_names(mutant.rules)} ({seen.story})"
    if set(seen.kernel_ops) != {mutant.kernel_op}:
        return f"it names {_names(seen.kernel_ops)} instead of {mutant.kernel_op} ({seen.story})"
    return ""


def _alarm(twin: Seen) -> str:
    if not twin.cases:
        return "it did not run"
    if twin.findings or set(twin.statuses) != {"supported"}:
        return f"{_names(twin.rules)} ({twin.story})"
    return ""


def _names(names: Sequence[str]) -> str:
    return ", ".join(name or "no op" for name in names) or "nothing"


# --- telling ---------------------------------------------------------------------------------------


def tables(score: Score) -> str:
    """The score in Markdown: nothing in it changes from day to day, or from machine to machine."""
    return "\n\n".join("\n".join(part) for part in (_by_rule(score), _by_kind(score)))


def _by_rule(score: Score) -> Iterator[str]:
    from attncheck import rules

    yield "| rule | found / planted |"
    yield "| --- | --- |"
    for rule in rules.RULES:
        planted = [v for v in score.verdicts if rule.id in v.mutant.rules]
        if planted:
            found = sum(not v.missed for v in planted)
            yield f"| {rule.id} {rule.name} | {found} / {len(planted)} |"


def _by_kind(score: Score) -> Iterator[str]:
    yield "| mistakes in | op | forward | backward | false alarms / twins |"
    yield "| --- | --- | --- | --- | --- |"
    kinds = dict.fromkeys((v.mutant.family, v.mutant.layer) for v in score.verdicts)
    for family, layer in sorted(kinds):
        of = [v for v in score.verdicts if (v.mutant.family, v.mutant.layer) == (family, layer)]
        yield f"| {family} | {layer} | {_found(of, 'forward')} | {_found(of, 'backward')} | {_twins(of)} |"
    every = score.verdicts
    yield f"| all | | {_found(every, 'forward')} | {_found(every, 'backward')} | {_twins(every)} |"


def _found(verdicts: Sequence[Verdict], direction: str) -> str:
    planted = [v for v in verdicts if v.mutant.direction == direction]
    return f"{sum(not v.missed for v in planted)} / {len(planted)}" if planted else ""


def _twins(verdicts: Sequence[Verdict]) -> str:
    twins = {v.twin: v.alarm for v in verdicts}
    return f"{sum(bool(alarm) for alarm in twins.values())} / {len(twins)}"


def markdown(score: Score) -> str:
    """The tables, what was missed, and what was measured when, with what."""
    meshes = ", ".join(dict.fromkeys(v.mutant.mesh for v in score.verdicts))
    found = len(score.verdicts) - len(score.missed)
    parts = [
        f"{found} of {len(score.verdicts)} planted bugs are found, each by the right rules, by no other, "
        "and with the kernel op named that carries the mistake.",
        tables(score),
    ]
    if score.missed:
        parts.append(
            "\n".join(["Missed:", "", *(_line(v.mutant.name, v.missed) for v in score.missed)])
        )
    if score.alarms:
        lines = [
            _line(f"{name} on {mesh} ranks, {direction}", alarm)
            for (name, mesh, direction), alarm in score.alarms.items()
        ]
        parts.append("\n".join(["False alarms:", "", *lines]))
    parts.append(
        f"Measured on {score.date} with attncheck {score.versions['attncheck']}, torch "
        f"{score.versions['torch']} and Python {score.versions['python']}: seed {score.seed}, meshes "
        f"{meshes}, {score.cases} cases in {score.seconds:.0f} s."
    )
    return "\n\n".join(parts)


def _line(name: str, why: str) -> str:
    return f"- `{name}`: {' '.join(why.split())}"


def document(score: Score) -> dict[str, Any]:
    """The score, mutant by mutant."""
    return {
        "date": score.date,
        "versions": dict(score.versions),
        "seed": score.seed,
        "seconds": round(score.seconds, 1),
        "cases": score.cases,
        "mutants": [
            {
                "name": v.mutant.name,
                "family": v.mutant.family,
                "layer": v.mutant.layer,
                "direction": v.mutant.direction,
                "mesh": v.mutant.mesh,
                "mistake": v.mutant.mistake,
                "rules": list(v.mutant.rules),
                "kernel_op": v.mutant.kernel_op,
                "found": not v.missed,
                "missed": v.missed,
                "twin": v.mutant.twin.name,
                "alarm": v.alarm,
            }
            for v in score.verdicts
        ],
    }


def block(text: str) -> str | None:
    """What stands between the markers of a README; None where it has none."""
    found = re.search(re.escape(BEGIN) + r"\n(.*?)\n?" + re.escape(END), text, re.S)
    return found[1].strip() if found else None


def write(score: Score) -> list[Path]:
    """Put the score into reports/published/trust/ and, where it has the markers, into the README."""
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    text = markdown(score)
    title = "# Mutation score\n\nWritten by `python tests/oracle/score.py --write`.\n\n"
    written = [PUBLISHED / "mutation-score.md", PUBLISHED / "mutation-score.json"]
    written[0].write_text(f"{title}{text}\n", encoding="utf-8")
    written[1].write_text(json.dumps(document(score), indent=1) + "\n", encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    if block(readme) is not None:
        before, _, rest = readme.partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
        written.append(README)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mutants", nargs="*", help="names or globs; all without any")
    parser.add_argument(
        "--write", action="store_true", help="into the README and reports/published/"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    if given.write and given.mutants:
        parser.error("--write is for the whole catalogue")
    by_file = {
        file: tuple(m for m in mutants if _wanted(m.name, given.mutants))
        for file, mutants in catalogue.load().items()
    }
    if not any(by_file.values()):
        parser.error(f"no mutant is called {' or '.join(given.mutants)}")
    with tempfile.TemporaryDirectory(prefix="attncheck-score-") as folder:
        score = measure(
            by_file, Path(folder), given.seed, lambda text: print(text, file=sys.stderr)
        )
    print(markdown(score))
    if given.write:
        for path in write(score):
            print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return 1 if score.missed or score.alarms else 0


def _wanted(name: str, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)


if __name__ == "__main__":
    sys.exit(main())
