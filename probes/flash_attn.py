"""flash-attn 2: the dense, packed and variable-length functions, behind four kernel ops.

Before 2.7 there are no kernel ops: the functions call the compiled module, where a DTensor would be a
null pointer, and attncheck stops the call in front of it. `flash_attn_with_kvcache`, which is so in
every version, has a probe of its own. On a machine without CUDA the package's own Python runs on
attncheck's stand-in for its compiled module: `attncheck scan --with flash-attn`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    OTHER,
    SEQUENCE,
    Operator,
    Probe,
    Results,
    Setting,
    Tensor,
    Tensors,
    cu_seqlens,
    fixed,
    refuse_unknown,
)

if TYPE_CHECKING:
    import torch

PACKAGES = ("flash-attn>=2.5.9",)
STANDINS = ("flash_attn_2_cuda",)
BYPASSES = ("flash_attn_2_cuda",)
DENSE_OPS = (
    "flash_attn._flash_attn_forward.default",
    "flash_attn._flash_attn_backward.default",
)
VARLEN_OPS = (
    "flash_attn._flash_attn_varlen_forward.default",
    "flash_attn._flash_attn_varlen_backward.default",
)

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
KV_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
QKV_PACKED_DIMS = (BATCH, SEQUENCE, OTHER, HEADS, HEAD_DIM)
KV_PACKED_DIMS = (BATCH, KV_SEQUENCE, OTHER, KV_HEADS, HEAD_DIM)
# Packed sequences: the dim that holds all tokens is the one to shard over the sequence.
VARLEN_Q_DIMS = (SEQUENCE, HEADS, HEAD_DIM)
VARLEN_KV_DIMS = (KV_SEQUENCE, KV_HEADS, HEAD_DIM)
VARLEN_QKV_PACKED_DIMS = (SEQUENCE, OTHER, HEADS, HEAD_DIM)
VARLEN_KV_PACKED_DIMS = (KV_SEQUENCE, OTHER, KV_HEADS, HEAD_DIM)
PAGES_DIMS = (OTHER, OTHER, KV_HEADS, HEAD_DIM)  # (pages, rows of a page, ...)

# All sizes differ, and so do their halves: a swapped or wrongly split dim cannot fit by chance.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 18, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**BASE, "kv_sequence": 18}
GQA = {**BASE, "heads": 20}
MQA = {**BASE, "kv_heads": 1}
# 14 rows: 5 heads leave 3 on the first of 2 ranks, as 6 rows would.
GQA_UNEVEN_KV = {**BASE, "batch": 14, "heads": 20, "kv_heads": 5}
UNEVEN_HEADS = {**BASE, "batch": 14, "heads": 5, "kv_heads": 5}
UNEVEN_SEQUENCE = {**BASE, "sequence": 19, "kv_sequence": 25}
BATCH_1 = {**BASE, "batch": 1}
HEAD_DIM_20 = {**BASE, "head_dim": 20}  # no multiple of 8: flash_attn pads it
# q = 0 and v = identity make the dropout mask readable: see runner.oracle.judge_dropout.
DROPOUT = {**BASE, "kv_sequence": 24, "head_dim": 24}

# Three sequences; a split of the tokens in two goes through the middle one.
Q_LENGTHS = [7, 9, 10]
KV_LENGTHS = [12, 9, 13]
VARLEN = {**BASE, "batch": 3, "sequence": sum(Q_LENGTHS), "kv_sequence": sum(KV_LENGTHS)}

# The kernels take pages of a multiple of 256 rows. Page 4 belongs to nobody, and order means nothing.
PAGE_ROWS = 256
PAGES = 6
BLOCK_TABLE = [[3, 0], [5, 1], [1, 2]]
PAGED_LENGTHS = [300, 9, 270]

ALL = ("replicate", "batch", "heads", "sequence", "query", "head_dim", "partial")
COMMON = ("replicate", "batch", "heads", "sequence")
INDEPENDENT = ("replicate", "batch", "heads")  # dims that attention never mixes
CORE = ("replicate", "heads")
POSITIONS = ("sequence", "query")


# --- arguments -----------------------------------------------------------------------------


def _tensor(name: str, dims: tuple[str, ...], setting: Setting, packed: int = 0) -> Tensor:
    """`packed`: the size of the dim that stacks q, k, v or k, v."""
    return Tensor(name, dims, tuple(packed if r == OTHER else setting[r] for r in dims))


def _slopes(setting: Setting) -> tuple[Tensor, ...]:
    kind = setting.get("alibi")
    if kind is None:
        return ()
    dims = {"heads": (HEADS,), "batch_and_heads": (BATCH, HEADS)}[kind]
    sizes = tuple(setting[role] for role in dims)
    slopes = Tensor(
        "alibi_slopes", dims, sizes, requires_grad=False, fill="slopes", dtype="float32"
    )
    return (slopes,)


def dense_tensors(setting: Setting) -> tuple[Tensor, ...]:
    if setting.dropout:
        q, k, v = Q_DIMS, KV_DIMS, KV_DIMS
        return (
            # Gradients of q = 0 would be differences of equal numbers: only v's says anything.
            Tensor("q", q, tuple(setting[r] for r in q), requires_grad=False, fill="zeros"),
            Tensor("k", k, tuple(setting[r] for r in k), requires_grad=False),
            Tensor("v", v, tuple(setting[r] for r in v), fill="eye"),
        )
    return (
        _tensor("q", Q_DIMS, setting),
        _tensor("k", KV_DIMS, setting),
        _tensor("v", KV_DIMS, setting),
        *_slopes(setting),
    )


def qkvpacked_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return _tensor("qkv", QKV_PACKED_DIMS, setting, packed=3), *_slopes(setting)


def kvpacked_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        _tensor("q", Q_DIMS, setting),
        _tensor("kv", KV_PACKED_DIMS, setting, packed=2),
        *_slopes(setting),
    )


def varlen_tensors(setting: Setting) -> tuple[Tensor, ...]:
    if "block_table" in setting.options:
        return paged_tensors(setting)
    return (
        _tensor("q", VARLEN_Q_DIMS, setting),
        _tensor("k", VARLEN_KV_DIMS, setting),
        _tensor("v", VARLEN_KV_DIMS, setting),
        cu_seqlens(
            "cu_seqlens_q", setting.options["q_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        cu_seqlens(
            "cu_seqlens_k", setting.options["kv_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        *_slopes(setting),
    )


def varlen_qkvpacked_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        _tensor("qkv", VARLEN_QKV_PACKED_DIMS, setting, packed=3),
        cu_seqlens(
            "cu_seqlens", setting.options["q_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        *_slopes(setting),
    )


def varlen_kvpacked_tensors(setting: Setting) -> tuple[Tensor, ...]:
    return (
        _tensor("q", VARLEN_Q_DIMS, setting),
        _tensor("kv", VARLEN_KV_PACKED_DIMS, setting, packed=2),
        cu_seqlens(
            "cu_seqlens_q", setting.options["q_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        cu_seqlens(
            "cu_seqlens_k", setting.options["kv_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        *_slopes(setting),
    )


def paged_tensors(setting: Setting) -> tuple[Tensor, ...]:
    """Keys and values in pages; flash-attn has no backward for them."""
    pages = (PAGES, PAGE_ROWS, setting["kv_heads"], setting["head_dim"])
    table = setting.get("block_table")
    return (
        Tensor("q", VARLEN_Q_DIMS, tuple(setting[r] for r in VARLEN_Q_DIMS), requires_grad=False),
        Tensor("k", PAGES_DIMS, pages, requires_grad=False),
        Tensor("v", PAGES_DIMS, pages, requires_grad=False),
        cu_seqlens(
            "cu_seqlens_q", setting.options["q_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        cu_seqlens(
            "cu_seqlens_k", setting.options["kv_lengths"], setting.get("cu_seqlens", "replicate")
        ),
        fixed("block_table", table, (OTHER, OTHER)),
    )


# --- calls ---------------------------------------------------------------------------------


def _flags(setting: Setting, t: Tensors) -> dict[str, Any]:
    """The keyword arguments that the functions take; what a setting leaves out stays out."""
    flags: dict[str, Any] = {"causal": bool(setting.get("causal", False))}
    if setting.dropout:
        flags["dropout_p"] = setting.dropout
    if "window" in setting.options:
        flags["window_size"] = tuple(setting.options["window"])
    if "softcap" in setting.options:
        flags["softcap"] = setting.options["softcap"]
    if "scale" in setting.options:
        flags["softmax_scale"] = setting.options["scale"]
    if setting.get("deterministic"):
        flags["deterministic"] = True
    if setting.get("attn_probs"):
        flags["return_attn_probs"] = True
    for name in ("alibi_slopes", "block_table"):
        if name in t:
            flags[name] = t[name]
    return flags


def _results(
    setting: Setting, t: Tensors, function: Callable[..., Any], *arguments: Any
) -> Results:
    """The output, with `return_attn_probs` the log-sum-exp too (the probabilities that come with it are
    an empty tensor without dropout)."""
    flags = _flags(setting, t)
    refuse_unknown(function, flags)
    returned = function(*arguments, **flags)
    if not setting.get("attn_probs"):
        out: torch.Tensor = returned
        return out
    return {"out": returned[0], "lse": returned[1]}


def call_dense(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_func

    return _results(setting, t, flash_attn_func, t["q"], t["k"], t["v"])


def call_qkvpacked(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_qkvpacked_func

    return _results(setting, t, flash_attn_qkvpacked_func, t["qkv"])


def call_kvpacked(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_kvpacked_func

    return _results(setting, t, flash_attn_kvpacked_func, t["q"], t["kv"])


def call_varlen(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_varlen_func

    packing = _packing(setting, t)
    results = _results(setting, t, flash_attn_varlen_func, t["q"], t["k"], t["v"], *packing)
    return _packed_lse(setting, results)


def call_varlen_qkvpacked(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    longest = max(setting.options["q_lengths"])
    results = _results(
        setting, t, flash_attn_varlen_qkvpacked_func, t["qkv"], t["cu_seqlens"], longest
    )
    return _packed_lse(setting, results)


def call_varlen_kvpacked(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_varlen_kvpacked_func

    packing = _packing(setting, t)
    results = _results(setting, t, flash_attn_varlen_kvpacked_func, t["q"], t["kv"], *packing)
    return _packed_lse(setting, results)


def _packing(setting: Setting, t: Tensors) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    longest = (max(setting.options["q_lengths"]), max(setting.options["kv_lengths"]))
    return (t["cu_seqlens_q"], t["cu_seqlens_k"], *longest)


def _packed_lse(setting: Setting, results: Results) -> Results:
    """The log-sum-exp as (heads, tokens), which it is from 2.6 on; before, each sequence had a row."""
    import torch

    if isinstance(results, torch.Tensor) or results["lse"].ndim == 2:
        return results
    lengths = setting.options["q_lengths"]
    parts = [row[:, :length] for row, length in zip(results["lse"], lengths, strict=True)]
    return {**results, "lse": torch.cat(parts, dim=1)}


# --- references ----------------------------------------------------------------------------


def _reference(
    setting: Setting,
    t: Tensors,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: bool = False,
) -> Results:
    from math import inf

    from attncheck.runner.reference import attention_lse

    left, right = setting.get("window", (-1, -1))
    out, lse = attention_lse(
        q,
        k,
        v,
        layout="thd" if packed else "bshd",
        scale=setting.get("scale"),
        causal="bottom_right" if setting.get("causal") else None,
        window=(left, right),
        softcap=setting.get("softcap", 0.0),
        alibi_slopes=t.get("alibi_slopes"),
        cu_seqlens_q=t.get("cu_seqlens_q", t.get("cu_seqlens")),
        cu_seqlens_k=t.get("cu_seqlens_k", t.get("cu_seqlens")),
        empty_lse=inf,
    )
    return {"out": out, "lse": lse} if setting.get("attn_probs") else out


def dense_reference(setting: Setting, t: Tensors) -> Results:
    return _reference(setting, t, t["q"], t["k"], t["v"])


def qkvpacked_reference(setting: Setting, t: Tensors) -> Results:
    q, k, v = t["qkv"].unbind(2)
    return _reference(setting, t, q, k, v)


def kvpacked_reference(setting: Setting, t: Tensors) -> Results:
    k, v = t["kv"].unbind(2)
    return _reference(setting, t, t["q"], k, v)


def varlen_reference(setting: Setting, t: Tensors) -> Results:
    k, v = (_from_pages(setting, t[name], t.get("block_table")) for name in ("k", "v"))
    return _reference(setting, t, t["q"], k, v, packed=True)


def varlen_qkvpacked_reference(setting: Setting, t: Tensors) -> Results:
    q, k, v = t["qkv"].unbind(1)
    return _reference(setting, t, q, k, v, packed=True)


def varlen_kvpacked_reference(setting: Setting, t: Tensors) -> Results:
    k, v = t["kv"].unbind(1)
    return _reference(setting, t, t["q"], k, v, packed=True)


def _from_pages(
    setting: Setting, pages: torch.Tensor, block_table: torch.Tensor | None
) -> torch.Tensor:
    """(pages, rows, kv_heads, head_dim) to packed sequences (tokens, kv_heads, head_dim)."""
    import torch

    if block_table is None:
        return pages
    lengths = setting.options["kv_lengths"]
    rows = [pages[block_table[i].long()].flatten(0, 1)[:length] for i, length in enumerate(lengths)]
    return torch.cat(rows)


# --- settings ------------------------------------------------------------------------------

CAUSAL = {"causal": True}
WINDOW = {"window": [5, 3]}
SOFTCAP = {"softcap": 1.5}
SCALE = {"scale": 0.3}
ALIBI = {"alibi": "heads"}
PROBS = {"attn_probs": True}

DENSE = (
    Setting("plain", BASE, level="quick", placements=(*INDEPENDENT, "head_dim", "partial")),
    Setting("causal", BASE, options=CAUSAL, level="quick", placements=INDEPENDENT),
    Setting("square", SQUARE, placements=POSITIONS),
    Setting("square_causal", SQUARE, options=CAUSAL, placements=("heads", *POSITIONS)),
    Setting("uneven_sequence", UNEVEN_SEQUENCE, placements=POSITIONS),
    Setting("uneven_heads", UNEVEN_HEADS, placements=CORE),
    Setting("batch_1", BATCH_1, placements=("replicate", "batch")),
    Setting("gqa", GQA, placements=(*INDEPENDENT, "query")),
    Setting("mqa", MQA, placements=INDEPENDENT),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=CORE),
    Setting("window", BASE, options=WINDOW, placements=COMMON),
    Setting("softcap", BASE, options=SOFTCAP, placements=CORE),
    Setting("scale", BASE, options=SCALE, placements=CORE),
    Setting("alibi", BASE, options=ALIBI, placements=INDEPENDENT),
    Setting("head_dim_20", HEAD_DIM_20, placements=INDEPENDENT),
    Setting("bfloat16", BASE, "bfloat16", placements=COMMON),
    Setting("float16", BASE, "float16", placements=CORE),
    Setting("attn_probs", BASE, options=PROBS, placements=CORE),
    Setting("dropout", DROPOUT, placements=CORE, dropout=0.25),
    Setting("attn_probs_causal", BASE, options={**PROBS, **CAUSAL}, level="full"),
    Setting("bfloat16_causal", BASE, "bfloat16", CAUSAL, "full"),
    Setting("gqa_causal", GQA, options=CAUSAL, level="full"),
    Setting("mqa_causal", MQA, options=CAUSAL, level="full"),
    Setting("gqa_uneven_kv_causal", GQA_UNEVEN_KV, options=CAUSAL, level="full"),
    Setting("window_causal", BASE, options={**WINDOW, **CAUSAL}, level="full"),
    Setting("window_left", BASE, options={"window": [5, -1]}, level="full"),
    Setting("softcap_causal", BASE, options={**SOFTCAP, **CAUSAL}, level="full"),
    Setting("alibi_causal", BASE, options={**ALIBI, **CAUSAL}, level="full"),
    Setting("alibi_batch", BASE, options={"alibi": "batch_and_heads"}, level="full"),
    Setting("deterministic", BASE, options={"deterministic": True}, level="full"),
)

QKVPACKED = (
    Setting("plain", SQUARE, placements=COMMON),
    Setting("causal", SQUARE, options=CAUSAL, placements=CORE),
    Setting("uneven_heads", {**UNEVEN_HEADS, "kv_sequence": 18}, placements=CORE),
    Setting("bfloat16", SQUARE, "bfloat16", placements=CORE),
    Setting("window", SQUARE, options=WINDOW, level="full"),
    Setting("softcap", SQUARE, options=SOFTCAP, level="full"),
    Setting("scale", SQUARE, options=SCALE, level="full"),
    Setting("alibi", SQUARE, options=ALIBI, level="full"),
    Setting("head_dim_20", {**HEAD_DIM_20, "kv_sequence": 18}, level="full"),
    Setting("batch_1", {**BATCH_1, "kv_sequence": 18}, level="full"),
    Setting("float16", SQUARE, "float16", level="full"),
    Setting("attn_probs", SQUARE, options=PROBS, level="full"),
)

KVPACKED = (
    Setting("plain", BASE, placements=COMMON),
    Setting("causal", BASE, options=CAUSAL, placements=CORE),
    Setting("gqa", GQA, placements=INDEPENDENT),
    Setting("gqa_uneven_kv", GQA_UNEVEN_KV, placements=CORE),
    Setting("bfloat16", BASE, "bfloat16", placements=CORE),
    Setting("mqa", MQA, level="full"),
    Setting("uneven_heads", UNEVEN_HEADS, level="full"),
    Setting("window", BASE, options=WINDOW, level="full"),
    Setting("softcap", BASE, options=SOFTCAP, level="full"),
    Setting("scale", BASE, options=SCALE, level="full"),
    Setting("alibi", BASE, options=ALIBI, level="full"),
    Setting("head_dim_20", HEAD_DIM_20, level="full"),
    Setting("batch_1", BATCH_1, level="full"),
    Setting("float16", BASE, "float16", level="full"),
    Setting("attn_probs", BASE, options=PROBS, level="full"),
)


def _varlen(
    name: str,
    sizes: dict[str, int] | None = None,
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
    level: str = "default",
    placements: tuple[str, ...] | None = None,
) -> Setting:
    """A setting on the packed sequences; `sizes` other than those of VARLEN."""
    lengths = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
    return Setting(
        name, {**VARLEN, **(sizes or {})}, dtype, {**lengths, **(options or {})}, level, placements
    )


VARLEN_SETTINGS = (
    _varlen("plain", placements=(*CORE, *POSITIONS)),
    _varlen("causal", options=CAUSAL, placements=CORE),
    _varlen("cu_seqlens_plain", options={"cu_seqlens": "plain"}, placements=CORE),
    _varlen("gqa", {"heads": 20}, placements=CORE),
    _varlen("gqa_uneven_kv", {"heads": 20, "kv_heads": 5}, placements=CORE),
    _varlen("bfloat16", dtype="bfloat16", placements=CORE),
    _varlen("attn_probs", options=PROBS, placements=CORE),
    _varlen(
        "paged",
        {"kv_sequence": sum(PAGED_LENGTHS)},
        options={"kv_lengths": PAGED_LENGTHS, "block_table": BLOCK_TABLE},
        placements=CORE,
    ),
    _varlen("mqa", {"kv_heads": 1}, level="full"),
    _varlen("uneven_heads", {"heads": 5, "kv_heads": 5}, level="full"),
    _varlen("window", options=WINDOW, level="full"),
    _varlen("softcap", options=SOFTCAP, level="full"),
    _varlen("scale", options=SCALE, level="full"),
    _varlen("alibi", options=ALIBI, level="full"),
    _varlen("head_dim_20", {"head_dim": 20}, level="full"),
    _varlen("float16", dtype="float16", level="full"),
)

# Self-attention: keys are as many as queries.
SELF = {"kv_sequence": VARLEN["sequence"]}
SELF_LENGTHS = {"kv_lengths": Q_LENGTHS}

VARLEN_QKVPACKED = (
    _varlen("plain", SELF, options=SELF_LENGTHS, placements=(*CORE, "sequence")),
    _varlen("causal", SELF, options={**SELF_LENGTHS, **CAUSAL}, placements=CORE),
    _varlen("bfloat16", SELF, "bfloat16", SELF_LENGTHS, "full"),
    _varlen(
        "uneven_heads", {**SELF, "heads": 5, "kv_heads": 5}, options=SELF_LENGTHS, level="full"
    ),
    _varlen("window", SELF, options={**SELF_LENGTHS, **WINDOW}, level="full"),
    _varlen("softcap", SELF, options={**SELF_LENGTHS, **SOFTCAP}, level="full"),
    _varlen("alibi", SELF, options={**SELF_LENGTHS, **ALIBI}, level="full"),
    _varlen("head_dim_20", {**SELF, "head_dim": 20}, options=SELF_LENGTHS, level="full"),
    _varlen("attn_probs", SELF, options={**SELF_LENGTHS, **PROBS}, level="full"),
)

VARLEN_KVPACKED = (
    _varlen("plain", placements=(*CORE, *POSITIONS)),
    _varlen("causal", options=CAUSAL, level="full"),
    _varlen("gqa", {"heads": 20}, placements=CORE),
    _varlen("gqa_uneven_kv", {"heads": 20, "kv_heads": 5}, level="full"),
    _varlen("bfloat16", dtype="bfloat16", level="full"),
    _varlen("window", options=WINDOW, level="full"),
    _varlen("softcap", options=SOFTCAP, level="full"),
    _varlen("alibi", options=ALIBI, level="full"),
    _varlen("head_dim_20", {"head_dim": 20}, level="full"),
    _varlen("attn_probs", options=PROBS, level="full"),
)


def _operator(
    name: str,
    tensors: Callable[[Setting], tuple[Tensor, ...]],
    call: Callable[[Setting, Tensors], Results],
    reference: Callable[[Setting, Tensors], Results],
    settings: tuple[Setting, ...],
    placements: tuple[str, ...],
    packed: bool = False,
) -> Operator:
    """`packed`: it takes packed sequences."""
    return Operator(
        name=name,
        tensors=tensors,
        call=call,
        reference=reference,
        settings=settings,
        output_dims=VARLEN_Q_DIMS if packed else Q_DIMS,
        kernel_ops=VARLEN_OPS if packed else DENSE_OPS,
        placements=placements,
        packages=PACKAGES,
        standins=STANDINS,
        bypasses=BYPASSES,
        function=f"flash_attn.{name}",
    )


PROBE = Probe(
    name="flash_attn",
    summary="flash-attn 2: dense, packed and variable-length attention",
    operators=(
        _operator(
            "flash_attn_func", dense_tensors, call_dense, dense_reference, DENSE, placements=ALL
        ),
        _operator(
            "flash_attn_qkvpacked_func",
            qkvpacked_tensors,
            call_qkvpacked,
            qkvpacked_reference,
            QKVPACKED,
            placements=COMMON,
        ),
        _operator(
            "flash_attn_kvpacked_func",
            kvpacked_tensors,
            call_kvpacked,
            kvpacked_reference,
            KVPACKED,
            placements=COMMON,
        ),
        _operator(
            "flash_attn_varlen_func",
            varlen_tensors,
            call_varlen,
            varlen_reference,
            VARLEN_SETTINGS,
            placements=(*CORE, *POSITIONS),
            packed=True,
        ),
        _operator(
            "flash_attn_varlen_qkvpacked_func",
            varlen_qkvpacked_tensors,
            call_varlen_qkvpacked,
            varlen_qkvpacked_reference,
            VARLEN_QKVPACKED,
            placements=(*CORE, "sequence"),
            packed=True,
        ),
        _operator(
            "flash_attn_varlen_kvpacked_func",
            varlen_kvpacked_tensors,
            call_varlen_kvpacked,
            varlen_kvpacked_reference,
            VARLEN_KVPACKED,
            placements=(*CORE, *POSITIONS),
            packed=True,
        ),
    ),
)
