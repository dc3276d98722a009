"""Models on fake tensors and a fake process group, as the first and the last rank, as JSON on stdout.

    python tests/models/faked.py RANKS REQUEST

REQUEST as in compared.py, as far as it is about the parallel model. For each target: the shapes of the output
and of every gradient that has not its parameter's, the numbers of parameters, or what was `raised`; and the
process's peak memory in MiB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch.distributed as dist
from compared import call, load, provide
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from attncheck.fixes.strategies import forget_propagated


def faked(target: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    started = time.perf_counter()
    said: dict[str, Any] = {}
    with FakeTensorMode():
        model = load(target["build"])(mesh)
        said["build_seconds"] = time.perf_counter() - started
        for how in target.get("calls", [{}]):
            try:
                values, _ = call(model, load(target["inputs"])(mesh), how)
            except RuntimeError as raised:
                said["raised"] = str(raised)
                break
            parameters = dict(model.named_parameters())
            said |= {
                "output": list(values.pop("output").shape),
                "odd": [
                    name for name, grad in values.items() if grad.shape != parameters[name].shape
                ],
                "parameters": sum(parameter.numel() for parameter in parameters.values()),
            }
    dist.destroy_process_group()
    forget_propagated()  # what is kept has local shapes of this rank in it
    return said | {"seconds": time.perf_counter() - started}


def main() -> None:
    ranks, request = int(sys.argv[1]), json.loads(sys.argv[2])
    provide(request)
    answers: dict[str, Any] = {
        target["name"]: [faked(target, rank, ranks) for rank in (0, ranks - 1)]
        for target in request["targets"]
    }
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    print(json.dumps(answers | {"peak_mib": peak / 2**20}))


if __name__ == "__main__":
    main()
