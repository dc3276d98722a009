"""Runs the reproductions in this folder and writes what they print into their reports.

    python render.py [slug ...]     run them, record the outcome in seen.json, rewrite <slug>.md and README.md
    python render.py --index        only rewrite the scripts' text in the reports, and README.md

The interpreter that runs this file runs the scripts: `path/to/newer/venv/bin/python render.py` says which
bugs a newer torch still has. Output is written into a report only under the torch version that it says
it is about; under any other, only seen.json and README.md change. Needs no attncheck.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEN = HERE / "seen.json"
# The order of the index: the worst first.
SEVERITIES = ("silent wrong numbers", "hang or divergence", "crash", "error", "missing", "cost")
PACKAGES = {"flash-attn": "flash_attn"}  # that a script may need beside torch, and its module
MEANING = {0: "gone", 1: "seen"}  # what an exit code says
BROKEN = -1  # it says nothing: the script did not come to its last line


def slugs() -> list[str]:
    """The reports, in the order of the index."""
    found = [path.stem for path in HERE.glob("*.py") if path.name != Path(__file__).name]
    return sorted(found, key=lambda slug: (SEVERITIES.index(facts(slug)["severity"]), slug))


def write(path: Path, text: str) -> None:
    """In one piece: renders under several versions may run side by side."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def script(slug: str) -> str:
    return (HERE / f"{slug}.py").read_text(encoding="utf-8")


def report(slug: str) -> str:
    return (HERE / f"{slug}.md").read_text(encoding="utf-8")


def facts(slug: str) -> dict[str, str]:
    """The table at the head of a report: op, severity, report about, found by, public threads."""
    rows = re.findall(r"^\| ([a-z ]+) \| (.+) \|$", report(slug), re.MULTILINE)
    return dict(rows)


def base(slug: str) -> str:
    """The torch version that a report is about."""
    return facts(slug)["report about"].rpartition("torch ")[2]


def title(slug: str) -> str:
    return report(slug).splitlines()[0].removeprefix("# ")


def needs(slug: str) -> list[str]:
    """Packages beside torch that a script imports."""
    return [name for name, module in PACKAGES.items() if f"\nimport {module}" in script(slug)]


def command(slug: str) -> list[str]:
    """As the script's docstring says it, without the interpreter: `torchrun ...` or `python ...`."""
    found = re.search(
        rf"^    ((?:torchrun|python) .*{re.escape(slug)}\.py)$", script(slug), re.MULTILINE
    )
    assert found, f"{slug}.py does not say how it is run"
    return found[1].split()


def run(slug: str, timeout: float = 600) -> tuple[int, str]:
    """(exit code, stdout) of a script under this interpreter.

    Python exits with 1 for any exception, so an exit code counts only after the line that goes with it;
    without it the code is BROKEN.
    """
    program, *arguments = command(slug)
    module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONHASHSEED", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *module, *arguments],
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        check=False,
    )
    said = done.stdout.strip().rpartition("\n")[2]
    told = (done.returncode, said) in ((1, "BUG"), (0, "ok"))
    return done.returncode if told else BROKEN, done.stdout


def environment(slug: str) -> str:
    lines = [
        f"torch   {importlib.metadata.version('torch')}",
        f"Python  {platform.python_version()}",
        f"OS      {platform.system()} {platform.machine()}, glibc {platform.libc_ver()[1]}",
        "device  CPU only, gloo",
    ]
    lines += [f"{name}  {importlib.metadata.version(name)}" for name in needs(slug)]
    return "\n".join(lines)


def filled(text: str, block: str, language: str, content: str) -> str:
    """`text` with the content of one marked block replaced."""
    start, end = f"<!-- {block} -->\n", f"<!-- end of {block} -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}```{language}\n{content.rstrip()}\n```\n{end}{after}"


def content(slug: str, block: str) -> str:
    """What stands in a marked block of a report."""
    found = re.search(
        rf"<!-- {block} -->\n```\w*\n(.*?)\n?```\n<!-- end of {block} -->", report(slug), re.DOTALL
    )
    assert found, f"{slug}.md has no block {block}"
    return found[1]


def masked(output: str) -> str:
    """The output without its numbers, which differ from run to run and machine to machine."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", output).strip()


def index(seen: dict[str, dict[str, int]]) -> str:
    """README.md: one row for each report."""
    rows = [
        "| bug | op | severity | seen on | not seen on | found by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for slug in slugs():
        codes = seen.get(slug, {})
        versions = sorted(codes, key=lambda version: [int(part) for part in version.split(".")])
        by = {what: [v for v in versions if codes[v] == code] for code, what in MEANING.items()}
        rows.append(
            f"| [{title(slug)}]({slug}.md) | {facts(slug)['op']} | {facts(slug)['severity']} | "
            f"{', '.join(by['seen']) or '-'} | {', '.join(by['gone']) or '-'} | "
            f"{facts(slug)['found by'].split(':')[0]} |"
        )
    return "\n".join(rows)


def write_index(seen: dict[str, dict[str, int]]) -> None:
    readme = HERE / "README.md"
    start, end = "<!-- index -->\n", "<!-- end of index -->"
    before, rest = readme.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    write(readme, f"{before}{start}{index(seen)}\n{end}{after}")


def recorded() -> dict[str, dict[str, int]]:
    """slug -> torch version -> exit code."""
    text = SEEN.read_text(encoding="utf-8") if SEEN.is_file() else "{}"
    found: dict[str, dict[str, int]] = json.loads(text)
    return found


def main(arguments: Iterable[str]) -> None:
    asked = list(arguments)
    for slug in slugs():
        text = filled(report(slug), "script", "python", script(slug))
        text = filled(text, "command", "shell", " ".join(command(slug)))
        write(HERE / f"{slug}.md", text)
    if asked != ["--index"]:
        version = importlib.metadata.version("torch").split("+")[0]
        for slug in asked or slugs():
            code, output = run(slug)
            if code == BROKEN:
                print(
                    f"{slug}: could not tell, nothing is recorded",
                    *output.splitlines()[-3:],
                    sep="\n  ",
                )
                continue
            print(f"{slug}: exit code {code}, {MEANING[code]}", flush=True)
            seen = recorded()
            seen.setdefault(slug, {})[version] = code
            write(SEEN, json.dumps(seen, indent=1, sort_keys=True) + "\n")
            if version == base(slug):
                text = filled(report(slug), "environment", "text", environment(slug))
                text = filled(text, "output", "text", output)
                write(HERE / f"{slug}.md", text)
    write_index(recorded())


if __name__ == "__main__":
    main(sys.argv[1:])
