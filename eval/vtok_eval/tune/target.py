"""What a user wants: ``retention>=0.98 and speedup>=1.5``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vtok.errors import VtokError

QUALITIES, COSTS = ("retention", "accuracy"), ("speedup", "tokens", "macs")
SIGNS = {"retention": ">=", "accuracy": ">=", "speedup": ">=", "tokens": "<=", "macs": "<="}
HIGHEST = {"retention": 2.0, "accuracy": 1.0, "macs": 1.0}
TOLERANCE = 1e-6
"""Of a comparison: the bootstrap counts in single precision."""
ROUNDING = 0.01
"""Share by which counted tokens and MACs may pass a limit: whole tokens, and pictures of other sizes."""

_GOAL = re.compile(r"([a-z_]+)\s*(>=|<=|=>|=<|==|=|>|<)\s*([0-9.]+(?:e-?[0-9]+)?)\s*(%|x)?", re.IGNORECASE)
_EXAMPLE = 'such as "retention>=0.98", "speedup>=2" or "retention>=0.97 and tokens<=64"'


@dataclass(frozen=True)
class Goal:
    """One condition.

    Attributes
    ----------
    name : str
        ``"retention"`` (share of the plain model's accuracy), ``"accuracy"``, ``"speedup"`` (of the prefill),
        ``"tokens"`` (visual tokens per image averaged over the decoder layers) or ``"macs"`` (of the decoder's prefill
        on visual tokens, relative to the plain model).
    value : float
        The least, or for ``tokens`` and ``macs`` the most.
    """

    name: str
    value: float

    def holds(self, value: float | None) -> bool:
        """Whether a measured value meets it."""
        if value is None or not math.isfinite(value):
            return False
        if SIGNS[self.name] == ">=":
            return value >= self.value - TOLERANCE
        return value <= self.value * (1 + ROUNDING)

    def __str__(self) -> str:
        return f"{self.name}{SIGNS[self.name]}{self.value:g}"


@dataclass(frozen=True)
class Target:
    """Conditions that must hold together."""

    goals: tuple[Goal, ...]

    @property
    def qualities(self) -> tuple[Goal, ...]:
        """Those on answers."""
        return tuple(goal for goal in self.goals if goal.name in QUALITIES)

    @property
    def costs(self) -> tuple[Goal, ...]:
        """Those on tokens and time."""
        return tuple(goal for goal in self.goals if goal.name in COSTS)

    @property
    def timed(self) -> bool:
        """Whether it needs a clock."""
        return any(goal.name == "speedup" for goal in self.goals)

    def missed(self, values: Mapping[str, float | None]) -> list[Goal]:
        """Conditions that the values, by name, do not meet."""
        return [goal for goal in self.goals if not goal.holds(values.get(goal.name))]

    def __str__(self) -> str:
        return " and ".join(map(str, self.goals))


def parse(text: str) -> Target:
    """A target from its text: conditions with commas or "and" between.

    Raises
    ------
    VtokError
        A condition that is none, an unknown name, a limit in the wrong direction or out of range, or a name twice.
    """
    parts = [part.strip() for part in re.split(r",|\band\b|&+", text, flags=re.IGNORECASE) if part.strip()]
    if not parts:
        raise VtokError(f"--target is empty; give a condition, {_EXAMPLE}")
    goals = tuple(_goal(part) for part in parts)
    names = [goal.name for goal in goals]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise VtokError(f"--target names {twice} twice; give each condition once")
    return Target(goals)


def _goal(text: str) -> Goal:
    found = _GOAL.fullmatch(text)
    if not found:
        raise VtokError(f"--target {text!r} is no condition; write a name, >= or <=, and a number, {_EXAMPLE}")
    name, sign, digits, unit = found[1].lower(), found[2], found[3], (found[4] or "").lower()
    if name not in SIGNS:
        raise VtokError(f"--target knows no {name!r}; take {', '.join(SIGNS)}, {_EXAMPLE}")
    wanted = SIGNS[name]
    if sign not in (wanted, wanted[::-1], wanted[0]):
        raise VtokError(f"--target {text!r} limits {name} from the wrong side; write {name}{wanted}{digits}{unit}")
    try:
        value = float(digits)
    except ValueError:
        raise VtokError(f"--target {text!r}: {digits} is no number; {_EXAMPLE}") from None
    if (unit == "x" and name != "speedup") or (unit == "%" and name not in HIGHEST):
        raise VtokError(f"--target {text!r}: {name} is not given in {unit!r}; write {name}{wanted}{digits}")
    value = value / 100 if unit == "%" else value
    most = HIGHEST.get(name, math.inf)
    if not 0 < value <= most:
        span = f"above 0 and at most {most:g}" if math.isfinite(most) else "above 0"
        hint = "; for per cent write %" if value > 2 and name in HIGHEST else ""
        raise VtokError(f"--target {text!r} is out of range: {name} must be {span}{hint}")
    return Goal(name, value)
