"""Image tokenizers: pictures as ordered sequences of tokens, any prefix of which is a coarser picture.

>>> from vtok.tokenizers import FlexTok
>>> tokenizer = FlexTok.preset("nano")
>>> tokens = tokenizer.encode(images)  # (B, 32)  # doctest: +SKIP
>>> pictures = tokenizer.decode(tokens[:, :4])  # doctest: +SKIP
"""

from vtok.tokenizers.bridge import TokenBridge
from vtok.tokenizers.config import PRESETS, TokenizerConfig, preset
from vtok.tokenizers.flextok import FlexTok
from vtok.tokenizers.flow import Guidance
from vtok.tokenizers.hub import from_flextok

__all__ = ["PRESETS", "FlexTok", "Guidance", "TokenBridge", "TokenizerConfig", "from_flextok", "preset"]
