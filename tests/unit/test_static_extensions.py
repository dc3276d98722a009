"""Why a compiled extension does not load: planted in real shared libraries, each with a healthy twin, and
held against what the loader itself says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from planted_environment import (
    NEW_ERROR,
    OLD_ERROR,
    SET_DEVICE_NEW,
    SET_DEVICE_OLD,
    compile_library,
    install,
    needs_compiler,
    torch,
)

from attncheck.static import extensions, faults, installed, symbols
from attncheck.static.faults import Cause

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF"),
]
MODULE = "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so"


def found(site: Path, name: str = "flash-attn", **options: object) -> tuple[faults.Fault, ...]:
    read = installed.read([name], [site], "3.11", **options)  # type: ignore[arg-type]
    return extensions.of(read, name)


def causes(site: Path) -> list[Cause]:
    return [fault.cause for fault in found(site)]


def flash_attn(site: Path, needs: list[str], links: list[Path], module: str = MODULE) -> Path:
    file = compile_library(site / module, needs=needs, links=links)
    install(site, "flash-attn", "2.8.3", "flash_attn/__init__.py", module)
    return file


def linked(site: Path) -> list[Path]:
    return [site / "torch" / "lib" / name for name in ("libc10.so", "libc10_cuda.so")]


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ([SET_DEVICE_OLD], "c10::cuda::SetDevice, which torch 2.9.1+cu128 does not define: built for "
         "torch 2.7 or older"),
        ([OLD_ERROR], "c10::Error::Error, which torch 2.9.1+cu128 does not define: built for torch 2.6 "
         "or older and the C++ ABI of before C++11 (cxx11abiFALSE)"),
    ],
)  # fmt: skip
def test_symbols_of_another_torch_or_abi(needs: list[str], says: str, tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8", cuda_defines=[SET_DEVICE_NEW])
    flash_attn(tmp_path, needs, linked(tmp_path))
    (fault,) = found(tmp_path)
    assert (fault.cause, fault.subject) == (Cause.UNDEFINED_SYMBOL, needs[0])
    assert says in fault.text


def test_the_same_extension_beside_the_torch_that_it_was_built_for(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8", cuda_defines=[SET_DEVICE_NEW])
    flash_attn(tmp_path, [NEW_ERROR, SET_DEVICE_NEW], linked(tmp_path))
    assert found(tmp_path) == ()


def test_a_symbol_that_a_library_of_its_own_defines_is_no_fault(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8")
    own = compile_library(tmp_path / "libkernels.so", ["_ZN2at6kernelEv"], soname="libkernels.so")
    module = compile_library(tmp_path / MODULE, needs=["_ZN2at6kernelEv"], links=[own])
    subprocess.run(
        ["cc", "-shared", "-o", module, own, "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"], check=True
    )
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py", MODULE)
    assert found(tmp_path) == ()


def test_another_cuda(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8")
    old = compile_library(tmp_path / "libcudart.so", soname="libcudart.so.11.0")
    flash_attn(tmp_path, [], [old])
    (fault,) = found(tmp_path)
    assert fault.cause is Cause.OTHER_CUDA
    assert "libcudart.so.11.0 of CUDA 11, and torch 2.9.1+cu128 here brings CUDA 12.8" in fault.text


def test_the_cuda_that_torch_brings(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8")
    same = compile_library(tmp_path / "libcudart.so", soname="libcudart.so.12")
    flash_attn(tmp_path, [], [same])
    assert found(tmp_path) == ()


def test_built_for_cuda_beside_a_torch_without(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    cuda = compile_library(tmp_path / "libc10_cuda.so", [SET_DEVICE_NEW], soname="libc10_cuda.so")
    flash_attn(tmp_path, [SET_DEVICE_NEW], [cuda])
    (fault,) = found(tmp_path)  # and none of the symbols of CUDA, which follow from it
    assert fault.cause is Cause.OTHER_CUDA
    assert "libc10_cuda.so, and torch 2.9.1+cpu here is a build without CUDA" in fault.text


def test_a_library_that_is_nowhere(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    gone = compile_library(tmp_path / "libgone.so", soname="libsurely_nowhere.so.3")
    flash_attn(tmp_path, [], [gone])
    assert [fault.subject for fault in found(tmp_path)] == ["libsurely_nowhere.so.3"]
    assert causes(tmp_path) == [Cause.MISSING_LIBRARY]


def test_without_the_driver_only_that_is_said(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    stub = compile_library(tmp_path / "libcuda.so", soname="libcuda.so.1")
    flash_attn(tmp_path, [], [stub])
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has the driver")
    assert causes(tmp_path) == [Cause.NO_DRIVER]


def test_a_newer_system(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    newer = compile_library(
        tmp_path / "libm.so", ["shiny"], soname="libm.so.6", version="GLIBC_2.99"
    )
    flash_attn(tmp_path, ["shiny"], [newer])
    (fault,) = found(tmp_path)
    assert (fault.cause, fault.subject) == (Cause.NEWER_SYSTEM, "GLIBC_2.99")


def test_another_python(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    flash_attn(tmp_path, [], [], MODULE.replace("311", "310"))
    (fault,) = found(tmp_path)
    assert fault.cause is Cause.OTHER_PYTHON
    assert fault.text.endswith("is for Python 3.10, and this is Python 3.11")


@pytest.mark.parametrize("suffix", [".abi3.so", ".so", ".cpython-311-x86_64-linux-gnu.so"])
def test_names_that_this_python_takes(suffix: str, tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    flash_attn(tmp_path, [], [], f"flash_attn_2_cuda{suffix}")
    assert found(tmp_path) == ()


def test_left_out_of_the_build_unless_on_purpose(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cpu", cuda=None)
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn/__init__.py")
    assert causes(tmp_path) == [Cause.NOT_BUILT]
    assert found(tmp_path, hollow=["flash-attn"]) == ()


def test_without_a_list_of_files_the_known_module_is_read(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8")
    flash_attn(tmp_path, [SET_DEVICE_OLD], linked(tmp_path))
    (tmp_path / "flash_attn-2.8.3.dist-info" / "RECORD").unlink()
    assert causes(tmp_path) == [Cause.UNDEFINED_SYMBOL]


def test_a_torch_whose_cuda_was_uninstalled(tmp_path: Path) -> None:
    torch(tmp_path, "2.9.1+cu128", cuda="12.8")
    runtime = tmp_path / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.12"
    compile_library(
        tmp_path / "torch/lib/libtorch_cuda.so", links=[runtime], soname="libtorch_cuda.so"
    )
    assert found(tmp_path, "torch") == ()
    runtime.unlink()
    (fault,) = found(tmp_path, "torch")
    assert fault.subject == "libcudart.so.12"


# --- the same from what the loader says ---------------------------------------------------------------


def said_by_the_loader(file: Path) -> str:
    code = f"import ctypes; ctypes.CDLL({str(file)!r}, mode=2)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0, "the planted fault is none"
    return run.stderr.strip().splitlines()[-1]


def test_the_loader_agrees(tmp_path: Path) -> None:
    planted = {
        Cause.UNDEFINED_SYMBOL: compile_library(tmp_path / "undefined.so", needs=[OLD_ERROR]),
        Cause.OTHER_CUDA: compile_library(
            tmp_path / "cuda.so",
            links=[compile_library(tmp_path / "libcudart.so", soname="libcudart.so.11.0")],
        ),
        Cause.MISSING_LIBRARY: compile_library(
            tmp_path / "missing.so",
            links=[compile_library(tmp_path / "libgone.so", soname="libsurely_nowhere.so.3")],
        ),
        Cause.NEWER_SYSTEM: compile_library(
            tmp_path / "newer.so",
            needs=["shiny"],
            links=[
                compile_library(
                    tmp_path / "libm.so", ["shiny"], soname="libm.so.6", version="GLIBC_2.99"
                )
            ],
        ),
    }
    for cause, file in planted.items():
        text = said_by_the_loader(file)
        fault = faults.told_by(text)
        assert fault is not None, text
        assert fault.cause is cause, text


@pytest.mark.parametrize(
    ("message", "cause", "says"),
    [
        (f"ImportError: /x/flash_attn_2_cuda.so: undefined symbol: {OLD_ERROR}", "undefined_symbol",
         "built for torch 2.6 or older and the C++ ABI of before C++11"),
        ("ImportError: dlopen(/x.so): Symbol not found: __ZN3c104cuda9SetDeviceEa", "undefined_symbol",
         "c10::cuda::SetDevice, which the installed torch does not define: built for torch 2.7 or older"),
        ("ImportError: libcudart.so.11.0: cannot open shared object file: No such file", "other_cuda",
         "libcudart.so.11.0 of CUDA 11"),
        ("ImportError: libtorch_cuda.so: cannot open shared object file: No such file", "other_cuda",
         "is a build without CUDA"),
        ("OSError: libc10_hip.so: cannot open shared object file: No such file", "other_cuda", "ROCm"),
        ("ImportError: libcuda.so.1: cannot open shared object file: No such file", "no_driver", "driver"),
        ("ImportError: libmpi.so.40: cannot open shared object file: No such file", "missing_library",
         "libmpi.so.40"),
        ("ImportError: /lib64/libc.so.6: version `GLIBC_2.38' not found (required by /x.so)",
         "newer_system", "GLIBC_2.38, which libc.so.6 of this system does not have"),
        ("OSError: /x.so: wrong ELF class: ELFCLASS32", "other_machine", "not for this processor"),
        ("flash-attn: No module named 'flash_attn_2_cuda'", "not_built", "no flash_attn_2_cuda"),
        ("ImportError: DLL load failed while importing _C", "missing_library", "does not fit"),
    ],
)  # fmt: skip
def test_messages_of_loaders(message: str, cause: str, says: str) -> None:
    fault = faults.told_by(message)
    assert fault is not None
    assert fault.cause.value == cause
    assert says in fault.text


def test_other_messages_say_nothing() -> None:
    assert faults.told_by("ImportError: cannot import name 'f' from 'flash_attn'") is None


# --- names of symbols -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "readable", "abi"),
    [
        (OLD_ERROR, "c10::Error::Error", False),
        (NEW_ERROR, "c10::Error::Error", True),
        ("_ZNK5torch8autograd4Node4nameB5cxx11Ev", "torch::autograd::Node::name", True),
        ("_ZN5torch3jit11parseSchemaERKSsb", "torch::jit::parseSchema", False),
        (SET_DEVICE_OLD, "c10::cuda::SetDevice", None),
        ("_ZNK3c106SymInt6sym_neERKS0_", "c10::SymInt::sym_ne", None),
        ("_ZTVN5torch8autograd4NodeE", "torch::autograd::Node", None),
        ("_ZN2at6TensorD1Ev", "at::Tensor::~Tensor", None),
        ("_ZN3c108SsomehowEv", "c10::Ssomehow", None),
        ("aoti_torch_library_def", "aoti_torch_library_def", None),
        ("torch_c10_cuda_free_error_msg", "torch_c10_cuda_free_error_msg", None),
    ],
)
def test_names(name: str, readable: str, abi: bool | None) -> None:
    assert symbols.readable(name) == readable
    assert symbols.cxx11abi(name) is abi
    assert symbols.of_torch(name)


def test_what_is_not_of_torch() -> None:
    for name in ("PyList_New", "_ZNSt8ios_base4InitC1Ev", "_ZN11torchvision3nmsEv", "malloc"):
        assert not symbols.of_torch(name)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([SET_DEVICE_NEW], "torch 2.8 or newer"),
        ([SET_DEVICE_NEW, "_ZNK3c106SymInt6sym_neERKS0_"], "torch 2.8"),
        (
            [SET_DEVICE_OLD, "_ZNK3c1011StorageImpl27throw_data_ptr_access_errorEv"],
            "torch 2.6 to 2.7",
        ),
        ([SET_DEVICE_OLD, "aoti_torch_create_device_guard"], ""),  # no PyTorch has both
        (["_ZN2at4_ops3add4callEv"], ""),
    ],
)
def test_built_for(names: list[str], says: str) -> None:
    assert symbols.built_for(names) == says
