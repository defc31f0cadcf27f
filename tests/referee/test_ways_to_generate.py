# SPDX-License-Identifier: Apache-2.0
"""Ways to generate that transformers' suite tests too, in tests that its source distribution lacks; here in our words.

The values of each are compared with plain greedy decoding. `tests/test_generation.py` has more of them, by family.
"""

import copy

import pytest
import torch
from model_testers import MoellavaModelTester

from moellava import MoellavaForCausalLM


GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=[("clip", "mlp", False), ("siglip", "qformer", True)], ids=["dense", "sparse"])
def generator(request):
    """A model with weights that make a difference, a batch, and what the model makes of it."""
    config, inputs = MoellavaModelTester(None, *request.param).prepare_config_and_inputs_for_common()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturbed(MoellavaForCausalLM(config).eval(), 0.1)
    model.generation_config.eos_token_id = None
    # Without a cache, a picture's token that is generated would stand for a picture that is not there.
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model, inputs, model.generate(**inputs, **GREEDY)


@torch.no_grad()
def perturbed(model, std):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * std)
    return model


@pytest.mark.parametrize(
    "how",
    [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 4}],
    ids=["no-cache", "static-cache", "chunks"],
)
def test_the_cache_changes_nothing(generator, how):
    model, inputs, expected = generator
    assert torch.equal(model.generate(**inputs, **GREEDY, **how), expected)


@pytest.mark.parametrize("draft", ["model", "prompt"])
def test_assisted_decoding(generator, draft):
    model, inputs, expected = generator
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    how = {"prompt_lookup_num_tokens": 3}
    if draft == "model":
        how = {"assistant_model": perturbed(copy.deepcopy(model), 0.02)}
    assert torch.equal(model.generate(**one, **GREEDY, **how), expected[:1])


def test_goes_on_from_a_cache(generator):
    model, inputs, expected = generator
    begun = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    going_on = {"input_ids": begun.sequences, "attention_mask": torch.ones_like(begun.sequences)}
    rest = model.generate(**going_on, past_key_values=begun.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(rest, expected)


def test_from_embeddings_with_pictures(generator):
    model, inputs, expected = generator
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    assert torch.equal(model.generate(**embedded, **GREEDY), expected)
    del embedded["input_ids"]
    assert torch.equal(model.generate(**embedded, **GREEDY), expected[:, inputs["input_ids"].shape[1] :])


def test_padding_on_the_left(generator):
    model, inputs, expected = generator
    rows = inputs["input_ids"].shape[0]
    padded = {
        **inputs,
        "input_ids": torch.cat([torch.zeros(rows, 5, dtype=torch.long), inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.zeros(rows, 5, dtype=torch.long), inputs["attention_mask"]], dim=1),
    }
    assert torch.equal(model.generate(**padded, **GREEDY)[:, 5:], expected)


def test_what_generate_returns(generator):
    model, inputs, expected = generator
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    wanted = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
    output = eager.generate(**inputs, **GREEDY, **dict.fromkeys(wanted, True))
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences, expected)
    assert len(output.attentions) == len(output.hidden_states) == len(output.scores) == len(output.logits) == 8
    assert output.attentions[0][0].shape[-2:] == (length, length)
    assert output.attentions[1][0].shape[-2:] == (1, length + 1)


def test_beams(generator):
    model, inputs, _ = generator
    beams = {"num_beams": 3, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(**inputs, **beams, do_sample=False)
    scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    torch.testing.assert_close(scores.sum(dim=1) / 5, found.sequences_scores)
    sampled = model.generate(**inputs, **beams, do_sample=True, num_return_sequences=2)
    assert sampled.sequences.shape == (6, inputs["input_ids"].shape[1] + 5)


def test_a_mask_of_what_each_token_sees(generator):
    model, inputs, _ = generator
    rows, length = inputs["input_ids"].shape
    mask = torch.full((rows, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        torch.testing.assert_close(model(**{**inputs, "attention_mask": mask}).logits, model(**inputs).logits)
