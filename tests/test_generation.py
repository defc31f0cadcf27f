# SPDX-License-Identifier: Apache-2.0
"""`generate`: a row says in a batch what it says alone, whatever the cache, the search and the way pictures come in."""

from threading import Thread

import pytest
import torch
from parts import MAIN_FAMILIES, pictures
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, TextIteratorStreamer

from moellava import load_pretrained_model, upcycle
from moellava.configuration.versions_moellava import CACHE


FAMILIES = (*MAIN_FAMILIES, "gemma2", "mixtral")

# Rows of unequal length: text alone, one picture, several, in front of the text, inside and behind it.
TEXTS = (
    "USER: What is shown in this picture? ASSISTANT:",
    "<image>\nUSER: How many birds are there? ASSISTANT:",
    "USER: <image> or <image>? ASSISTANT:",
    "The sky",
    "<image><image><image>",
    "What colour is the door? <image>",
    "Answer with yes or no: does the picture show a lesion? The patient is 47 years old, with fever and cough.",
    "left <image> right <image> Which organ is marked by the arrow?",
)
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3}

PROJECTORS = {
    "mlp": {"type": "mlp"},
    "qformer": {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32, "num_hidden_layers": 2},
    "perceiver": {"type": "perceiver", "num_latents": 4, "latent_dim": 32, "num_hidden_layers": 1},
}


@pytest.fixture(scope="module")
def assembled(parts):
    """A function: the model of some parts, assembled once, with a projector that makes pictures matter."""
    models = {}

    def make(family="llama", tower="clip", projector="mlp"):
        key = (family, tower, projector)
        if key not in models:
            source = parts.biomedclip() if tower == "biomedclip" else parts.vision_tower(tower)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                model = load_pretrained_model(
                    parts.language_model(family),
                    mm_vision_tower=source,
                    projector_config=PROJECTORS[projector],
                    device="cpu",
                ).model
                for parameter in model.model.multi_modal_projector.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
            models[key] = model
        return models[key]

    return make


def rows_of(texts=TEXTS, seed=0):
    """Texts, each with its own pictures."""
    supply = iter(pictures(sum(text.count("<image>") for text in texts), seed=seed))
    return [(text, [next(supply) for _ in range(text.count("<image>"))]) for text in texts]


def batch_of(model, rows):
    images = [picture for _, row in rows for picture in row]
    return model.processor(text=[text for text, _ in rows], images=images or None, padding=True, return_tensors="pt")


def answers(model, batch, **kwargs):
    """The new tokens, (rows, tokens)."""
    return model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]


def first_scores(model, batch):
    """The scores of the first new token, (rows, vocab_size)."""
    return model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True, output_logits=True).logits[0]


def answers_alone(model, rows, **kwargs):
    return torch.cat([answers(model, batch_of(model, [row]), **kwargs) for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_equals_the_row_alone(assembled, family):
    model, rows = assembled(family), rows_of()
    batch = batch_of(model, rows)
    lengths = batch["attention_mask"].sum(-1)
    assert len(set(lengths.tolist())) > 4 and batch["attention_mask"][:, -1].all()  # unequal, padded on the left
    assert batch["pixel_values"].shape[0] == sum(len(row) for _, row in rows)

    together = answers(model, batch, **GREEDY)
    torch.testing.assert_close(together, answers_alone(model, rows, **GREEDY), rtol=0, atol=0)
    # Not because all rows say the same, or because nobody looks at the pictures.
    assert len({tuple(row) for row in together.tolist()}) > 4
    others = batch_of(model, rows_of(seed=100))
    distances = (first_scores(model, batch) - first_scores(model, others)).abs().amax(dim=-1)
    assert [distance.item() > 1e-3 for distance in distances] == [len(row) > 0 for _, row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_equals_dynamic(assembled, family):
    model, rows = assembled(family), rows_of()
    batch = batch_of(model, rows)
    static = answers(model, batch, cache_implementation="static", **GREEDY)
    assert torch.equal(static, answers(model, batch, **GREEDY))
    assert torch.equal(static[2:4], answers_alone(model, rows[2:4], cache_implementation="static", **GREEDY))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "made sparse"])
def test_continuous_batching_says_what_generate_says(assembled, family):
    rows = [row for row in rows_of() if not row[1]]
    if family == "made sparse":  # with a place for every token, however many are in a pass
        model = upcycle(assembled("llama"), num_experts=4, layers="dense", eval_capacity_factor=4.0)
    else:
        model = assembled(family)
    prompts = [batch_of(model, [row])["input_ids"][0].tolist() for row in rows]
    answered = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=128),
        progress_bar=False,
    )
    answered = sorted(answered.values(), key=lambda answer: prompts.index(answer.prompt_ids))
    assert [answer.error for answer in answered] == [None] * len(prompts)
    expected = answers_alone(model, rows, **{**GREEDY, "eos_token_id": -1})
    assert [answer.generated_tokens for answer in answered] == expected.tolist()


@pytest.mark.parametrize(
    ("tower", "projector"),
    [("siglip", "perceiver"), ("dinov2_registers", "qformer"), ("vit", "mlp"), ("biomedclip", "perceiver")],
)
def test_other_towers_and_projectors_in_a_batch(assembled, tower, projector):
    model, rows = assembled("llama", tower, projector), rows_of()
    batch = batch_of(model, rows)
    together = answers(model, batch, **GREEDY)
    assert torch.equal(together, answers_alone(model, rows, **GREEDY))
    assert torch.equal(together, answers(model, batch, cache_implementation="static", **GREEDY))


def test_text_alone(assembled, parts):
    model = assembled()
    batch = batch_of(model, rows_of(("The sky", "A brown dog runs across the field")))
    assert "pixel_values" not in batch
    new = answers(model, batch, **GREEDY)
    assert new.shape == (2, NEW_TOKENS)
    assert torch.equal(new, answers_alone(model, rows_of(("The sky", "A brown dog runs across the field")), **GREEDY))


def test_rows_end_where_they_end_alone(assembled):
    model, rows = assembled(), rows_of()
    batch = batch_of(model, rows)
    free = answers(model, batch, **GREEDY)
    ends = sorted({free[0, 2].item(), free[4, 5].item()})  # two rows stop early, at different places
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": ends}
    together = answers(model, batch, **kwargs)
    pad = model.processor.tokenizer.pad_token_id
    lengths = set()
    for row, tokens in zip(rows, together.tolist(), strict=True):
        alone = answers(model, batch_of(model, [row]), **kwargs)[0].tolist()
        assert tokens == alone + [pad] * (len(tokens) - len(alone))
        lengths.add(len(alone))
    assert len(lengths) > 1


@pytest.mark.parametrize("family", ["llama", "phi", "granite", "mixtral"])
def test_beams_of_a_batch_equal_those_of_the_rows_alone(assembled, family):
    model = assembled(family)
    # A row of text, then rows of one, two and three pictures.
    rows = [rows_of()[index] for index in (3, 1, 2, 4)]
    batch = batch_of(model, rows)
    together = answers(model, batch, **BEAMS)
    assert torch.equal(together, answers_alone(model, rows, **BEAMS))
    assert torch.equal(together, answers(model, batch, cache_implementation="static", **BEAMS))

    several = answers(model, batch, num_return_sequences=3, **BEAMS).view(len(rows), 3, -1)
    assert torch.equal(several[:, 0], together)
    assert all(len({tuple(beam) for beam in row}) == 3 for row in several.tolist())


def test_sampling_repeats_with_its_seed(assembled):
    model, rows = assembled(), rows_of()
    batch = batch_of(model, rows)
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95}

    def sample(seed, **more):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model.generate(**batch, **kwargs, **more)

    first = sample(1)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))
    assert torch.equal(first, sample(1, cache_implementation="static"))

    several = sample(3, num_return_sequences=2)
    assert several.shape[0] == 2 * len(rows)
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(several[::2, :prompt], batch["input_ids"])
    assert torch.equal(several[1::2, :prompt], batch["input_ids"])
    assert not torch.equal(several[::2], several[1::2])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache(assembled, family):
    model = assembled(family)
    batch = batch_of(model, [rows_of()[index] for index in (1, 2, 3)])
    assert torch.equal(answers(model, batch, use_cache=False, **GREEDY), answers(model, batch, **GREEDY))


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prefill_in_chunks_that_cut_pictures(assembled, chunk):
    model = assembled()
    batch = batch_of(model, rows_of())
    chunked = answers(model, batch, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(chunked, answers(model, batch, **GREEDY))


def test_prompt_lookup(assembled):
    model = assembled()
    batch = batch_of(model, rows_of()[2:3])
    looked_up = answers(model, batch, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(looked_up, answers(model, batch, **GREEDY))


# ---------------------------------------------------------------------------------------------------------------------
# Other ways in
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "mixtral"])
def test_pictures_that_are_encoded_once(assembled, family):
    model = assembled(family)
    images = pictures(3)
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        encoded = {
            "image": model.get_image_features(model.processor(images=images, return_tensors="pt")["pixel_values"])
        }
        assert len(encoded["image"].pooler_output) == 3 and len(calls) == 1
        for question in ("What is it?", "Is there a bird in one of them?"):
            rows = [(f"<image> {question}", images[:1]), (f"<image><image> {question}", images[1:])]
            batch = batch_of(model, rows)
            pixel_values = batch.pop("pixel_values")
            calls.clear()
            reused = answers(model, batch, mm_encoder_outputs=encoded, **GREEDY)
            assert not calls
            assert torch.equal(reused, answers(model, {**batch, "pixel_values": pixel_values}, **GREEDY))
            with torch.no_grad():
                logits = model(**batch, mm_encoder_outputs=encoded).logits
                assert torch.equal(logits, model(**batch, pixel_values=pixel_values).logits)
    finally:
        hook.remove()


@pytest.mark.parametrize("kwargs", [BEAMS, {**BEAMS, "num_return_sequences": 2}], ids=["beams", "sequences"])
def test_encoded_pictures_stay_what_they_are(assembled, kwargs):
    model = assembled()
    batch = batch_of(model, rows_of(("<image> What is it?", "<image> What is it?", "<image><image> And these?")))
    pixel_values = batch.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixel_values)}
    features = list(encoded["image"].pooler_output)
    expected = answers(model, {**batch, "pixel_values": pixel_values}, **kwargs)
    for _ in range(2):  # repeating the features for every beam must not show in the caller's object
        assert torch.equal(answers(model, batch, mm_encoder_outputs=encoded, **kwargs), expected)
        assert list(encoded) == ["image"] and len(encoded["image"].pooler_output) == 4
        assert all(a is b for a, b in zip(features, encoded["image"].pooler_output, strict=True))


def test_pictures_both_encoded_and_not(assembled):
    model = assembled()
    batch = batch_of(model, rows_of(("<image> What is it?",)))
    encoded = {"image": model.get_image_features(batch["pixel_values"])}
    with pytest.raises(ValueError, match="both"):
        model.generate(**batch, mm_encoder_outputs=encoded, **GREEDY)
    with pytest.raises(ValueError, match="only one of pixel_values and mm_encoder_outputs"):
        model(**batch, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
def test_from_embeddings(assembled, family):
    model = assembled(family)
    batch = batch_of(model, rows_of())
    expected = answers(model, batch, **GREEDY)
    mask, pixel_values, ids = batch["attention_mask"], batch["pixel_values"], batch["input_ids"]

    # The placeholders' embeddings, which the model finds and replaces: generate then returns the new tokens alone.
    embeddings = model.get_input_embeddings()(ids)
    new = model.generate(inputs_embeds=embeddings, attention_mask=mask, pixel_values=pixel_values, **GREEDY)
    assert torch.equal(new, expected)
    # The same with beams, which have to find each row's pictures without ids.
    beams = model.generate(inputs_embeds=embeddings, attention_mask=mask, pixel_values=pixel_values, **BEAMS)
    assert torch.equal(beams, answers(model, batch, **BEAMS))

    # The caller puts the features in.
    features = torch.cat(model.get_image_features(pixel_values).pooler_output)
    embeddings = embeddings.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), features)
    assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY), expected)


def test_a_conversation_goes_on_from_its_cache(assembled):
    model, processor = assembled(), assembled().processor
    first, second = pictures(2)
    cache = DynamicCache(config=model.config.text_config)
    one = processor(text="<image> What is it?", images=first, return_tensors="pt")
    said = model.generate(**one, **{CACHE: cache}, **GREEDY)

    more = processor(text="And this: <image> ?", images=second, add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([said, more["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    # The cache holds the first picture already, so only the new one is given.
    with_cache = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=more["pixel_values"], **{CACHE: cache}, **GREEDY
    )
    both = torch.cat([one["pixel_values"], more["pixel_values"]])
    anew = model.generate(input_ids=ids, attention_mask=mask, pixel_values=both, **GREEDY)
    assert torch.equal(with_cache, anew)


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_goes_by_either_name(assembled, name):
    """transformers 5.24 calls `cache` what was `past_key_values`: a checkpoint's code has to know both."""
    model = assembled()
    ids = model.processor(text="The sky is blue today", return_tensors="pt")["input_ids"]
    whole = model(input_ids=ids)
    cache = DynamicCache(config=model.config.text_config)
    first = model(input_ids=ids[:, :-1], **{name: cache})
    assert first.get(CACHE) is cache
    assert cache.get_seq_length() == ids.shape[1] - 1
    last = model(input_ids=ids[:, -1:], **{name: cache})
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1])
    states = model.model(input_ids=ids[:, -1:], **{name: DynamicCache(config=model.config.text_config)})
    assert states.get(CACHE).get_seq_length() == 1


def test_the_cache_goes_by_one_name(assembled):
    model = assembled()
    cache = DynamicCache(config=model.config.text_config)
    for part in (model, model.model):
        with pytest.raises(ValueError, match="Give only one of past_key_values and cache"):
            part(input_ids=torch.tensor([[1]]), past_key_values=cache, cache=cache)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [2, 3], ids=["pictures", "text"])
def test_streaming_gives_the_text_of_generate(assembled, index):
    model, tokenizer = assembled(), assembled().processor.tokenizer
    batch = batch_of(model, [rows_of()[index]])
    expected = tokenizer.decode(answers(model, batch, **GREEDY)[0], skip_special_tokens=True)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**batch, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 2


def test_scores_and_hidden_states(assembled):
    model = assembled()
    batch = batch_of(model, rows_of())
    output = model.generate(
        **batch, **GREEDY, return_dict_in_generate=True, output_logits=True, output_hidden_states=True
    )
    rows, prompt = batch["input_ids"].shape
    text_config = model.config.text_config
    assert len(output.logits) == len(output.hidden_states) == NEW_TOKENS
    assert output.logits[0].shape == (rows, text_config.vocab_size)
    assert len(output.hidden_states[0]) == text_config.num_hidden_layers + 1
    assert output.hidden_states[0][0].shape == (rows, prompt, text_config.hidden_size)
    assert torch.equal(output.sequences[:, prompt:], answers(model, batch, **GREEDY))


def test_last_logits_only(assembled):
    model = assembled()
    batch = batch_of(model, rows_of())
    with torch.no_grad():
        every = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, every[:, -2:])
        torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([0, 5])).logits, every[:, [0, 5]])


def test_number_of_pictures_is_checked(assembled):
    model = assembled()
    batch = batch_of(model, rows_of(("<image> What is it?",)))
    two = model.processor(images=pictures(2), return_tensors="pt")["pixel_values"]
    with pytest.raises(ValueError, match="16 image tokens.*32 features: 2 pictures of 16 tokens"):
        model.generate(**{**batch, "pixel_values": two}, **GREEDY)
