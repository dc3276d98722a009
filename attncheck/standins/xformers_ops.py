"""xformers on a CPU: kernels behind the ops that it calls, and a dispatch that takes them.

xformers' own Python runs unchanged: attention biases, dispatch, support checks, autograd. What it calls in
the end are dispatcher ops, and these get CPU kernels:

- cutlass: `aten::_efficient_attention_{forward,backward}`, PyTorch's own;
- flash: `xformers_flash::flash_{fwd,bwd}`, whose bodies call flash-attn's compiled module where flash-attn
  is installed, and PyTorch's `aten::_flash_attention_{forward,backward}` where not;
- flash3: `xformers_flash3::flash_{fwd,bwd}` over `flash_attn_3::{fwd,bwd}`.

The bodies are xformers' own, registered for the CPU key too. Its support checks name the device, and would
refuse the CPU: inside `taking_the_cpu()` they take it for an H100. Outside they refuse as ever.

Not mirrored: the alignment that cutlass asks for on a GPU (8 elements in half precision).
Triton's split-K, Composable Kernel and Blackwell kernels are no ops here, and stay refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from attncheck.errors import UserError
from attncheck.standins import flash_attn_3, flash_attn_package
from attncheck.standins import provide as provide_other

SENTENCE = (
    "xformers: CPU reference kernels by attncheck behind its cutlass, flash and flash3 ops; its own "
    "dispatch, checks and autograd run unchanged, but take the CPU for an H100"
)

H100 = (9, 0)
# What `not_supported_reasons` says of the device, and nothing else.
_ABOUT_THE_DEVICE = ("device=", "bf16 is only supported on A100+ GPUs")
# The definitions of xformers' own ops, by the module in xformers.ops.fmha.
_DEFINITIONS = {"flash": ("_flash_fwd", "_flash_bwd"), "flash3": ("mha_fwd", "mha_bwd")}

# xformers.ops.fmha, once provided.
_fmha: ModuleType | None = None


def provide() -> None:
    """Import xformers with its kernels in reach, and put CPU kernels behind its ops; twice is harmless.

    Raises ImportError where xformers is not installed, UserError where it cannot be used: it refuses the
    flash-attn that is installed, or is laid out otherwise than the version that this was written for.
    """
    global _fmha
    if _fmha is not None:
        return
    if importlib.util.find_spec("xformers") is None:  # before anything is put in place for it
        raise ModuleNotFoundError("No module named 'xformers'", name="xformers")
    provide_other("aten_attention")
    fmha = _import()
    try:
        for module, names in _DEFINITIONS.items():
            for name in names:
                _register_body(getattr(fmha, module), name)
        _ = fmha._dispatch_fw, fmha._dispatch_bw
    except AttributeError as error:
        version = importlib.import_module("xformers").__version__
        raise UserError(
            f"xformers {version} cannot run on attncheck's stand-ins, which fit 0.0.35: {error}."
        ) from None
    _fmha = fmha


@contextlib.contextmanager
def taking_the_cpu() -> Iterator[None]:
    """While this lasts, ops with CPU kernels take CPU tensors, and dispatch is that of a CUDA build.

    Around calls and their backward. Without the stand-in (on a GPU) it does nothing.
    """
    fmha = _fmha
    if fmha is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for op in _ops_with_kernels(fmha):
            reasons = staticmethod(_reasons_apart_from_the_device(op))
            stack.enter_context(_replaced(op, "not_supported_reasons", reasons))
        for op in (fmha.cutlass.FwOp, fmha.cutlass.BwOp):
            stack.enter_context(_replaced(op, "apply", staticmethod(_on_an_h100(op.apply))))
        for name in ("_dispatch_fw", "_dispatch_bw"):
            dispatch = _as_in_a_cuda_build(getattr(fmha, name))
            stack.enter_context(_replaced(fmha, name, dispatch))
        yield


# --- kernels -------------------------------------------------------------------------------


def _import() -> ModuleType:
    """xformers.ops.fmha. What it finds while it is imported decides which ops it defines."""
    flash_attn_3.provide()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_flash_attn_3_in_reach())
        if importlib.util.find_spec("flash_attn") is not None:
            flash_attn_package.install()
        else:
            # A CPU build of PyTorch lacks flash attention. Its op has a kernel now.
            available = functools.partial(bool, True)
            stack.enter_context(
                _replaced(torch.backends.cuda, "is_flash_attention_available", available)
            )
        try:
            return importlib.import_module("xformers.ops.fmha")
        except ModuleNotFoundError:
            raise
        except ImportError as error:
            if "Flash-Attention" not in str(error):
                raise
            raise UserError(f"xformers refuses the flash-attn that is installed: {error}") from None


@contextlib.contextmanager
def _flash_attn_3_in_reach() -> Iterator[None]:
    """xformers looks for the package `flash_attn_3` and its `_C`; what it uses are the ops."""
    names = ("flash_attn_3", "flash_attn_3._C")
    if importlib.util.find_spec("flash_attn_3") is not None:
        yield
        return
    for name in names:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _register_body(module: ModuleType, name: str) -> None:
    """The body of an op that xformers registers for CUDA, for the CPU too."""
    if not module.FwOp.is_available():  # what it needs was not in reach: it says so itself
        return
    definition = getattr(module, name)
    # PyTorch keeps the function under the decorator in `CustomOpDef._init_fn` (2.4 to 2.15) and offers no
    # public way to it; a copy of the body here would test our copy.
    definition.register_kernel("cpu", definition._init_fn)


def _ops_with_kernels(fmha: ModuleType) -> list[Any]:
    modules = (fmha.cutlass, fmha.flash, fmha.flash3)
    return [op for module in modules for op in (module.FwOp, module.BwOp) if op.is_available()]


# --- the device ----------------------------------------------------------------------------


def _reasons_apart_from_the_device(op: Any) -> Callable[[Any], list[str]]:
    own = op.not_supported_reasons
    return lambda inputs: [r for r in own(inputs) if not r.startswith(_ABOUT_THE_DEVICE)]


def _as_in_a_cuda_build(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """Which ops are tried at all depends on the CUDA version that PyTorch was built for."""

    @functools.wraps(dispatch)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        with _replaced(torch.version, "cuda", torch.version.cuda or "12.8"):
            return dispatch(*args, **kwargs)

    return dispatched


def _on_an_h100(apply: Callable[..., Any]) -> Callable[..., Any]:
    """cutlass asks for the capability in backward, and runs groups of heads in streams of their own."""

    @functools.wraps(apply)
    def applied(*args: Any, **kwargs: Any) -> Any:
        with (
            _replaced(torch.cuda, "get_device_capability", lambda device=None: H100),
            _replaced(torch.cuda, "current_stream", _NoStream),
            _replaced(torch.cuda, "Stream", _NoStream),
            _replaced(torch.cuda, "stream", contextlib.nullcontext),
        ):
            return apply(*args, **kwargs)

    return applied


class _NoStream:
    """Stands for `torch.cuda.Stream` where everything runs in order."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: _NoStream) -> None:
        pass


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
