"""The training objective: reconstruction from a random prefix, and what the options add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers import halting, nested
from vtok.tokenizers.config import TokenizerConfig

if TYPE_CHECKING:
    from vtok.tokenizers.flextok import FlexTok


def losses(
    tokenizer: FlexTok, images: Tensor, generator: torch.Generator | None = None, features: Tensor | None = None
) -> dict[str, Tensor]:
    """``FlexTok.losses``."""
    config = tokenizer.config
    signal = tokenizer.to_signal(images)
    keep = draw_keep(config, len(signal), generator)
    registers = tokenizer.encoder(signal, config.tokens + config.padding)
    values, own = tokenizer.quantiser(tokenizer.to_tokens(registers), generator)
    judged = tokenizer.decoder.judge(values, keep, signal, generator)
    parts = {"reconstruction": judged.loss} | own
    loss = judged.loss + (config.quantiser_weight or 0.0) * sum(own.values())
    if features is not None:
        parts["repa"] = aligned(tokenizer, judged.features, features, keep)
        loss = loss + config.repa_weight * parts["repa"]
    if tokenizer.halting is not None:
        parts["halting"] = taught(tokenizer, registers, values, keep, signal, judged.estimate, generator)
        loss = loss + config.halting_weight * parts["halting"]
    return {"loss": loss} | parts


def draw_keep(config: TokenizerConfig, batch: int, generator: torch.Generator | None) -> Tensor:
    """(B,) lengths. With padding, a sequence that keeps all K keeps some of the padding, any number as likely."""
    keep = nested.sample_keep(config.sampler, config.tokens, batch, generator)
    if not config.padding:
        return keep
    extra = torch.randint(0, config.padding + 1, (batch,), generator=generator)
    return torch.where(keep == config.tokens, keep + extra, keep)


def aligned(tokenizer: FlexTok, patches: Tensor, features: Tensor, keep: Tensor) -> Tensor:
    """REPA's loss, with ReTok's weights where there is a hierarchy: 1 for one token, down to 1 - hierarchy for K."""
    config = tokenizer.config
    if tokenizer.alignment is None:
        raise VtokError("features were given to a tokenizer without a REPA head; build it with repa=their channels")
    if features.ndim != 4 or features.shape[:2] != (len(patches), config.repa):
        raise VtokError(
            f"features of shape {tuple(features.shape)} do not fit; give ({len(patches)}, {config.repa}, rows, columns)"
        )
    behind = (keep.clamp_max(config.tokens) - 1) / max(1, config.tokens - 1)
    weight = (1 - config.hierarchy * behind).to(patches.device)
    return (weight * tokenizer.alignment(patches, features.to(patches.device))).mean()


def taught(
    tokenizer: FlexTok,
    registers: Tensor,
    values: Tensor,
    keep: Tensor,
    signal: Tensor,
    estimate: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """The halting head's loss on the error that these prefixes were measured to have; only the head learns from it."""
    assert tokenizer.halting is not None
    count = tokenizer.config.tokens
    with torch.no_grad():
        if tokenizer.config.decoder == "flow":  # at a random time much of the signal shows through the noise
            noise = tokenizer.noise(1, generator).expand_as(signal)
            estimate = tokenizer.decoder.estimate(values, keep, noise)
        error = (tokenizer.to_images(estimate) - tokenizer.to_images(signal)).abs().flatten(1).mean(1)
    asked = halting.ask(error, generator)
    logits = tokenizer.halting(registers[:, :count].detach(), asked)
    return halting.halting_loss(logits, keep.clamp_max(count), error, asked.to(error.device))
