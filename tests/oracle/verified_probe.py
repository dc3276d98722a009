"""Built-in operators in the settings and placements in which they are right: the checker must stay silent.

An operator is here under one of two conditions. Its kernel ops have a strategy that was written by hand and
verified without DTensor (verified_strategies.py), registered while the operator runs and taken back after.
Or PyTorch's own strategies are right in these settings, or its ops are all of the plain kind that DTensor
knows. What PyTorch is known to get wrong, or refuses, is not here: that is what a scan is for.

Every setting comes in three dtypes, as `verified.<operator>`. The first setting of each operator comes once
more as `deep.<operator>` (`deep_forward.` where it is run forward alone), with one placement: that with most
rounding of its own, a partial sum where PyTorch makes one. That is what many seeds are spent on.

Sizes: 12 heads and 12 kv heads divide by 2, 3, 4 and 2 x 2 ranks, a batch of 7 divides by none of them and
leaves nobody empty. Operators of plain ops get a batch of 24: DTensor refuses to flatten an uneven shard.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from attncheck import plugins
from attncheck.probing import Operator, Probe, Setting, Tensor

sys.path.insert(0, str(Path(__file__).parent))  # a probe file is loaded by its path
from verified_strategies import registered

DTYPES = ("float32", "bfloat16", "float16")
SIZES = {"batch": 7, "heads": 12, "kv_heads": 12, "sequence": 10, "kv_sequence": 22, "head_dim": 16}
SQUARE = {**SIZES, "kv_sequence": 10}
GQA = {**SIZES, "heads": 24}
EVEN = {**SIZES, "batch": 24}
EVEN_SQUARE = {**EVEN, "kv_sequence": 10}
EVEN_EVERYWHERE = {
    **EVEN,
    "sequence": 36,
    "kv_sequence": 36,
}  # its projections flatten the sequence too
ODD_HEADS = {**SIZES, "batch": 9, "heads": 7, "kv_heads": 7}
LENGTHS = {"q_lengths": [7, 9, 10], "kv_lengths": [12, 9, 13]}
PACKED = {**SIZES, "batch": 3, "sequence": 26, "kv_sequence": 34}

INDEPENDENT = ("replicate", "batch", "heads")
CORE = ("replicate", "heads")
ONLY_HEADS = ("heads",)


# --- from the built-in probes ----------------------------------------------------------------------


def builtin(probe: str) -> dict[str, Operator]:
    loaded = plugins.load_probe_file(plugins.builtin_dir("probes") / f"{probe}.py")
    return {operator.name: operator for operator in loaded.operators}


SDPA = builtin("sdpa")
SDPA_CUDA = builtin("sdpa_cuda")
FLASH_ATTN = builtin("flash_attn")
VARLEN = builtin("varlen")
XFORMERS = builtin("xformers")
FALLBACK = builtin("fallback")
MERGED = builtin("merged_heads")
MHA = builtin("mha")


def setting(
    operator: Operator,
    name: str,
    placements: tuple[str, ...] = ONLY_HEADS,
    sizes: dict[str, int] | None = None,
    **options: object,
) -> Setting:
    """The built-in setting of that name with the sizes of this file, and more options."""
    found = next(s for s in operator.settings if s.name == name)
    return replace(
        found,
        sizes=SIZES if sizes is None else sizes,
        options={**found.options, **options},
        placements=placements,
        level="quick",
    )


def in_dtypes(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    return tuple(
        replace(s, name=f"{s.name}_{dtype}", dtype=dtype) for s in settings for dtype in DTYPES
    )


def verified(
    operator: Operator,
    settings: Sequence[Setting],
    strategies: Sequence[str] = (),
    forward_only: bool = False,
) -> Operator:
    """The operator under a name of its own, with strategies for these kernel ops while it runs."""
    return replace(
        operator,
        name=f"verified.{operator.name}",
        function=operator.function or operator.name,
        settings=in_dtypes(settings),
        tensors=partial(without_gradients, operator.tensors) if forward_only else operator.tensors,
        around=partial(around, operator.around, tuple(strategies))
        if strategies
        else operator.around,
        slow=False,
    )


def without_gradients(
    tensors: Callable[[Setting], tuple[Tensor, ...]], setting: Setting
) -> tuple[Tensor, ...]:
    return tuple(replace(tensor, requires_grad=False) for tensor in tensors(setting))


@contextmanager
def around(
    outer: Callable[[], AbstractContextManager[object]] | None, strategies: tuple[str, ...]
) -> Iterator[None]:
    with registered(*strategies):
        if outer is None:
            yield
            return
        with outer():
            yield


# --- with strategies written by hand ---------------------------------------------------------------


def dispatched(name: str) -> Operator:
    """F.scaled_dot_product_attention as it is called on a CPU."""
    sdpa = SDPA[name]
    settings = (
        setting(sdpa, "plain", INDEPENDENT),
        setting(sdpa, "causal", INDEPENDENT, SQUARE),
        setting(sdpa, "causal_cross"),
        setting(sdpa, "gqa", INDEPENDENT, GQA),
        setting(sdpa, "gqa_causal", ONLY_HEADS, {**GQA, "kv_sequence": 10}),
        setting(sdpa, "scale"),
        setting(sdpa, "uneven_heads", ONLY_HEADS, ODD_HEADS),
        setting(sdpa, "float_mask_sharded", INDEPENDENT),
        setting(sdpa, "bool_mask_replicated_bcast_both", INDEPENDENT),
    )
    if name != "sdpa":  # one of the two has them all
        settings = settings[:4]
    return verified(sdpa, settings, sdpa.kernel_ops)


def raw() -> Iterator[Operator]:
    flash = SDPA_CUDA["sdpa_cuda.raw_flash"]
    yield verified(
        flash,
        (
            setting(flash, "plain", INDEPENDENT),
            setting(flash, "causal_bottom_right"),
            setting(flash, "gqa", INDEPENDENT, GQA),
            setting(flash, "window"),
            setting(flash, "varlen", CORE, PACKED, **LENGTHS),
        ),
        flash.kernel_ops,
    )
    efficient = SDPA_CUDA["sdpa_cuda.raw_efficient"]
    yield verified(
        efficient,
        (
            setting(efficient, "plain", INDEPENDENT),
            setting(efficient, "causal"),
            setting(efficient, "causal_bottom_right"),
            setting(efficient, "bias_grad", INDEPENDENT),
            replace(
                setting(efficient, "bias_grad", INDEPENDENT, bias_broadcast="heads"),
                name="bias_grad_bcast_heads",
            ),
            setting(efficient, "varlen", CORE, PACKED, **LENGTHS),
        ),
        efficient.kernel_ops,
    )
    cudnn = SDPA_CUDA["sdpa_cuda.raw_cudnn"]
    yield verified(
        cudnn,
        (
            setting(cudnn, "plain", INDEPENDENT),
            setting(cudnn, "causal", ONLY_HEADS, SQUARE),
            setting(cudnn, "gqa", INDEPENDENT, GQA),
            setting(cudnn, "bias_sharded", INDEPENDENT),
            setting(cudnn, "varlen", CORE, PACKED, **LENGTHS),
        ),
        cudnn.kernel_ops,
    )
    out_of_tree = SDPA_CUDA["sdpa_cuda.overrideable"]
    yield verified(
        out_of_tree,
        (
            setting(out_of_tree, "plain", INDEPENDENT),
            setting(out_of_tree, "causal", ONLY_HEADS, SQUARE),
            setting(out_of_tree, "gqa", INDEPENDENT, GQA),
            setting(out_of_tree, "bias_grad", INDEPENDENT),
        ),
        out_of_tree.kernel_ops,
    )


def torch_varlen() -> Iterator[Operator]:
    attn = VARLEN["varlen_attn"]
    yield verified(
        attn,
        (
            setting(attn, "plain", CORE, PACKED, **LENGTHS),
            setting(attn, "causal", ONLY_HEADS, PACKED, **LENGTHS),
            setting(attn, "gqa", ONLY_HEADS, {**PACKED, "heads": 24}, **LENGTHS),
            setting(attn, "window", ONLY_HEADS, PACKED, **LENGTHS),
            setting(attn, "lse", ONLY_HEADS, PACKED, **LENGTHS),
            setting(attn, "uneven_heads", ONLY_HEADS, {**PACKED, "heads": 7, "kv_heads": 7}),
        ),
        attn.kernel_ops,
    )
    out = VARLEN["varlen_attn_out"]
    yield verified(
        out,
        (
            setting(out, "plain", CORE, PACKED, **LENGTHS),
            setting(out, "causal", ONLY_HEADS, PACKED, **LENGTHS),
        ),
        out.kernel_ops,
    )


def flash_attn() -> Iterator[Operator]:
    dense = FLASH_ATTN["flash_attn_func"]
    yield verified(
        dense,
        (
            setting(dense, "plain", INDEPENDENT),
            setting(dense, "causal", INDEPENDENT),
            setting(dense, "gqa", INDEPENDENT, GQA),
            setting(dense, "window"),
            setting(dense, "softcap"),
            setting(dense, "alibi", INDEPENDENT),
            setting(dense, "head_dim_20", ONLY_HEADS, {**SIZES, "head_dim": 20}),
            setting(dense, "attn_probs"),
            setting(dense, "uneven_heads", ONLY_HEADS, ODD_HEADS),
        ),
        dense.kernel_ops,
    )
    varlen = FLASH_ATTN["flash_attn_varlen_func"]
    yield verified(
        varlen,
        (
            setting(varlen, "plain", CORE, PACKED, **LENGTHS),
            setting(varlen, "causal", ONLY_HEADS, PACKED, **LENGTHS),
            setting(varlen, "gqa", ONLY_HEADS, {**PACKED, "heads": 24}, **LENGTHS),
            setting(varlen, "attn_probs", ONLY_HEADS, PACKED, **LENGTHS),
            setting(varlen, "alibi", ONLY_HEADS, PACKED, **LENGTHS),
        ),
        varlen.kernel_ops,
    )
    # Forward alone: in backward flash-attn makes the packed gradient an ordinary tensor, whatever strategy
    # there is.
    for name, sizes in (
        ("flash_attn_qkvpacked_func", SQUARE),
        ("flash_attn_kvpacked_func", SIZES),
        ("flash_attn_varlen_qkvpacked_func", {**PACKED, "kv_sequence": 26}),
        ("flash_attn_varlen_kvpacked_func", PACKED),
    ):
        packed = FLASH_ATTN[name]
        where = CORE if "varlen" in name else INDEPENDENT
        yield verified(
            packed,
            (setting(packed, "plain", where, sizes), setting(packed, "causal", ONLY_HEADS, sizes)),
            packed.kernel_ops,
            forward_only=True,
        )


def xformers() -> Iterator[Operator]:
    # Forward alone: in backward xformers makes the random state an ordinary tensor, which DTensor refuses.
    cutlass = XFORMERS["xformers.cutlass"]
    yield verified(
        cutlass,
        (setting(cutlass, "plain", INDEPENDENT), setting(cutlass, "causal")),
        cutlass.kernel_ops[:1],
        forward_only=True,
    )


# --- as PyTorch has them ---------------------------------------------------------------------------


def own_strategies() -> Iterator[Operator]:
    """The ops of CUDA's F.scaled_dot_product_attention, where PyTorch's own strategies are right."""
    flash = SDPA_CUDA["sdpa_cuda.flash"]
    yield verified(
        flash,
        (
            setting(flash, "plain", (*INDEPENDENT, "sequence", "head_dim")),
            setting(flash, "causal", INDEPENDENT, SQUARE),
            setting(flash, "gqa", INDEPENDENT, GQA),
            setting(flash, "scale"),
        ),
    )
    efficient = SDPA_CUDA["sdpa_cuda.efficient"]
    yield verified(
        efficient,
        (
            setting(efficient, "plain", (*INDEPENDENT, "sequence")),
            setting(efficient, "causal", ONLY_HEADS, SQUARE),
            setting(efficient, "bias_sharded", INDEPENDENT),
        ),
    )
    cudnn = SDPA_CUDA["sdpa_cuda.cudnn"]
    yield verified(
        cudnn,
        (
            setting(cudnn, "plain", (*INDEPENDENT, "sequence")),
            setting(cudnn, "causal", ONLY_HEADS, SQUARE),
        ),
    )


def plain_ops() -> Iterator[Operator]:
    """Operators made of ops that DTensor knows: nothing is registered."""
    everywhere = (*INDEPENDENT, "sequence", "query", "head_dim", "partial")
    for form in FALLBACK.values():
        yield verified(form, (setting(form, "plain", everywhere, EVEN),))
    math = SDPA["sdpa[MATH]"]
    yield verified(
        math,
        (
            setting(math, "plain", everywhere, EVEN),
            setting(math, "gqa", INDEPENDENT, {**EVEN, "heads": 24}),
            setting(math, "float_mask_replicated", ONLY_HEADS, EVEN),
        ),
    )
    for name in ("merged_heads.sdpa[MATH]", "merged_heads.fused_qkv"):
        merged = MERGED[name]
        sizes = EVEN_SQUARE if "fused" in name else EVEN
        yield verified(merged, (setting(merged, "plain", (*INDEPENDENT, "sequence"), sizes),))
    merged = MERGED["merged_heads.sdpa"]
    yield verified(
        merged,
        (setting(merged, "causal", INDEPENDENT, SQUARE),),
        SDPA["sdpa"].kernel_ops,
    )
    attention = MHA["nn.MultiheadAttention"]
    yield verified(
        attention,
        (
            setting(attention, "train", ("replicate", "batch", "sequence"), EVEN_EVERYWHERE),
            setting(attention, "train_no_weights_math", ("replicate", "batch"), EVEN_SQUARE),
            setting(attention, "train_cross", ("batch",), EVEN),
        ),
    )
    layer = MHA["nn.TransformerEncoderLayer"]
    yield verified(layer, (setting(layer, "train_math", ("replicate", "batch"), EVEN_SQUARE),))


def deep(operator: Operator) -> Operator:
    """Its first setting in each dtype, at one placement."""
    name = operator.name.removeprefix("verified.")
    first = operator.settings[: len(DTYPES)]
    placements = first[0].placements or operator.placements
    hardest = next(p for p in ("partial", "head_dim", "heads", "batch") if p in placements)
    forward_only = not any(t.requires_grad for t in operator.tensors(first[0]))
    return replace(
        operator,
        name=f"{'deep_forward' if forward_only else 'deep'}.{name}",
        settings=tuple(replace(s, placements=(hardest,)) for s in first),
    )


OPERATORS = (
    dispatched("sdpa"),
    dispatched("sdpa[FLASH_ATTENTION]"),
    *raw(),
    *torch_varlen(),
    *flash_attn(),
    *xformers(),
    *own_strategies(),
    *plain_ops(),
)

PROBE = Probe(
    name="verified",
    summary="built-in operators where they are right: hand-verified strategies, or PyTorch's own",
    operators=(*OPERATORS, *map(deep, OPERATORS)),
)
