# SPDX-License-Identifier: Apache-2.0
"""What to change where a stage does not fit: the first way of training, of what costs least first, that does."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from .plans import Way


if TYPE_CHECKING:
    from .plans import Plan


def advice(asked: Way, planned: "Callable[[Way], Plan]", devices: int, adapters: bool) -> list[str]:
    """Returns what to change.

    Args:
        asked (`Way`): What does not fit.
        planned (`Callable`): Plans a way.
        devices (`int`): How many there are.
        adapters (`bool`): Whether adapters are trained already.
    """
    can_share = devices > 1 and asked.strategy != "zero3"
    for strategy in (asked.strategy, *(["zero3"] if can_share else [])):
        for way in _smaller(replace(asked, strategy=strategy, gradient_checkpointing=True)):
            plan = planned(way)
            if plan.fits:
                return list(_changes(asked, way))
            if not plan.fits_without_batch:
                break
    more = ["use more devices with strategy zero3, or devices with more memory", "give rows fewer tokens (max_length)"]
    return more if adapters else ["train adapters instead of the weights (lora)", *more]


def _smaller(way: Way) -> Iterator[Way]:
    """Yields a way, and those with half the rows at once, down to one; the optimizer steps after as many as before."""
    rows = way.batch_size * way.accumulation
    while True:
        yield way
        if way.batch_size == 1:
            return
        batch_size = way.batch_size // 2
        way = replace(way, batch_size=batch_size, accumulation=-(-rows // batch_size))


def _changes(asked: Way, way: Way) -> Iterator[str]:
    if way.strategy != asked.strategy:
        yield f"share the parameters out (strategy {way.strategy})"
    if way.gradient_checkpointing != asked.gradient_checkpointing:
        yield "compute activations anew (gradient_checkpointing: true)"
    if way.batch_size != asked.batch_size:
        yield f"per_device_train_batch_size: {way.batch_size}, gradient_accumulation_steps: {way.accumulation}"


__all__ = ["advice"]
