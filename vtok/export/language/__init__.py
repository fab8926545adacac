"""Language models as graphs."""

from vtok.export.language.decoder import Decoder, EmbedTokens

__all__ = ["Decoder", "EmbedTokens"]
