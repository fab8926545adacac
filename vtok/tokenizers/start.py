"""Another decoder for the tokens of a trained tokenizer: its encoder stays, the decoder starts from what it knows."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import cast

import torch
from torch import nn

from vtok.errors import VtokError
from vtok.tokenizers.config import DECODING, TokenizerConfig
from vtok.tokenizers.decoders import Decoder, Flow, Regress
from vtok.tokenizers.flextok import FlexTok


def check(config: TokenizerConfig, trained: TokenizerConfig) -> None:
    """Raise unless both configs give pictures the same tokens.

    Raises:
        VtokError: a field that decides on tokens differs.
    """
    other = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in DECODING and getattr(config, field.name) != getattr(trained, field.name)
    ]
    if other:
        name = other[0]
        raise VtokError(
            f"a tokenizer that starts from a trained one has its tokens: {name} is {getattr(config, name)} here and "
            f"{getattr(trained, name)} there; change fields of the decoder only"
        )


def weights_digest(tokenizer: FlexTok) -> str:
    """Eight hex digits of the weights, so that a run knows what it began from."""
    digest = hashlib.sha256()
    for value in tokenizer.state_dict().values():
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def begin(tokenizer: FlexTok, trained: FlexTok) -> list[nn.Module]:
    """Give ``tokenizer`` the encoder and quantiser of ``trained``, and its decoder as a start where the shapes allow.

    A flow decoder that predicts the signal starts as the regression decoder, whatever the noise and the time: what is
    best where all is noise. It has only to learn what noised patches add.

    Args:
        tokenizer: new, of a config that ``check`` accepts.
        trained: another decoder's.

    Returns:
        The modules that are left to train; those that decide on tokens are in eval mode.
    """
    kept = ("encoder", "to_tokens", "quantiser")
    for name in kept:
        own = getattr(tokenizer, name)
        own.load_state_dict(getattr(trained, name).state_dict())
        own.eval()
    _start(tokenizer.decoder, trained.decoder)
    return [part for name, part in tokenizer.named_children() if name not in kept]


def _start(decoder: Decoder, trained: Decoder) -> None:
    own, other = decoder.config, trained.config
    if (own.decoder_width, own.decoder_depth) != (other.decoder_width, other.decoder_depth):
        return
    if type(decoder) is type(trained):
        decoder.load_state_dict(trained.state_dict())
    elif isinstance(decoder, Flow) and isinstance(trained, Regress) and own.predicts == "signal":
        _as_regression(decoder, trained)


@torch.no_grad()
def _as_regression(flow: Flow, regress: Regress) -> None:
    """Make a flow's network give what a regression decoder gives."""
    shared = {key: value for key, value in regress.state_dict().items() if key != "query"}
    flow.load_state_dict(shared, strict=False)
    nn.init.zeros_(flow.patch.weight)  # noised patches begin unseen
    flow.patch.bias.copy_(regress.query)
    for block in flow.blocks:
        # adaLN-zero's gates start at 0; the blocks of a regression have none, which is a gate of 1
        gates = cast(nn.Linear, block.modulation).bias.unflatten(0, (flow.kinds, 6, -1))
        gates[:, :2] = 1.0
