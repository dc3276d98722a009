"""Functions that are no dispatcher ops, called on local shards: values, gradients, and what is refused."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from attncheck.fixes import emit, local_calls, packages
from attncheck.fixes.local_calls import local_call, patch, unpatch
from attncheck.fixes.notation import GIVEN, Refused, Signature, read
from attncheck.fixes.strategies import NotRegistered
from attncheck.runner import compat
from tests.unit.real_scan import outcomes, scan

# All sizes and their halves differ.
B, SQ, SK, D = 4, 14, 22, 16
CAUSAL_APART = {"causal": False, "window_size[0]": -1, "window_size[1]": -1}
ATTEND = Signature(
    "mine.attend",
    takes={"q": "b sq h d", "k": "b sk g d", "v": "b sk g d", "slopes": "h"},
    gives={"out": "b sq h d", "lse": "b h sq", "seed": "replicated", "nothing": "none"},
    queries=CAUSAL_APART,
)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    slopes: torch.Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Any:
    """(batch, sequence, heads, head_dim), like flash-attn."""
    assert not any(isinstance(t, DTensor) for t in (q, k, v, slopes))
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / D**0.5
    if slopes is not None:
        scores = scores * slopes[:, None, None]
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return (out, scores.logsumexp(-1), torch.tensor([7]), None) if return_lse else out


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    compat.simulated_group(4)
    yield
    dist.destroy_process_group()


def tensors(heads: int = 6, kv_heads: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(heads)
    sizes = (B, SQ, heads, D), (B, SK, kv_heads, D), (B, SK, kv_heads, D)
    return tuple(torch.randn(size) for size in sizes)


def error(got: Any, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    difference = (got.full_tensor() - wanted).detach().abs().max()
    return float(difference.reconcile() if hasattr(difference, "reconcile") else difference)


# --- values --------------------------------------------------------------------------------------

HEADS, BATCH, QUERY, WHOLE = Shard(2), Shard(0), Shard(1), Replicate()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads", "q_at", "kv_at", "out_at"),
    [
        ((2,), 6, 6, [HEADS], [HEADS], [HEADS]),
        ((3,), 8, 8, [HEADS], [HEADS], [HEADS]),  # 3, 3 and 2 heads
        ((2,), 6, 2, [HEADS], [HEADS], [HEADS]),
        ((3,), 6, 2, [HEADS], [HEADS], [WHOLE]),  # groups would be torn
        ((2,), 6, 1, [HEADS], [WHOLE], [HEADS]),
        ((2,), 6, 6, [BATCH], [BATCH], [BATCH]),
        ((2,), 6, 6, [HEADS], [QUERY], [HEADS]),  # k and v move
        ((2,), 6, 6, [QUERY], [WHOLE], [QUERY]),
        ((2, 2), 8, 4, [BATCH, HEADS], [BATCH, HEADS], [BATCH, HEADS]),
        ((2, 2), 8, 4, [HEADS, HEADS], [HEADS, HEADS], [HEADS, HEADS]),
    ],
)
def test_values_and_gradients_are_those_of_the_whole(
    mesh: tuple[int, ...],
    heads: int,
    kv_heads: int,
    q_at: list[Any],
    kv_at: list[Any],
    out_at: list[Any],
    causal: bool,
) -> None:
    whole = [t.requires_grad_() for t in tensors(heads, kv_heads)]
    wanted = attend(*whole, causal, return_lse=True)[:2]
    weight = torch.randn(wanted[0].shape)
    wanted += torch.autograd.grad((wanted[0] * weight).sum(), whole)
    with LocalTensorMode(torch.Size(mesh).numel()):
        device_mesh = init_device_mesh("cpu", mesh)
        placed = [
            distribute_tensor(t.detach(), device_mesh, at).requires_grad_()
            for t, at in zip(whole, (q_at, kv_at, kv_at), strict=True)
        ]
        out, lse, seed, nothing = local_call([ATTEND], attend)(*placed, causal, return_lse=True)
        weight = distribute_tensor(weight, device_mesh, [WHOLE] * len(mesh))
        got = [out, lse, *torch.autograd.grad((out * weight).sum(), placed)]
        assert [error(*pair) < 1e-5 for pair in zip(got, wanted, strict=True)] == [True] * 5
        assert (list(seed.placements), nothing) == ([WHOLE] * len(mesh), None)
        if not causal or QUERY not in q_at:
            assert list(out.placements) == out_at
        for grad, leaf in zip(got[2:], placed, strict=True):
            allowed = {p: (p, Partial("sum")) if p == WHOLE else (p,) for p in leaf.placements}
            assert all(
                g in allowed[p] for g, p in zip(grad.placements, leaf.placements, strict=True)
            )


def test_what_lies_as_it_should_is_called_without_communication() -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        placed = [distribute_tensor(t, mesh, [HEADS]).requires_grad_() for t in tensors()]
        with CommDebugMode() as seen:
            local_call([ATTEND], attend)(*placed).sum().to_local().backward()
        assert seen.get_total_counts() == 0


def test_one_tensor_may_be_several_arguments() -> None:
    """Queries stay sharded by rows, while keys and values, the same tensor, are gathered."""
    x = torch.randn(B, SQ, 6, D, requires_grad=True)
    weight = torch.randn(x.shape)
    (wanted,) = torch.autograd.grad((attend(x, x, x) * weight).sum(), x)
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        placed = distribute_tensor(x.detach(), mesh, [QUERY]).requires_grad_()
        out = local_call([ATTEND], attend)(placed, placed, placed)
        assert list(out.placements) == [QUERY]
        (got,) = torch.autograd.grad((out * distribute_tensor(weight, mesh, [QUERY])).sum(), placed)
        assert error(got, wanted) < 1e-5


def test_ordinary_tensors_go_straight_through() -> None:
    whole = tensors()
    assert torch.equal(local_call([ATTEND], attend)(*whole), attend(*whole))


def test_keeps_the_signature_and_binds_like_the_function() -> None:
    wrapped = local_call([ATTEND], attend)
    assert inspect.signature(wrapped) == inspect.signature(attend)
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        q, k, v = (distribute_tensor(t, mesh, [HEADS]) for t in tensors())
        assert error(wrapped(v=v, q=q, k=k), attend(*tensors())) < 1e-5
        with pytest.raises(TypeError, match="missing a required argument"):
            wrapped(q, k)


def test_an_ordinary_tensor_that_is_whole_is_taken_and_one_to_be_sharded_refused() -> None:
    slopes = torch.rand(6) + 0.5
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        q, k, v = (distribute_tensor(t, mesh, [BATCH]) for t in tensors())
        wrapped = local_call([ATTEND], attend)
        assert error(wrapped(q, k, v, slopes=slopes), attend(*tensors(), slopes=slopes)) < 1e-5
        q, k, v = (distribute_tensor(t, mesh, [HEADS]) for t in tensors())
        with pytest.raises(
            Refused, match=r"slopes is an ordinary tensor .* would have to be S\(0\)"
        ):
            wrapped(q, k, v, slopes=slopes)
        placed = distribute_tensor(slopes, mesh, [WHOLE])
        assert error(wrapped(q, k, v, slopes=placed), attend(*tensors(), slopes=slopes)) < 1e-5


def test_a_gradient_that_would_be_one_ranks_share_is_refused() -> None:
    slopes = torch.rand(6).requires_grad_()
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        q, k, v = (distribute_tensor(t, mesh, [BATCH]) for t in tensors())
        with pytest.raises(Refused, match=r"slopes is an ordinary tensor .* given a gradient"):
            local_call([ATTEND], attend)(q, k, v, slopes=slopes)


# --- what a function writes into -----------------------------------------------------------------

APPEND = Signature(
    "mine.append",
    takes={"cache": "b sk h d, in place", "new": "b rows h d", "lengths": "b"},
    gives={"out": "b rows h d"},
    when={"new": GIVEN},
)


def append(cache: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    rows = lengths[:, None] + torch.arange(new.shape[1])
    cache[torch.arange(cache.shape[0])[:, None], rows] = new
    return new * 2


@pytest.mark.parametrize("at", [HEADS, BATCH, WHOLE])
def test_writes_reach_the_cache(at: Any) -> None:
    cache, new, lengths = (
        torch.zeros(B, SK, 6, D),
        torch.randn(B, 3, 6, D),
        torch.tensor([2, 0, 9, 5]),
    )
    wanted = cache.clone()
    append(wanted, new, lengths)
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        placed = distribute_tensor(cache, mesh, [at])
        everywhere = (distribute_tensor(t, mesh, [WHOLE]) for t in (new, lengths))
        out = local_call([APPEND], append)(
            placed, *everywhere
        )  # integers and new rows follow the cache
        assert (error(placed, wanted), error(out, new * 2)) == (0, 0)
        assert list(out.placements) == [at]


def test_what_it_writes_into_is_never_moved() -> None:
    cache, new, lengths = (
        torch.zeros(B, SK, 6, D),
        torch.randn(B, 3, 6, D),
        torch.tensor([2, 0, 9, 5]),
    )
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        placed = distribute_tensor(cache, mesh, [Shard(1)])
        other = (distribute_tensor(t, mesh, [WHOLE]) for t in (new, lengths))
        with pytest.raises(Refused, match=r"writes into .* has cache S\(1\): bring them to one of"):
            local_call([APPEND], append)(placed, *other)
        assert error(placed, cache) == 0


# --- refusals ------------------------------------------------------------------------------------


def test_a_result_that_is_not_what_is_described_is_refused() -> None:
    wrong = Signature(
        "mine.attend", ATTEND.takes, {"out": "b sq h d", "lse": "b sq h", "s": "none"}
    )
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        q, k, v = (distribute_tensor(t, mesh, [HEADS]) for t in tensors())
        with pytest.raises(Refused, match="returned 4 results; 3 are described"):
            local_call([wrong], attend)(q, k, v, return_lse=True)
        cut = local_call([wrong], lambda q, k, v: attend(q, k, v, return_lse=True)[:2])
        with pytest.raises(Refused, match="lse is described as 'b sq h', and has 14 of 'h'"):
            cut(q, k, v)


def test_tensors_on_two_meshes_are_refused() -> None:
    with LocalTensorMode(4):
        one, other = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        q, k, v = tensors(8, 8)
        q = distribute_tensor(q, one, [HEADS])
        k, v = (distribute_tensor(t, other, [HEADS, HEADS]) for t in (k, v))
        with pytest.raises(Refused, match="k lies on another mesh than q"):
            local_call([ATTEND], attend)(q, k, v)


# --- in place of functions -----------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package `mine` that defines `attend` in `mine.inner` and re-exports it."""
    outer, inner = types.ModuleType("mine"), types.ModuleType("mine.inner")
    stranger = types.ModuleType("stranger")
    for module in (outer, inner, stranger):
        module.attend = attend  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield outer
    unpatch()
    assert outer.attend is attend is inner.attend  # type: ignore[attr-defined]


def test_patches_every_module_of_the_package_once_and_puts_back(package: Any) -> None:
    assert patch([ATTEND]) == {"mine.attend": "registered"}
    wrapped = package.attend
    assert wrapped is sys.modules["mine.inner"].attend is not attend
    assert sys.modules["stranger"].attend is attend
    assert patch([ATTEND]) == {"mine.attend": "registered before"}
    assert package.attend is wrapped


def test_absent_functions_and_those_that_an_op_makes_needless(package: Any) -> None:
    absent = Signature("mine.nobody", {}, {})
    elsewhere = Signature("no_such_package.attend", {}, {})
    assert patch([absent, elsewhere], required=False) == {
        "mine.nobody": "absent",
        "no_such_package.attend": "absent",
    }
    with pytest.raises(NotRegistered, match=r"no function mine\.nobody"):
        patch([absent])
    needless = Signature("mine.attend", ATTEND.takes, ATTEND.gives, unless="aten.mm.default")
    assert patch([needless]) == {"mine.attend": "left alone"}
    assert package.attend is attend


def addmm() -> None:
    """An ordinary function with the name of an op, in the module of `before_it_was_an_op`."""


def before_it_was_an_op() -> None:
    addmm()


def test_a_version_from_before_the_op_is_wrapped_though_the_op_is_there(package: Any) -> None:
    package.before_it_was_an_op = before_it_was_an_op
    for op, became in (("aten.addmm.default", "registered"), ("aten.mm.default", "left alone")):
        older = Signature("mine.before_it_was_an_op", ATTEND.takes, ATTEND.gives, unless=op)
        assert patch([older]) == {older.op: became}
        unpatch()


# --- what attncheck knows ------------------------------------------------------------------------

# The parameters of packages that cannot run here, read off the releases on PyPI.
STAND_INS = {
    # flash-attn-4 4.0.0b36, without those that nobody describes
    "flash_attn.cute.flash_attn_func": lambda q, k, v, qv=None, gather_kv_indices=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    return_lse=False: attend(q, k, v, causal, return_lse=True)[:2],
    # sageattention 1.0.6
    "sageattention.sageattn": lambda q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None,
    smooth_k=True, **kwargs: _sage(q, k, v, tensor_layout, is_causal, smooth_k),
}  # fmt: skip


def _sage(q: Any, k: Any, v: Any, layout: str, causal: bool, smooth: bool) -> Any:
    if smooth:
        k -= k.mean(dim=1 if layout == "NHD" else 2, keepdim=True)  # as Sage does, in place
    if layout == "NHD":
        return attend(q, k, v, causal)
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), causal).transpose(1, 2)


@pytest.mark.parametrize(
    ("path", "options", "at"),
    [
        ("flash_attn.cute.flash_attn_func", {}, HEADS),
        ("flash_attn.cute.flash_attn_func", {}, QUERY),
        ("flash_attn.cute.flash_attn_func", {"causal": True}, BATCH),
        ("sageattention.sageattn", {"tensor_layout": "NHD"}, HEADS),
        ("sageattention.sageattn", {"tensor_layout": "HND", "is_causal": True}, Shard(1)),
    ],
)
def test_cuda_only_functions_on_stand_ins(path: str, options: dict[str, Any], at: Any) -> None:
    function = STAND_INS[path]
    forms = [s for s in packages.functions() if s.op == path]
    whole = list(tensors(6, 2))
    if options.get("tensor_layout") == "HND":
        whole = [t.transpose(1, 2).contiguous() for t in whole]
    wanted = function(*(t.clone() for t in whole), **options)
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        kv_at = WHOLE if at == QUERY and "sage" not in path else at
        ats = (at, kv_at, kv_at)
        placed = [distribute_tensor(t, mesh, [p]) for t, p in zip(whole, ats, strict=True)]
        got = local_call(forms, function)(*placed, **options)
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        for one, other in pairs:
            assert error(one, other) < 1e-5
            assert any(p.is_shard() for p in one.placements)


def test_descriptions_of_functions_can_be_read_and_their_conditions_name_arguments() -> None:
    for signature in packages.functions():
        texts = (*signature.takes.values(), *signature.gives.values())
        assert all(read(text) for text in texts)
        if (function := STAND_INS.get(signature.op)) is not None and "sage" in signature.op:
            known = inspect.signature(function).parameters
            assert {*signature.takes, *signature.when, *signature.needs} <= {*known}


def test_the_engine_has_no_name_twice() -> None:
    """Its files become one module."""
    import ast

    names: list[str] = []
    for part in ("notation", "strategies", "local_calls"):
        tree = ast.parse(Path(emit.HERE, f"{part}.py").read_text())
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.append(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    assert sorted(names) == sorted(set(names))
    assert local_calls.__doc__


# --- the oracle ----------------------------------------------------------------------------------

BEHIND_NUMPY = '''
import torch


def healthy(q, k, v):
    """Causal attention, (batch, sequence, heads, head_dim), which the dispatcher sees nothing of."""
    q, k, v = (torch.from_numpy(t.detach().numpy()).transpose(1, 2) for t in (q, k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
    return torch.from_numpy((scores.softmax(-1) @ v).transpose(1, 2).contiguous().numpy())


def planted(q, k, v):
    return healthy(q, k, v)


def nobodys(q, k, v):
    return healthy(q, k, v)
'''


def test_a_wrong_signature_is_caught_by_a_scan_and_a_right_one_is_supported(tmp_path: Path) -> None:
    takes, gives = {"q": "b sq h d", "k": "b sk h d", "v": "b sk h d"}, {"out": "b sq h d"}
    functions = [
        Signature("behind_numpy.healthy", takes, gives),
        Signature("behind_numpy.planted", takes, gives, queries={}),  # it is causal
    ]
    (tmp_path / "behind_numpy.py").write_text(BEHIND_NUMPY)
    (tmp_path / "fix.py").write_text(emit.module((), functions))
    probe = Path(__file__).with_name("wrapped_probe.py")
    report = scan(
        tmp_path,
        *("--probe", str(probe), "-k", "behind_numpy.*", "--fix", "fix.py"),
        PYTHONPATH=str(tmp_path),
        ATTNCHECK_CACHE=str(tmp_path / "cache"),
    )
    status = {
        (operator, placement): outcome["status"]
        for (operator, _, placement, _), outcome in outcomes(report, "behind_numpy.").items()
    }
    assert status == {
        ("healthy", "heads"): "supported",
        ("healthy", "query"): "redistributed",
        ("planted", "heads"): "supported",
        ("planted", "query"): "wrong",
        ("nobodys", "heads"): "error",  # never called on DTensors
        ("nobodys", "query"): "error",
    }
