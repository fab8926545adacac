"""small-llava in miniature: the same classes, tokens and steps with random parts."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import vtok
from vtok.errors import VtokError
from vtok.geometry import randomize
from vtok_eval import assets
from vtok_eval.models import photographs, small
from vtok_eval.models.delta import merge
from vtok_eval.train import lora
from vtok_eval.train import small as recipe

SIDE, TOKENS = 112, 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>")


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and SmolLM2's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        unk_token=SPECIAL[0],
        additional_special_tokens=[SPECIAL[4]],
        clean_up_tokenization_spaces=False,
    )


def parts() -> tuple[tuple[Any, dict], tuple[Any, dict]]:
    """Configurations and weights of a tiny tower (of 7 blocks) and a tiny language model."""
    eyes = Dinov2Config(
        hidden_size=48, num_hidden_layers=7, num_attention_heads=3, mlp_ratio=2, image_size=154, patch_size=14
    )
    mouth = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    tower, decoder = Dinov2Model(eyes), LlamaForCausalLM(mouth)
    randomize(tower, 0)
    randomize(decoder, 1)
    words = {name: value for name, value in decoder.state_dict().items() if name != "lm_head.weight"}
    return (eyes, dict(tower.state_dict())), (mouth, words)


def base() -> tuple[Any, Any]:
    """What ``small.base`` gives, tiny and new each time."""
    eyes, mouth = parts()
    made = small.processor(tokenizer(), side=SIDE)
    torch.manual_seed(0)
    return small.join(eyes, mouth, image=made.image_token_id, side=SIDE, blocks=6), made


def asked(processor: Any, question: str = "what is this?", colour: str = "red") -> Any:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.linear_gradient("L").convert("RGB")
    picture.paste(Image.new("RGB", (90, 60), colour), (30, 50))
    return processor(images=picture, text=text, return_tensors="pt")


def delta() -> dict[str, torch.Tensor]:
    """Random changes of every layer that training changes."""
    model, _ = base()
    for pattern in (recipe.TOWER_LAYERS, recipe.DECODER_LAYERS):
        lora.attach(model, pattern, rank=3)
    generator = torch.Generator().manual_seed(3)
    for _, change in lora.pairs(model):
        change.up.data.normal_(std=0.02, generator=generator)
    own = {"model.multi_modal_projector.linear_1.bias": torch.full((64,), 0.5)}
    return lora.delta(model, torch.float32) | own


def test_join_keeps_both_parts():
    (eyes, tower), (mouth, words) = parts()
    model, _ = base()
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    alone = Dinov2Model(eyes).eval()
    alone.load_state_dict(tower)
    hidden = alone(pixels, output_hidden_states=True).hidden_states
    joined = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    # cut to 6 of 7 blocks, and position embeddings resampled once instead of at each call
    assert len(joined) == 7
    torch.testing.assert_close(joined[-2], hidden[5])
    speaker = LlamaForCausalLM(mouth).eval()
    speaker.load_state_dict(words, strict=False)
    speaker.tie_weights()
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, speaker(ids).logits)


def test_prompt_of_training_is_the_prompt_of_the_template():
    model, processor = base()
    text = processor.tokenizer
    chat = recipe.Chat(model, processor, nn.ModuleList())
    turn = recipe.Turn("objects", text("What is it?", add_special_tokens=False).input_ids, [65])
    row = chat._row([(8, 8)], [turn])
    assert row["ids"][:-2] == asked(processor, "What is it?").input_ids[0].tolist()
    assert row["ids"][-2:] == [65, text.eos_token_id]
    assert [p[0] for p in row["positions"]] == list(range(len(row["ids"])))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "red"}]
    spoken = processor.apply_chat_template(talk)
    assert spoken == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"


def test_every_question_sees_its_picture_and_itself_only():
    model, processor = base()
    student = recipe.Student(model, processor)
    stream = student.scenes("sparse", 2, 9)
    batch = next(batch for batch in map(stream.__getitem__, range(9)) if len(batch.grids[0]) == 1)
    alone = []
    with torch.autocast("cpu", torch.bfloat16):
        together = student.chat.step(batch)[0]
        for item, turns in enumerate(batch.turns):
            for turn in turns:
                pixels = {"pixel_values": batch.images["pixel_values"][item : item + 1]}
                one = recipe.Batch(pixels, [batch.grids[item]], [batch.labels[item]], [[turn]])
                alone.append(student.chat.step(one)[0])
    assert len(alone) > 2
    torch.testing.assert_close(torch.stack(alone).mean(), together, rtol=0.02, atol=0.02)


def test_merged_is_what_was_trained():
    model, processor = base()
    inputs = asked(processor)
    change = delta()
    adapted, _ = base()
    for pattern in (recipe.TOWER_LAYERS, recipe.DECODER_LAYERS):
        lora.attach(adapted, pattern, rank=3)
    for name, own in lora.pairs(adapted):
        own.down.data.copy_(change[f"{name}.lora_down"])
        own.up.data.copy_(change[f"{name}.lora_up"] / lora.SCALE)
    adapted.model.multi_modal_projector.linear_1.bias.data.fill_(0.5)
    plain = model(**inputs).logits
    merge(model, change)
    torch.testing.assert_close(model(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (plain - model(**inputs).logits).abs().max() > 0.01
    assert len(change) == 2 * (3 * 6 + 6 * 7) + 1  # of six blocks the last three, and six layers


def test_delta_that_does_not_fit():
    model, _ = base()
    change = delta()
    name = "model.language_model.layers.0.mlp.up_proj"
    for wrong, message in (
        ({f"{name}.lora_down": change[f"{name}.lora_down"]}, "no fitting .*lora_up"),
        ({"model.nothing.weight": torch.zeros(2)}, r"model\.nothing\.weight \(2,\), and the model has no such weight"),
        ({"model.language_model.norm.weight": torch.zeros(2)}, r"do not belong together"),
    ):
        with pytest.raises(VtokError, match=message):
            merge(model, wrong)


def test_assemble_once_and_load_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VTOK_CACHE", str(tmp_path / "cache"))
    source = tmp_path / small.DELTA
    save_file(delta(), source)
    calls = []
    monkeypatch.setattr(small, "base", lambda: calls.append(1) or base())
    monkeypatch.setattr(small, "shipped", lambda: tmp_path)
    folder = small.assemble()
    assert folder == small.assemble() and len(calls) == 1
    assert folder.name == f"small-llava-{assets.sha256(source)[:12]}"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half made lies about
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    wanted = merge(base()[0], load_file(source)).to(torch.bfloat16).float()
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    inputs = asked(processor)
    assert torch.equal(inputs.input_ids, asked(base()[1]).input_ids)
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == TOKENS
    again, other = small.load()
    assert again.dtype == torch.bfloat16 and type(other) is type(processor)
    assert again.generation_config.eos_token_id == 2


def test_the_shipped_delta_fits_the_recipe_and_the_two_models():
    """By names and shapes, without their weights: DINOv2-small's and SmolLM2-135M's own dimensions."""
    path = small.shipped() / small.DELTA
    assert path.stat().st_size < 20e6
    found = {name: value.to("meta") for name, value in load_file(path).items()}
    eyes = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14)
    mouth = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(small.configured(eyes, mouth, image=4))
    merge(model, found)  # raises where a name or shape does not fit
    changed = {name.removesuffix(".lora_down") for name in found if name.endswith(".lora_down")}
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert changed == {
        name for name in layers if re.search(recipe.TOWER_LAYERS, name) or re.search(recipe.DECODER_LAYERS, name)
    }


def test_no_delta(tmp_path: Path):
    with pytest.raises(VtokError, match=r"there is no .*none\.safetensors; train one with python -m vtok_eval\.train"):
        small.assemble(delta=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(VtokError, match=r"bad\.safetensors cannot be read"):
        small._read(tmp_path / "bad.safetensors")


@pytest.fixture(scope="module")
def served() -> tuple[Any, Any]:
    return base()


@pytest.mark.parametrize("method", vtok.methods("llava"))
def test_every_method_compresses_it(served: tuple[Any, Any], method: str):
    model, processor = served
    inputs = asked(processor)
    plain = model(**inputs).logits
    vtok.compress(model, method, keep=0.75 if method == "random_deep" else 0.5)
    try:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert out.shape[1] > inputs.input_ids.shape[1]
        assert vtok.report(model).average_tokens < TOKENS
    finally:
        vtok.restore(model)
    assert torch.equal(model(**inputs).logits, plain)


def test_photographs_are_asked_about(served: tuple[Any, Any], tmp_path: Path):
    model, processor = served
    lines = photographs.answers(model, processor, "tiny", ["divprune", "tome"], keep=40).splitlines()
    assert lines[0] == "| photograph | question | a person | plain | divprune 40 | tome 40 |"
    assert len(lines) == 2 + len(photographs.QUESTIONS) and lines[2].startswith(
        "| coffee | What is it? | coffee, cup |"
    )
    with pytest.raises(VtokError, match="there is no folder"):
        photographs.command("nano-llava", out=tmp_path / "none")


def test_a_list_of_feature_layers_is_refused():
    model, _ = base()
    model.config.vision_feature_layer = [-4, -2]
    with pytest.raises(VtokError, match="reads several layers at once"):
        vtok.compress(model, "divprune", keep=8)


@pytest.mark.grad
@pytest.mark.parametrize("stage", list(recipe.RECIPE))
def test_steps_lower_the_loss(stage: str):
    student = recipe.Student(*base())
    plan = student.stage(stage, 10)
    batch = student.scenes(stage, 2, 1)[0]
    frozen = copy.deepcopy({name: p for name, p in student.model.named_parameters() if name.endswith("base.weight")})
    student.parts.requires_grad_(False)
    if stage == "words":
        student.spelling.collect(student.scenes(stage, 2, 2))
    weights = [p for modules, _ in plan.groups for module in modules for p in module.parameters()]
    for p in weights:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)  # the same window
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = plan.step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], losses
    own = dict(student.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in frozen.items())


@pytest.mark.grad
def test_training_run_writes_a_delta_that_assembles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recipe, "RECIPE", {name: own | {"size": 2} for name, own in recipe.RECIPE.items()})
    target = recipe.train(tmp_path, steps={"tower": 2, "words": 2, "sparse": 1, "whole": 1}, base=base())
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [line.split('"')[3] for line in lines] == ["tower", "words", "sparse", "whole", "check", "check"]
    change = load_file(target)
    assert all(value.dtype == torch.bfloat16 for name, value in change.items() if "lora" in name)
    monkeypatch.setattr(small, "base", base)
    folder = small.assemble(tmp_path / "model-folder", delta=target)
    assert (folder / "model.safetensors").is_file()
    assert small.assemble(folder) == folder  # needs no delta any more
    # a second run finds every stage done and writes the same delta
    again = load_file(recipe.train(tmp_path, steps={"tower": 2, "words": 2, "sparse": 1, "whole": 1}, base=base()))
    assert all(torch.equal(change[name], value) for name, value in again.items())


@pytest.mark.grad
def test_training_goes_on_from_a_finished_delta(tmp_path: Path):
    first = recipe.train(tmp_path / "first", steps={"tower": 2, "sparse": 1}, base=base())
    student = recipe.Student(*base(), seed=1)  # another projector, which the delta replaces
    student.load(first)
    change, again = load_file(first), student.delta()
    for name, value in change.items():
        torch.testing.assert_close(again[name].float(), value.float(), rtol=1e-3, atol=1e-5)
    target = recipe.train(tmp_path / "second", steps={"tower": 2, "sparse": 1}, base=base(), start=first)
    assert not (tmp_path / "second" / "tower.safetensors").exists() and target.is_file()
    save_file({name: value for name, value in change.items() if "layers.0" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(VtokError, match="changes other layers"):
        student.load(tmp_path / "part.safetensors")
    wider = {name: torch.cat((value, value)) if name.endswith("lora_down") else value for name, value in change.items()}
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(VtokError, match=r"has rank 64 at .*, not 32"):
        student.load(tmp_path / "wider.safetensors")


@pytest.mark.grad
def test_the_projector_learns_words_at_one_length():
    """From cached features: what it says of a token comes near the token's words, and as loud as asked for."""
    student = recipe.Student(*base())
    student.spelling.collect(student.scenes("words", 2, 2))
    assert len(student.spelling.seen) == len(student.spelling.wanted) and len(student.spelling.centres) > 0
    # what is cached enters the projector as a picture's tokens do
    batch = student.scenes("words", 2, 2)[0]
    with torch.no_grad():
        tokens = torch.cat(student.chat.features(batch.images)).float()
        cached = student.spelling.projector(student.spelling.seen).float()
    apart = torch.cdist(cached, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    found = apart.min(1).values < 1e-3
    assert found.sum() >= sum(int(own.centre.sum()) for own in batch.labels)
    optimizer = torch.optim.AdamW(student.spelling.projector.requires_grad_(True).parameters(), lr=3e-3)
    first, last = None, {}
    for number in range(60):
        torch.manual_seed(number)
        loss, last = student.spelling.step(number)
        first = first or last
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert last["thing"] > first["thing"] + 0.1 and last["word"] > first["word"]
    assert abs(last["loud"] - 1) < 0.3


def test_projector_starts_loud_and_standardised():
    model, _ = base()
    projector = model.model.multi_modal_projector
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    standard = recipe.Standard(model, pixels)
    heard: list[torch.Tensor] = []
    hook = projector.linear_1.register_forward_hook(lambda *args: heard.append(args[2]))
    tokens = torch.stack(model.model.get_image_features(pixels, return_dict=True).pooler_output)
    hook.remove()
    assert abs(heard[0].mean()) < 0.1 and 0.8 < heard[0].std() < 1.2
    spread = model.get_input_embeddings().weight.std()
    torch.testing.assert_close(tokens.std(), recipe.LOUDNESS * spread, rtol=0.05, atol=0)
    projector._forward_pre_hooks.clear()
    projector.load_state_dict(standard.folded(projector))
    plain = torch.stack(model.model.get_image_features(pixels, return_dict=True).pooler_output)
    torch.testing.assert_close(plain, tokens, rtol=1e-3, atol=1e-4)


def test_lora_starts_as_nothing_and_can_be_left_out():
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    before = root(x)
    changes = lora.attach(root, r"^2$", rank=2)
    assert len(changes) == 1 and torch.equal(root(x), before)
    next(iter(dict(lora.pairs(root)).values())).up.data.normal_()
    assert not torch.allclose(root(x), before)
    with lora.without(changes):
        assert torch.equal(root(x), before)
