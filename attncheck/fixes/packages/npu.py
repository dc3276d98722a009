"""`npu::npu_fusion_attention` of torch_npu and its gradient: schemas only, nothing of it was run.

The schemas are those of the op-plugin documentation, with four results of the gradient. What is said here of
dims was checked on a stand-in of attncheck's own with the same schemas, not on Ascend's kernels. Versions of
torch_npu that register strategies themselves keep theirs.

Heads (`n`, kv heads `m`) are never sharded: the op gets their number as an argument, `head_num`, which a
strategy cannot change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attncheck.fixes.notation import Signature

FORWARD = "npu.npu_fusion_attention.default"
BACKWARD = "npu.npu_fusion_attention_grad.default"
IMPORTS = "torch_npu"

# input_layout -> dims of q, of k and v, and of the row maxima and sums, eight equal columns each.
LAYOUTS = {
    "BNSD": ("b n sq d", "b m sk d", "b n sq 8"),
    "BSND": ("b sq n d", "b sk m d", "b n sq 8"),
    "BSH": ("b sq width", "b sk kv_width", "b n sq 8"),
    "SBH": ("sq b width", "sk b kv_width", "b n sq 8"),
    "TND": ("t n d", "tk m d", "t n 8"),
}
NEEDS = {"keep_prob": 1.0, "pse": None, "padding_mask": None, "prefix": None}
BECAUSE = (
    "shards that draw from equal seeds share a dropout mask, and nobody described what position shifts, "
    "padding masks and prefixes look like on a part of the rows"
)
# sparse_mode -> the mask that goes with it: one for all rows, or a triangle that stands for all of them.
MASKS = {(0, 1): "b n sq sk | sq sk", (2, 3, 4): "replicated"}
# With a mask for all rows, and no band: so many rows before and after the own one are all.
QUERIES = {"sparse_mode": (0, 1), "pre_tockens": 2147483647, "next_tockens": 2147483647}


def _forward(when: Mapping[str, Any], mask: str, q: str, kv: str, rows: str) -> Signature:
    return Signature(
        FORWARD,
        when=when,
        takes={"query": q, "key": kv, "value": kv, "atten_mask": mask},
        gives={
            "attention_out": q,
            "softmax_max": rows,
            "softmax_sum": rows,
            "softmax_out": "replicated",  # empty, reserved
            "seed": "none",
            "offset": "none",
            "numels": "none",
        },
        needs=NEEDS,
        queries=QUERIES,
        because=BECAUSE,
        imports=IMPORTS,
    )


def _backward(when: Mapping[str, Any], mask: str, q: str, kv: str, rows: str) -> Signature:
    return Signature(
        BACKWARD,
        when=when,
        takes={
            "query": q,
            "key": kv,
            "value": kv,
            "dy": q,
            "atten_mask": mask,
            "softmax_max": rows,
            "softmax_sum": rows,
            "softmax_in": "replicated",
            "attention_in": q,
        },
        gives={
            "grad_query": q,
            "grad_key": f"{kv}, summed over sq",
            "grad_value": f"{kv}, summed over sq",
            "grad_pse": "replicated",  # empty without pse
        },
        needs=NEEDS,
        queries=QUERIES,
        because=BECAUSE,
        imports=IMPORTS,
    )


SIGNATURES = tuple(
    make({"input_layout": layout, "sparse_mode": modes}, mask, *dims)
    for make in (_forward, _backward)
    for layout, dims in LAYOUTS.items()
    for modes, mask in MASKS.items()
)
