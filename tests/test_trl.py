# SPDX-License-Identifier: Apache-2.0
"""TRL: the router loss and its weight in SFT and DPO, and what its assistant-only loss learns."""

import json
from pathlib import Path

import jinja2
import pytest
import torch
from parts import CHAT_TEMPLATES, picture
from transformers.utils.chat_template_utils import render_jinja_template

from moellava import load_pretrained_model
from moellava.chatting.chat_templates import VICUNA_CHAT_TEMPLATE, multimodal_chat_template
from moellava.converting.conversations import _TEXT_TEMPLATES, conversation_for
from moellava.training.encoding import Encoder
from moellava.training.rows import open_data


trl = pytest.importorskip("trl", reason="tests TRL's trainers")
datasets = pytest.importorskip("datasets", reason="TRL's data are its datasets")

# TRL's own: it calls transformers' older names, of its fields and of the methods of any model.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`gradient_checkpointing(_enable|_disable)?` is deprecated:FutureWarning"
)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "dense", "router_aux_loss_coef": 0.5}
QUESTION = {"role": "user", "content": "Which one?"}


def model_of(parts, family):
    torch.manual_seed(0)
    source = {"model_path": parts.language_model(family), "vision_tower": parts.vision_tower("clip")}
    natively = family in ("mixtral", "qwen2_moe")
    return load_pretrained_model(
        source, device="cpu", dtype="float32", **({} if natively else {"moe_config": MOE})
    ).model  # fmt: skip


def first_log(parts, family, method, folder, **arguments):
    model = model_of(parts, family)
    arguments = {
        "max_steps": 1, "per_device_train_batch_size": 3, "logging_steps": 1, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None, **arguments,
    }  # fmt: skip
    answers = [{"role": "assistant", "content": text} for text in ("Three birds.", "One.")]
    if method == "sft":
        rows = [{"messages": [QUESTION, answers[0]], "images": [picture(number)]} for number in range(3)]
        make, options = trl.SFTTrainer, {"args": trl.SFTConfig(str(folder), **arguments)}
    else:
        rows = [
            {"prompt": [QUESTION], "chosen": answers[:1], "rejected": answers[1:], "images": [picture(number)]}
            for number in range(3)
        ]
        make = trl.DPOTrainer
        options = {"args": trl.DPOConfig(str(folder), **arguments), "ref_model": model_of(parts, family)}
    trainer = make(
        model, train_dataset=datasets.Dataset.from_list(rows), processing_class=model.processor, **options
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("family", ["llama", "phi", "mixtral", "qwen2_moe"])
def test_the_router_loss_is_in_the_loss(parts, tmp_path, family, method):
    """Upcycled, of an activation that serving engines take for their own and of another; and natively sparse."""
    without = first_log(parts, family, method, tmp_path, router_aux_loss_coef=0.0)
    assert "aux_loss" not in without
    for coefficient in (1.0, 3.0):
        log = first_log(parts, family, method, tmp_path, router_aux_loss_coef=coefficient)
        assert log["aux_loss"] > 1
        assert log["loss"] - without["loss"] == pytest.approx(coefficient * log["aux_loss"], rel=1e-4)


def test_the_models_own_weight_is_the_default(parts, tmp_path):
    without = first_log(parts, "llama", "sft", tmp_path, router_aux_loss_coef=0.0)
    log = first_log(parts, "llama", "sft", tmp_path)
    assert log["loss"] - without["loss"] == pytest.approx(0.5 * log["aux_loss"], rel=1e-4)


def test_what_trl_is_told_is_not_saved(parts, tmp_path):
    model = model_of(parts, "phi")
    model.config.moe_config.router_aux_loss_coef = 0.25  # later than the model is made
    text = model.config.get_text_config()
    assert (text.router_aux_loss_coef, text.output_router_logits, text.num_experts) == (0.25, False, 4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not {"router_aux_loss_coef", "output_router_logits", "num_experts"} & saved["text_config"].keys()
    assert saved["moe_config"]["router_aux_loss_coef"] == 0.25
    dense = load_pretrained_model(
        {"model_path": parts.language_model("phi"), "vision_tower": parts.vision_tower("clip")}, device="cpu"
    ).model
    assert not hasattr(dense.config.get_text_config(), "output_router_logits")


# ---------------------------------------------------------------------------------------------------------------------
# What is learnt
# ---------------------------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one turn": [QUESTION, {"role": "assistant", "content": "Three birds."}],
    "three turns": [
        QUESTION,
        {"role": "assistant", "content": "Three birds."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes: sure."},
        {"role": "user", "content": "Three birds.?"},
        {"role": "assistant", "content": "Three birds."},
    ],
    "a system's text": [
        {"role": "system", "content": "Be short."},
        QUESTION,
        {"role": "assistant", "content": "One\nof two."},
    ],
}


def labels_of(trainer, row):
    batch = trainer.data_collator([row])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def check_learnt(model, tmp_path, conversation):
    """By the call that docs/training.md shows."""
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=None,
        assistant_only_loss=True,
    )
    rows = [{"messages": conversation, "images": [picture(0)]}]
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=model.processor
    )
    input_ids, labels = labels_of(trainer, rows[0])
    tokenizer = model.processor.tokenizer
    learnt = [token for token in labels if token != -100]
    assert learnt and model.config.image_token_id in input_ids and model.config.image_token_id not in learnt
    assert [label for label, token in zip(labels, input_ids, strict=True) if label not in (-100, token)] == []
    answers = "".join(message["content"] for message in conversation if message["role"] == "assistant")
    text = tokenizer.decode(learnt, skip_special_tokens=True).replace("<|im_end|>", "")
    assert "".join(text.split()) == "".join(answers.split())
    (row,) = open_data(rows, None)
    ours = Encoder(model.processor).encode(row)
    return [token for token in ours.labels if token != -100], learnt, tokenizer


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [None, "chatml", "turns"])
def test_answers_alone_are_learnt(parts, tmp_path, template, conversation):
    folder = parts.language_model("llama", tokenizer={"chat_template": template})
    torch.manual_seed(0)
    model = load_pretrained_model(
        {"model_path": folder, "vision_tower": parts.vision_tower("clip")}, device="cpu"
    ).model
    ours, learnt, tokenizer = check_learnt(model, tmp_path, CONVERSATIONS[conversation])
    if template != "chatml":  # its end of a turn is no token of this tokenizer's
        assert "".join(tokenizer.decode(learnt).split()) == "".join(tokenizer.decode(ours).split())


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_answers_of_a_published_language_model(smollm2, parts, tmp_path, conversation):
    model = load_pretrained_model(
        {"model_path": smollm2, "vision_tower": parts.vision_tower("clip")}, device="cpu"
    ).model
    ours, learnt, tokenizer = check_learnt(model, tmp_path, CONVERSATIONS[conversation])
    assert learnt == ours
    assert learnt[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_without_assistant_only_loss_everything_is_learnt(parts, tmp_path):
    """TRL's default, which docs/training.md warns of."""
    model = model_of(parts, "llama")
    arguments = trl.SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", max_length=None)
    rows = [{"messages": CONVERSATIONS["one turn"], "images": [picture(0)]}]
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=model.processor
    )
    assert -100 not in labels_of(trainer, rows[0])[1]


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------


def rendered(template, messages, **options):
    return render_jinja_template(
        [messages],
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        return_assistant_tokens_mask=True,
        **options,
    )


PUBLISHED = sorted(
    path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "_training" not in path.name
)


@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, *(path.stem for path in PUBLISHED)])
def test_published_templates_render_as_before_and_mark_answers(name):
    own = CHAT_TEMPLATES.get(name) or next(p for p in PUBLISHED if p.stem == name).read_text(encoding="utf-8")
    try:
        template = multimodal_chat_template(own)
    except ValueError:
        pytest.skip("a template that cannot be adapted")
    assert multimodal_chat_template(template) == template
    compared = 0
    for messages in CONVERSATIONS.values():
        for options in ({}, {"add_generation_prompt": True}):
            asked = messages[:-1] if options else messages
            try:
                (alone,), _ = rendered(own, asked, **options)
            except (jinja2.TemplateError, TypeError):
                continue  # which this template does not take
            (text,), (marks,) = rendered(template, asked, **options)
            assert text == alone
            compared += 1
            if not options and template != own and "multimodal_marks" in template:
                marked = [text[start:end].strip() for start, end in marks]
                answers = [message["content"] for message in messages if message["role"] == "assistant"]
                # Where a template rewrites its history, as those that think do, it is the last answer.
                assert marked and len(marked) in (1, len(answers))
                assert all(answer in mark for mark, answer in zip(marked[::-1], answers[::-1], strict=False))
                assert not any("assistant" in mark for mark in marked)
    assert compared or "{%" not in own or template == own


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["vicuna", *_TEXT_TEMPLATES])
def test_our_own_templates_mark_answers(name, conversation):
    template = VICUNA_CHAT_TEMPLATE if name == "vicuna" else conversation_for("llama", version=name).chat_template
    messages = CONVERSATIONS[conversation]
    (text,), (marks,) = rendered(template, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(marks) == len(answers)
    for (start, end), answer in zip(marks, answers, strict=True):
        assert text[start:end].strip().startswith(answer.strip())
        assert not text[start:end].strip().startswith(("ASSISTANT", "assistant"))
