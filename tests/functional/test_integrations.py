"""Where attncheck is run: the GitHub action, the hooks of pre-commit, and the jobs that the README shows.

Each is valid by its public schema, and its scripts are executed as the runner would, on saved reports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sample_report
import yaml

from attncheck import baseline, compare
from attncheck.model import Report, Status, dump_report

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SCRIPTS = Path(sys.executable).parent


def action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return found


def step(name: str) -> dict[str, Any]:
    return next(one for one in action()["runs"]["steps"] if one["name"] == name)


def check(schema: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [SCRIPTS / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", file]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def project(folder: Path, report: Report) -> Path:
    """A project with a saved report and a baseline in which all of the sample is known."""
    (folder / "after.json").write_text(dump_report(report))
    known = baseline.Baseline(compare.recall(ran(sample_report.sample())))
    (folder / baseline.DEFAULT_FILE).write_text(baseline.dump(known))
    (folder / "requirements.txt").write_text("torch==2.13.0\nflash-attn==2.8.3\n")
    return folder


def ran(report: Report) -> Report:
    """Without the cases whose check failed: no gate passes with them."""
    return replace(
        report,
        cases=tuple(r for r in report.cases if r.outcome.status is not Status.UNKNOWN),
    )


def worse() -> Report:
    """Cases that worked are refused now."""
    report = ran(sample_report.sample())
    finding = report.findings[0]
    broken = [r for r in report.cases if r.outcome.status is Status.SUPPORTED][:3]
    refused = next(r.outcome for r in report.cases if r.case.id == finding.cases[0])
    ids = {r.case.id for r in broken}
    cases = tuple(replace(r, outcome=refused) if r.case.id in ids else r for r in report.cases)
    more = replace(finding, cases=(*finding.cases, *ids))
    return replace(report, cases=cases, findings=(more, *report.findings[1:]))


# --- the action ----------------------------------------------------------------------------------


def test_the_action_is_valid(tmp_path: Path) -> None:
    assert check("github-actions", ROOT / "action.yml").returncode == 0
    spoiled = tmp_path / "action.yml"
    spoiled.write_text(
        (ROOT / "action.yml").read_text().replace("using: composite", "using: magic")
    )
    assert check("github-actions", spoiled).returncode == 1


def test_no_input_is_part_of_a_script() -> None:
    """`${{ inputs.args }}` inside of a script would be run as one."""
    for one in action()["runs"]["steps"]:
        assert "${{" not in one.get("run", ""), one["name"]
    text = (ROOT / "action.yml").read_text()
    for name in action()["inputs"]:
        assert f"inputs.{name}" in text, name


def test_actions_of_others_are_pinned() -> None:
    used = [one["uses"] for one in action()["runs"]["steps"] if "uses" in one]
    assert len(used) == 2
    for name in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name), name


def run_step(name: str, folder: Path, python: str = sys.executable, **inputs: str) -> Any:
    """A script of the action as the runner runs it. Returns the process, and the outputs by name."""
    one = step(name)
    told = dict.fromkeys(one["env"], "")
    told |= {"INPUT_PYTHON": python, "ACTION_PATH": "/action path"}
    told |= {f"INPUT_{key.upper()}": value for key, value in inputs.items()}
    assert told.keys() == one["env"].keys() | {"INPUT_PYTHON", "ACTION_PATH"}, "an unknown input"
    outputs = folder / "outputs"
    outputs.write_text("")
    temporary = folder / "runner temp"
    temporary.mkdir(exist_ok=True)
    script = folder / "step.sh"
    script.write_text(one["run"])
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
        cwd=folder,
        env={
            **os.environ,
            **told,
            "GITHUB_OUTPUT": str(outputs),
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            "RUNNER_TEMP": str(temporary),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done, dict(line.split("=", 1) for line in outputs.read_text().splitlines())


@pytest.mark.parametrize(
    ("report", "code"),
    [(lambda: ran(sample_report.sample()), 0), (worse, 1), (sample_report.sample, 3)],
    ids=["passes", "fails", "inconclusive"],
)
def test_the_action_gates(tmp_path: Path, report: Any, code: int) -> None:
    done, outputs = run_step("Gate", project(tmp_path, report()), args="--from after.json")
    assert done.returncode == code, done.stderr
    assert outputs["exit-code"] == str(code)
    compared = json.loads(Path(outputs["report"]).read_text())["comparison"]
    assert compared.get("exit_code", 0) == code
    assert json.loads(Path(outputs["sarif"]).read_text())["version"] == "2.1.0"
    assert sorted(p.name for p in Path(outputs["folder"]).iterdir()) == [
        "report.html",
        "report.json",
        "report.sarif",
    ]
    # Nothing but commands: whatever a report holds, the runner reads no other.
    lines = done.stdout.splitlines()
    assert all(re.match(r"::(error|warning|notice) ", line) for line in lines)
    assert (code == 1) == any("title=worse%3A ATN101" in line for line in lines)
    assert (tmp_path / "summary.md").read_text().startswith(f"# {compared['verdict']}\n")


def test_the_action_says_where_the_pin_is(tmp_path: Path) -> None:
    done, _ = run_step("Gate", project(tmp_path, worse()), args="--from after.json")
    assert done.stdout.startswith("::error file=requirements.txt,line=2,title=worse%3A ATN101 ")


def test_the_action_takes_options_and_a_baseline(tmp_path: Path) -> None:
    project(tmp_path, worse())
    (tmp_path / baseline.DEFAULT_FILE).rename(tmp_path / "my known.json")
    done, outputs = run_step("Gate", tmp_path, args="--from after.json")
    assert (done.returncode, outputs) == (2, {"exit-code": "2"})  # no baseline, and no report
    options = {"args": "--from after.json\n  --allow worse\n", "baseline": "my known.json"}
    done, outputs = run_step("Gate", tmp_path, **options)
    assert (done.returncode, outputs["exit-code"]) == (0, "0"), done.stderr


@pytest.fixture
def recorder(tmp_path: Path) -> str:
    """A Python that writes down its arguments."""
    file = tmp_path / "recorder"
    file.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >arguments\n')
    file.chmod(0o755)
    return str(file)


def test_nothing_in_an_input_is_run_or_expanded(tmp_path: Path, recorder: str) -> None:
    attack = "$(touch pwned) `touch pwned` ; touch pwned && * $HOME 'a b' \"c"
    run_step("Gate", tmp_path, recorder, args=attack, baseline=attack, **{"with": attack})
    assert not (tmp_path / "pwned").exists()
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:3] == ["-m", "attncheck", "gate"]
    assert arguments[arguments.index("--baseline") + 1] == attack
    assert arguments[-len(attack.split()) :] == attack.split()
    packages = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--with"]
    assert packages == attack.split()


@pytest.mark.parametrize(
    ("inputs", "requirements"),
    [
        ({}, ["/action path"]),
        ({"version": "0.1.0"}, ["attncheck==0.1.0"]),
        ({"version": "0.1.0; touch pwned"}, ["attncheck==0.1.0; touch pwned"]),
        ({"torch": "2.13.0"}, ["torch==2.13.0", "/action path"]),
        ({"torch": "2.13.0", "version": "installed"}, ["torch==2.13.0"]),
        ({"version": "installed"}, None),
    ],
)
def test_what_the_action_installs(
    tmp_path: Path, recorder: str, inputs: dict[str, str], requirements: list[str] | None
) -> None:
    done, _ = run_step("Install attncheck", tmp_path, recorder, **inputs)
    assert done.returncode == 0, done.stderr
    arguments = tmp_path / "arguments"
    if requirements is None:
        assert not arguments.exists()
    else:
        pip = ["-m", "pip", "install", "--disable-pip-version-check"]
        assert arguments.read_text().splitlines() == [*pip, *requirements]
    assert not (tmp_path / "pwned").exists()


# --- pre-commit ----------------------------------------------------------------------------------


def tool(*command: str | Path, cwd: Path, path: Path = SCRIPTS) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{path}{os.pathsep}{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "PRE_COMMIT_HOME": str(cwd.parent / "pre-commit"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "NO_COLOR": "1",
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def committed(folder: Path) -> str:
    """Everything in a folder as a repository of one commit, which is named."""
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-q", "-m", "a")):
        done = tool("git", *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return tool("git", "rev-parse", "HEAD", cwd=folder).stdout.strip()


@pytest.fixture
def hooked(tmp_path: Path) -> Path:
    """A project with our hooks."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    hooks = ".pre-commit-hooks.yaml"
    (ours / hooks).write_text((ROOT / hooks).read_text())
    config = {
        "repos": [
            {
                "repo": str(ours),
                "rev": committed(ours),
                "hooks": [{"id": "attncheck-gate"}, {"id": "attncheck-baseline"}],
            }
        ]
    }
    project(theirs, ran(sample_report.sample()))
    (theirs / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    (theirs / "train.py").write_text("")
    committed(theirs)
    return theirs


def test_the_hooks_are_valid() -> None:
    done = tool(SCRIPTS / "pre-commit", "validate-manifest", ".pre-commit-hooks.yaml", cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_baseline_hook(hooked: Path) -> None:
    run = (SCRIPTS / "pre-commit", "run", "attncheck-baseline", "--all-files")
    done = tool(*run, cwd=hooked)
    assert done.returncode == 0, done.stdout
    assert "attncheck baseline" in done.stdout
    assert "Passed" in done.stdout
    file = hooked / baseline.DEFAULT_FILE
    file.write_text(file.read_text().replace('"status": "', '"until": "soon", "status": "', 1))
    done = tool(*run, cwd=hooked)
    assert done.returncode == 1
    assert "until must be a date like 2027-01-31" in done.stdout


def test_the_gate_hook(hooked: Path, tmp_path: Path) -> None:
    """Only before a push, only for a change that can change a version, and the exit code counts."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "attncheck").write_text('#!/usr/bin/env bash\necho "ran $*"\nexit "${CODE:-1}"\n')
    (stub / "attncheck").chmod(0o755)
    gate = (SCRIPTS / "pre-commit", "run", "attncheck-gate", "--hook-stage", "pre-push")
    done = tool(*gate, "--files", "requirements.txt", cwd=hooked, path=stub)
    assert done.returncode == 1
    assert "ran gate --quiet\n" in done.stdout  # without names of files
    done = tool(*gate, "--files", "train.py", cwd=hooked, path=stub)
    assert (done.returncode, "Skipped" in done.stdout) == (0, True)
    commit = (SCRIPTS / "pre-commit", "run", "--files", "requirements.txt", "train.py")
    assert "attncheck gate" not in tool(*commit, cwd=hooked, path=stub).stdout


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pyproject.toml", True),
        ("packages/wan/uv.lock", True),
        ("requirements-cuda.txt", True),
        ("requirements/gpu.txt", True),
        ("constraints.txt", True),
        ("attncheck-baseline.json", True),
        ("src/pyproject.toml.j2", False),
        ("my_requirements.md", False),
        ("train.py", False),
    ],
)
def test_the_files_that_the_gate_hook_is_for(name: str, meant: bool) -> None:
    gate, _ = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert bool(re.search(gate["files"], name)) == meant


# --- what the README shows -----------------------------------------------------------------------


def shown(word: str) -> str:
    """The only YAML block of the README that holds a word."""
    blocks = re.findall(r"^```ya?ml\n(.*?)^```$", README.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if word in block]
    return str(block)


def test_the_workflow(tmp_path: Path) -> None:
    file = tmp_path / "workflow.yml"
    file.write_text(shown("attncheck/attncheck@"))
    done = check("github-workflows", file)
    assert done.returncode == 0, done.stdout
    (job,) = yaml.safe_load(file.read_text())["jobs"].values()
    (ours,) = [
        one for one in job["steps"] if one.get("uses", "").startswith("attncheck/attncheck@")
    ]
    assert set(ours["with"]) <= set(action()["inputs"])


def test_the_pre_commit_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(shown("- id: attncheck-gate"))
    done = tool(SCRIPTS / "pre-commit", "validate-config", file, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (repo,) = yaml.safe_load(file.read_text())["repos"]
    known = {hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    assert {hook["id"] for hook in repo["hooks"]} <= known


def test_the_gitlab_job_is_valid(tmp_path: Path) -> None:
    file = tmp_path / ".gitlab-ci.yml"
    file.write_text(shown("CI_NODE_INDEX"))
    done = check("gitlab-ci", file)
    assert done.returncode == 0, done.stdout
    spoiled = tmp_path / "spoiled.yml"
    spoiled.write_text(file.read_text().replace("needs: [", "needs: [{}, "))
    assert check("gitlab-ci", spoiled).returncode == 1


def run_job(job: dict[str, Any], cwd: Path, **variables: str) -> int:
    """The scripts of a job as GitLab's runner runs them, less what they install."""
    lines = [line for line in job["script"] if not line.startswith("pip install ")]
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", "\n".join(lines)],
        cwd=cwd,
        env={**os.environ, "PATH": path, **variables},
        check=False,
    )
    return done.returncode


@pytest.mark.slow
def test_the_gitlab_job_runs(tmp_path: Path) -> None:
    """Two shards of a small scan, joined; a baseline of it passes, and an empty one does not."""
    jobs = yaml.safe_load(shown("CI_NODE_INDEX"))
    (tmp_path / "pyproject.toml").write_text(
        '[tool.attncheck]\noperator = ["fallback.matmul", "sdpa"]\nsetting = ["causal"]\n'
        'placement = ["heads"]\n'
    )
    for index in ("1", "2"):
        scan = jobs["attncheck-scan"]
        assert run_job(scan, tmp_path, CI_NODE_INDEX=index, CI_NODE_TOTAL="2") == 0
    (tmp_path / baseline.DEFAULT_FILE).write_text(baseline.dump(baseline.Baseline({})))
    assert run_job(jobs["attncheck-gate"], tmp_path) == 1
    text = (tmp_path / "attncheck.xml").read_text()
    assert "<failure" in text
    write = [sys.executable, "-m", "attncheck", "baseline", "write", "--from", "attncheck.json"]
    subprocess.run(write, cwd=tmp_path, check=True)
    assert run_job(jobs["attncheck-gate"], tmp_path) == 0
    assert "<failure" not in (tmp_path / "attncheck.xml").read_text()
    assert (tmp_path / "attncheck.html").read_text().startswith("<!")
