"""Tokenizers are tested with gradients on, as they are trained."""

import pytest


@pytest.fixture(autouse=True)
def _no_grad():
    """Replaces the fixture of the whole suite that turns gradients off."""
