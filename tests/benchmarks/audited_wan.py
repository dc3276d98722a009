"""What watching costs, in one process: seconds of CPU with and without the recorder, as JSON.

`audited_wan.py pass`: WAN 14B on fake tensors, as one rank of eight. `audited_wan.py observe`, under
torchrun: training steps of the small one on real ranks.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attncheck import provision
from attncheck.audit.carry import carry_on
from attncheck.audit.observing import STEPS, Observation
from attncheck.audit.put_in_place import put_in_place
from attncheck.audit.recorder import Recorder
from attncheck.fixes import emit
from attncheck.runner import compat

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))


def step(model: Any, inputs: Any) -> float:
    began = time.process_time()
    outputs = model(**inputs)
    outputs.backward(torch.ones_like(outputs))
    for parameter in model.parameters():
        parameter.grad = None
    return time.process_time() - began


def fake_pass() -> dict[str, float]:
    package = provision.ensure(provision.parse("flash-attn"), log=lambda message: None)
    put_in_place([str(package)], [], [str(emit.write_known(provision.cache_root()))])
    import wan

    compat.simulated_group(8)
    mesh = init_device_mesh("cpu", (8,), mesh_dim_names=("tp",))
    began = time.process_time()
    with compat.fake_mode(take_real=True), compat.unsent_weights():
        model, inputs = wan.build_real(mesh), wan.inputs_real(mesh)
        built = time.process_time() - began
        first = step(model, inputs)  # DTensor asks each strategy once
        bare = step(model, inputs)
        recorder = Recorder(carry_on)
        recorder.where.name(model)
        with recorder.recording():
            watched = step(model, inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"built": built, "first": first, "bare": bare, "watched": watched, "peak_mib": peak}


def observed(blocks: int = 5) -> dict[str, float]:
    import wan

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = wan.build_small_sdpa_fixed(mesh), wan.inputs_small(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train() -> float:
        seconds = step(model, inputs)
        began = time.process_time()
        optimizer.step()
        return seconds + time.process_time() - began

    for _ in range(5):
        train()
    bare, watched = 0.0, 0.0
    for _ in range(blocks):  # turn by turn: what else the machine does falls on both
        bare += sum(train() for _ in range(STEPS))
        with Observation(STEPS, None):
            watched += sum(train() for _ in range(STEPS))
    dist.barrier()
    return {"bare": bare, "watched": watched, "rank": dist.get_rank()}


if __name__ == "__main__":
    made = fake_pass() if sys.argv[1] == "pass" else observed()
    if made.get("rank", 0) == 0:
        print(json.dumps(made))
    if dist.is_initialized() and sys.argv[1] != "pass":
        dist.destroy_process_group()
