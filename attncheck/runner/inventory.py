"""The child of `attncheck.inventory`: imports what it is told to, and says which attention ops there are.

`python -m attncheck.runner.inventory ASKED ANSWER`. It writes into ANSWER what it is doing before it does
it, so that the parent can say what ended it, and the inventory at the end.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor

from attncheck import plugins
from attncheck.inventory import Inventory, Look, Problem, RegisteredOp, Signature
from attncheck.model import from_json, to_json
from attncheck.runner import attention_ops, compat, signature

DEVICES = {"CPU": "cpu", "CUDA": "cuda", "XPU": "xpu", "PrivateUse1": "privateuse1"}
# Flags that decide what an op decomposes into.
VARIANTS: tuple[Mapping[str, Any], ...] = ({}, {"is_causal": True}, {"dropout_p": 0.5})


def look(asked: Look, doing: Path) -> Inventory:
    def say(text: str) -> None:
        doing.write_text(text, encoding="utf-8")

    sys.path[:0] = asked.path
    before = {name for name, _ in _attention_ops()}
    problems = [p for module in asked.imports if (p := _import(module, say))]
    own_before = {name: _has_own(schema, asked.device) for name, schema in _attention_ops()}
    stood_in = _make_available(asked, say) if asked.probe_files else set()
    ops = []
    for name, schema in _attention_ops():
        if (asked.only_new and name in before) or (asked.call and name in asked.known):
            continue
        say(f"looking at {name}")
        op = _describe(name, schema, asked, say)
        # What was there and has a kernel since got it from us; what came since, if its operator says so.
        got_one = name in own_before and not own_before[name] and _has_own(schema, asked.device)
        came = name in stood_in and name not in own_before and asked.device in op.kernels
        ops.append(dataclasses.replace(op, standin=got_one or came))
    return Inventory(tuple(ops), tuple(problems))


def _import(module: str, say: Any) -> Problem | None:
    say(f"importing {module}")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name is not None and (module + ".").startswith(error.name + ".")
        return Problem(module, "missing" if missing else "broken", f"{error}")
    except (Exception, SystemExit) as error:
        return Problem(module, "broken", f"{type(error).__name__}: {error}")
    return None


def _make_available(asked: Look, say: Any) -> set[str]:
    """What a scan would import and put in place for its operators, so that their ops are here too.

    Returns the ops of those that run on stand-ins.
    """
    from attncheck.runner.available import Availability

    availability = Availability(asked.device)
    stood_in: set[str] = set()
    for file in asked.probe_files:
        say(f"loading {file}")
        for operator in plugins.load_probe_file(Path(file)).operators:
            say(f"making {operator.name} available")
            availability.refusal(operator)
            if availability.standins(operator.name):
                stood_in.update(operator.kernel_ops)
    return stood_in


def _attention_ops() -> Iterator[tuple[str, Any]]:
    """(name, schema) of what looks like attention, by name; schema is None for a higher-order op."""
    found = {}
    for schema in compat.registered_schemas():
        if schema.overload_name.endswith("out") or not attention_ops.looks_like(
            compat.schema_op_name(schema), schema
        ):
            continue
        found[compat.schema_op_name(schema)] = schema
    for name in compat.higher_order_ops():
        if attention_ops.looks_like(f"higher_order.{name}", None):
            found[f"higher_order.{name}"] = None
    yield from sorted(found.items())


def _describe(name: str, schema: Any, asked: Look, say: Any) -> RegisteredOp:
    if schema is None:
        op = compat.higher_order_ops()[name.partition(".")[2]]
        state = "registered" if compat.has_strategy(op) else "none"
        return RegisteredOp(
            name,
            "higher-order op",
            kernels=_kernels(schema),
            strategy=state,
            uncalled="it is a higher-order op",
        )
    op = compat.find_overload(name)
    composite = compat.is_composite(schema)
    kernels = _kernels(schema)
    if compat.has_strategy(op):
        state = "registered"
    elif composite:
        state = "composite"
    else:
        state = "decomposition" if compat.has_decomposition(op) else "none"
    depends = tuple(_variants(op)) if state == "decomposition" else ()
    found, why = None, ""
    if asked.call:
        found, why = _try_signature(op, name, kernels, asked, say)
    return RegisteredOp(
        op=name,
        schema=str(schema),
        kernels=kernels,
        strategy=state,
        depends=depends,
        backward=_backward(name),
        signature=found,
        uncalled=why,
    )


def _kernels(schema: Any) -> tuple[str, ...]:
    if schema is None:  # a higher-order op calls others
        return tuple(DEVICES.values())
    return tuple(DEVICES[key] for key in compat.kernel_keys(schema, tuple(DEVICES)))


def _has_own(schema: Any, device: str) -> bool:
    key = next(key for key, name in DEVICES.items() if name == device)
    return schema is not None and compat.has_own_kernel(schema, key)


def _variants(op: Any) -> Iterator[str]:
    """What DTensor finds in the op's decomposition, for each flag that the op has. Measured, not known."""
    flags = {a.name for a in compat.schema_of(op).arguments}
    t = dict.fromkeys(("q", "k", "v"), torch.empty(2, 4, 6, 8))
    for variant in VARIANTS:
        if not flags.issuperset(variant):
            continue
        what = ", ".join(f"{key}={value}" for key, value in variant.items()) or "plain"
        try:
            positional, named = signature.bind(op, t, "bhsd")
        except signature.Unclear as error:
            yield f"{what}: not tried, {error}"
            continue
        for at, argument in enumerate(compat.schema_of(op).arguments[: len(positional)]):
            positional[at] = variant.get(argument.name, positional[at])
        named |= {key: value for key, value in variant.items() if key in named}
        why = compat.refuses_decomposition(op, positional, named)
        yield f"{what}: none ({why})" if why else f"{what}: found"


def _backward(name: str) -> str:
    """The op of its backward, by the names that the field uses; '' where there is none."""
    base, _, overload = name.rpartition(".")
    candidates = [f"{base}_backward"]
    for forward, backward in (("forward", "backward"), ("fwd", "bwd")):
        if forward in base:
            head, _, tail = base.rpartition(forward)
            candidates.append(head + backward + tail)
    for candidate in candidates:
        if compat.find_overload(f"{candidate}.{overload}") is not None:
            return f"{candidate}.{overload}"
    return ""


def _try_signature(
    op: Any, name: str, kernels: tuple[str, ...], asked: Look, say: Any
) -> tuple[Signature | None, str]:
    if re.search(r"backward|bwd", name):
        return None, "a backward is checked through its forward"
    if asked.device not in kernels:
        return None, f"it has no {asked.device} kernel"
    if name in asked.fatal:
        return None, asked.fatal[name]
    say(f"calling {name}")
    try:
        return signature.find(op, asked.device), ""
    except signature.Unclear as error:
        return None, str(error)


def main() -> None:
    asked_file, answer = Path(sys.argv[1]), Path(sys.argv[2])
    asked = from_json(Look, json.loads(asked_file.read_text(encoding="utf-8")), "asked")
    torch.manual_seed(0)
    found = look(asked, answer)
    answer.write_text(json.dumps(to_json(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
