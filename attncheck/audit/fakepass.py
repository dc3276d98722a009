"""The child that runs the user's code: `python -m attncheck.audit.fakepass ASKED ANSWER`.

It builds the model on fake tensors, as one rank of a process group that connects nobody, calls it forward and
backward, and writes what it saw. Real memory and the network are out of its reach.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from attncheck.audit import guarding, target
from attncheck.audit.asked import Answer, Pass
from attncheck.audit.carry import carry_on
from attncheck.audit.folding import Folder
from attncheck.audit.lines import line_through
from attncheck.audit.put_in_place import put_in_place
from attncheck.audit.recorder import Recorder
from attncheck.audit.sdpa import AsOnCuda
from attncheck.audit.seen import told
from attncheck.audit.where import raised_in, unwrapped
from attncheck.audited import Audit
from attncheck.errors import UserError
from attncheck.model import from_json, to_json
from attncheck.runner import compat
from attncheck.runner.compat import tree_leaves
from attncheck.runner.compat.compiled import compiled_modules
from attncheck.runner.compat.fake_collectives import fake_collectives
from attncheck.runner.compat.meshes import real_meshes

_UNRESOLVED = re.compile(r"Parallelize plan key '([^']+)' could not be resolved")

# Of fake tensors: `.item()` and the like, and shapes that values make (`nonzero`).
_NO_VALUE = ("DataDependentOutputException", "DynamicOutputShapeException")


def look(asked: Pass) -> Answer:
    """Raises UserError for what is wrong with the user's code, in one sentence with the line of it."""
    began = time.perf_counter()
    guarding.limit_memory()
    build = _named(asked.target, "the build function")
    try:
        inputs = _named(asked.inputs, "--inputs")
    except UserError:
        if not asked.default_inputs:
            raise
        raise UserError(
            f"{asked.target}: what is the model called with? Write inputs(mesh) beside it, or name a "
            "function with --inputs."
        ) from None
    ranks = math.prod(asked.mesh.values())
    compat.simulated_group(ranks, asked.rank)
    fake_collectives()
    mesh = init_device_mesh("cpu", tuple(asked.mesh.values()), mesh_dim_names=tuple(asked.mesh))
    recorder = Recorder(carry_on)
    route = AsOnCuda(recorder.attended)
    failure = ""
    with (
        compat.fake_mode(take_real=True),
        compat.convertible_modules(),
        compat.unsent_weights(),
        real_meshes(),
        route,
    ):
        with _counted_devices(ranks):
            model = _built(asked.target, build, mesh)
        arguments, keywords = _given(asked.inputs, inputs, mesh)
        recorder.where.name(model)
        parameters, parameter_bytes = recorder.weigh(model.named_parameters())
        # torch.compile traces what runs here; what it makes of it, a GPU would have to say.
        eagerly = torch.compiler.set_stance("force_eager")
        with eagerly, guarding.no_network(), recorder.recording():
            try:
                _step(model, arguments, keywords)
            except Exception as error:
                failure = _why(error)
                if module := raised_in(error):
                    failure += f" (in {module})"
    facts = told(recorder.facts, recorder.where.paths.values())
    audit = Audit(
        target=asked.target,
        mesh=asked.mesh,
        inputs=_described(arguments, keywords),
        parameters=parameters,
        parameter_bytes=parameter_bytes,
        layers=facts.layers,
        ops=facts.ops,
        communication=facts.communication,
        uneven=facts.uneven,
        notes=tuple(_notes(model, recorder)),
        failure=failure,
        seconds=round(time.perf_counter() - began, 2),
        peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )
    return Answer(audit, facts.attention, route.chosen)


def _named(text: str, option: str) -> Any:
    module = target.parse(text, option)[0]
    try:
        with guarding.no_network():
            return target.load(text, option)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{module} does not import: {_why(error)}.") from error


def _built(name: str, build: Any, mesh: Any) -> torch.nn.Module:
    with warnings.catch_warnings(record=True) as caught, guarding.no_network():
        warnings.simplefilter("always")
        try:
            model = build(mesh)
        except (Exception, SystemExit) as error:
            raise UserError(f"{name} raised {_why(error)}.") from error
    for warning in caught:
        if match := _UNRESOLVED.search(str(warning.message)):
            raise UserError(
                f"{name}: the plan names {match[1]!r}, and the model has no such module; its modules are "
                f"{_near(match[1], model)}."
            )
    if not isinstance(model, torch.nn.Module):
        raise UserError(
            f"{name} returned a {type(model).__name__}: expected an nn.Module, already parallelised."
        )
    real = {
        path: tensor
        for path, tensor in (*model.named_parameters(), *model.named_buffers())
        if not compat.is_fake(tensor)
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in real.values())
    if size > 2**26:  # a table made while the module was imported may be real
        first = next(iter(real))
        raise UserError(
            f"{name}: {first} and {len(real) - 1} more tensors hold real memory, {size / 2**20:.0f} MiB: "
            "they were made at import, from numpy or from a file; make them in build, with torch."
        )
    return model


def _near(name: str, model: Any) -> str:
    import difflib

    known = [path for path, _ in model.named_modules() if path]
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:5]) or "none"


def _given(name: str, inputs: Any, mesh: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        with guarding.no_network():
            given = inputs(mesh)
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} raised {_why(error)}.") from error
    if isinstance(given, torch.Tensor):
        given = (given,)
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        arguments, keywords = (), dict(given)
    elif isinstance(given, (tuple, list)):
        arguments, keywords = tuple(given), {}
    else:
        raise UserError(
            f"{name} returned a {type(given).__name__}: expected a tensor, a tuple of the model's "
            "arguments or a dict of them by name."
        )
    if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((arguments, keywords))):
        raise UserError(f"{name} returned no tensor: expected what the model is called with.")
    return arguments, keywords


@contextlib.contextmanager
def _counted_devices(ranks: int) -> Iterator[None]:
    """Code that takes its device from its rank and how many there are (diffusers' `enable_parallelism`: rank
    modulo their number) finds one for each rank, where there is none."""
    count = torch.accelerator.device_count
    if not count():
        torch.accelerator.device_count = lambda: ranks
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _step(model: torch.nn.Module, arguments: Any, keywords: Any) -> None:
    returned = model(*arguments, **keywords)
    outputs = [
        leaf
        for leaf in tree_leaves(returned)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]
    if outputs:
        torch.autograd.backward(outputs, [gradient_like(out) for out in outputs])


def gradient_like(out: torch.Tensor) -> torch.Tensor:
    """Ones, placed as an output is (the gradient of a `P(sum)` is replicated)."""
    if not isinstance(out, DTensor):
        return torch.ones_like(out)
    placements = [Replicate() if p.is_partial() else p for p in out.placements]
    return DTensor.from_local(
        torch.ones_like(compat.local_tensor(out)),
        out.device_mesh,
        placements,
        run_check=False,
        shape=out.shape,
        stride=out.stride(),
    )


def _why(error: BaseException) -> str:
    """What an exception says, at which line of the user's, and what an audit makes of it."""
    line = line_through(error)
    text = str(error).strip().split("\n", 1)[0] or type(error).__name__
    at = f" at {line}" if line else ""
    said = f"{type(error).__name__}{at}: {text}".rstrip(".")
    if isinstance(error, guarding.NetworkAsked):
        return f"{type(error).__name__}{at}: {text}; an audit needs no weights, make the model from its sizes"
    if type(error).__name__ in _NO_VALUE:
        return (
            f"{said.partition(': ')[0]}: it depends on the values of a tensor ({text.rstrip('.')}), and fake "
            "tensors have none"
        )
    lowered = text.lower()
    # What builds of torch without CUDA say, and those with it where there is no driver.
    if "nvidia driver" in lowered or ("cuda" in lowered and "compiled" in lowered):
        return f"{said}; an audit has no GPU: make tensors on mesh.device_type"
    if "allocate memory" in lowered or isinstance(error, MemoryError):
        limit = guarding.MEMORY_BYTES // 2**30
        return f"{said}; it takes real memory, over {limit} GiB: make tensors with torch functions, in build"
    return said


def _notes(model: torch.nn.Module, recorder: Recorder) -> Iterator[str]:
    compiled = dict.fromkeys(map(unwrapped, compiled_modules(model)), 1)
    if compiled:
        folder = Folder(recorder.where.paths.values())
        names = ", ".join(name or "the model" for name, _ in folder.fold(compiled))
        yield (
            f"torch.compile of {names}: run eagerly here, which is what is traced; what the compiler makes "
            "of it is not seen."
        )


def _described(arguments: Any, keywords: Any) -> str:
    named = [*((str(at), value) for at, value in enumerate(arguments)), *keywords.items()]
    words = []
    for name, value in named:
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                sizes = ", ".join(str(int(size)) for size in leaf.shape)
                words.append(f"{name} [{sizes}] {str(leaf.dtype).rpartition('.')[2]}")
    return "; ".join(words)


def main() -> None:
    asked_file, answer_file = (Path(name) for name in sys.argv[1:])
    # The same on a machine that has a GPU: what picks one for itself (`init_device_mesh`) finds none.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    asked = from_json(Pass, json.loads(asked_file.read_text(encoding="utf-8")), "pass")
    try:
        put_in_place(asked.path, asked.probe_files, asked.fixes)
        answer = look(asked)
    except UserError as error:
        answer = Answer(error=str(error))
    answer_file.write_text(json.dumps(to_json(answer)), encoding="utf-8")


if __name__ == "__main__":
    main()
