# SPDX-License-Identifier: Apache-2.0
"""What `plan` says against what real training steps take: every size within 2 %, mostly to the byte.

The real steps run on the CPU; PyTorch's profiler counts every allocation of its allocator.
"""

import gc
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PhiConfig

from moellava import MoellavaConfig, MoellavaForCausalLM, plan
from moellava.planning.planner import read_memory
from moellava.training.adapters import put_adapters
from moellava.training.parts import set_trained
from moellava.training.recipe import LoraRecipe


TEXT = {
    "llama": LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=3, num_attention_heads=8, vocab_size=1000
    ),
    "phi": PhiConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=6, vocab_size=1500
    ),
}
VISION = CLIPVisionConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "sparse"}
NOTHING_ELSE = [
    "use more devices with strategy zero3, or devices with more memory",
    "give rows fewer tokens (max_length)",
]


def config_of(family, **fields):
    return MoellavaConfig(
        text_config=TEXT[family].to_dict(),
        vision_config=VISION.to_dict(),
        projector_config={"type": "mlp"},
        encoder_type="clip",
        image_token_id=TEXT[family].vocab_size - 1,
        **fields,
    )


def allocated(profiled):
    """What was allocated and not freed, and the highest point between."""
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return live, peak


def measured(model, config, rows, length, checkpoints, mixed):
    """Takes a real step, and returns the bytes of what it needs."""
    if checkpoints:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(rows, length, dtype=torch.long)
    ids[:, : config.image_seq_length] = config.image_token_id
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(rows, 3, 56, 56)
    if config.moe_config is not None:
        inputs["output_router_logits"] = True  # as the Trainer asks for
    # What earlier steps left, cycles of modules and functions, is not to be counted as freed by this one.
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                outputs = model(**inputs)
            if mixed:
                outputs.logits.float()
            loss = outputs.loss
            del outputs
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
            loss.backward()
    finally:
        gc.enable()
    optimizer.step()
    kept, highest = allocated(forward)
    state = [value for states in optimizer.state.values() for value in states.values()]
    return {
        "parameters": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": sum(parameter.grad.nbytes for parameter in trained),
        "optimizer": sum(tensor.nbytes for tensor in state),
        "kept": kept,
        "peak": max(highest, kept + allocated(backward)[1]),
    }


@pytest.mark.parametrize(
    "family, stage, rows, length, checkpoints, mixed",
    [
        ("llama", "align", 3, 300, True, True),
        ("llama", "align", 3, 200, False, False),
        ("llama", "instruct", 2, 400, False, False),
        ("llama", "instruct", 2, 400, False, True),
        ("llama", "instruct", 2, 400, True, False),
        ("llama", "instruct", 2, 400, True, True),
        ("llama", "moe", 3, 200, False, False),
        ("llama", "moe", 3, 200, False, True),
        ("llama", "moe", 3, 300, True, False),
        ("llama", "moe", 3, 300, True, True),
        ("phi", "instruct", 3, 200, False, True),
        ("phi", "instruct", 3, 200, True, False),
        ("phi", "moe", 2, 300, False, False),
        ("phi", "moe", 2, 300, True, True),
    ],
)
def test_a_real_step(family, stage, rows, length, checkpoints, mixed):
    needed = plan(
        config_of(family), stage=stage, moe=MOE if stage == "moe" else None, batch_size=rows, max_length=length,
        gradient_checkpointing=checkpoints, mixed_precision=mixed,
    ).memory  # fmt: skip
    config = config_of(family, moe_config=MOE) if stage == "moe" else config_of(family)
    model = MoellavaForCausalLM._from_config(config, experts_implementation="grouped_mm")
    set_trained(model, stage, [], [])
    assert_near(needed, measured(model, config, rows, length, checkpoints, mixed))


def test_a_real_step_of_adapters():
    pytest.importorskip("peft", reason="adapters need peft")
    options = {"batch_size": 2, "max_length": 200, "gradient_checkpointing": False, "mixed_precision": False}
    needed = plan(config_of("llama"), lora_rank=8, **options)
    assert sum(part["trained"] for part in needed.parts.values()) * 4 == needed.memory.gradients
    config = config_of("llama")
    adapted, _ = put_adapters(MoellavaForCausalLM._from_config(config), LoraRecipe(r=8), False, quantised=False)
    assert_near(needed.memory, measured(adapted, config, 2, 200, False, False))


def assert_near(needed, real):
    kept = needed.activations + needed.copies
    planned = {name: getattr(needed, name) for name in ("parameters", "gradients", "optimizer")}
    planned |= {"kept": kept, "peak": kept + needed.working}
    assert planned == {name: pytest.approx(size, rel=0.02) for name, size in real.items()}


@pytest.mark.parametrize(
    "family, tower, projector",
    [("gemma2", "siglip", "qformer"), ("falcon", "dinov2", "perceiver"), ("mixtral", "vit", "pool_mlp")],
)
def test_other_parts(family, tower, projector, parts):
    """Attention without sdpa or in classes of its own, experts of the family's, towers that draw their weights."""
    vision = AutoConfig.from_pretrained(parts.vision_tower(tower))
    config = MoellavaConfig(
        text_config=AutoConfig.from_pretrained(parts.language_model(family)).to_dict(),
        vision_config=getattr(vision, "vision_config", vision).to_dict(),
        projector_config={"type": projector},
        encoder_type=tower,
        image_token_id=5,
    )
    planned = plan(config, batch_size=1, text_tokens=20, mixed_precision=False)
    assert planned.memory.parameters >= 4 * sum(part["parameters"] for part in planned.parts.values())
    assert planned.memory.activations > 0 and planned.flops > 0


def test_devices_share():
    one = plan(config_of("llama"), batch_size=1, max_length=64)
    replicated, zero2, zero3 = (
        plan(config_of("llama"), batch_size=1, max_length=64, devices=4, strategy=strategy).memory
        for strategy in ("replicated", "zero2", "zero3")
    )
    assert replicated.communication == one.memory.gradients
    assert zero2.gradients == -(-one.memory.gradients // 4)
    assert zero3.parameters == -(-one.memory.parameters // 4)
    assert zero2.communication == 2 * sum(part["parameters"] for part in one.parts.values())
    in_float32 = plan(
        config_of("llama"), batch_size=1, max_length=64, devices=4, strategy="zero2", mixed_precision=False
    )
    assert in_float32.memory.communication == 2 * zero2.communication
    assert zero3.total < zero2.total < replicated.total


@pytest.mark.parametrize(
    "options, memory, advice",
    [
        ({"gradient_checkpointing": False}, "90MB", ["compute activations anew (gradient_checkpointing: true)"]),
        ({}, "75MB", ["per_device_train_batch_size: 2, gradient_accumulation_steps: 4"]),
        ({"devices": 8}, "50MB", ["share the parameters out (strategy zero3)"]),
        ({}, "62MB", ["train adapters instead of the weights (lora)", *NOTHING_ELSE]),  # not even one row at once fits
        ({}, "50MB", ["train adapters instead of the weights (lora)", *NOTHING_ELSE]),
    ],
)
def test_what_does_not_fit_is_told_what_to_change(options, memory, advice):
    tight = plan(config_of("llama"), batch_size=4, max_length=256, memory=memory, **options)
    assert not tight.fits
    assert tight.advice == advice
    assert json.loads(json.dumps(tight.to_dict()))["advice"] == advice


def test_what_fits_needs_no_advice():
    easy = plan(config_of("llama"), batch_size=4, max_length=256, memory="1GB")
    assert easy.fits and not easy.advice
    unknown = plan(config_of("llama"), batch_size=4, max_length=256)
    assert unknown.fits is None and unknown.fits_without_batch is None


def test_time_follows_operations():
    """Six operations for a parameter and a token, eight where the forward pass is computed anew."""
    options = {"max_length": 64, "batch_size": 4, "accumulation": 1, "mixed_precision": False, "images": 0, "rows": 400}
    kept, anew = (plan(config_of("llama"), gradient_checkpointing=again, **options) for again in (False, True))
    parts = {name: part["parameters"] for name, part in kept.parts.items()}
    products = parts["language_model"] + parts["lm_head"]
    assert kept.flops == pytest.approx(6 * products * 4 * 64, rel=0.05)
    assert anew.flops == pytest.approx(kept.flops + 2 * parts["language_model"] * 4 * 64, rel=0.05)
    assert kept.seconds_per_step == pytest.approx(kept.flops / (156e12 * 0.4))
    in_bfloat16 = plan(config_of("llama"), gradient_checkpointing=False, **options | {"mixed_precision": True})
    assert in_bfloat16.seconds_per_step == pytest.approx(kept.seconds_per_step / 2, rel=0.01)
    assert kept.hours == pytest.approx(100 * kept.seconds_per_step / 3600)


def test_balancing_a_batch_in_parts_takes_another_forward_pass():
    options = {"stage": "moe", "max_length": 64, "batch_size": 2, "gradient_checkpointing": False}
    whole, parts, balanced_apart = (
        plan(config_of("llama"), moe=MOE | fields, accumulation=accumulation, **options).flops
        for accumulation, fields in ((1, {}), (2, {}), (2, {"router_aux_loss_coef": 0.0}))
    )
    assert balanced_apart == 2 * whole
    assert 1.2 < parts / balanced_apart < 1.5


def test_a_router_from_a_file_is_as_large_as_a_new_one():
    options = {"stage": "moe", "max_length": 64, "batch_size": 2}
    new, read = (plan(config_of("llama"), moe=MOE | path, **options) for path in ({}, {"router_path": "router.bin"}))
    assert read.memory == new.memory


@pytest.mark.parametrize("text, size", [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 MB", 1500000), (7, 7)])
def test_sizes(text, size):
    assert read_memory(text) == size


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory": "much"}, "memory is 'much'; expected a size such as 80GB"),
        ({"strategy": "zero4"}, "Unknown strategy 'zero4'; did you mean"),
        ({"gpu": "V100"}, "Unknown gpu 'V100'; did you mean 'H100'"),
        ({"devices": 0}, "devices is 0; expected at least 1"),
        ({"images": -1}, "images is -1; expected at least 0"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'. Known: bfloat16, float32"),
        ({"stage": "pretrain"}, "Unknown stage 'pretrain'"),
        ({"utilization": 2.0}, "utilization is 2.0; expected a share"),
        ({"text_tokens": 5000}, "does not go with at most 2048 tokens"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plan(config_of("llama"), **options)
