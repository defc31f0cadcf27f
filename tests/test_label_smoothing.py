# SPDX-License-Identifier: Apache-2.0
"""Label smoothing: of the next token, and with the router loss, in this package's trainer and in the library's."""

import json
import logging

import pytest
import torch
from parts import picture
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moellava import load_pretrained_model
from moellava.training.data import Collator, Examples
from moellava.training.encoding import Encoder
from moellava.training.rows import open_data
from moellava.training.trainer import MoellavaTrainer


EPSILON = 0.2
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": [0, 1], "router_aux_loss_coef": 0.5}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of different lengths, and one without an image."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for number, answer in enumerate(("One.", "The second of the birds.", "Two.")):
        picture(number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich one?"}, {"from": "gpt", "value": answer}]
        rows.append({"image": str(folder / f"{number}.png"), "conversations": turns})
    rows.append({"conversations": [{"from": "human", "value": "Only words?"}, {"from": "gpt", "value": "Yes, only."}]})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


@pytest.fixture(scope="module")
def llava(parts):
    return parts.llava_hf()


@pytest.fixture(scope="module")
def dense(parts):
    return {"model_path": parts.language_model("llama"), "vision_tower": parts.vision_tower("clip")}


def model_of(source, **options):
    torch.manual_seed(0)
    return load_pretrained_model(source, device="cpu", dtype="float32", **options).model


def smoothed(logits, labels):
    """The loss as its paper has it, and over how many tokens it is a mean."""
    labels = labels[:, 1:].flatten()
    log_probabilities = log_softmax(logits[:, :-1].flatten(0, 1).float(), dim=-1)[labels != -100]
    labels = labels[labels != -100]
    target = (1 - EPSILON) * torch.nn.functional.one_hot(labels, logits.shape[-1]) + EPSILON / logits.shape[-1]
    return -(target * log_probabilities).sum() / len(labels), len(labels)


def trainer_for(trainer_class, model, rows, folder, processor=None, **arguments):
    fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    fixed |= {"label_smoothing_factor": EPSILON, "max_steps": 1, "per_device_train_batch_size": 4}
    fixed |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.1}
    fixed |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    processor = model.processor if processor is None else processor
    examples = Examples(open_data(rows, rows.parent), Encoder(processor))
    arguments = TrainingArguments(str(folder), **fixed | arguments)
    return trainer_class(
        model=model, args=arguments, train_dataset=examples, eval_dataset=examples, data_collator=Collator(processor)
    )


@pytest.mark.parametrize("trainer_class", [Trainer, MoellavaTrainer])
@pytest.mark.parametrize("size", [4, 2, 1])
def test_the_next_token_is_learnt(llava, rows, tmp_path, trainer_class, size):
    """The logits are those of transformers' LLaVA; its Trainer does not shift the labels for this class of its own."""
    model = model_of(llava)
    trainer = trainer_for(
        trainer_class, model, rows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size
    )
    batch = Collator(model.processor)(list(trainer.train_dataset))
    reference = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        expected, tokens = smoothed(reference(**inputs).logits, batch["labels"])
    assert tokens == (batch["labels"] != -100).sum()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_the_library_trains_it_as_the_language_model_alone(parts, rows, tmp_path, family):
    """Of text: under the same Trainer, the family's own class ends in the same weights."""
    folder = parts.language_model(family)
    model = model_of({"model_path": folder, "vision_tower": parts.vision_tower("clip")})
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    alone.resize_token_embeddings(model.config.text_config.vocab_size)  # the image's token
    alone.load_state_dict(
        {name: model.get_parameter(where(name, model)).detach().clone() for name, _ in alone.named_parameters()},
        strict=False,
    )
    (tmp_path / "text.json").write_text(json.dumps(json.loads(rows.read_text(encoding="utf-8"))[3:]), encoding="utf-8")
    losses = []
    for trained in (model, alone):
        trainer = trainer_for(Trainer, trained, tmp_path / "text.json", tmp_path, model.processor, max_steps=3)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] < losses[0][0]


def where(name, model):
    """The name of a language model's weight within ours."""
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def test_adapters_learn_the_next_token(llava, rows, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    model = model_of(llava)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trainer = trainer_for(Trainer, adapted, rows, tmp_path, model.processor)
    batch = Collator(model.processor)(list(trainer.train_dataset))
    with torch.no_grad():
        expected, _ = smoothed(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_the_router_loss_is_kept(dense, rows, tmp_path, exact):
    """In one piece and in parts, in training and in evaluation."""
    updated = []
    for size in (4, 2):
        model = model_of(dense, moe_config=MOE)
        trainer = trainer_for(
            MoellavaTrainer,
            model,
            rows,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        trainer._exact_router_loss = trainer._exact_router_loss and exact
        batch = Collator(model.processor)(list(trainer.train_dataset))
        with torch.no_grad():
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            outputs = model.eval()(**inputs, output_router_logits=True)
        expected, _ = smoothed(outputs.logits, batch["labels"])
        expected = (expected + 0.5 * outputs.aux_loss).item()
        trainer.args.per_device_eval_batch_size = 4
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        trainer.train()
        log = trainer.state.log_history[0]
        if exact or size == 4:
            assert log["loss"] == pytest.approx(expected, rel=1e-5)
            assert log["router_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-5)
        updated.append(model.state_dict())
    if exact:
        for name, tensor in updated[0].items():
            torch.testing.assert_close(updated[1][name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_hardly_smoothed_is_not_smoothed(dense, rows, tmp_path):
    """A factor of next to nothing changes next to nothing, of a natively sparse language model too."""
    logs = []
    for factor in (0.0, 1e-9):
        model = model_of(dense, moe_config=MOE)
        trainer = trainer_for(
            MoellavaTrainer, model, rows, tmp_path, label_smoothing_factor=factor, max_steps=3,
            per_device_train_batch_size=1, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


@pytest.mark.parametrize("size", [4, 2])
def test_a_natively_sparse_language_model_keeps_its_router_loss(parts, rows, tmp_path, size):
    folder = parts.language_model("mixtral", overrides={"output_router_logits": True, "router_aux_loss_coef": 0.5})
    source = {"model_path": folder, "vision_tower": parts.vision_tower("clip")}
    losses = []
    for factor in (0.0, 1e-9):
        model = model_of(source)
        trainer = trainer_for(
            MoellavaTrainer, model, rows, tmp_path, label_smoothing_factor=factor,
            per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_evaluation_with_metrics_gathers_logits_alone(dense, rows, tmp_path):
    model = model_of(dense, moe_config=MOE)
    trainer = trainer_for(MoellavaTrainer, model, rows, tmp_path)
    trainer.compute_metrics = lambda prediction: {"shape": list(prediction.predictions[0].shape)}
    plain = trainer_for(MoellavaTrainer, model, rows, tmp_path, label_smoothing_factor=0.0)
    plain.compute_metrics = trainer.compute_metrics
    assert trainer.evaluate()["eval_shape"] == plain.evaluate()["eval_shape"]


def test_a_loss_of_the_callers_own(dense, rows, tmp_path):
    """Is left alone, in parts too; the routers are logged all the same."""
    model = model_of(dense, moe_config=MOE)
    trainer = trainer_for(
        MoellavaTrainer, model, rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    fixed = {"model": model, "args": trainer.args, "train_dataset": trainer.train_dataset}
    trainer = MoellavaTrainer(
        **fixed, data_collator=trainer.data_collator,
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.mean() * 0 + 1.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 2.0 and "router_loss" in trainer.state.log_history[0]


def test_the_librarys_trainer_leaves_the_router_loss_out_and_says_so(dense, rows, tmp_path, caplog):
    model = model_of(dense, moe_config=MOE)
    with caplog.at_level(logging.WARNING):
        trainer_for(Trainer, model, rows, tmp_path).train()
    assert "the load-balancing loss of the routers is not in it. moellava's own trainer adds it" in caplog.text


def test_the_model_is_called_by_its_own_name(llava, dense):
    model = AutoModelForImageTextToText.from_pretrained(llava)
    assert repr(model).startswith("LlavaForConditionalGeneration(")
    assert repr(model_of(dense)).startswith("MoellavaForCausalLM(\n  (model): MoellavaModel(")
    assert all(isinstance(name, str) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
