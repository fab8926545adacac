"""Which share of the samples this process takes: ``accelerate launch`` says how many there are."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch

from vtok.errors import VtokError

WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are."""


@dataclass(frozen=True)
class Ranks:
    """One of ``world`` processes.

    Attributes
    ----------
    rank, world : int
        Number of this process, and how many there are.
    state : accelerate.PartialState, optional
        The group, where there is one.
    """

    rank: int = 0
    world: int = 1
    state: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether batch ``number`` is this process's."""
        return number % self.world == self.rank

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def close(self) -> None:
        """Leave the group."""
        if self.state is not None:
            self.state.destroy_process_group()


def joined(device: str | None = None) -> Ranks:
    """The group that ``accelerate launch`` or ``torchrun`` started, or this process alone.

    Raises
    ------
    VtokError
        There is a group, but accelerate is not installed.
    """
    if not any(int(os.environ.get(name) or 1) > 1 for name in WORLDS):
        return Ranks()
    try:
        from accelerate import PartialState
    except ImportError:
        raise VtokError("several processes need accelerate; install it: pip install accelerate") from None
    patience = datetime.timedelta(days=1)  # until the slowest is through; the default gives up after half an hour
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=patience)
    return Ranks(state.process_index, state.num_processes, state)
