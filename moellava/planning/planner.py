# SPDX-License-Identifier: Apache-2.0
"""How a stage of training spreads over devices, what each of them needs, and how long a step takes."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..building.dense_to_sparse import upcycled_config
from ..configuration import MoellavaConfig
from ..configuration.config_base_moellava import known_names
from ..inspecting.checkpoint import own_code
from ..reading.language_model import context_length
from ..reading.sources import Source
from ..training.recipe import LoraRecipe, Stage
from .advice import advice
from .plans import Memory, Plan, Way
from .rehearsal import Batch, Rehearsal, rehearse


# The peak in bf16 without sparsity, in operations per second, by NVIDIA's data sheets (the SXM modules). That of
# float32 as TF32 is half of it.
GPUS = {"A100": 312e12, "H100": 989e12}
# What is installed here, and whether there is a GPU, says nothing about where training will be.
_ANYWHERE = {"report_to": "none", "use_cpu": True}

STRATEGIES = {
    "replicated": "every device holds the whole model (DDP)",
    "zero2": "all is shared out, and the passes have a whole copy of the weights (FSDP's SHARD_GRAD_OP)",
    "zero3": "of that copy, a device has a few layers at a time (FSDP's FULL_SHARD)",
}

_MEMORY = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def plan(
    checkpoint: MoellavaConfig | str | os.PathLike,
    *,
    stage: str = "instruct",
    devices: int = 1,
    memory: int | str | None = None,
    strategy: str = "replicated",
    batch_size: int | None = None,
    accumulation: int | None = None,
    max_length: int | None = None,
    text_tokens: int | None = None,
    images: int = 1,
    gradient_checkpointing: bool = True,
    dtype: str = "float32",
    mixed_precision: bool = True,
    lora_rank: int | None = None,
    moe: Mapping[str, Any] | None = None,
    rows: int | None = None,
    gpu: str = "A100",
    utilization: float = 0.4,
    **hub_options,
) -> Plan:
    """Tells what a stage of training takes: memory per device, by kind, and time.

    One step is rehearsed on tensors without storage; no weight is read. What is not given is as `train` has it.

    Args:
        checkpoint (`MoellavaConfig`, `str` or `os.PathLike`): A checkpoint, a folder or a Hub id, or a config.
        stage (`str`, *optional*, defaults to `"instruct"`): `"align"`, `"instruct"`, or `"moe"`, for which a dense
            model is upcycled.
        devices (`int`, *optional*, defaults to 1): How many devices train together.
        memory (`int` or `str`, *optional*): What one of them has, in bytes, or such as `"80GB"` or `"80GiB"`.
        strategy (`str`, *optional*, defaults to `"replicated"`): How they share the model: `"replicated"`, `"zero2"`
            (weights, gradients and the optimiser's state are shared out, and a whole copy of the weights is computed
            with) or `"zero3"` (which gathers that copy layer by layer).
        batch_size (`int`, *optional*): The rows that one device gets at once.
        accumulation (`int`, *optional*): After how many of these the optimizer takes a step.
        max_length (`int`, *optional*): The tokens that a row has at most.
        text_tokens (`int`, *optional*): The tokens of a row beside those of its pictures; by default a row is as long
            as it may be.
        images (`int`, *optional*, defaults to 1): The pictures of a row.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether activations are computed anew.
        dtype (`str`, *optional*, defaults to `"float32"`): What the weights are held in.
        mixed_precision (`bool`, *optional*, defaults to `True`): Whether float32 weights are computed with in bfloat16.
        lora_rank (`int`, *optional*): Train adapters of this rank instead of the weights.
        moe (`Mapping`, *optional*): Fields of the mixture that a dense model becomes in the stage `"moe"`.
        rows (`int`, *optional*): How many rows the data has.
        gpu (`str`, *optional*, defaults to `"A100"`): Whose peak the time is reckoned by: `"A100"` or `"H100"`.
        utilization (`float`, *optional*, defaults to 0.4): Which share of the peak is reached. It is an assumption.
        hub_options: `revision`, `token`, ... as in transformers' `from_pretrained`.

    Raises:
        FileNotFoundError: A path that does not exist.
        ImportError: `lora_rank` is given, and PEFT is not installed.
        OSError: A Hub repository that cannot be read.
        ValueError: A model of another kind, one with code of its own or with quantised weights, or a value that is
            wrong.

    Example:

    ```python
    >>> from moellava import plan

    >>> needed = plan("my-model", stage="instruct", devices=8, memory="80GB", strategy="zero3")
    >>> needed.memory.total, needed.fits
    ```"""
    available = None if memory is None else read_memory(memory)
    _check_choice("strategy", strategy, STRATEGIES)
    _check_choice("gpu", gpu, GPUS)
    _check_choice("dtype", dtype, ("float32", "bfloat16"))
    counts = {"devices": devices, "batch_size": batch_size, "accumulation": accumulation, "rows": rows}
    _check_counts(counts | {"max_length": max_length, "lora_rank": lora_rank}, at_least=1)
    _check_counts({"images": images, "text_tokens": text_tokens}, at_least=0)
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}; expected a share above 0, and at most 1.")
    name, config = _config(checkpoint, hub_options)
    recipe = Stage(stage=stage, data=name, moe=None if moe is None else dict(moe), arguments=_ANYWHERE)
    if stage == "moe" and config.moe_config is None:
        config = upcycled_config(config, _without_router(recipe.moe or {}))
    elif recipe.moe:
        raise ValueError("moe is given, but the model is sparse already. Leave it out, or give the dense model.")
    arguments = recipe.training_arguments(Path())
    asked = Way(
        strategy=strategy,
        batch_size=batch_size or arguments.per_device_train_batch_size,
        accumulation=accumulation or arguments.gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
    )
    length = _length(config, max_length or recipe.max_length, text_tokens, images)
    mixed = mixed_precision and dtype == "float32"
    itemsize = 2 if mixed or dtype == "bfloat16" else 4  # of what is computed in
    peak = GPUS[gpu] * 2 / itemsize
    rehearsed = functools.partial(_rehearsed, json.dumps(config.to_dict(), sort_keys=True), stage, dtype, lora_rank)

    def planned(way: Way) -> Plan:
        one = rehearsed(Batch(way.batch_size, length, images), way.gradient_checkpointing, mixed)
        # The load-balancing loss of a batch in parts takes one more forward pass of each.
        in_parts = way.accumulation * devices > 1
        flops = way.accumulation * (one.flops + (one.counting_flops if in_parts else 0))
        seconds = flops / (peak * utilization)
        steps = None if rows is None else rows / (way.batch_size * way.accumulation * devices)
        return Plan(
            checkpoint=name,
            stage=stage,
            devices=devices,
            **dataclasses.asdict(way),
            length=length,
            images=images,
            dtype=dtype,
            mixed_precision="bfloat16" if mixed else None,
            parts=one.parts,
            memory=_spread(one, way.strategy, devices, itemsize),
            available=available,
            flops=flops * devices,
            seconds_per_step=seconds,
            hours=None if steps is None else steps * seconds / 3600,
            advice=[],
        )

    wanted = planned(asked)
    if wanted.fits is not False:
        return wanted
    return dataclasses.replace(wanted, advice=advice(asked, planned, devices, adapters=lora_rank is not None))


def _spread(one: Rehearsal, strategy: str, devices: int, itemsize: int) -> Memory:
    """Returns what one of several devices needs, from what a single one does.

    Args:
        one (`Rehearsal`): What a device that holds the whole model needs.
        strategy (`str`): How they share it.
        devices (`int`): How many there are.
        itemsize (`int`): Bytes of a parameter in the dtype that is computed in.
    """
    copies, shared = one.copies, devices
    if devices == 1:
        communication, shared = 0, 1
    elif strategy == "replicated":
        communication, shared = one.gradients, 1  # DDP's buckets are beside the gradients
    else:
        # What is gathered takes the place of the copies that mixed precision makes.
        copies, total = 0, sum(part["parameters"] for part in one.parts.values())
        gathered = total if strategy == "zero2" else min(total, one.outside_layers + 2 * one.layer)
        communication = gathered * itemsize
    return Memory(
        parameters=-(-one.parameters // shared),
        gradients=-(-one.gradients // shared),
        optimizer=-(-one.optimizer // shared),
        activations=one.activations,
        copies=copies,
        working=one.working,
        communication=communication,
    )


@functools.lru_cache(maxsize=32)
def _rehearsed(
    config: str, stage: str, dtype: str, lora_rank: int | None, batch: Batch, checkpoints: bool, mixed: bool
) -> Rehearsal:
    """Rehearses each step once: plans that differ in devices alone have it in common."""
    lora = lora_rank and LoraRecipe(r=lora_rank)
    recipe = Stage(stage=stage, data="", dtype=dtype, lora=lora)
    return rehearse(MoellavaConfig.from_dict(json.loads(config)), recipe, batch, checkpoints, mixed)


def _config(checkpoint: MoellavaConfig | str | os.PathLike, hub_options: dict[str, Any]) -> tuple[str, MoellavaConfig]:
    if isinstance(checkpoint, MoellavaConfig):
        return checkpoint.name_or_path or "a config", checkpoint
    source = Source(checkpoint, hub_options)
    fields = source.config_dict()
    if fields.get("model_type") != MoellavaConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {fields.get('model_type')!r}, not a checkpoint of this package (type "
            f"{MoellavaConfig.model_type!r}). A language model becomes one by `moellava assemble`."
        )
    if own := own_code(fields):
        raise ValueError(
            f"{source} has parts of its author's own ({', '.join(own)}), whose code a rehearsal would have to run. "
            "Import the code that registers them, and give the config in Python."
        )
    if fields.get("quantization_config") is not None:
        raise ValueError(
            f"The weights of {source} are quantised, which is not planned for. Give the model that it is of."
        )
    return source.name, MoellavaConfig.from_dict(dict(fields))


def _length(config: MoellavaConfig, max_length: int, text_tokens: int | None, images: int) -> int:
    longest, pictures = min(max_length, context_length(config.text_config)), images * config.image_seq_length
    length = longest if text_tokens is None else pictures + text_tokens
    if not max(pictures, 1) <= length <= longest:
        raise ValueError(
            f"A row of {images} pictures of {config.image_seq_length} tokens and {text_tokens or 0} tokens of text "
            f"does not go with at most {longest} tokens. Give fewer of them, or another max_length."
        )
    return length


def read_memory(memory: int | float | str) -> int:
    """Returns a size in bytes: a number, or a text such as `"80GB"` (80 * 10^9) or `"80GiB"` (80 * 2^30).

    Raises:
        ValueError: It is something else.
    """
    match = _MEMORY.fullmatch(str(memory).strip())
    size = 0
    if match:
        unit = match[2] or ""
        base = 1024 if unit.endswith("i") else 1000
        size = int(float(match[1]) * base ** _POWERS.get(unit[:1].upper(), 0))
    if size < 1:
        raise ValueError(f"memory is {memory!r}; expected a size such as 80GB, 80GiB or a number of bytes.")
    return size


def _without_router(moe: Mapping[str, Any]) -> dict[str, Any]:
    # Routers from a file are as large as new ones.
    return {name: value for name, value in moe.items() if name != "router_path"}


def _check_counts(counts: Mapping[str, int | None], at_least: int) -> None:
    for name, value in counts.items():
        if value is not None and value < at_least:
            raise ValueError(f"{name} is {value}; expected at least {at_least}.")


def _check_choice(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}{known_names(value, known)}")


__all__ = ["GPUS", "STRATEGIES", "plan", "read_memory"]
