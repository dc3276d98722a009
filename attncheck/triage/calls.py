"""Has an operator's call written down: by a child process that watches it, or from the probe's source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncheck.probing import Operator, Setting
from attncheck.triage.subject import Call, NotWritten
from attncheck.triage.transplant import NotTransplantable, transplant

SECONDS = 120.0
# What registers the ops of a namespace, where torch alone does not.
REGISTERING: Mapping[str, str] = {
    "flash_attn": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "torch_attn": "torch.nn.attention.varlen",
}
F = "torch.nn.functional."


@dataclass(frozen=True)
class Transcript:
    """What the child said: the call in code, and the call of the kernel op by itself, where asked for."""

    call: Mapping[str, Any] | None
    outputs: Mapping[str, str]
    float64: bool = False
    op: Mapping[str, Any] | None = None
    why: str = field(default="")


def transcribe(
    file: Path, operator: Operator, setting: Setting, op: str, path: tuple[str, ...]
) -> Transcript:
    """`file`: of the probe; `op`: a kernel op to write down by itself, or ''; `path`: to import from.

    Raises NotWritten where the operator cannot be called here.
    """
    request = {
        "probe": str(file),
        "operator": operator.name,
        "setting": setting.name,
        "float64": True,
        "op": op,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "attncheck.runner.transcribe"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment(path),
            check=False,
        )
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise NotWritten(f"calling it took longer than {SECONDS:.0f} s") from None
    except json.JSONDecodeError:
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise NotWritten(f"its call could not be watched ({words[0][:200]})") from None
    if "refused" in said:
        raise NotWritten(f"the operator cannot be called here: {said['refused']}")
    return Transcript(
        said["call"], said["outputs"], said["float64"], said.get("op"), said.get("why", "")
    )


def environment(path: tuple[str, ...]) -> dict[str, str]:
    """This process's environment, with `path` in front of where Python imports from."""
    parts = [*path, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in parts if part)}


def written(transcript: Transcript, operator: Operator, setting: Setting) -> Call:
    """The call as a person would write it, else with the probe's own code. Raises NotWritten."""
    names = [spec.name for spec in operator.tensors(setting)]
    if transcript.call is not None and all(name.isidentifier() for name in names):
        return _as_a_person(transcript.call)
    try:
        code = transplant(operator.call, setting)
    except NotTransplantable as error:
        raise NotWritten(f"its call cannot stand alone: {error}") from None
    function, _, rest = code.expression.partition("(")
    return Call(
        code.imports,
        code.definitions,
        function,
        (rest.removesuffix(")"),),
        transcript.outputs,
        by_name=False,
    )


def _as_a_person(call: Mapping[str, Any]) -> Call:
    path = str(call["path"])
    arguments = (*call["arguments"], *(f"{key}={value}" for key, value in call["keywords"].items()))
    imports: tuple[str, ...] = ()
    function = path
    if path.startswith(F):
        function = f"F.{path.removeprefix(F)}"
    elif path.startswith("torch.ops."):
        imports = registering(path.split(".")[2])
    else:
        module, _, function = path.rpartition(".")
        imports = (f"from {module} import {function}",)
    backend = call["backend"]
    context = f"sdpa_kernel(SDPBackend.{backend})" if backend else ""
    return Call(imports, (), function, arguments, call["picks"], context)


def registering(namespace: str) -> tuple[str, ...]:
    """The import, in code, that registers the ops of a namespace; none where torch alone does."""
    return (f"import {REGISTERING[namespace]}",) if namespace in REGISTERING else ()
