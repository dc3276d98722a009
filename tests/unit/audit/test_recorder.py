"""What is recorded of a model, op by op: placements, problems, and who asked for which collective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_group import fake_mesh, placed, texts_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from attncheck.audit.carry import carry_on
from attncheck.audit.recorder import Recorder
from attncheck.audit.seen import BACKWARD, FORWARD, Told, told

MIX = "attncheck_recorder.mix_attention.default"
MM, SOFTMAX = "aten.mm.default", "aten._softmax.default"
TOKENS, WIDTH, RANKS = 8, 64, 4
LOCAL = TOKENS * WIDTH * 4 // RANKS  # bytes that a rank holds of a sharded activation
HERE = "test_recorder.py"


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[None]:
    library = torch.library.Library("attncheck_recorder", "DEF")

    def mix(query: torch.Tensor, key: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.empty_like(query)

    library.define("mix_attention(Tensor query, Tensor key, float scale=1.0) -> Tensor")
    library.impl("mix_attention", mix, "Meta")
    yield
    library._destroy()


class Mix(torch.autograd.Function):
    """An attention that torch knows no strategy for, in either direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.ops.attncheck_recorder.mix_attention(x, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.attncheck_recorder.mix_attention(gradients[0], x, 0.5)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Mix.apply(x)


class Layer(nn.Module):
    """Column-wise up, attention, a softmax over what is sharded, row-wise down."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.up = nn.Parameter(placed((WIDTH, WIDTH), ["S(1)"], mesh))
        self.down = nn.Parameter(placed((WIDTH, WIDTH), ["S(0)"], mesh))
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.attention(x @ self.up)
        weights = mixed.softmax(-1)
        summed = weights @ self.down
        assert isinstance(summed, DTensor)
        return summed.redistribute(placements=[Replicate()])


@pytest.fixture(scope="module")
def two_layers() -> Told:
    with fake_mesh({"tp": RANKS}) as mesh:
        model = nn.Sequential(Layer(mesh), Layer(mesh))
        return record(model, placed((TOKENS, WIDTH), ["R"], mesh, requires_grad=True))


def record(model: nn.Module, *given: torch.Tensor, carry: Any = carry_on) -> Told:
    recorder = Recorder(carry)
    recorder.where.name(model)
    with recorder.recording():
        out = model(*given)
        if out.requires_grad:
            out.sum().backward()
    return told(recorder.facts, recorder.where.paths.values())


def kinds(said: Told, phase: str, op: str) -> list[tuple[str, Any, Any, int]]:
    return [
        (each.module, each.inputs, each.outputs, each.calls)
        for each in said.ops
        if (each.phase, each.op) == (phase, op)
    ]


def line_of(text: str) -> str:
    """Where this file says so."""
    with open(__file__, encoding="utf-8") as file:
        (line,) = [at for at, line in enumerate(file, 1) if line.strip() == text]
    return f"{HERE}:{line}"


# --- a planted model -----------------------------------------------------------------------------


def test_ops_with_their_placements(two_layers: Told) -> None:
    assert kinds(two_layers, FORWARD, MM) == [
        ("*", (("R",), ("S(1)",)), (("S(1)",),), 2),
        ("*", (("R",), ("S(0)",)), (("P(sum)",),), 2),
    ]
    # DTensor brings the softmax's input together first: what comes out is whole.
    assert kinds(two_layers, FORWARD, SOFTMAX) == [("*", (("S(1)",),), (("R",),), 2)]


def test_what_a_model_asks_for_is_told_apart(two_layers: Told) -> None:
    forward = [each for each in two_layers.communication if each.phase == FORWARD]
    assert [(each.module, each.name, each.calls, each.bytes) for each in forward] == [
        ("*", "all_gather", 2, 2 * (RANKS - 1) * LOCAL),
        ("*", "all_reduce", 2, 2 * 2 * (RANKS - 1) * TOKENS * WIDTH * 4 // RANKS),
    ]
    assert [(each.asked, each.kernel_op) for each in forward] == [(False, SOFTMAX), (True, "")]


def test_backward_is_told_by_module_too(two_layers: Told) -> None:
    backward = [each for each in two_layers.communication if each.phase == BACKWARD]
    assert backward
    assert all(each.module in ("0", "1", "*") for each in backward)
    assert sum(calls for *_, calls in kinds(two_layers, BACKWARD, MM)) == 2 * 2 * 2


def test_what_is_refused_is_gone_past(two_layers: Told) -> None:
    refused = [each for each in two_layers.ops if each.problem]
    assert [(each.module, each.op, each.phase, each.calls) for each in refused] == [
        ("*.attention", MIX, FORWARD, 2),
        ("*.attention", MIX, BACKWARD, 2),
    ]
    assert {each.problem for each in refused} == {"strategy"}
    assert {each.message for each in refused} == {
        f"Operator {MIX} does not have a sharding strategy registered."
    }
    assert refused[0].inputs == (("S(1)",), ("S(1)",))


def test_attention_calls(two_layers: Told) -> None:
    """Those of the forward pass: a backward op is no call of the model's."""
    (seen,) = two_layers.attention
    assert (seen.modules, seen.calls, seen.call.op) == (("*.attention",), 2, MIX)
    query, _ = seen.call.tensors
    assert (query.name, query.shape, query.dtype) == ("query", (TOKENS, WIDTH), "float32")
    assert (query.placements, query.axes) == (("S(1)",), ("tp",))


def test_lines(two_layers: Told) -> None:
    """Of two calls of the same op in a module, each has its own."""
    lines = {(each.op, each.inputs): each.line for each in two_layers.ops if each.phase == FORWARD}
    assert lines[MM, (("R",), ("S(1)",))] == line_of("mixed = self.attention(x @ self.up)")
    assert lines[MM, (("R",), ("S(0)",))] == line_of("summed = weights @ self.down")
    assert lines[MIX, (("S(1)",), ("S(1)",))] == line_of(
        "return torch.ops.attncheck_recorder.mix_attention(x, x)"
    )
    traffic = {each.name: each.line for each in two_layers.communication if each.phase == FORWARD}
    assert traffic["all_gather"] == line_of("weights = mixed.softmax(-1)")
    assert traffic["all_reduce"] == line_of("return summed.redistribute(placements=[Replicate()])")


@pytest.mark.parametrize("layers", [1, 5])
def test_layers_add_up(layers: int, two_layers: Told) -> None:
    """The first of equal calls is looked at, the others are counted: to the same sums."""
    with fake_mesh({"tp": RANKS}) as mesh:
        model = nn.Sequential(*(Layer(mesh) for _ in range(layers)))
        x = placed((TOKENS, WIDTH), ["R"], mesh, requires_grad=True)
        said = record(model, x)
    for phase in (FORWARD, BACKWARD):
        counts = {op: sum(n for *_, n in kinds(said, phase, op)) for op in (MM, SOFTMAX, MIX)}
        two = {op: sum(n for *_, n in kinds(two_layers, phase, op)) for op in (MM, SOFTMAX, MIX)}
        assert {op: 2 * count for op, count in counts.items()} == {
            op: layers * count for op, count in two.items()
        }
    forward = [
        sum(e.bytes for e in t.communication if e.phase == FORWARD) for t in (said, two_layers)
    ]
    assert 2 * forward[0] == layers * forward[1]


# --- single calls --------------------------------------------------------------------------------


class Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return self.function(*given)


def test_without_carry_what_an_op_raises_goes_on() -> None:
    """As in any run; it is written down all the same."""
    recorder = Recorder()
    with fake_mesh({"tp": 2}) as mesh:
        x = placed((4, 4), ["S(0)"], mesh)
        model = nn.Sequential(Attention())
        with recorder.recording(), pytest.raises(NotImplementedError, match="sharding strategy"):
            model(x)
    said = told(recorder.facts, recorder.where.paths.values())
    assert [(each.module, each.op, each.problem) for each in said.ops] == [("0", MIX, "strategy")]
    assert said.attention[0].modules == ("0",)


def test_an_error_that_carrying_on_does_not_mend_is_the_ops_own() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        a, b = placed((4, 4), ["S(0)"], mesh), placed((5, 4), ["R"], mesh)
        recorder = Recorder(carry_on)
        with recorder.recording(), pytest.raises(RuntimeError) as raised:
            Calls(torch.mm)(a, b)
    (op,) = told(recorder.facts, [""]).ops
    assert (op.op, op.problem) == (MM, "error")
    assert op.message.partition(":")[0] == type(raised.value).__name__
    assert op.line.startswith(HERE)


def test_a_plain_tensor_among_dtensors() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        said = record(Calls(torch.mul), placed((4, 4), ["S(0)"], mesh), torch.empty(4, 4))
    (op,) = said.ops
    assert (op.op, op.problem, op.inputs) == ("aten.mul.Tensor", "mixed", (("S(0)",), ("plain",)))
    assert "mixed torch.Tensor and DTensor" in op.message


def test_what_is_plain_alone_is_no_business_of_dtensors() -> None:
    with fake_mesh({"tp": 2}):
        assert record(Calls(torch.mul), torch.empty(4, 4), torch.empty(4, 4)).ops == ()


def test_attention_within_local_map_is_attention() -> None:
    with fake_mesh({"tp": 2}) as mesh:
        mix = local_map(
            torch.ops.attncheck_recorder.mix_attention,
            out_placements=[Shard(0)],
            in_placements=([Shard(0)], [Shard(0)]),
            device_mesh=mesh,
        )
        x = placed((4, 6), ["S(0)"], mesh)
        said = record(nn.Sequential(Calls(lambda x: mix(x, x))), x)
    assert not [op for op in said.ops if op.problem]
    (seen,) = said.attention
    assert (seen.call.op, seen.modules) == (MIX, ("0",))
    assert [(t.shape, t.placements) for t in seen.call.tensors] == [((2, 6), ()), ((2, 6), ())]


def test_flags_are_part_of_a_call() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        mix = torch.ops.attncheck_recorder.mix_attention
        return mix(mix(mix(x, x), x), x, scale=float("nan"))

    with fake_mesh({"tp": 2}) as mesh:
        said = record(Calls(twice), placed((4, 6), ["S(0)"], mesh))
    assert [(seen.call.flags, seen.calls) for seen in said.attention] == [
        ("{}", 2),
        ('{"scale": "nan"}', 1),
    ]


def test_mask_dtypes_are_part_of_a_call() -> None:
    def twice(x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        mix = torch.ops.attncheck_recorder.mix_attention
        return mix(mix(x, one), other)

    with fake_mesh({"tp": 2}) as mesh:
        x = placed((4, 6), ["S(0)"], mesh)
        said = record(Calls(twice), x, torch.empty(4, 6), torch.empty(4, 6, dtype=torch.bool))
    dtypes = [seen.call.tensors[1].dtype for seen in said.attention]
    assert dtypes == ["float32", "bool"]


# --- communication -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "name", "sent"),
    [
        ("S(0)", "R", "all_gather", 3 * 64),
        ("P(sum)", "R", "all_reduce", 2 * 3 * 256 // 4),
        ("P(sum)", "S(0)", "reduce_scatter", 3 * 256 // 4),
        # One all-to-all, though gloo makes it of others.
        ("S(0)", "S(1)", "all_to_all", 3 * 64 // 4),
    ],
)
def test_bytes_of_a_redistribution(before: str, after: str, name: str, sent: int) -> None:
    """(8, 8) of float32 on four ranks: 256 bytes, and 64 to each."""
    from attncheck.runner import compat

    def move(x: torch.Tensor) -> torch.Tensor:
        assert isinstance(x, DTensor)
        return x.redistribute(placements=[compat.placement_from_text(after)])

    with fake_mesh({"tp": 4}) as mesh:
        said = record(Calls(move), placed((8, 8), [before], mesh))
    (traffic,) = said.communication
    assert (traffic.name, traffic.calls, traffic.bytes) == (name, 1, sent)
    assert traffic.asked


def test_what_the_model_itself_communicates() -> None:
    from torch.distributed._functional_collectives import all_reduce

    with fake_mesh({"tp": 4}) as mesh:

        def reduce(x: torch.Tensor) -> torch.Tensor:
            return all_reduce(x, "sum", mesh)

        said = record(nn.Sequential(Calls(reduce)), torch.empty(8, 8))
    (traffic,) = said.communication
    assert (traffic.module, traffic.name, traffic.bytes) == ("0", "all_reduce", 2 * 3 * 256 // 4)
    assert traffic.asked
    assert said.ops == ()


def test_weights_that_are_placed_are_no_step() -> None:
    """Before the model is called for the first time."""
    recorder = Recorder(carry_on)
    with fake_mesh({"tp": 4}) as mesh, recorder.recording():
        x = placed((8, 8), ["S(0)"], mesh)
        x.redistribute(placements=[Replicate()])
        assert recorder.facts.traffic == {}
        Calls(lambda x: x.redistribute(placements=[Replicate()]))(x)
        assert [kind.name for kind in recorder.facts.traffic] == ["all_gather"]


def test_carrying_on_communicates_nothing(two_layers: Told) -> None:
    assert not [each for each in two_layers.communication if each.kernel_op == MIX]


# --- uneven shards -------------------------------------------------------------------------------


def test_uneven_arguments() -> None:
    with fake_mesh({"dp": 2, "tp": 4}) as mesh:
        x = placed((6, 10, 8), ["S(0)", "S(1)"], mesh)
        said = record(nn.Sequential(Calls(torch.neg)), x)
    (shard,) = said.uneven
    assert shard.tensor == "0: aten.neg.default"
    assert (shard.dim, shard.size, shard.axis, shard.ranks) == (1, 10, "tp", 4)
    assert (shard.first, shard.last) == (3, 1)


def test_a_dim_that_two_axes_shard() -> None:
    """Nine rows: five and four on dp, and of the five three and two on tp."""
    with fake_mesh({"dp": 2, "tp": 2}) as mesh:
        said = record(nn.Sequential(Calls(torch.neg)), placed((9, 8), ["S(0)", "S(0)"], mesh))
    assert [(each.size, each.axis, each.first, each.last) for each in said.uneven] == [
        (9, "dp", 5, 4),
        (5, "tp", 3, 2),
    ]


# --- off -----------------------------------------------------------------------------------------


def test_switched_off_it_records_nothing() -> None:
    recorder = Recorder(carry_on)
    with fake_mesh({"tp": 2}) as mesh, recorder.recording():
        recorder.on = False
        x = placed((4, 4), ["S(0)"], mesh)
        out = Calls(lambda x: x.neg())(x)
    assert texts_of(out) == ("S(0)",)
    assert recorder.facts.ops == {}
    assert recorder.facts.traffic == {}
