"""``vtok eval``: every method at every budget on the same samples, paired, resumable, with intervals."""

from vtok_eval.harness.command import command
from vtok_eval.harness.run import evaluate

__all__ = ["command", "evaluate"]
