# SPDX-License-Identifier: Apache-2.0
"""Sparse upcycling: a mixture of experts out of a dense model, every expert a copy of the layer's MLP.

Komatsuzaki et al. 2022, arXiv:2212.05055; as MoE-LLaVA does it, arXiv:2401.15947, section 3.2. With renormalised
weights the new model says what the dense one said, until training tells the experts apart.
"""

import copy
import os
from typing import Any

from .authoring.older_names import canonical_moe
from .building.build import build
from .building.dense_to_sparse import check_is_dense, upcycled
from .configuration import MoellavaConfig, MoellavaMoeConfig
from .loading import load_pretrained_model
from .modeling import MoellavaForCausalLM
from .reading.sources import Source
from .tree import is_new_weight


def upcycle(
    model: MoellavaForCausalLM | str | os.PathLike,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    layers: str | list[int] = "sparse",
    *,
    router_path: str | os.PathLike | None = None,
    **fields,
) -> MoellavaForCausalLM:
    """Makes a sparse model of a dense one, which stays as it is.

    Args:
        model (`MoellavaForCausalLM`, `str` or `os.PathLike`): The dense model, or its checkpoint.
        num_experts (`int`, *optional*, defaults to 4): The number of experts of a sparse layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2): The number of experts that a token goes to.
        layers (`str` or `list[int]`, *optional*, defaults to `"sparse"`): Which layers; `"first_half"`,
            `"second_half"`, `"sparse"` (every other), `"dense"` (all), or indices.
        router_path (`str` or `os.PathLike`, *optional*): A router's file (`fc1.weight`, `fc1.bias`), as Med-MoE trains
            one, put into every sparse layer.
        fields: The other fields of `MoellavaMoeConfig`.

    Returns:
        `MoellavaForCausalLM`: The sparse model in evaluation mode, with the dense one's processor.

    Raises:
        TypeError: `model` is something else.
        ValueError: The model is sparse already, its language model has no MLPs of a known form, its weights are
            quantised or not in memory, or a field is wrong.

    Example:

    ```python
    >>> from moellava import load_pretrained_model, upcycle

    >>> dense, *_ = load_pretrained_model("my-model")
    >>> sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2, layers="second_half")
    >>> sparse.save_pretrained("my-sparse-model")
    ```"""
    moe = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, "layers": layers}
    fields = canonical_moe(fields)
    for name in moe.keys() & fields.keys():
        if moe[name] not in (MoellavaMoeConfig.__dataclass_fields__[name].default, fields[name]):
            raise ValueError(f"{name} is {moe[name]!r}, and by an older name {fields[name]!r}. Give one of the two.")
    moe |= fields | {"router_path": router_path}
    if isinstance(model, str | os.PathLike):
        return _upcycled_checkpoint(Source(model), moe)
    if getattr(getattr(model, "config", None), "model_type", None) != MoellavaConfig.model_type:
        raise TypeError(
            f"A {type(model).__name__} cannot be upcycled; expected a MoellavaForCausalLM or its checkpoint."
        )
    if not hasattr(model, "lm_head"):
        raise TypeError(
            "A model without its head cannot be upcycled; expected the MoellavaForCausalLM that it is part of."
        )
    dense = model.state_dict()
    elsewhere = [name for name, tensor in dense.items() if tensor.is_meta]
    if elsewhere:
        raise ValueError(
            f"The weights {elsewhere[:3]} are not in memory but offloaded to disk. Load the model without offloading, "
            "or give its checkpoint's path."
        )
    config, tensors = upcycled(model.config, dense, moe)
    # What the two models have in common is copied: training one must not change the other.
    own = {tensor.untyped_storage().data_ptr() for tensor in dense.values()}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in own:
            tensors[name] = tensor.clone()
    sparse = build(
        config,
        tensors,
        is_new=is_new_weight,
        dtype=model.dtype,
        device_map={"": model.device},
        attn_implementation=_attn_implementations(model.config),
    )
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.processor = copy.deepcopy(model.processor)
    return sparse


def _upcycled_checkpoint(source: Source, moe: dict[str, Any]) -> MoellavaForCausalLM:
    fields = source.config_dict()
    if fields.get("model_type") != MoellavaConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {fields.get('model_type')!r}, not a checkpoint of this package. Give "
            "load_pretrained_model its path and a moe_config to assemble a sparse model of it."
        )
    check_is_dense(fields.get("moe_config"))
    return load_pretrained_model(source.name, moe_config=moe).model


def _attn_implementations(config: MoellavaConfig) -> dict[str, str | None]:
    """Returns which attention the parts of a model use, as `from_pretrained` takes it."""
    parts = {"": config, "text_config": config.text_config, "vision_config": config.vision_config}
    return {name: part._attn_implementation for name, part in parts.items()}


__all__ = ["upcycle"]
