"""Sharding strategies written by hand for the attention ops that have none in PyTorch. Torch-free to import.

A strategy is a table: which role each dim of each tensor argument and result plays. Attention never mixes
two batch rows, nor two groups of heads; so a call on a part of the batch, or on whole groups of heads, gives
that part of every result, and the table says where the part lies in each of them. Three rows follow:

- replicate: everything whole;
- batch: each tensor sharded on its batch dim, the others (cumulative lengths, random state) whole;
- heads: each tensor sharded on its heads dim, offered only where no group of query heads is torn from its
  key and value head: equally many of both, or both divisible by the number of ranks.

A result that a row shards where the argument broadcasts (the gradient of a bias with a dim of size 1) is a
partial sum. Rows that leave a rank without rows are not offered: kernels have died of empty shards.

Verified without DTensor, in test_verified_strategies.py: every call that the settings of verified_probe.py
make to these ops is recorded on whole tensors, cut as each row says, computed piece by piece on plain
tensors, put together again, and compared with the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BATCH, HEADS, KV_HEADS, OTHER = "batch", "heads", "kv_heads", "-"
PATTERNS = {"replicate": (), "batch": (BATCH,), "heads": (HEADS, KV_HEADS)}

Dims = tuple[str, ...]


def dims(text: str) -> Dims:
    """`b h - -` for (batch, heads, any, any); g is kv_heads. '' is a tensor that is always whole."""
    names = {"b": BATCH, "h": HEADS, "g": KV_HEADS, "-": OTHER}
    return tuple(names[letter] for letter in text.split())


@dataclass(frozen=True)
class Table:
    """The roles of an op's dims.

    `arguments` by name as in the schema; a tensor that is not named is whole. `results` in order, None for
    one that is no tensor or undefined. `scalar_results`: how many results are integers (DTensor gives them
    no placement). `buffers`: arguments that the op writes, with the roles of their dims.
    """

    op: str
    arguments: Mapping[str, Dims]
    results: tuple[Dims | None, ...]
    buffers: Mapping[str, Dims] = field(default_factory=dict)


def _table(
    op: str, arguments: str, results: Sequence[str | None], buffers: str = ""
) -> tuple[str, Table]:
    def parse(text: str) -> dict[str, Dims]:
        pairs = (entry.partition(":") for entry in text.split(",") if entry.strip())
        return {name.strip(): dims(roles) for name, _, roles in pairs}

    made = tuple(None if r is None else dims(r) for r in results)
    return op, Table(op, parse(arguments), made, parse(buffers))


# q, k, v and what has their layouts.
_BHSD = "query: b h - -, key: b g - -, value: b g - -"
_BSHD = "query: b - h -, key: b - g -, value: b - g -"
_THD = "query: - h -, key: - g -, value: - g -"
_FLASH_QKV = "q: b - h -, k: b - g -, v: b - g -"
_FLASH_THD = "q: - h -, k: - g -, v: - g -"

TABLES: dict[str, Table] = dict(
    (
        # F.scaled_dot_product_attention on a CPU: log-sum-exp (batch, heads, sequence).
        _table(
            "aten._scaled_dot_product_flash_attention_for_cpu.default",
            f"{_BHSD}, attn_mask: b h - -",
            ("b h - -", "b h -"),
        ),
        _table(
            "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
            f"grad_out: b h - -, {_BHSD}, out: b h - -, logsumexp: b h -, attn_mask: b h - -",
            ("b h - -", "b g - -", "b g - -"),
        ),
        # What out-of-tree devices override: nine results, of which two are lengths.
        _table(
            "aten._scaled_dot_product_fused_attention_overrideable.default",
            f"{_BHSD}, attn_bias: b h - -",
            ("b h - -", "b h -", None, None, None, None, "", "", None),
        ),
        _table(
            "aten._scaled_dot_product_fused_attention_overrideable_backward.default",
            f"grad_out: b h - -, {_BHSD}, attn_bias: b h - -, out: b h - -, logsumexp: b h -",
            ("b h - -", "b g - -", "b g - -", "b h - -"),
        ),
        # The raw kernels; their packed forms are other tables of the same ops, see PACKED.
        _table(
            "aten._flash_attention_forward.default",
            _BSHD,
            ("b - h -", "b h -", "", "", ""),
        ),
        _table(
            "aten._flash_attention_backward.default",
            f"grad_out: b - h -, {_BSHD}, out: b - h -, logsumexp: b h -",
            ("b - h -", "b - g -", "b - g -"),
        ),
        _table(
            "aten._efficient_attention_forward.default",
            f"{_BSHD}, bias: b h - -",
            ("b - h -", "b h -", "", "", None, None),
        ),
        _table(
            "aten._efficient_attention_backward.default",
            f"grad_out_: b - h -, {_BSHD}, bias: b h - -, out: b - h -, logsumexp: b h -",
            ("b - h -", "b - g -", "b - g -", "b h - -"),
        ),
        _table(
            "aten._cudnn_attention_forward.default",
            f"{_BHSD}, attn_bias: b h - -",
            ("b h - -", "b h - -", "", "", None, None, "", "", None),
        ),
        _table(
            "aten._cudnn_attention_backward.default",
            f"grad_out: b h - -, {_BHSD}, out: b h - -, logsumexp: b h - -, attn_bias: b h - -",
            ("b h - -", "b g - -", "b g - -"),
        ),
        # torch.nn.attention.varlen: packed tokens, log-sum-exp (heads, tokens).
        _table("torch_attn._varlen_attn.default", _THD, ("- h -", "h -", "")),
        _table(
            "torch_attn._varlen_attn_backward.default",
            f"grad_out: - h -, {_THD}, out: - h -, lse: h -",
            ("- h -", "- g -", "- g -"),
        ),
        _table(
            "torch_attn._varlen_attn_out.default",
            _THD,
            ("h -",),
            buffers="out: - h -",
        ),
        # flash-attn 2.7 and later. Gradients go into buffers that the caller made with the placements of
        # q, k and v: DTensor must not move them, so these rows are for q, k and v placed alike.
        _table(
            "flash_attn._flash_attn_forward.default",
            f"{_FLASH_QKV}, alibi_slopes: h",
            ("b - h -", "b h -", "", ""),
        ),
        _table(
            "flash_attn._flash_attn_backward.default",
            f"dout: b - h -, {_FLASH_QKV}, out: b - h -, softmax_lse: b h -, alibi_slopes: h",
            ("b h -",),
            buffers="dq: b - h -, dk: b - g -, dv: b - g -",
        ),
        _table(
            "flash_attn._flash_attn_varlen_forward.default",
            f"{_FLASH_THD}, alibi_slopes: h",
            ("- h -", "h -", "", ""),
        ),
        _table(
            "flash_attn._flash_attn_varlen_backward.default",
            f"dout: - h -, {_FLASH_THD}, out: - h -, softmax_lse: h -, alibi_slopes: h",
            ("h -",),
            buffers="dq: - h -, dk: - g -, dv: - g -",
        ),
    )
)

# The same ops with `cu_seqlens`: the tokens of all sequences lie in one dim, and the batch is gone. The
# efficient kernel keeps a batch of one, and counts sequences in its log-sum-exp: (sequences, heads, longest).
PACKED: dict[str, Table] = dict(
    (
        _table("aten._flash_attention_forward.default", _THD, ("- h -", "h -", "", "", "")),
        _table(
            "aten._flash_attention_backward.default",
            f"grad_out: - h -, {_THD}, out: - h -, logsumexp: h -",
            ("- h -", "- g -", "- g -"),
        ),
        _table(
            "aten._efficient_attention_forward.default",
            "query: - - h -, key: - - g -, value: - - g -",
            ("- - h -", "- h -", "", "", None, None),
        ),
        _table(
            "aten._efficient_attention_backward.default",
            "grad_out_: - - h -, query: - - h -, key: - - g -, value: - - g -, out: - - h -, "
            "logsumexp: - h -",
            ("- - h -", "- - g -", "- - g -", None),
        ),
        _table(
            "aten._cudnn_attention_forward.default",
            _THD,
            ("- h -", "- h -", "", "", None, None, "", "", None),
        ),
        _table(
            "aten._cudnn_attention_backward.default",
            f"grad_out: - h -, {_THD}, out: - h -, logsumexp: - h -",
            ("- h -", "- g -", "- g -"),
        ),
    )
)

_STARTS = ("cum_seq_q", "cu_seqlens_q")
QUERY, KEY = ("query", "q"), ("key", "k")


@dataclass(frozen=True)
class Row:
    """One way to cut a call: the placement of each tensor, as the dim it is sharded on, None (whole) or
    `sum` (partial). `results` has no entry (None in `absent`) where a result is no tensor."""

    pattern: str
    arguments: dict[str, int | None]
    results: tuple[int | str | None, ...]
    absent: tuple[bool, ...]


def rows(
    op: str,
    shapes: Mapping[str, Sequence[int]],
    ranks: int,
    undefined: Sequence[int] = (),
) -> list[Row]:
    """The rows of a call whose tensor arguments have these `shapes` (by name), on so many `ranks`.

    `undefined`: results that this call does not make (the gradient of a bias that needs none).
    """
    packed = op in PACKED and any(len(shapes.get(name, ())) for name in _STARTS)
    table = (PACKED if packed else TABLES)[op]
    roles = {**table.arguments, **table.buffers}
    out = []
    for pattern, sharded in PATTERNS.items():
        if not _fits(pattern, roles, shapes, ranks):
            continue
        placed = {
            name: _dim_of(sharded, roles.get(name, ()), shape) for name, shape in shapes.items()
        }
        results: list[int | str | None] = []
        for result in table.results:
            results.append(None if result is None else _dim_of(sharded, result, None))
        _partial_bias(op, placed, shapes, pattern, results)
        absent = tuple(r is None or at in undefined for at, r in enumerate(table.results))
        out.append(Row(pattern, placed, tuple(results), absent))
    return out


def _dim_of(sharded: Sequence[str], roles: Dims, shape: Sequence[int] | None) -> int | None:
    """The dim with one of these roles; one of size 1 broadcasts, and stays whole."""
    for at, role in enumerate(roles):
        if role in sharded and (shape is None or shape[at] != 1):
            return at
    return None


def _partial_bias(
    op: str,
    placed: Mapping[str, int | None],
    shapes: Mapping[str, Sequence[int]],
    pattern: str,
    results: list[int | str | None],
) -> None:
    """The fourth result of these backwards is the gradient of the bias: a sum where the bias broadcasts."""
    name = {"_efficient_attention_backward": "bias", "overrideable_backward": "attn_bias"}
    bias = next((arg for ending, arg in name.items() if ending in op), None)
    if bias is None or len(results) != 4 or bias not in shapes:
        return
    at = placed[bias]
    results[3] = at if at is not None or pattern == "replicate" else "sum"


def _fits(
    pattern: str, roles: Mapping[str, Dims], shapes: Mapping[str, Sequence[int]], ranks: int
) -> bool:
    """Whether every rank gets something, and no group of heads is torn."""
    if pattern == "replicate":
        return True
    if pattern == "batch":
        batch = _size(BATCH, QUERY, roles, shapes)
        return batch is not None and _all_filled(batch, ranks)
    heads, kv_heads = _size(HEADS, QUERY, roles, shapes), _size(KV_HEADS, KEY, roles, shapes)
    if heads is None or kv_heads is None:
        return False
    if heads == kv_heads:
        return _all_filled(heads, ranks)
    return heads % ranks == 0 and kv_heads % ranks == 0


def _size(
    role: str, names: Sequence[str], roles: Mapping[str, Dims], shapes: Mapping[str, Sequence[int]]
) -> int | None:
    """The size of the dim with this role in the argument that goes by one of these names, if any."""
    name = next(name for name in names if name in shapes)
    return shapes[name][roles[name].index(role)] if role in roles[name] else None


def _all_filled(size: int, ranks: int) -> bool:
    """Whether torch.chunk leaves no rank empty."""
    return -(-size // ranks) * (ranks - 1) < size


# --- registering them with DTensor -----------------------------------------------------------------

_TABLES_OF_PROPAGATOR = (
    "op_strategy_funcs",
    "op_to_schema_info",
    "op_single_dim_strategy_funcs",
    "op_to_schema_info_for_single_dim_strategy",
    "op_to_rules",
)


def strategy(op: Any) -> Callable[..., Any]:
    """What `register_sharding` takes for this op (an overload)."""
    name = str(op)

    def choose(*args: Any, **kwargs: Any) -> Any:
        from torch.distributed.tensor import Partial, Replicate, Shard
        from torch.distributed.tensor._dtensor_spec import DTensorSpec

        def placement(at: int | str | None) -> Any:
            if at is None:
                return Replicate()
            return Partial("sum") if at == "sum" else Shard(at)

        names = [argument.name for argument in op._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        specs = {key: value for key, value in given.items() if isinstance(value, DTensorSpec)}
        shapes = {key: tuple(value.shape) for key, value in specs.items()}
        ranks = next(iter(specs.values())).mesh.size()
        out = []
        for row in rows(name, shapes, ranks, _undefined(name, given)):
            outputs = [
                None if absent else placement(at)
                for at, absent in zip(row.results, row.absent, strict=True)
            ]
            # One entry per argument as it was passed: tensors have a placement, the rest has none.
            positional = names[: len(args)]
            inputs = [
                placement(row.arguments[key]) if key in specs else None
                for key in (*positional, *kwargs)
            ]
            out.append((outputs, inputs))
        return out

    return choose


def _undefined(op: str, given: Mapping[str, Any]) -> tuple[int, ...]:
    """Results of this call that are no tensors: gradients nobody asked for, lengths nobody passed."""
    if op == "aten._efficient_attention_backward.default":
        return () if given["bias_requires_grad"] else (3,)
    if op == "aten._scaled_dot_product_fused_attention_overrideable_backward.default":
        return () if given["grad_input_mask"][3] else (3,)
    if op == "aten._cudnn_attention_forward.default":
        return () if given["cum_seq_q"] is not None else (2, 3)
    return ()


@contextmanager
def registered(*names: str) -> Iterator[None]:
    """While it holds, DTensor has these strategies; afterwards it is as before (FACTS.md: how)."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    from attncheck.runner import compat

    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = [getattr(propagator, name, {}) for name in _TABLES_OF_PROPAGATOR]
    ops = []
    for name in names:
        op = compat.find_overload(name)
        if op is None:
            raise ImportError(f"no op {name}")
        ops.append(op)
    saved = [{op: table.pop(op) for op in ops if op in table} for table in tables]
    for op in ops:
        register_sharding(op)(strategy(op))
        # Everything behind the first tensors enters the cache key, flags included.
        first = next(
            at
            for at, argument in enumerate(op._schema.arguments)
            if str(argument.type) not in ("Tensor", "Optional[Tensor]")
        )
        keywords = [argument.name for argument in op._schema.arguments if argument.kwarg_only]
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(
            first, keywords or None, needs_pytree=True
        )
    _forget(propagator)
    try:
        yield
    finally:
        for table, before in zip(tables, saved, strict=True):
            for op in ops:
                table.pop(op, None)
            table.update(before)
        _forget(propagator)


def _forget(propagator: Any) -> None:
    """Clear what was propagated before: the Python cache and, from 2.10 on, the one in C++."""
    import torch

    cached = propagator.propagate_op_sharding
    (cached if hasattr(cached, "cache_clear") else cached.cache).cache_clear()
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:
        clear()
