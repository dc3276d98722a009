"""The stand-in for flash-attn's compiled module, and CPU kernels for its ops, which are CUDA only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from attncheck.errors import UserError

SENTENCE = (
    "flash_attn_2_cuda: CPU reference kernels by attncheck; flash_attn's own Python and op "
    "registration run unchanged"
)
FLASH_ATTN_OPS = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)


def provide() -> None:
    """Put the stand-in in the place of the compiled module, then register CPU kernels for the ops.

    Raises UserError where the real module is loaded already (whoever imported it keeps it, so a swap
    would be a lie), ImportError where flash-attn is not installed.
    """
    install()
    register_cpu_kernels()


def install() -> None:
    """Put `attncheck.standins.flash_attn_2_cuda` into sys.modules as `flash_attn_2_cuda`."""
    name = "flash_attn_2_cuda"
    module = importlib.import_module(f"attncheck.standins.{name}")
    loaded = sys.modules.setdefault(name, module)
    if loaded is not module:
        raise UserError(
            f"The compiled module {name} is already loaded (from "
            f"{getattr(loaded, '__file__', 'memory')}), so its stand-in cannot take its place."
        )


def register_cpu_kernels() -> tuple[str, ...]:
    """Register the bodies of flash-attn's four ops for the CPU key too; twice is harmless.

    Returns the ops as PyTorch writes them. Raises UserError where the package has no dispatcher ops
    (flash-attn before 2.7).
    """
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    ops = [_custom_op(interface, name) for name in FLASH_ATTN_OPS]
    bodies = [_body(op, name) for op, name in zip(ops, FLASH_ATTN_OPS, strict=True)]
    for op, body in zip(ops, bodies, strict=True):
        op.register_kernel("cpu", body)  # a second call replaces the body by itself
    return tuple(f"flash_attn.{name}.default" for name in FLASH_ATTN_OPS)


def _custom_op(interface: ModuleType, name: str) -> Any:
    op = getattr(interface, name, None)
    if op is None or not hasattr(op, "register_kernel"):
        raise UserError(
            f"flash-attn {_version()} has no dispatcher op flash_attn::{name}: these came with "
            "2.7.0 (and PyTorch 2.4); older versions call the compiled extension directly, and no "
            "CPU kernel can be registered for that."
        )
    return op


def _body(op: Any, name: str) -> Callable[..., Any]:
    # The function under the decorator: the package's own Python, which calls the stand-in. PyTorch
    # keeps it in `CustomOpDef._init_fn` (2.4 to 2.15) and offers no public way to it; a copy of the
    # body here would test our copy instead of the package.
    body = getattr(op, "_init_fn", None)
    if not callable(body):
        raise UserError(
            f"PyTorch {torch.__version__} does not give access to the Python body of "
            f"flash_attn::{name}; attncheck cannot run flash-attn on a CPU with it."
        )
    return body  # type: ignore[no-any-return]


def _version() -> str:
    package = importlib.import_module("flash_attn")
    return str(getattr(package, "__version__", "of unknown version"))
