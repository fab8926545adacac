"""``accelerate launch -m vtok_eval ...`` and ``python -m vtok_eval ...``: the same as ``vtok eval``."""

import sys

from vtok.cli import ELSEWHERE, app

if __name__ == "__main__":
    ELSEWHERE.setdefault("eval", "vtok_eval.harness:command")
    app(["eval", *sys.argv[1:]])
