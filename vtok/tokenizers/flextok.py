"""FlexTok (arXiv 2502.13967): a picture as an ordered sequence of tokens, any prefix of which is a coarser picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.tokenizers import decoders, halting, objective, quantisers
from vtok.tokenizers.config import TokenizerConfig, preset
from vtok.tokenizers.encoder import Encoder
from vtok.tokenizers.flow import Guidance

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class FlexTok(nn.Module):
    """An image tokenizer: ``encode`` to an ordered sequence, ``decode`` any prefix of it.

    Args:
        config: shapes and options.
        vae: for configs with ``latents``: a module with diffusers' ``encode(images)`` and ``decode(latents)``. It may
            be set later, is no part of the weights, and stays on its device.

    Attributes:
        codes: codes a token, ``None`` where tokens are continuous.
    """

    vae: Any

    def __init__(self, config: TokenizerConfig, *, vae: Any = None) -> None:
        super().__init__()
        self.config = config
        self.vae = vae
        self.quantiser = quantisers.build(config)
        self.encoder = Encoder(config)
        self.to_tokens = nn.Linear(config.width, self.quantiser.inputs)
        # FSQ's tanh starts unsaturated: preset test tells its tokens apart within 250 steps, at a gain of 1 it does not
        nn.init.xavier_uniform_(self.to_tokens.weight, gain=0.3)
        nn.init.zeros_(self.to_tokens.bias)
        self.decoder = decoders.build(config, self.quantiser.dim)
        self.alignment = decoders.Alignment(config.decoder_width, config.repa) if config.repa else None
        self.halting = halting.HaltingHead(config.width) if config.halting else None

    @classmethod
    def preset(cls, name: str, *, vae: Any = None, **changes: Any) -> FlexTok:
        """A preset's tokenizer with random weights, some options changed.

        Raises:
            VtokError: unknown preset or option.
        """
        return cls(preset(name, **changes), vae=vae)

    @property
    def codes(self) -> int | None:
        return self.quantiser.codes

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "vae":  # no submodule: its weights are not the tokenizer's
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        return self.encoder.registers.device

    # signals

    def to_signal(self, images: Tensor) -> Tensor:
        """(B, C, S, S) of images (B, C, H, W) in [0, 1]: pixels in [-1, 1], or the means of a VAE's latents.

        Raises:
            VtokError: another shape or dtype, or no VAE where one is needed.
        """
        size = self.config.image_size
        channels = 3 if self.config.latents else self.config.channels
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2:] != (size, size):
            raise VtokError(
                f"images of shape {tuple(images.shape)} do not fit this tokenizer, which takes "
                f"(batch, {channels}, {size}, {size}); resize or crop them"
            )
        if not images.is_floating_point():
            raise VtokError(f"images of {images.dtype} must be floats in [0, 1]; divide 8-bit pixels by 255")
        pixels = images.to(self.device) * 2 - 1
        if not self.config.latents:
            return pixels
        with torch.no_grad():
            return self._needed_vae().encode(pixels).latent_dist.mode() * self.config.vae_scale

    def to_images(self, signal: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], fp32, of a signal (B, C, S, S)."""
        if self.config.latents:
            with torch.no_grad():
                signal = self._needed_vae().decode(signal / self.config.vae_scale).sample
        return ((signal.float() + 1) / 2).clamp(0, 1)

    def _needed_vae(self) -> Any:
        if self.vae is None:
            raise VtokError(
                "this tokenizer works on a VAE's latents and was given none; pass vae=, a diffusers.AutoencoderKL with "
                f"{self.config.channels} channels, or set tokenizer.vae"
            )
        return self.vae

    # tokens

    def embed(self, images: Tensor, k: int | None = None) -> Tensor:
        """(B, k, d): the first k (default K) tokens of images (B, 3, H, W) in [0, 1], before they are quantised."""
        return self.embed_signal(self.to_signal(images), k)

    def embed_signal(self, signal: Tensor, k: int | None = None) -> Tensor:
        """``embed`` of a signal (B, C, S, S)."""
        return self.to_tokens(self.encoder(signal, self._count(k)))

    @torch.no_grad()
    def encode(self, images: Tensor, k: int | str | None = None, *, quality: float = 0.05) -> Any:
        """Tokens of images (B, 3, H, W) in [0, 1].

        Args:
            images: at the tokenizer's size.
            k: 1..K tokens, all of them where ``None``; ``"auto"``: as many as each picture needs for ``quality``.
            quality: with ``k="auto"``, the mean absolute error of pixels in [0, 1] that is asked for.

        Returns:
            (B, k) long, or (B, k, d) float where the quantiser is continuous; with ``"auto"`` a list of B such, each
            of its own length and without the batch axis.

        Raises:
            VtokError: a k that cannot be, images of another shape, ``"auto"`` without a halting head.
        """
        return self.encode_signal(self.to_signal(images), k, quality=quality)

    @torch.no_grad()
    def encode_signal(self, signal: Tensor, k: int | str | None = None, *, quality: float = 0.05) -> Any:
        """``encode`` of a signal (B, C, S, S)."""
        if k != "auto":
            return self.quantiser.tokens(self.to_tokens(self.encoder(signal, self._count(k))))
        if self.halting is None:
            raise VtokError("k='auto' needs a halting head; train a tokenizer with halting=True, or give k")
        asked = halting.wanted(quality, len(signal))
        registers = self.encoder(signal, self.config.tokens)
        keep = halting.halt(self.halting(registers, asked)).tolist()
        tokens = self.quantiser.tokens(self.to_tokens(registers))
        return [sequence[:count] for sequence, count in zip(tokens, keep, strict=True)]

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor | Sequence[Tensor],
        *,
        steps: int = 20,
        guidance: float | Guidance | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of tokens.

        Args:
            tokens: (B, k), or (B, k, d) where they are continuous, with any k in 1..K; or a list of sequences of
                different lengths without the batch axis.
            steps: of a flow decoder.
            guidance: of a flow decoder; a number is the scale of adaptive projected guidance. The config's by default.
            seed: of the noise that a flow starts from, the same for every image, so the place in a batch does not
                matter.

        Raises:
            VtokError: tokens of another shape, kind or range.
        """
        return self.to_images(self.decode_signal(tokens, steps=steps, guidance=guidance, seed=seed))

    @torch.no_grad()
    def decode_signal(
        self,
        tokens: Tensor | Sequence[Tensor],
        *,
        steps: int = 20,
        guidance: float | Guidance | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """``decode`` to a signal (B, C, S, S), from the given noise (B, C, S, S) if there is one."""
        values, keep = self._values(tokens)
        if noise is None:
            noise = self.noise(1, torch.Generator().manual_seed(seed)).expand(len(values), -1, -1, -1)
        if guidance is None:
            guidance = self.config.guidance
        if not isinstance(guidance, Guidance):
            guidance = Guidance(float(guidance))
        return self.decoder.reconstruct(values, keep, noise, steps, guidance)

    def _values(self, tokens: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What tokens stand for (B, k, dim), and how many of each sample count (B,)."""
        if isinstance(tokens, Tensor):
            rows, keep = tokens, torch.full((len(tokens),), tokens.shape[1] if tokens.ndim > 1 else 0)
        else:
            if not tokens or any(not isinstance(row, Tensor) for row in tokens):
                raise VtokError("tokens must be a tensor (batch, k) or a list of tensors (k,), one a picture")
            keep = torch.tensor([len(row) for row in tokens])
            rows = nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
        shape = "(batch, k)" if self.codes else f"(batch, k, {self.quantiser.dim})"
        if rows.ndim != (2 if self.codes else 3) or (not self.codes and rows.shape[-1] != self.quantiser.dim):
            raise VtokError(f"tokens of shape {tuple(rows.shape)} do not fit this tokenizer, which takes {shape}")
        for count in sorted(set(keep.tolist())):
            self._count(count)
        rows = rows.to(self.device)
        if self.codes:
            if rows.is_floating_point() or rows.dtype == torch.bool:
                raise VtokError(f"tokens of {rows.dtype} must be whole numbers below {self.codes}")
            if bool((rows < 0).any()) or bool((rows >= self.codes).any()):
                raise VtokError(
                    f"tokens from {int(rows.min())} to {int(rows.max())} are not this tokenizer's, whose run from 0 to "
                    f"{self.codes - 1}; decode with the tokenizer that encoded"
                )
        return self.quantiser.embed(rows), keep

    def _count(self, k: Any) -> int:
        if k is None:
            return self.config.tokens
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.config.tokens:
            raise VtokError(f"k={k!r} must be a whole number from 1 to {self.config.tokens}, this tokenizer's tokens")
        if not self.config.ordered and k != self.config.tokens:
            raise VtokError(
                f"this tokenizer is unordered, so all {self.config.tokens} tokens are needed and k={k} is not "
                "possible; train one with ordered=True"
            )
        return k

    # training

    def losses(
        self, images: Tensor, generator: torch.Generator | None = None, *, features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of a training step on images (B, 3, H, W) in [0, 1]: ``"loss"``, and its parts by name.

        ``"reconstruction"`` is the squared error of the signal (regress) or of the velocity (flow), beside it the
        quantiser's own, ``"repa"`` and ``"halting"`` where they are switched on.

        Args:
            images: at the tokenizer's size.
            generator: on the CPU; draws lengths, noise and times.
            features: (B, repa, h, w) of a frozen encoder, for the REPA head.

        Raises:
            VtokError: images of another shape, features without a head or of another shape.
        """
        return objective.losses(self, images, generator, features)

    def noise(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """(batch, C, S, S) normal noise, drawn on the CPU."""
        size = self.config.signal_size
        return torch.randn(batch, self.config.channels, size, size, generator=generator).to(self.device)

    # files

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json`` to a folder, made where missing; a VAE is not written.

        Raises:
            VtokError: the folder's name is a file's.
        """
        folder = Path(folder)
        if folder.is_file():
            raise VtokError(f"{folder} is a file; save_pretrained needs the name of a folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(self.config.to_json())
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, vae: Any = None) -> FlexTok:
        """The tokenizer of ``save_pretrained``, in eval mode.

        Raises:
            VtokError: no such folder, files missing, or weights of another config.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise VtokError(f"{folder} has no {name}; give a folder that save_pretrained or a training wrote")
        tokenizer = cls(TokenizerConfig.from_json((folder / CONFIG).read_text()), vae=vae)
        load_weights(tokenizer, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
        return tokenizer.eval()


def load_weights(tokenizer: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        VtokError: keys or shapes that do not fit.
    """
    own = {key: value.shape for key, value in tokenizer.state_dict().items()}
    odd = sorted(own.keys() ^ weights.keys()) or [key for key in own if own[key] != weights[key].shape]
    if odd:
        raise VtokError(f"{source} does not fit its config: {odd[0]} differs, as do {len(odd) - 1} others")
    tokenizer.load_state_dict(weights)
