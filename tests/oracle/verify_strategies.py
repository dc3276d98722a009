"""Verify the tables of verified_strategies.py without DTensor: cut, compute piece by piece, compare.

    python tests/oracle/verify_strategies.py 'verified.sdpa*'    # prints what was compared, as JSON

Operators run on whole plain tensors, forward and backward, while every call of an op that has a table is
recorded. For 2, 3 and 4 ranks and each row, the recorded arguments are cut as the row says, the op is called
on each piece, and the results, put together as the row says, are held against those of the whole call.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

import verified_strategies as strategies

from attncheck import plugins, standins
from attncheck.probing import Operator, Setting
from attncheck.runner import case as cases

RANKS = (2, 3, 4)
SEED = 7
# Of the largest value: pieces are the same sums, in float32, in an order that may differ.
CLOSE = 1e-5


@dataclass(frozen=True)
class Call:
    """One call: arguments by name as they were before, buffers and results as they were after."""

    op: Any
    positional: int
    arguments: Mapping[str, Any]
    results: tuple[Any, ...]
    buffers: Mapping[str, torch.Tensor]


# By op: the arguments that it writes into.
WRITTEN = {name: tuple(table.buffers) for name, table in strategies.TABLES.items()}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, written: Mapping[str, Sequence[str]]) -> None:
        """`written`: the ops to record, and which arguments each writes into."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = written
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name not in self.written:
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        before = {k: v.detach().clone() if _is_tensor(v) else v for k, v in given.items()}
        returned = func(*args, **kwargs)
        results = returned if isinstance(returned, tuple) else (returned,)
        after = {
            k: given[k].detach().clone() for k in self.written[name] if _is_tensor(given.get(k))
        }
        kept = tuple(r.detach().clone() if _is_tensor(r) else r for r in results)
        self.calls.append(Call(func, len(args), before, kept, after))
        return returned


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def recorded(
    operator: Operator, setting: Setting, written: Mapping[str, Sequence[str]] = WRITTEN
) -> list[Call]:
    """What the operator calls on whole tensors, forward and backward."""
    # The strategies themselves are for DTensors: here nothing is registered.
    operator = replace(operator, around=_without_registering(operator))
    specs = operator.tensors(setting)
    wholes = cases.whole_tensors(operator.name, setting, specs, SEED)
    around = operator.around() if operator.around else nullcontext()
    with Recorder(written) as recorder, around:
        cases.run_whole(operator, setting, specs, wholes, SEED, "cpu")
    return recorder.calls


def _without_registering(operator: Operator) -> Any:
    """The operator's own context: of one of verified_probe, the first argument of its `around`."""
    around: Any = operator.around
    return around.args[0] if isinstance(around, functools.partial) else around


def verify(call: Call, ranks: int) -> dict[str, float]:
    """By row: the largest difference between pieces put together and the whole, over the largest value."""
    name = str(call.op)
    shapes = {k: tuple(v.shape) for k, v in call.arguments.items() if _is_tensor(v)}
    undefined = strategies._undefined(name, call.arguments)
    return {
        row.pattern: max(_gaps(call, row, ranks), default=0.0)
        for row in strategies.rows(name, shapes, ranks, undefined)
    }


def _gaps(call: Call, row: strategies.Row, ranks: int) -> Iterator[float]:
    pieces = [_on_rank(call, row, rank, ranks) for rank in range(ranks)]
    for at, (whole, dim, absent) in enumerate(
        zip(call.results, row.results, row.absent, strict=True)
    ):
        assert absent or _is_tensor(whole), f"{call.op}: result {at} is no tensor: {whole!r}"
        if not absent:
            yield _gap([results[at] for results, _ in pieces], whole, dim)
    for name, whole in call.buffers.items():
        yield _gap([buffers[name] for _, buffers in pieces], whole, row.arguments[name])


def _on_rank(
    call: Call, row: strategies.Row, rank: int, ranks: int
) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    """Results and buffers of the op on this rank's pieces."""
    given = {}
    for name, value in call.arguments.items():
        dim = row.arguments.get(name)
        if not _is_tensor(value):
            given[name] = value
        elif dim is None:
            given[name] = value.clone()
        else:
            given[name] = value.chunk(ranks, dim)[rank].clone()
    values = list(given.items())
    returned = call.op(
        *(value for _, value in values[: call.positional]), **dict(values[call.positional :])
    )
    results = returned if isinstance(returned, tuple) else (returned,)
    return results, {name: given[name] for name in call.buffers}


def _gap(pieces: Sequence[torch.Tensor], whole: torch.Tensor, dim: int | str | None) -> float:
    if dim is None:
        return max(_distance(piece, whole) for piece in pieces)
    if dim == "sum":
        return _distance(torch.stack(list(pieces)).sum(0), whole)
    assert isinstance(dim, int)
    if len({(piece.shape[:dim], piece.shape[dim + 1 :]) for piece in pieces}) > 1:
        return float("inf")  # they are no parts of one tensor
    return _distance(torch.cat(list(pieces), dim), whole)


def _distance(made: torch.Tensor, whole: torch.Tensor) -> float:
    """Over the largest value; inf where shapes differ, or where one is finite and the other is not."""
    if made.shape != whole.shape:
        return float("inf")
    if not whole.numel():
        return 0.0
    made, whole = made.double(), whole.double()
    difference = torch.where(made == whole, 0.0, (made - whole).abs())
    finite = whole[torch.isfinite(whole)]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    return float(torch.nan_to_num(difference, nan=torch.inf).max()) / max(largest, 1e-30)


def main(globs: Sequence[str]) -> dict[str, dict[str, float]]:
    """op -> row and ranks -> the largest gap, over the float32 settings of these operators."""
    # The tensors are small, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)
    probe = plugins.load_probe_file(Path(__file__).parent / "verified_probe.py")
    out: dict[str, dict[str, float]] = {}
    for operator in probe.operators:
        if operator.name.startswith("deep") or not any(
            fnmatch.fnmatchcase(operator.name, glob.replace("[", "[[]")) for glob in globs
        ):
            continue
        for name in operator.standins:
            standins.provide(name)
        for setting in operator.settings:
            if setting.dtype == "float32":
                for call in recorded(operator, setting):
                    for ranks in RANKS:
                        for row, gap in verify(call, ranks).items():
                            gaps = out.setdefault(str(call.op), {})
                            key = f"{row} on {ranks}"
                            gaps[key] = max(gaps.get(key, 0.0), gap)
    return out


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:] or ["*"]), indent=1))
