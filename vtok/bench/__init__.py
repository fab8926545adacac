"""Paired timings of methods against the plain model and against free random pruning: ``vtok bench``."""

from vtok.bench.contest import Row, Spread, run
from vtok.bench.table import command

__all__ = ["Row", "Spread", "command", "run"]
