# SPDX-License-Identifier: Apache-2.0
"""What users do with a loaded model: train, resize, place, quantise, compile, copy and adapt it."""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parts import MAIN_FAMILIES, checkpoint_activations, picture, pictures, run_python
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

from moellava import load_pretrained_model


PROJECTORS = {
    "mlp": {"type": "mlp"},
    "qformer": {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32, "num_hidden_layers": 2},
    "perceiver": {"type": "perceiver", "num_latents": 4, "latent_dim": 32, "num_hidden_layers": 1},
}
TOWERS = ("clip", "siglip", "dinov2", "dinov2_registers", "vit", "biomedclip")
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def assemble(parts):
    """A function: a new model of some parts, the same at every call."""

    def make(family="llama", tower="clip", projector="mlp", language_model=None, **kwargs):
        source = parts.biomedclip() if tower == "biomedclip" else parts.vision_tower(tower)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = load_pretrained_model(
                parts.language_model(family, **(language_model or {})),
                mm_vision_tower=source,
                projector_config=PROJECTORS[projector],
                **{"device": "cpu", **kwargs},
            ).model
        return model

    return make


@pytest.fixture(scope="module")
def folder(assemble, tmp_path_factory):
    """A checkpoint of CLIP, a two-layer MLP and LLaMA."""
    folder = tmp_path_factory.mktemp("runtime") / "model"
    assemble().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    """The checkpoint, loaded; not to be changed."""
    return load_pretrained_model(folder, device="cpu").model


def batch_for(model, texts=("<image> What is it?", "<image><image> How many birds are there?")):
    count = sum(text.count("<image>") for text in texts)
    return model.processor(text=list(texts), images=pictures(count) or None, padding=True, return_tensors="pt")


def labels_for(model, batch):
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == model.config.image_token_id)
    return batch["input_ids"].masked_fill(hidden, -100)


@torch.no_grad()
def logits_of(model, batch):
    """The logits of the tokens, without those of the padding, about which attention implementations differ."""
    return model(**batch).logits[batch["attention_mask"].bool()]


def gradients(model, batch):
    model.zero_grad()
    model(**batch, labels=labels_for(model, batch)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tower", "projector"),
    [
        ("llama", "clip", "mlp"),
        ("phi", "siglip", "qformer"),
        ("granite", "dinov2", "perceiver"),
        ("mixtral", "vit", "mlp"),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(assemble, family, tower, projector):
    model = assemble(family, tower, projector).train()
    batch = batch_for(model)
    runs = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: runs.append("text"))
    norm = next(module for module in model.model.language_model.layers[0].children() if "Norm" in type(module).__name__)
    norm.register_forward_pre_hook(lambda *_: runs.append("norm"))
    expected = gradients(model, batch)
    assert runs.count("norm") == 1

    checkpoint_activations(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    runs.clear()
    assert_same_gradients(gradients(model, batch), expected)
    assert runs.count("norm") == 2  # once more in the backward pass

    checkpoint_activations(model, enable=False)
    assert not model.is_gradient_checkpointing
    runs.clear()
    assert_same_gradients(gradients(model, batch), expected)
    assert runs.count("norm") == 1

    assert any(name.startswith("model.vision_tower.") for name in expected)
    assert {name for name in expected if "multi_modal_projector" in name} == {
        f"model.multi_modal_projector.{name}" for name, _ in model.model.multi_modal_projector.named_parameters()
    }


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_with_all_but_the_projector_frozen(assemble, kwargs):
    model = assemble().train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    batch = batch_for(model)
    expected = gradients(model, batch)
    assert len(expected) == 4 and all(gradient.abs().max() > 0 for gradient in expected.values())

    checkpoint_activations(model, **(kwargs or {}))
    assert_same_gradients(gradients(model, batch), expected)
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, batch), expected)


def test_gradient_checkpointing_by_its_newer_name(assemble):
    model = assemble().train()
    batch = batch_for(model)
    expected = gradients(model, batch)
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_same_gradients(gradients(model, batch), expected)
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("phi", False), ("gemma2", True)])
def test_resized_vocabulary(assemble, tmp_path, family, tied):
    model = assemble(family, language_model={"tie_word_embeddings": tied})
    assert model.config.tie_word_embeddings is model.config.text_config.tie_word_embeddings is tied
    batch, rows = batch_for(model), model.config.text_config.vocab_size
    before = logits_of(model, batch)

    model.resize_token_embeddings(rows + 7)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == rows + 7
    assert model.lm_head.out_features == model.lm_head.weight.shape[0] == rows + 7
    assert model.lm_head.bias is None or model.lm_head.bias.shape == (rows + 7,)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    after = logits_of(model, batch)
    assert after.shape[-1] == rows + 7 and torch.equal(after[:, :rows], before)
    labels = labels_for(model, batch)
    labels[:, -1] = rows + 6  # a token that there was not before
    assert model(**batch, labels=labels).loss.isfinite()

    model.save_pretrained(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(reloaded, batch), after)
    assert (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight) is tied

    reloaded.resize_token_embeddings(rows)
    assert torch.equal(logits_of(reloaded, batch), before)


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights are, and in what precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_offloading_to_disk(folder, loaded, tmp_path, share):
    limit = int(sum(parameter.nbytes for parameter in loaded.parameters()) * share)
    offloaded = load_pretrained_model(
        folder, device_map="auto", max_memory={"cpu": limit}, offload_folder=str(tmp_path / "offload")
    ).model
    assert "disk" in offloaded.hf_device_map.values()
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    batch = batch_for(loaded)
    assert torch.equal(logits_of(offloaded, batch), logits_of(loaded, batch))
    assert torch.equal(offloaded.generate(**batch, **GREEDY), loaded.generate(**batch, **GREEDY))


@pytest.mark.parametrize(("tower", "projector"), [("dinov2_registers", "qformer"), ("siglip", "perceiver")])
def test_offloading_parts_with_parameters_of_their_own(assemble, tmp_path, tower, projector):
    model = assemble("llama", tower, projector)
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    batch = batch_for(model)
    assert torch.equal(logits_of(offloaded, batch), logits_of(model, batch))


def test_device_map_by_part(folder, loaded, tmp_path):
    device_map = {
        "model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "model.language_model": "disk",
        "lm_head": "cpu",
    }  # fmt: skip
    placed = load_pretrained_model(folder, device_map=device_map, offload_folder=str(tmp_path)).model
    assert {name: str(device) for name, device in placed.hf_device_map.items()} == device_map
    assert {name for name, parameter in placed.named_parameters() if parameter.is_meta} == {
        name for name, _ in placed.named_parameters() if name.startswith(("model.multi_modal", "model.language"))
    }
    batch = batch_for(loaded)
    assert torch.equal(logits_of(placed, batch), logits_of(loaded, batch))

    everything = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(logits_of(everything, batch), logits_of(loaded, batch))


def test_bfloat16(folder, loaded, tmp_path):
    small = load_pretrained_model(folder, dtype=torch.bfloat16, device="cpu").model
    assert small.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    batch = batch_for(loaded)
    assert batch["pixel_values"].dtype == torch.float32
    logits = logits_of(small, batch)
    assert logits.dtype == torch.bfloat16
    similarity = torch.nn.functional.cosine_similarity(logits.float(), logits_of(loaded, batch), dim=-1)
    assert similarity.min() > 0.98
    assert small.generate(**batch, **GREEDY).shape == loaded.generate(**batch, **GREEDY).shape
    loss = small(**batch, labels=labels_for(small, batch)).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in small.model.multi_modal_projector.parameters())

    small.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto"),
        load_pretrained_model(tmp_path / "model", device="cpu").model,
        load_pretrained_model(tmp_path / "model", dtype="auto", device="cpu").model,
    ):
        assert again.dtype == torch.bfloat16
        assert torch.equal(logits_of(again, batch), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moved_to_another_dtype(loaded, dtype):
    model = copy.deepcopy(loaded).to(dtype)
    batch = batch_for(loaded)
    logits = logits_of(model, batch)
    assert logits.dtype == dtype
    similarity = torch.nn.functional.cosine_similarity(logits.float(), logits_of(loaded, batch), dim=-1)
    assert similarity.min() > {torch.float16: 0.999, torch.bfloat16: 0.98, torch.float64: 0.99999}[dtype]


def test_assembled_in_bfloat16(parts):
    # The parts' own dtype is kept, and one that is asked for wins.
    language_model = parts.language_model("llama", dtype=torch.bfloat16)
    tower = parts.vision_tower("clip")
    kept = load_pretrained_model(language_model, mm_vision_tower=tower, device="cpu").model
    asked = load_pretrained_model(language_model, mm_vision_tower=tower, device="cpu", dtype=torch.float32).model
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.float32}
    assert logits_of(kept, batch_for(kept)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Attention, and compilation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tower"),
    [(family, "clip") for family in (*MAIN_FAMILIES, "mixtral")] + [("llama", tower) for tower in TOWERS[1:]],
)
def test_sdpa_equals_eager_attention(assemble, tmp_path, family, tower):
    assemble(family, tower).save_pretrained(tmp_path / "model")
    logits = {}
    for implementation in ("sdpa", "eager"):
        model = load_pretrained_model(tmp_path / "model", attn_implementation=implementation, device="cpu").model
        for part in (model, model.model.vision_tower, model.model.language_model):
            assert part.config._attn_implementation == implementation
        logits[implementation] = logits_of(model, batch_for(model))
    scale = logits["eager"].abs().max().item()
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=0, atol=1e-5 * max(scale, 1))
    assert not torch.equal(logits["sdpa"], logits["eager"])  # two implementations did run


def check_compiled(assemble, family, tower, projector):
    """Compiles a model that has not run yet, and compares it with itself, on pictures and on text."""
    # Two layers, as tracing takes its time for each.
    layers = {"overrides": {"num_hidden_layers": 2}}
    model = assemble(family, tower, projector, language_model=layers, vision_feature_layer=2)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    for batch in (batch_for(model), batch_for(model, ("The sky is", "A dog"))):
        with torch.no_grad():
            logits = compiled(**batch).logits
        torch.testing.assert_close(logits, model(**batch).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "tower", "projector"),
    [
        ("llama", "clip", "mlp"),
        ("mistral", "siglip", "qformer"),
        ("phi", "dinov2", "perceiver"),
        ("qwen2", "vit", "qformer"),
        ("stablelm", "biomedclip", "perceiver"),
        ("granite", "dinov3", "mlp"),
    ],
)
def test_compiles_without_graph_breaks(assemble, family, tower, projector):
    check_compiled(assemble, family, tower, projector)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("family", "tower", "projector"),
    [("llama", tower, projector) for tower in (*TOWERS, "swin") for projector in PROJECTORS]
    + [(family, "clip", "mlp") for family in (*MAIN_FAMILIES[1:], "gemma2", "mixtral")],
)
def test_compiles_without_graph_breaks_whatever_the_parts(assemble, family, tower, projector):
    check_compiled(assemble, family, tower, projector)


def test_compiles_with_a_loss(assemble):
    model = assemble().train()
    batch = batch_for(model)
    expected = gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    model.zero_grad()
    compiled(**batch, labels=labels_for(model, batch)).loss.backward()
    assert_same_gradients(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, expected
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_to_machine_code(assemble):
    # One layer each: the compiler takes half a minute as it is.
    model = assemble(language_model={"overrides": {"num_hidden_layers": 1}}, vision_feature_layer=1)
    batch = batch_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        logits = compiled(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits, logits_of(model, batch), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Copies and threads
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tower", "projector"), [("clip", "mlp"), ("siglip", "qformer"), ("swin", "perceiver")])
def test_copies_are_independent(assemble, tower, projector):
    model = assemble("llama", tower, projector)
    batch = batch_for(model)
    before = logits_of(model, batch)
    for copied in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(logits_of(copied, batch), before)
        with torch.no_grad():
            copied.model.multi_modal_projector.apply(lambda module: [p.zero_() for p in module.parameters()])
        assert not torch.equal(logits_of(copied, batch), before)
    assert torch.equal(logits_of(model, batch), before)


def test_config_and_processor_can_be_sent_to_other_processes(loaded):
    # As data loaders do. Weights travel as a state dict: transformers' hooks for hidden states cannot be pickled.
    processor, config = pickle.loads(pickle.dumps((loaded.processor, loaded.config)))
    assert config.to_dict() == loaded.config.to_dict()
    expected = batch_for(loaded)
    batch = processor(
        text=["<image> What is it?", "<image><image> How many birds are there?"],
        images=pictures(3),
        padding=True,
        return_tensors="pt",
    )
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    model = type(loaded)(config)
    model.load_state_dict(pickle.loads(pickle.dumps(loaded.state_dict())))
    assert torch.equal(logits_of(model.eval(), batch), logits_of(loaded, batch))


def test_threads_share_a_model(loaded):
    batches = [
        batch_for(loaded, texts)
        for texts in (("<image> What is it?",), ("<image><image> How many birds?",), ("The sky is",))
    ]
    alone = [loaded.generate(**batch, max_new_tokens=16, do_sample=False) for batch in batches]
    order = [0, 1, 2, 1, 0, 2, 0, 1]
    with ThreadPoolExecutor(2) as threads:
        together = threads.map(
            lambda index: loaded.generate(**batches[index], max_new_tokens=16, do_sample=False), order
        )
        for index, tokens in zip(order, together, strict=True):
            assert torch.equal(tokens, alone[index])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def training_rows(processor, count=12):
    rows = []
    for index in range(count):
        text = f"USER: <image>\nWhich one? ASSISTANT: {('one', 'two', 'three')[index % 3]}</s>"
        inputs = processor(text=text, images=picture(index % 3), return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
        rows.append({**{name: tensor[0] for name, tensor in inputs.items()}, "labels": labels[0]})
    return rows


def collate(rows):
    """Rows of one length, as those of `training_rows` may not be, padded on the left."""
    length = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.stack(
            [torch.nn.functional.pad(row[name], (length - len(row[name]), 0), value=value) for row in rows]
        )
        for name, value in padding.items()
    }
    return {**batch, "pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def train(model, output, **kwargs):
    arguments = TrainingArguments(
        str(output), per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, **{"max_steps": 12, "save_steps": 6, **kwargs},
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=training_rows(model.processor),
        data_collator=collate,
        processing_class=model.processor,
    )
    return trainer


LOAD_TRAINED = """
import json
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = {folder!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="USER: <image>\\nWhich one? ASSISTANT:", images=Image.open({picture!r}), return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(json.dumps(dict(module=type(model).__module__, tokens=tokens.tolist())))
"""


def test_trainer(assemble, tmp_path):
    model = assemble()
    trainer = train(model, tmp_path / "run")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]

    # A checkpoint of the trainer's is a checkpoint like any other: code, processor and weights.
    checkpoint = tmp_path / "run" / "checkpoint-12"
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "moellava_entry.py", "processor_config.json", "tokenizer.json"} <= names
    assert {"optimizer.pt", "trainer_state.json"} <= names

    reloaded = load_pretrained_model(checkpoint, device="cpu").model
    batch = batch_for(model)
    assert torch.equal(logits_of(reloaded, batch), logits_of(model.eval(), batch))
    picture(1).save(tmp_path / "picture.png")
    said = json.loads(
        run_python(LOAD_TRAINED.format(folder=str(checkpoint), picture=str(tmp_path / "picture.png"))).splitlines()[-1]
    )
    inputs = model.processor(text="USER: <image>\nWhich one? ASSISTANT:", images=picture(1), return_tensors="pt")
    assert said["module"].startswith("transformers_modules.")
    assert said["tokens"] == model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()

    # Training goes on where it was left, and `save_model` writes the same.
    again = train(assemble(), tmp_path / "run", max_steps=14)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 14
    again.save_model(str(tmp_path / "final"))
    final = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert torch.equal(logits_of(final, batch), logits_of(again.model.eval(), batch))
    assert AutoProcessor.from_pretrained(tmp_path / "final").num_image_tokens == 16


def test_trainer_with_checkpointing_and_a_frozen_tower(assemble, tmp_path):
    model = assemble("llama", "siglip", "qformer")
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    frozen = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "multi_modal_projector" not in name
    }
    projector = {name: tensor.clone() for name, tensor in model.model.multi_modal_projector.named_parameters()}
    trainer = train(model, tmp_path / "run", max_steps=6, activation_checkpointing=True, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert not torch.equal(parameter, projector[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------

ADAPTED = {
    "attention and projector": {
        "target_modules": r"model\.language_model\..*\.(q_proj|v_proj)|model\.multi_modal_projector\.linear_\d"
    },
    "attention, projector in full": {
        "target_modules": r"model\.language_model\..*\.(q_proj|v_proj)",
        "modules_to_save": ["multi_modal_projector"],
    },
}


@pytest.mark.parametrize("settings", ADAPTED.values(), ids=ADAPTED)
def test_lora_adapter(folder, loaded, tmp_path, settings):
    peft = pytest.importorskip("peft")
    base = load_pretrained_model(folder, device="cpu").model
    batch, labels = batch_for(loaded), labels_for(loaded, batch_for(loaded))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = logits_of(model, batch)
    assert not torch.allclose(expected, logits_of(loaded, batch), atol=1e-2)

    merged = load_pretrained_model(tmp_path / "adapter", model_base=folder, device="cpu")
    assert type(merged.model) is type(loaded)
    torch.testing.assert_close(logits_of(merged.model, batch), expected, rtol=0, atol=1e-4)
    apart = load_pretrained_model(tmp_path / "adapter", model_base=folder, merge=False, device="cpu")
    assert isinstance(apart.model, peft.PeftModel)
    torch.testing.assert_close(logits_of(apart.model, batch), expected, rtol=0, atol=1e-6)
    assert merged.context_len == apart.context_len == 2048
    assert apart.model.processor is not None and apart.tokenizer.encode("bird") == merged.tokenizer.encode("bird")
    new = apart.model.generate(**batch, **GREEDY)
    assert torch.equal(new, merged.model.generate(**batch, **GREEDY))

    # What was merged is a model like any other.
    merged.model.save_pretrained(tmp_path / "merged")
    reloaded = load_pretrained_model(tmp_path / "merged", device="cpu").model
    assert torch.equal(logits_of(reloaded, batch), logits_of(merged.model, batch))
    assert reloaded.state_dict().keys() == loaded.state_dict().keys()


def test_lora_with_gradient_checkpointing(folder):
    peft = pytest.importorskip("peft")
    base = load_pretrained_model(folder, device="cpu").model
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    batch, labels = batch_for(base), labels_for(base, batch_for(base))

    def adapter_gradients():
        model.train().zero_grad()
        model(**batch, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    expected = adapter_gradients()
    assert any("vision_tower" in name for name in expected) and any("language_model" in name for name in expected)
    checkpoint_activations(model)
    model.enable_input_require_grads()
    assert_same_gradients(adapter_gradients(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Quantised
# ---------------------------------------------------------------------------------------------------------------------


# bitsandbytes' kernel for the CPU wants widths that are multiples of its blocks of 64.
WIDE = {"overrides": {"intermediate_size": 128}}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_quantised(assemble, tmp_path, bits):
    bnb = pytest.importorskip("bitsandbytes")
    kind = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    full = assemble(language_model=WIDE)
    full.save_pretrained(tmp_path / "full")
    batch = batch_for(full)
    expected = logits_of(full, batch)

    model = load_pretrained_model(tmp_path / "full", device="cpu", **{f"load_{bits}bit": True}).model
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linear.items():
        assert isinstance(module, kind) is name.startswith("model.language_model."), name
        assert name.startswith("model.language_model.") or module.weight.dtype == torch.float32
    parts = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head")
    assert all(any(name.startswith(part) for name in linear) for part in parts)
    similarity = torch.nn.functional.cosine_similarity(logits_of(model, batch).float(), expected, dim=-1)
    assert similarity.mean() > {4: 0.8, 8: 0.97}[bits]
    assert not torch.equal(logits_of(model, batch), expected)
    new = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape[1] == batch["input_ids"].shape[1] + 4

    model.save_pretrained(tmp_path / "small")
    again = load_pretrained_model(tmp_path / "small", device="cpu").model
    assert isinstance(again.model.language_model.layers[0].self_attn.q_proj, kind)
    torch.testing.assert_close(logits_of(again, batch), logits_of(model, batch))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_quantised_while_it_is_assembled(assemble, bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = assemble("phi", "siglip", "perceiver", **{f"load_{bits}bit": True})
    kind = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}[bits]
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj, kind)
    quantised = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert all(name.startswith("model.language_model.") for name in quantised)
    batch = batch_for(model)
    expected = logits_of(assemble("phi", "siglip", "perceiver"), batch)
    similarity = torch.nn.functional.cosine_similarity(logits_of(model, batch).float(), expected, dim=-1)
    assert similarity.mean() > {4: 0.8, 8: 0.97}[bits]
    assert model.generate(**batch, **GREEDY).shape[0] == 2


def test_quantised_in_two_ways_at_once(folder):
    with pytest.raises(ValueError, match="load_4bit and load_8bit are both set"):
        load_pretrained_model(folder, load_4bit=True, load_8bit=True)
