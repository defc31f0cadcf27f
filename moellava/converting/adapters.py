# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""LoRA adapters of older checkpoints, put onto the converted model by PEFT."""

import re
from collections.abc import Iterator
from typing import Any

import torch

from ..sources import Source, read_tensors
from .older_config import Family, OlderCheckpointError, read_older_config


_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")


def attach_adapter(model: Any, source: Source, merge: bool) -> Any:
    """Puts the LoRA adapter of an older checkpoint onto a model.

    Args:
        model (`MoellavaForCausalLM`): What the adapter's base has become.
        source (`Source`): The adapter's folder.
        merge (`bool`): Whether it is added to the weights.

    Returns:
        `MoellavaForCausalLM` with `merge`, otherwise `PeftModel`; both with the model's processor.

    Raises:
        ImportError: PEFT is not installed.
        OlderCheckpointError: The adapter names a weight that the model does not have, or has options that cannot be
            taken over.
    """
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError("A LoRA adapter needs PEFT, which is not installed: `pip install moellava[peft]`.") from error
    config = PeftConfig.from_pretrained(source.name, **source.hub_options)
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"):
        if getattr(config, name, None):
            raise OlderCheckpointError(f"The adapter of {source} uses {name}, which cannot be taken over.")
    path = next((path for name in _FILES if (path := source.find(name)) is not None), None)
    if path is None:
        raise FileNotFoundError(f"{source} has no {' or '.join(_FILES)}, which its adapter_config.json belongs to.")
    family = read_older_config(source.config_dict(), source.name).family
    tensors, modules = {}, set()
    for name, tensor in read_tensors(path):
        match = _NAME.fullmatch(name)
        if match is None:
            raise OlderCheckpointError(f"The adapter of {source} holds {name}, which is no weight of a LoRA layer.")
        for module, share in _renamed(family, match[1], match[2], tensor):
            modules.add(module)
            tensors[f"base_model.model.{module}.lora_{match[2]}.weight"] = share
    known = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if strange := sorted(modules - known):
        raise OlderCheckpointError(
            f"The adapter of {source} belongs to layers that the model does not have: {', '.join(strange[:4])}."
        )
    config.target_modules = modules
    config.inference_mode = merge
    processor = model.processor
    adapted = PeftModel(model, config)
    result = set_peft_model_state_dict(adapted, tensors)
    if result.unexpected_keys:
        raise OlderCheckpointError(
            f"Weights of the adapter of {source} have no place in the model: {', '.join(result.unexpected_keys[:4])}."
        )
    adapted = adapted.merge_and_unload() if merge else adapted
    adapted.processor = processor
    return adapted.eval()


def _renamed(family: Family, module: str, side: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Goes through the layers of our tree that one layer of an adapter belongs to, each with its share."""
    for name, share in family.renamed(f"{module}.weight", tensor if side == "B" else tensor[:0]):
        name = name.removesuffix(".weight")
        ours = name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}"
        yield ours, share if side == "B" else tensor


__all__ = ["attach_adapter"]
