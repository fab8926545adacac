"""vLLM itself, on loopback: answers are those of transformers, prompts as long as the budget says.

``make test-vllm`` makes the environment. Every server costs half a minute of start, so each answers several questions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import transformers
from PIL import Image

import vtok
from tests.serving import nano

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vtok.serving.vllm.server import chat, message, serve

ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"]
TEXTS = ("what is in the picture", "how many red circle are there", "left of the blue square", "a b c")
NEW = 8

#: model, method, keep, its options
CASES = [
    ("nano-llava", "flowcut", 64, {}),
    ("nano-next", "todre", 40, {"decision": None}),
    ("nano-qwen", "divprune", 64, {}),
    ("nano-qwen3", "divprune", 40, {}),
]


def picture(seed: int) -> Image.Image:
    """Coarse noise; sizes differ."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (6, 8, 3), generator=draw, dtype=torch.uint8).numpy()
    sizes = [(400, 300), (300, 440), (320, 320)]
    return Image.fromarray(pixels).resize(sizes[seed % len(sizes)], Image.Resampling.NEAREST)


def transformers_answers(folder, chats):
    """Answer's ids and the prompt's length without what was dropped, of every (text, picture or None)."""
    model = vtok.load(folder, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    found = []
    for text, image in chats:
        parts = [{"type": "text", "text": text}]
        if image is not None:
            parts.insert(0, {"type": "image"})
        prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        batch = processor(text=prompt, images=None if image is None else [image], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        length = batch["input_ids"].shape[1]
        report = vtok.report(model)
        dropped = report.tokens_in - report.tokens_kept if image is not None else 0
        found.append((ids[0, length:].tolist(), length - dropped))
    return found


def ask(port, request):
    # ids, since words of random answers are spelt differently while they stream
    return chat(port, request, NEW, ignore_eos=True, return_token_ids=True)


@pytest.mark.parametrize(("kind", "method", "keep", "options"), CASES, ids=[case[0] for case in CASES])
def test_served_answers_are_those_of_transformers(kind, method, keep, options, tmp_path):
    folder = nano.folder(kind, tmp_path / kind)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    positions = "auto" if kind.startswith("nano-qwen") else "reindex"
    vtok.save(vtok.compress(model, method, keep=keep, positions=positions, **options), folder, weights=False)
    chats = [(TEXTS[i % len(TEXTS)], None if i % 4 == 3 else picture(i)) for i in range(16)]
    wanted = transformers_answers(folder, chats)
    requests = [message(text, [] if image is None else [image]) for text, image in chats]
    chunked = ["--max-num-batched-tokens", "512"] if kind.startswith("nano-qwen") else []
    log = tmp_path / "server.log"
    with serve(folder, [*ARGUMENTS, *chunked], log=log) as server:
        alone = [ask(server.port, request) for request in requests[:4]]
        with ThreadPoolExecutor(16) as pool:  # all at once, pictures and text mixed
            together = list(pool.map(partial(ask, server.port), requests))
    for replies in (alone, together):
        for reply, (tokens, length) in zip(replies, wanted, strict=False):
            assert not reply.error, reply.error
            assert reply.prompt_tokens == length
            assert list(reply.tokens) == tokens


@pytest.mark.parametrize("kind", ["nano-qwen", "nano-qwen3"])
def test_videos_stay_whole(kind, tmp_path):
    """Positions travel with the embeddings: with room for every token, or for a video alone, nothing changes."""
    folder = nano.folder(kind, tmp_path / kind)

    def answers(settings, batched):
        command = [sys.executable, "-m", "tests.serving.videos", str(folder), str(batched)]
        own = {**os.environ, "VTOK_VLLM": settings}
        ran = subprocess.run(command, capture_output=True, text=True, env=own)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return json.loads(ran.stdout.strip().splitlines()[-1])

    plain = answers("off", 2048)
    assert len({tuple(tokens) for _, tokens in plain}) == len(plain)
    assert answers('{"method": "divprune", "keep": 2000}', 64) == plain
    short = answers('{"method": "divprune", "keep": 16}', 64)
    assert short[2] == plain[2]
    assert all(one[0] < other[0] for one, other in zip(short[:2], plain[:2], strict=True))


def test_off_leaves_the_model_as_it_is(tmp_path, monkeypatch):
    folder = nano.folder("nano-llava", tmp_path / "model")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    vtok.save(vtok.compress(model, "divprune", keep=64), folder, weights=False)
    arguments = [*ARGUMENTS, "--hf-overrides", '{"vtok": false}']
    with serve(folder, arguments, log=tmp_path / "server.log") as server:
        reply = chat(server.port, message(TEXTS[0], [picture(0)]), NEW)
    assert not reply.error
    assert reply.prompt_tokens > 576


def test_settings_that_cannot_be_served_end_the_start(tmp_path):
    folder = nano.folder("nano-llava", tmp_path / "model")
    log = tmp_path / "server.log"
    arguments = [*ARGUMENTS, "--hf-overrides", '{"vtok": {"method": "fastv", "keep": 300}}']
    with pytest.raises(vtok.VtokError, match="ended"), serve(folder, arguments, log=log):
        pass
    assert "inside the decoder" in log.read_text(errors="replace")
