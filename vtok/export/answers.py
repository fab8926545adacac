"""What a model answers to the questions of the parity check, here or in a process of its own.

``python -m vtok.export.answers FOLDER PROBES OUT`` is that process: it loads an exported folder as a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtok.api import report
from vtok.errors import VtokError
from vtok.export import manifest, probes
from vtok.export.probes import Probe

ANSWERED = "answered"


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes
    ----------
    tokens : tuple of int
        New tokens, the end token left out.
    kept : tuple of int
        Original indices of the visual tokens that were kept, ascending.
    logits : Tensor
        (V,) of the first new token, fp32 on the CPU.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    logits: Tensor


@torch.no_grad()
def of_model(
    model: Any,
    processor: Any,
    questions: Sequence[Probe],
    new_tokens: int,
    advance: Callable[[int], None],
    nudge: float = 0.0,
) -> list[Answer]:
    """Greedy answers of a compressed model, one question at a time.

    Parameters
    ----------
    model : PreTrainedModel
        Under ``vtok.compress``.
    processor : ProcessorMixin or None
        Not needed for questions with inputs.
    questions : sequence of Probe
        What to ask.
    new_tokens : int
        Most tokens of an answer.
    advance : callable
        Told of every question.
    nudge : float
        Pixels are changed by normal noise of this size, relative to each; seeded.
    """
    noise = torch.Generator().manual_seed(0)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    found = []
    for question in questions:
        tensors = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in question.tensors(processor).items()
        }
        if nudge:
            for key in (key for key, value in tensors.items() if value.is_floating_point()):
                change = torch.randn(tensors[key].shape, generator=noise).to(tensors[key])
                tensors[key] = tensors[key] * (1 + nudge * change)
        length = tensors["input_ids"].shape[1]
        given = model.generate(
            **tensors, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **greedy
        )
        kept = tuple(index for image in report(model).kept[0] for index in image.tolist())
        tokens = _cut(given.sequences[0, length:].tolist(), model.generation_config.eos_token_id)
        found.append(Answer(tokens, kept, given.logits[0][0].float().cpu()))
        advance(1)
    return found


def _cut(tokens: Sequence[int], end: int | Sequence[int] | None) -> tuple[int, ...]:
    ends = {end} if isinstance(end, int) else set(end or ())
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def of_folder(
    folder: Path, questions: Sequence[Probe], new_tokens: int, advance: Callable[[int], None], dtype: torch.dtype
) -> list[Answer]:
    """Greedy answers of an exported folder, loaded as its users load it: by the auto class, or by its runtime.

    ``dtype`` is what a Hugging Face folder is loaded in: that of the model, whatever the file holds.
    """
    if manifest.read(folder).target == "hf":
        return of_model(*_auto(folder, dtype), questions, new_tokens, advance)
    from vtok.export.runtime import open_exported

    runtime, found = open_exported(folder), []
    for question in questions:
        inputs = question.inputs or runtime.inputs([question.picture], [question.prompt])
        given = runtime.generate_ids(inputs, new_tokens)
        kept = tuple(int(index) for image in given.kept[0] for index in image)
        tokens = _cut(given.tokens[0].tolist(), list(runtime.settings.ends))
        found.append(Answer(tokens, kept, torch.from_numpy(given.logits[0]).float()))
        advance(1)
    return found


def _auto(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers

    library: Any = transformers
    model = library.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    has = any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    return model.eval(), library.AutoProcessor.from_pretrained(folder) if has else None


def in_process(
    folder: Path, questions: Sequence[Probe], new_tokens: int, advance: Callable[[int], None], dtype: torch.dtype
) -> list[Answer]:
    """``of_folder`` in a fresh process, which shares nothing with this one but files.

    Raises
    ------
    VtokError
        It could not load the folder or answer; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="vtok-parity-") as scratch:
        asked, told, last = (Path(scratch) / name for name in ("asked", "told", "last"))
        probes.save(questions, asked)
        command = [sys.executable, "-m", __name__, str(folder), str(asked), str(told), str(new_tokens)]
        command.append(str(dtype).removeprefix("torch."))
        # remote code is copied into a cache by the folder's name, which is not its name yet
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
        with last.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip() == ANSWERED:
                        advance(1)
            finally:
                if sys.exc_info()[0] is not None:
                    process.kill()
                code = process.wait()
        if code:
            said = [line.strip() for line in last.read_text(errors="replace").splitlines() if line.strip()]
            raise VtokError(f"the exported folder does not work in a fresh process: {said[-1] if said else code}")
        return _read(told)


def _write(found: Sequence[Answer], folder: Path) -> None:
    folder.mkdir()
    lines = [{"tokens": answer.tokens, "kept": answer.kept} for answer in found]
    (folder / "answers.json").write_text(json.dumps(lines), encoding="utf-8")
    save_file({"logits": torch.stack([answer.logits for answer in found])}, folder / "logits.safetensors")


def _read(folder: Path) -> list[Answer]:
    logits = load_file(folder / "logits.safetensors")["logits"]
    lines = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return [Answer(tuple(line["tokens"]), tuple(line["kept"]), row) for line, row in zip(lines, logits, strict=True)]


def main(folder: str, asked: str, told: str, new_tokens: str, dtype: str) -> None:
    """The fresh process; it says on standard output that a question is answered."""
    import transformers

    transformers.logging.set_verbosity_error()
    advance: Callable[[int], None] = lambda steps: print(ANSWERED, flush=True)  # noqa: E731, T201
    questions = probes.load(Path(asked))
    _write(of_folder(Path(folder), questions, int(new_tokens), advance, getattr(torch, dtype)), Path(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
