"""``export``: check, write, load again, ask, and only then keep."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vtok.api import compressed, session_of
from vtok.errors import VtokError
from vtok.export import answers, hf, parity, probes
from vtok.export.answers import Answer
from vtok.export.folder import ready, written
from vtok.export.manifest import TARGETS, Manifest
from vtok.export.probes import Probe
from vtok.io import save
from vtok.method import Method
from vtok.progress import progress

#: fp32's last bit
EPSILON = 2.0**-23


def export(
    model: nn.Module,
    folder: str | Path,
    to: str = "hf",
    *,
    processor: Any = None,
    precision: str | None = None,
    fixed: bool = False,
    size: tuple[int, int] | None = None,
    samples: int | Sequence[Probe] = 100,
    new_tokens: int = 16,
    name: str = "",
    command: str = "",
    overwrite: bool = False,
    fresh: bool = True,
    bar: bool = True,
) -> Manifest:
    """Write a compressed model for somewhere else, and prove that it answers the same there.

    Parameters
    ----------
    model : nn.Module
        A model under ``vtok.compress``, in fp32 on the CPU for everything but ``"hf"``. It is left as it is.
    folder : str or Path
        The new folder.
    to : str
        ``"hf"``: weights, settings and a shim for transformers' auto classes. ``"onnx"``, ``"openvino"``, ``"pt2"``:
        three graphs, the vision side with a fixed budget among them.
    processor : ProcessorMixin, optional
        Saved with the model. Without it, whoever loads the folder brings tensors.
    precision : str, optional
        Of the weights: ``"fp32"``, ``"fp16"``, for ``"hf"`` also ``"bf16"``, for graphs ``"int8"``. ``"hf"`` keeps the
        model's own without it, graphs are in fp32.
    fixed : bool
        For graphs: leave out stages inside the decoder, which no graph of one length can hold. The budget is then
        spent before the decoder, and the export is compared with the model without these stages.
    size : tuple of int, optional
        Width and height in pixels of the pictures that graphs of LLaVA-NeXT and Qwen are made for, and of those that
        are asked about; by default those of the first question.
    samples : int or sequence of Probe
        Questions of the parity check: how many of those that ``vtok.export.probes.find`` gives, or one's own.
    new_tokens : int
        Most tokens of an answer.
    name, command : str
        Of the model, and what made the folder: for the manifest.
    overwrite : bool
        Replace an earlier export.
    fresh : bool
        Load the folder in a process of its own for the check. ``False`` is quicker, and needed for methods that no
        installed package registers.
    bar : bool
        Show progress bars.

    Returns
    -------
    Manifest
        As it is in the folder.

    Raises
    ------
    VtokError
        The pair of model and method cannot be exported so; a package is missing; the folder is in the way; the disk is
        full; the export answers otherwise than the model. Then there is no folder.
    """
    if to not in TARGETS:
        raise VtokError(f"there is no target {to!r}; known are {', '.join(TARGETS)}")
    session = session_of(model)
    ready(folder, overwrite)
    questions, origin = _questions(model, processor, samples, name, size, to)
    write, plan = _writer(model, to, precision, processor, questions[0], fixed)
    note = Manifest(
        target=to,
        precision=precision or "fp32",
        source={
            "name": name or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
            "family": session.adapter.family,
            "class": type(model).__name__,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        },
        compression={},
        plan=plan,
        command=command,
    )
    with written(folder, overwrite=overwrite) as beside:
        with progress(f"write {to}", 1, bar) as advance:
            kept_in = write(beside)
            advance(1)
        note = dataclasses.replace(note, precision=kept_in, compression=_compression(session)).write(beside)
        with _without_late(model, plan), progress("ask the model", len(questions), bar) as advance:
            reference = answers.of_model(model, processor, questions, new_tokens, advance)
        with progress("ask the export", len(questions), bar) as advance:
            asked = answers.in_process if fresh else answers.of_folder
            found: list[Answer] = asked(beside, questions, new_tokens, advance, next(model.parameters()).dtype)
        arithmetic = "fp32" if hf.lossless(model, kept_in) else kept_in
        checking = partial(
            parity.compare,
            reference,
            found,
            questions,
            precision=arithmetic,
            source=origin,
            new_tokens=new_tokens,
            processor=processor,
            fresh=fresh,
        )
        checked = checking()
        if arithmetic == "fp32" and parity.unsteady(checked):
            with _without_late(model, plan), progress("ask the model again", len(questions), bar) as advance:
                again = answers.of_model(model, processor, questions, new_tokens, advance, nudge=EPSILON)
            checked = checking(itself=again)
        parity.demand(checked, to)
        return dataclasses.replace(note, parity=checked).write(beside)


def _questions(
    model: Any, processor: Any, samples: int | Sequence[Probe], name: str, size: tuple[int, int] | None, to: str
) -> tuple[list[Probe], str]:
    """What is asked. Graphs take pictures of one layout: of the first one's size, where none was given."""
    if not isinstance(samples, int):
        if not samples:
            raise VtokError("the parity check needs at least 1 question; give some, or how many to take")
        return list(samples), "given"
    found, origin = probes.find(model, processor, name=name, count=samples, size=size)
    first = found[0].picture
    if to != "hf" and size is None and first is not None and session_of(model).adapter.family != "llava":
        found = [probes.resized(probe, first.size) for probe in found]
    return found, origin


def _writer(
    model: Any, to: str, precision: str | None, processor: Any, first: Probe, fixed: bool
) -> tuple[Callable[[Path], str], Mapping[str, Any] | None]:
    """What writes the folder and returns its precision, and the plan of the graphs. Refusals come from here."""
    if to == "hf":
        if fixed:
            raise VtokError(
                "a Hugging Face folder holds every method whole, nothing needs to be fixed; leave fixed out"
            )
        hf.check(model, precision)
        return lambda beside: hf.write(model, beside, processor=processor, precision=precision), None
    from vtok.export.vision import vision_graph

    target = importlib.import_module(f"vtok.export.{to}")
    wanted = precision or "fp32"
    if wanted not in target.PRECISIONS:
        raise VtokError(f"{to} has no precision {wanted}; take {' or '.join(target.PRECISIONS)}")
    graph = vision_graph(model, first.tensors(processor), fixed=fixed)

    def write(beside: Path) -> str:
        from vtok.export.trace import trace_all

        target.write(trace_all(model, graph), beside, wanted)
        model.config.save_pretrained(beside)
        model.generation_config.save_pretrained(beside)
        save(model, beside, weights=False)
        if processor is not None:
            processor.save_pretrained(beside)
        return wanted

    return write, graph.plan.to_json()


def _compression(session: Any) -> dict[str, Any]:
    """As it was asked for: what ``vtok_config.json`` names by its place in the folder has its own name here."""
    methods = [{"name": method.name, "options": method.options()} for method in session.methods]
    found = {"methods": methods, "keep": session.keep, "positions": session.positions}
    return json.loads(json.dumps(found))


@contextmanager
def _without_late(model: Any, plan: Mapping[str, Any] | None) -> Iterator[None]:
    """The model without the stages that its graphs leave out."""
    if plan is None or not plan.get("left_out"):
        yield
        return
    session = session_of(model)
    chain = [_early(method, session.shape) for method in session.methods]
    with compressed(model, chain, keep=session.keep, positions=session.positions):
        yield


def _early(method: Method, shape: Any) -> Method:
    """A method without its stages inside the decoder: with the option at ``None`` that takes them away."""

    def late(candidate: Method) -> bool:
        return any(stage.site == "decoder" for stage in candidate.stages(shape))

    if not late(method):
        return method
    for item in dataclasses.fields(method):
        try:
            candidate = dataclasses.replace(method, **{item.name: None})
            if not late(candidate):
                return candidate
        except (VtokError, TypeError):
            continue
    raise VtokError(
        f"{method.name} has no option that takes its stage inside the decoder away, so there is nothing to compare the "
        "export with; take a method that acts before the decoder, or export to hf"
    )
