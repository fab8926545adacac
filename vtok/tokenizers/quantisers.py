"""Quantisers of tokens behind one interface: FSQ, VQ, binary, KL, none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.tokenizers.config import TokenizerConfig


class Quantised(NamedTuple):
    """What the decoder is trained on.

    Attributes:
        values: (B, K, dim) what the decoder reads, with gradients to z.
        losses: name -> scalar, to be added to the training loss.
    """

    values: Tensor
    losses: dict[str, Tensor]


class Quantiser(nn.Module, ABC):
    """Turns z (B, K, inputs) into tokens.

    Attributes:
        inputs: channels of z.
        dim: channels of what the decoder reads.
        codes: codes a token, ``None`` where tokens are continuous.
    """

    inputs: int
    dim: int
    codes: int | None = None

    @abstractmethod
    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        """Quantise; in training mode with losses, and with what is random drawn from ``generator`` (on the CPU)."""

    def tokens(self, z: Tensor) -> Tensor:
        """(B, K) long, or (B, K, dim) where tokens are continuous; nothing is random, whatever the mode."""
        return z

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, k, dim) values of tokens (B, k) long, or (B, k, dim) where they are continuous."""
        return tokens


class FSQ(Quantiser):
    """Finite scalar quantisation (arXiv 2309.15505): each channel bounded by a tanh and rounded to its levels.

    Args:
        levels: a number for each channel.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        with torch.device("cpu"):  # its tables are small numbers that are read while it is made
            self.core = _library().FSQ(list(levels))
        self.inputs = self.dim = len(levels)
        self.codes = int(self.core.codebook_size)

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        with torch.autocast(z.device.type, enabled=False):
            return Quantised(self.core(z.float())[0], {})

    def tokens(self, z: Tensor) -> Tensor:
        return self.core(z.float())[1].long()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.core.indices_to_codes(tokens)


class VQ(Quantiser):
    """Vector quantisation as in TiTok (arXiv 2406.07550): unit vectors, a moving-average codebook, a commitment loss.

    Args:
        codebook: number of codes.
        dim: channels of a code.
    """

    def __init__(self, codebook: int, dim: int) -> None:
        super().__init__()
        self.core = _library().VectorQuantize(
            dim, codebook, use_cosine_sim=True, commitment_weight=1.0, decay=0.99, threshold_ema_dead_code=2
        )
        self.inputs, self.dim, self.codes = dim, dim, codebook

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        with torch.autocast(z.device.type, enabled=False):
            values, _, commitment = self.core(z.float(), freeze_codebook=not self.training)
        return Quantised(values, {"commitment": commitment.sum()} if self.training else {})

    def tokens(self, z: Tensor) -> Tensor:
        return (z.float() @ self.core.codebook.T).argmax(-1)  # codes are unit vectors, so the length of z is no matter

    def embed(self, tokens: Tensor) -> Tensor:
        return self.core.get_output_from_indices(tokens)


class Binary(Quantiser):
    """Bits (Instella-T2I, arXiv 2506.21022): sampled from a sigmoid in training, thresholded otherwise.

    Values are -1 and 1; the bits of a token stand in its number, lowest first. The loss p (1 - p) pushes each bit to
    certainty.

    Args:
        bits: a token.
    """

    powers: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.inputs = self.dim = bits
        self.codes = 2**bits
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        p = z.float().sigmoid()
        cut = torch.rand(p.shape, generator=generator).to(p) if self.training else 0.5
        bits = p > cut
        hard = 2.0 * bits - 1
        values = hard + 2 * (p - p.detach())  # the gradient of 2 p - 1
        return Quantised(values, {"bits": (p * (1 - p)).mean()} if self.training else {})

    def tokens(self, z: Tensor) -> Tensor:
        return ((z > 0) * self.powers).sum(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        return 2.0 * ((tokens[..., None] & self.powers) > 0) - 1


class KL(Quantiser):
    """A Gaussian a channel (TiTok-VAE): sampled in training, its mean otherwise.

    Args:
        dim: channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inputs, self.dim = 2 * dim, dim

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        mean, log_variance = z.float().chunk(2, -1)
        log_variance = log_variance.clamp(-30.0, 20.0)
        if not self.training:
            return Quantised(mean, {})
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return Quantised(mean + noise * (0.5 * log_variance).exp(), {"kl": kl})

    def tokens(self, z: Tensor) -> Tensor:
        return z.float().chunk(2, -1)[0]


class Continuous(Quantiser):
    """Tokens as they are.

    Args:
        dim: channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inputs, self.dim = dim, dim

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        return Quantised(z, {})


def build(config: TokenizerConfig) -> Quantiser:
    """The quantiser that a config names.

    Raises:
        VtokError: FSQ or VQ without the package that computes them.
    """
    if config.quantiser == "fsq":
        return FSQ(config.levels)
    if config.quantiser == "vq":
        return VQ(config.codebook, config.code_dim)
    if config.quantiser == "binary":
        return Binary(config.bits)
    return (KL if config.quantiser == "kl" else Continuous)(config.code_dim)


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise VtokError(
            "quantisers fsq and vq need the package vector-quantize-pytorch; pip install vtok[tokenizers], or choose "
            "quantiser='binary', 'kl' or 'none'"
        ) from error
    return vector_quantize_pytorch
