"""CUDA C++ kernels: every file compiles for every architecture; on a GPU they pick what the reference picks."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.cuda import loader

from .test_fused_greedy import SELECTORS, expected, features

FILES = sorted(path.name for path in loader.SOURCES.glob("*.cu"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["nvrtc", "nvcc"])
def test_every_file_compiles(kind, file, architecture):
    path = loader._nvrtc_path() if kind == "nvrtc" else shutil.which("nvcc")
    if path is None:
        pytest.skip(f"needs {kind}")
    cubin = loader.compile_file(file, architecture, (kind, path))
    assert cubin[:4] == b"\x7fELF"


def test_a_file_that_does_not_compile_says_why(monkeypatch, tmp_path):
    if loader.compiler() is None:
        pytest.skip("needs NVRTC or nvcc")
    (tmp_path / "wrong.cu").write_text("__global__ void f() { missing(); }")
    monkeypatch.setattr(loader, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)wrong\.cu does not compile for sm_90.*missing"):
        loader.compile_file("wrong.cu", "sm_90")


def test_without_a_compiler_the_error_names_the_way_out(monkeypatch):
    monkeypatch.setattr(loader, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="VTOK_KERNELS=triton"):
        loader.compile_file(FILES[0], "sm_90")


def test_cubins_are_kept(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setenv("VTOK_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "compile_file", lambda *args: calls.append(args) or b"cubin")
    assert [loader.cached_cubin(FILES[0], "sm_90") for _ in range(2)] == [b"cubin"] * 2
    assert loader.cached_cubin(FILES[0], "sm_80") == b"cubin"
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VTOK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(loader, "compile_file", lambda *_: b"cubin")
    assert loader.cached_cubin(FILES[0], "sm_90") == b"cubin"


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (64, 64), (65, 3), (576, 64), (1000, 999), (2880, 320), (8192, 8192), (8191, 1)]
)
def test_a_cluster_holds_every_column(n, k):
    greedy = pytest.importorskip("vtok_kernels.cuda.greedy")
    plan = greedy.plan_cluster(n, k)
    assert plan.blocks * plan.width >= n and plan.columns >= plan.width and plan.blocks <= 16
    assert plan.columns % 32 == 0 and plan.threads % plan.columns == 0 and plan.threads <= 768
    assert plan.shared <= greedy.SHARED
    assert plan.resident % 4 == 0 and plan.resident > 0  # the kernel reads rows by four


def test_the_named_size_nearly_fits_a_cluster():
    """Of 320 rows of 2,880 columns at most eight go through global memory."""
    greedy = pytest.importorskip("vtok_kernels.cuda.greedy")
    assert 320 - greedy.plan_cluster(2880, 320).resident <= 8


@needs_gpu
@pytest.mark.parametrize("select", SELECTORS, ids=lambda s: s.__name__)
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 8), (2, 2, 8), (37, 37, 48), (150, 20, 64), (600, 16, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_float64(select, n, k, d, dtype):
    x = features(n, d, dtype=dtype)
    for sort in (True, False):
        with vk.use("cuda"):
            found = select(x.cuda(), k, sort=sort)
        assert found.tolist() == expected(select, x, k, sort=sort).tolist()


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("select", SELECTORS, ids=lambda s: s.__name__)
def test_the_named_size_is_greedy(backend, select):
    """At 2,880 tokens of width 4,096, many columns a program: alike in repeated runs, and nearly all as in float64."""
    x = features(2880, 4096, batch=1, dtype=torch.bfloat16).cuda()
    with vk.use(backend):
        picks = select(x, 320)
        assert torch.equal(picks, select(x, 320))
    with vk.use("reference"):
        want = set(select(x.double(), 320)[0].tolist())
    assert len(want & set(picks[0].tolist())) >= 304


@needs_gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool):
    program = (
        "import torch, vtok_kernels as vk\n"
        "x = torch.randn(2, 150, 40, device='cuda')\n"
        "with vk.use('cuda'):\n"
        "    vk.farthest_first(x, 20); vk.dpp_map(x, 20); vk.max_sum(x, 20, torch.zeros(2, dtype=torch.long).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
