"""``vtok tune``: the method, layer and budget that meet a target on one's own questions, and how sure that is."""

from vtok_eval.tune.command import command
from vtok_eval.tune.run import tune

__all__ = ["command", "tune"]
