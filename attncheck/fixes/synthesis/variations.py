"""Other calls, made of those at hand: on less of some dims, with other groups of heads, masks and flags.

Some are needed to find anything (a mask that is the same for all heads in every call does not show where
heads lie in it), others to check what was found. An unchecked kernel reads beyond what it is given where
sizes do not go together, so that changes keep what divided what; and a call counts only where the op takes
it, gives the same twice, and makes no NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from attncheck.fixes import recording
from attncheck.fixes.recording import Bench, Call
from attncheck.fixes.synthesis.dims import (
    Class,
    Dim,
    classes,
    first_tensor,
    float_tensors,
    form_key,
    main_tensors,
    size_of,
)
from attncheck.runner.signature import KEY

RANKS = (2, 3)


def _usable(call: Call | None) -> Iterator[Call]:
    """A call that was made of another, unless the op refused it or made nothing of it."""
    if call is not None and not any(
        bool(t.isnan().any()) for t in call.outputs.values() if t.is_floating_point()
    ):
        yield call


def unbroadcast(found: Sequence[Call], bench: Bench) -> tuple[list[Call], frozenset[Dim]]:
    """For a dim that is 1 in all calls: one where it is not, if it is clear what it is then. And those of
    which the op takes no other size."""
    known = classes(found)
    seen = {dim for one in known for dim in one}
    made: list[Call] = []
    ones = set()
    for call in found:
        for name, tensor in call.tensors.items():
            for at, size in enumerate(tensor.shape):
                dim = (name, tensor.ndim, at)
                if size != 1 or dim in seen or not tensor.is_floating_point():
                    continue
                seen.add(dim)
                sizes = {size_of(call, one) for one in known} - {1}
                taken: list[Call] = []
                for wanted in sorted(sizes):
                    shape = list(tensor.shape)
                    shape[at] = wanted
                    noise = torch.randn(
                        shape, generator=torch.Generator().manual_seed(wanted), dtype=torch.float64
                    )
                    wide = (tensor.double().expand(shape).cpu() + noise).to(tensor)
                    taken += _usable(bench.again(call, {name: wide}, f"{name} of {shape}"))
                if len(taken) == 1:
                    made += taken
                elif not taken:
                    ones.add(dim)
    return made, frozenset(ones)


def without_integers(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls that tell integers from the dims that they are as long as by chance: 3 sequences have 4 starts,
    and there may be 4 heads."""
    floats = {name for call in found for name in float_tensors(call)}
    known: list[Class] = []
    mixed: list[Class] = []
    for one in classes(found):
        own = tuple(dim for dim in one if dim[0] in floats)
        known.append(own or one)
        if own and own != one:
            mixed.append(own)
    return _resized(found, known, mixed, bench, lambda size: size - 1, RANKS[0])


def broadcast(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls with one row of a mask or bias for all, where there is none yet: its gradient is a sum then."""
    known = classes(found)
    of_dim = {dim: one for one in known for dim in one}
    made: list[Call] = []
    for call in found:
        kinds = {
            name: {of_dim.get((name, t.ndim, at)) for at in range(t.ndim)}
            for name, t in call.tensors.items()
        }
        ordinary = [
            kinds[name] for name in {first_tensor(call), *main_tensors(call)} if name in kinds
        ]
        for name, tensor in float_tensors(call).items():
            # What has dims that no other tensor has together: those of scores, (queries, keys).
            if name in call.written or any(kinds[name] <= those for those in ordinary):
                continue
            for at, size in enumerate(tensor.shape):
                here = [c.tensors[name] for c in (*found, *made) if name in c.tensors]
                if size > 1 and not any(t.ndim == tensor.ndim and t.shape[at] == 1 for t in here):
                    changed = recording.narrowed(
                        bench, call, {(name, at): 1}, f"one in dim {at} of {name}"
                    )
                    made += _usable(changed)
    return made


def grouped(found: Sequence[Call], heads: Class, bench: Bench) -> list[Call]:
    """A call with half as many kv heads as query heads, where all at hand have equally many of both and the
    op takes fewer: it gives then what it gives with each kv head repeated."""
    known = classes(found)
    for call in found:
        size = size_of(call, heads)
        side = _kv_side(call, known)
        halves = {
            (name, at): size // 2
            for name, ndim, at in heads
            if name in side and call.tensors[name].ndim == ndim
        }
        if not halves or size < 4 or size % 2 or _counted(call, size):
            continue
        few = recording.narrowed(bench, call, halves, "half as many kv heads")
        if few is None:
            return []
        repeated = {name: few.tensors[name].repeat_interleave(2, at) for name, at in halves}
        many = bench.again(few, repeated, "each repeated")
        if many is not None and _agree_where_alike(few, many, bench):
            return list(_usable(few))
    return []


def _kv_side(call: Call, known: Sequence[Class]) -> set[str]:
    """Key and value, and what is as long as they are: the buffers of their gradients."""
    first = first_tensor(call)
    key = next((name for name in call.tensors if name.strip("_") in KEY), "")
    names = [{name for name, _, _ in one} for one in known]
    long = {name for one in names if key in one and first not in one for name in one}
    return {
        name
        for name in call.tensors
        if name in long and (name in main_tensors(call) or name in call.written)
    }


def _agree_where_alike(few: Call, many: Call, bench: Bench) -> bool:
    alike = [name for name, whole in many.outputs.items() if few.outputs[name].shape == whole.shape]
    return bool(alike) and all(bench.agrees(many, name, few.outputs[name], 1) for name in alike)


def one_kv_head(found: Sequence[Call], bench: Bench) -> list[Call]:
    """One kv head for all query heads, where a call with fewer of them than query heads is at hand."""
    known = classes(found)
    tied = _tied(found, known)
    first = first_tensor(found[0])
    for call in found:
        for one in known:
            names = {name for name, _, _ in one}
            if first in names or len(names) < 2 or size_of(call, one) < 2:
                continue
            if not any(few == one for _, few in tied):
                continue
            dims = {
                (name, dim): 1
                for name, ndim, dim in one
                if name in call.tensors and call.tensors[name].ndim == ndim
            }
            made = list(_usable(recording.narrowed(bench, call, dims, "one kv head")))
            if made:
                return made
    return []


def divisible(found: Sequence[Call], bench: Bench) -> list[Call]:
    """Calls that can be cut in two and in three, where those at hand cannot: 4 heads leave the third rank
    empty, and 5 kv heads cannot be cut with groups whole."""
    known = classes(found)
    few = {one for _, one in _tied(found, known)}
    made = []
    for ranks in RANKS:

        def fits(size: int, one: Class, ranks: int = ranks) -> bool:
            whole = size % ranks == 0 if one in few else True
            return whole and size > 1 and len(torch.empty(size).chunk(ranks)) == ranks

        short = [one for one in known if not any(fits(size_of(c, one), one) for c in found)]
        made += _resized(found, known, short, bench, partial(_multiple, ranks), RANKS[0])
    return made


def _multiple(ranks: int, size: int) -> int:
    return size - size % ranks


def variations(found: Sequence[Call], known: Sequence[Class], bench: Bench) -> list[Call]:
    """Odd sizes that nothing divides, and flags turned over."""

    def odd(size: int) -> int:
        return next((n for n in range(size - 1, 2, -1) if n % 2 and n % 3), min(size, 3))

    inner = [one for one in known if all(dim < ndim - 1 or ndim < 3 for _, ndim, dim in one)]
    made = _resized(found, known, inner, bench, odd)
    for call in found[:2]:
        for other in recording.flipped(bench, call):
            if form_key(other) == form_key(call):
                made += _usable(other)
    return made


def _resized(
    found: Sequence[Call],
    known: Sequence[Class],
    which: Sequence[Class],
    bench: Bench,
    smaller: Callable[[int], int],
    least: int = 3,
) -> list[Call]:
    """Calls with less of these classes. Where one divides another in all calls, as kv heads do heads, it
    goes on doing so: an unchecked kernel reads beyond its tensors else."""
    tied = _tied(found, known)
    made = []
    for one in which:
        if not any(name in float_tensors(call) for call in found for name, _, _ in one):
            continue
        for call in found:
            size = size_of(call, one)
            new = smaller(size)
            if not least <= new < size or _counted(call, size):
                continue
            if any(new % size_of(call, few) for many, few in tied if many == one):
                continue
            sizes = {one: new}
            for many, few in tied:
                if few == one:
                    sizes[many] = size_of(call, many) // size * new
            taken = list(_usable(_narrow(bench, call, sizes)))
            if taken:
                made += taken
                break
    return made


def _tied(found: Sequence[Call], known: Sequence[Class]) -> list[tuple[Class, Class]]:
    """(many, few) where the few divide the many in all calls: of the first tensor, and of others."""
    first = first_tensor(found[0])
    floats = {name for call in found for name in float_tensors(call)}
    mine = [
        one for one in known if any(name == first and dim < ndim - 1 for name, ndim, dim in one)
    ]
    return [
        (many, few)
        for many in mine
        for few in known
        if few not in mine
        and any(name in floats for name, _, _ in few)
        and all(
            size_of(call, few) > 0 and size_of(call, many) % size_of(call, few) == 0
            for call in found
        )
    ]


def _narrow(bench: Bench, call: Call, sizes: Mapping[Class, int]) -> Call | None:
    dims = {
        (name, dim): size
        for one, size in sizes.items()
        for name, ndim, dim in one
        if name in call.tensors
        and call.tensors[name].ndim == ndim
        and call.tensors[name].shape[dim] > size
    }
    label = ", ".join(f"{name} dim {dim} of {size}" for (name, dim), size in list(dims.items())[:2])
    return recording.narrowed(bench, call, dims, label)


def _counted(call: Call, size: int) -> bool:
    """Whether lengths, or an integer, say how large a dim is: it must not become another."""
    ints = [v for v in call.arguments.values() if isinstance(v, int) and not isinstance(v, bool)]
    # A random state is one number, or unsigned.
    lengths = [
        t
        for t in call.tensors.values()
        if t.ndim == 1 and t.numel() > 0 and t.dtype in (torch.int32, torch.int64)
    ]
    return size in ints or any(int(t.max()) == size for t in lengths)
