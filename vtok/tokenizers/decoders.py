"""Decoders: [patches | registers] in one transformer with full attention; one pass, or a rectified flow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.tokenizers import anchors, flow
from vtok.tokenizers.blocks import Block, Norm, grid_points, initialise, modulated, sincos2d
from vtok.tokenizers.config import TokenizerConfig
from vtok.tokenizers.encoder import patchify, slot_boxes, unpatchify
from vtok.tokenizers.nested import NestedDropout

#: times below it count as it where a velocity is made of a signal, which divides by the time (arXiv 2511.13720)
EARLIEST = 0.05


class Judged(NamedTuple):
    """A training pass of a decoder.

    Attributes:
        loss: scalar.
        estimate: (B, C, S, S) the signal as this pass has it.
        features: (B, grid * grid, width) patches behind block ``repa_block``.
    """

    loss: Tensor
    estimate: Tensor
    features: Tensor


class Decoder(nn.Module, ABC):
    """What both decoders share: how tokens become registers, and the transformer.

    Tokens are projected, given positions, and only then dropped (FlexTok section 3.2), so a dropped one carries
    nothing, its place neither.
    """

    kinds = 0
    positions: Tensor
    places: Tensor
    kind: Tensor

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        width, slots = config.decoder_width, config.tokens + config.padding
        self.read = nn.Linear(dim, width)
        self.register_positions = nn.Parameter(torch.empty(slots, width))
        self.dropout = NestedDropout(width)
        self.blocks = nn.ModuleList(
            Block(width, config.head_dim, kinds=self.kinds) for _ in range(config.decoder_depth)
        )
        self.norm = Norm(width)
        self.write = nn.Linear(width, config.channels * config.patch**2)
        self.register_buffer("positions", sincos2d(grid_points(config.grid, config.grid), width))
        if config.anchors:
            places = sincos2d(anchors.centres(slot_boxes(config)) * config.grid - 0.5, width)
            self.register_buffer("places", places, persistent=False)
        kind = torch.arange(config.grid**2 + slots) >= config.grid**2
        self.register_buffer("kind", kind.long(), persistent=False)

    def start(self) -> None:
        """Initial weights."""
        initialise(self)
        nn.init.trunc_normal_(self.register_positions, std=0.02)
        with torch.no_grad():
            self.register_positions[self.config.tokens :] = self.register_positions[self.config.tokens - 1]

    def registers(self, values: Tensor, keep: Tensor) -> Tensor:
        """(B, slots, width) from values (B, k, dim), of which the first keep (B,) count."""
        x = self.read(values.to(self.read.weight.dtype))
        x = F.pad(x, (0, 0, 0, len(self.register_positions) - x.shape[1])) + self.register_positions
        if self.config.anchors:
            x = x + self.places
        return self.dropout(x, keep)

    def run(self, patches: Tensor, registers: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patches (B, N, width) behind the last block and behind block ``repa_block``."""
        count = patches.shape[1]
        x = torch.cat([patches + self.positions, registers], 1)
        features = x
        for number, block in enumerate(self.blocks):
            x = block(x, condition=condition, kind=self.kind)
            if number == self.config.repa_block:
                features = x
        return x[:, :count], features[:, :count]

    def signal(self, patches: Tensor) -> Tensor:
        """(B, C, S, S) from what ``write`` gave for each patch."""
        return unpatchify(patches, self.config.patch, self.config.grid)

    @abstractmethod
    def judge(self, values: Tensor, keep: Tensor, signal: Tensor, generator: torch.Generator | None) -> Judged:
        """A training pass: values (B, k, dim), of which keep (B,) count, against the signal."""

    @abstractmethod
    def estimate(self, values: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
        """(B, C, S, S) in one pass, what the tokens alone say: for measuring prefixes."""

    @abstractmethod
    def reconstruct(
        self, values: Tensor, keep: Tensor, noise: Tensor, steps: int, guidance: flow.Guidance | None
    ) -> Tensor:
        """(B, C, S, S) signals from values (B, k, dim).

        Args:
            values: what tokens stand for.
            keep: (B,) how many count.
            noise: (B, C, S, S) where a flow starts.
            steps: of a flow.
            guidance: of a flow, or ``None``.
        """


class Regress(Decoder):
    """One pass from a learned query a patch to the signal: the mean of what the tokens allow, blurred at few."""

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.query = nn.Parameter(torch.empty(config.decoder_width))
        self.start()
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Signal (B, C, S, S) and features of the patches."""
        patches = self.query.expand(len(values), self.config.grid**2, -1)
        x, features = self.run(patches, self.registers(values, keep))
        return self.signal(self.write(self.norm(x))), features

    def judge(self, values: Tensor, keep: Tensor, signal: Tensor, generator: torch.Generator | None) -> Judged:
        estimate, features = self(values, keep)
        return Judged((estimate.float() - signal).square().mean(), estimate, features)

    def estimate(self, values: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
        return self(values, keep)[0]

    def reconstruct(
        self, values: Tensor, keep: Tensor, noise: Tensor, steps: int, guidance: flow.Guidance | None
    ) -> Tensor:
        return self(values, keep)[0]


class Flow(Decoder):
    """Velocity of a rectified flow from noised patches, time by adaLN-zero, patches and registers modulated apart."""

    kinds = 2

    def __init__(self, config: TokenizerConfig, dim: int) -> None:
        super().__init__(config, dim)
        width = config.decoder_width
        self.patch = nn.Linear(config.channels * config.patch**2, width)
        self.null = nn.Parameter(torch.empty(width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 2 * width)
        self.start()
        nn.init.trunc_normal_(self.null, std=0.02)
        nn.init.zeros_(self.write.weight)

    def forward(self, x: Tensor, time: Tensor, registers: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (B, C, S, S) and features of the patches, at noised signals x and times (B,)."""
        waves = time_waves(time.to(x.device), self.config.time_scale)
        condition = self.time(waves.to(registers.dtype))
        patches = self.patch(patchify(x.to(self.patch.weight.dtype), self.config.patch))
        y, features = self.run(patches, registers, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        found = self.signal(self.write(modulated(self.norm(y), shift, scale)))
        if self.config.predicts == "signal":
            found = (x - found) / time.to(x).clamp_min(EARLIEST)[:, None, None, None]
        return found, features

    def judge(self, values: Tensor, keep: Tensor, signal: Tensor, generator: torch.Generator | None) -> Judged:
        noise = torch.randn(signal.shape, generator=generator).to(signal)
        time = flow.sample_times(len(signal), generator, self.config.time_shift).to(signal)
        dropped = torch.rand(len(signal), generator=generator) < self.config.null_rate
        registers = self.registers(values, keep)
        registers = torch.where(dropped.to(signal.device)[:, None, None], self.null.to(registers.dtype), registers)
        x = flow.noised(signal, noise, time)
        velocity, features = self(x, time, registers)
        estimate = x - time[:, None, None, None] * velocity
        return Judged(flow.flow_loss(velocity, signal, noise), estimate, features)

    def estimate(self, values: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
        return noise - self(noise, torch.ones(len(noise)), self.registers(values, keep))[0]

    def reconstruct(
        self, values: Tensor, keep: Tensor, noise: Tensor, steps: int, guidance: flow.Guidance | None
    ) -> Tensor:
        registers = self.registers(values, keep)
        guided = guidance is not None and guidance.scale != 1
        guide = flow.Guide(guidance or flow.Guidance())

        def velocity(x: Tensor, time: float) -> Tensor:
            times = torch.full((len(x),), time)
            conditional = self(x, times, registers)[0]
            if not guided:
                return conditional
            return guide(conditional, self(x, times, self.null.expand_as(registers))[0])

        return flow.euler(velocity, noise, steps)


def time_waves(time: Tensor, scale: float = 1000.0, count: int = 256, period: float = 256.0) -> Tensor:
    """(B, count) cosines, then sines, of times (B,) at rates from ``scale`` down to nearly scale / period."""
    rate = scale * torch.exp(-math.log(period) * torch.arange(count // 2, dtype=torch.float32) / (count // 2))
    angle = time.float()[:, None] * rate.to(time.device)
    return torch.cat([angle.cos(), angle.sin()], -1)


class Alignment(nn.Module):
    """REPA (arXiv 2410.06940): decoder patches, through a small perceptron, look like a frozen encoder's features.

    Args:
        width: of the decoder.
        channels: of the features.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        hidden = 4 * width
        layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        self.mlp = nn.Sequential(Norm(width), *layers, nn.Linear(hidden, channels))
        initialise(self)

    def forward(self, patches: Tensor, features: Tensor) -> Tensor:
        """(B,) mean of 1 - cosine.

        Args:
            patches: (B, g * g, width), resized to the grid of the features.
            features: (B, channels, h, w).
        """
        grid = math.isqrt(patches.shape[1])
        x = patches.transpose(1, 2).unflatten(2, (grid, grid)).float()
        x = F.interpolate(x, features.shape[-2:], mode="bilinear", align_corners=False)
        x = self.mlp(x.flatten(2).transpose(1, 2).to(next(self.mlp.parameters()).dtype)).float()
        return 1 - F.cosine_similarity(x, features.flatten(2).transpose(1, 2), dim=-1).mean(1)


def build(config: TokenizerConfig, dim: int) -> Decoder:
    """The decoder that a config names, for values of ``dim`` channels."""
    return (Flow if config.decoder == "flow" else Regress)(config, dim)
