# SPDX-License-Identifier: Apache-2.0
"""`convert`: an older checkpoint read, built and saved as one of ours."""

import os
from dataclasses import dataclass

import torch

from ..inspecting import inspect_checkpoint
from ..reading.sources import Source
from .legacy_checkpoint import load_legacy
from .legacy_config import OlderCheckpointError, is_legacy


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        source, out (`str`): From where to where.
        num_used (`int`): How many weights of the source have their place in the model.
        left_out, added (`dict[str, str]`): Weights of the source that have none, and of the model that the source does
            not have, with the reasons.
        notes (`list[str]`): What else is not taken over as it is, and why.
        num_parameters, num_active_parameters (`int`): In all, and those that a token meets.
    """

    source: str
    out: str
    num_used: int
    left_out: dict[str, str]
    added: dict[str, str]
    notes: list[str]
    num_parameters: int
    num_active_parameters: int


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    base: str | os.PathLike | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    **hub_options,
) -> ConversionReport:
    """Converts an older checkpoint to one of ours, which transformers loads with nothing else installed.

    Args:
        source (`str` or `os.PathLike`): A LLaVA, MoE-LLaVA or Med-MoE checkpoint, one of transformers' own LLaVA, or,
            with `base`, a LoRA adapter or a projector of one; a folder or a Hub id.
        out (`str` or `os.PathLike`): The folder to write.
        base (`str` or `os.PathLike`, *optional*): What an adapter or a projector belongs to.
        vision_tower (`str`, *optional*): A folder or Hub id, where the config names a tower that cannot be had.
        dtype (`torch.dtype` or `str`, *optional*): By default that of the weights.
        overwrite (`bool`, *optional*, defaults to `False`): Whether a folder that holds something is written to. A
            model in it is replaced as a whole, or not at all.
        max_shard_size (`int` or `str`, *optional*): The largest weight file, as `save_pretrained` takes it.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, `trust_remote_code`.

    Returns:
        [`ConversionReport`]: What was taken over, what was left out and why.

    Raises:
        FileExistsError: `out` holds something.
        FileNotFoundError, ValueError: Something is missing, damaged, or of a kind that cannot be converted; nothing has
            been written.

    Example:

    ```python
    >>> from moellava import convert

    >>> report = convert("LanguageBind/MoE-LLaVA-Phi2-2.7B-4e", "moe-llava-phi2")
    ```"""
    older = Source(source, hub_options)
    out = os.path.abspath(out)
    if older.is_local and os.path.exists(out) and os.path.samefile(older.name, out):
        raise ValueError(f"The folder to write is the source itself, {older}. Give another one.")
    if os.path.isdir(out) and os.listdir(out) and not overwrite:
        raise FileExistsError(f"The folder {out} holds something already. Give another one, or overwrite=True.")
    if base is None and not is_legacy(older.config_dict()):
        raise OlderCheckpointError(
            f"{older} is a model of type {older.config_dict()['model_type']!r}, which needs no conversion or cannot be "
            "converted. Expected a LLaVA, MoE-LLaVA or Med-MoE checkpoint."
        )
    base = None if base is None else Source(base, hub_options)
    model, converted = load_legacy(older, base, vision_tower, dtype=dtype)
    model.save_pretrained(out, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    summary = inspect_checkpoint(out)
    return ConversionReport(
        source=older.name,
        out=out,
        num_used=converted.weights.num_used,
        left_out=converted.weights.left_out,
        added=converted.weights.added,
        notes=converted.notes,
        num_parameters=summary.parameters.total,
        num_active_parameters=summary.parameters.active,
    )


__all__ = ["ConversionReport", "convert"]
