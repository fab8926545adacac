"""``python -m tests.serving.videos FOLDER BATCHED``: the greedy answers of vLLM to prompts with videos, as JSON.

A process of its own, since vLLM leaves state behind; the engine in this process, as ``LLM`` may have it.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
from PIL import Image

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = (f"{VIDEO} what is {PICTURE} in the picture", f"a {PICTURE} {VIDEO} blue square", f"left of {VIDEO} c")
FRAMES = 4


def requests() -> list[dict]:
    """Coarse noise, another one for each prompt."""
    found = []
    for seed, text in enumerate(PROMPTS):
        draw = np.random.default_rng(seed)
        noise = draw.integers(0, 255, (FRAMES + 1, 6, 8, 3), dtype=np.uint8).repeat(56, 1).repeat(56, 2)
        told = {"fps": 2.0, "duration": 2.0, "total_num_frames": FRAMES, "frames_indices": list(range(FRAMES))}
        media: dict = {"video": [(noise[:FRAMES], told | {"video_backend": "opencv", "do_sample_frames": False})]}
        if PICTURE in text:
            media["image"] = Image.fromarray(noise[FRAMES])
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        found.append({"prompt": prompt, "multi_modal_data": media})
    return found


def main(folder: str, batched: str) -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    limits = {"image": 1, "video": 1}
    served = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=2048, limit_mm_per_prompt=limits,
        max_num_batched_tokens=int(batched),
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = served.generate(requests(), greedy, use_tqdm=False)
    print(json.dumps([[len(one.prompt_token_ids), list(one.outputs[0].token_ids)] for one in answers]))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
