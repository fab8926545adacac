"""``python -m vtok_eval.scenes --out FOLDER --seed N`` writes the bundled tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from vtok_eval.scenes.bundle import write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vtok_eval.scenes", description="Write the bundled tasks.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks, such as tasks/")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes and questions")
    chosen = parser.parse_args()
    write(chosen.out, chosen.seed)


if __name__ == "__main__":
    main()
