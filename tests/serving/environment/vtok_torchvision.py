"""For the test environment of vLLM alone: lets torchvision be imported beside a torch that its C++ part does not load
with. Its image functions are plain Python; only the names of two operators, which nothing here calls, must be known.

``make test-vllm`` copies this file and the ``.pth`` beside it into the environment.
"""

import sys

DEFINED = []


class BeforeTorchvision:
    """Defines the operators when torchvision is about to be imported, and not before: importing torch takes seconds."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            DEFINED.append(library)  # the operators live as long as this does


sys.meta_path.insert(0, BeforeTorchvision())
