"""PyTorch's history as far as attncheck leans on it: what changed between which releases, and what did not.

`GUARDS` and `LASTING` are data. Each entry names the place in attncheck that leans on it and says what the
Python sources of torch must look like; `test_installed_torch.py` asks the installed torch, and
`pytest -m versions` (`test_releases.py`) the sources of all releases from 2.6 to 2.15.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# By minor version, the last release of each.
RELEASES = {
    "2.6": "2.6.0",
    "2.7": "2.7.1",
    "2.8": "2.8.0",
    "2.9": "2.9.1",
    "2.10": "2.10.0",
    "2.11": "2.11.0",
    "2.12": "2.12.1",
    "2.13": "2.13.0",
    "2.14": "2.14.1",
    "2.15": "2.15.0",
}


def minor(version: str) -> tuple[int, int]:
    """(2, 10) of `2.10.0+cpu`."""
    major, second = version.split(".")[:2]
    return int(major), int(second)


class Source:
    """The Python sources of one torch: `folder` is its package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def text(self, path: str) -> str:
        """'' where there is no such file."""
        file = self.folder / path
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    @functools.cache  # noqa: B019  (a handful of them live as long as the tests)
    def tree(self, path: str) -> ast.Module:
        return ast.parse(self.text(path))

    @functools.cache  # noqa: B019
    def strings(self, path: str) -> tuple[str, ...]:
        return tuple(_strings(self.tree(path)))

    def find(self, path: str, name: str) -> Iterator[ast.AST]:
        """What defines `Class.method`, `function` or `NAME` in a file, `self.NAME = ...` included."""
        return _find(self.tree(path), name.split("."))


def _find(inside: ast.AST, names: list[str]) -> Iterator[ast.AST]:
    for node in ast.walk(inside) if isinstance(inside, ast.ClassDef) else _statements(inside):
        if names[0] in _defined(node):
            if len(names) == 1:
                yield node
            else:
                yield from _find(node, names[1:])


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, and what lies below an `if` or `try` of it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _statements(child)


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [t.attr if isinstance(t, ast.Attribute) else t.id for t in targets if hasattr(t, "ctx")
            and isinstance(t, (ast.Attribute, ast.Name))]  # fmt: skip


# --- what can be asked of sources -----------------------------------------------------------------


class Check(Protocol):
    def __call__(self, source: Source) -> bool: ...


@dataclass(frozen=True)
class Exists:
    """There is such a file."""

    path: str

    def __call__(self, source: Source) -> bool:
        return (source.folder / self.path).exists()


@dataclass(frozen=True)
class Defines:
    """The file defines these names, or imports them: `function`, `Class.method`, `Class.attribute`."""

    path: str
    names: tuple[str, ...]

    def __call__(self, source: Source) -> bool:
        return all(any(source.find(self.path, name)) for name in self.names)


@dataclass(frozen=True)
class IsClass:
    path: str
    name: str

    def __call__(self, source: Source) -> bool:
        return any(isinstance(n, ast.ClassDef) for n in source.find(self.path, self.name))


@dataclass(frozen=True)
class Takes:
    """These are the first parameters of a function, keyword-only ones included."""

    path: str
    name: str
    parameters: tuple[str, ...]

    def __call__(self, source: Source) -> bool:
        for node in source.find(self.path, self.name):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = tuple(argument.arg for argument in given)
                return names[: len(self.parameters)] == self.parameters
        return False


@dataclass(frozen=True)
class Accepts:
    """These are among the parameters of a function."""

    path: str
    name: str
    parameters: tuple[str, ...]

    def __call__(self, source: Source) -> bool:
        for node in source.find(self.path, self.name):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if {argument.arg for argument in given}.issuperset(self.parameters):
                    return True
        return False


@dataclass(frozen=True)
class Reads:
    """The code of a function or class, in the way `ast.unparse` writes it, has this in it."""

    path: str
    name: str
    code: str

    def __call__(self, source: Source) -> bool:
        return any(self.code in ast.unparse(node) for node in source.find(self.path, self.name))


@dataclass(frozen=True)
class Says:
    """A string of the file is or holds this text; `{}` stands for what an f-string fills in."""

    path: str
    text: str

    def __call__(self, source: Source) -> bool:
        return any(self.text in said for said in source.strings(self.path))


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@dataclass(frozen=True)
class Stubs:
    """The stub of `torch._C`, or another, knows these functions: what C++ binds."""

    names: tuple[str, ...]
    path: str = "_C/__init__.pyi"

    def __call__(self, source: Source) -> bool:
        text = source.text(self.path)
        return all(re.search(rf"^def {name}\(", text, re.M) for name in self.names)


@dataclass(frozen=True)
class Both:
    checks: tuple[Check, ...]

    def __call__(self, source: Source) -> bool:
        return all(check(source) for check in self.checks)


@dataclass(frozen=True)
class Without:
    """The negation of a check."""

    check: Check

    def __call__(self, source: Source) -> bool:
        return not self.check(source)


# --- the history ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """`where` attncheck tells two versions apart: `changed` came with `since`, right after `before`.

    `new` holds of every release from `since` on and of none before; `old`, by default its negation, the
    other way round. `names`: the private names that it accounts for.
    """

    where: str
    changed: str
    before: str
    since: str
    new: Check
    old: Check | None = None
    names: tuple[str, ...] = ()

    def holds(self, source: Source, version: str) -> bool:
        """Whether the sources are as the guard assumes of that version."""
        old = self.old or Without(self.new)
        if minor(version) >= minor(self.since):
            return self.new(source) and not old(source)
        return old(source) and not self.new(source)


@dataclass(frozen=True)
class Lasting:
    """What is the same in all releases, from `since` on, and `where` attncheck leans on it."""

    where: str
    what: str
    check: Check
    names: tuple[str, ...] = ()
    since: str = "2.6"

    def holds(self, source: Source, version: str) -> bool:
        """Whether the sources are so, where that is claimed of the version."""
        return minor(version) < minor(self.since) or self.check(source)


_TENSOR = "distributed/tensor"
_DISPATCH = f"{_TENSOR}/_dispatch.py"
_PROP = f"{_TENSOR}/_sharding_prop.py"
_DECOMP = f"{_TENSOR}/_decompositions.py"
_SCHEMA = f"{_TENSOR}/_op_schema.py"
_PLACEMENTS = f"{_TENSOR}/placement_types.py"
_COLLECTIVE_UTILS = f"{_TENSOR}/_collective_utils.py"
_FUNCOL = "distributed/_functional_collectives.py"
_C10D = "distributed/distributed_c10d.py"
_MODES = "utils/_python_dispatch.py"
_OPS = "_ops.py"
_LOCAL = "distributed/_local_tensor/__init__.py"
_FAKE_PG = "testing/_internal/distributed/fake_pg.py"
_PROPAGATE = "ShardingPropagator.propagate_op_sharding_non_cached"
_SEARCH = "DecompShardingStrategy.propagate_strategy"
_TRACE = "DecompShardingStrategy._propagate_through_decomp"

GUARDS: tuple[Guard, ...] = (
    # error texts
    Guard(
        "runner.compat.refusals.refusal",
        "DTensor's dispatch moved to C++, which says `<op> got mixed` where Python said `<op>: got mixed`",
        "2.9",
        "2.10",
        new=Without(Defines(_DISPATCH, ("OpDispatcher.dispatch",))),
    ),
    Guard(
        "runner.compat.refusals.refusal",
        "what propagation raises is wrapped in `Sharding propagation failed for`",
        "2.8",
        "2.9",
        new=Says(_DISPATCH, "Sharding propagation failed for {}"),
    ),
    Guard(
        "runner.compat.refusals.error_text",
        "that wrapping repeats the text of its cause",
        "2.9",
        "2.10",
        new=Says(_DISPATCH, "{}\n\nSharding propagation failed for {}"),
    ),
    Guard(
        "runner.compat.placements.placement_text",
        "a Partial prints its reduction: `P(sum)` instead of `P`",
        "2.9",
        "2.10",
        old=Reads(_PLACEMENTS, "Partial.__str__", "return 'P'"),
        new=Reads(_PLACEMENTS, "Partial.__str__", "return f'P({self.reduce_op})'"),
    ),
    # collectives
    Guard(
        "runner.compat.communication.group_size",
        "a functional collective may be given the ProcessGroup itself, not its name alone",
        "2.11",
        "2.12",
        old=Reads(_FUNCOL, "all_reduce", "group_name = _resolve_group_name(group, tag)"),
        new=Reads(_FUNCOL, "all_reduce", "_group_or_group_name(group)"),
    ),
    Guard(
        "runner.compat.communication.WAITS",
        "several collectives can be waited for in one op",
        "2.14",
        "2.15",
        new=Says(_FUNCOL, "_c10d_functional::wait_tensors"),
    ),
    # the search in decompositions
    Guard(
        "runner.compat.modes.unwatched_propagation",
        "DTensor looks for a strategy in the op's decomposition",
        "2.10",
        "2.11",
        new=Both(
            (Exists(_DECOMP), Defines(_DECOMP, (_SEARCH, "DecompShardingStrategy.has_decomp")))
        ),
        names=("_decompositions",),
    ),
    Guard(
        "runner.compat.strategies.refuses_decomposition",
        "the search is an object of the propagator's, not functions that are handed the propagator",
        "2.11",
        "2.12",
        old=Without(Defines(_PROP, ("ShardingPropagator.decomp_strategy",))),
        new=Both(
            (
                Defines(_PROP, ("ShardingPropagator.decomp_strategy",)),
                Takes(_DECOMP, _SEARCH, ("self", "op_schema")),
                Takes(_DECOMP, _TRACE, ("self", "op_schema", "placement", "mesh")),
            )
        ),
        names=("_propagate_through_decomp",),
    ),
    Guard(
        "runner.compat.modes.unwatched_propagation",
        "the search is also given the shapes of the results",
        "2.13",
        "2.14",
        new=Takes(_DECOMP, _SEARCH, ("self", "op_schema", "output_tensor_meta")),
    ),
    # where strategies are registered
    Guard(
        "runner.compat.strategies.has_strategy",
        "strategies of a single mesh dim have tables of their own",
        "2.10",
        "2.11",
        new=Defines(
            _PROP,
            (
                "ShardingPropagator.op_single_dim_strategy_funcs",
                "ShardingPropagator.op_to_schema_info_for_single_dim_strategy",
            ),
        ),
    ),
    Guard(
        "fixes.strategies.install",
        "a strategy of a single mesh dim goes before one that `register_sharding` puts beside it",
        "2.10",
        "2.11",
        new=Reads(_PROP, _PROPAGATE, "if single_dim_strategy_info is not None:"),
    ),
    Guard(
        "fixes.strategies.Strategy",
        "a strategy is called with the schema alone; before, the mesh came first",
        "2.6",
        "2.7",
        old=Reads(_PROP, _PROPAGATE, "self.op_strategy_funcs[op_schema.op](mesh, strategy_schema)"),
        new=Without(Reads(_PROP, _PROPAGATE, "(mesh, strategy_schema)")),
    ),
    Guard(
        "fixes.strategies.answers",
        "no tensor is looked for among the arguments, to tell the mesh, before a strategy is called",
        "2.6",
        "2.7",
        old=Reads(
            _PROP,
            _PROPAGATE,
            "mesh = try_find_mesh_from_args(op_schema.op, op_schema.args_schema)\n        args_op_strategy",
        ),
        new=Reads(_PROP, _PROPAGATE, "strategy_schema = self._wrap_with_op_strategy(op_schema)"),
    ),
    Guard(
        "fixes.strategies.Strategy",
        "`PlacementStrategy` is `OpSpec`",
        "2.7",
        "2.8",
        old=IsClass(_SCHEMA, "PlacementStrategy"),
        new=IsClass(_SCHEMA, "OpSpec"),
    ),
    Guard(
        "fixes.strategies.forget_propagated",
        "the Python cache is cleared by its own method, not by that of the `lru_cache` inside it",
        "2.9",
        "2.10",
        new=Defines(_PROP, ("LocalLRUCache.cache_clear",)),
    ),
    Guard(
        "fixes.strategies.forget_propagated",
        "there is a second cache of propagated shardings, in C++",
        "2.9",
        "2.10",
        new=Stubs(("_clear_DTensor_sharding_propagator_cache",)),
        names=("_clear_DTensor_sharding_propagator_cache",),
    ),
    # dispatch modes
    Guard(
        "runner.observe.Observer",
        "torch.compile asks a mode whether to compile under it; before, it ran eagerly under every one",
        "2.8",
        "2.9",
        new=Defines(_MODES, ("TorchDispatchMode.ignore_compile_internals",)),
    ),
    Guard(
        "runner.compat.modes.route_higher_order_ops",
        "a mode may say that it takes higher-order ops, without a rule for each",
        "2.8",
        "2.9",
        new=Defines(_MODES, ("TorchDispatchMode.supports_higher_order_operators",)),
    ),
    # context_parallel
    Guard(
        "runner.compat.context_parallel.context_parallel_tools",
        "context_parallel's module `_attention` is a package `_context_parallel`",
        "2.9",
        "2.10",
        old=Defines(
            f"{_TENSOR}/experimental/_attention.py",
            (
                "_cp_options",
                "_ContextParallelOptions.enable_load_balance",
                "_ContextParallelOptions.rotate_method",
                "context_parallel",
                "context_parallel_unshard",
                "set_rotate_method",
            ),
        ),
        new=Both(
            (
                Defines(
                    f"{_TENSOR}/experimental/_context_parallel/__init__.py",
                    (
                        "_cp_options",
                        "context_parallel",
                        "context_parallel_unshard",
                        "set_rotate_method",
                    ),
                ),
                Defines(
                    f"{_TENSOR}/experimental/_context_parallel/_attention.py",
                    (
                        "_ContextParallelOptions.enable_load_balance",
                        "_ContextParallelOptions.rotate_method",
                    ),
                ),
            )
        ),
        names=("_context_parallel", "_attention", "_cp_options"),
    ),
    # simulated ranks
    Guard(
        "runner.compat.simulation.simulated_ranks",
        "LocalTensorMode simulates ranks (`attncheck.environment.simulates_ranks` looks for the file)",
        "2.9",
        "2.10",
        new=Defines(
            _LOCAL,
            (
                "LocalTensorMode.rank_map",
                "LocalTensorMode.disable",
                "LocalTensorMode.ranks",
                "local_tensor_mode",
                "LocalTensor",
                "LocalIntNode._local_ints",
            ),
        ),
        names=("_local_tensor", "_local_ints", "_local_tensors"),
    ),
    Guard(
        "runner.compat.simulation.simulated_ranks",
        "LocalTensorMode puts a `get_rank` of its own in place, whenever it is switched on",
        "2.13",
        "2.14",
        new=Both(
            (
                Reads(_LOCAL, "_PATCHED_DIST_FUNCTIONS", "('get_rank',)"),
                Reads(
                    _LOCAL, "LocalTensorMode._patch_dist", "for name in _PATCHED_DIST_FUNCTIONS:"
                ),
            )
        ),
        names=("_PATCHED_DIST_FUNCTIONS",),
    ),
    Guard(
        "runner.compat.simulation.simulated_group",
        "the fake group's store comes from C++, under the same name",
        "2.13",
        "2.14",
        old=IsClass(_FAKE_PG, "FakeStore"),
        new=Both((Defines(_FAKE_PG, ("FakeStore",)), Without(IsClass(_FAKE_PG, "FakeStore")))),
        names=("_internal",),
    ),
    # stand-ins
    Guard(
        "standins.aten_flash.forward",
        "flash attention returns its random state as one tensor of two; before, as two scalars",
        "2.6",
        "2.7",
        new=Reads(
            "_meta_registrations.py",
            "meta__scaled_dot_product_flash_attention",
            "torch.empty(2, dtype=torch.uint64",
        ),
    ),
    Guard(
        "standins.varlen_attn.provide",
        "torch.nn.attention.varlen",
        "2.9",
        "2.10",
        new=Exists("nn/attention/varlen.py"),
    ),
    Guard(
        "standins.varlen_attn.forward_out",
        "`varlen_attn_out` writes into the caller's output",
        "2.11",
        "2.12",
        new=Defines("nn/attention/varlen.py", ("varlen_attn_out",)),
    ),
    Guard(
        "runner.compat.fake_collectives.fake_collectives",
        "collectives that write into their output can be called on fake tensors",
        "2.10",
        "2.11",
        new=Defines("distributed/_meta_registrations.py", ("_META_FUNCTIONS",)),
    ),
    Guard(
        "runner.compat.fake_collectives.fake_collectives",
        "what they need for that is in a module of the memory tracker's",
        "2.6",
        "2.7",
        new=Exists("distributed/_tools/fake_collectives.py"),
        names=("_tools",),
    ),
)

LASTING: tuple[Lasting, ...] = (
    Lasting(
        "runner.compat.refusals.refusal",
        "the text of a missing strategy",
        Says(_PROP, "Operator {} does not have a sharding strategy registered."),
    ),
    Lasting(
        "runner.compat.refusals.refusal",
        "the text of mixed tensors, where Python says it",
        Says(_DISPATCH, "{}: got mixed torch.Tensor and DTensor, need to convert all"),
    ),
    Lasting(
        "runner.compat.refusals.refusal",
        "the text of a higher-order op without a rule",
        Says(_OPS, "There was no rule registered for HOP {} and subclass {}. "),
    ),
    Lasting(
        "runner.compat.refusals.refusal",
        "an op without a Meta kernel raises UnsupportedOperatorException",
        Defines("_subclasses/fake_tensor.py", ("UnsupportedOperatorException",)),
    ),
    Lasting(
        "runner.compat.placements.local_tensor",
        "a DTensor holds its shard and its spec under these names",
        Defines(f"{_TENSOR}/_api.py", ("DTensor._local_tensor", "DTensor._spec")),
        names=("_local_tensor", "_spec"),
    ),
    Lasting(
        "runner.compat.placements.storage_id",
        "the address of a storage's C++ object",
        Reads("storage.py", "TypedStorage._cdata", "self._untyped_storage._cdata"),
        names=("_cdata",),
    ),
    Lasting(
        "runner.compat.communication.AsyncCollectiveTensor",
        "what a functional collective returns until it is waited for",
        Defines(_FUNCOL, ("AsyncCollectiveTensor.wait",)),
        names=("_functional_collectives",),
    ),
    Lasting(
        "runner.compat.communication.group_size",
        "a group by its name",
        Defines(_C10D, ("_resolve_process_group",)),
        names=("_resolve_process_group",),
    ),
    Lasting(
        "runner.compat.communication.watch_alltoall",
        "DTensor's all-to-all of shards, and that `placement_types` imports it by name",
        Both(
            (
                Takes(
                    _COLLECTIVE_UTILS,
                    "shard_dim_alltoall",
                    ("input", "gather_dim", "shard_dim", "mesh", "mesh_dim"),
                ),
                Reads(_COLLECTIVE_UTILS, "shard_dim_alltoall", "funcol.all_gather_"),
                Defines(_PLACEMENTS, ("shard_dim_alltoall",)),
            )
        ),
        names=("_collective_utils",),
    ),
    Lasting(
        "runner.compat.communication.rendezvous_store",
        "torchrun's store has no prefix per attempt",
        Without(Reads("distributed/rendezvous.py", "_create_c10d_store", "PrefixStore")),
    ),
    Lasting(
        "runner.compat.modes.TorchDispatchMode",
        "dispatch modes, and how to keep them all off",
        Defines(_MODES, ("TorchDispatchMode", "_disable_current_modes")),
        names=("_python_dispatch", "_disable_current_modes"),
    ),
    Lasting(
        "runner.compat.modes.tree_flatten",
        "trees of arguments",
        Defines("utils/_pytree.py", ("tree_flatten", "tree_leaves", "tree_map", "tree_unflatten")),
        names=("_pytree",),
    ),
    Lasting(
        "runner.compat.modes.fake_mode",
        "fake tensors",
        Both(
            (
                Accepts(
                    "_subclasses/fake_tensor.py",
                    "FakeTensorMode.__init__",
                    ("allow_non_fake_inputs",),
                ),
                Accepts("_subclasses/fake_tensor.py", "FakeTensorMode.from_tensor", ("tensor",)),
            )
        ),
        names=("_subclasses",),
    ),
    Lasting(
        "runner.compat.modes.route_higher_order_ops",
        "rules of a higher-order op for a type of mode or tensor",
        Both(
            (
                Defines(_OPS, ("OperatorBase.python_key_table", "HigherOrderOperator.py_impl")),
                Reads(_OPS, "HigherOrderOperator", "if type(curr_mode) in self.python_key_table"),
            )
        ),
    ),
    Lasting(
        "runner.compat.ops.higher_order_ops",
        "the list of higher-order ops",
        Defines(_OPS, ("_higher_order_ops",)),
        names=("_higher_order_ops",),
    ),
    Lasting(
        "runner.compat.ops.schema_of",
        "an op's schema, and packets of ops",
        Defines(_OPS, ("OpOverload._schema", "OpOverloadPacket")),
        names=("_ops", "_schema"),
    ),
    Lasting(
        "runner.compat.ops.registered_schemas",
        "what is registered with the dispatcher",
        Stubs(
            (
                "_jit_get_all_schemas",
                "_dispatch_has_computed_kernel_for_dispatch_key",
                "_dispatch_has_kernel_for_dispatch_key",
            )
        ),
        names=(
            "_C",
            "_jit_get_all_schemas",
            "_dispatch_has_computed_kernel_for_dispatch_key",
            "_dispatch_has_kernel_for_dispatch_key",
        ),
    ),
    Lasting(
        "runner.compat.strategies.has_strategy",
        "the tables of strategies for whole meshes and of rules",
        Both(
            (
                Defines(f"{_TENSOR}/_api.py", ("DTensor._op_dispatcher",)),
                Defines(_DISPATCH, ("OpDispatcher.sharding_propagator",)),
                Defines(
                    _PROP,
                    (
                        "ShardingPropagator.op_strategy_funcs",
                        "ShardingPropagator.op_to_schema_info",
                        "ShardingPropagator.op_to_rules",
                    ),
                ),
            )
        ),
        names=("_op_dispatcher",),
    ),
    Lasting(
        "runner.compat.strategies.refuses_decomposition",
        "a mesh of one rank without a process group",
        Accepts("distributed/device_mesh.py", "DeviceMesh.__init__", ("_init_backend", "_rank")),
        names=("_init_backend", "_rank"),
        since="2.11",
    ),
    Lasting(
        "runner.compat.strategies.refuses_decomposition",
        "how a call is described to the search",
        Both(
            (
                Defines(f"{_TENSOR}/_dtensor_spec.py", ("DTensorSpec", "TensorMeta")),
                Defines(_SCHEMA, ("OpSchema",)),
            )
        ),
        names=("_dtensor_spec", "_op_schema"),
    ),
    Lasting(
        "runner.compat.simulation.call_on_ranks",
        "a function run once a simulated rank",
        Takes(_LOCAL, "_for_each_rank_run_func", ("func", "ranks", "args", "kwargs", "alias")),
        names=("_for_each_rank_run_func",),
        since="2.10",
    ),
    Lasting(
        "runner.compat.simulation.call_on_ranks",
        "the mode refuses a schema that returns what it writes into beside something else",
        Says(_MODES, "Unsupported schema: "),
    ),
    Lasting(
        "runner.compat.process.process_state",
        "ops that DTensor handles apart, which context_parallel adds to",
        Defines(_DISPATCH, ("OpDispatcher._custom_op_handlers",)),
        names=("_custom_op_handlers",),
    ),
    Lasting(
        "runner.compat.process.process_state",
        "switches of SDPA's backends and of nn.MultiheadAttention's fast path",
        Both(
            (
                Defines(
                    "backends/cuda/__init__.py",
                    (
                        "flash_sdp_enabled",
                        "mem_efficient_sdp_enabled",
                        "math_sdp_enabled",
                        "cudnn_sdp_enabled",
                    ),
                ),
                Defines("backends/mha/__init__.py", ("get_fastpath_enabled",)),
            )
        ),
    ),
    Lasting(
        "runner.compat.process.forget_compiled",
        "the module that is loaded once something was compiled",
        Exists("_dynamo/__init__.py"),
        names=("_dynamo",),
    ),
    Lasting(
        "fixes.strategies.install",
        "how a strategy is registered, and what of a call is in the cache key",
        Both(
            (
                Takes(
                    _PROP,
                    "ShardingPropagator.register_op_strategy",
                    ("self", "op_overload", "strategy_func", "schema_info"),
                ),
                Defines(
                    _SCHEMA,
                    (
                        "RuntimeSchemaInfo.static_argnum",
                        "RuntimeSchemaInfo.static_kwargkey",
                        "RuntimeSchemaInfo.needs_pytree",
                        "OpStrategy",
                    ),
                ),
                Defines(_COLLECTIVE_UTILS, ("redistribute_cost",)),
            )
        ),
    ),
    Lasting(
        "fixes.strategies.answers",
        "what runs an op on meta tensors before its strategy is asked",
        Both(
            (
                Takes(_PROP, _PROPAGATE, ("self", "op_schema")),
                Reads(_PROP, _PROPAGATE, "self._propagate_tensor_meta_non_cached(op_schema)"),
            )
        ),
    ),
    Lasting(
        "fixes.strategies.remove",
        "a library takes back what it registered",
        Defines("library.py", ("Library._destroy",)),
        names=("_destroy",),
    ),
    Lasting(
        "standins.flex_attention.provide",
        "the check that refuses gradients on a CPU",
        Takes("nn/attention/flex_attention.py", "_validate_device", ("query", "key", "value")),
        names=("_validate_device",),
    ),
    Lasting(
        "standins.flash_attn_package.register_cpu_kernels",
        "the function under the decorator of a custom op",
        Defines("_library/custom_ops.py", ("CustomOpDef._init_fn",)),
        names=("_init_fn",),
    ),
    Lasting(
        "triage.scripts",
        "what the scripts for issue trackers import",
        Both(
            (
                Defines(f"{_TENSOR}/_utils.py", ("compute_local_shape_and_global_offset",)),
                Defines(_C10D, ("_get_default_store",)),
            )
        ),
        names=("_utils", "_get_default_store"),
    ),
    Lasting(
        "runner.compat.autograd",
        "the numbers of a graph's nodes, and the one whose backward runs",
        Both(
            (
                Stubs(("_get_sequence_nr",), "_C/_autograd.pyi"),
                Stubs(("_current_autograd_node", "_current_graph_task_id")),
                Defines("autograd/__init__.py", ("_get_sequence_nr",)),
            )
        ),
        names=(
            "_get_sequence_nr",
            "_current_autograd_node",
            "_current_graph_task_id",
            "_sequence_nr",
        ),
    ),
    Lasting(
        "runner.compat.modes.is_innermost",
        "the dispatch modes that are on",
        Defines(_MODES, ("_get_current_dispatch_mode_stack",)),
        names=("_get_current_dispatch_mode_stack",),
    ),
    Lasting(
        "runner.compat.modes.convertible_modules",
        "what `Module.to` and its like go through",
        Takes("nn/modules/module.py", "Module._apply", ("self", "fn", "recurse")),
        names=("_apply",),
    ),
    Lasting(
        "runner.compat.attention",
        "the ops that F.scaled_dot_product_attention chooses from on CUDA",
        Both(
            (
                Takes(
                    "_meta_registrations.py",
                    "meta__scaled_dot_product_flash_attention",
                    (
                        "query",
                        "key",
                        "value",
                        "dropout_p",
                        "is_causal",
                        "return_debug_mask",
                        "scale",
                    ),
                ),
                Takes(
                    "_meta_registrations.py",
                    "meta__scaled_dot_product_efficient_attention",
                    ("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p"),
                ),
                Defines("_meta_registrations.py", ("meta__scaled_dot_product_cudnn_attention",)),
                Stubs(("_scaled_dot_product_attention_math",), "_C/_VariableFunctions.pyi"),
            )
        ),
        names=(
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_attention_math",
        ),
    ),
    Lasting(
        "runner.compat.meshes.real_meshes",
        "what of a mesh computes with its tensor of ranks, and stepping out of a fake mode",
        Both(
            (
                Defines(
                    "distributed/device_mesh.py",
                    (
                        "init_device_mesh",
                        "DeviceMesh.__init__",
                        "DeviceMesh.__repr__",
                        "DeviceMesh.from_group",
                        "DeviceMesh._flatten",
                    ),
                ),
                Reads(
                    "distributed/device_mesh.py",
                    "DeviceMesh.__getitem__",
                    "unset_fake_temporarily()",
                ),
                Defines("_subclasses/fake_tensor.py", ("unset_fake_temporarily",)),
            )
        ),
    ),
    Lasting(
        "runner.compat.compiled.compiled_modules",
        "where a compiled module has its own, and what compiling in place leaves in it",
        Both(
            (
                Reads("_dynamo/eval_frame.py", "OptimizedModule.__init__", "self._orig_mod = mod"),
                Reads(
                    "nn/modules/module.py",
                    "Module.compile",
                    "self._compiled_call_impl = torch.compile(",
                ),
            )
        ),
        names=("_orig_mod", "_compiled_call_impl"),
    ),
)
