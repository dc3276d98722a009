"""Which node of a graph is being made, and which is running backward: the same in 2.6 to 2.15."""

from __future__ import annotations

import torch
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]

# What a node has that is made by no op (AccumulateGrad): it runs as soon as it can.
_LAST = 2**63


def next_number() -> int:
    """The number that the next node of this thread's graph will get."""
    return int(_get_sequence_nr())


def in_backward() -> bool:
    """Whether a backward runs in this thread: in a node of it, or in what it calls at its end (FSDP2 scatters
    gradients there)."""
    return bool(torch._C._current_graph_task_id() != -1)


def node_number() -> int | None:
    """The number of the node whose backward is running; None where none is, or gradients are added up."""
    node = torch._C._current_autograd_node()
    if node is None:
        return None
    number = int(node._sequence_nr())
    return number if number < _LAST else None
