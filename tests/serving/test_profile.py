"""Where a server's time goes: stacks are put to the part that they work for."""

from __future__ import annotations

import pytest

from vtok.errors import VtokError
from vtok.serving.vllm.profile import REST, counted, part_of, shares

ENGINE = "process 7:python -m vllm serve vtok_kernels/;run_busy_loop (vllm/v1/engine/core.py:1555)"
MODEL = f"{ENGINE};forward (vllm/model_executor/models/llava.py:709)"
PICTURE = f"{ENGINE};_process_image_input (vtok/serving/vllm/llava.py:116)"
STACKS = {
    "language model": f"{MODEL};forward (vllm/model_executor/models/llama.py:436)",
    "vision tower, projector": f"{PICTURE};forward (vllm/model_executor/models/clip.py:756)",
    "selection": f"{PICTURE};select (vtok/methods/divprune.py:37);farthest_first (vtok_kernels/greedy.py:1)",
    "pictures": "process 6:vllm;resize (PIL/Image.py:1)",
    "scheduling, sampling": f"{ENGINE};schedule (vllm/v1/core/sched/scheduler.py:1)",
    "HTTP, text": "process 6:vllm;run (asyncio/runners.py:118)",
    REST: "process 6:vllm;collect (gc.py:1)",
}


@pytest.mark.parametrize("part", STACKS)
def test_a_stack_is_of_one_part(part: str) -> None:
    assert counted([f"{STACKS[part]} 3\n"]) == {part: 3}


def test_waiting_is_no_work() -> None:
    waiting = [
        "process 6:vllm;run (asyncio/runners.py:118);select (selectors.py:468)",
        f"{ENGINE};SpinCondition.wait (vllm/distributed/x.py:208);sched_yield (x.py:46)",
        "process 6:vllm;run (threading.py:982);_worker (concurrent/futures/thread.py:81)",
    ]
    assert not counted(f"{stack} 9" for stack in waiting)
    assert part_of("nothing known") == REST


def test_shares_add_up_to_the_request() -> None:
    found = shares("plain", counted(f"{stack} {n}" for n, stack in enumerate(STACKS.values(), 1)), 0.5)
    assert [share.share for share in found] == sorted((share.share for share in found), reverse=True)
    assert sum(share.seconds for share in found) == pytest.approx(0.5)
    with pytest.raises(VtokError, match="saw nothing"):
        shares("plain", {}, 0.5)
