"""Signatures found by calling ops on pieces: what must be seen of each planted op, and of a healthy one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from attncheck.errors import UserError
from attncheck.fixes import packages, recording, synthesis
from attncheck.fixes.recording import Bench, Call
from attncheck.fixes.synthesis import checking, process
from attncheck.runner import compat

ORACLE = Path(__file__).parents[2] / "oracle"
sys.path.insert(0, str(ORACLE))

import synth_known  # noqa: E402
import synth_ops  # noqa: E402, F401  (registers the ops)

ROOT = Path(__file__).parents[3]
# batch, sequence, kv sequence, heads, kv heads, head_dim; all differ, and so do their halves.
PLAIN = (12, 10, 14, 6, 6, 8)
GROUPED = (12, 10, 14, 6, 2, 8)
OTHER = (14, 9, 11, 6, 6, 8)
UNEVEN = (7, 9, 11, 9, 3, 8)
SIZES = (PLAIN, GROUPED, OTHER, UNEVEN)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def qkv(sizes: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    batch, queries, keys, heads, kv_heads, head_dim = sizes
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, length, many, head_dim, generator=random)
        for name, length, many in (
            ("q", queries, heads),
            ("k", keys, kv_heads),
            ("v", keys, kv_heads),
        )
    }


def called(op: str, arguments: dict[str, Any], label: str = "") -> Call:
    name = f"synth.{op}.default"
    overload = compat.find_overload(name)
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    returned = overload(*given.values())
    results = (
        ()
        if not overload._schema.returns
        else returned
        if isinstance(returned, tuple)
        else (returned,)
    )
    written = {name: given[name] for name in recording.written_names(overload)}
    return Call(name, len(given), arguments, results, written, label)


def calls(op: str, sizes: tuple[tuple[int, ...], ...] = SIZES, **more: Any) -> list[Call]:
    """One for each of these sizes, and for each value of an argument that is a tuple."""
    out = []
    for at, size in enumerate(sizes):
        options = [{}]
        for name, values in more.items():
            values = values if isinstance(values, tuple) else (values,)
            options = [{**o, name: v} for o in options for v in values]
        for option in options:
            made = {k: v(qkv(size)) if callable(v) else v for k, v in option.items()}
            label = (
                f"{op} {at} {', '.join(f'{k}={v}' for k, v in option.items() if not callable(v))}"
            )
            out.append(called(op, {**qkv(size, at), **made}, label))
    return out


def learn(op: str, sizes: tuple[tuple[int, ...], ...] = SIZES, **more: Any) -> synthesis.Synthesis:
    found, held = synthesis.choose(calls(op, sizes, **more))
    return synthesis.synthesise(f"synth.{op}.default", found, held)


# --- healthy ---------------------------------------------------------------------------------------


def test_attention_comes_out_as_one_would_describe_it() -> None:
    made = learn("healthy", scale=(0.3, 0.4), causal=(False, True))
    assert made.signature.takes == {"q": "b sq h d", "k": "b sk g d", "v": "b sk g d"}
    assert list(made.signature.gives.values()) == ["b sq h d", "b h sq"]
    assert made.signature.queries == {"causal": False}
    assert made.rejected == ()
    assert made.signature.needs == {}
    assert made.found.held_out > 20
    assert not made.signature.fake
    # What the notation has no words for is told.
    assert made.beyond == ("v S(3) -> result_0 S(3), result_1 R",)


def test_without_groups_heads_are_one_dim() -> None:
    signature = learn("equal_heads", (PLAIN, OTHER)).signature
    assert signature.takes == {"q": "b sq h d", "k": "b sk h d", "v": "b sk h d"}
    assert signature.queries == {}


def test_groups_are_found_though_no_call_has_any() -> None:
    made = learn("healthy", (PLAIN, OTHER), scale=0.3, causal=False)
    assert made.signature.takes["k"] == "b sk g d"


def test_a_buffer_is_in_place() -> None:
    made = learn("buffer", out=lambda t: torch.empty_like(t["q"]))
    assert made.signature.takes["out"] == "b sq h d, in place"
    assert made.signature.gives == {}


def test_the_log_sum_exp_lies_as_it_lies() -> None:
    assert list(learn("lse_by_heads").signature.gives.values()) == ["b sq h d", "b sq h"]


def test_what_has_no_meta_kernel_is_described_for_one() -> None:
    signature = learn("no_meta").signature
    assert signature.fake
    assert list(signature.gives.values()) == ["b sq h d", "b h sq", "replicated 2, int64"]


def test_a_mask_that_is_the_same_for_all_is_not_taken_for_one_row() -> None:
    def mask(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.randn(1, 1, t["q"].shape[1], t["k"].shape[1])

    signature = learn("masked", mask=mask).signature
    assert signature.takes["mask"] == "b h sq sk"


def test_the_gradient_of_a_mask_is_a_sum_where_it_broadcasts() -> None:
    def mask(t: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.randn(t["q"].shape[0], t["q"].shape[2], t["q"].shape[1], t["k"].shape[1])

    found = []
    for at, size in enumerate(SIZES):
        t = qkv(size, at)
        arguments = {"dout": torch.randn_like(t["q"]), **t, "mask": mask(t)}
        found.append(called("mask_gradient", arguments, f"mask_gradient {at}"))
    chosen, held = synthesis.choose(found)
    signature = synthesis.synthesise("synth.mask_gradient.default", chosen, held).signature
    assert list(signature.gives.values()) == ["like mask, summed over b h sq"]


def test_a_word_says_which_layout_a_signature_is_about() -> None:
    made = learn("worded", (PLAIN, GROUPED, OTHER), layout="bshd")
    assert made.signature.when == {"layout": "bshd"}


def test_where_a_number_makes_it_random_it_must_be_zero() -> None:
    made = learn("dropped", keep_out=0.0)
    assert made.signature.needs == {"keep_out": 0.0}
    assert made.signature.because


def test_self_attention_alone_still_shows_whose_the_queries_are() -> None:
    square = ((12, 10, 10, 6, 6, 8), (14, 9, 9, 6, 6, 8), (7, 11, 11, 9, 3, 8))
    made = learn("healthy", square, scale=0.3, causal=(False, True))
    assert made.signature.takes == {"q": "b sq h d", "k": "b sk g d", "v": "b sk g d"}
    assert made.signature.queries == {"causal": False}


# --- planted ----------------------------------------------------------------------------------------


def test_a_batch_that_is_coupled_is_not_sharded() -> None:
    signature = learn("coupled").signature
    assert signature.takes["q"].split()[0] not in ("b", "h")
    assert signature.takes["q"].split()[1:] == ["sq", "h", "d"]
    assert signature.takes["k"].split()[2] == "g"


def test_what_looks_at_positions_keeps_its_queries() -> None:
    assert learn("always_causal").signature.queries is None


def test_right_on_two_ranks_is_not_right() -> None:
    small = ((6, 10, 14, 9, 9, 8), (6, 9, 11, 9, 3, 8))
    assert "b" not in learn("not_on_three", small).signature.takes["q"].split()


def test_right_on_even_shards_alone_is_seen_by_what_was_held_out() -> None:
    made = learn("even_only", (PLAIN, GROUPED))
    assert "b" not in made.signature.takes["q"].split()
    assert [r.way for r in made.rejected] == ["batch"]
    assert "dim 0 of 11" in made.rejected[0].why


def test_groups_in_another_order_are_not_cut() -> None:
    made = learn("interleaved")
    assert not {"h", "g"} & set(" ".join(made.signature.takes.values()).split())
    assert made.signature.takes["q"].split()[0] == "b"


def test_a_number_of_heads_that_is_passed_holds_them_together() -> None:
    found = [called("told_heads", {**qkv(size), "heads": size[3]}, str(size)) for size in SIZES]
    chosen, held = synthesis.choose(found)
    signature = synthesis.synthesise("synth.told_heads.default", chosen, held).signature
    assert signature.takes["q"].split()[0] == "b"
    assert not {"h", "g"} & set(" ".join(signature.takes.values()).split())


def cache_of(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.randn(t["k"].shape[0], t["k"].shape[1] + 4, *t["k"].shape[2:])


@pytest.mark.parametrize(
    ("op", "more", "sentence"),
    [
        ("random", {}, "synth.random.default is random"),
        ("secretly_changes", {}, "changes its argument k, which its schema does not say"),
        (
            "cache",
            {"cache": cache_of},
            "changes its argument cache, and what it gives depends on",
        ),
        ("unknowable", {}, "has no Meta kernel"),
    ],
)
def test_what_cannot_be_described_is_refused(op: str, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        learn(op, **more)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_lists_of_tensors_are_refused() -> None:
    t = qkv(PLAIN)
    call = Call("synth.many.default", 2, {"q": t["q"], "kv": [t["k"], t["v"]]}, (t["q"],))
    with pytest.raises(UserError, match="takes a list of tensors"):
        synthesis.synthesise("synth.many.default", [call], [])


def test_nothing_is_learned_of_nothing() -> None:
    with pytest.raises(UserError, match="no operator of the probes calls it"):
        synthesis.synthesise("synth.healthy.default", [], [])
    with pytest.raises(UserError, match="is not registered"):
        synthesis.synthesise("synth.nowhere.default", [], [])


def test_a_way_that_nothing_held_out_tests_is_not_offered() -> None:
    """A check that cannot fail proves nothing: no other call, and no flag or size that can be changed."""
    call = called("told_heads", {**qkv((2, 3, 3, 2, 2, 8)), "heads": 2}, "alone")
    made = synthesis.synthesise(call.op, [call], [])
    assert made.found.held_out == 0
    assert not {"b", "h", "g"} & set(" ".join(made.signature.takes.values()).split())


# --- its parts --------------------------------------------------------------------------------------


def test_pieces_say_where_outputs_lie() -> None:
    call = called("healthy", {**qkv(PLAIN), "scale": 0.3, "causal": False}, "one")
    bench = Bench()
    assert bench.cut(call, {"q": 0, "k": 0, "v": 0}, 3) == {"#0": 0, "#1": 0}
    assert bench.cut(call, {"q": 2, "k": 2, "v": 2}, 2) == {"#0": 2, "#1": 1}
    assert bench.cut(call, {"v": 3}, 2) == {"#0": 3, "#1": "R"}
    assert bench.cut(call, {"q": 3, "k": 3}, 2) == "#0 has other values"
    assert "RuntimeError" in bench.cut(call, {"q": 0}, 2)
    assert bench.cut(call, {"q": 0, "k": 0, "v": 0}, 9) == recording.INAPPLICABLE
    # A claim is held against it.
    assert bench.cut(call, {"v": 3}, 2, {"#0": 3, "#1": "P(sum)"}) == "#1 has other values"


def test_half_precision_is_judged_by_what_the_op_shows_unsharded() -> None:
    call = called("equal_heads", {k: t.bfloat16() for k, t in qkv(PLAIN).items()}, "half")
    bench = Bench()
    whole = call.results[0]
    assert bench.agrees(call, "#0", whole * (1 + 2.0**-8), 2)
    off = whole.clone()
    off[3] *= 1.2
    assert not bench.agrees(call, "#0", off, 2)


def test_what_ended_a_process_is_not_called_again() -> None:
    call = called("deadly_attention", qkv(PLAIN), "deadly")
    said: list[str] = []
    fatal = "synth.deadly_attention.default (deadly): q S(2) on rank 0 of 2"
    assert Bench(said.append, [fatal]).cut(call, {"q": 2}, 2) == "it ends the process"
    assert said == []


@pytest.mark.parametrize(
    ("good", "bad", "wanted"),
    [
        ([{"causal": False}], [{"causal": True}], {"causal": False}),
        ([{"causal": False}, {"causal": True}], [], {}),
        ([{"causal": False}], [], {"causal": False}),  # what was not seen to hold is left out
        ([{"causal": False}], [{"causal": False}], None),
        ([], [{"causal": False}], None),
        (
            [{"causal": False, "scale": 0.3}],
            [{"causal": False, "scale": 0.5}],
            {"scale": 0.3, "causal": False},
        ),
    ],
)
def test_conditions(good: Any, bad: Any, wanted: Any) -> None:
    def made(options: dict[str, Any]) -> Call:
        return Call("synth.healthy.default", 5, {**qkv(PLAIN), "scale": 0.3, **options}, ())

    assert checking.conditions([made(o) for o in good], [made(o) for o in bad]) == wanted


# --- in a child process -----------------------------------------------------------------------------


@pytest.mark.slow  # test_fix.py has a child synthesise two ops in every run
def test_ops_that_an_import_registers_are_synthesised_in_a_child() -> None:
    """One of them ends the process where heads are torn: that is skipped, and the rest goes on."""
    request = synthesis.Request(
        imports=("synth_ops",),
        path=(str(ORACLE),),
        operators=("registered.synth.*",),
        kernel_ops=("synth.deadly_attention.*", "synth.equal_heads.*"),
    )
    answer = synthesis.for_operators(request)
    by_op = {found.signature.op: found for found in answer.found}
    assert answer.refused == ()
    assert set(by_op) == {"synth.deadly_attention.default", "synth.equal_heads.default"}
    deadly = by_op["synth.deadly_attention.default"].signature
    assert deadly.takes == {"q": "b sq h d", "k": "b sk g d", "v": "b sk g d"}
    assert deadly.imports == "synth_ops"
    assert answer.fatal
    assert all(text.startswith("synth.deadly_attention.default ") for text in answer.fatal)


def test_a_module_that_does_not_import_is_named(tmp_path: Path) -> None:
    doing = process._Doing(tmp_path / "doing")
    with pytest.raises(UserError, match="nowhere_to_be_found does not import"):
        process._registered_by(["nowhere_to_be_found"], doing)
    assert doing.now() == "importing nowhere_to_be_found"


def test_an_op_that_goes_on_ending_the_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "ENDINGS_IN_FORKS", 2)
    doing, fatal = process._Doing(tmp_path / "doing"), []

    def work(bench: Bench) -> Any:
        bench.say(f"call {len(bench.fatal)}")
        os.kill(os.getpid(), signal.SIGSEGV)

    made = process._in_forks("my.op.default", work, doing, fatal)
    assert isinstance(made, synthesis.Refusal)
    assert "ended the process 2 times" in made.why
    assert fatal == ["call 0", "call 1"]


# --- what is known comes out the same ----------------------------------------------------------------


def known(probe: str, *packages: str) -> dict[str, Any]:
    """What tests/oracle/synth_known.py finds of the ops that a built-in probe's operators reach."""
    from attncheck import provision

    folders = [provision.ensure(provision.parse(p), log=print) for p in packages]
    done = subprocess.run(
        [sys.executable, str(ORACLE / "synth_known.py"), probe, "*"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def different(found: dict[str, Any]) -> dict[str, Any]:
    return {op: why for op, one in found.items() if (why := one.get("differences", one))}


@pytest.mark.parametrize("direction", ["", "_backward"])
def test_sdpa_on_a_cpu_comes_out_as_it_is_described(direction: str) -> None:
    """Its forward ends the process where heads are torn: each time the work goes on in another fork."""
    op = f"aten._scaled_dot_product_flash_attention_for_cpu{direction}.default"
    calls = synth_known.recorded("sdpa.py", [op], "sdpa[FLASH_ATTENTION]")[op]
    described = [s for s in packages.known() if s.op == op]
    found, held = synthesis.choose(calls)
    fatal: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        doing = process._Doing(Path(folder, "doing"))
        work = partial(process._work, op, found, held, "")
        made = process._in_forks(op, work, doing, fatal)
    assert isinstance(made, synthesis.Synthesis), made
    assert bool(fatal) is (direction == "")
    assert made.found.held_out > 50
    assert synth_known.differences(made.signatures, described, calls) == []
    # The comparison sees what is left out, and what is too much.
    fewer = [replace(s, queries=None) for s in made.signatures]
    assert "not synthesised" in synth_known.differences(fewer, described, calls)[0]
    assert "not described" in synth_known.differences(described, fewer, calls)[0]


@pytest.mark.slow
def test_all_known_ops_come_out_as_they_are_described() -> None:
    found = {
        **known("varlen.py"),
        **known("sdpa.py"),
        **known("sdpa_cuda.py"),
        **known("flash_attn_3.py"),
        **known("flash_attn.py", "flash-attn"),
        **known("xformers.py", "xformers", "flash-attn"),
    }
    assert not different(found)
    assert all(one["compared"] > 0 and one["held_out"] > 0 for one in found.values())
    missing = {s.op for s in packages.known()} - set(found)
    assert missing == set(synth_known.UNREACHED)
