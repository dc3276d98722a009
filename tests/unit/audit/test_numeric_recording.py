"""What each module takes and gives, and what it calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attncheck.audit.numeric.captured import GIVEN, OUTPUT, TAKEN, Key
from attncheck.audit.numeric.recording import Event, Recorder
from attncheck.audit.numeric.watching import ATTENTION, SOFTMAX, Watch


class Twice(nn.Module):
    """Calls one module two times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        out: torch.Tensor = self.inner(self.inner(x)) * scale
        return out


def record(model: nn.Module, recorder: Recorder, **kwargs: Any) -> dict[Key, Event]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, requires_grad=True)
    with recorder.recording(model):
        out = model(x, **kwargs)
    if out.requires_grad:
        out.sum().backward()
    return {event.key: event for event in recorder.told()}


def test_the_order_of_execution_is_from_inside_out() -> None:
    events = record(Twice(), Recorder())
    assert [*events] == [
        Key("", 0, GIVEN, 0),
        Key("", 0, TAKEN, 0),
        *(Key("inner", nth, kind, 0) for nth in (0, 1) for kind in (GIVEN, TAKEN, OUTPUT)),
        Key("", 0, OUTPUT, 0),
    ]


def test_values_are_those_at_the_time_and_gradients_come_with_backward() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).mul_(2.0)  # type: ignore[no-any-return]

    model = Overwrites()
    events = record(model, Recorder())
    before, after = events[Key("inner", 0, OUTPUT, 0)], events[Key("", 0, OUTPUT, 0)]
    torch.testing.assert_close(after.captured.local, before.captured.local * 2)
    assert before.gradient is not None
    assert after.gradient is not None
    torch.testing.assert_close(before.gradient.local, after.gradient.local * 2)


def test_a_plan_s_hooks_stand_between_what_is_given_and_what_is_taken() -> None:
    model = nn.Linear(3, 3)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, out: out + 1)
    events = record(model, Recorder())
    given, taken, out = (
        events[Key("", 0, kind, 0)].captured.local for kind in (GIVEN, TAKEN, OUTPUT)
    )
    torch.testing.assert_close(taken, given * 2)
    torch.testing.assert_close(out, F.linear(taken, model.weight, model.bias) + 1)


def test_what_is_put_in_the_place_of_a_tensor_goes_on_from_there() -> None:
    key = Key("inner", 0, OUTPUT, 0)
    model = Twice()
    events = record(model, Recorder(overrides={key: torch.zeros_like}))
    assert float(events[key].captured.local.abs().max()) == 0
    torch.testing.assert_close(
        events[Key("inner", 1, OUTPUT, 0)].captured.local, model.inner.bias.expand(2, 3)
    )


def test_a_checkpoint_that_runs_again_is_recorded_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    events = record(Checkpointed(), Recorder())
    assert [key.nth for key in events if key.path == "inner" and key.kind == OUTPUT] == [0]


def test_a_wrapper_and_what_it_wraps_are_one_module() -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self._checkpoint_wrapped_module(x)  # type: ignore[no-any-return]

    events = record(nn.Sequential(Wraps(), Wraps()), Recorder())
    assert {key.path for key in events} == {"", "0", "1"}
    assert {key.nth for key in events} == {0}


def test_the_module_that_raised_is_told() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    recorder = Recorder()
    with pytest.raises(ValueError):  # noqa: PT011
        record(nn.Sequential(nn.Identity(), Raises()), recorder)
    assert recorder.path == "1"


def test_functions_of_the_user_s_own_are_named() -> None:
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * 2

    class Uses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Mine.apply(x).reshape(3, 2)  # type: ignore[no-any-return]

    recorder = Recorder()
    record(Uses(), recorder)
    assert recorder.functions == {"": ("Mine",)}


# --- what is called ----------------------------------------------------------------------------------------


def watched(call: Any) -> Watch:
    watch = Watch(Recorder())
    with watch.watching():
        call()
    return watch


def test_the_share_of_scores_that_a_softmax_masks() -> None:
    scores = torch.zeros(4, 4).masked_fill(
        ~torch.ones(4, 4, dtype=torch.bool).tril(), float("-inf")
    )
    for call in (
        lambda: F.softmax(scores, -1),
        lambda: scores.softmax(-1),
        lambda: torch.softmax(scores, -1),
    ):
        (seen,) = watched(call).sightings
        assert (seen.kind, seen.masked) == (SOFTMAX, 6 / 16)
        assert seen.line.startswith("test_numeric_recording.py:")


@pytest.mark.parametrize(
    ("given", "masked", "flags"),
    [
        ({}, 0.0, {"is_causal": False, "attn_mask": False}),
        ({"is_causal": True}, 6 / 16, {"is_causal": True, "attn_mask": False}),
        (
            {"attn_mask": torch.ones(4, 4, dtype=torch.bool).tril()},
            6 / 16,
            {"is_causal": False, "attn_mask": True},
        ),
    ],
)
def test_how_attention_is_called(
    given: dict[str, Any], masked: float, flags: dict[str, bool]
) -> None:
    q = torch.randn(1, 1, 4, 8)
    (seen,) = watched(lambda: F.scaled_dot_product_attention(q, q, q, **given)).sightings
    assert seen.kind == ATTENTION
    assert seen.masked == pytest.approx(masked)
    assert seen.flags == flags


def test_dropout_is_turned_off_and_told() -> None:
    q = torch.randn(1, 1, 4, 8)
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.append(F.dropout(q, 0.9))
        kept.append(nn.Dropout(0.9)(q))
        kept.append(F.scaled_dot_product_attention(q, q, q, dropout_p=0.9))

    assert watched(call).dropout
    assert torch.equal(kept[0], q)
    assert torch.equal(kept[1], q)
    torch.testing.assert_close(kept[2], F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("call", [lambda x: F.dropout(x, 0.0), lambda x: F.dropout(x, 0.5, False)])
def test_dropout_that_drops_nothing_is_none(call: Any) -> None:
    assert not watched(lambda: call(torch.ones(4))).dropout
