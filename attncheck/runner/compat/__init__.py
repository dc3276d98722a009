"""Every private PyTorch name that attncheck's own processes touch, each guarded by capability, in one place.

A guard is where two versions differ, and says which version changed it. The table of them, with what the
sources of the versions on both sides look like, is tests/versions/torch_history.py; nothing else in attncheck
may touch a private name of torch, but for what must stand alone (tests/versions/test_private_names.py).
"""

from __future__ import annotations

from attncheck.runner.compat.attention import sdpa_cudnn, sdpa_efficient, sdpa_flash, sdpa_math
from attncheck.runner.compat.autograd import in_backward, next_number, node_number
from attncheck.runner.compat.communication import (
    WAITS,
    AsyncCollectiveTensor,
    Communicates,
    group_size,
    no_communication,
    rendezvous_store,
    unsent_weights,
    watch_alltoall,
)
from attncheck.runner.compat.context_parallel import (
    context_parallel_options,
    context_parallel_tools,
)
from attncheck.runner.compat.modes import (
    TorchDispatchMode,
    convertible_modules,
    fake_mode,
    is_fake,
    is_innermost,
    route_higher_order_ops,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    unwatched_propagation,
)
from attncheck.runner.compat.ops import (
    find_overload,
    has_autograd,
    has_own_kernel,
    higher_order_ops,
    is_composite,
    is_packet,
    kernel_keys,
    op_name,
    registered_schemas,
    schema_of,
    schema_op_name,
)
from attncheck.runner.compat.placements import (
    local_tensor,
    placement_from_text,
    placement_text,
    spec_of,
    storage_id,
)
from attncheck.runner.compat.process import forget_compiled, process_state, quiet_exit
from attncheck.runner.compat.refusals import error_text, refusal, refusal_sentence
from attncheck.runner.compat.simulation import (
    RankAsked,
    call_on_ranks,
    each_rank,
    map_ranks,
    not_simulated,
    on_rank,
    simulated_group,
    simulated_ranks,
    unsimulated,
)
from attncheck.runner.compat.strategies import (
    has_decomposition,
    has_strategy,
    refuses_decomposition,
)

__all__ = [
    "WAITS",
    "AsyncCollectiveTensor",
    "Communicates",
    "RankAsked",
    "TorchDispatchMode",
    "call_on_ranks",
    "context_parallel_options",
    "context_parallel_tools",
    "convertible_modules",
    "each_rank",
    "error_text",
    "fake_mode",
    "find_overload",
    "forget_compiled",
    "group_size",
    "has_autograd",
    "has_decomposition",
    "has_own_kernel",
    "has_strategy",
    "higher_order_ops",
    "in_backward",
    "is_composite",
    "is_fake",
    "is_innermost",
    "is_packet",
    "kernel_keys",
    "local_tensor",
    "map_ranks",
    "next_number",
    "no_communication",
    "node_number",
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
    "schema_of",
    "schema_op_name",
    "sdpa_cudnn",
    "sdpa_efficient",
    "sdpa_flash",
    "sdpa_math",
    "simulated_group",
    "simulated_ranks",
    "spec_of",
    "storage_id",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unsent_weights",
    "unsimulated",
    "unwatched_propagation",
    "watch_alltoall",
]
