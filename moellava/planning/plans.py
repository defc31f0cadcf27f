# SPDX-License-Identifier: Apache-2.0
"""What planning tells: what one device needs, what a stage takes, and what may be chosen freely."""

import dataclasses
from dataclasses import dataclass
from typing import Any


# What is left for the CUDA context, the communication's buffers and what the allocator wastes.
HEADROOM = 0.1


@dataclass(frozen=True)
class Memory:
    """What one device needs, in bytes.

    Attributes:
        parameters (`int`): The parameters and buffers that it holds all the time.
        gradients (`int`): The gradients of what is trained.
        optimizer (`int`): AdamW's state.
        activations (`int`): What the forward pass keeps for the backward pass.
        copies (`int`): Weights in the dtype that is computed in, kept meanwhile.
        working (`int`): What else there is at the highest point of a step: logits, a layer that is computed anew, the
            gradient that is being made.
        communication (`int`): The buckets in which replicas exchange gradients; or the parameters that are gathered.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    copies: int
    working: int
    communication: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """What a stage takes; [`plan`] returns it.

    Attributes:
        checkpoint (`str`): What is trained.
        stage (`str`): The stage.
        devices (`int`): How many devices there are.
        strategy (`str`): How the model is spread over them.
        batch_size (`int`): The rows that one device gets at once.
        accumulation (`int`): After how many of these the optimizer takes a step.
        length (`int`): The tokens of a row, those of its pictures among them.
        images (`int`): The pictures of a row.
        gradient_checkpointing (`bool`): Whether activations are computed anew in the backward pass.
        dtype (`str`): What the weights are held in.
        mixed_precision (`str`, *optional*): What is computed in, where it is something else.
        parts (`dict`): Of every part, how many parameters it has and how many are trained.
        memory (`Memory`): What one device needs.
        available (`int`, *optional*): What one device has, in bytes.
        flops (`int`): Floating-point operations of one step of the optimizer, on all devices.
        seconds_per_step (`float`): How long that takes.
        hours (`float`, *optional*): How long all the rows take, once.
        advice (`list[str]`): What to change where it does not fit.
    """

    checkpoint: str
    stage: str
    devices: int
    strategy: str
    batch_size: int
    accumulation: int
    length: int
    images: int
    gradient_checkpointing: bool
    dtype: str
    mixed_precision: str | None
    parts: dict[str, dict[str, int]]
    memory: Memory
    available: int | None
    flops: int
    seconds_per_step: float
    hours: float | None
    advice: list[str]

    @property
    def fits(self) -> bool | None:
        """Whether it fits, with a tenth of the memory left free; `None` where it is not known what there is."""
        return None if self.available is None else self.memory.total <= self.available * (1 - HEADROOM)

    @property
    def fits_without_batch(self) -> bool | None:
        """Whether at least that fits which is there whatever the batch: else a smaller one is no help."""
        if self.available is None:
            return None
        of_batch = self.memory.activations + self.memory.copies + self.memory.working
        return self.memory.total - of_batch <= self.available * (1 - HEADROOM)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dictionaries, lists, texts and numbers, ready for `json.dumps`."""
        told = dataclasses.asdict(self) | {"fits": self.fits}
        told["memory"]["total"] = self.memory.total
        return told


@dataclass(frozen=True)
class Way:
    """What may be chosen freely: it changes what a stage takes, and not what comes of it.

    Attributes:
        strategy (`str`): How devices share the model.
        batch_size (`int`): The rows that one device gets at once.
        accumulation (`int`): After how many of these the optimizer takes a step.
        gradient_checkpointing (`bool`): Whether activations are computed anew in the backward pass.
    """

    strategy: str
    batch_size: int
    accumulation: int
    gradient_checkpointing: bool


__all__ = ["HEADROOM", "Memory", "Plan", "Way"]
