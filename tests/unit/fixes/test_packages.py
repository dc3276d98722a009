"""The signatures that attncheck has fit the ops, and every layout that follows from them is right.

Right without DTensor: see tests/oracle/verify_signatures.py. What is planted wrong has to show.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

sys.path.insert(0, str(Path(__file__).parents[2] / "oracle"))

import verify_signatures as verifying

from attncheck import provision, standins
from attncheck.fixes import notation, packages
from attncheck.fixes.notation import Signature, read
from attncheck.fixes.packages import npu, torch_kernels, torch_overrides, torch_views
from attncheck.fixes.strategies import find_op

ROOT = Path(__file__).parents[3]
ORACLE = ROOT / "tests" / "oracle"
OF_TORCH = ("aten", "torch_attn")
FLASH = "aten._scaled_dot_product_flash_attention.default"
FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_backward.default"


def misfit(signature: Signature) -> str:
    """Why a signature does not fit the schema of its op, which has to be there, or ''."""
    op = find_op(signature.op, signature.imports)
    declared = {a.name: a for a in op._schema.arguments}
    if len(signature.gives) != len(op._schema.returns):
        return f"{len(signature.gives)} results, and {len(op._schema.returns)} in the schema"
    for name, text in (*signature.takes.items(), *signature.gives.items()):
        read(text)  # raises ValueError for what is no description
        if name in signature.takes and "Tensor" not in str(declared[name].type):
            return f"{name} is no tensor"
    for name in (*signature.when, *signature.needs, *(signature.queries or ())):
        if name not in declared:
            return f"no argument {name}"
    for name, argument in declared.items():
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and name in signature.takes and not read(signature.takes[name]).in_place:
            return f"it writes into {name}"
    return ""


def test_an_op_has_one_signature_for_each_form() -> None:
    for op, forms in verifying.by_op(packages.known()).items():
        whens = [json.dumps(dict(f.when), sort_keys=True) for f in forms]
        assert len(set(whens)) == len(whens), op
        assert len({(f.imports, f.overrides, f.fake) for f in forms}) == 1, op


def test_signatures_fit_the_schemas() -> None:
    standins.provide("flash_attn_3")
    here = [s for s in packages.known() if s.op.split(".")[0] in (*OF_TORCH, "flash_attn_3")]
    assert len(here) >= 30
    assert not {s.op: why for s in here if (why := misfit(s))}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gives": {"out": "t h d", "lse": "h t"}}, "2 results"),
        ({"takes": {"max_q": "t"}}, "no tensor"),
        ({"needs": {"dropout": 0.0}}, "no argument"),
    ],
)
def test_a_misfit_is_told(change: dict[str, Any], why: str) -> None:
    forward = next(s for s in packages.known() if s.op == "torch_attn._varlen_attn.default")
    assert why in misfit(replace(forward, **change))


def test_an_argument_that_is_written_into_has_to_be_said_to_be() -> None:
    out = next(s for s in packages.known() if s.op == "torch_attn._varlen_attn_out.default")
    assert not misfit(out)
    assert "writes into out" in misfit(replace(out, takes={**out.takes, "out": "t h d"}))


def test_overrides_end_where_nobody_looked() -> None:
    replaced = {s.op: s.overrides for s in packages.known() if s.overrides}
    assert set(replaced) == {s.op for s in torch_overrides.SIGNATURES}
    for first, last in replaced.values():
        assert torch.torch_version.TorchVersion(first) < torch.torch_version.TorchVersion(last)
        # 2.14.1 was looked at, 2.15 was not: reports/published/bugs/seen.json
        assert last == "2.15"


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((4,), {0}), ((4, 6), {0, 1}), ((4, 6, 8), {0, 1, 2}), ((4, 6, 8, 10), {0, 1, 2}),
     ((4, 6, 3, 8, 10), {0, 1, 3})],
)  # fmt: skip
def test_a_view_is_sharded_as_what_it_is_a_view_of(shape: tuple[int, ...], dims: set[int]) -> None:
    (alias,) = torch_views.SIGNATURES
    found = notation.layouts(alias, {}, {"self": shape}, (2,))
    assert all(layout.gives == (layout.takes["self"],) for layout in found)
    assert {layout.gives[0] for layout in found} == {(Replicate(),), *((Shard(d),) for d in dims)}


# --- layouts -------------------------------------------------------------------------------------


def wrong(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    out = {op: {k: g for k, g in gaps.items() if not g <= 1} for op, gaps in found["gaps"].items()}
    return {op: gaps for op, gaps in out.items() if gaps}


def ways(found: dict[str, Any], op: str) -> set[str]:
    return {way for key in found["gaps"][op] for way in key.split(" on ")[0].split(", ")}


def test_layouts_are_right_piece_by_piece() -> None:
    """Raw flash, efficient and cuDNN: dense and packed, grouped, one kv head, a bias and its gradient."""
    found = verifying.main(
        ["sdpa_cuda.raw_*"], ["plain_3", "gqa_3", "gqa_1", "varlen", "bias_grad"]
    )
    assert not wrong(found)
    assert not found["refused"]
    assert not found["failed"]
    assert not found["tables"]
    every = {f"{op} {at}" for op, forms in verifying.by_op(torch_kernels.SIGNATURES).items()
             for at in range(len(forms))}  # fmt: skip
    assert set(found["forms"]) == every
    assert ways(found, torch_kernels.FLASH_BACKWARD) == set(notation.WAYS)
    assert ways(found, torch_kernels.EFFICIENT_BACKWARD) == {"batch", "heads", "replicate"}
    pairs = {k.split(" on ")[0] for k in found["gaps"][torch_kernels.FLASH_BACKWARD]}
    assert {"batch, heads", "heads, queries", "queries, queries"} <= pairs


def planted(op: str, **gives: str) -> tuple[Signature, ...]:
    """All that is known, with other descriptions of an op's results."""
    return tuple(
        replace(s, gives={**s.gives, **gives}) if s.op == op else s for s in packages.known()
    )


@pytest.mark.parametrize(
    ("op", "gives", "setting"),
    [
        (FLASH, {"logsumexp": "h b sq"}, "plain"),
        (FLASH, {"rng_state": "none"}, "plain"),
        (FLASH, {"cum_seq_q": "replicated"}, "plain"),
        (FLASH_BACKWARD, {"grad_key": "replicated"}, "plain"),  # a sum is missing
        (FLASH_BACKWARD, {"grad_query": "b h sk d, summed over sq"}, "plain"),
    ],
)
def test_a_wrong_description_shows(op: str, gives: dict[str, str], setting: str) -> None:
    found = verifying.main(["sdpa_cuda.flash"], [setting], planted(op, **gives))
    assert set(wrong(found)) == {op}
    assert min(max(gaps.values()) for gaps in wrong(found).values()) > 1e3


def test_torn_groups_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def fits_without_groups(way: Any, sizes: Any, mesh: Sequence[int]) -> bool:
        heads = sizes["g"] if "heads" in way else sizes["b"]
        return "query heads" not in way and bool(notation._fewest(heads, mesh) > 0)

    assert not wrong(verifying.main(["sdpa_cuda.flash"], ["gqa_12_3"]))
    monkeypatch.setattr(notation, "_fits", fits_without_groups)
    found = wrong(verifying.main(["sdpa_cuda.flash"], ["gqa_12_3"]))
    assert all("heads on (2,)" in found[op] for op in (FLASH, FLASH_BACKWARD))


def test_a_table_written_by_hand_that_differs_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    import verified_strategies as strategies

    op = torch_kernels.FLASH_FORWARD
    out, lse, *rest = strategies.TABLES[op].results
    table = replace(strategies.TABLES[op], results=(out, lse[::-1], *rest))
    monkeypatch.setitem(strategies.TABLES, op, table)
    found = verifying.main(["sdpa_cuda.raw_flash"], ["plain"])
    assert found["tables"]
    assert all(line.startswith(op) for line in found["tables"])


@pytest.mark.slow
def test_all_layouts_are_right_with_the_real_packages() -> None:
    """Every form of every op that is here, in all settings of the built-in probes."""
    folders = [
        provision.ensure(provision.parse(package), log=print)
        for package in ("flash-attn", "xformers")
    ]
    done = subprocess.run(
        [sys.executable, str(ORACLE / "verify_signatures.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert not wrong(found)
    assert not found["tables"]
    # Its own formula has too few gradients for a call with `causal`.
    assert set(found["failed"]) == {"flash_attn_3.custom_op_direct"}
    every = {
        f"{op} {at}"
        for op, forms in verifying.by_op(packages.known()).items()
        for at in range(len(forms))
        if not op.startswith("npu")
    }
    never = {f"{FLASH} 1"}  # the debug mask, which takes dropout
    assert set(found["forms"]) == every - never
    for op in ("flash_attn._flash_attn_forward.default", "xformers_flash.flash_fwd.default"):
        assert "queries" in ways(found, op)
    assert "query heads" in ways(found, "flash_attn._flash_attn_forward.default")


# --- npu: a stand-in of our own ------------------------------------------------------------------

ALL = 2147483647
NPU_FORWARD = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., "
    f"float keep_prob=1., int pre_tockens={ALL}, int next_tockens={ALL}, int inner_precise=0, "
    "int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, "
    "bool gen_mask_parallel=True, bool sync=False) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
)
NPU_BACKWARD = (
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, "
    "str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, "
    "Tensor? attention_in=None, float scale_value=1., float keep_prob=1., "
    f"int pre_tockens={ALL}, int next_tockens={ALL}, int inner_precise=0, int seed=0, int offset=0, "
    "int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    "int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False) -> (Tensor, Tensor, Tensor, Tensor)"
)


def to_bnsd(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """Dense layouts to (batch, heads, sequence, head_dim)."""
    if layout in ("BSH", "SBH"):
        x = x.unflatten(-1, (heads, -1))
    return x.permute({"BNSD": (0, 1, 2, 3), "SBH": (1, 2, 0, 3)}.get(layout, (0, 2, 1, 3)))


def from_bnsd(x: torch.Tensor, layout: str) -> torch.Tensor:
    x = x.permute({"BNSD": (0, 1, 2, 3), "SBH": (2, 0, 1, 3)}.get(layout, (0, 2, 1, 3)))
    return x.flatten(-2) if layout in ("BSH", "SBH") else x


def npu_scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, mode: int
) -> torch.Tensor:
    """Masked scores of (batch, heads, sequence, head_dim); a mask is true where nothing is seen."""
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    if mode in (2, 3):  # the triangle of fixed size stands for one that is as large as the scores
        shift = k.shape[2] - q.shape[2] if mode == 3 else 0
        mask = torch.ones(q.shape[2], k.shape[2]).triu(1 + shift).bool()
    return scores if mask is None else scores.masked_fill(mask.bool(), -1e9)


def npu_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    sparse_mode: int = 0,
    **others: Any,
) -> tuple[Any, ...]:
    kv_heads = key.shape[-1] * head_num // query.shape[-1]  # of merged heads
    q, k, v = (
        to_bnsd(x, input_layout, n)
        for x, n in ((query, head_num), (key, kv_heads), (value, kv_heads))
    )
    if q.shape[1] != head_num:
        raise RuntimeError("head_num is not the number of heads")
    scores = npu_scores(q, k, atten_mask, scale, sparse_mode)
    largest = scores.amax(-1, keepdim=True)
    total = (scores - largest).exp().sum(-1, keepdim=True)
    out = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    eight = (largest.expand(-1, -1, -1, 8).clone(), total.expand(-1, -1, -1, 8).clone())
    return from_bnsd(out, input_layout).contiguous(), *eight, query.new_empty(0), 0, 0, 0


def npu_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    atten_mask: torch.Tensor | None = None,
    scale_value: float = 1.0,
    sparse_mode: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    """From the row maxima and sums and the output that the forward left, as the kernel does it."""
    kv_heads = key.shape[-1] * head_num // query.shape[-1]
    if input_layout in ("BNSD", "BSND"):
        kv_heads = key.shape[input_layout.index("N")]
    counts = (head_num, kv_heads, kv_heads, head_num, head_num)
    q, k, v, d, out = (
        to_bnsd(x, input_layout, n)
        for x, n in zip((query, key, value, dy, others["attention_in"]), counts, strict=True)
    )
    largest, total = (others[f"softmax_{n}"][..., :1] for n in ("max", "sum"))
    weights = (npu_scores(q, k, atten_mask, scale_value, sparse_mode) - largest).exp() / total
    group = head_num // kv_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    slopes = weights * (d @ v.transpose(2, 3) - (d * out).sum(-1, keepdim=True)) * scale_value
    dk, dv = slopes.transpose(2, 3) @ q, weights.transpose(2, 3) @ d
    dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))
    grads = (from_bnsd(x, input_layout).contiguous() for x in (slopes @ k, dk, dv))
    return *grads, query.new_empty(0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def npu_ops() -> Iterator[Any]:
    library = torch.library.Library("npu", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema, kernel in ((NPU_FORWARD, npu_forward), (NPU_BACKWARD, npu_backward)):
        library.define(schema)  # type: ignore[no-untyped-call]
        library.impl(schema.partition("(")[0], _by_name(schema, kernel), "CPU")  # type: ignore[no-untyped-call]
    yield torch.ops.npu
    library._destroy()  # type: ignore[no-untyped-call]


def _by_name(schema: str, kernel: Any) -> Any:
    """The kernel called with all arguments by name, as the dispatcher hands on some by position."""

    def called(*args: Any, **kwargs: Any) -> Any:
        declared = getattr(torch.ops.npu, schema.partition("(")[0]).default._schema.arguments
        return kernel(**dict(zip((a.name for a in declared), args, strict=False)), **kwargs)

    return called


def npu_calls(
    ops: Any, layout: str, kv_heads: int, mode: int, mask: Sequence[int]
) -> list[verifying.Call]:
    torch.manual_seed(3)
    batch, heads, rows, columns, width = 7, 6, 10, 22, 16
    q, k, v, dy = (
        from_bnsd(torch.randn(batch, n, s, width), layout).contiguous()
        for n, s in ((heads, rows), (kv_heads, columns), (kv_heads, columns), (heads, rows))
    )
    hidden = torch.rand(mask) > 0.7 if mask else None
    flags = {"sparse_mode": mode, "atten_mask": hidden}
    forms = verifying.by_op(npu.SIGNATURES)
    with verifying.Recorder(verifying.written(forms)) as recorder:
        out, largest, total, *_ = ops.npu_fusion_attention(
            q, k, v, heads, layout, scale=0.3, **flags
        )
        ops.npu_fusion_attention_grad(
            q, k, v, dy, heads, layout, scale_value=0.3, softmax_max=largest, softmax_sum=total,
            attention_in=out, **flags,
        )  # fmt: skip
    return recorder.calls


MASKS = ((0, ()), (0, (7, 6, 10, 22)), (1, (7, 1, 10, 22)), (0, (1, 1, 10, 22)), (0, (10, 22)))
TRIANGLES = ((2, (64, 64)), (3, (64, 64)))


@pytest.mark.parametrize(
    "layout", ["BNSD", "SBH", *(pytest.param(x, marks=pytest.mark.slow) for x in ("BSND", "BSH"))]
)
def test_npu_layouts_are_right_on_a_stand_in(npu_ops: Any, layout: str) -> None:
    """A stand-in of our own with the schema of the documentation; Ascend's kernels were never run."""
    forms = verifying.by_op(npu.SIGNATURES)
    seen: dict[int, set[str]] = {}
    for mode, mask in (*MASKS, *TRIANGLES):
        calls = npu_calls(npu_ops, layout, 2 if mask else 6, mode, mask)
        assert len(calls) == 2
        for call, mesh in itertools.product(calls, ((2,), (3,))):
            gaps = verifying.verify(call, forms, mesh)
            assert max(gaps.values()) <= 1, (layout, mode, mask, gaps)
            seen.setdefault(mode, set()).update(gaps)
    assert seen == {
        0: {"batch", "queries", "replicate"},
        1: {"batch", "queries", "replicate"},
        2: {"batch", "replicate"},
        3: {"batch", "replicate"},
    }


def test_npu_signatures_fit_the_schemas(npu_ops: Any) -> None:
    assert not {s.op: why for s in npu.SIGNATURES if (why := misfit(s))}


def test_npu_heads_cannot_be_sharded(npu_ops: Any) -> None:
    """The premise: the op gets the number of heads, which a strategy cannot change."""
    call = npu_calls(npu_ops, "BNSD", 6, 0, ())[0]
    forms = {
        s.op: [replace(s, takes={**s.takes, "query": "b h sq d", "key": "b g sk d",
                                 "value": "b g sk d"}, gives={**s.gives, "attention_out": "b h sq d",
                                 "softmax_max": "b h sq 8", "softmax_sum": "b h sq 8"})]
        for s in npu.SIGNATURES[:1]
    }  # fmt: skip
    assert verifying.verify(call, forms, (2,))["heads"] == torch.inf
