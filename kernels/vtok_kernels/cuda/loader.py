"""CUDA C++ kernels of `csrc`: compiled when they are first launched, by NVRTC or nvcc, and kept on disk.

NVRTC comes with torch's CUDA builds, takes a second, and needs no C++ compiler.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent.parent / "csrc"

_MAX_SHARED, _ANY_CLUSTER = 8, 14  # CU_FUNC_ATTRIBUTE_*
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


def _nvrtc_path() -> str | None:
    """Where NVRTC's library lies: beside torch, in NVIDIA's packages, or in the toolkit."""
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    roots = [Path(torch.__file__).parent / "lib", Path(toolkit) / "lib64", Path(toolkit) / "bin"]
    roots += [folder for entry in sys.path for folder in Path(entry or ".").glob("nvidia/*/lib")]
    for pattern in ("libnvrtc.so.*", "libnvrtc-*.so.*", "nvrtc64_*.dll"):
        for root in roots:
            found = sorted(path for path in root.glob(pattern) if "builtins" not in path.name)
            if found:
                return str(found[-1])
    return None


@functools.cache
def compiler() -> tuple[str, str] | None:
    """("nvrtc" or "nvcc", its path), or None where neither is found."""
    if (nvrtc := _nvrtc_path()) is not None:
        return "nvrtc", nvrtc
    return ("nvcc", nvcc) if (nvcc := shutil.which("nvcc")) else None


def _by_nvrtc(library: str, source: str, name: str, architecture: str) -> bytes:
    nvrtc = ctypes.CDLL(library)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    kind = "ProgramLog" if failed else "CUBIN"
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    out = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, out)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"{name} does not compile for {architecture}: {out.value.decode()}")
    return out.raw


def _by_nvcc(nvcc: str, source: str, name: str, architecture: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / name, Path(folder) / "out.cubin"
        path.write_text(source)
        command = [nvcc, "-cubin", f"-arch={architecture}", "-std=c++17", "-o", str(out), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} does not compile for {architecture}: {done.stderr}")
        return out.read_bytes()


def compile_file(name: str, architecture: str, by: tuple[str, str] | None = None) -> bytes:
    """The cubin of csrc/`name` for an architecture such as "sm_90".

    Raises
    ------
    RuntimeError
        If no compiler is found or the file does not compile; then with the compiler's words.
    """
    kind, path = by or compiler() or (None, "")
    if kind is None:
        raise RuntimeError(f"{name} needs NVRTC or nvcc, and neither is found: set VTOK_KERNELS=triton or reference.")
    source = (SOURCES / name).read_text()
    return (_by_nvrtc if kind == "nvrtc" else _by_nvcc)(path, source, name, architecture)


def cached_cubin(name: str, architecture: str) -> bytes:
    """`compile_file`, kept in $VTOK_CACHE (default ~/.cache/vtok) under its source, compiler and architecture."""
    key = hashlib.sha256((SOURCES / name).read_bytes() + repr((architecture, compiler())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("VTOK_CACHE") or Path.home() / ".cache" / "vtok") / "kernels"
    path = folder / f"{Path(name).stem}-{architecture}-{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = compile_file(name, architecture)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: another process never reads half of it.
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError:
        pass  # a home that cannot be written to costs a second at each start
    return cubin


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which a cluster uses three words."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(name: str, *args: Any) -> None:
    code = getattr(_driver(), name)(*args)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown").decode()
        raise RuntimeError(f"CUDA's {name} failed with {reason} ({code}): set VTOK_KERNELS=triton to do without it.")


def _enter(device: int) -> None:
    """Make torch's context current in this thread, which may not have called CUDA yet."""
    current = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(current), ctypes.c_int(device))
        _call("cuCtxSetCurrent", current)


@functools.cache
def _module(name: str, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    module = ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cached_cubin(name, f"sm_{major}{minor}")))
    return module


@functools.cache
def _function(file: str, name: str, device: int, shared: int, cluster: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    _call("cuModuleGetFunction", ctypes.byref(function), _module(file, device), name.encode())
    if shared > 48 * 1024:
        _call("cuFuncSetAttribute", function, _MAX_SHARED, shared)
    if cluster > 8:
        _call("cuFuncSetAttribute", function, _ANY_CLUSTER, 1)
    return function


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int(value) if isinstance(value, int) else value


def launch(
    file: str,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    *,
    device: torch.device,
    shared: int = 0,
    cluster: int = 1,
) -> None:
    """Launch kernel `name` (``extern "C"``) of csrc/`file` on the device's current stream.

    Parameters
    ----------
    grid, block : up to three ints each.
    arguments : in the kernel's order. A tensor or None goes as a pointer, an int as int, a float as float; ctypes
        values go as they are.
    shared : bytes of dynamic shared memory a block.
    cluster : blocks a cluster along x (sm_90 and later).

    Raises
    ------
    RuntimeError
        If it does not compile or CUDA refuses it.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        _enter(index)
        function = _function(file, name, index, shared, cluster)
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(id=_CLUSTER)
        attribute.value[:3] = (cluster, 1, 1)
        config = _Config(
            grid=(ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))),
            block=(ctypes.c_uint * 3)(*block, *[1] * (3 - len(block))),
            shared=shared,
            stream=torch.cuda.current_stream(index).cuda_stream,
            attributes=ctypes.pointer(attribute),
            count=int(cluster > 1),
        )
        _call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
