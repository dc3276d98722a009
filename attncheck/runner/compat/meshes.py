"""Device meshes that libraries make under a fake mode."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh

# What computes with the tensor of a mesh's ranks; those that a version lacks, it does in another of these.
_COMPUTES = (
    "__init__",
    "__repr__",
    "_concatenate",
    "_flatten",
    "_get_all_submeshes",
    "_unflatten",
    "from_group",
    "mesh",
)


@contextlib.contextmanager
def real_meshes() -> Iterator[None]:
    """A mesh that is made, or flattened, in here has real ranks in it, under a fake mode too.

    FSDP2, transformers and diffusers make some from what they are given, and read the ranks. Slicing a mesh
    steps out of the mode by itself (2.6 to 2.15); nothing else of a mesh does.
    """
    before = {name: vars(DeviceMesh)[name] for name in _COMPUTES if name in vars(DeviceMesh)}
    make = device_mesh.init_device_mesh
    # It is imported by name, by torch.distributed and by users.
    owners = [
        m
        for m in list(sys.modules.values())
        if getattr(m, "__dict__", {}).get("init_device_mesh") is make
    ]
    for name, own in before.items():
        setattr(DeviceMesh, name, _wrapped(own))
    for owner in owners:
        setattr(owner, "init_device_mesh", _unfaked(make))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(DeviceMesh, name, own)
        for owner in owners:
            setattr(owner, "init_device_mesh", make)


def _wrapped(own: Any) -> Any:
    if isinstance(own, property):
        assert own.fget is not None
        return property(_unfaked(own.fget))
    if isinstance(own, staticmethod):
        return staticmethod(_unfaked(own.__func__))
    return _unfaked(own)


def _unfaked(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    @functools.wraps(function)
    def unfaked(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return unfaked
