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
"""Sparse upcycling: a mixture of experts out of a dense model, every expert a copy of the layer's MLP.

Komatsuzaki et al. 2022, arXiv:2212.05055; as MoE-LLaVA does it, arXiv:2401.15947, section 3.2. With renormalised
weights the new model says what the dense one said, until training tells the experts apart.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from .building import build, make_processor
from .configuration import MoellavaConfig, MoellavaMoeConfig
from .modeling import MoellavaForCausalLM
from .modeling.sparse_moellava import DenseForm, dense_mlps
from .sources import read_tensors


_BODY = "model.language_model."
# Fields of a mixture that a trained one may be loaded with anew; the others say what it is made of.
_CHANGEABLE = frozenset(
    {
        "capacity_factor",
        "eval_capacity_factor",
        "freeze_router",
        "min_capacity",
        "norm_topk_prob",
        "num_experts_per_tok",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sample_second_expert",
    }
)
# What a dense model has no weights for.
NEW_WEIGHTS = re.compile(r".*\.mlp\.(gate|coefficient)\.(weight|bias)")


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
        ValueError: The model is sparse already, its language model has no MLPs of a known form, or a field is wrong.

    Example:

    ```python
    >>> from moellava import load_pretrained_model, upcycle

    >>> dense, *_ = load_pretrained_model("my-model")
    >>> sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2, layers="second_half")
    >>> sparse.save_pretrained("my-sparse-model")
    ```"""
    moe = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, "layers": layers, **fields}
    if isinstance(model, str | os.PathLike):
        from .loading import load_pretrained_model

        return load_pretrained_model(model, moe_config={**moe, "router_path": router_path}).model
    dense_tensors = model.state_dict()
    config, tensors = upcycled(model.config, dense_tensors, {**moe, "router_path": router_path})
    # What the two models have in common is copied: training one must not change the other.
    tensors = {
        name: tensor.clone()
        if name in dense_tensors and tensor.data_ptr() == dense_tensors[name].data_ptr()
        else tensor
        for name, tensor in tensors.items()
    }
    sparse = build(config, tensors, is_new=is_new_weight, dtype=model.dtype, device_map={"": model.device})
    sparse.generation_config = copy.deepcopy(model.generation_config)
    if model.processor is not None:
        processor = copy.deepcopy(model.processor)
        sparse.processor = make_processor(sparse, processor.image_processor, processor.tokenizer)
        sparse.processor.chat_template = processor.chat_template
    return sparse


def is_new_weight(name: str) -> bool:
    """Whether a weight is one that a dense model does not have."""
    return NEW_WEIGHTS.fullmatch(name) is not None


def upcycled(
    config: MoellavaConfig, tensors: dict[str, torch.Tensor], moe: dict[str, Any]
) -> tuple[MoellavaConfig, dict[str, torch.Tensor]]:
    """Returns the config and the weights of the sparse model that `moe` describes, from those of a dense one.

    Args:
        config (`MoellavaConfig`): The dense model's config.
        tensors (`dict[str, torch.Tensor]`): The dense model's weights, under the names of the tree.
        moe (`dict`): Fields of `MoellavaMoeConfig`, and `router_path`.
    """
    if config.moe_config is not None:
        raise ValueError(
            f"The model is sparse already: layers {config.moe_config.layers} have {config.moe_config.num_experts} "
            "experts. Upcycle the dense model that it was made of."
        )
    moe = dict(moe)
    router_path = moe.pop("router_path", None)
    router = None if router_path is None else read_router(router_path)
    if router is not None:
        moe.setdefault("router_bias", "bias" in router)
    sparse_config = MoellavaConfig.from_dict(config.to_dict() | {"moe_config": moe})
    return sparse_config, _sparse_tensors(sparse_config, tensors, router, router_path)


def _sparse_tensors(
    config: MoellavaConfig,
    tensors: dict[str, torch.Tensor],
    router: dict[str, torch.Tensor] | None,
    router_path: str | os.PathLike | None,
) -> dict[str, torch.Tensor]:
    moe = config.moe_config
    with torch.device("meta"):
        body = AutoModel.from_config(copy.deepcopy(config.text_config))
    mlps = dense_mlps(body)
    tensors = dict(tensors)
    for index in moe.layers:
        name, mlp = mlps[index]
        form, prefix = DenseForm(mlp), f"{_BODY}{name}."
        dense = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        missing = sorted(set(mlp.state_dict()) - set(dense))
        if missing:
            raise ValueError(f"The weights {missing} of {prefix}* are not there, so that it cannot be made sparse.")
        sparse = {f"experts.{key}": tensor for key, tensor in form.expert_tensors(dense, moe.num_experts).items()}
        if moe.use_residual:
            sparse |= {f"mlp.{key}": tensor for key, tensor in dense.items()}
        if moe.use_meta_expert:
            sparse |= {f"meta_expert.{key}": tensor.clone() for key, tensor in dense.items()}
        if router is not None:
            _check_router(router, router_path, moe, form.hidden_size)
            sparse |= {f"gate.{key}": tensor.clone() for key, tensor in router.items()}
        tensors |= {f"{prefix}{key}": tensor for key, tensor in sparse.items()}
    return tensors


def read_router(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads a router's file: the `weight` and, where it has one, the `bias` of a linear layer, under any prefix.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no router file {path}. Give the path of a .safetensors, .bin or .pth file.")
    router = {name.rpartition(".")[2]: tensor for name, tensor in read_tensors(path)}
    if not {"weight"} <= set(router) <= {"weight", "bias"} or router["weight"].dim() != 2:
        raise ValueError(f"{path} is no router: expected fc1.weight (num_experts, hidden_size) and fc1.bias.")
    return router


def _check_router(
    router: dict[str, torch.Tensor], path: str | os.PathLike | None, moe: MoellavaMoeConfig, hidden_size: int
) -> None:
    shape = tuple(router["weight"].shape)
    if shape != (moe.num_experts, hidden_size):
        raise ValueError(
            f"The router of {path} has the shape {shape}; the model needs {(moe.num_experts, hidden_size)} "
            "(num_experts, hidden_size)."
        )
    if moe.router_bias != ("bias" in router):
        raise ValueError(f"router_bias is {moe.router_bias}, but the router of {path} says otherwise. Leave it out.")


def with_moe_changes(config: MoellavaConfig, moe: dict[str, Any]) -> dict[str, Any]:
    """Returns the `moe_config` of a sparse checkpoint with what a caller changes of it.

    Raises:
        ValueError: The change would be another model than the checkpoint.
    """
    own = config.moe_config
    asked = MoellavaMoeConfig(**{key: value for key, value in moe.items() if key != "router_path"})
    asked.layers = asked.resolved_layers(config.text_config.num_hidden_layers)
    given = {name for name in moe if name in type(asked).__annotations__}
    for name in sorted(given - _CHANGEABLE):
        if getattr(asked, name) != getattr(own, name):
            raise ValueError(
                f"The checkpoint's {name} is {getattr(own, name)!r}, and {getattr(asked, name)!r} is asked for; it is "
                "part of what the model is. Upcycle its dense model anew, or leave it out."
            )
    return own.to_dict() | {name: getattr(asked, name) for name in given}


__all__ = ["is_new_weight", "read_router", "upcycle", "upcycled", "with_moe_changes"]
