# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of natively sparse language models, in this package's trainer, against their own classes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from moellava import load_pretrained_model
from moellava.training.trainer import MoellavaTrainer


IDS = torch.tensor([[5, 9, 14, 30, 41, 7], [3, 3, 8, 21, 2, 11]])


def losses(parts, family, tmp_path, **overrides):
    """The loss of a training step, and what the family's class has as its load-balancing loss, weighted."""
    folder = parts.language_model(family, overrides=overrides)
    model = load_pretrained_model(folder, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    trainer = MoellavaTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    loss = trainer.compute_loss(model.train(), dict(inputs))
    own = AutoModelForCausalLM.from_pretrained(folder)
    plain, whole = (own.train()(**inputs, output_router_logits=asked).loss for asked in (False, True))
    with torch.no_grad():
        bare = model(**inputs, output_router_logits=False).loss
    return loss, bare, whole - plain, model


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_it_is_asked_for_in_training(parts, family, tmp_path):
    loss, bare, expected, model = losses(parts, family, tmp_path, router_aux_loss_coef=0.5)
    assert not model.config.text_config.output_router_logits and expected > 0.1
    torch.testing.assert_close(loss - bare, expected, rtol=0, atol=1e-5)
    loss.backward()
    gates = [weight for name, weight in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates and all(weight.grad.abs().max() > 0 for weight in gates)
    asked = model.eval()(input_ids=IDS, labels=IDS)
    assert asked.router_logits is None  # of the trainer alone


def test_a_weight_of_nothing_leaves_it_out(parts, tmp_path):
    loss, bare, _, _ = losses(parts, "mixtral", tmp_path, router_aux_loss_coef=0.0)
    assert torch.equal(loss, bare)
