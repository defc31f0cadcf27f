# SPDX-License-Identifier: Apache-2.0
"""Where a model goes, and what it is quantised with."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig


# What a device_map may say beside devices: transformers' ways of spreading a model, and where it may be put off to.
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


def placement_of(device: Any, device_map: Any) -> Any:
    """Returns the `device_map` for `from_pretrained`, of which every device is there."""
    if device_map is not None:
        if device is not None:
            raise ValueError(f"device is {str(device)!r} and device_map is {device_map!r}; give one of the two.")
        for place in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
            if place not in _PLACEMENTS:
                _device("device_map", place)
        return device_map
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return {"": accelerator or torch.device("cpu")}
    return {"": _device("device", device)}


def _device(argument: str, given: Any) -> torch.device:
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        placements = f", or one of {', '.join(_PLACEMENTS)}" if argument == "device_map" else ""
        raise ValueError(
            f"{argument} is {given!r}, which is no device. Expected such as 'cpu', 'cuda' or 'cuda:0'{placements}."
        ) from error
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type)
    if available is not None and not available():
        raise ValueError(
            f"{argument} is {given!r}, but this machine has no {device.type.upper()} device that PyTorch can use. Use "
            f"{argument}='cpu', or leave it out to get the best device there is."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{argument} is {given!r}, but this machine has {torch.cuda.device_count()} CUDA device(s), counted from 0."
        )
    return device


def quantization_of(options: dict[str, Any]) -> Any:
    """Returns the `quantization_config` for `from_pretrained`, or `None`; `load_8bit` and `load_4bit` are one too."""
    if not options["load_4bit"] and not options["load_8bit"]:
        return options["quantization_config"]
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"{'load_4bit' if options['load_4bit'] else 'load_8bit'} needs bitsandbytes, which is not installed: "
            "`pip install moellava[quantized]`."
        ) from error
    if options["load_8bit"]:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options["dtype"] or torch.bfloat16,
    )


__all__ = ["placement_of", "quantization_of"]
