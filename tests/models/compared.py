"""A parallel model on gloo ranks against the unsharded one in float64, as JSON on stdout.

    python tests/models/compared.py RANKS REQUEST      starts itself on RANKS ranks with torchrun

REQUEST is JSON: `targets`, `standins` to provide and a `fix` to load before. A target has `name`, `build`,
`inputs` and `calls` (dicts of `train` and of keywords for forward, one after the other on one model). The
other side is `build(None)` with the same inputs and calls, or what `reference`, `reference_inputs` and
`reference_calls` say; `wide` is the build for float64, where that needs another kernel. All are names in this
folder, like `planted:build_rank_mask`. Every rank builds every model, from one seed.

A value is judged as a scan judges one (`attncheck.runner.drift`): its error against float64 may be twice that
of the unsharded model in its own dtype, and a few roundings.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from attncheck import standins
from attncheck.runner.drift import Expected, Layout, error_stat

sys.path.insert(0, str(Path(__file__).parent))


def load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def call(
    model: nn.Module, inputs: Any, how: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The output and every parameter's gradient, whole; and the gradients as this rank holds them."""
    cast = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in (inputs if isinstance(inputs, dict) else dict(enumerate(inputs))).items()
    }
    options = {key: value for key, value in how.items() if key != "train"}
    positional = [cast.pop(key) for key in [*cast] if isinstance(key, int)]
    model.train(how.get("train", True))
    model.zero_grad()
    out = whole(model(*positional, **{**cast, **options}))
    torch.manual_seed(3)
    (out * torch.randn(out.shape, dtype=torch.float64).to(out.dtype)).sum().backward()
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, grad in held.items() if grad is None]
    assert not missing, f"no gradient reached {missing}"
    values = {"output": out} | {name: whole(grad) for name, grad in held.items()}
    return (
        {name: value.detach() for name, value in values.items()},
        {name: local(grad).detach() for name, grad in held.items()},
    )


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def judged(
    want: Tensor, own: Tensor, got: list[Tensor], held: list[Tensor], among: float
) -> dict[str, Any]:
    """`got`: what each rank takes for the whole; `held`: what it holds of it, nothing for outputs.

    `sum_error`, `sum_or_own_error`: of the ranks' parts added up, and of the better of sum and own part for
    each element (a parameter that is used before and behind a reduction). `right_chunks`: which of the
    ranks' chunks along a dim are right although the whole is not.
    """
    ranks = len(got)
    expected, layout = Expected(want, own), Layout(placements=("R",), mesh=(ranks,))

    def error(value: Tensor) -> float:
        if value.shape != want.shape:
            return math.inf
        return error_stat(value.double(), expected, own.dtype, layout, among).max

    bound = error_stat(want, expected, own.dtype, layout, among).bound
    said: dict[str, Any] = {
        "error": max(map(error, got)),
        "bound": bound,
        "largest": float(want.abs().max()),
        "wrong_ranks": [rank for rank, value in enumerate(got) if error(value) > bound],
        "ranks_agree": all(torch.equal(value, got[0]) for value in got),
    }
    if held and all(part.shape == want.shape for part in held):
        parts = torch.stack(held).double()
        total = parts.sum(0)
        nearer = torch.where((total - want).abs() < (parts[0] - want).abs(), total, parts[0])
        said |= {"sum_error": error(total), "sum_or_own_error": error(nearer)}
    if bound < said["error"] < math.inf:
        off = (got[0].double() - want).abs() > bound
        said["right_chunks"] = {
            dim: right
            for dim in range(want.ndim)
            if (right := [at for at, part in enumerate(off.chunk(ranks, dim)) if not part.any()])
        }
    return said


def compare(target: dict[str, Any], mesh: DeviceMesh) -> list[dict[str, Any]]:
    """One dict per call: what is said of the output and of each gradient, or what was `raised`."""
    parallel = load(target["build"])(mesh)
    build = load(target.get("reference", target["build"]))
    unsharded, wide = build(None), load(target["wide"])(None) if "wide" in target else build(None)
    wide = wide.double()
    inputs = load(target["inputs"])
    plain_inputs = load(target.get("reference_inputs", target["inputs"]))(None)
    calls = target.get("calls", [{}])
    answers = []
    for how, plainly in zip(calls, target.get("reference_calls", calls), strict=True):
        want, _ = call(wide, plain_inputs, plainly, torch.float64)
        own, _ = call(unsharded, plain_inputs, plainly)
        try:
            mine = call(parallel, inputs(mesh), how)
        except RuntimeError as raised:
            answers.append({"raised": str(raised)})
            break
        every: list[Any] = [None] * mesh.size()
        dist.all_gather_object(every, mine)
        among = max(float(value.abs().max()) for name, value in want.items() if name != "output")
        answers.append(
            {
                name: judged(
                    want[name],
                    own[name],
                    [values[name] for values, _ in every],
                    [held[name] for _, held in every if name in held],
                    among if name != "output" else 0.0,
                )
                for name in want
            }
        )
    return answers


def provide(request: dict[str, Any]) -> None:
    """Stand-ins, then the fix."""
    for name in request.get("standins", ()):
        standins.provide(name)
    if request.get("fix"):
        apply(request["fix"])


def apply(fix: str) -> None:
    spec = importlib.util.spec_from_file_location("applied_fix", fix)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["applied_fix"] = module
    spec.loader.exec_module(module)
    module.register(required=False)


def main() -> None:
    ranks, text = sys.argv[1:]
    if "RANK" not in os.environ:
        start(ranks)
    request = json.loads(text)
    provide(request)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (int(ranks),), mesh_dim_names=("tp",))
    answers = {target["name"]: compare(target, mesh) for target in request["targets"]}
    if dist.get_rank() == 0:
        print(json.dumps(answers))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts in one teardown of five


def start(ranks: str) -> NoReturn:
    # One hash seed: that ranks can choose differently is not what is looked at here.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


if __name__ == "__main__":
    main()
