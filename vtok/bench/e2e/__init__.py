"""Whole models at the published geometries, methods against random pruning, within ten minutes: ``vtok bench e2e``."""

from vtok.bench.e2e.plan import Cell, cells
from vtok.bench.e2e.run import Outcome, run

__all__ = ["Cell", "Outcome", "cells", "run"]
