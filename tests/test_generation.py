"""Everything that `generate` and hand-written loops can do with a compressed model: it works, or says why not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

import vtok
from vtok.api import session_of

from .conftest import LLAVA, settings
from .models import BOS, FAMILIES, IMAGE, PAD, PATCH, QWEN, SCENARIOS, SIDE, VOCAB, Batch, build, inputs
from .oracle import hidden_columns, masked, recorded, rewrites, survivors

ENTRY = ["divprune", "downsample", "visionzip"]  # drops in front of the decoder, merges there, merges in the tower
METHODS = [*ENTRY, "fastv", "transprune"]
on_every_family = pytest.mark.parametrize("family", FAMILIES)
with_methods = pytest.mark.parametrize("method", METHODS)
PROMPTS = SCENARIOS["ragged"]
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@contextmanager
def oracle(model: PreTrainedModel, batch: Batch, method: Any, **options: Any) -> Iterator[None]:
    """The plain model with what `method` drops masked out, for a block; then plain again."""
    vtok.compress(model, method, positions="keep", **options)
    with recorded(model) as prompt:
        model(**batch)
    gone, changed = hidden_columns(model, batch), rewrites(model)
    vtok.restore(model)
    with masked(model, gone, batch["attention_mask"], prompt if changed else None):
        yield


def both(model: PreTrainedModel, batch: Batch, method: str, family: str, **options: Any) -> tuple[Any, Any]:
    """`generate` of the compressed model and of the oracle."""
    chosen = settings(method, family)
    vtok.compress(model, method, positions="keep", **chosen)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4, **options}
    with recorded(model) as prompt:
        got = model.generate(**batch, **options)
    gone, changed = hidden_columns(model, batch), rewrites(model)
    vtok.restore(model)
    with masked(model, gone, batch["attention_mask"], prompt if changed else None):
        expected = model.generate(**batch, **options)
    return got, expected


def same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        close(a, b)


# decoding strategies


def copied(model: PreTrainedModel) -> list[list[Any]]:
    """Prompts that `generate` can repeat: transformers 5.17 mixes a sample's pictures up where there are several."""
    encodes_first = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    return PROMPTS if encodes_first else [[5, "image", 4], [3, "image:84x56", 6], [9]]


@on_every_family
@with_methods
def test_beams(tiny: Any, family: str, method: str) -> None:
    """Several rows per prompt: rows are copied and reordered, pictures are not."""
    model = tiny(family)
    batch = inputs(family, model, copied(model))
    same(*both(model, batch, method, family, num_beams=3, num_return_sequences=2))


@on_every_family
@with_methods
def test_samples(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, copied(model))
    vtok.compress(model, method, **settings(method, family))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=8))
    assert found[0].shape == (6, batch["input_ids"].shape[1] + 8)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    kept = vtok.report(model).kept
    assert len(kept) == 6
    assert all(torch.equal(a, b) for i in (0, 2, 4) for a, b in zip(kept[i], kept[i + 1], strict=True))


@on_every_family
@with_methods
def test_without_a_cache(tiny: Any, family: str, method: str) -> None:
    """Every step prefills the whole prompt anew, and chooses the same tokens: what was generated is no question."""
    model = tiny(family)
    batch = inputs(family, model, PROMPTS)
    vtok.compress(model, method, positions="keep", **settings(method, family))
    options = {"max_new_tokens": 3, **GREEDY}
    got = model.generate(**batch, **options, use_cache=False)
    cached = model.generate(**batch, **options)
    same(got, cached)


@on_every_family
@with_methods
def test_without_a_cache_or_a_mask(tiny: Any, family: str, method: str) -> None:
    """Gaps in the position ids are gaps, and no border between packed sequences."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, method, positions="keep", **settings(method, family))
    expected = model(**batch, use_cache=True).logits
    bare = {key: value for key, value in batch.items() if key != "attention_mask"}
    close(model(**bare, use_cache=False).logits, expected)
    close(model(**batch, use_cache=False).logits, expected)


@on_every_family
@with_methods
@pytest.mark.parametrize("assisted", [False, True], ids=["lookup", "assisted"])
def test_drafted_tokens(tiny: Any, family: str, method: str, assisted: bool) -> None:
    """Prompt lookup and assisted decoding check several tokens at a time and roll the cache back: same tokens."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, method, **settings(method, family))
    expected = model.generate(**batch, max_new_tokens=12, do_sample=False)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if assisted:
        options = {"assistant_model": tiny(family, seed=1)}
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, **options), expected)


# caches


@on_every_family
@pytest.mark.parametrize("method", ENTRY)
@pytest.mark.parametrize("name", ["ragged", "adjacent"])
def test_static_cache(tiny: Any, family: str, method: str, name: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS[name])
    vtok.compress(model, method, **settings(method, family))
    options = {"max_new_tokens": 4, **GREEDY}
    expected = model.generate(**batch, **options)
    same(model.generate(**batch, **options, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("method", ["fastv", "transprune", "todre"])
def test_static_cache_needs_equal_layers(tiny: Any, method: str) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    vtok.compress(model, method, **settings(method, "llava"))
    with pytest.raises(vtok.VtokError, match=r"static.*default cache.*divprune"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    model.generate(**batch, max_new_tokens=2)


@on_every_family
@with_methods
@pytest.mark.parametrize(("hints", "name"), [("mask", "ragged"), ("nothing", "one")])
def test_hand_written_loop(tiny: Any, family: str, method: str, hints: str, name: str) -> None:
    """`model(token, past_key_values=...)` without position ids goes on where the uncompressed prompt ended."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS[name])
    vtok.compress(model, method, positions="keep", **settings(method, family))
    expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
    check_loop(model, batch, expected, hints)


@pytest.mark.parametrize("family", LLAVA)
@with_methods
def test_hand_written_loop_with_closed_positions(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, method, **settings(method, family, positions="reindex"))
    expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
    check_loop(model, batch, expected, "nothing")


def check_loop(model: PreTrainedModel, batch: Batch, expected: Any, hints: str) -> None:
    given = {key: value for key, value in batch.items() if key != "attention_mask" or hints == "mask"}
    output = model(**given, use_cache=True)
    close(output.logits[:, -1], expected.logits[0])
    mask = batch["attention_mask"]
    for step in range(1, 4):
        token = output.logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, torch.ones_like(token)), 1)
        extra = {"attention_mask": mask} if hints == "mask" else {}
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **extra)
        close(output.logits[:, -1], expected.logits[step])


@on_every_family
@with_methods
@pytest.mark.parametrize("name", ["one", "ragged"])
def test_next_turn_of_text(tiny: Any, family: str, method: str, name: str) -> None:
    """Several new tokens on a compressed cache: a second question about the same picture."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS[name])
    length = batch["input_ids"].shape[1]
    more = torch.randint(10, 200, (len(batch["input_ids"]), 5), generator=torch.Generator().manual_seed(0))

    def turns() -> tuple[Tensor, Tensor]:
        cache = DynamicCache(config=model.config.get_text_config())
        first = model.generate(**batch, past_key_values=cache, max_new_tokens=2, do_sample=False)
        ids = torch.cat((first, more), 1)
        whole = torch.cat((batch["attention_mask"], torch.ones(len(ids), ids.shape[1] - length).long()), 1)
        second = model.generate(input_ids=ids, attention_mask=whole, past_key_values=cache, max_new_tokens=3, **GREEDY)
        return second.sequences, torch.stack(second.logits)

    chosen = settings(method, family)
    vtok.compress(model, method, positions="keep", **chosen)
    got = turns()
    vtok.restore(model)
    with oracle(model, batch, method, **chosen):
        expected = turns()
    assert torch.equal(got[0], expected[0])
    close(got[1], expected[1])


@on_every_family
@pytest.mark.parametrize("method", ENTRY)
@pytest.mark.parametrize("name", ["one", "ragged"])
def test_next_turn_on_a_static_cache(tiny: Any, family: str, method: str, name: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS[name])
    length = batch["input_ids"].shape[1]
    more = torch.randint(10, 200, (len(batch["input_ids"]), 5), generator=torch.Generator().manual_seed(0))
    config = model.config.get_text_config()

    def turns(cache: Any) -> Tensor:
        options = {"disable_compile": True, **GREEDY}
        first = model.generate(**batch, past_key_values=cache, max_new_tokens=2, **options).sequences
        ids = torch.cat((first, more), 1)
        whole = torch.cat((batch["attention_mask"], torch.ones(len(ids), ids.shape[1] - length).long()), 1)
        second = model.generate(input_ids=ids, attention_mask=whole, past_key_values=cache, max_new_tokens=3, **options)
        return torch.stack(second.logits)

    vtok.compress(model, method, **settings(method, family))
    close(turns(StaticCache(config=config, max_cache_len=length + 16)), turns(DynamicCache(config=config)))


@on_every_family
@with_methods
def test_next_turn_with_only_the_new_tokens(tiny: Any, family: str, method: str) -> None:
    """The same by hand: the new ids alone on the old cache, with a mask and without."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    more = torch.randint(10, 200, (1, 5), generator=torch.Generator().manual_seed(0))

    def turns() -> Tensor:
        cache = model(**batch, use_cache=True).past_key_values
        return model(input_ids=more, past_key_values=cache).logits

    chosen = settings(method, family)
    vtok.compress(model, method, positions="keep", **chosen)
    got = turns()
    vtok.restore(model)
    with oracle(model, batch, method, **chosen):
        close(got, turns())


@on_every_family
@with_methods
def test_a_second_picture_needs_a_new_prefill(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, method, **settings(method, family))
    expected = model(**batch, use_cache=True)
    cache = copy.deepcopy(expected.past_key_values)
    with pytest.raises(vtok.VtokError, match=r"cache that already holds tokens.*whole prompt.*without the old cache"):
        model(**batch, past_key_values=cache, use_cache=True)
    # nothing is broken by that
    token = expected.logits[:, -1:].argmax(-1)
    close(model(**batch).logits, expected.logits)
    model(input_ids=token, past_key_values=expected.past_key_values)


@on_every_family
@with_methods
def test_chunked_prefill_is_refused(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, method, **settings(method, family))
    with pytest.raises(vtok.VtokError, match=r"prefill_chunk_size=8.*whole prompt.*leave"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=8)
    model.generate(**batch, max_new_tokens=2)
    if family in QWEN:  # transformers 5.17 fails at that, compressed or not
        return
    text = inputs(family, model, [[20]])
    expected = model.generate(**text, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**text, max_new_tokens=3, do_sample=False, prefill_chunk_size=8), expected)


# shapes, types, implementations


@on_every_family
@with_methods
def test_hidden_states_have_the_prompts_length(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, PROMPTS)
    vtok.compress(model, method, positions="keep", **settings(method, family))
    output = model(**batch, output_hidden_states=True)
    gone = hidden_columns(model, batch)
    chosen = settings(method, family)
    vtok.restore(model)
    with oracle(model, batch, method, **chosen):
        expected = model(**batch, output_hidden_states=True)
    shape = (*batch["input_ids"].shape, 64)
    assert [tuple(state.shape) for state in output.hidden_states] == [shape] * (len(gone) + 1)
    for number, (a, b) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
        live = batch["attention_mask"].bool() & ~gone[max(number - 1, 0)]
        close(a[live], b[live])


@on_every_family
def test_attentions_are_those_of_each_layer(tiny: Any, family: str) -> None:
    """Maps are not blown up to the prompt's length: each is as long as what its layer saw."""
    model = tiny(family, attn="eager")
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, "fastv", **settings("fastv", family))
    output = model(**batch, output_attentions=True, use_cache=True)
    lengths = [output.past_key_values.get_seq_length(layer) for layer in range(len(output.attentions))]
    assert [tuple(map_.shape[2:]) for map_ in output.attentions] == [(n, n) for n in lengths]


@on_every_family
@with_methods
def test_tuples(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, PROMPTS)
    vtok.compress(model, method, **settings(method, family))
    expected = model(**batch)
    output = model(**batch, return_dict=False)
    assert torch.equal(output[0], expected.logits)


@on_every_family
@with_methods
def test_prompt_of_embeddings(tiny: Any, family: str, method: str) -> None:
    """Words as embeddings, pictures as pixels: placeholders are found by their embedding, as the model does it."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, method, **settings(method, family))
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    embeds = model.get_input_embeddings()(batch["input_ids"])
    if family in QWEN:  # Qwen has no positions for a prompt without ids
        rest["position_ids"] = positions_of(model, batch)
    expected, kept = model(**batch).logits, vtok.report(model).kept
    close(model(inputs_embeds=embeds, **rest).logits, expected)
    assert torch.equal(vtok.report(model).kept[0][0], kept[0][0])


def positions_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model.model.get_rope_index(
        batch["input_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
        mm_token_type_ids=batch["mm_token_type_ids"],
    )[0]


@on_every_family
@with_methods
def test_finished_embeddings_pass_through(tiny: Any, family: str, method: str) -> None:
    """A prompt whose pictures are embedded already has no placeholders left, and nothing to compress."""
    model = tiny(family)
    embeds = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    plain = model(inputs_embeds=embeds).logits
    vtok.compress(model, method, **settings(method, family))
    assert torch.equal(model(inputs_embeds=embeds).logits, plain)


@on_every_family
@with_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(tiny: Any, family: str, method: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    batch = inputs(family, model, PROMPTS)
    for key in ("pixel_values", "pixel_values_videos"):
        if key in batch:
            batch[key] = batch[key].to(dtype)
    vtok.compress(model, method, **settings(method, family))
    logits = model(**batch).logits
    assert logits.dtype == dtype
    assert logits[survivors(model, batch)].isfinite().all()
    assert vtok.report(model).tokens_kept < vtok.report(model).tokens_in
    model.generate(**batch, max_new_tokens=2)


@on_every_family
@with_methods
def test_eager_equals_sdpa(tiny: Any, family: str, method: str) -> None:
    found = []
    for attn in ("sdpa", "eager"):
        model = tiny(family, attn=attn)
        batch = inputs(family, model, PROMPTS)
        vtok.compress(model, method, **settings(method, family))
        found.append(model.generate(**batch, max_new_tokens=3, **GREEDY))
    same(*found)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_flex_attention(tiny: Any, method: str) -> None:
    found = []
    for attn in ("sdpa", "flex_attention"):
        model = tiny("llava", attn=attn)
        batch = inputs("llava", model, PROMPTS)
        vtok.compress(model, method, **settings(method, "llava"))
        with torch.compiler.set_stance("force_eager"):  # compiled, it takes minutes to start on a CPU
            found.append(model(**batch).logits[survivors(model, batch)])
    close(*found)


# wrappers around the model


@on_every_family
@with_methods
def test_deepcopy_is_independent(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, PROMPTS)
    plain = model(**batch).logits
    vtok.compress(model, method, **settings(method, family))
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    assert session_of(twin).model is twin
    assert torch.equal(twin(**batch).logits, expected)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not twin(**batch).logits.any()
    assert torch.equal(model(**batch).logits, expected)
    assert twin.generate(**batch, max_new_tokens=2, do_sample=False)[:, -1].eq(0).all()
    vtok.restore(model)
    assert torch.equal(model(**batch).logits, plain)
    assert vtok.report(twin).tokens_kept < vtok.report(twin).tokens_in
    vtok.restore(twin)
    with torch.no_grad():
        twin.lm_head.weight.copy_(model.lm_head.weight)
    assert torch.equal(twin(**batch).logits, plain)


@on_every_family
@pytest.mark.parametrize("method", ["visionzip", "fastv", "todre"])
def test_accelerate_hooks(family: str, method: str) -> None:
    """Offloaded weights come in by accelerate's own hooks; compress before or after dispatching."""
    accelerate = pytest.importorskip("accelerate")
    model = build(family, layers=4)
    batch = inputs(family, model, PROMPTS)
    chosen = settings(method, family, keep=0.7)
    vtok.compress(model, method, **chosen)
    expected = model(**batch).logits
    vtok.restore(model)
    plain = model(**batch).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    vtok.compress(model, method, **chosen)
    close(model(**batch).logits, expected)
    if family not in ("llava_next", "llava_onevision"):  # their image_newline stays on meta in generate, plain or not
        model.generate(**batch, max_new_tokens=2)
    vtok.restore(model)
    close(model(**batch).logits, plain)


def test_accelerate_dispatch_on_top() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llava", layers=4)
    batch = inputs("llava", model, PROMPTS)
    vtok.compress(model, "fastv", keep=0.7)
    expected = model(**batch).logits
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    close(model(**batch).logits, expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    close(model(**batch).logits, expected)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_pipeline(tiny: Any, method: str) -> None:
    from transformers import pipeline

    model = tiny("llava")
    pipe = pipeline("image-text-to-text", model=model, processor=processor(model))
    picture = Image.fromarray((torch.rand(56, 56, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a b c d"}]}]
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    plain = pipe(text=chat, **options)
    vtok.compress(model, method, keep=0.5)
    got = pipe(text=chat, **options)
    assert isinstance(got[0]["generated_text"], str)
    assert vtok.report(model).tokens_in == 64
    assert vtok.report(model).average_tokens == pytest.approx(32, abs=1)
    vtok.restore(model)
    assert pipe(text=chat, **options) == plain


def processor(model: PreTrainedModel) -> Any:
    """A LLaVA processor from nothing: a word-level tokenizer and a small CLIP image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": BOS, "</s>": 2, "<image>": IMAGE}
    words |= {f"w{number}": number for number in range(4, VOCAB - 4)}
    words |= {word: VOCAB - 4 + number for number, word in enumerate("abcd")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    template = (
        "<s> {% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


# compiled decoding


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_compiled_decoding(tiny: Any, family: str) -> None:
    """The decoding step of a compressed prompt in a static cache is one graph, and is traced once."""
    model = tiny(family, layers=4)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, "divprune", keep=16)
    expected = model.generate(**batch, max_new_tokens=5, **GREEDY)
    graphs = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    length = batch["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
    output = model(**batch, past_key_values=cache, use_cache=True)
    step = torch.compile(model, backend=backend, fullgraph=True)
    torch._dynamo.reset()
    for number in range(4):
        token = output.logits[:, -1:].argmax(-1)
        close(output.logits[:, -1], expected.logits[number])
        output = step(
            input_ids=token, attention_mask=None, position_ids=positions_at(model, family, length + number),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    close(output.logits[:, -1], expected.logits[4])
    assert len(graphs) <= 2  # the first step may be specialised


def positions_at(model: PreTrainedModel, family: str, column: int) -> Tensor:
    if family not in QWEN:
        return torch.tensor([[column]])
    return (column + model.model.rope_deltas).expand(3, 1, 1)
