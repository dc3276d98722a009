"""Ops whose signature is known, synthesised from calls, and where the two differ.

    python tests/oracle/synth_known.py flash_attn.py 'flash_attn.*'    # of this probe's operators; JSON

Two descriptions are the same where they lay every recorded call out in the same ways, on meshes of one and
two axes; how they name the dims is their own affair.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import Replicate

from attncheck import plugins
from attncheck.fixes import recording, synthesis
from attncheck.fixes.notation import Refused, Signature, form_of, layouts
from attncheck.fixes.packages import known
from attncheck.fixes.recording import Call
from attncheck.runner.available import Availability

# Ops of which one of the two has a row for queries that the other has not, and why; the rest is the same.
# Synthesis calls stand-ins, which do not look at what the real kernels look at.
BUT_FOR_QUERIES = {
    "aten._scaled_dot_product_flash_attention.default": "it returns max_q, of which each rank has its own: "
    "synthesis takes only what is the same on all",
    "aten._scaled_dot_product_cudnn_attention.default": "it returns max_q, too",
    "aten._cudnn_attention_forward.default": "its backward has no row for queries",
    "aten._cudnn_attention_backward.default": "the kernel reads the number of queries from max_q",
    "aten._scaled_dot_product_cudnn_attention_backward.default": "the kernel reads it from max_q",
    "aten._scaled_dot_product_fused_attention_overrideable_backward.default": "it is passed max_q, which "
    "is what the forward returned on that rank",
}
# Ops whose seeds are described as no tensors: PyTorch's DTensor hands a tensor without dims on as it is, so
# that whole on every rank and no placement at all are the same.
NUMBERS_IN_TENSORS = (
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
)
# Known ops that no operator of a built-in probe calls on a CPU, and why.
UNREACHED = {
    "aten.alias.default": "torch has a strategy for it, but for old versions",
    "npu.npu_fusion_attention.default": "its kernels need its hardware",
    "npu.npu_fusion_attention_grad.default": "its kernels need its hardware",
}
MESHES = ((2,), (3,), (4,), (2, 2), (3, 2))
SEED = 20


def ways(forms: Sequence[Signature], call: Call, mesh: tuple[int, ...]) -> set[str]:
    """All layouts of a call, as text; one that says why where there are none."""
    values = recording.values(call)
    shapes = {name: tuple(tensor.shape) for name, tensor in call.tensors.items()}
    try:
        offered = layouts(form_of(forms, values), values, shapes, mesh)
    except Refused:
        return {"refused"}
    whole = {None, tuple(Replicate() for _ in mesh)} if call.op in NUMBERS_IN_TENSORS else set()
    return {
        str(
            (
                sorted(layout.takes.items()),
                ["whole" if placed in whole else placed for placed in layout.gives],
            )
        )
        for layout in offered
    }


def differences(
    ours: Sequence[Signature], theirs: Sequence[Signature], calls: Sequence[Call]
) -> list[str]:
    """Where the first description offers what the second does not, and the other way round."""
    if calls[0].op in BUT_FOR_QUERIES:
        ours, theirs = (
            [replace(signature, queries=None) for signature in forms] for forms in (ours, theirs)
        )
    out = []
    for call in calls:
        for mesh in MESHES:
            synthesised, described = (ways(forms, call, mesh) for forms in (ours, theirs))
            for what, one in (
                ("not synthesised", described - synthesised),
                ("not described", synthesised - described),
            ):
                out += [f"{call.label} on {mesh}, {what}: {text}" for text in sorted(one)]
    return out


def recorded(probe: str, ops: Sequence[str], only: str = "") -> dict[str, list[Call]]:
    """op -> the calls that the operators of a built-in probe (or one of them) make of it."""
    availability = Availability("cpu")
    out: dict[str, list[Call]] = {}
    for operator in plugins.load_probe_file(plugins.builtin_dir("probes") / probe).operators:
        if only in ("", operator.name) and availability.refusal(operator) is None:
            settings = [s for s in operator.settings if not s.dropout and s.level != "full"]
            for call in recording.record(
                operator, settings, SEED, wanted=lambda op: str(op) in ops
            ):
                out.setdefault(call.op, []).append(call)
    return out


def main(probe: str, glob: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    signatures: dict[str, list[Signature]] = {}
    for signature in known():
        if fnmatch.fnmatchcase(signature.op, glob):
            signatures.setdefault(signature.op, []).append(signature)
    calls = recorded(probe, tuple(signatures))
    operators = [
        o.name for o in plugins.load_probe_file(plugins.builtin_dir("probes") / probe).operators
    ]
    request = synthesis.Request(
        path=tuple(p for p in sys.path if p),
        operators=tuple(operators),
        kernel_ops=tuple(calls),
        seed=SEED,
    )
    answer = synthesis.for_operators(request)
    out: dict[str, Any] = {r.op: {"refused": r.why} for r in answer.refused}
    for found in answer.found:
        op = found.signature.op
        out[op] = {
            "calls": len(calls[op]),
            "compared": sum(
                len(ways(signatures[op], call, mesh) - {"refused"})
                for call in calls[op]
                for mesh in MESHES
            ),
            "held_out": found.found.held_out,
            "seconds": found.found.seconds,
            "signatures": [repr(s) for s in found.signatures],
            "rejected": [f"{r.way}: {r.why}" for r in found.rejected],
            "differences": differences(found.signatures, signatures[op], calls[op]),
        }
    return out


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]), indent=1))
