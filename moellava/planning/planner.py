# SPDX-License-Identifier: Apache-2.0
"""How a stage of training spreads over devices, what each of them needs, and how long a step takes."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..building.dense_to_sparse import upcycled_config
from ..configuration import MoellavaConfig
from ..configuration.config_base_moellava import known_names
from ..inspecting.checkpoint import unregistered_parts
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


@dataclass(frozen=True)
class PlanRequest:
    """What [`plan`] is asked; what is left out is as `train` has it.

    Attributes:
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

    Raises:
        ValueError: A value is wrong.
    """

    stage: str = "instruct"
    devices: int = 1
    memory: int | str | None = None
    strategy: str = "replicated"
    batch_size: int | None = None
    accumulation: int | None = None
    max_length: int | None = None
    text_tokens: int | None = None
    images: int = 1
    gradient_checkpointing: bool = True
    dtype: str = "float32"
    mixed_precision: bool = True
    lora_rank: int | None = None
    moe: Mapping[str, Any] | None = None
    rows: int | None = None
    gpu: str = "A100"
    utilization: float = 0.4

    def __post_init__(self):
        if self.memory is not None:
            read_memory(self.memory)
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_choice("gpu", self.gpu, GPUS)
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("devices", "batch_size", "accumulation", "rows", "max_length", "lora_rank"):
            _check_count(name, getattr(self, name), at_least=1)
        for name in ("images", "text_tokens"):
            _check_count(name, getattr(self, name), at_least=0)
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization is {self.utilization}; expected a share above 0, and at most 1.")


def plan(checkpoint: MoellavaConfig | str | os.PathLike, request: PlanRequest | None = None, **options: Any) -> Plan:
    """Tells what a stage of training takes: memory per device, by kind, and time.

    One step is rehearsed on tensors without storage; no weight is read.

    Args:
        checkpoint (`MoellavaConfig`, `str` or `os.PathLike`): A checkpoint, a folder or a Hub id, or a config.
        request (`PlanRequest`, *optional*): What is asked.
        options: Fields of [`PlanRequest`], which win over those of `request`; and `revision`, `token`, ... for the Hub,
            as in transformers' `from_pretrained`.

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
    asked = {field.name for field in dataclasses.fields(PlanRequest)} & options.keys()
    request = dataclasses.replace(request or PlanRequest(), **{name: options.pop(name) for name in asked})
    name, config = _config(checkpoint, options)
    moe = None if request.moe is None else dict(request.moe)
    recipe = Stage(stage=request.stage, data=name, moe=moe, arguments=_ANYWHERE)
    if request.stage == "moe" and config.moe_config is None:
        config = upcycled_config(config, _without_router(recipe.moe or {}))
    elif recipe.moe:
        raise ValueError("moe is given, but the model is sparse already. Leave it out, or give the dense model.")
    arguments = recipe.training_arguments(Path())
    way = Way(
        strategy=request.strategy,
        batch_size=request.batch_size or arguments.per_device_train_batch_size,
        accumulation=request.accumulation or arguments.gradient_accumulation_steps,
        gradient_checkpointing=request.gradient_checkpointing,
    )
    length = _length(config, request.max_length or recipe.max_length, request.text_tokens, request.images)
    planned = functools.partial(_planned, name, json.dumps(config.to_dict(), sort_keys=True), request, length)
    wanted = planned(way)
    if wanted.fits is not False:
        return wanted
    changes = advice(way, planned, request.devices, adapters=request.lora_rank is not None)
    return dataclasses.replace(wanted, advice=changes)


def _planned(checkpoint: str, config: str, request: PlanRequest, length: int, way: Way) -> Plan:
    """Returns what one way of training takes, of a config as JSON and rows of a length."""
    mixed = request.mixed_precision and request.dtype == "float32"
    itemsize = 2 if mixed or request.dtype == "bfloat16" else 4  # of what is computed in
    batch = Batch(way.batch_size, length, request.images)
    one = _rehearsed(config, request.stage, request.dtype, request.lora_rank, batch, way.gradient_checkpointing, mixed)
    # The load-balancing loss of a batch in parts takes one more forward pass of each.
    in_parts = way.accumulation * request.devices > 1
    flops = way.accumulation * (one.flops + (one.counting_flops if in_parts else 0))
    seconds = flops / (GPUS[request.gpu] * 2 / itemsize * request.utilization)
    steps = None if request.rows is None else request.rows / (way.batch_size * way.accumulation * request.devices)
    return Plan(
        checkpoint=checkpoint,
        stage=request.stage,
        devices=request.devices,
        **dataclasses.asdict(way),
        length=length,
        images=request.images,
        dtype=request.dtype,
        mixed_precision="bfloat16" if mixed else None,
        parts=one.parts,
        memory=_spread(one, way.strategy, request.devices, itemsize),
        available=None if request.memory is None else read_memory(request.memory),
        flops=flops * request.devices,
        seconds_per_step=seconds,
        hours=None if steps is None else steps * seconds / 3600,
        advice=[],
    )


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
    if parts := unregistered_parts(fields):
        raise ValueError(
            f"{source} has parts of its author's own ({', '.join(parts)}), whose code a rehearsal would have to run. "
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


def _check_count(name: str, value: int | None, at_least: int) -> None:
    if value is not None and value < at_least:
        raise ValueError(f"{name} is {value}; expected at least {at_least}.")


def _check_choice(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}{known_names(value, known)}")


__all__ = ["GPUS", "STRATEGIES", "PlanRequest", "plan", "read_memory"]
