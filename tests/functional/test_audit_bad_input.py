"""What is wrong with a user's code or command line: one sentence, with the line of it; nothing is written.

The command itself is run where that shows something; what a pass says of user code is asked of the pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch_here import before

from attncheck.audit import auditing
from attncheck.errors import UserError

Answer = subprocess.CompletedProcess[str]

# A model on which there is nothing to find.
GOOD = """
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def build(mesh):
    return Model()

def inputs(mesh):
    return (torch.randn(2, 8),)
"""
# Users' files: what is wrong with each is in its last lines.
BUILD = "\ndef build(mesh):\n    {}\n"
INPUTS = "\ndef inputs(mesh):\n    {}\n"
FILES = {
    "good": GOOD,
    "raises": GOOD + BUILD.format("raise ValueError('40 layers, please')"),
    "returns": GOOD + BUILD.format("return {'model': Model()}"),
    "exits": GOOD + BUILD.format("raise SystemExit('no GPU here')"),
    "ends": GOOD + BUILD.format("import os; os._exit(7)"),
    "numpy_table": GOOD
    + BUILD.format("import numpy; table = numpy.ones(5 * 2**27); return Model()"),
    "import_table": GOOD + "\nimport numpy\nTABLE = numpy.ones(5 * 2**27)\n",
    "real_weights": GOOD
    + "\nTABLE = torch.zeros(2**25)\n"
    + BUILD.format("m = Model(); m.register_buffer('table', TABLE); return m"),
    "gpu": GOOD + "\nscale = torch.zeros(1, device='cuda')\n",
    "network": GOOD
    + BUILD.format("import urllib.request; urllib.request.urlopen('http://huggingface.co/wan')"),
    "plan": GOOD
    + BUILD.format(
        "return parallelize_module(Model(), mesh, {'layers.0': ColwiseParallel(), "
        "'layerz.1': ColwiseParallel()})"
    ),
    "syntax": GOOD + "\ndef build(mesh)\n    return Model()\n",
    "dependency": "import torch\nimport a_package_that_is_not_there\n" + GOOD,
    "words": GOOD + INPUTS.format("return 'x'"),
    "no_tensors": GOOD + INPUTS.format("return (1, 2)"),
    "no_inputs": GOOD.partition("def inputs")[0],
    "inputs_raise": GOOD + INPUTS.format("return (torch.randn(2, 8) @ torch.randn(3, 8),)"),
    "sleeps": GOOD + BUILD.format("import time; time.sleep(600)"),
}


def line(name: str, text: str) -> str:
    """`file.py:12` of the last line that says so."""
    numbers = [at for at, own in enumerate(FILES[name].splitlines(), 1) if text in own]
    return f"{name}.py:{numbers[-1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("users")
    for name, text in FILES.items():
        (made / f"{name}.py").write_text(text)
    (made / "broken_fix.py").write_text("raise RuntimeError('no such op')\n")
    return made


def audit(folder: Path, *arguments: str) -> Answer:
    return subprocess.run(
        [sys.executable, "-m", "attncheck", "audit", *arguments, "-o", "json:report.json"],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def sentence(answer: Answer, folder: Path) -> str:
    """What was said, without what is said of each audit as it goes."""
    assert answer.returncode == 2, answer.stderr
    assert answer.stdout == ""
    assert not (folder / "report.json").exists()
    lines = [
        text.removeprefix("attncheck: ")
        for text in answer.stderr.splitlines()
        if not text.startswith(("attncheck: running the code of", "attncheck: provision"))
    ]
    assert len(lines) == 1, answer.stderr
    (said,) = lines
    assert said.endswith((".", "?"))
    assert not said.endswith("..")
    assert "Traceback" not in said
    assert len(said) < 400
    return said


# --- the user's code -----------------------------------------------------------------------------

# What is said of each file, in parts.
CODE: dict[str, tuple[str, ...]] = {
    "returns": ("returns.py:build returned a dict: expected an nn.Module, already parallelised.",),
    "exits": (
        f"exits.py:build raised SystemExit at {line('exits', 'raise SystemExit')}: no GPU here.",
    ),
    "numpy_table": (
        f"numpy_table.py:build raised MemoryError at {line('numpy_table', 'numpy.ones')}: ",
        "Unable to allocate 5.00 GiB",
        "it takes real memory, over 4 GiB: make tensors with torch functions, in build.",
    ),
    "import_table": (
        f"import_table.py does not import: MemoryError at {line('import_table', 'TABLE =')}: ",
        "it takes real memory, over 4 GiB",
    ),
    "real_weights": (
        "real_weights.py:build: table",
        "hold real memory, 128 MiB: they were made at import, from numpy or from a file; ",
        "make them in build, with torch.",
    ),
    "gpu": (
        # A build with CUDA says something else than one without.
        f" at {line('gpu', 'scale = ')}: ",
        "; an audit has no GPU: make tensors on ",
    ),
    "network": (
        f"network.py:build raised NetworkAsked at {line('network', 'urlopen')}: ",
        "it goes to the network (huggingface.co); an audit needs no weights, make the model from",
    ),
    "plan": (
        "plan.py:build: the plan names 'layerz.1', and the model has no such module; its modules ",
        "are layers.1, layers.0",
    ),
    "syntax": ("syntax.py does not import: SyntaxError", "expected ':'"),
    "dependency": (
        f"dependency.py does not import: ModuleNotFoundError at {line('dependency', 'a_package')}: ",
        "No module named 'a_package_that_is_not_there'.",
    ),
    "words": (
        "words.py:inputs returned a str: expected a tensor, a tuple of the model's arguments or a ",
        "dict of them by name.",
    ),
    "no_tensors": (
        "no_tensors.py:inputs returned no tensor: expected what the model is called with.",
    ),
    "no_inputs": ("Unknown function in no_inputs.py 'inputs'. Expected one of: Model, build.",),
    "inputs_raise": (
        f"inputs_raise.py:inputs raised RuntimeError at {line('inputs_raise', '@ torch.randn')}: ",
    ),
}


@pytest.fixture(scope="module")
def sentences(folder: Path) -> dict[str, str]:
    script = Path(__file__).with_name("audit_passes.py")
    done = subprocess.run(
        [sys.executable, str(script), "good", *CODE],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_model_that_is_well_made(sentences: dict[str, str]) -> None:
    assert sentences["good"] == ""


@pytest.mark.parametrize("name", CODE)
def test_what_is_wrong_with_the_users_code(name: str, sentences: dict[str, str]) -> None:
    if name == "plan" and before("2.9.1"):
        pytest.skip("torch 2.6 says nothing of a plan that names what is not there")
    said = sentences[name]
    for part in CODE[name]:
        assert part in said
    assert said.endswith(".")
    assert not said.endswith("..")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "raises.py:build",
            f"raises.py:build raised ValueError at {line('raises', 'raise ValueError')}: ",
        ),
        (
            "ends.py:build",
            "ends.py:build ended the process that ran it on fake tensors: exit code 7.",
        ),
        (
            "good.py:bild",
            "Unknown function in good.py 'bild'. Expected one of: Model, build, inputs.",
        ),
        (
            "a_package.wan:build",
            "there is no module 'a_package' here or among the installed packages.",
        ),
        (
            "good.py:build --fix broken_fix.py",
            "broken_fix.py does not load: RuntimeError: no such op",
        ),
    ],
)
def test_what_the_command_says_of_it(arguments: str, said: str, folder: Path) -> None:
    answer = audit(folder, *arguments.split(), "--mesh", "tp=2")
    assert sentence(answer, folder).startswith(
        ("raises", "ends", "Unknown", "the build", "Fix file")
    )
    assert said in sentence(answer, folder)


def test_a_build_that_never_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, and with it the process of the other rank."""
    monkeypatch.chdir(folder)
    request = auditing.AuditRequest("sleeps.py:build", {"tp": 2}, timeout=2)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"^sleeps\.py:build did not come to an end .* within 2 s\.$"
    ):
        auditing.audit(request, lambda text: None, lambda done, total, case: None)
    assert time.monotonic() - began < 30
    assert not [
        file.parent.name
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if b"attncheck.audit.fakepass" in _read(file) and _parent(file.parent) == os.getpid()
    ]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended
        return b""


def _parent(process: Path) -> int:
    words = _read(process / "stat").rpartition(b")")[2].split()
    return int(words[1]) if words else 0


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "An audit takes one build function, package.module:function; found none."),
        ("good.py:build other.py:build --mesh tp=2", "found 2."),
        ("good.py:build", "An audit needs the model's mesh, e.g. --mesh tp=8."),
        ("good.py:build --mesh tp=1", "An audit needs a mesh of at least 2 ranks"),
        ("good.py:build --mesh tp", "Mesh 'tp' is not a mesh: expected sizes like 2x2 or named axes"),
        ("good.py:build --mesh tp=0", "every axis needs at least 1 rank."),
        ("good.py:build --mesh tp=2,tp=2", "Mesh 'tp=2,tp=2' names an axis twice."),
        ("good.py --mesh tp=2", "names no function: expected package.module:function or file.py:function."),
        ("gone.py:build --mesh tp=2", "'gone.py:build': the file gone.py does not exist."),
        ("good.py:build --mesh tp=2 --inputs good.py", "--inputs 'good.py' names no function"),
        ("good.py:build --mesh tp=2 --device gpu", "Unknown device 'gpu'. Expected one of: cpu, cuda."),
        ("good.py:build --mesh tp=2 -o excel", "Unknown"),
        ("good.py:build --mesh tp=2 -o json:gone/x.json", "Cannot write gone/x.json: the folder gone does"),
        ("good.py:build --mesh tp=2 --fail-on fatal", "Unknown severity 'fatal'."),
        ("good.py:build --mesh tp=2 --select ATN9", "ATN9"),
        ("good.py:build --mesh tp=2 --with flash", "flash"),
        ("good.py:build --mesh tp=2 --case-timeout 0", "--case-timeout is 0: expected a number of"),
        ("--model wan2.1-t2v-41b --tp 8", "Did you mean wan2.1-t2v-14b"),
        ("--model wan2.1-t2v-14b", "--model needs a degree of more than 1 rank, e.g. --tp 8."),
        ("--model wan2.1-t2v-14b --tp 0", "--tp is 0: expected at least 1 rank."),
        ("--model wan2.1-t2v-14b --tp 1", "--model needs a degree of more than 1 rank, e.g. --tp 8."),
        ("--model wan2.1-t2v-14b --tp 8 -k sdpaa", "Unknown operator 'sdpaa'."),
        ("good.py:build --model wan2.1-t2v-14b --tp 8", "--model wan2.1-t2v-14b takes no build function"),
        ("--script gone.py", "--script gone.py does not exist; expected a Python file."),
        ("--script good.py --steps 0", "--steps is 0: expected at least 1."),
    ],
)  # fmt: skip
def test_a_command_line(arguments: str, said: str, folder: Path) -> None:
    assert said in sentence(audit(folder, *arguments.split()), folder)
