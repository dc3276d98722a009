"""Every private PyTorch name that attncheck touches, each guarded by capability, in one place.

Public names come from `torch.distributed.tensor` (2.5 on). Each guard says which version changed.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
)  # private name, 2.1 to 2.15
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils._pytree import tree_flatten

__all__ = [
    "AsyncCollectiveTensor",
    "call_on_ranks",
    "context_parallel_options",
    "context_parallel_tools",
    "each_rank",
    "find_overload",
    "forget_compiled",
    "group_size",
    "has_autograd",
    "has_decomposition",
    "has_own_kernel",
    "has_strategy",
    "higher_order_ops",
    "is_composite",
    "kernel_keys",
    "local_tensor",
    "map_ranks",
    "no_communication",
    "not_simulated",
    "on_rank",
    "op_name",
    "placement_from_text",
    "placement_text",
    "process_state",
    "quiet_exit",
    "refusal",
    "refusal_sentence",
    "refuses_decomposition",
    "registered_schemas",
    "rendezvous_store",
    "route_higher_order_ops",
    "schema_op_name",
    "simulated_group",
    "simulated_ranks",
    "unsimulated",
    "unwatched_propagation",
    "watch_alltoall",
]

# The wording is the same in 2.5 to 2.15.
_NO_STRATEGY = re.compile(r"Operator (\S+) does not have a sharding strategy registered")
# Python says "<op>: got mixed ...", the C++ fast path of 2.10 on "<op> got mixed ...".
_MIXED = re.compile(r"([\w.]+):? got mixed torch\.Tensor and DTensor")
# A higher-order op (flex_attention) has no strategy to register: DTensor needs a rule of its own for it.
_NO_RULE = re.compile(
    r"There was no rule registered for HOP (\w+) and subclass <class '[\w.]*DTensor'>"
)
# 2.10 on: whatever propagation raises is rewrapped with this tail; before, the cause came through bare.
_PROPAGATION = re.compile(r"Sharding propagation failed for ([\w.]+)")
# An op without a Meta kernel fails in propagation for the same want of a strategy (flash-attn 3).
_NO_META_CAUSES = ("UnsupportedOperatorException", "NotImplementedError")


def refusal(error: BaseException) -> tuple[str, str | None] | None:
    """What DTensor refused: (`strategy` | `mixed` | `propagation`, op name in the text if any), or None.

    `propagation` is an op whose strategy could not be asked because it cannot run on Meta tensors.
    """
    text = str(error)
    if match := _NO_STRATEGY.search(text):
        return "strategy", match[1]
    if match := _MIXED.search(text):
        return "mixed", match[1]
    if match := _NO_RULE.search(text):
        return "strategy", f"higher_order.{match[1]}"
    if _PROPAGATION.search(text):
        cause = error.__cause__
        while cause is not None:
            if type(cause).__name__ in _NO_META_CAUSES:
                return "propagation", None
            cause = cause.__cause__
    if _is_bare_propagation(error):
        return "propagation", None
    return None


def refusal_sentence(error: BaseException) -> str:
    """What DTensor says of the op it refuses, without what torch.compile puts around it."""
    text = str(error)
    for pattern in (_NO_STRATEGY, _MIXED, _NO_RULE):
        if match := pattern.search(text):
            # torch.compile quotes the exception it met as `got RuntimeError('...')`.
            return re.split(r"""["']\)|\n""", text[match.start() :], maxsplit=1)[0]
    # PyTorch's own first line is the op's name alone.
    failed = _PROPAGATION.search(text)
    if failed or _is_bare_propagation(error):
        return (
            f"Sharding propagation failed for {failed[1] if failed else text.strip()}: it has no Meta "
            "kernel, and DTensor runs an op on meta tensors before it asks for a sharding strategy"
        )
    return text.strip().split("\n", 1)[0]


def _is_bare_propagation(error: BaseException) -> bool:
    return type(error).__name__ == "UnsupportedOperatorException"  # as it came before 2.10


def op_name(func: Any) -> str:
    """A kernel op as PyTorch writes it: its path under `torch.ops`."""
    return str(func) if hasattr(func, "_schema") else f"higher_order.{func}"


def schema_op_name(schema: Any) -> str:
    """The same of a FunctionSchema: `flash_attn._flash_attn_forward.default`."""
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def placement_text(placement: Placement) -> str:
    """`R`, `S(1)`, `P(sum)`: as PyTorch prints them since 2.5; anything else as its repr."""
    if isinstance(placement, Replicate):
        return "R"
    if type(placement) is Shard:
        return f"S({placement.dim})"
    if isinstance(placement, Partial):
        return f"P({placement.reduce_op})"
    return str(placement)


def placement_from_text(text: str) -> Placement:
    """The inverse of `placement_text` for the three kinds a case may ask for."""
    if text == "R":
        return Replicate()
    if match := re.fullmatch(r"S\((\d+)\)", text):
        return Shard(int(match[1]))
    if match := re.fullmatch(r"P\((\w+)\)", text):
        return Partial(match[1])
    raise AssertionError(f"not a placement: {text}")


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """The rank's own shard, without autograd and without waiting for a collective."""
    return tensor._local_tensor


def group_size(group: Any) -> int:
    """Size of a process group given as a functional collective gets it.

    A name up to 2.12; 2.13 also passes the ProcessGroup itself.
    """
    if isinstance(group, str):
        import torch.distributed.distributed_c10d as c10d

        group = c10d._resolve_process_group(group)  # type: ignore[attr-defined,arg-type]
    return int(group.size())


@contextlib.contextmanager
def watch_alltoall(
    on_call: Callable[[torch.Tensor, int], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Calls `on_call(local_tensor, group_size)` around DTensor's shard-to-shard all-to-all.

    On gloo PyTorch emulates it by all-gather and chunk, so the dispatcher never sees the collective that
    was asked for. The function is imported by name into `placement_types`, hence the two patches. Where a
    version has neither, the emulation is counted as the all-gather it is.
    """
    import torch.distributed.tensor._collective_utils as utils
    import torch.distributed.tensor.placement_types as placement_types

    original = getattr(utils, "shard_dim_alltoall", None)
    if original is None:
        yield
        return

    def watched(
        input: torch.Tensor, gather_dim: int, shard_dim: int, mesh: Any, mesh_dim: int
    ) -> Any:
        with on_call(input, mesh.size(mesh_dim)):
            return original(input, gather_dim, shard_dim, mesh, mesh_dim)

    owners = [
        m for m in (utils, placement_types) if getattr(m, "shard_dim_alltoall", None) is original
    ]
    for owner in owners:
        setattr(owner, "shard_dim_alltoall", watched)
    try:
        yield
    finally:
        for owner in owners:
            setattr(owner, "shard_dim_alltoall", original)


class Communicates(Exception):
    """What was called under `no_communication` wanted its peers."""


# What waits for peers, of a process group (what `torch.distributed` calls) and in `_c10d_functional`.
_GROUP_METHODS = re.compile(
    r"(_?all_?|_?reduce|broadcast|gather|scatter|send|recv|barrier|monitored)"
)
_FUNCTIONAL = (
    "all_reduce",
    "all_reduce_",
    "all_reduce_coalesced",
    "all_gather_into_tensor",
    "all_gather_into_tensor_out",
    "all_gather_into_tensor_coalesced",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced",
    "all_to_all_single",
    "broadcast",
    "broadcast_",
)


@contextlib.contextmanager
def no_communication() -> Iterator[None]:
    """In here a collective that Python asks for raises `Communicates`: a rank that calls an op by itself
    would wait for its peers for ever. (An op whose compiled kernel communicates is not seen.)"""

    def refuse(*unused: Any, **unused_too: Any) -> Any:
        raise Communicates("it communicates, and cannot be asked by one rank")

    group: Any = dist.ProcessGroup
    methods = {n: f for n, f in vars(group).items() if _GROUP_METHODS.match(n)}
    ops = torch.ops._c10d_functional
    functions = {n: getattr(ops, n) for n in _FUNCTIONAL if hasattr(ops, n)}
    try:
        for name in methods:
            setattr(group, name, refuse)
        for name in functions:
            setattr(ops, name, refuse)
        yield
    finally:
        for name, method in methods.items():
            setattr(group, name, method)
        for name, function in functions.items():
            setattr(ops, name, function)


@contextlib.contextmanager
def unwatched_propagation() -> Iterator[None]:
    """Keeps dispatch modes off while DTensor searches decompositions for a strategy.

    The search (2.11 on) runs tens of thousands of ops on meta tensors: nothing there is communication or
    a kernel, and passing each through a mode of ours made it a quarter slower than it is for users.
    """
    try:
        from torch.distributed.tensor._decompositions import DecompShardingStrategy
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        yield
        return
    original = DecompShardingStrategy.propagate_strategy

    def unwatched(self: Any, op_schema: Any) -> Any:
        with _disable_current_modes():
            return original(self, op_schema)

    DecompShardingStrategy.propagate_strategy = unwatched  # type: ignore[method-assign]
    try:
        yield
    finally:
        DecompShardingStrategy.propagate_strategy = original  # type: ignore[method-assign]


def route_higher_order_ops(*modes: type) -> None:
    """Lets dispatch modes see the higher-order ops there are; each op raises under a mode without a rule.

    A mode gets the types of the tensors, as for any other op, and what returns NotImplemented goes on to
    DTensor's own rule with the mode still there. (Read in 2.6, 2.10 and 2.13. Of these, the later two also
    know `supports_higher_order_operators`, which takes the mode away before DTensor's rule runs.)
    """
    for op in higher_order_ops().values():
        for mode in modes:
            if mode not in op.python_key_table:
                op.py_impl(mode)(functools.partial(_through_mode, op))


def _through_mode(op: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, _ = tree_flatten((args, kwargs))
    types = {type(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    # torch.compile traces what a compiled function calls, this included, where it gave up on its own graph
    # (2.9; from 2.10 on it knows of modes that ignore its internals).
    untraced = torch.compiler.disable(mode.__torch_dispatch__)  # type: ignore[no-untyped-call]
    return untraced(op, types, args, kwargs)


# --- context_parallel ----------------------------------------------------------------------------


def context_parallel_tools() -> Any:
    """The module that holds `context_parallel`, `context_parallel_unshard` and `set_rotate_method`.

    A package from 2.10 on, a module before (2.6 to 2.9). Raises ImportError where there is neither.
    """
    try:
        from torch.distributed.tensor.experimental import _context_parallel as tools
    except ImportError:
        from torch.distributed.tensor.experimental import (  # type: ignore[no-redef]
            _attention as tools,
        )
    return tools


@contextlib.contextmanager
def context_parallel_options(load_balance: bool, rotate: str) -> Iterator[None]:
    """What `context_parallel` reads from a global of its own; afterwards it is as before.

    `load_balance` has no public switch (2.6 to 2.13). `rotate`: `allgather` or `alltoall`.
    """
    tools = context_parallel_tools()
    options = tools._cp_options
    before = options.enable_load_balance, options.rotate_method
    options.enable_load_balance = load_balance
    try:
        tools.set_rotate_method(rotate)
        yield
    finally:
        options.enable_load_balance, options.rotate_method = before


# --- what is registered --------------------------------------------------------------------------


def registered_schemas() -> list[Any]:
    """The FunctionSchema of every dispatcher op in this process (a private name)."""
    return list(torch._C._jit_get_all_schemas())


def higher_order_ops() -> dict[str, Any]:
    """Higher-order ops by name: no dispatcher table has them. {} where torch keeps no list of them."""
    try:
        from torch._ops import _higher_order_ops
    except ImportError:
        return {}
    return dict(_higher_order_ops)


def find_overload(name: str) -> Any:
    """The callable op of `flash_attn._flash_attn_forward.default`, or None."""
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.rpartition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    return getattr(packet, overload, None)


def kernel_keys(schema: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """On which of the dispatch `keys` the op can be called, through a kernel of its own or a default."""
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return tuple(key for key in keys if has(_dispatch_name(schema), key))


def has_own_kernel(schema: Any, key: str) -> bool:
    """Whether the op has a kernel for this dispatch `key` and no other."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_dispatch_name(schema), key))


def is_composite(schema: Any) -> bool:
    """Whether the op is made of others before any tensor subclass sees it."""
    return has_own_kernel(schema, "CompositeImplicitAutograd")


def has_autograd(schema: Any) -> bool:
    """Whether the op has an autograd formula. Without one PyTorch warns, and goes on with what comes."""
    keys = ("CompositeImplicitAutograd", "Autograd", "AutogradCPU", "AutogradCUDA")
    return any(has_own_kernel(schema, key) for key in keys)


def _dispatch_name(schema: Any) -> str:
    return str(schema.name) + (f".{schema.overload_name}" if schema.overload_name else "")


def has_strategy(op: Any) -> bool:
    """Whether DTensor has a strategy registered for an op.

    Tables come and go: `op_single_dim_strategy_funcs` came with 2.11, and nearly all strategies live there
    from 2.14 on. A higher-order op takes a `py_impl` instead.
    """
    if not hasattr(op, "_schema"):
        return DTensor in op.python_key_table
    propagator = DTensor._op_dispatcher.sharding_propagator
    tables = ("op_strategy_funcs", "op_single_dim_strategy_funcs", "op_to_rules")
    return any(op in getattr(propagator, table, {}) for table in tables)


def has_decomposition(op: Any) -> bool:
    """Whether DTensor would try the op's decomposition for want of a strategy (2.11 on; else False)."""
    search = getattr(DTensor._op_dispatcher.sharding_propagator, "decomp_strategy", None)
    return search is not None and bool(search.has_decomp(op))


def refuses_decomposition(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Why DTensor finds no strategy in the op's decomposition for this call, or ''. Tensors are replicated.

    Traces the decomposition once, on meta tensors, for the placement that always works if any does.
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._op_schema import OpSchema

    search = DTensor._op_dispatcher.sharding_propagator.decomp_strategy
    mesh = search._get_fake_mesh("cpu")

    def spec(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        meta = TensorMeta(value.shape, value.stride(), value.dtype)
        return DTensorSpec(mesh, (Replicate(),), tensor_meta=meta)

    specs = tuple(spec(a) for a in args)
    schema = OpSchema(op, specs, {key: spec(value) for key, value in kwargs.items()})
    replicated: Any = (Replicate(),) * len(specs)
    try:
        search._propagate_through_decomp(schema, replicated, mesh)
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


# --- simulated ranks -----------------------------------------------------------------------------
# `LocalTensorMode` (2.10 on): one tensor that holds the shards of all ranks, and runs every op on each.


def simulated_group(ranks: int) -> None:
    """A default process group of so many ranks that connects nobody: this process is rank 0 of it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


class RankAsked(Exception):
    """Code asked which rank it runs on, where it runs on all of them at once."""


@contextlib.contextmanager
def simulated_ranks(ranks: int) -> Iterator[None]:
    """In here an op on what `map_ranks` made runs once a rank; collectives pass values between the ranks."""
    import torch.distributed.distributed_c10d as c10d
    from torch.distributed._local_tensor import LocalTensorMode

    def asked(*_: Any, **__: Any) -> int:
        # It would get rank 0's answer, and go rank 0's way for all.
        raise RankAsked("the call asks for its rank (torch.distributed.get_rank)")

    original = c10d.get_rank
    owners = [m for m in (dist, c10d) if getattr(m, "get_rank", None) is original]
    with LocalTensorMode(ranks):
        for owner in owners:
            owner.get_rank = asked  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for owner in owners:
                owner.get_rank = original  # type: ignore[attr-defined]


def _simulation() -> Any:
    """The mode that simulates ranks just now, or None."""
    if "torch.distributed._local_tensor" not in sys.modules:
        return None
    from torch.distributed._local_tensor import local_tensor_mode

    return local_tensor_mode()


@contextlib.contextmanager
def unsimulated() -> Iterator[None]:
    """In here ops run once, on ordinary tensors: making a random tensor must not draw anew for each rank."""
    mode = _simulation()
    with contextlib.nullcontext() if mode is None else mode.disable():
        yield


def map_ranks(make: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """`make(rank)` of this process's rank or, where ranks are simulated, of each of them, held as one."""
    mode = _simulation()
    return make(dist.get_rank()) if mode is None else mode.rank_map(make)


def call_on_ranks(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func(*args, **kwargs)`, where ranks are simulated on each one's tensors in turn.

    The mode would do so too, but it refuses schemas that return what they write into (2.13: "Unsupported
    schema", in `return_and_correct_aliasing`, for flash-attn 3's op) and higher-order ops.
    """
    mode = _simulation()
    if mode is None:
        return func(*args, **kwargs)
    from torch.distributed._local_tensor import _for_each_rank_run_func

    with mode.disable():
        return _for_each_rank_run_func(func, mode.ranks, args, dict(kwargs), alias=False)


def each_rank(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all simulated ranks, in order; an ordinary tensor is the only one."""
    locals_ = getattr(tensor, "_local_tensors", None)
    return [tensor] if locals_ is None else [locals_[rank] for rank in sorted(locals_)]


def on_rank(value: Any, rank: int) -> Any:
    """The tensor, size or number that a simulated `rank` has for `value`; any other value as it is."""
    if "torch.distributed._local_tensor" not in sys.modules:
        return value
    from torch.distributed._local_tensor import LocalTensor

    if isinstance(value, LocalTensor):
        return value._local_tensors[rank]
    if isinstance(value, torch.SymInt):
        sizes = getattr(value.node, "_local_ints", None)
        return int(value) if sizes is None else sizes[rank]
    return value


# Where PyTorch's simulation says itself that it cannot go on.
_UNSIMULATED = re.compile(
    r"There was no rule registered for HOP \w+ and (?:mode|subclass) .*Local|LocalIntNode|LocalTensor"
    r"|ConstantIntNode|Cannot access data pointer of Tensor"
)


def not_simulated(error: BaseException) -> str:
    """Why the simulation gave up, or '' where the error is not of its making.

    Its own code raised, or another's did on what only a simulation has (sizes that differ by rank). What an
    op or a function raises on the tensors of one rank is that rank's own error, and would come with real
    ranks too.
    """
    if _simulation() is None:
        return ""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RankAsked):
            return f"{seen}, and simulated ranks run one program"
        if _raised_by_simulation(seen) or _UNSIMULATED.search(str(seen)):
            text = str(seen).strip().partition("\n")[0] or "no message"
            return f"PyTorch's LocalTensorMode stopped: {type(seen).__name__}: {text[:300]}"
        seen = seen.__cause__ or seen.__context__
    return ""


def _raised_by_simulation(error: BaseException) -> bool:
    files = []
    trace = error.__traceback__
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename.replace("\\", "/"))
        trace = trace.tb_next
    own = [i for i, file in enumerate(files) if "/torch/distributed/_local_tensor/" in file]
    # Beyond its last frame an op (torch/_ops.py) or a function of one rank runs, or a helper of its own.
    return bool(own) and all("/torch/utils/" in file for file in files[own[-1] + 1 :])


# --- processes -----------------------------------------------------------------------------------


def forget_compiled() -> None:
    """Start torch.compile afresh: what it met before (sizes that changed) decides what it does next."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the import takes a second
        torch.compiler.reset()


def process_state() -> dict[str, Any]:
    """What a call can leave changed for every call after it, by name; compare two with `==`.

    PyTorch's own `context_parallel` does: where entering it raises, `F.scaled_dot_product_attention` stays
    replaced (seen in 2.13, without numpy).
    """
    import torch.nn.functional as F
    from torch.backends import cuda, mha

    handlers = getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})
    state: dict[str, Any] = {
        "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
        "DTensor's op handlers": frozenset(str(op) for op in handlers),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "nn.MultiheadAttention's fast path": mha.get_fastpath_enabled(),
    }
    for backend in ("flash", "mem_efficient", "math", "cudnn"):
        name = f"{backend}_sdp_enabled"
        if hasattr(cuda, name):  # cuDNN's from 2.5 on
            state[f"torch.backends.cuda.{name}"] = getattr(cuda, name)()
    return state


def rendezvous_store(attempt: str) -> tuple[Any, int, int]:
    """(store, rank, world size) of a torchrun worker, with keys of its own for this `attempt`.

    torchrun keeps one store over restarts, and 2.13 no longer puts a prefix per attempt in front of its
    keys: gloo then reads the addresses of the dead processes and hangs, in about every second restart.
    """
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    prefixed = dist.PrefixStore(f"attncheck/{attempt}", store)  # type: ignore[attr-defined]
    return prefixed, rank, world


def quiet_exit(code: int) -> None:
    """Leave without tearing gloo down: destroying the group aborts in about one run in five (2.13)."""
    import os

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
