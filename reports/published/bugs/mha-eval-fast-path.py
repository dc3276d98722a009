"""nn.MultiheadAttention and nn.TransformerEncoderLayer fail on DTensors in eval, and only there.

    python mha-eval-fast-path.py

All weights and inputs are replicated. One process. Exits 1 where the bug shows, 0 where it does not.
"""

import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
x = torch.randn(2, 16, 32)


def attention(module, x):
    return module(x, x, x)[0]


def layer(module, x):
    return module(x)


failed = 0
for module, call in (
    (nn.MultiheadAttention(32, 4, batch_first=True), attention),
    (nn.TransformerEncoderLayer(32, 4, 40, dropout=0.0, batch_first=True), layer),
):
    name = type(module).__name__
    expected = call(module, x).detach()
    distribute_module(module, mesh)  # replicates the parameters
    dx = distribute_tensor(x, mesh, [Replicate()])
    for mode, training, fast_path in (
        ("train", True, True),
        ("eval, fast path off", False, False),
        ("eval", False, True),
    ):
        torch.backends.mha.set_fastpath_enabled(fast_path)
        module.train(training)
        try:
            with torch.set_grad_enabled(training):
                out = call(module, dx).full_tensor()
            print(f"{name}, {mode}: max error {(out - expected).abs().max():.0e}")
        except Exception as error:
            failed += mode == "eval"
            print(f"{name}, {mode}: {type(error).__name__}: {str(error).splitlines()[0]}")
print("expected: eval returns what train returns (there is no dropout)")
print("BUG" if failed else "ok")
sys.exit(int(failed > 0))
