"""What is installed here, read without importing any of it: `attncheck env` works without torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attncheck import __version__, ownership

# Distributions whose version decides how attention behaves, by *distribution* name: two of them install
# a top-level `flash_attn`.
RELEVANT = (
    "torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-attn-triton", "xformers",
    "sageattention", "transformer-engine", "kernels", "flashinfer-python", "natten", "yunchang",
    "ring-flash-attn", "xfuser", "transformers", "diffusers", "accelerate", "torchtitan", "vllm",
    "numpy", "torch-npu", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip


def packages(path: Iterable[str] = (), here: bool = True) -> dict[str, str]:
    """Versions of the relevant distributions that are installed in the folders `path` and, unless they are of
    another environment, `here`."""
    found: dict[str, str] = {}
    search = [*path, *(sys.path if here else ())]
    for name in RELEVANT:
        for distribution in importlib.metadata.distributions(name=name, path=search):
            found[name] = distribution.version
            break
    return found


def is_installed(distribution: str, path: Iterable[str] = ()) -> bool:
    """Whether there is such a distribution here, or on the extra folders `path`."""
    search = [*path, *sys.path]
    return any(True for _ in importlib.metadata.distributions(name=distribution, path=search))


def describe(path: Iterable[str] = (), python: str = "") -> dict[str, Any]:
    """The version part of a report's environment; of another one than this, where the version of its `python`
    is given, and its packages lie in `path`."""
    return {
        "attncheck": __version__,
        "python": python or platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(path, here=not python),
        "cpus": os.cpu_count() or 0,
        "gpu": gpu(),
    }


def simulates_ranks() -> bool:
    """Whether the torch installed here has LocalTensorMode (2.10 on), without importing it."""
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    return any(
        (Path(f) / "distributed" / "_local_tensor" / "__init__.py").exists() for f in folders
    )


def gpu(driver: Path = Path("/proc/driver/nvidia")) -> str:
    """Names of the NVIDIA GPUs and their driver version, from the driver's own files; `none` without."""
    names = []
    for information in sorted(driver.glob("gpus/*/information")):
        if match := re.search(r"^Model:\s*(.+)$", information.read_text(errors="replace"), re.M):
            names.append(match[1].strip())
    if not names:
        return "none"
    version = ""
    if (driver / "version").exists():
        match = re.search(
            r"\b(\d{3}\.\d+[.\d]*)\b", (driver / "version").read_text(errors="replace")
        )
        version = f" (driver {match[1]})" if match else ""
    return ", ".join(names) + version


def clashes() -> list[str]:
    """Relevant distributions whose import name is not theirs alone: which one is loaded is chance."""
    return list(dict.fromkeys(why for name in packages() if (why := ownership.foreign(name))))


def render(environment: Mapping[str, Any]) -> str:
    """A Markdown list, for pasting into an issue."""
    lines = [
        f"- attncheck {environment['attncheck']}, Python {environment['python']}",
        f"- {environment['platform']}, {environment['cpus']} CPUs, GPU: {environment['gpu']}",
    ]
    found: Mapping[str, str] = environment["packages"]
    lines += [f"- {name} {version}" for name, version in found.items()]
    if "torch" not in found:
        lines.append("- torch is not installed")
    lines += [f"- warning: {clash}" for clash in clashes()]
    return "\n".join(lines) + "\n"
