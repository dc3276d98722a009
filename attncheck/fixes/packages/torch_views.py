"""What Python code between the kernels calls of PyTorch without saying so.

`out[..., :head_dim]` is `aten.alias` where it cuts nothing off: flash-attn ends so, and DTensor has a
strategy for it from torch 2.10 or 2.11 on only (it has none in 2.9.1, and one in 2.11.0).
"""

from __future__ import annotations

from attncheck.fixes.notation import Signature

# Element by element: any dim may be sharded, whatever it is called.
ANY = "b sq n h d | b sq h d | b sq h | b sq | b"

SIGNATURES = (
    Signature("aten.alias.default", takes={"self": ANY}, gives={"alias": "like self"}, queries={}),
)
