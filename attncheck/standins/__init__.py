"""CPU kernels behind compiled extensions and CUDA-only ops: what needs a GPU runs where there is none.

`provide(name)`, in a worker, before the operator is called. A stand-in keeps the signatures, checks,
layouts and dtypes of what it stands for, and computes in plain PyTorch. Each is one file that defines
`SENTENCE`, which names it in reports, and `provide()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from attncheck.errors import unknown

# Name -> the module that provides it.
KNOWN: Mapping[str, str] = {
    "aten_attention": "attncheck.standins.aten_attention",
    "flash_attn_2_cuda": "attncheck.standins.flash_attn_package",
    "flash_attn_3": "attncheck.standins.flash_attn_3",
    "flash_attn_3_beta": "attncheck.standins.flash_attn_3_beta",
    "flex_attention": "attncheck.standins.flex_attention",
    "varlen_attn": "attncheck.standins.varlen_attn",
    "xformers": "attncheck.standins.xformers_ops",
}


def provide(name: str) -> str:
    """Put the stand-in `name` in place; twice is harmless. Returns the sentence that names it.

    Raises UserError for a name without a stand-in and where it cannot be put in place, ImportError
    where the package that it belongs to is not installed.
    """
    if name not in KNOWN:
        raise unknown("stand-in", name, KNOWN)
    module = importlib.import_module(KNOWN[name])
    module.provide()
    return str(module.SENTENCE)
