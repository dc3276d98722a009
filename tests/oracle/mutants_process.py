"""Ranks that part: another collective, an exception, an exit, a signal, a wait without end.

Each happens on one rank alone, in a kernel or between kernels, and only where there are other ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from catalogue import Mutant, probe
from planted_kernels import (
    Call,
    Kernel,
    all_reduce,
    builtin_probe,
    call_op,
    group_of,
    kernels_replaced,
    op_names,
    operator,
    rank,
    setting,
)

from attncheck.probing import Operator, Setting, Tensors

CRASH, HANG, DIVERGED, RAISES = ("ATN501",), ("ATN502",), ("ATN503",), ("ATN504",)
WRONG, STALE = ("ATN201",), ("ATN207",)

# Beyond any deadline of a case, and short of it.
FOR_EVER, A_WHILE = 10_000.0, 1.0

PLAIN = setting("plain", "heads")

Act = Callable[[Any, Call], None]


class Acts(Kernel):
    """Does something of its own, on shards only, before it computes rightly."""

    def __init__(self, act: Act, phase: str, on_call: int = 1) -> None:
        self.act, self.phase, self.on_call, self.calls = act, phase, on_call, 0

    def _maybe(self, phase: str, x: Any, c: Call) -> None:
        if c.group and phase == self.phase:
            self.calls += 1
            if self.calls == self.on_call:
                self.act(x, c)

    def forward(self, q: Any, k: Any, v: Any, c: Call) -> tuple[Any, Any]:
        self._maybe("forward", q, c)
        return super().forward(q, k, v, c)

    def backward(self, dout: Any, *args: Any) -> tuple[Any, Any, Any]:
        self._maybe("backward", dout, args[-1])
        return super().backward(dout, *args)


def on_rank_1(act: Callable[[], None]) -> Act:
    def maybe(x: Any, c: Call) -> None:
        if rank() == 1:
            act()

    return maybe


def kill(number: int) -> Act:
    return on_rank_1(lambda: os.kill(os.getpid(), number))


def give_up() -> None:
    raise RuntimeError("planted: out of workspace")


def abort() -> None:
    os.abort()


def leave() -> None:
    """As a library's error handler does that means to end the program, and calls it a success."""
    os._exit(0)


def leave_politely() -> None:
    sys.exit(0)


def sleep(seconds: float) -> Act:
    return on_rank_1(lambda: time.sleep(seconds))


def everywhere(act: Callable[[], None]) -> Act:
    return lambda x, c: act()


# --- collectives that do not match -----------------------------------------------------------------


def largest_first(x: Any, c: Call) -> None:
    """Whether to agree on a scale depends on the local values, which differ from rank to rank."""
    if rank() == 0:
        all_reduce(x.abs().amax().reshape(1), c.group)


def other_collective(x: Any, c: Call) -> None:
    import torch.distributed._functional_collectives as funcol

    local = x.abs().amax().reshape(1)
    if rank() == 0:
        all_reduce(local, c.group)
    else:
        funcol.wait_tensor(funcol.all_gather_tensor(local, 0, c.group))


def other_order(x: Any, c: Call) -> None:
    """A sum and a gathering, in the order of a set of names."""
    import torch.distributed._functional_collectives as funcol

    local = x.abs().amax().reshape(1)
    steps = (
        lambda: all_reduce(local, c.group),
        lambda: funcol.wait_tensor(funcol.all_gather_tensor(local, 0, c.group)),
    )
    for step in steps if rank() == 0 else steps[::-1]:
        step()


def other_size(x: Any, c: Call) -> None:
    """Each rank sums as many numbers as it has, and they do not have the same number."""
    all_reduce(x.flatten()[: 3 + 5 * rank()].clone(), c.group)


def agree(x: Any, c: Call) -> None:
    """What the three above should be."""
    all_reduce(x.abs().amax().reshape(1), c.group)


class Around:
    """A call that does something between the op and its user: above the dispatcher, where each collective
    can be seen. In backward, once the gradient of q is there."""

    def __init__(
        self, name: str, kernel: Kernel, forward: Act | None, backward: Act | None
    ) -> None:
        self.name, self.kernel = name, kernel
        self.forward, self.backward = forward, backward

    def __call__(self, where: Setting, t: Tensors) -> Any:
        group = group_of(t["q"])
        backward = self.backward
        if group and backward is not None:
            t["q"].register_hook(lambda dq: backward(dq._local_tensor, _call(group)))
        named = call_op(self.name, self.kernel, "plain", where, t)
        if group and self.forward is not None:
            self.forward(named["out"]._local_tensor, _call(group))
        return named


def _call(group: str) -> Call:
    return Call(None, None, 1.0, False, -1, 0.0, 0.0, 0, group)


# --- results that differ by rank -------------------------------------------------------------------


def another_placement(name: str, kernel: Kernel, where: Setting, t: Tensors) -> Any:
    """Rank 1 gathers the heads before it returns."""
    from torch.distributed.tensor import DTensor, Replicate

    named = call_op(name, kernel, "plain", where, t)
    out = named["out"]
    if isinstance(out, DTensor):
        whole = out.redistribute(placements=[Replicate()])
        named["out"] = whole if rank() == 1 else out
    return named


class CausalEverAfter(Kernel):
    """A flag that is set for one call, on one rank, and never reset."""

    def __init__(self) -> None:
        self.causal = False

    def forward(self, q: Any, k: Any, v: Any, c: Call) -> tuple[Any, Any]:
        causal, self.causal = self.causal, bool(c.group) and rank() == 1
        return super().forward(q, k, v, _causal(c) if causal else c)


def _causal(c: Call) -> Call:
    from dataclasses import replace

    return replace(c, causal=True)


class SumsMixed(Kernel):
    """Two sums of one size, in another order on each rank: every collective matches, and each adds one
    half of the first to one half of the second."""

    def __init__(self, right: bool = False) -> None:
        self.right = right

    def forward(self, q: Any, k: Any, v: Any, c: Call) -> tuple[Any, Any]:
        out, lse = super().forward(q, k, v, c)
        if not c.group:
            return out, lse
        # Each rank contributes zeros to the other's part, as a ring written with all-reduce does.
        parts = [out * (rank() == at) for at in range(2)]
        order = (0, 1) if self.right or rank() == 0 else (1, 0)
        sums = {at: all_reduce(parts[at], c.group) for at in order}
        return sums[rank()], lse


# --- the catalogue ---------------------------------------------------------------------------------

_HEALTHY = operator("healthy_ranks", Kernel(), PLAIN)


def mutant(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    kernel: Kernel | None = None,
    direction: str = "forward",
    twin: Operator = _HEALTHY,
    call: Callable[..., Any] | None = None,
    **more: Any,
) -> Mutant:
    kernel = kernel or Kernel()
    return Mutant(
        name=name,
        family="process",
        layer="custom",
        mistake=mistake,
        rules=rules,
        kernel_op=op_names(name)[direction == "backward"],
        operator=operator(name, kernel, PLAIN, call=call and call(name, kernel), **more),
        twin=twin,
        direction=direction,
    )


def acts(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    act: Act,
    direction: str = "forward",
    on_call: int = 1,
    **more: Any,
) -> Mutant:
    return mutant(name, mistake, rules, Acts(act, direction, on_call), direction, **more)


def between(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    act: Act,
    direction: str = "forward",
    **more: Any,
) -> Mutant:
    """The act comes behind the op instead of inside it."""
    forward, backward = (act, None) if direction == "forward" else (None, act)

    def call(op_name: str, kernel: Kernel) -> Callable[..., Any]:
        return Around(op_name, kernel, forward, backward)

    return mutant(name, mistake, rules, None, direction, call=call, **more)


def _healthy_between() -> Operator:
    name, kernel = "healthy_between", Kernel()
    return operator(name, kernel, PLAIN, call=Around(name, kernel, agree, agree), communicates=True)


AGREES = _healthy_between()
SLOW = operator("healthy_slow", Acts(sleep(A_WHILE), "forward"), PLAIN)
SLOW_BACKWARD = operator("healthy_slow_backward", Acts(sleep(A_WHILE), "backward"), PLAIN)
SUMS = operator("healthy_sums", SumsMixed(right=True), PLAIN, communicates=True)


def aten_dies(standin: Any, *args: Any, **kwargs: Any) -> Any:
    if rank() == 1 and args[1].shape[1] == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return standin(*args, **kwargs)


def aten_raises(standin: Any, *args: Any, **kwargs: Any) -> Any:
    if rank() == 1 and args[1].shape[1] == 2:
        give_up()
    return standin(*args, **kwargs)


def _over_standin(short: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from attncheck.standins.aten_attention import KERNELS

    return kernel(KERNELS[short], *args, **kwargs)


def aten(
    name: str,
    mistake: str,
    rules: tuple[str, ...],
    kernel: Callable[..., Any],
    direction: str,
) -> Mutant:
    """In the place of the stand-in behind `aten._scaled_dot_product_flash_attention`."""
    from dataclasses import replace

    original = next(
        o for o in builtin_probe("sdpa_cuda").PROBE.operators if o.name == "sdpa_cuda.flash"
    )
    plain = next(s for s in original.settings if s.name == "plain")
    kernel_op = original.kernel_ops[direction == "backward"]
    short = kernel_op.split(".")[1]
    twin = replace(
        original,
        name="kernel.healthy_flash",
        settings=(replace(plain, placements=("heads",)),),
        function="",
    )
    around = partial(kernels_replaced, {short: partial(_over_standin, short, kernel)})
    return Mutant(
        name=name,
        family="process",
        layer="aten",
        mistake=mistake,
        rules=rules,
        kernel_op=kernel_op,
        operator=replace(twin, name=f"kernel.{name}", around=around),
        twin=twin,
        direction=direction,
    )


VALUES = (
    mutant("flag_never_reset", "A flag that is set for one call on one rank is never reset.", STALE,
           CausalEverAfter()),
    mutant("sums_mixed", "Two sums of one size are taken in another order on each rank.", WRONG,
           SumsMixed(), twin=SUMS, communicates=True),
)  # fmt: skip

RAISE = (
    acts("one_rank_raises", "Rank 1 refuses what rank 0 takes.", DIVERGED, on_rank_1(give_up)),
    acts("one_rank_raises_backward", "Rank 1 refuses in backward.", DIVERGED, on_rank_1(give_up),
         "backward"),
    acts("one_rank_raises_second", "Rank 1 refuses the second call.", DIVERGED, on_rank_1(give_up),
         on_call=2),
    acts("one_rank_raises_second_backward", "Rank 1 refuses the second backward.", DIVERGED,
         on_rank_1(give_up), "backward", 2),
    acts("all_raise_backward", "Backward refuses a shard.", RAISES, everywhere(give_up), "backward"),
    acts("all_raise_second", "The second call is refused: its workspace was not given back.", RAISES,
         everywhere(give_up), on_call=2),
    acts("one_rank_exits_politely", "Rank 1 calls sys.exit(0).", DIVERGED, on_rank_1(leave_politely)),
    aten("aten_one_rank_raises", "Rank 1 refuses what rank 0 takes.", DIVERGED, aten_raises, "forward"),
)  # fmt: skip

COLLECTIVES = (
    between("other_collective", "Rank 0 sums where rank 1 gathers.", DIVERGED, other_collective,
            twin=AGREES),
    between("other_collective_backward", "Rank 0 sums where rank 1 gathers, in backward.", DIVERGED,
            other_collective, "backward", twin=AGREES),
    between("collective_skipped", "Rank 1 skips a collective.", DIVERGED, largest_first, twin=AGREES),
    between("collective_skipped_backward", "Rank 1 skips a collective of backward.", DIVERGED,
            largest_first, "backward", twin=AGREES),
    between("collectives_swapped", "Two collectives are swapped on rank 1.", DIVERGED, other_order,
            twin=AGREES),
    # Gloo aborts the process: what is found is the crash, and where.
    between("sum_of_other_size", "The ranks add up different numbers of elements.", CRASH, other_size,
            twin=AGREES),
    mutant("another_placement", "Rank 1 returns its output with another placement.", DIVERGED,
           call=lambda name, kernel: partial(another_placement, name, kernel)),
)  # fmt: skip

DEATHS = (
    acts("killed", "Rank 1 is killed (out of memory).", CRASH, kill(signal.SIGKILL)),
    acts("segfault_backward", "Rank 1 reads a null pointer in backward.", CRASH, kill(signal.SIGSEGV),
         "backward"),
    acts("aborts", "Rank 1 aborts on a failed assertion.", CRASH, on_rank_1(abort)),
    acts("exits_early", "Rank 1 leaves with exit code 0.", CRASH, on_rank_1(leave)),
    acts("exits_early_backward", "Rank 1 leaves with exit code 0, in backward.", CRASH, on_rank_1(leave),
         "backward"),
    aten("aten_segfault_backward", "Rank 1 reads a null pointer in backward.", CRASH, aten_dies, "backward"),
)  # fmt: skip

HANGS = (
    acts("never_returns", "Rank 1 waits for a lock that nobody gives back.", HANG, sleep(FOR_EVER),
         twin=SLOW),
    acts("never_returns_backward", "Rank 1 waits for ever in backward.", HANG, sleep(FOR_EVER), "backward",
         twin=SLOW_BACKWARD),
)  # fmt: skip

MUTANTS = (*VALUES, *RAISE, *COLLECTIVES, *DEATHS, *HANGS)
PROBE = probe("process_mutants", MUTANTS)
