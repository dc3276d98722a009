"""Puts a reproduction together: one file that torchrun runs, with nothing in it but PyTorch and the operator.

It prints what it saw, and on its last line `BUG` (exit code 1) where the bug shows, `ok` (0) where it does
not. Everything in it comes from the probe's own setting, as our planner read it.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attncheck.runner.scan import FIRST_HASH_SEED
from attncheck.triage.claims import Kind
from attncheck.triage.showing import BODIES, COMPARING, FIRST, said_op, tried
from attncheck.triage.spelling import WIDTH, attend, called
from attncheck.triage.subject import NotWritten, Subject


@dataclass(frozen=True)
class Header:
    """What stands at the head of a file: what it shows, on how many ranks, and what it imports beside
    torch. `stubs`: modules that may be empty, for the call fails in front of them. `definitions`: code that
    the call needs."""

    title: str
    ranks: int
    imports: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()


def script(subject: Subject) -> str:
    """The whole file. Raises NotWritten."""
    if subject.setting.memory != "contiguous":
        raise NotWritten(f"its tensors are {subject.setting.memory} in memory")
    body = BODIES[subject.claim.kind](subject)
    if clash := sorted((_bound(body) | {"device", "dtype", "mesh", "seed"}) & subject.call.defines):
        raise NotWritten(f"its file defines {clash[0]}, as the script does")
    lines = [*_head(subject), *body, *_tail(subject)]
    call = subject.call
    imports = (*call.imports, *(f"import {module}" for module in subject.compiled))
    about = Header(subject.title, subject.ranks, imports, subject.stubs, call.definitions)
    return _file(about, lines)


def _bound(lines: Sequence[str]) -> set[str]:
    """The names that some code assigns to."""
    nodes = ast.walk(ast.parse("\n".join(lines)))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def of_an_op(about: Header, op: Mapping[str, Any], plain: Sequence[bool]) -> str:
    """A script that calls a kernel op by itself, every tensor replicated, or ordinary where `plain` says so.

    `op`: as `attncheck.runner.transcribe` gives it.
    """
    packet = str(op["op"]).removesuffix(".default")
    lines, given, at = [], [], 0
    for argument in op["arguments"]:
        if "code" in argument:
            given.append(argument["code"])
            continue
        size = ", ".join(map(str, argument["size"])) or "()"
        dtype = "" if argument["dtype"] == "torch.float32" else f", dtype={argument['dtype']}"
        made = f"torch.zeros({size}{dtype})"
        if not (at < len(plain) and plain[at]):
            # gloo sends no rng states (uint64), and here nothing need be sent.
            made = f"DTensor.from_local({made}, mesh, [Replicate()])"
        at += 1
        variable = "x" if argument["name"] == "self" else argument["name"]
        lines.append(f"{variable} = {made}")
        given.append(f"{argument['keyword']}{variable}")
    body = [
        'dist.init_process_group("gloo")',
        f'mesh = init_device_mesh("cpu", ({about.ranks},))',
        *lines,
        *tried(called(f"torch.ops.{packet}", given, "    ")),
        *said_op(str(op["op"])),
        *_end(),
    ]
    return _file(about, body)


# --- head and tail -----------------------------------------------------------------------------------


def _file(about: Header, body: Sequence[str]) -> str:
    text = "\n".join(body)
    definitions = [line for one in about.definitions for line in ("", "", *one.splitlines())]
    title = re.sub(r'["\\]', "'", " ".join(about.title.split()))
    return "\n".join(
        [
            *textwrap.wrap(f'"""{title}', WIDTH),
            "",
            f"    torchrun --nproc-per-node {about.ranks} repro.py",
            "",
            "Prints BUG and exits with 1 where the bug shows, ok and 0 where it does not.",
            '"""',
            "",
            *_import_lines(about, text),
            *definitions,
            *(["", ""] if definitions or text.startswith("\n") else [""]),
            text.strip("\n"),
            "",
        ]
    )


# The import that a name of ours needs.
_IMPORTS: Mapping[str, str] = {
    "contextlib": "import contextlib",
    "os": "import os",
    "re": "import re",
    "sys": "import sys",
    "time": "import time",
    "timedelta": "from datetime import timedelta",
    "torch": "import torch",
    "dist": "import torch.distributed as dist",
    "F": "import torch.nn.functional as F",
    "init_device_mesh": "from torch.distributed.device_mesh import init_device_mesh",
    "CommDebugMode": "from torch.distributed.tensor.debug import CommDebugMode",
    "sdpa_kernel": "from torch.nn.attention import SDPBackend, sdpa_kernel",
    "TorchDispatchMode": "from torch.utils._python_dispatch import TorchDispatchMode",
    "tree_leaves": "from torch.utils._pytree import tree_leaves",
    "compute_local_shape_and_global_offset": "from torch.distributed.tensor._utils import "
    "compute_local_shape_and_global_offset",
}
_TENSOR_NAMES = ("DTensor", "Partial", "Replicate", "Shard", "distribute_tensor")


def _import_lines(about: Header, body: str) -> list[str]:
    """Python's own, torch's, then the others: in front of these, empty modules for what is not there."""
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    lines = {line for name, line in _IMPORTS.items() if name in used} | {*about.imports}
    from_tensor = [name for name in _TENSOR_NAMES if name in used]
    lines.add(f"from torch.distributed.tensor import {', '.join(from_tensor)}")
    stubs = []
    for module in about.stubs:
        stubs += [
            f'if importlib.util.find_spec("{module}") is None:  # the call fails in front of it',
            f'    sys.modules["{module}"] = types.ModuleType("{module}")',
        ]
        lines |= {"import importlib.util", "import sys", "import types"}
    by_kind: dict[str, list[str]] = {"standard": [], "torch": [], "other": []}
    for line in sorted(lines, key=lambda line: (line.startswith("from "), line)):
        top = line.split()[1].partition(".")[0]
        kind = "standard" if top in sys.stdlib_module_names else "other"
        by_kind["torch" if top == "torch" else kind].append(line)
    others = [*stubs, *by_kind["other"]]
    return [*by_kind["standard"], "", *by_kind["torch"], *([""] if others else []), *others]


def _head(subject: Subject) -> list[str]:
    lines = []
    if subject.claim.kind is Kind.DIVERGES:
        lines += [
            "# Python draws a hash seed for every process: here each rank has its own, and always the same.",
            f'seed = str({FIRST_HASH_SEED} + int(os.environ["RANK"]))',
            'if os.environ.get("PYTHONHASHSEED") != seed:',
            '    os.environ["PYTHONHASHSEED"] = seed',
            "    os.execv(sys.executable, [sys.executable, *sys.argv])",
            "",
        ]
    if subject.claim.kind in COMPARING:
        lines += ["", "", *attend(subject), "", ""]
    sizes = ", ".join(map(str, subject.case.mesh.values()))
    mesh = f"({sizes},)" if len(subject.case.mesh) == 1 else f"({sizes})"
    limit = ", timeout=timedelta(seconds=30)" if subject.claim.kind is Kind.DIVERGES else ""
    if subject.own_device:
        lines += [
            'device = "cuda" if torch.cuda.is_available() else "cpu"',
            'dtype = torch.bfloat16 if device == "cuda" else torch.float32',
            'if device == "cuda":',
            '    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))',
            "torch.set_default_device(device)",
            f'dist.init_process_group("nccl" if device == "cuda" else "gloo"{limit})',
            f"mesh = init_device_mesh(device, {mesh})",
        ]
    else:
        lines += [
            f'dist.init_process_group("gloo"{limit})',
            f'mesh = init_device_mesh("cpu", {mesh})',
        ]
    return [*lines, "torch.manual_seed(0)"]


def _tail(subject: Subject) -> list[str]:
    if subject.claim.kind is Kind.DIVERGES:
        # With the store, not with a collective: ranks that parted never meet again.
        return [
            *_VERDICT,
            'store.set(f"done {dist.get_rank()}", "")',
            f'store.wait([f"done {{rank}}" for rank in range({subject.ranks})])',
            "os._exit(int(bug))",
        ]
    return _end()


# Before ranks leave: torchrun ends the others with the first one that exits with 1.
_VERDICT = (FIRST, '    print("BUG" if bug else "ok", flush=True)')


def _end() -> list[str]:
    return [*_VERDICT, "dist.barrier()", "dist.destroy_process_group()", "sys.exit(int(bug))"]
