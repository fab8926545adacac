"""The operators as custom operators of torch (`torch.ops.vtok`): one node of a graph each, for compile and export.

While torch.compile or torch.export look on, a public operator becomes such a node, which chooses the implementation
by device when it runs. Under ``use("reference")`` or VTOK_KERNELS=reference plain torch is traced instead: what a
target without these operators needs, ONNX for example. Called eagerly, operators do not pass through here.

Statistics and choices take no gradient. What moves and merges tokens is differentiable: its derivatives are written
out below. `packed_attention` is traced as plain torch, gradients included.
"""

from .. import attention, compact, greedy, match, merge, packed, select, transition  # noqa: F401 - they come first
from . import matching, merging, moving, statistics  # noqa: F401
