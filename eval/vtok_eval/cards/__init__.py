"""``vtok card``: cards of accelerated models, from what ``vtok export`` and ``vtok eval`` wrote and nothing else."""

from vtok_eval.cards.command import command
from vtok_eval.cards.facts import Facts, read
from vtok_eval.cards.proof import unproven
from vtok_eval.cards.text import render

__all__ = ["Facts", "command", "read", "render", "unproven"]
