"""What attention-like ops are registered in a process, and what DTensor has for each. Torch-free.

The look itself needs torch and runs other people's imports, which may end a process: it happens in a
child (`attncheck.runner.inventory`), and what comes back is data.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attncheck.errors import UserError
from attncheck.model import from_json, to_json

TIMEOUT_SECONDS = 180
# So many ops may end the process that calls them, before nobody wants to wait any longer.
FATAL_CALLS = 5
# What the child says before it calls an op.
CALLING = re.compile(r"calling (\S+)")
# The probe, and so the operators, made of ops that no other probe names.
REGISTERED = "registered"
# Hugging Face `kernels` puts a build id into its namespaces: `_flash_attn_9e27194::fwd`.
_BUILD_ID = re.compile(r"^(_\w+?)_[0-9a-f]{7,40}(?=\.)")


@dataclass(frozen=True)
class Signature:
    """How to call an op that no probe describes, as found by calling it on small whole tensors.

    `layout`: `bhsd` or `bshd`, the one in which it agrees with the reference. `word`: what its layout
    argument wants, where it has one. `dtype`: the first that it takes. `causal`: its causal flag, or ''.
    `grouped`: takes fewer kv heads than heads. `differentiable`: its output carries a gradient.
    """

    layout: str
    word: str = ""
    dtype: str = "float32"
    causal: str = ""
    grouped: bool = False
    differentiable: bool = False


@dataclass(frozen=True)
class RegisteredOp:
    """An attention-like op. `op` is written as PyTorch writes it (`flash_attn._flash_attn_forward.default`).

    `kernels`: the devices that have one; `standin`: that of this device is attncheck's. `strategy`:
    `registered`, `decomposition` (DTensor traces what the op decomposes into, at each call), `composite`
    (decomposed before DTensor sees it) or `none`. `depends`: where the answer depends on the call, a line
    for each variant. `backward`: the op of its backward, or ''. `signature`: None where it was not
    called, and `uncalled` says why.
    """

    op: str
    schema: str = ""
    kernels: tuple[str, ...] = ()
    standin: bool = False
    strategy: str = "none"
    depends: tuple[str, ...] = ()
    backward: str = ""
    signature: Signature | None = None
    uncalled: str = ""


@dataclass(frozen=True)
class Problem:
    """A module that does not import: `kind` is `missing` or `broken`."""

    module: str
    kind: str
    text: str


@dataclass(frozen=True)
class Inventory:
    ops: tuple[RegisteredOp, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Look:
    """What the child is asked. `imports`: modules to import. `probe_files`: probes whose operators are
    made available first, stand-ins included (empty: none). `path` is put in front of sys.path. `only_new`:
    leave out what torch itself registers. `call`: find out how to call the ops that `known` does not name;
    those in `fatal` are not called, for the reason there.
    """

    device: str = "cpu"
    imports: tuple[str, ...] = ()
    probe_files: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    only_new: bool = False
    call: bool = False
    known: tuple[str, ...] = ()
    fatal: Mapping[str, str] = field(default_factory=dict)


def take(look: Look) -> Inventory:
    """Look in a fresh child process. Raises UserError where it dies or does not end.

    An op whose call ends the process is left uncalled, and the look begins again.
    """
    for _ in range(FATAL_CALLS):
        try:
            return _take(look)
        except _CallFailed as failed:
            look = dataclasses.replace(look, fatal={**look.fatal, failed.op: str(failed)})
    raise UserError(
        f"The list of registered ops cannot be had: calling {', '.join(look.fatal)} on small whole "
        "tensors each time ends the process."
    )


class _CallFailed(Exception):
    """Calling `op` on small whole tensors ended the process. The text says how."""

    def __init__(self, op: str, how: str) -> None:
        self.op = op
        super().__init__(f"called on small whole tensors, it {how}")


def _take(look: Look) -> Inventory:
    with tempfile.TemporaryDirectory(prefix="attncheck-") as folder:
        asked, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(to_json(look)), encoding="utf-8")
        command = [sys.executable, "-m", "attncheck.runner.inventory", str(asked), str(answer)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _failure(answer, f"does not end within {TIMEOUT_SECONDS} s") from None
        if done.returncode != 0:
            words = done.stderr.strip().splitlines()
            why = words[-1][:300] if words else f"exit code {done.returncode}"
            raise _failure(answer, f"ends the process ({why})")
        document = json.loads(answer.read_text(encoding="utf-8"))
    return from_json(Inventory, document, "inventory")


def _failure(answer: Path, how: str) -> Exception:
    """What the child did last, by what it wrote before it did it, and how that ended."""
    try:
        doing = answer.read_text(encoding="utf-8")
    except OSError:
        doing = "starting"
    if called := CALLING.fullmatch(doing):
        return _CallFailed(called[1], how)
    return UserError(f"The list of registered ops cannot be had: {doing} {how}.")


def without_build_id(op: str) -> str:
    """The same name for every build of an op.

    >>> without_build_id("_flash_attn_9e27194.fwd.default")
    '_flash_attn.fwd.default'
    """
    return _BUILD_ID.sub(r"\1", op)


def operator_name(op: str) -> str:
    """What an operator made of a registered op is called."""
    return f"{REGISTERED}.{without_build_id(op).removesuffix('.default')}"


_STRATEGY = {
    "registered": "has a sharding strategy",
    "decomposition": "has no sharding strategy; DTensor tries its decomposition",
    "composite": "needs no sharding strategy: it is decomposed before DTensor sees it",
    "none": "has no sharding strategy",
}


def sentence(op: RegisteredOp) -> str:
    """`aiter.fmha_fwd.default has no sharding strategy.`"""
    return f"{op.op} {_STRATEGY[op.strategy]}."


def uncalled(ops: Iterable[RegisteredOp]) -> list[RegisteredOp]:
    """Ops that nothing says how to call; a backward is left out where its forward is there."""
    ops = tuple(ops)
    backwards = {op.backward for op in ops}
    return [op for op in ops if op.signature is None and op.op not in backwards]
