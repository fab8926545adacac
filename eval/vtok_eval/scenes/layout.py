"""Where things go: apart from each other, often in a corner or the centre so that places can be asked for."""

from __future__ import annotations

import random

from vtok_eval.scenes.records import Box

# centres of the zones, as shares of width and height
ANCHORS = {
    "top left": (0.22, 0.22),
    "top right": (0.78, 0.22),
    "bottom left": (0.22, 0.78),
    "bottom right": (0.78, 0.78),
    "center": (0.5, 0.5),
}
GAP = 4


def _clear(box: Box, taken: list[Box]) -> bool:
    return all(
        box[2] + GAP <= other[0] or other[2] + GAP <= box[0] or box[3] + GAP <= other[1] or other[3] + GAP <= box[1]
        for other in taken
    )


class Layout:
    """Boxes on a canvas of ``size`` (width, height), none over another."""

    def __init__(self, size: tuple[int, int], rng: random.Random) -> None:
        self.size, self.rng = size, rng
        self.taken: list[Box] = []
        # the centre twice: things that fall anywhere reach a corner more often than the centre
        self._free = [*ANCHORS.values(), ANCHORS["center"]]

    def place(self, size: tuple[int, int], zoned: float = 0.6) -> Box | None:
        """A free box of ``size``, in an unused zone with probability ``zoned``; None where no room is found."""
        width, height = size
        room = (self.size[0] - width - 4, self.size[1] - height - 4)
        if min(room) < 0:
            return None
        for attempt in range(40):
            if attempt < 4 and self._free and self.rng.random() < zoned:
                zone = self.rng.choice(self._free)
                x = round(zone[0] * self.size[0] - width / 2 + self.rng.uniform(-0.06, 0.06) * self.size[0])
                y = round(zone[1] * self.size[1] - height / 2 + self.rng.uniform(-0.06, 0.06) * self.size[1])
            else:
                zone, x, y = None, self.rng.randint(2, 2 + room[0]), self.rng.randint(2, 2 + room[1])
            x, y = min(max(x, 2), 2 + room[0]), min(max(y, 2), 2 + room[1])
            box = (x, y, x + width, y + height)
            if _clear(box, self.taken):
                self.taken.append(box)
                self._free = [other for other in self._free if other != zone]
                return box
        return None
