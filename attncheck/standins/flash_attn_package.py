"""The stand-in for flash-attn's compiled module, and CPU kernels for its ops, which are CUDA only."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version

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


MODULE = "flash_attn_2_cuda"
# The compiled module's signatures: from which version on, and the stand-in that has them. None: not
# known. 2.6.0 lacks `leftpad_k`, which 2.6.1 put between other arguments; older ones lack more.
SIGNATURES: tuple[tuple[Version, str | None], ...] = (
    (Version("2.7.0"), "flash_attn_2_cuda"),
    (Version("2.6.1"), "flash_attn_2_6_cuda"),
    (Version("2.6.0"), None),
    (Version("2.5.7"), "flash_attn_2_5_cuda"),
    (Version("0"), None),
)


def provide() -> None:
    """Put the stand-in in the place of the compiled module, then register CPU kernels for the ops.

    Raises UserError where the real module is loaded already (whoever imported it keeps it, so a swap
    would be a lie) and for a version whose signatures no stand-in has, ImportError where flash-attn
    is not installed.
    """
    install()
    register_cpu_kernels()


def install() -> None:
    """Put the stand-in for the installed version's module into sys.modules as `flash_attn_2_cuda`."""
    module = importlib.import_module(f"attncheck.standins.{standin_for(installed_version())}")
    loaded = sys.modules.setdefault(MODULE, module)
    if loaded is not module:
        raise UserError(
            f"The compiled module {MODULE} is already loaded (from "
            f"{getattr(loaded, '__file__', 'memory')}), so its stand-in cannot take its place."
        )


def installed_version() -> str:
    """The version of the distribution flash-attn, or '' where there is none."""
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return ""


def standin_for(version: str) -> str:
    """The module in attncheck.standins with the signatures of that version of flash-attn, the newest
    for ''. Raises UserError.

    >>> standin_for("2.6.3")
    'flash_attn_2_6_cuda'
    """
    if not version:
        return str(SIGNATURES[0][1])
    name = next(name for start, name in SIGNATURES if Version(version) >= start)
    if name is None:
        raise UserError(
            f"attncheck has no stand-in for the compiled module of flash-attn {version}: expected "
            "2.5.7 to 2.5.9, or 2.6.1 or newer."
        )
    return name


def register_cpu_kernels() -> tuple[str, ...]:
    """Register the bodies of flash-attn's four ops for the CPU key too; twice is harmless.

    Returns the ops as PyTorch writes them: none before flash-attn 2.7, whose functions call the
    compiled module themselves.
    """
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    ops: dict[str, Any] = {name: getattr(interface, name, None) for name in FLASH_ATTN_OPS}
    ops = {name: op for name, op in ops.items() if hasattr(op, "register_kernel")}
    bodies = {name: _body(op, name) for name, op in ops.items()}
    for name, op in ops.items():
        op.register_kernel("cpu", bodies[name])  # a second call replaces the body by itself
    return tuple(f"flash_attn.{name}.default" for name in ops)


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
