# SPDX-License-Identifier: Apache-2.0
"""`moellava plan`: what training a model takes, in memory and time."""

import enum
from typing import Annotated, Any

import typer

from .options import Checkpoint, Debug, Hub, Json, MoeField, named_values
from .printing import print_json, print_plan


class StageName(enum.StrEnum):
    """The stages of a recipe."""

    ALIGN = "align"
    INSTRUCT = "instruct"
    MOE = "moe"


class Strategy(enum.StrEnum):
    """How devices share a model."""

    REPLICATED = "replicated"
    ZERO2 = "zero2"
    ZERO3 = "zero3"


class Weights(enum.StrEnum):
    """What weights are held in while they are trained."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def plan(
    checkpoint: Checkpoint,
    *,
    stage: Annotated[StageName, typer.Option(help="What is trained.")] = StageName.INSTRUCT,
    devices: Annotated[int, typer.Option(min=1, help="How many devices train together.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="What one of them has, such as 80GB or 80GiB.", show_default=False)
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option(help="zero2 shares all out and gathers the weights as a whole, zero3 layer by layer.")
    ] = Strategy.REPLICATED,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a device at once; by default the stage's.", show_default=False)
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(min=1, help="Such batches in a step; by default the stage's.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row at most; by default 2048.", show_default=False)
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Tokens of a row beside its pictures'; by default as many as may be.", show_default=False
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Pictures of a row.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations anew in the backward pass.")] = True,
    dtype: Annotated[Weights, typer.Option(help="What the weights are held in.")] = Weights.FLOAT32,
    mixed_precision: Annotated[bool, typer.Option(help="Compute in bfloat16 with weights in float32.")] = True,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank instead.", show_default=False)
    ] = None,
    moe_field: MoeField = None,
    rows: Annotated[int | None, typer.Option(min=1, help="How many rows the data has.", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="Whose peak the time is reckoned by: A100 or H100.")] = "A100",
    utilization: Annotated[float, typer.Option(help="The share of the peak that is assumed to be reached.")] = 0.4,
    hub: Hub,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what training a model takes, in memory and time.

    Only its config is read: a step is rehearsed on tensors without storage, which takes some seconds.

    Examples:

    ```
    moellava plan my-model --devices 8 --memory 80GB
    moellava plan my-model --stage moe --moe-field num_experts=4 --devices 8 --memory 80GB --strategy zero3
    ```
    """
    from ..planning import PlanRequest
    from ..planning import plan as make_plan

    asked: dict[str, Any] = {
        "stage": stage.value, "devices": devices, "memory": memory, "strategy": strategy.value,
        "batch_size": batch_size, "accumulation": accumulation, "max_length": max_length, "text_tokens": text_tokens,
        "images": images, "gradient_checkpointing": gradient_checkpointing, "dtype": dtype.value,
        "mixed_precision": mixed_precision, "lora_rank": lora_rank,
        "moe": named_values(moe_field, "--moe-field") or None, "rows": rows, "gpu": gpu, "utilization": utilization,
    }  # fmt: skip
    planned = make_plan(checkpoint, PlanRequest(**asked), **hub.options())
    if as_json:
        print_json(planned.to_dict())
    else:
        print_plan(planned)


__all__ = ["plan"]
