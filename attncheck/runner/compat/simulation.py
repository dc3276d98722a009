"""All ranks in one process: `LocalTensorMode` (2.10 on), one tensor that holds the shards of all ranks, and
runs every op on each."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist


def simulated_group(ranks: int, rank: int = 0) -> None:
    """A default process group of so many ranks that connects nobody: this process is one of them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


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
    with _without_ranks_of_its_own(), LocalTensorMode(ranks):
        for owner in owners:
            owner.get_rank = asked  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for owner in owners:
                owner.get_rank = original  # type: ignore[attr-defined]


@contextlib.contextmanager
def _without_ranks_of_its_own() -> Iterator[None]:
    """From 2.14 on the mode puts a `get_rank` of its own in place, each time it is switched on again. Where
    it is off, in an op that runs once a rank, that would be rank 0's for all; so it puts none."""
    import torch.distributed._local_tensor as local

    before = getattr(local, "_PATCHED_DIST_FUNCTIONS", None)
    if before is None:
        yield
        return
    setattr(local, "_PATCHED_DIST_FUNCTIONS", ())
    try:
        yield
    finally:
        setattr(local, "_PATCHED_DIST_FUNCTIONS", before)


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

    The mode would do so too, but it refuses schemas that return what they write into (2.10 to 2.15:
    "Unsupported schema", in `return_and_correct_aliasing`, for flash-attn 3's op) and higher-order ops.
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
