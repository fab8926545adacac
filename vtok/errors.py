"""The one exception type of vtok: a sentence that says what is wrong, why, and what to do."""

from __future__ import annotations


class VtokError(ValueError):
    """Raised for anything a user can mend: budgets, unknown names, pairs that do not fit, unknown layouts."""
