"""The torch that these tests run with, and what differs between the versions they were run with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import TypeVar

from packaging.version import Version

T = TypeVar("T")

TORCH = Version(Version(importlib.metadata.version("torch")).public)  # without +cpu or +cu130
# What these do differently was measured. CI runs 2.13.0.
RUN_WITH = ("2.6.0", "2.9.1", "2.11.0", "2.13.0", "2.15.0")
NO_SIMULATION = "LocalTensorMode came with torch 2.10"


def before(version: str) -> bool:
    """Whether the torch here is older."""
    return Version(version) > TORCH


def measured(since: Mapping[str, T]) -> T:
    """Of what was measured, by the first version that did so: what holds for the torch here.

    Keys are of `RUN_WITH`; a version between two of them is taken to do as the older one does.
    """
    assert set(since) <= set(RUN_WITH)
    return since[max((key for key in since if not before(key)), key=Version)]


# What flash-attn's Python code calls between its kernels (`out[..., :head_dim]`) and has no strategy either.
FLASH_ATTN_VIEWS = measured({"2.6.0": {"aten.alias.default"}, "2.11.0": set[str]()})
