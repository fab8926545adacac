"""Every method on every family: the pairs, the settings they are tested with, and models that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import vtok
from vtok.api import adapter_of
from vtok.engine.plan import shape_of, stages_of
from vtok.method import registry

from .models import FAMILIES, QWEN, build

DEFAULT: dict[str, Any] = {"keep": 0.4}
SETTINGS: dict[str | tuple[str, str], dict[str, Any]] = {
    "random_deep": {"keep": 0.75},  # cuts late: nothing below 4/6 is in reach of six layers
    "fastv": {"keep": 0.5},
    "transprune": {"keep": 0.5},
    # the default decides behind the last of six layers; these thresholds tell some samples from others
    "todre": {"decision": 0.5, "tau": 0.5},
    ("todre", "llava"): {"decision": 0.5, "tau": 0.7},
    ("todre", "llava_next"): {"decision": 0.5, "tau": 0.9},
    ("todre", "llava_onevision"): {"decision": 0.5, "tau": 0.9},
}
"""What a method is tested with where it is not `DEFAULT`, on all families or one: a budget it reaches, and options."""

LAYERS = 6
PAIRS = [(method, family) for family in FAMILIES for method in vtok.methods(family)]
METHODS = list(dict.fromkeys(method for method, _ in PAIRS))
LLAVA = tuple(family for family in FAMILIES if family not in QWEN)


def settings(method: str, family: str = "", **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `vtok.compress` for a method on a family."""
    return {**DEFAULT, **SETTINGS.get((method, family), SETTINGS.get(method, {})), **changes}


def site(method: str) -> str:
    """Where a method acts first."""
    return registry()[method].site


def acts_in_tower(method: str, family: str) -> bool:
    """Whether a method has a stage inside or right behind the vision tower of a family (flextok has on some)."""
    shape = shape_of(adapter_of(SHARED(family)))
    chosen = settings(method, family)
    chosen.pop("keep")
    return any(stage.site == "encoder" for stage in stages_of(vtok.get(method, **chosen), shape))


class Models:
    """`tiny(family, **build_options)`: a model that all tests share; each must leave it as it was."""

    def __init__(self) -> None:
        self.built: dict[tuple, PreTrainedModel] = {}

    def __call__(self, family: str, **options: Any) -> PreTrainedModel:
        key = (family, *sorted(options.items()))
        if key not in self.built:
            self.built[key] = build(family, **{"layers": LAYERS, **options})
        return self.built[key]

    def restore(self) -> None:
        """Plain models for the next test."""
        for model in self.built.values():
            vtok.restore(model)
            model.zero_grad()
            if hasattr(model.model, "rope_deltas"):
                model.model.rope_deltas = None


SHARED = Models()


@pytest.fixture
def tiny() -> Iterator[Callable[..., PreTrainedModel]]:
    """The shared models, plain again after the test."""
    yield SHARED
    SHARED.restore()


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests run without gradients unless marked `grad`."""
    with torch.set_grad_enabled("grad" in request.keywords):
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "grad: the test needs gradients")
    config.addinivalue_line("markers", "slow: the test takes more than 20 seconds")


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def anatomy(model: nn.Module) -> dict[Any, Any]:
    """Everything about a model that compression may touch and restore must put back, except the values of tensors.

    Take it after a first forward: transformers installs hooks of its own then, and leaves them.
    """
    found: dict[Any, Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        own = {key: id(value) for key, value in module.__dict__.items() if key not in (*HOOKS, "rope_deltas")}
        found[name, "attributes"] = own
        for kind in HOOKS:
            found[name, kind] = {key: id(value) for key, value in getattr(module, kind).items()}
    found["state_dict"] = list(model.state_dict())
    return found
