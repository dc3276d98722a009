"""Audits of small models under each of the ways that people parallelise one: tests/models/integrations.py.

What an audit says of collectives, on fake tensors, is held against what PyTorch's profiler counts on real
gloo ranks (tests/models/counted.py): how many, and how large their inputs are.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch_here
from packaging.version import Version

from attncheck.audited import Audit
from attncheck.model import Report
from attncheck.saved import load_report

MODELS = Path(__file__).parents[1] / "models"
FLASH = "aten._scaled_dot_product_flash_attention.default"
LOCAL = "DTensor has no part in it"
BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Audited:
    exit_code: int
    stderr: str
    report: Report

    @property
    def audit(self) -> Audit:
        assert self.report.audit is not None
        return self.report.audit

    @property
    def statuses(self) -> dict[str, str]:
        return {each.case.id: each.outcome.status.value for each in self.report.cases}

    def goes_through(self) -> bool:
        refused = [op for op in self.audit.ops if op.problem]
        return (self.exit_code, self.audit.failure, refused) == (0, "", [])

    def calls(self) -> dict[str, dict[str, int]]:
        """Collectives by name and module, of both phases."""
        out: dict[str, dict[str, int]] = {}
        for each in self.audit.communication:
            own = out.setdefault(each.name, {})
            own[each.module] = own.get(each.module, 0) + each.calls
        return out

    def sent(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for each in self.audit.communication:
            counts[each.name] += each.bytes
        return counts

    def all_is_asked_for(self) -> bool:
        return all(each.asked for each in self.audit.communication)


@functools.cache
def audited(build: str, inputs: str, mesh: str) -> Audited:
    """What the command line makes of a target."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "attncheck", "audit", f"integrations.py:{build}"),
                *("--inputs", f"integrations.py:{inputs}", "--mesh", mesh, "-q"),
                *("--output", f"json:{file}"),
            ],
            cwd=MODELS,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert file.exists(), done.stderr[-3000:]
        return Audited(done.returncode, done.stderr, load_report(file.read_text()))


@functools.cache
def on_gloo(mesh: str, *targets: tuple[str, str]) -> dict[str, dict[str, Counter[str]]]:
    """What the profiler counted of each build; by the names that an audit has for collectives."""
    names = {f"integrations:{build}": f"integrations:{inputs}" for build, inputs in targets}
    ranks = 1
    for axis in mesh.split(","):
        ranks *= int(axis.partition("=")[2])
    done = subprocess.run(
        [sys.executable, str(MODELS / "counted.py"), str(ranks), mesh, json.dumps(names)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    found: dict[str, dict[str, Counter[str]]] = {}
    for target, answer in json.loads(line).items():
        calls: Counter[str] = Counter()
        for name, count in answer["calls"].items():
            calls[C10D[name]] += count
        elements = Counter(answer["elements"])
        found[target.partition(":")[2]] = {"calls": calls, "elements": elements}
    return found


C10D = {
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
}
# What a rank sends of its input where there are two, one after the other in a ring.
PARTS = {"all_gather": 1.0, "all_reduce": 1.0, "reduce_scatter": 0.5, "all_to_all": 0.5}


def same_as_on_gloo(audit: Audited, real: dict[str, Counter[str]], size: int = BYTES) -> None:
    """Each axis has two ranks. `size`: of an element of what is exchanged by all-to-all."""
    said = {name: sum(own.values()) for name, own in audit.calls().items()}
    assert said == real["calls"]
    elements: Counter[str] = Counter()
    for name, sent in audit.sent().items():
        of = size if name == "all_to_all" else BYTES
        elements["all_reduce" if name == "reduce_scatter" else name] += round(
            sent / PARTS[name] / of
        )
    assert elements == real["elements"]


# --- DTensor -----------------------------------------------------------------------------------------------

# Of the decoder: what its plan asks for, on two ranks of `tp`.
OF_THE_PLAN = {
    "all_gather": {
        "blocks.*.attention": 2,
        "blocks.*.up": 2,
        "head": 2,  # of its input, and of the logits
        "blocks.*.down": 2,
        "blocks.*.attention.o": 2,
        "embedding": 1,
    },
    "reduce_scatter": {
        "embedding": 1,
        "blocks.*.attention.o": 2,
        "blocks.*.down": 2,
        "head": 1,
        "blocks.*.up": 2,
        "blocks.*.attention": 2,
    },
}


def decoder(build: str, mesh: str = "tp=2") -> Audited:
    return audited(build, "inputs", mesh)


def test_parallelize_module_with_attention_on_dtensors() -> None:
    found = decoder("build_parallelized")
    assert found.goes_through()
    assert found.audit.layers["blocks.*"] == 2
    (call,) = found.audit.attention
    assert (call.modules, call.calls, call.kernel_op) == (("blocks.*.attention",), 2, FLASH)
    assert call.placements == dict.fromkeys("qkv", ("S(1)",))
    assert {found.statuses[name] for name in call.cases} == {"supported"}
    assert len(call.cases) == 2  # forward and backward, with real numbers
    assert found.calls() == OF_THE_PLAN
    assert found.all_is_asked_for()


def test_local_map_around_attention() -> None:
    found = decoder("build_local_map")
    assert found.goes_through()
    (call,) = found.audit.attention
    assert (call.modules, call.calls, call.kernel_op) == (("blocks.*.attention",), 2, FLASH)
    assert call.placements == dict.fromkeys("qkv", ("plain",))
    assert call.sizes["heads"] == 2  # a rank's
    assert LOCAL in call.note
    assert not call.cases
    assert FLASH not in {op.op for op in found.audit.ops}
    assert found.calls() == OF_THE_PLAN


def test_a_model_on_a_real_mesh_communicates_as_said() -> None:
    same_as_on_gloo(decoder("build_local_map"), on_two_ranks("build_local_map"))


@pytest.mark.skipif(
    torch_here.before("2.9.1"), reason="FSDP2's collectives cannot be called on fake tensors (2.6)"
)
def test_fsdp_around_tensor_parallelism() -> None:
    found = decoder("build_fsdp_tp", "dp=2,tp=2")
    assert found.goes_through()
    (call,) = found.audit.attention
    assert call.modules == ("blocks.*.attention",)
    assert {found.statuses[name] for name in call.cases} == {"supported"}
    # Each parameter on two ranks of both axes, but for norms and the bias of `down`, whole on those of `tp`.
    whole = 2 * (2 * 64 + 64)
    assert found.audit.parameters == 78_464
    assert found.audit.parameter_bytes == BYTES * ((78_464 - whole) // 4 + whole // 2)
    gathers, scatters = found.calls()["all_gather"], found.calls()["reduce_scatter"]
    # Over `dp`: the model's own parameters once, those of a block forward and again backward, gradients once.
    assert gathers[""] == scatters[""] == 1
    assert sum(gathers.values()) == sum(OF_THE_PLAN["all_gather"].values()) + 1 + 4
    assert scatters["blocks.*"] == 2
    # Over `tp`: norms see a part of the sequence, so their gradients are partial sums.
    assert found.calls()["all_reduce"] == {"blocks.*": 4}
    assert found.all_is_asked_for()
    same_as_on_gloo(found, on_four_ranks("build_fsdp_tp_local"))


# --- torch.compile -----------------------------------------------------------------------------------------


def test_a_compiled_model_is_audited_eagerly() -> None:
    found = decoder("build_compiled")
    assert found.goes_through()
    (note,) = [note for note in found.audit.notes if "compile" in note]
    assert "torch.compile of the model, blocks.*: run eagerly here" in note
    # And it does what the same model does that is not compiled, in modules of the same names.
    plain = decoder("build_local_map")
    for part in ("ops", "communication", "attention", "layers"):
        assert getattr(found.audit, part) == getattr(plain.audit, part), part
    assert not [note for note in plain.audit.notes if "compile" in note]


# --- transformers ------------------------------------------------------------------------------------------


def installed(package: str, since: str) -> bool:
    try:
        return Version(importlib.metadata.version(package)) >= Version(since)
    except importlib.metadata.PackageNotFoundError:
        return False


HAS_TRANSFORMERS = installed("transformers", "5.20")
HAS_DIFFUSERS = installed("diffusers", "0.42")
transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers from 5.20 on makes its meshes apart from weights"
)
diffusers = pytest.mark.skipif(
    not HAS_DIFFUSERS, reason="diffusers has enable_parallelism as it is used here from 0.42 on"
)


def on_two_ranks(build: str) -> dict[str, Counter[str]]:
    targets = [("build_local_map", "inputs")]
    if HAS_TRANSFORMERS:
        targets.append(("build_llama", "inputs_transformers"))
    if HAS_DIFFUSERS:
        targets += [("build_wan_ulysses", "inputs_wan"), ("build_wan_ring", "inputs_wan")]
    return on_gloo("tp=2", *targets)[build]


def on_four_ranks(build: str) -> dict[str, Counter[str]]:
    targets = [("build_fsdp_tp_local", "inputs")]
    if HAS_TRANSFORMERS:
        targets.append(("build_qwen3_fsdp", "inputs_transformers"))
    return on_gloo("dp=2,tp=2", *targets)[build]


@transformers
def test_tp_plan_of_transformers() -> None:
    found = audited("build_llama", "inputs_transformers", "tp=2")
    assert found.goes_through()
    layer = "model.layers.*"
    # Attention sees a rank's heads as ordinary tensors: two of four, and one of two for k and v.
    (call,) = found.audit.attention
    assert (call.modules, call.calls) == ((f"{layer}.self_attn",), 2)
    assert call.sizes["heads"] == 2
    assert call.sizes["kv_heads"] == 1
    assert call.options["causal"]
    assert LOCAL in call.note
    # Of its plan: rows are summed forward, and the input's gradient of columns backward.
    assert found.calls()["all_gather"] == {"lm_head": 1}
    sums = found.calls()["all_reduce"]
    assert sums.pop("model.embed_tokens", 1) == 1  # 5.24 shards it by words, 5.20 does not
    assert sums == {
        **{f"{layer}.{part}": 2 for part in ("self_attn.o_proj", "mlp.down_proj")},
        **{f"{layer}.self_attn.{part}_proj": 2 for part in "qkv"},
        **{f"{layer}.mlp.{part}_proj": 2 for part in ("gate", "up")},
        "lm_head": 1,
    }
    assert found.all_is_asked_for()
    # No line is the user's, so the package's own.
    lines = {each.line for each in found.audit.communication if each.phase == "forward"}
    assert lines
    assert all(line.startswith("transformers/distributed/tensor_parallel.py:") for line in lines)
    same_as_on_gloo(found, on_two_ranks("build_llama"))


@transformers
def test_fsdp_plan_and_tp_plan_of_transformers() -> None:
    found = audited("build_qwen3_fsdp", "inputs_transformers", "dp=2,tp=2")
    assert found.goes_through()
    (call,) = found.audit.attention
    assert (call.modules, call.calls) == (("model.layers.*.self_attn",), 2)
    assert LOCAL in call.note
    # Over `dp`, by its `_fsdp_plan`: what is gathered forward, and where gradients are scattered.
    gathers = {
        each.module: each.calls
        for each in found.audit.communication
        if each.name == "all_gather" and each.phase == "forward"
    }
    assert gathers == {
        "model.embed_tokens": 1,
        "model.layers.*": 2,
        "model.norm": 1,
        "lm_head": 1,  # of the logits, over `tp`; its weights come with the norm
    }
    assert found.calls()["reduce_scatter"]["model.layers.*"] == 2
    same_as_on_gloo(found, on_four_ranks("build_qwen3_fsdp"))


# --- diffusers ---------------------------------------------------------------------------------------------


@diffusers
def test_ulysses_of_diffusers() -> None:
    found = audited("build_wan_ulysses", "inputs_wan", "cp=2")
    assert found.goes_through()
    assert not found.audit.ops  # none of them meets a DTensor
    own, cross = found.audit.attention
    # Self-attention has half of the heads and all 16 tokens; cross-attention is of the rank's own tokens.
    assert own.modules == ("blocks.*.attn1",)
    assert (own.sizes["heads"], own.sizes["sequence"]) == (2, 16)
    assert cross.modules == ("blocks.*.attn2",)
    assert (cross.sizes["heads"], cross.sizes["sequence"]) == (4, 8)
    assert cross.sizes["kv_sequence"] == 8  # text
    # q, k, v and the output, forward and backward, in both layers; tokens come together once.
    assert found.calls() == {
        "all_to_all": {"blocks.*.attn1": 2 * 4 * 2},
        "all_gather": {"proj_out": 1},
    }
    same_as_on_gloo(found, on_two_ranks("build_wan_ulysses"))


@diffusers
def test_ring_of_diffusers() -> None:
    found = audited("build_wan_ring", "inputs_wan", "cp=2")
    assert found.goes_through()
    own, cross = found.audit.attention
    # A call for each rank's keys, in both layers.
    assert (own.modules, own.calls) == (("blocks.*.attn1",), 4)
    assert (own.sizes["heads"], own.sizes["sequence"]) == (4, 8)
    assert (cross.modules, cross.calls) == (("blocks.*.attn2",), 2)
    # It gathers keys and values at once, forward and again backward, and passes their gradients round.
    assert found.calls() == {
        "all_gather": {"blocks.*.attn1": 2 * 2, "proj_out": 1},
        "all_to_all": {"blocks.*.attn1": 2 * 2},
    }
    same_as_on_gloo(found, on_two_ranks("build_wan_ring"), size=4)  # gradients in float32


@diffusers
def test_a_ring_that_diffusers_refuses() -> None:
    """It says so no earlier than at its first attention call."""
    found = audited("build_wan_ring_native", "inputs_wan", "cp=2")
    assert found.exit_code == 1
    failure = found.audit.failure
    assert re.match(r"ValueError at diffusers/models/attention_dispatch\.py:\d+: ", failure)
    assert "return_lse" in failure
    assert failure.endswith("(in blocks.0.attn1)")
    (finding,) = found.report.findings
    assert finding.rule == "ATN504"


@diffusers
@pytest.mark.slow
def test_tensor_parallelism_of_diffusers() -> None:
    found = audited("build_flux_tp", "inputs_flux", "tp=2")
    assert found.goes_through()
    (call,) = found.audit.attention
    assert call.modules == ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    assert (call.calls, call.sizes["heads"], call.sizes["sequence"]) == (4, 2, 24)
    assert LOCAL in call.note
    rows = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
    forward = {
        each.module: each.calls
        for each in found.audit.communication
        if each.phase == "forward" and each.name == "all_reduce"
    }
    assert forward == {
        **{f"transformer_blocks.*.{row}": 2 for row in rows},
        "single_transformer_blocks.*.proj_out": 2,
    }
    same_as_on_gloo(found, on_gloo("tp=2", ("build_flux_tp", "inputs_flux"))["build_flux_tp"])


# --- what fake tensors cannot tell -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_reads_values_is_told_so_with_its_line() -> None:
    found = decoder("build_reading_a_value")
    assert found.exit_code == 1
    failure = found.audit.failure
    assert re.match(r"DataDependentOutputException at integrations\.py:\d+: it depends", failure)
    assert "aten._local_scalar_dense" in failure
    assert failure.endswith("(in head)")
