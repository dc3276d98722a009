"""The CPU flash attention op kills the process on an empty tensor: SIGFPE.

    python cpu-flash-empty-shard-crash.py

F.scaled_dot_product_attention never passes it one, but a rank with an empty shard does: it chooses the
op by the global shape. One process, and a child for each case. Exits 1 where the bug shows, 0 where it
does not.
"""

import signal
import subprocess
import sys

import torch

CASES = {  # batch, heads, queries, keys
    "no batch": (0, 4, 16, 16),
    "no heads": (2, 0, 16, 16),
    "no queries": (2, 4, 0, 16),
    "no keys": (2, 4, 16, 0),
}


def attend(batch, heads, queries, keys):
    q = torch.randn(batch, heads, queries, 8)
    k, v = (torch.randn(batch, heads, keys, 8) for _ in range(2))
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    print(f"shape {tuple(out.shape)}", flush=True)


if len(sys.argv) > 1:
    attend(*CASES[sys.argv[1]])
    sys.exit(0)
print("expected: an empty tensor, or an exception; zeros where there are no keys")
bug = False
for name in CASES:
    run = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    if run.returncode < 0:
        bug = True
        print(f"{name}: the process is killed by {signal.Signals(-run.returncode).name}")
    else:
        print(f"{name}: {(run.stdout or run.stderr).strip().splitlines()[-1]}")
print("BUG" if bug else "ok")
sys.exit(int(bug))
