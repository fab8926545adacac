"""The operators against their limits and against what users run today: ``vtok bench kernels``."""

from vtok.bench.kernels.case import Bar, Case
from vtok.bench.kernels.run import Row, measure, run

__all__ = ["Bar", "Case", "Row", "measure", "run"]
