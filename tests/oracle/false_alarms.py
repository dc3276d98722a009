"""Does the checker cry wolf? Scan what is known to be right over many seeds, and count what it says.

    python tests/oracle/false_alarms.py --seeds 50            # everything, and print the tables
    python tests/oracle/false_alarms.py --seeds 50 --write    # and put them into the README and
                                                              # reports/published/trust/
    python tests/oracle/false_alarms.py --mesh 2 --part deep --work DIR    # one part of it
    python tests/oracle/false_alarms.py --resume --work DIR   # the rest

Known to be right are the built-in operators of verified_probe.py and the healthy twins of every planted bug
(mutants_*.py, planted_probe.py). `--seeds N` sets of values go to each operator, dtype and mesh in the parts
`deep`, `deep_forward` and `twins`; every other setting, placement and direction (`wide`) gets a tenth of
them. On a mesh of two axes a placement is run on either axis and on both: these three share the seeds.
Exit code 1 where any case is above `drift`, `unknown` or did not run, or where nothing was judged.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).parent)
)  # `-m tests.oracle.false_alarms` does not put it there

import catalogue

from attncheck import plugins

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
README = ROOT / "README.md"
PUBLISHED = ROOT / "reports" / "published" / "trust"
BEGIN, END = "<!-- false alarms: begin -->", "<!-- false alarms: end -->"

MESHES = ("1", "2", "3", "4", "2x2")
PARTS = ("deep", "deep_forward", "twins", "wide")
WIDE_SHARE = 10  # `wide` gets this part of the seeds
FIRST_SEED = 1000
CHUNK = 10  # seeds of one scan: what an interruption loses
DTYPES = ("float32", "bfloat16", "float16")
QUIET = ("supported", "redistributed", "drift")  # what a healthy case may be
# What DTensor says where it has to split or merge a dim that two mesh axes shard, or shard unevenly.
REFUSALS = (
    "Cannot unflatten tensor with _StridedShard placement",
    "Cannot flatten unevenly sharded tensor",
)
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
BINS = 20  # of the histogram, from 0 to the bound
WORST = 20  # ratios that are named

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """One scan: these operators of these probe files on a mesh, with `repeats` sets of values from seed
    `first` on."""

    name: str
    mesh: str
    files: tuple[Path, ...]
    operators: tuple[str, ...]
    repeats: int
    first: int
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.name}-{self.mesh}-{self.first}+{self.repeats}"


# --- what is scanned -------------------------------------------------------------------------------


def parts(
    seeds: int,
    meshes: Sequence[str] = MESHES,
    names: Sequence[str] = PARTS,
    chunk: int = CHUNK,
) -> list[Part]:
    """The scans, none with more than `chunk` sets of values; every mesh and part gets some before more."""
    chunks = [(at, min(chunk, seeds - at)) for at in range(0, seeds, chunk)]
    made = (_part(name, mesh, *seeds) for seeds in chunks for mesh in meshes for name in names)
    return [part for part in made if part is not None]


def _part(name: str, mesh: str, at: int, seeds: int) -> Part | None:
    """What runs of this part on this mesh, with `seeds` sets of values behind the first `at` ones."""
    share = math.ceil(seeds / 3) if "x" in mesh else seeds
    if name == "wide":  # one of every tenth seed
        share = len([n for n in range(at, at + seeds) if n % WIDE_SHARE == 0])
    if not share:
        return None
    first = FIRST_SEED + at
    if name == "twins":
        files, operators = twins(mesh)
        return Part(name, mesh, files, operators, seeds, first) if operators else None
    probe = (HERE / "verified_probe.py",)
    options: tuple[str, ...] = ("--with", "flash-attn", "--with", "xformers")
    if name == "deep":  # it runs forward on the way
        options += ("--direction", "backward")
    prefix = "verified" if name == "wide" else name
    return Part(name, mesh, probe, (f"{prefix}.*",), share, first, options)


def twins(mesh: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The healthy twins that say that they are right on this mesh, and the probe files they are in.

    A planted bug names the mesh on which it shows; its twin is right there, and on fewer ranks of an axis.
    """
    files: dict[Path, None] = {}
    operators: dict[str, None] = {}
    for file, mutants in catalogue.load().items():
        for mutant in mutants:
            if _within(mesh, mutant.mesh):
                files[file] = None
                operators[mutant.twin.name] = None
    if _within(mesh, "2"):
        planted = HERE / "planted_probe.py"
        files[planted] = None
        for name, rules in _expected(planted).items():
            # Those with dropout are right forward alone: their backward knows no mask.
            if not rules and not name.startswith("dropout"):
                operators[f"planted.{name}"] = None
    return tuple(files), tuple(operators)


def _within(mesh: str, named: str) -> bool:
    """Whether what is right on the mesh `named` is right on `mesh`, by the sizes that it divides: the same
    mesh, one axis that is no longer than its longest, or all of its ranks on one axis."""
    mine, other = ([int(n) for n in text.split("x")] for text in (mesh, named))
    if mine == other or len(mine) > 1:
        return mine == other
    return mine[0] <= max(other) or mine[0] == math.prod(other)


def _expected(file: Path) -> Mapping[str, set[str]]:
    probe = plugins.load_probe_file(file)
    module = sys.modules[probe.operators[0].tensors.__module__]
    expected: Mapping[str, set[str]] = module.EXPECTED
    return expected


# --- scanning --------------------------------------------------------------------------------------


def run(part: Part, work: Path, resume: bool, log: Callable[[str], None]) -> Path:
    """Scan a part and keep what its report says, in `work`. Raises RuntimeError where the scan fails."""
    kept = work / f"{part.key}.json"
    if resume and kept.exists():
        log(f"{part.key}: kept from before")
        return kept
    work.mkdir(parents=True, exist_ok=True)
    output = work / f"report-of-{part.name}-on-{part.mesh}.json"  # gone once it is summarized
    began = time.monotonic()
    # Away from any pyproject.toml, whose options are not part of the measurement.
    done = subprocess.run(
        command(part, output),
        cwd=work,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode not in (0, 1, 3) or not output.exists():
        raise RuntimeError(f"the scan {part.key} failed: {done.stderr.strip()[-2000:]}")
    report = json.loads(output.read_text(encoding="utf-8"))
    summary = summarize(part, report, time.monotonic() - began)
    kept.write_text(json.dumps(summary), encoding="utf-8")
    output.unlink()
    counts = ", ".join(f"{n} {status}" for status, n in summary["statuses"].items())
    log(f"{part.key}: {part.repeats} seeds, {counts} in {summary['seconds']:.0f} s")
    return kept


def command(part: Part, output: Path) -> list[str]:
    out = [
        sys.executable, "-m", "attncheck", "scan", "--mesh", part.mesh, "--seed", str(part.first),
        "--repeats", str(part.repeats), "--case-timeout", "600", "--fail-on", "never", "-q",
        "--output", f"json:{output}", *part.options,
    ]  # fmt: skip
    for file in part.files:
        out += ["--probe", str(file)]
    for operator in part.operators:
        out += ["--operator", operator]
    return out


def summarize(part: Part, report: Report, seconds: float) -> dict[str, Any]:
    """What counts of a report: statuses, alarms with what was said, and every ratio."""
    cases = report["cases"]
    ranks = math.prod(int(n) for n in part.mesh.split("x"))
    return {
        "part": part.name,
        "mesh": part.mesh,
        "ranks": ranks,
        "repeats": part.repeats,
        "first_seed": part.first,
        "seconds": round(seconds, 1),
        "operators": len({case["operator"] for case in cases}),
        "statuses": dict(Counter(case["outcome"]["status"] for case in cases)),
        "findings": dict(Counter(finding["rule"] for finding in report["findings"])),
        "alarms": [
            {
                "case": case["id"],
                "status": case["outcome"]["status"],
                "message": case["outcome"].get("message", "")[:500],
            }
            for case in cases
            if is_alarm(case["outcome"]["status"])
        ],
        "drifts": [case["id"] for case in cases if case["outcome"]["status"] == "drift"],
        "ratios": [row for case in cases for row in _ratios(case)],
        "standins": sorted({s for case in cases for s in case["outcome"].get("standins", ())}),
    }


def is_true(alarm: Mapping[str, str]) -> bool:
    """DTensor itself refuses the case, and says so: `error` is then the right verdict.

    On a mesh of two axes alone. One axis is served there, and a scan has no way to leave single placements
    of a setting out.
    """
    two_axes = "x" in alarm["case"].split("/")[4]
    text = alarm["message"].removeprefix("on the second call: ")
    return two_axes and alarm["status"] == "error" and text.startswith(REFUSALS)


def is_alarm(status: str) -> bool:
    """Above drift, or no verdict at all."""
    return status not in QUIET


def _ratios(case: Mapping[str, Any]) -> Iterator[list[Any]]:
    """[dtype, placement, id, tensor, median over seeds, largest, largest over the unsharded error]."""
    outcome = case["outcome"]
    for name, error in outcome.get("errors", {}).items():
        spread = outcome.get("spread", {}).get(name)
        largest = spread["ratio_max"] if spread else error["ratio"]
        median = spread["ratio_median"] if spread else error["ratio"]
        if not math.isfinite(largest):
            continue
        # The log-sum-exp is float32 whatever the dtype of q.
        dtype = "float32" if name == "lse" else case["setting"]["dtype"]
        own = error["unsharded_max"]
        over_own = error["max"] / own if own else 0.0
        yield [dtype, case["placement"], case["id"], name, median, largest, over_own]


# --- counting --------------------------------------------------------------------------------------


def merge(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that is published, of all parts."""
    rows = [(s["ranks"], *row) for s in summaries for row in s["ratios"]]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "attncheck": version("attncheck"),
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "minutes": round(sum(s["seconds"] for s in summaries) / 60, 1),
        "parts": [
            _published(s)
            for s in sorted(summaries, key=lambda s: (PARTS.index(s["part"]), s["mesh"]))
        ],
        "standins": sorted({name for s in summaries for name in s["standins"]}),
        "by_dtype_and_ranks": [
            {"dtype": dtype, "ranks": ranks, **distribution(chosen)}
            for dtype in DTYPES
            for ranks in sorted({s["ranks"] for s in summaries})
            if (chosen := [r for r in rows if r[0] == ranks and r[1] == dtype])
        ],
        "by_placement": [
            {"placement": placement, **distribution(chosen)}
            for placement in sorted({r[2] for r in rows})
            if (chosen := [r for r in rows if r[2] == placement])
        ],
        "histogram": {dtype: histogram([r[6] for r in rows if r[1] == dtype]) for dtype in DTYPES},
        "largest": [
            {"case": r[3], "tensor": r[4], "ratio": r[6]}
            for r in sorted(rows, key=lambda r: -r[6])[:WORST]
        ],
    }


def _published(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A part without its ratios, and without the alarms that are none."""
    out = {k: v for k, v in summary.items() if k not in ("ratios", "standins")}
    out["tensors"] = len(summary["ratios"])
    out["refused"] = [a["case"] for a in summary["alarms"] if is_true(a)]
    out["alarms"] = [a for a in summary["alarms"] if not is_true(a)]
    out["statuses"] = dict(summary["statuses"])
    if out["refused"]:
        out["statuses"]["error"] -= len(out["refused"])
    return out


def distribution(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Quantiles over (case, tensor): of the largest ratio over all seeds, and of the median one."""
    return {
        "tensors": len(rows),
        "largest": [quantile([r[6] for r in rows], q) for q in QUANTILES],
        "median": [quantile([r[5] for r in rows], q) for q in QUANTILES],
        "over_unsharded": [quantile([r[7] for r in rows], q) for q in QUANTILES],
    }


def quantile(values: Iterable[float], q: float) -> float:
    """The smallest value that at least the share `q` of them does not exceed."""
    ordered = sorted(values)
    return round(ordered[max(math.ceil(q * len(ordered)) - 1, 0)], 4)


def histogram(ratios: Sequence[float]) -> list[int]:
    """How many in each of `BINS` bins from 0 to 1, and above."""
    counts = [0] * (BINS + 1)
    for ratio in ratios:
        counts[min(int(ratio * BINS), BINS)] += 1
    return counts


# --- telling ---------------------------------------------------------------------------------------


def summary_table(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| what | mesh | operators | cases | values each | above drift | drift | unknown | refused |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    total = Counter[str]()
    for (name, mesh), chunks in _by_part_and_mesh(found).items():
        counts = _total(chunks)
        total.update(counts)
        repeats = sum(chunk["repeats"] for chunk in chunks)
        yield (
            f"| {_WHAT[name]} | {mesh} | {chunks[0]['operators']} | {_cases(chunks)} | {repeats} | "
            f"{counts['above']} | {counts['drift']} | {counts['unknown']} | {counts['refused']} |"
        )
    yield (
        f"| all | | | | {total['judgements']} in all | {total['above']} | {total['drift']} | "
        f"{total['unknown']} | {total['refused']} |"
    )


def _by_part_and_mesh(found: Mapping[str, Any]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The chunks of seeds of each part on each mesh."""
    out: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for part in found["parts"]:
        out.setdefault((part["part"], part["mesh"]), []).append(part)
    return out


def _cases(chunks: Sequence[Mapping[str, Any]]) -> int:
    return sum(chunks[0]["statuses"].values())


_WHAT = {
    "deep": "verified operators",
    "deep_forward": "verified operators, forward alone",
    "wide": "all their settings and placements",
    "twins": "healthy twins of planted bugs",
}


def _total(parts: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Cases by what was said of them, and how many sets of values were judged."""
    out = Counter[str]()
    for part in parts:
        statuses = part["statuses"]
        not_judged = sum(statuses.get(s, 0) for s in ("unknown", "unavailable"))
        out["above"] += sum(n for s, n in statuses.items() if is_alarm(s)) - not_judged
        out["drift"] += statuses.get("drift", 0)
        out["unknown"] += not_judged
        out["refused"] += len(part["refused"])
        out["judgements"] += sum(statuses.values()) * part["repeats"]
    return out


def ratio_table(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| dtype | ranks | tensors | 50 % | 90 % | 99 % | 99.9 % | largest |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in found["by_dtype_and_ranks"]:
        cells = " | ".join(f"{value:.2f}" for value in row["largest"])
        yield f"| {row['dtype']} | {row['ranks']} | {row['tensors']} | {cells} |"


def bars(found: Mapping[str, Any]) -> Iterator[str]:
    """The histogram: a row a bin, a column a dtype, one # for each 1 %, + for less."""
    yield "```text"
    yield "max / bound   " + "".join(f"{dtype:<44}" for dtype in DTYPES).rstrip()
    for at in range(BINS + 1):
        name = f"{at / BINS:.2f}-{(at + 1) / BINS:.2f}" if at < BINS else "beyond   "
        cells = []
        for dtype in DTYPES:
            counts = found["histogram"][dtype]
            share = 100 * counts[at] / max(sum(counts), 1)
            bar = "#" * min(round(share), 34) or ("+" if counts[at] else "")
            cells.append(f"{bar:<35}{counts[at] or '':<9}")
        yield f"{name:<14}" + "".join(cells).rstrip()
    yield "```"


def markdown(found: Mapping[str, Any]) -> str:
    seen = found["versions"]
    alarms = [alarm for part in found["parts"] for alarm in part["alarms"]]
    sections = [
        "# False alarms",
        "What is known to be right, scanned for real (see tests/oracle/false_alarms.py): built-in operators "
        "with sharding strategies that were written by hand and verified without DTensor, or in settings in "
        "which PyTorch's own are right, and the healthy twins of all planted bugs.",
        headline(found),
        "\n".join(summary_table(found)),
        "A case with several sets of values has the worst status of them all. `unknown` counts what could "
        "not be judged or did not run, too. `refused` are cases on two mesh axes in which DTensor itself "
        "says that it cannot split or merge a dim sharded so: `error` is the right verdict there, and they "
        "count nowhere else.",
        *(
            [
                "## Alarms",
                "\n".join(f"- {a['status']} `{a['case']}`: {_one_line(a)}" for a in alarms),
            ]
            if alarms
            else []
        ),
        "## Largest error over its bound",
        "Over all seeds of a case, for each of its results and gradients. Above 1 is `drift`, above 16 is "
        "`wrong`; where both bounds come from is in attncheck/runner/drift.py.",
        "\n".join(ratio_table(found)),
        "\n".join(bars(found)),
        "By placement (largest over seeds; error over that of the unsharded operator):",
        "\n".join(_placement_table(found)),
        "The largest:",
        "\n".join(
            f"- {x['ratio']:.3f} {x['tensor']} of `{x['case']}`" for x in found["largest"][:10]
        ),
        f"Measured on {found['date']} with attncheck {seen['attncheck']}, torch {seen['torch']} and Python "
        f"{seen['python']}, on CPUs with gloo, in {found['minutes']:.0f} minutes. Stand-in kernels: "
        + "; ".join(found["standins"])
        + ".",
    ]
    return "\n\n".join(sections) + "\n"


def _one_line(alarm: Mapping[str, str]) -> str:
    return " ".join(alarm["message"].split())


def _placement_table(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| placement | tensors | 50 % | 99 % | largest | 99 % over unsharded | largest |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in found["by_placement"]:
        ratios, own = row["largest"], row["over_unsharded"]
        yield (
            f"| {row['placement']} | {row['tensors']} | {ratios[0]:.2f} | {ratios[2]:.2f} | "
            f"{ratios[4]:.2f} | {own[2]:.2f} | {own[4]:.2f} |"
        )


def headline(found: Mapping[str, Any]) -> str:
    counts = _total(found["parts"])
    groups = _by_part_and_mesh(found).values()
    seeds = max((sum(chunk["repeats"] for chunk in chunks) for chunks in groups), default=0)
    largest = max((row["largest"][-1] for row in found["by_dtype_and_ranks"]), default=0.0)
    return (
        f"{sum(map(_cases, groups))} cases on healthy operators, with up to {seeds} sets of values each: "
        f"{counts['judgements']} judgements in {found['minutes']:.0f} minutes, of which {counts['above']} "
        f"are above `drift`, {counts['drift']} `drift` and {counts['unknown']} `unknown`. The largest error "
        f"is {largest:.2f} of its bound. {counts['refused']} more cases DTensor itself refuses in words."
    )


def write(found: Mapping[str, Any]) -> None:
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (PUBLISHED / "false-alarms.json").write_text(text, encoding="utf-8")
    (PUBLISHED / "false-alarms.md").write_text(markdown(found), encoding="utf-8")
    if not write_block(README, f"{headline(found)}\n\n" + "\n".join(ratio_table(found))):
        print(f"{README} has no {BEGIN} ... {END}; not changed.", file=sys.stderr)


def write_block(file: Path, block: str) -> bool:
    """Put `block` between the markers of the file; False where it has none."""
    text = file.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        return False
    replacement = f"{BEGIN}\n{block}\n{END}"
    file.write_text(pattern.sub(lambda _: replacement, text), encoding="utf-8")
    return True


def exit_code(found: Mapping[str, Any]) -> int:
    alarms = any(part["alarms"] for part in found["parts"])
    return int(alarms or not found["by_dtype_and_ranks"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=50, metavar="N", help="sets of values (50)")
    parser.add_argument("--mesh", action="append", help=f"of {', '.join(MESHES)} (all)")
    parser.add_argument("--part", action="append", choices=PARTS, help="(all)")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"seeds of one scan ({CHUNK})")
    parser.add_argument("--work", type=Path, help="folder for what each part gave (a fresh one)")
    parser.add_argument("--resume", action="store_true", help="keep the parts that --work has")
    parser.add_argument(
        "--merge-only", action="store_true", help="scan nothing; merge what --work has"
    )
    parser.add_argument("--write", action="store_true", help="publish; regenerate README's block")
    given = parser.parse_args(arguments)
    if given.seeds < 1 or given.chunk < 1:
        parser.error("--seeds and --chunk: at least 1")
    work = given.work or Path(tempfile.mkdtemp(prefix="false-alarms-"))

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if given.merge_only:
        kept = sorted(work.glob("*+*.json"))
    else:
        wanted = parts(given.seeds, given.mesh or MESHES, given.part or PARTS, given.chunk)
        kept = [run(part, work.resolve(), given.resume, log) for part in wanted]
    found = merge([json.loads(file.read_text(encoding="utf-8")) for file in kept])
    print(markdown(found))
    if given.write:
        write(found)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
