"""What a tokenizer is made of: one frozen, JSON-writable record, and presets of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtok.errors import VtokError

QUANTISERS = ("fsq", "vq", "binary", "kl", "none")
DECODERS = ("regress", "flow")
SAMPLERS = ("uniform", "pow2", "uniform_pow2", "mix", "none")
SCHEMES = ("quadtree", "haar")
PREDICTS = ("signal", "velocity")

#: fields that only the decoder and its training read; all others decide which tokens a picture has
DECODING = {
    *("decoder", "decoder_width", "decoder_depth", "sampler", "null_rate", "guidance", "predicts", "time_scale"),
    *("time_shift", "repa", "repa_block", "repa_weight", "hierarchy", "halting", "halting_weight"),
    "quantiser_weight",
}

#: quantiser -> weight of its loss: TiTok's, TiTok-VAE's; Instella-T2I's is unknown
_WEIGHTS = {"vq": 0.25, "kl": 1e-6, "binary": 0.1}


@dataclass(frozen=True)
class TokenizerConfig:
    """Shapes and options of a ``FlexTok``.

    Args:
        image_size: pixels a side; pictures are square.
        patch: side of a patch of the *signal*: pixels, or latents of a VAE.
        channels: of the signal; 3 for pixels.
        latents: the signal is the latent of a VAE, which is handed to the tokenizer and not part of its weights.
        vae_factor: pixels a latent, a side.
        vae_scale: latents are multiplied by this.
        tokens: K, registers of a picture.
        width: of the encoder; a multiple of ``head_dim``.
        depth: of the encoder, in blocks.
        decoder_width: of the decoder.
        decoder_depth: of the decoder.
        head_dim: width of an attention head.
        ordered: causal registers, of which any prefix decodes (FlexTok). ``False``: registers see each other and all
            K are needed (TiTok, arXiv 2406.07550).
        anchors: registers start as averages over nested boxes of the picture, with matching positions. Training leaves
            its first plateau much sooner, but first tokens become averages instead of meanings.
        scheme: order of those boxes, ``"quadtree"`` or ``"haar"``.
        quantiser: ``"fsq"``, ``"vq"``, ``"binary"``, ``"kl"`` or ``"none"``.
        levels: of FSQ, one number a channel; their product is the number of codes.
        codebook: number of codes of VQ.
        code_dim: numbers a token of VQ, KL and none.
        bits: a token of binary.
        quantiser_weight: of the quantiser's own loss; by default 0.25 for VQ's commitment, 0.1 for bits that are not
            yet certain, 1e-6 for KL.
        decoder: ``"flow"`` (rectified flow, sharp at few tokens, one pass a step) or ``"regress"`` (one pass).
        sampler: how many tokens a training step keeps: ``"uniform"``, ``"pow2"``, ``"uniform_pow2"``, ``"mix"``
            (half of a batch pow2, half K) or ``"none"`` (always K).
        null_rate: share of samples trained without any token, for guidance (flow decoder).
        guidance: of the flow decoder where ``decode`` is given none; 1 is none at all.
        predicts: what a flow decoder's network gives: ``"velocity"`` (FlexTok), or ``"signal"``, from which the
            velocity follows (arXiv 2511.13720). A velocity holds all of the noise, so its network must be wider than a
            patch has numbers; a signal needs no more than the picture.
        time_scale: what times in [0, 1] are multiplied by before they become waves (flow decoder).
        time_shift: mean of the logit of the times that a flow decoder is trained at: 0 in FlexTok; more of them are
            near pure noise above it, where a signal has to be guessed from tokens alone (0.8 in arXiv 2511.13720).
        repa: channels of the features that the decoder's patches are aligned to (REPA, arXiv 2410.06940); 0: no head.
        repa_block: decoder block (from 0) behind which they are read.
        repa_weight: of that loss.
        hierarchy: in [0, 1], how much less a long prefix is aligned than a short one (ReTok's hierarchical semantic
            regularisation, arXiv 2601.01535).
        padding: registers appended behind the last one in training (ReTok's redundant token padding).
        halting: a head that says after how many tokens a wanted error is reached (KARL, arXiv 2507.07995).
        halting_weight: of its loss.

    Raises:
        VtokError: a value that does not fit.
    """

    image_size: int = 64
    patch: int = 8
    channels: int = 3
    latents: bool = False
    vae_factor: int = 8
    vae_scale: float = 1.0
    tokens: int = 32
    width: int = 128
    depth: int = 4
    decoder_width: int = 128
    decoder_depth: int = 4
    head_dim: int = 64
    ordered: bool = True
    anchors: bool = True
    scheme: str = "quadtree"
    quantiser: str = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    codebook: int = 4096
    code_dim: int = 12
    bits: int = 16
    quantiser_weight: float | None = None
    decoder: str = "regress"
    sampler: str = "uniform_pow2"
    null_rate: float = 0.1
    guidance: float = 1.0
    predicts: str = "signal"
    time_scale: float = 1000.0
    time_shift: float = 0.8
    repa: int = 0
    repa_block: int = 1
    repa_weight: float = 1.0
    hierarchy: float = 0.0
    padding: int = 0
    halting: bool = False
    halting_weight: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        for name in ("image_size", "patch", "channels", "tokens", "width", "depth", "decoder_width", "decoder_depth"):
            _whole(name, getattr(self, name), 1)
        for name in ("vae_factor", "head_dim", "codebook", "code_dim", "bits"):
            _whole(name, getattr(self, name), 1)
        for name in ("repa", "repa_block", "padding"):
            _whole(name, getattr(self, name), 0)
        for name, known in (
            ("quantiser", QUANTISERS),
            ("decoder", DECODERS),
            ("sampler", SAMPLERS),
            ("scheme", SCHEMES),
            ("predicts", PREDICTS),
        ):
            if getattr(self, name) not in known:
                raise VtokError(f"there is no {name} {getattr(self, name)!r}; known are {', '.join(known)}")
        for name in ("width", "decoder_width"):
            if getattr(self, name) % self.head_dim or getattr(self, name) % 4:
                raise VtokError(
                    f"{name}={getattr(self, name)} must be a multiple of head_dim={self.head_dim} and of 4; change one"
                )
        if self.latents and self.image_size % self.vae_factor:
            raise VtokError(
                f"image_size={self.image_size} is no multiple of vae_factor={self.vae_factor}; change one of them"
            )
        if self.signal_size % self.patch:
            raise VtokError(f"patches of {self.patch} do not tile a side of {self.signal_size}; change one of them")
        if not self.levels or any(isinstance(n, bool) or not isinstance(n, int) or n < 3 for n in self.levels):
            raise VtokError(f"levels={self.levels} must be whole numbers from 3 on, one a channel")
        if self.bits > 62:
            raise VtokError(f"bits={self.bits} do not fit a 64-bit token; give at most 62")
        for name, high in (("null_rate", 1.0), ("hierarchy", 1.0)):
            if not 0.0 <= getattr(self, name) <= high:
                raise VtokError(f"{name}={getattr(self, name)} must lie between 0 and {high:g}")
        if self.quantiser_weight is None:
            object.__setattr__(self, "quantiser_weight", _WEIGHTS.get(self.quantiser, 0.0))
        for name in ("quantiser_weight", "repa_weight", "halting_weight"):
            if not getattr(self, name) >= 0.0:
                raise VtokError(f"{name}={getattr(self, name)} must be 0 or more")
        if not self.ordered and (self.sampler != "none" or self.padding or self.anchors or self.halting):
            raise VtokError(
                "unordered registers are all needed and stand for no place: set sampler='none', anchors=False, "
                "padding=0 and halting=False with ordered=False"
            )
        if self.hierarchy and not self.repa:
            raise VtokError("hierarchy weighs the alignment to features; give repa, their number of channels, with it")
        if self.repa and self.repa_block >= self.decoder_depth:
            raise VtokError(
                f"repa_block={self.repa_block} is behind the last of {self.decoder_depth} decoder blocks; lower it"
            )

    @property
    def signal_size(self) -> int:
        """Pixels, or latents, a side."""
        return self.image_size // self.vae_factor if self.latents else self.image_size

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.signal_size // self.patch

    def deciding(self) -> dict[str, Any]:
        """Fields that decide which tokens a picture has, where they are not the defaults."""
        fields = dataclasses.fields(self)
        own = {field.name: getattr(self, field.name) for field in fields if field.name not in DECODING}
        return {field.name: own[field.name] for field in fields if own.get(field.name, field.default) != field.default}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TokenizerConfig:
        """The config of ``to_json``.

        Raises:
            VtokError: no JSON object, or a field that this version does not know.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise VtokError(f"the tokenizer's config is no JSON ({error}); write it with save_pretrained") from error
        return cls.of(fields)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TokenizerConfig:
        """From a mapping of fields, with defaults for those it lacks."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or not set(fields) <= known:
            odd = ", ".join(sorted(set(fields) - known)) if isinstance(fields, Mapping) else repr(fields)
            raise VtokError(f"a tokenizer has no option {odd}; options are {', '.join(sorted(known))}")
        return cls(**fields)


_FLEXTOK: dict[str, Any] = {
    "image_size": 256,
    "patch": 2,
    "channels": 16,
    "latents": True,
    "tokens": 256,
    "anchors": False,
    "decoder": "flow",
    "predicts": "velocity",
    "time_shift": 0.0,
    "sampler": "uniform",
    "guidance": 7.5,
}

#: name -> fields. The last three have the shapes of the published FlexTok models (width 64 a block).
PRESETS: dict[str, dict[str, Any]] = {
    "test": {"image_size": 32, "tokens": 8, "width": 64, "depth": 2, "decoder_width": 64, "decoder_depth": 2}
    | {"head_dim": 32},
    "nano": {},
    "tiny": {"width": 192, "decoder_width": 192},
    "small": {"tokens": 64, "width": 256, "depth": 6, "decoder_width": 256, "decoder_depth": 6},
    "base": _FLEXTOK
    | {"width": 768, "depth": 12, "decoder_width": 768, "decoder_depth": 12}
    | {"anchors": True, "sampler": "uniform_pow2"},
    "d12-d12": _FLEXTOK | {"width": 768, "depth": 12, "decoder_width": 768, "decoder_depth": 12},
    "d18-d18": _FLEXTOK | {"width": 1152, "depth": 18, "decoder_width": 1152, "decoder_depth": 18},
    "d18-d28": _FLEXTOK | {"width": 1152, "depth": 18, "decoder_width": 1792, "decoder_depth": 28},
}


def preset(name: str, **changes: Any) -> TokenizerConfig:
    """The config of a preset, with some fields changed.

    Raises:
        VtokError: unknown preset or field, or a value that does not fit.
    """
    if name not in PRESETS:
        raise VtokError(f"there is no tokenizer preset {name!r}; known are {', '.join(PRESETS)}")
    return TokenizerConfig.of(PRESETS[name] | changes)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise VtokError(f"{name}={value!r} must be a whole number from {least} on")
