"""What attncheck runs of a model's attention calls: settings of its probes, at a size that a few ranks take.

Operators are known here by name, as a user names them; what each can express is in one table. The settings
place each tensor themselves, and run on the reduced mesh that they come with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attncheck.errors import UserError, unknown
from attncheck.models.data import Call, Model
from attncheck.models.dividing import (
    RING,
    TENSOR,
    ULYSSES,
    HeadsDivision,
    Verdict,
    divide_heads,
    divide_sequence,
)
from attncheck.models.reducing import reduce, reduce_length
from attncheck.probing import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    KV_SEQUENCE,
    SEQUENCE,
    Setting,
)

# The axes of a mesh, in the order in which they split a tensor dim: what tp leaves of the heads, cp splits
# under Ulysses. PyTorch's `context_parallel` takes the last.
AXES = ("dp", "tp", "cp")
# Beside the ways of `dividing`: q, k and v as DTensors that are split over the sequence, and nothing more.
SEQUENCE_SHARDED = "sequence"

BATCH_SIZE = 6
HEAD_DIM_AT_MOST = 64
TOKENS = 48  # near enough to what probes take; two parts each for 2, 3, 4, 6 and 8 ranks
OTHER_TOKENS = 40  # of keys and values where they are another sequence's
WINDOW = 7
SOFTCAP = 1.5  # scores of random numbers are near 1: a softcap of 50 would change none of them


@dataclass(frozen=True)
class _Form:
    """What an operator's probe can express.

    `dims`: the roles of q's. `masks`: the options that say a mask, by its kind. `grouped`: fewer heads of
    keys and values than of queries. `packed`: sequences one behind the other. `ring`: it communicates
    itself, over the cp axis. `probe_lacks`: what is not there is missing in the probe, not in the operator.
    `needs`: the distribution that it is in.
    """

    dims: tuple[str, ...]
    masks: Mapping[str, Mapping[str, object]]
    grouped: bool = True
    softcap: bool = False
    scale: bool = True
    packed: bool = False
    ring: bool = False
    probe_lacks: bool = False
    needs: str = ""


_BHSD = (BATCH, HEADS, SEQUENCE, HEAD_DIM)
_BSHD = (BATCH, SEQUENCE, HEADS, HEAD_DIM)
_PACKED = (SEQUENCE, HEADS, HEAD_DIM)
_CAUSAL = {"causal": True}
_WINDOW = {"causal": True, "window": [WINDOW - 1, 0]}
# A mask of (batch, 1, queries, keys) that the model makes itself, as an ordinary tensor.
_PLAIN_MASK = {"mask": "bool", "mask_as": "plain", "mask_broadcast": "heads"}
_PLAIN_BIAS = {"bias": "plain"}
_SDPA: Mapping[str, Mapping[str, object]] = {
    "none": {},
    "causal": _CAUSAL,
    "window": _PLAIN_MASK,
    "chunked": _PLAIN_MASK,
    "padding": _PLAIN_MASK,
}
_FLASH: Mapping[str, Mapping[str, object]] = {"none": {}, "causal": _CAUSAL, "window": _WINDOW}
_VARLEN: Mapping[str, Mapping[str, object]] = {**_FLASH, "padding": {}, "chunked": _CAUSAL}

FORMS: Mapping[str, _Form] = {
    "sdpa[MATH]": _Form(_BHSD, _SDPA),
    "sdpa": _Form(_BHSD, _SDPA),
    "sdpa_cuda.flash": _Form(_BHSD, {"none": {}, "causal": {"causal": "top_left"}}),
    "sdpa_cuda.efficient": _Form(
        _BHSD,
        {
            "none": {},
            "causal": {"causal": "top_left"},
            "window": _PLAIN_BIAS,
            "chunked": _PLAIN_BIAS,
            "padding": _PLAIN_BIAS,
        },
        grouped=False,
    ),
    "flash_attn_func": _Form(_BSHD, _FLASH, softcap=True, needs="flash-attn"),
    "flash_attn_varlen_func": _Form(
        _PACKED, _VARLEN, softcap=True, packed=True, needs="flash-attn"
    ),
    "flash_attn_3.custom_op": _Form(_BSHD, _FLASH, softcap=True),
    "varlen_attn": _Form(_PACKED, {**_VARLEN, "window": {"window": [WINDOW - 1, 0]}}, packed=True),
    "flex_attention": _Form(
        _BHSD,
        {"none": {}, "causal": _CAUSAL, "window": {"window": [WINDOW - 1, 0]}},
        probe_lacks=True,
    ),
    "fallback.matmul": _Form(_BHSD, {"none": {}}, grouped=False, scale=False, probe_lacks=True),
    "fallback.einsum": _Form(_BSHD, {"none": {}}, grouped=False, scale=False, probe_lacks=True),
    "context_parallel[FLASH_ATTENTION]": _Form(
        _BHSD,
        {"none": {"load_balance": "off"}, "causal": _CAUSAL},
        scale=False,
        ring=True,
        probe_lacks=True,
    ),
}
OPERATORS = tuple(FORMS)


@dataclass(frozen=True)
class PlannedCall:
    """One operator in one way for one of a model's attention calls.

    `call`: the call's name; `way`: `tensor`, `ulysses`, `ring` (PyTorch's own), or `sequence` (DTensors that
    are split over the sequence: of q alone where keys are another sequence's). `setting` is run on `mesh`,
    None where nothing can be, and `why` says why. `notes`: what the small setting stands for, or leaves out.
    `needs`: a distribution to provide (`--with`), empty for none.
    """

    model: str
    call: str
    way: str
    operator: str
    mesh: Mapping[str, int]
    setting: Setting | None = None
    why: str = ""
    notes: tuple[str, ...] = ()
    needs: str = ""


def reduced_mesh(mesh: Mapping[str, int], ranks: int = 4) -> dict[str, int]:
    """The mesh that a few ranks can be: each axis of more than one rank gets 2, in the order of `AXES`; dp,
    which splits what no attention mixes, is left out where that would be more than `ranks`.

    Raises UserError for other axes than dp, cp and tp, sizes below 1, and too few ranks for what remains.

    >>> reduced_mesh({"dp": 2, "cp": 4, "tp": 8}), reduced_mesh({"tp": 8})
    ({'tp': 2, 'cp': 2}, {'tp': 2})
    """
    for axis, size in mesh.items():
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES)
        if size < 1:
            raise UserError(f"Mesh axis {axis} has {size} ranks; expected 1 or more.")
    axes = [axis for axis in AXES if mesh.get(axis, 1) > 1] or ["tp"]
    if len(axes) > 1 and 2 ** len(axes) > ranks:
        axes = [axis for axis in axes if axis != "dp"]
    if 2 ** len(axes) > ranks:
        raise UserError(
            f"{ranks} ranks are too few for the axes {', '.join(axes)}; expected {2 ** len(axes)} or more."
        )
    return dict.fromkeys(axes, 2)


def settings(
    model: Model,
    mesh: Mapping[str, int],
    operators: Sequence[str] = OPERATORS,
    ranks: int = 4,
    dtype: str = "float32",
) -> tuple[PlannedCall, ...]:
    """What to run of a model that is deployed on `mesh` (sizes of dp, cp and tp; each may be missing).

    One entry for each attention call, way and operator, whether or not it can be run. All have one mesh, of
    at most `ranks` ranks. Raises UserError for unknown operators, and as `reduced_mesh`.
    """
    for operator in operators:
        if operator not in FORMS:
            raise unknown("operator", operator, FORMS)
    small = reduced_mesh(mesh, ranks)
    return tuple(
        _planned(model, call, way, operator, mesh, small, dtype)
        for call in model.calls
        for way in _ways(call, mesh)
        for operator in operators
        if (way == RING) == FORMS[operator].ring
    )


def by_operator(planned: Sequence[PlannedCall]) -> dict[str, tuple[Setting, ...]]:
    """The settings to run, as a scan takes them: further ones of each operator."""
    found: dict[str, list[Setting]] = {}
    for one in planned:
        if one.setting is not None:
            found.setdefault(one.operator, []).append(one.setting)
    return {operator: tuple(some) for operator, some in found.items()}


def _ways(call: Call, mesh: Mapping[str, int]) -> tuple[str, ...]:
    if mesh.get("cp", 1) == 1:
        return (TENSOR,)
    if call.kind == "cross":
        return (SEQUENCE_SHARDED,)
    return (ULYSSES, SEQUENCE_SHARDED, RING)


def _planned(
    model: Model,
    call: Call,
    way: str,
    operator: str,
    mesh: Mapping[str, int],
    small: Mapping[str, int],
    dtype: str,
) -> PlannedCall:
    form = FORMS[operator]
    head_axes = ("tp", "cp") if way == ULYSSES else ("tp",)
    heads = divide_heads(call.heads, call.kv_heads, tuple(mesh.get(a, 1) for a in head_axes))
    why = _refusal(call, form, operator) or _impossible(call, way, heads, mesh.get("cp", 1))
    if why:
        return PlannedCall(model.name, call.name, way, operator, small, why=why, needs=form.needs)
    sizes = _sizes(call, form, head_axes, mesh, small)
    options = dict(form.masks[call.mask])
    if call.softcap:
        options["softcap"] = SOFTCAP
    if call.scale:
        options["scale"] = call.scale * math.sqrt(call.head_dim / sizes[HEAD_DIM])
    if form.packed:
        options["q_lengths"], options["kv_lengths"] = _lengths(call, sizes)
    setting = Setting(
        name=f"{model.name}.{call.name}.{way}",
        sizes=sizes,
        dtype=dtype,
        options=options,
        explicit=_explicit(call, way, form, heads, small),
    )
    notes = (
        *_size_notes(call, sizes, head_axes, mesh, small),
        *_notes(call, way, form, heads, mesh, small),
    )
    return PlannedCall(
        model.name, call.name, way, operator, small, setting, notes=notes, needs=form.needs
    )


def _impossible(call: Call, way: str, heads: HeadsDivision, cp: int) -> str:
    """Why some rank would have nothing to do, or ''."""
    if heads.verdict is Verdict.IMPOSSIBLE:
        return heads.why
    verdict, why, _ = divide_sequence(call, way, cp)
    return why if verdict is Verdict.IMPOSSIBLE else ""


def _refusal(call: Call, form: _Form, operator: str) -> str:
    """Why an operator cannot express a call, or ''."""
    it = f"the probe of {operator}" if form.probe_lacks else operator
    if call.sinks:
        return f"{it} has no sinks: a learned number for each head that joins its softmax"
    if call.mask not in form.masks:
        return f"{it} has no {_MASK_NAMES[call.mask]}"
    if call.softcap and not form.softcap:
        return f"{it} has no softcap, which bounds this call's scores"
    if call.scale and not form.scale:
        return f"{it} scales by the root of head_dim alone"
    if call.kv_heads < call.heads and not form.grouped:
        return f"{it} wants as many heads of keys and values as of queries"
    return ""


_MASK_NAMES = {
    "none": "call without a mask",
    "causal": "causal mask",
    "window": "window",
    "chunked": "mask that is causal within chunks",
    "padding": "mask for padding",
}


# --- sizes ---------------------------------------------------------------------------------------


def _sizes(
    call: Call,
    form: _Form,
    head_axes: Sequence[str],
    mesh: Mapping[str, int],
    small: Mapping[str, int],
) -> dict[str, int]:
    """By role; `head_axes` are the mesh axes that split heads."""
    degree = math.prod(mesh.get(axis, 1) for axis in head_axes)
    few = math.prod(small.get(axis, 1) for axis in head_axes)
    heads, kv_heads = reduce(call.heads, call.kv_heads, degree, few if degree > 1 else 1)
    cp = mesh.get("cp", 1)
    length = call.sequence or 2 * cp  # where it depends on the request, one that divides
    tokens = reduce_length(length, cp, small.get("cp", 1), TOKENS)
    return {
        BATCH: 1 if form.packed else BATCH_SIZE,
        HEADS: heads,
        KV_HEADS: kv_heads,
        SEQUENCE: tokens,
        KV_SEQUENCE: OTHER_TOKENS if call.kind == "cross" else tokens,
        HEAD_DIM: min(call.head_dim, HEAD_DIM_AT_MOST),
    }


def _size_notes(
    call: Call,
    sizes: Mapping[str, int],
    head_axes: Sequence[str],
    mesh: Mapping[str, int],
    small: Mapping[str, int],
) -> Iterator[str]:
    degree = math.prod(mesh.get(axis, 1) for axis in head_axes)
    few = math.prod(small.get(axis, 1) for axis in head_axes)
    here, there = f"{sizes[HEADS]} heads", f"{call.heads}"
    if call.kv_heads < call.heads:
        here += f" and {sizes[KV_HEADS]} of keys and values"
        there += f" and {call.kv_heads}"
    if degree == 1:
        yield f"{here} stand for {there}, which nothing splits"
    else:
        yield f"{here} on {few} ranks stand for {there} on {degree}"
    if sizes[HEAD_DIM] < call.head_dim:
        yield f"head_dim {sizes[HEAD_DIM]} stands for {call.head_dim}"
    if call.v_head_dim:
        yield (
            f"its probe has one head_dim: that values are {call.v_head_dim} wide and keys "
            f"{call.head_dim} is left out"
        )


def _lengths(call: Call, sizes: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Of packed sequences: one and its padding, where there is any; chunks; or two requests. No split of the
    tokens into two goes between them."""
    tokens, others = sizes[SEQUENCE], sizes[KV_SEQUENCE]
    if call.mask == "padding":
        return [tokens - 5, 5], [others - 5, 5]
    if call.mask == "chunked":
        lengths = [16, 16, tokens - 32]
        return lengths, lengths
    last = 17 if call.kind == "cross" else 19
    return [tokens - 19, 19], [others - last, last]


# --- placements ----------------------------------------------------------------------------------


def _explicit(
    call: Call, way: str, form: _Form, heads: HeadsDivision, small: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Where q, k and v lie, axis by axis. Heads of keys and values that several ranks must hold are whole."""

    def place(axis: str, keys: bool) -> str:
        role = ""
        if axis == "dp":
            role = BATCH
        elif axis == "tp" or way == ULYSSES:
            role = "" if keys and heads.copies > 1 else HEADS
        elif way == SEQUENCE_SHARDED:
            role = "" if keys and call.kind == "cross" else SEQUENCE
        return f"S({form.dims.index(role)})" if role in form.dims else "R"

    q = tuple(place(axis, keys=False) for axis in small)
    kv = tuple(place(axis, keys=True) for axis in small)
    return {"q": q, "k": kv, "v": kv}


def _notes(
    call: Call,
    way: str,
    form: _Form,
    heads: HeadsDivision,
    mesh: Mapping[str, int],
    small: Mapping[str, int],
) -> Iterator[str]:
    if heads.copies > 1 and call.kv_heads > 1:
        yield (
            f"each of {call.kv_heads} heads of keys and values is on {heads.copies} ranks; here one is on all"
        )
    if form.masks[call.mask] in (_PLAIN_MASK, _PLAIN_BIAS):
        yield f"a random mask that is an ordinary tensor stands for its {_MASK_NAMES[call.mask]}"
    elif call.mask == "window":
        yield f"a window of {WINDOW} keys stands for {call.window}"
    if call.softcap:
        yield f"a softcap of {SOFTCAP:g} stands for {call.softcap:g}, which random scores do not come near"
    if mesh.get("dp", 1) > 1:
        if "dp" not in small:
            yield "dp is left out: it splits the batch, which attention does not mix"
        elif form.packed:
            yield "packed sequences have no batch dim for dp to split"
    if way == RING and call.mask == "none":
        yield "without load balancing, which PyTorch's ring has for causal masks alone"
