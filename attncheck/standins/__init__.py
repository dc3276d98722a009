"""CPU kernels behind compiled extensions: a package's own Python runs where there is no GPU.

Order of use, in a worker: `install(name)`, then import the package, then `register_cpu_kernels()`.
A stand-in keeps the extension's signatures, checks, layouts and dtypes, and computes in plain
PyTorch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

from attncheck.errors import UserError, unknown

# Compiled module -> the sentence that names its stand-in in a report.
KNOWN: Mapping[str, str] = {
    "flash_attn_2_cuda": (
        "flash_attn_2_cuda: CPU reference kernels by attncheck; flash_attn's own Python and op "
        "registration run unchanged"
    ),
}


def install(name: str) -> str:
    """Put the stand-in for the compiled module `name` into sys.modules; twice is harmless.

    Returns the sentence that names it in a report. Raises UserError for a name without a stand-in,
    and where the real module is loaded already (whoever imported it keeps it, so a swap would be a
    lie).
    """
    if name not in KNOWN:
        raise unknown("stand-in", name, KNOWN)
    module = importlib.import_module(f"attncheck.standins.{name}")
    loaded = sys.modules.setdefault(name, module)
    if loaded is not module:
        raise UserError(
            f"The compiled module {name} is already loaded (from "
            f"{getattr(loaded, '__file__', 'memory')}), so its stand-in cannot take its place."
        )
    return KNOWN[name]


def register_cpu_kernels(name: str = "flash_attn_2_cuda") -> tuple[str, ...]:
    """Give the package behind the stand-in `name` CPU kernels for its ops; twice is harmless.

    Call it after `install`. Imports the package. Returns the ops as PyTorch writes them
    (`flash_attn._flash_attn_forward.default`). Raises UserError for a name without a stand-in, and
    where the package has no dispatcher ops (flash-attn before 2.7); ImportError where it is not
    installed.
    """
    if name not in KNOWN:
        raise unknown("stand-in", name, KNOWN)
    from attncheck.standins.registration import register_flash_attn

    return register_flash_attn()
