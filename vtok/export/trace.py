"""The three graphs of a compressed model as programs of ``torch.export``; every file format is written from these.

programs = trace_all(model, vision_graph(model, example))
onnx.write(programs, folder, "fp32")
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vtok.errors import VtokError
from vtok.export.language import Decoder, EmbedTokens

NAMES = ("vision", "embed", "decoder")
BATCH, LENGTH, PAST = 2, 5, 3
"""Sizes of the examples: a size of one would be taken for a constant, and no two are alike, so none is taken for
another."""


@dataclass(frozen=True)
class Program:
    """One traced graph.

    Attributes
    ----------
    name : str
        ``"vision"``, ``"embed"`` or ``"decoder"``.
    exported : ExportedProgram
        With every open axis dynamic. Sizes 0 and 1 are fine when it runs.
    inputs, outputs : tuple of str
        Names of the flattened inputs and outputs, in order, the same in every file format.
    """

    name: str
    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace_all(model: Any, graph: nn.Module) -> list[Program]:
    """Vision side, embeddings and decoder of a model.

    Parameters
    ----------
    model : PreTrainedModel
        The compressed model, in fp32 on the CPU. Files of other precisions are made from these programs.
    graph : VisionGraph
        Of ``vtok.export.vision.vision_graph``.

    Raises
    ------
    VtokError
        Another dtype or device, or a language model that no graph can hold.
    """
    return [trace_vision(graph), trace_embed(model), trace_decoder(model)]


def trace_vision(graph: Any) -> Program:
    """``pixel_values`` (B, ...) to ``features`` (B, k, D) and ``kept`` (B, k)."""
    _check(graph)
    pixels = torch.zeros(BATCH, *graph.plan.pixel_shape)
    exported = _trace(graph, (pixels,), ({0: Dim.DYNAMIC},))
    return Program("vision", exported, ("pixel_values",), ("features", "kept"))


def trace_embed(model: Any) -> Program:
    """``input_ids`` (B, L) to ``inputs_embeds`` (B, L, D)."""
    _check(model)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    exported = _trace(EmbedTokens(model), (ids,), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    return Program("embed", exported, ("input_ids",), ("inputs_embeds",))


def trace_decoder(model: Any) -> Program:
    """Inputs and outputs of ``vtok.export.language.Decoder``; the cache is flat: ``past_key_values.N.key`` and
    ``.value`` come in, ``present.N.key`` and ``.value`` go out."""
    _check(model)
    decoder = Decoder(model).eval()
    heads, width = decoder.heads, decoder.width
    embeds = torch.zeros(BATCH, LENGTH, decoder.text.config.hidden_size)
    mask = torch.ones(BATCH, PAST + LENGTH, dtype=torch.long)
    shape = (BATCH, LENGTH) if decoder.axes == 1 else (decoder.axes, BATCH, LENGTH)
    positions = torch.zeros(shape, dtype=torch.long)
    past = [torch.zeros(BATCH, heads, PAST, width) for _ in range(2 * decoder.layers)]
    opened = Dim.DYNAMIC
    shapes = (
        {0: opened, 1: opened},
        {0: opened, 1: opened},
        {positions.ndim - 2: opened, positions.ndim - 1: opened},
        [{0: opened, 2: opened} for _ in past],
    )
    exported = _trace(decoder, (embeds, mask, positions, past), shapes)
    _widen(exported)
    layers = range(decoder.layers)
    return Program(
        "decoder",
        exported,
        ("inputs_embeds", "attention_mask", "position_ids", *_cache_names("past_key_values", layers)),
        ("logits", *_cache_names("present", layers)),
    )


def _widen(exported: ExportedProgram) -> None:
    """Sizes of 2 and more are let through from 0 on; that the mask's is the sum of two others made it 4, and a prompt
    of two words would be refused."""
    ranges = exported.range_constraints
    least = min(ranges.values(), key=lambda found: found.lower)
    for size in ranges:
        ranges[size] = least


def _cache_names(stem: str, layers: Sequence[int]) -> list[str]:
    return [f"{stem}.{layer}.{part}" for layer in layers for part in ("key", "value")]


def _check(module: nn.Module) -> None:
    for weight in module.parameters():
        if weight.is_floating_point() and (weight.dtype != torch.float32 or weight.device.type != "cpu"):
            raise VtokError(
                f"graphs are traced from fp32 weights on the CPU, and these are {weight.dtype} on {weight.device}; "
                "load the model with dtype=torch.float32 (the files' precision is chosen apart from it)"
            )


@torch.no_grad()
def _trace(module: nn.Module, example: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    with _quiet():
        # that the mask is as long as cache and new columns together is left to run time: no dimension of an export can
        # be said to be the sum of two others
        return torch.export.export(
            module.eval(),
            example,
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes on how it traces; errors come through."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\..*")
            yield
    finally:
        logger.setLevel(level)


def example_of(program: Program) -> list[Tensor]:
    """Flat inputs of the sizes that a program was traced with."""
    import torch.utils._pytree as pytree

    arguments, _ = program.exported.example_inputs or ((), {})
    return pytree.tree_leaves(arguments)
