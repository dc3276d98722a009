"""Calls of kernel ops: recorded on whole plain tensors, made again, changed, cut into pieces and compared.

Nothing here knows DTensor's strategies: what an op does to pieces of its arguments is seen by calling it on
them. An op may end the process on an odd piece, so every call is announced before it is made, and those
that are known to end it are not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from attncheck.probing import Operator, Setting
from attncheck.runner import case as cases
from attncheck.runner import compat, drift
from attncheck.runner.compat import TorchDispatchMode
from attncheck.runner.inputs import whole_tensors

# Namespaces whose ops are PyTorch's own: their strategies are written by hand, and by others.
OWN = ("aten", "prim", "prims", "c10d", "_c10d_functional", "profiler", "inductor", "debugprims")
# Where an output lies after a call on pieces: the tensor dim it is sharded on, or one of these.
WHOLE, SUM = "R", "P(sum)"
Placed = int | str
INAPPLICABLE = "a rank would have nothing"


@dataclass(frozen=True)
class Call:
    """One call. `arguments` by name (tensors as they were before), the first `positional` of them by place;
    `results` in order; `written`: the buffers that it writes into, as they were after. `label` says where
    it comes from, and is another for every call of an op."""

    op: str
    positional: int
    arguments: Mapping[str, Any]
    results: tuple[Any, ...]
    written: Mapping[str, torch.Tensor] = field(default_factory=dict)
    label: str = ""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensor arguments by name."""
        return {k: v for k, v in self.arguments.items() if isinstance(v, torch.Tensor)}

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """Results that are tensors as `#0`, `#1` ..., and buffers by name."""
        results = {f"#{at}": r for at, r in enumerate(self.results) if isinstance(r, torch.Tensor)}
        return {**results, **self.written}


def written_names(op: Any) -> tuple[str, ...]:
    """Arguments that the schema says are written into."""
    return tuple(
        a.name for a in compat.schema_of(op).arguments if a.alias_info and a.alias_info.is_write
    )


def is_custom(op: Any) -> bool:
    """Whether somebody else's op has no strategy."""
    name = str(op)
    return name.partition(".")[0] not in OWN and not compat.has_strategy(op)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, wanted: Callable[[Any], bool], label: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted, self.label = wanted, label
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.wanted(func):
            return func(*args, **kwargs)
        names = [argument.name for argument in compat.schema_of(func).arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        before = {name: _copy(value) for name, value in given.items()}
        returned = func(*args, **kwargs)
        results = _results(func, returned)
        written = {
            name: _copy(given[name])
            for name in written_names(func)
            if isinstance(given.get(name), torch.Tensor)
        }
        before_this = sum(call.op == str(func) for call in self.calls)
        label = f"{self.label}, call {before_this + 1}" if before_this else self.label
        self.calls.append(Call(str(func), len(args), before, results, written, label))
        return returned


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _results(op: Any, returned: Any) -> tuple[Any, ...]:
    if not compat.schema_of(op).returns:
        return ()
    several = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    return tuple(map(_copy, several))


def record(
    operator: Operator,
    settings: Sequence[Setting],
    seed: int,
    device: str = "cpu",
    wanted: Callable[[Any], bool] = is_custom,
) -> list[Call]:
    """What an operator calls on whole tensors, forward and backward, in these settings.

    A setting that the operator refuses gives no calls, one that fails later those it had made.
    """
    calls: list[Call] = []
    for setting in settings:
        specs = operator.tensors(setting)
        wholes = whole_tensors(operator.name, setting, specs, seed)
        label = f"{operator.name}, {setting.name}, {setting.dtype}, seed {seed}"
        with _Recorder(wanted, label) as recorder:
            try:
                with operator.around() if operator.around else nullcontext():
                    cases.run_whole(operator, setting, specs, wholes, seed, device)
            except (Exception, SystemExit):
                pass  # a scan says what; here it is enough that there is nothing to learn from it
        calls += recorder.calls
    return calls


class Bench:
    """Makes calls, each announced before, and remembers what judging them needs.

    `say` is told what is about to be done; what is in `fatal` ended a process before, and is left out.
    What was found of pieces is in `known`, and told to `remember`. `apart` does what may harm the process
    where it cannot, and gives None where that ended.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda text: None,
        fatal: Sequence[str] = (),
        known: Mapping[str, dict[str, Placed] | str] | None = None,
        remember: Callable[[str, dict[str, Placed] | str], None] = lambda key, found: None,
        apart: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    ) -> None:
        self.say = say
        self.fatal = frozenset(fatal)
        self.known = dict(known or {})
        self.remember = remember
        self.apart = apart
        self.made = 0
        self._exact: dict[int, tuple[Call, dict[str, torch.Tensor] | None]] = {}

    def run(self, call: Call, arguments: Mapping[str, Any], what: str) -> Call | str:
        """The same call with other arguments, on copies of them; or in a few words why it cannot be."""
        doing = f"{call.op} ({call.label}): {what}"
        if doing in self.fatal:
            return "it ends the process"
        self.say(doing)
        self.made += 1
        op = compat.find_overload(call.op)
        given = {name: _copy(value) for name, value in arguments.items()}
        values = list(given.items())
        try:
            with torch.no_grad():
                returned = op(
                    *(value for _, value in values[: call.positional]),
                    **dict(values[call.positional :]),
                )
        except Exception as error:
            words = str(error).strip().splitlines()
            return f"{type(error).__name__}: {words[0][:200] if words else ''}"
        written = {name: given[name] for name in call.written}
        return replace(
            call,
            arguments=given,
            results=_results(op, returned),
            written=written,
        )

    def again(self, call: Call, changes: Mapping[str, Any], label: str) -> Call | None:
        """The call with some of its arguments changed, made anew; None where the op refuses it, or where it
        does not give the same twice (it reads what nobody wrote)."""
        arguments = {**call.arguments, **changes}
        changed = replace(call, label=f"{call.label}, {label}")
        made, again = (self.run(changed, arguments, f"whole, {time}") for time in ("once", "twice"))
        if isinstance(made, str) or isinstance(again, str):
            return None
        if not self.same(made, again):
            return None
        return replace(made, arguments=arguments)

    # --- pieces ----------------------------------------------------------------------------------

    def cut(
        self,
        call: Call,
        cuts: Mapping[str, int],
        ranks: int,
        expected: Mapping[str, Placed] | None = None,
    ) -> dict[str, Placed] | str:
        """Where each output lies when these tensors are cut along these dims, all others whole; or in a few
        words why it cannot be said. `expected`: only look whether they lie so."""
        key = f"{call.op} {call.label}: {sorted(cuts.items())} on {ranks}, {expected}"
        if key not in self.known:
            self.known[key] = self._cut(call, cuts, ranks, expected)
            self.remember(key, self.known[key])
        return self.known[key]

    def _cut(
        self,
        call: Call,
        cuts: Mapping[str, int],
        ranks: int,
        expected: Mapping[str, Placed] | None,
    ) -> dict[str, Placed] | str:
        pieces: dict[str, tuple[torch.Tensor, ...]] = {}
        for name, dim in cuts.items():
            pieces[name] = call.tensors[name].chunk(ranks, dim)
            if len(pieces[name]) < ranks:
                return INAPPLICABLE
        row = ", ".join(f"{name} S({dim})" for name, dim in cuts.items())
        places: dict[str, Placed] = {}
        made: list[dict[str, torch.Tensor]] = []
        for rank in range(ranks):
            local = {name: part[rank].contiguous() for name, part in pieces.items()}
            got = self.run(call, {**call.arguments, **local}, f"{row} on rank {rank} of {ranks}")
            if isinstance(got, str):
                return got
            if numbers(got) != numbers(call):
                return "a number that it returns is another"
            outputs = got.outputs
            if rank == 0:
                for name, whole in call.outputs.items():
                    if name not in outputs:
                        return f"{name} is missing on a rank"
                    place = _place(outputs[name], whole, ranks)
                    if place is None:
                        return f"{name} is no part of the whole"
                    # The first piece alone shows most of what is wrong.
                    if isinstance(place, int) and not self.agrees(
                        call, name, outputs[name], ranks, partial(_first_part, place, ranks)
                    ):
                        return f"{name} has other values"
                    places[name] = place
            made.append(outputs)
        for name in call.outputs:
            parts = [outputs[name] for outputs in made]
            found = self._together(call, name, parts, places[name], expected)
            if found is None:
                return f"{name} has other values"
            places[name] = found
        return places

    def _together(
        self,
        call: Call,
        name: str,
        parts: Sequence[torch.Tensor],
        place: Placed,
        expected: Mapping[str, Placed] | None,
    ) -> Placed | None:
        whole, ranks = call.outputs[name], len(parts)
        if isinstance(place, int):
            rest = {(*part.shape[:place], *part.shape[place + 1 :]) for part in parts}
            sizes = [part.shape[place] for part in parts]
            if len(rest) > 1 or sizes != [p.shape[place] for p in whole.chunk(ranks, place)]:
                return None
            fits = self.agrees(call, name, torch.cat(list(parts), place), ranks)
            fits = fits and (expected is None or expected[name] == place)
            return place if fits else None
        if any(part.shape != whole.shape for part in parts):
            return None
        wanted = expected[name] if expected is not None else None
        same = all(self._alike(call, name, part, parts[0]) for part in parts)
        if wanted in (None, WHOLE) and same and self.agrees(call, name, parts[0], ranks):
            return WHOLE
        if wanted in (None, SUM) and whole.is_floating_point():
            total = torch.stack([part.double() for part in parts]).sum(0)
            if self.agrees(call, name, total, ranks):
                return SUM
        return None

    def same(self, call: Call, other: Call) -> bool:
        """Whether two calls gave the same."""
        return all(
            self._alike(call, name, value, other.outputs[name])
            for name, value in call.outputs.items()
        )

    def _alike(self, call: Call, name: str, a: torch.Tensor, b: torch.Tensor) -> bool:
        """In every bit on a CPU; kernels of other devices add up in an order of their own each time."""
        return equal(a, b) or (not a.is_cpu and self.agrees(call, name, b, 1))

    # --- numbers ---------------------------------------------------------------------------------

    def agrees(
        self,
        call: Call,
        name: str,
        made: torch.Tensor,
        ranks: int,
        part: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    ) -> bool:
        """Whether an output put together from pieces is that of the whole call, as far as rounding goes: the
        bounds are those of `runner/drift.py`, against what the op shows unsharded."""
        whole = part(call.outputs[name])
        if made.shape != whole.shape:
            return False
        if not whole.is_floating_point():
            return equal(made, whole)
        if not whole.numel():
            return True
        dtype = whole.dtype
        value, unsharded = made.double(), whole.double()
        difference = torch.where(value == unsharded, 0.0, (value - unsharded).abs())
        scale = max(drift.largest_value(unsharded), torch.finfo(dtype).tiny)
        if float(difference.max()) <= drift.atol(dtype, scale, ranks):  # not so of a NaN
            return True
        exact = self._exact_of(call)
        reference = unsharded if exact is None or name not in exact else part(exact[name])
        among = max(
            (drift.largest_value(t) for t in call.outputs.values() if t.is_floating_point()),
            default=0.0,
        )
        stat = drift.error_stat(
            value, drift.Expected(reference, unsharded), dtype, among=among * ranks**0.5
        )
        return drift.classify(stat) != "wrong"

    def _exact_of(self, call: Call) -> dict[str, torch.Tensor] | None:
        """The outputs of the call in float64, None where the op does not take that, or means another."""
        if id(call) not in self._exact:
            self._exact[id(call)] = (call, self._in_float64(call))
        return self._exact[id(call)][1]

    def _in_float64(self, call: Call) -> dict[str, torch.Tensor] | None:
        wide = {
            name: value.double() if value.is_floating_point() else value
            for name, value in call.tensors.items()
        }
        made = self.run(call, {**call.arguments, **wide}, "in float64")
        if isinstance(made, str):
            return None
        exact = {
            name: value.double()
            for name, value in made.outputs.items()
            if value.dtype == torch.float64
        }
        for name, value in exact.items():
            whole = call.outputs.get(name)
            if whole is None or whole.shape != value.shape:
                return None
            if drift.disagreement(name, drift.Expected(value, whole)):
                return None
        return exact


def _first_part(dim: int, ranks: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(ranks, dim)[0]


def numbers(call: Call) -> list[Any]:
    """What it returns beside tensors: lengths, say. On every rank it must be what it is for the whole."""
    return [result for result in call.results if not isinstance(result, torch.Tensor)]


def _place(local: torch.Tensor, whole: torch.Tensor, ranks: int) -> Placed | None:
    """Where the piece of the first rank lies, by its shape."""
    if local.shape == whole.shape:
        return WHOLE
    if local.ndim != whole.ndim:
        return None
    differing = [at for at in range(whole.ndim) if local.shape[at] != whole.shape[at]]
    if len(differing) != 1:
        return None
    parts = whole.chunk(ranks, differing[0])
    return differing[0] if len(parts) == ranks and parts[0].shape == local.shape else None


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same values in every place; a NaN is the same as a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


# --- other calls made of one ---------------------------------------------------------------------


def narrowed(
    bench: Bench, call: Call, sizes: Mapping[tuple[str, int], int], label: str
) -> Call | None:
    """The call on less of some dims, (tensor, dim) -> size; None where the op refuses it."""
    changes: dict[str, torch.Tensor] = {}
    for (name, dim), size in sizes.items():
        tensor = changes.get(name, call.tensors[name])
        changes[name] = tensor.narrow(dim, 0, size).contiguous()
    return bench.again(call, changes, label)


def flipped(bench: Bench, call: Call) -> Iterator[Call]:
    """The call with one flag turned over, for each flag that it has and the op takes otherwise."""
    declared = compat.schema_of(compat.find_overload(call.op)).arguments
    for argument in declared:
        if str(argument.type) not in ("bool", "Optional[bool]"):
            continue
        value = value_of(call, argument.name)
        made = bench.again(
            with_positional(call, argument.name),
            {argument.name: not value},
            f"{argument.name}={not value}",
        )
        if made is not None:
            yield made


def value_of(call: Call, name: str) -> Any:
    """An argument of the call, or its default."""
    if name in call.arguments:
        return call.arguments[name]
    argument = next(
        a for a in compat.schema_of(compat.find_overload(call.op)).arguments if a.name == name
    )
    return argument.default_value if argument.has_default_value() else None


def with_positional(call: Call, name: str) -> Call:
    """The call with this argument, and those before it, said rather than left to their defaults."""
    if name in call.arguments:
        return call
    declared = compat.schema_of(compat.find_overload(call.op)).arguments
    at = [a.name for a in declared].index(name)
    if declared[at].kwarg_only:
        return replace(call, arguments={**call.arguments, name: value_of(call, name)})
    names = [a.name for a in declared[: at + 1]]
    first = {n: value_of(call, n) for n in names}
    rest = {n: v for n, v in call.arguments.items() if n not in first}
    return replace(call, positional=max(call.positional, at + 1), arguments={**first, **rest})


def values(call: Call) -> dict[str, Any]:
    """All arguments by name, with their defaults."""
    return {
        a.name: value_of(call, a.name)
        for a in compat.schema_of(compat.find_overload(call.op)).arguments
    }
