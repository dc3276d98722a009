"""flash-attn 2's `flash_attn_with_kvcache`: decoding with a cache of keys and values, also in pages.

Forward only, and no dispatcher op in any version: it hands its arguments to the compiled module, where
a DTensor would be a null pointer. attncheck stops the call in front of it, and the way out is
`local_map`.
"""

from __future__ import annotations

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
    fixed,
    refuse_unknown,
)

if TYPE_CHECKING:
    import torch

Q_DIMS = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
NEW_DIMS = (BATCH, SEQUENCE, KV_HEADS, HEAD_DIM)
CACHE_DIMS = (BATCH, KV_SEQUENCE, KV_HEADS, HEAD_DIM)
PAGES_DIMS = (OTHER, OTHER, KV_HEADS, HEAD_DIM)  # (pages, rows of a page, ...)
SHARED_DIMS = (OTHER, KV_SEQUENCE, KV_HEADS, HEAD_DIM)  # rows chosen by cache_batch_idx

# `kv_sequence`: how many keys the cache has room for.
BASE = {"batch": 6, "heads": 4, "kv_heads": 4, "sequence": 14, "kv_sequence": 46, "head_dim": 16}
GQA = {**BASE, "heads": 20}
ONE_QUERY = {**BASE, "sequence": 1}
LENGTHS = [12, 9, 28, 0, 17, 21]
CACHE_ROWS = 8  # with cache_batch_idx: more than sequences
PAGE_ROWS = 256  # the kernels take multiples of it
PAGES = 11
PAGED_LENGTHS = [300, 9, 256, 0, 250, 407]  # the 5th grows into its second page
BLOCK_TABLE = [[3, 0], [5, 8], [1, 2], [6, 8], [4, 7], [10, 9]]
PAGED = {**BASE, "kv_sequence": 2 * PAGE_ROWS}

INDEPENDENT = ("replicate", "batch", "heads")
CORE = ("replicate", "heads")
ALL = (*INDEPENDENT, "sequence", "query")


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    options = setting.options
    room = {BATCH: setting["batch"], KV_SEQUENCE: setting["kv_sequence"], OTHER: CACHE_ROWS}
    dims = SHARED_DIMS if "cache_batch_idx" in options else CACHE_DIMS
    sizes = (room[dims[0]], room[dims[1]], setting["kv_heads"], setting["head_dim"])
    if "block_table" in options:
        dims, sizes = PAGES_DIMS, (PAGES, PAGE_ROWS, *sizes[2:])
    out = [
        Tensor("q", Q_DIMS, tuple(setting[r] for r in Q_DIMS), requires_grad=False),
        Tensor("k_cache", dims, sizes, requires_grad=False, mutable=True),
        Tensor("v_cache", dims, sizes, requires_grad=False, mutable=True),
    ]
    if options.get("append"):
        new = tuple(setting[r] for r in NEW_DIMS)
        out += [Tensor(name, NEW_DIMS, new, requires_grad=False) for name in ("k", "v")]
    if "rotary" in options:
        table = (setting["kv_sequence"], options["rotary_dim"] // 2)
        out += [
            Tensor(name, (OTHER, OTHER), table, requires_grad=False, wrap="replicate")
            for name in ("rotary_cos", "rotary_sin")
        ]
    if isinstance(options["cache_seqlens"], list):
        out.append(fixed("cache_seqlens", options["cache_seqlens"], (BATCH,), "pattern"))
    for name in ("cache_batch_idx", "cache_leftpad"):
        if name in options:
            out.append(fixed(name, options[name], (BATCH,), "pattern"))
    if "block_table" in options:
        out.append(fixed("block_table", options["block_table"], (BATCH, OTHER), "pattern"))
    if options.get("alibi"):
        out.append(
            Tensor(
                "alibi_slopes",
                (HEADS,),
                (setting["heads"],),
                requires_grad=False,
                fill="slopes",
                dtype="float32",
            )
        )
    return tuple(out)


def call(setting: Setting, t: Tensors) -> Results:
    from flash_attn import flash_attn_with_kvcache

    options = setting.options
    arguments: dict[str, Any] = {name: x for name, x in t.items() if name != "q"}
    if "cache_seqlens" not in t:
        arguments["cache_seqlens"] = options["cache_seqlens"]
    arguments["causal"] = bool(options.get("causal"))
    if "window" in options:
        arguments["window_size"] = tuple(options["window"])
    for name, keyword in (("scale", "softmax_scale"), ("softcap", "softcap")):
        if name in options:
            arguments[keyword] = options[name]
    if "rotary" in options:
        arguments["rotary_interleaved"] = options["rotary"] == "interleaved"
    if "num_splits" in options:
        arguments["num_splits"] = options["num_splits"]
    if options.get("lse"):
        arguments["return_softmax_lse"] = True
    refuse_unknown(flash_attn_with_kvcache, arguments)
    returned = flash_attn_with_kvcache(t["q"], **arguments)
    results = {"out": returned[0], "lse": returned[1]} if options.get("lse") else {"out": returned}
    if options.get("append"):
        results |= {"k_cache": t["k_cache"], "v_cache": t["v_cache"]}
    return results


def reference(setting: Setting, t: Tensors) -> Results:
    """Sequence by sequence: append, take the keys in order, attend."""
    from math import inf

    import torch

    from attncheck.runner.reference import attention_lse

    options = setting.options
    caches = {"k": t["k_cache"].clone(), "v": t["v_cache"].clone()}
    outs, lses = [], []
    for i in range(setting["batch"]):
        length = _length(setting, i)
        q, last = t["q"][i], length
        if options.get("append"):
            last += setting["sequence"]
            new = {"k": t["k"][i], "v": t["v"][i]}
            if "rotary" in options:
                moving = bool(options.get("causal")) or "window" in options
                new["k"] = _turned(setting, t, new["k"], length, moving=True)
                q = _turned(setting, t, q, length, moving)
            for name, cache in caches.items():
                cache[_places(setting, i, length, last)] = new[name]
        first = options["cache_leftpad"][i] if "cache_leftpad" in options else 0
        k, v = (cache[_places(setting, i, first, last)] for cache in caches.values())
        left, right = options.get("window", (-1, -1))
        out, lse = attention_lse(
            *(x.unsqueeze(0) for x in (q, k, v)),
            layout="bshd",
            scale=options.get("scale"),
            causal="bottom_right" if options.get("causal") else None,
            window=(left, right),
            softcap=options.get("softcap", 0.0),
            alibi_slopes=t.get("alibi_slopes"),
            empty_lse=inf,
        )
        outs.append(out)
        lses.append(lse)
    results = {"out": torch.cat(outs)}
    if options.get("lse"):
        results["lse"] = torch.cat(lses)
    if options.get("append"):
        results |= {"k_cache": caches["k"], "v_cache": caches["v"]}
    return results


def _length(setting: Setting, sequence: int) -> int:
    lengths = setting.options["cache_seqlens"]
    return int(lengths[sequence] if isinstance(lengths, list) else lengths)


def _places(
    setting: Setting, sequence: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rows `first` to `last` of a sequence lie in the cache: indices of its first two dims."""
    import torch

    rows = torch.arange(first, last)
    options = setting.options
    if "block_table" in options:
        pages = torch.tensor(options["block_table"][sequence])
        return pages[rows // PAGE_ROWS], rows % PAGE_ROWS
    row = options["cache_batch_idx"][sequence] if "cache_batch_idx" in options else sequence
    return torch.full_like(rows, row), rows


def _turned(
    setting: Setting, t: Tensors, x: torch.Tensor, start: int, moving: bool
) -> torch.Tensor:
    """x (rows, heads, head_dim) turned by the tables' rows `start`, `start + 1` ... if `moving`, else
    all of it by row `start`."""
    import torch

    rows = start + torch.arange(len(x)) * int(moving)
    cos, sin = (t[name][rows].unsqueeze(1) for name in ("rotary_cos", "rotary_sin"))
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if setting.options["rotary"] == "interleaved":
        a, b = turned.reshape(*x.shape[:-1], half, 2).unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.reshape(*x.shape[:-1], 2, half).unbind(-2)
        pairs = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([pairs, rest], -1)


APPEND = {"append": True, "cache_seqlens": LENGTHS}
CAUSAL = {**APPEND, "causal": True}
ROTARY = {**CAUSAL, "rotary": "interleaved", "rotary_dim": 16}
PAGED_OPTIONS = {"append": True, "cache_seqlens": PAGED_LENGTHS, "block_table": BLOCK_TABLE}
IDX = {"cache_batch_idx": [7, 2, 5, 0, 3, 1]}
LEFTPAD = {"cache_leftpad": [3, 0, 11, 0, 5, 20]}

SETTINGS = (
    Setting("plain", BASE, options={"cache_seqlens": 23}, placements=ALL),
    Setting("seqlens", BASE, options={"cache_seqlens": LENGTHS}, placements=INDEPENDENT),
    Setting("append", BASE, options=APPEND, placements=INDEPENDENT),
    Setting("append_causal", BASE, options=CAUSAL, placements=CORE),
    Setting("one_query", ONE_QUERY, options=APPEND, placements=CORE),
    Setting("gqa", GQA, options=APPEND, placements=CORE),
    Setting("rotary", BASE, options=ROTARY, placements=CORE),
    Setting("paged", PAGED, options=PAGED_OPTIONS, placements=CORE),
    Setting("cache_batch_idx", BASE, options={**APPEND, **IDX}, placements=CORE),
    Setting("lse", BASE, options={**APPEND, "lse": True}, placements=CORE),
    Setting("bfloat16", BASE, "bfloat16", options=APPEND, placements=CORE),
    Setting("leftpad", BASE, options={**APPEND, **LEFTPAD}, level="full"),
    Setting("rotary_halves", BASE, options={**ROTARY, "rotary": "halves"}, level="full"),
    Setting(
        "rotary_part", {**BASE, "head_dim": 32}, options={**ROTARY, "causal": False}, level="full"
    ),
    Setting("rotary_window", BASE, options={**APPEND, **ROTARY, "window": [5, 3]}, level="full"),
    Setting("window", BASE, options={**APPEND, "window": [5, 3]}, level="full"),
    Setting("softcap", BASE, options={**APPEND, "softcap": 1.5}, level="full"),
    Setting("scale", BASE, options={**APPEND, "scale": 0.3}, level="full"),
    Setting("alibi", BASE, options={**APPEND, "alibi": True}, level="full"),
    Setting("num_splits", BASE, options={**APPEND, "num_splits": 3}, level="full"),
    Setting("head_dim_20", {**BASE, "head_dim": 20}, options=APPEND, level="full"),
    Setting("float16", BASE, "float16", options=APPEND, level="full"),
    Setting("gqa_one_query", {**GQA, "sequence": 1}, options=APPEND, level="full"),
    Setting("paged_causal", PAGED, options={**PAGED_OPTIONS, "causal": True}, level="full"),
    Setting(
        "paged_rotary",
        PAGED,
        options={**PAGED_OPTIONS, "causal": True, "rotary": "halves", "rotary_dim": 16},
        level="full",
    ),
)

PROBE = Probe(
    name="flash_attn_kvcache",
    summary="flash-attn 2: decoding with a cache of keys and values, also in pages",
    operators=(
        Operator(
            name="flash_attn_with_kvcache",
            tensors=tensors,
            call=call,
            reference=reference,
            settings=SETTINGS,
            output_dims=Q_DIMS,
            placements=ALL,
            packages=("flash-attn>=2.5.9",),
            standins=("flash_attn_2_cuda",),
            bypasses=("flash_attn_2_cuda",),
            function="flash_attn.flash_attn_with_kvcache",
        ),
    ),
)
