"""Writes an operator's call down as a person would: `flash_attn_func(q, k, v, causal=True)`.

    python -m attncheck.runner.transcribe < request.json > answer.json

The function that the operator names is replaced by one that notes its arguments and passes them on, and the
probe's call is made once, on whole plain tensors. A process of its own: the probe and its package run here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attncheck import plugins
from attncheck.probing import Operator, Setting
from attncheck.runner import case as cases
from attncheck.runner import compat
from attncheck.runner.available import Availability
from attncheck.runner.compat import TorchDispatchMode
from attncheck.runner.inputs import whole_tensors

SEED = 0
# What `F.scaled_dot_product_attention` assumes: as a builtin it has no signature to ask.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "torch.nn.functional.scaled_dot_product_attention": {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
}


class NotWritable(Exception):
    """The call cannot be written as one line of code: why."""


@dataclass
class Noted:
    """The one call of the function: its arguments, what it returned, and the SDPA backends allowed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any
    backends: frozenset[str]


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the parent asked about one operator in one setting; `refused` where it cannot be called here.

    `call`: the call in code, or None with `why`; `outputs`: where in the probe's own result each output
    lies; `float64`: whether the operator takes it on whole tensors; `op`: the call of a kernel op by itself.
    """
    probe = plugins.load_probe_file(Path(request["probe"]))
    operator = next(o for o in probe.operators if o.name == request["operator"])
    setting = next(s for s in operator.settings if s.name == request["setting"])
    refused = Availability("cpu").refusal(operator)
    if refused is not None:
        return {"refused": refused[1]}
    specs = operator.tensors(setting)
    wholes = whole_tensors(operator.name, setting, specs, SEED)

    def run(dtype: torch.dtype | None = None) -> Any:
        tensors = {
            spec.name: _as(wholes[spec.name], dtype).clone().requires_grad_(spec.requires_grad)
            for spec in specs
        }
        return tensors, operator.call(setting, tensors)

    around = operator.around or nullcontext
    with around():
        try:
            _, returned = run()
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        out: dict[str, Any] = {
            "outputs": _places(returned),
            "float64": request["float64"] and _works(lambda: run(torch.float64)),
        }
        try:
            out["call"] = _written(operator, setting, run)
        except NotWritable as error:
            out |= {"call": None, "why": str(error)}
        if request["op"]:
            out["op"] = _op_call(request["op"], lambda: run()[1])
    return out


def _as(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _works(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception:
        return False
    return True


def _places(returned: Any) -> dict[str, str]:
    """The code behind the probe's call that takes each output from what it returns."""
    named = cases.named_outputs(returned, "call")
    if isinstance(returned, torch.Tensor):
        return {"out": ""}
    return {name: f'["{name}"]' for name in named}


# --- the function ----------------------------------------------------------------------------------


def _written(operator: Operator, setting: Setting, run: Callable[[], Any]) -> dict[str, Any]:
    path = operator.function or operator.name
    owner, name, function = _find(path)
    noted: list[Noted] = []
    backends = _backends()
    with _replaced(owner, name, _noting(function, noted)):
        tensors, returned = run()
    if len(noted) != 1:
        raise NotWritable(f"{path} is called {len(noted)} times")
    call = noted[0]
    names = {id(tensor): name for name, tensor in tensors.items()}
    keywords = dict(call.kwargs)
    for key, default in _defaults(path, function).items():
        if key in keywords and _same(keywords[key], default):
            del keywords[key]
    args = list(call.args)
    if compat.is_packet(function):
        schema = compat.schema_of(function.default).arguments
        while args and schema[len(args) - 1].has_default_value():
            if not _same(args[-1], schema[len(args) - 1].default_value):
                break
            args.pop()
    allowed = call.backends if call.backends != backends else frozenset()
    if len(allowed) > 1:
        raise NotWritable("several SDPA backends are allowed")
    return {
        "path": path,
        "arguments": [spell(value, names) for value in args],
        "keywords": {key: spell(value, names) for key, value in keywords.items()},
        "backend": next(iter(allowed), ""),
        "picks": _picks(returned, call.returned),
    }


def _find(path: str) -> tuple[Any, str, Callable[..., Any]]:
    """Where the function at an import path hangs. Raises NotWritable."""
    head, _, name = path.rpartition(".")
    if not head or not all(part.isidentifier() for part in path.split(".")):
        raise NotWritable(f"{path} is no import path")
    try:
        if head.startswith("torch.ops."):
            owner: Any = getattr(torch.ops, head.removeprefix("torch.ops."))
        else:
            owner = importlib.import_module(head)
        function = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise NotWritable(f"{path} cannot be imported: {error}") from None
    return owner, name, function


class _Standing:
    """Stands for an op, or a packet of them: what is called is `noting`, and all else is asked of the op."""

    def __init__(self, op: Any, noting: Callable[..., Any], **other: Any) -> None:
        vars(self).update(op=op, noting=noting, **other)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.noting(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.op, name)


def _noting(function: Any, noted: list[Noted]) -> Any:
    is_packet = compat.is_packet(function)
    target = function.default if is_packet else function

    def noting(*args: Any, **kwargs: Any) -> Any:
        returned = target(*args, **kwargs)
        noted.append(Noted(args, kwargs, returned, _backends()))
        return returned

    if is_packet:
        return _Standing(function, noting, default=_Standing(target, noting))
    # A probe may ask for the parameters of what it calls.
    noting.__wrapped__ = function  # type: ignore[attr-defined]
    noting.__name__ = getattr(function, "__name__", "function")
    noting.__module__ = getattr(function, "__module__", "")
    return noting


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _backends() -> frozenset[str]:
    """The SDPA backends that are allowed at the moment, by name."""
    cuda: Any = torch.backends.cuda
    enabled = {
        "MATH": cuda.math_sdp_enabled(),
        "FLASH_ATTENTION": cuda.flash_sdp_enabled(),
        "EFFICIENT_ATTENTION": cuda.mem_efficient_sdp_enabled(),
        "CUDNN_ATTENTION": cuda.cudnn_sdp_enabled(),
    }
    return frozenset(name for name, on in enabled.items() if on)


def _defaults(path: str, function: Any) -> dict[str, Any]:
    """What need not be said, by keyword."""
    if path in DEFAULTS:
        return dict(DEFAULTS[path])
    if compat.is_packet(function):
        schema = compat.schema_of(function.default).arguments
        return {a.name: a.default_value for a in schema if a.has_default_value()}
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {k: p.default for k, p in parameters.items() if p.default is not p.empty}


def _same(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str, tuple, type(None))
    return isinstance(value, plain) and type(value) is type(default) and value == default


def _picks(returned: Any, of: Any) -> dict[str, str]:
    """Where each output of the probe's call lies in what the function returned. Raises NotWritable."""
    places = {id(of): ""}
    if isinstance(of, (tuple, list)):
        places = {id(item): f"[{at}]" for at, item in enumerate(of) if item is not None}
    picks = {}
    for name, value in cases.named_outputs(returned, "call").items():
        if id(value) not in places:
            raise NotWritable(f"{name} is made of what the function returns")
        picks[name] = places[id(value)]
    return picks


def spell(value: Any, names: Mapping[int, str]) -> str:
    """A value in code: a tensor by its name in the case, others as literals. Raises NotWritable."""
    if isinstance(value, torch.Tensor):
        if id(value) not in names:
            raise NotWritable("a tensor is made from the arguments first")
        return names[id(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
    if isinstance(value, torch.dtype):
        return str(value)
    if type(value) in (tuple, list):
        items = [spell(item, names) for item in value]
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    raise NotWritable(f"an argument is a {type(value).__name__}")


# --- a kernel op by itself ---------------------------------------------------------------------------


class _First(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the arguments of the first call of one op."""

    def __init__(self, op: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.op = op
        self.found: tuple[Any, Sequence[Any], Mapping[str, Any]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) == self.op and self.found is None:
            self.found = func, args, kwargs or {}
        return func(*args, **(kwargs or {}))


def _op_call(op: str, run: Callable[[], Any]) -> dict[str, Any] | None:
    """The op's name and arguments where the operator reaches it, forward or backward; None where not.

    Tensors come as `{"name", "size", "dtype"}`, other arguments as code, keywords with their name.
    """
    with _First(op) as first:
        try:
            out = cases.named_outputs(run(), "call")["out"]
            if out.requires_grad:
                torch.autograd.backward(out, torch.ones_like(out))
        except Exception:
            pass  # what was reached was reached
    if first.found is None:
        return None
    func, args, kwargs = first.found
    schema = compat.schema_of(func).arguments
    given = [(schema[at].name, value, "") for at, value in enumerate(args)]
    given += [(key, value, f"{key}=") for key, value in kwargs.items()]
    try:
        return {"op": op, "arguments": [_op_argument(*one) for one in given]}
    except NotWritable:
        return None


def _op_argument(name: str, value: Any, keyword: str) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        return {"code": keyword + spell(value, {})}
    return {"name": name, "size": list(value.shape), "dtype": str(value.dtype), "keyword": keyword}


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    # What a package prints while it is imported is no answer of ours.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(answer(request), channel)
    channel.flush()
    os._exit(0)  # compiled extensions may crash on the way out


if __name__ == "__main__":
    main()
