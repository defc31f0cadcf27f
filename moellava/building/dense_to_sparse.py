# SPDX-License-Identifier: Apache-2.0
"""The config and the weights of a sparse model, out of those of a dense one."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from ..checks.moe import resolved_layers
from ..configuration import MoellavaConfig, MoellavaMoeConfig
from ..parts.moe_block_moellava import DenseForm
from ..parts.sparse_layers_moellava import dense_mlps
from ..reading.provenance import UPCYCLED, with_provenance
from ..reading.sources import read_tensors, unmapped
from ..tree import BODY_PREFIX
from .expert_weights import stacked_experts


logger = logging.getLogger(__name__)


# Fields of a mixture that a trained one may be loaded with anew; the others say what it is made of.
_CHANGEABLE = frozenset(
    {
        "capacity_factor",
        "eval_capacity_factor",
        "eval_capacity_per_row",
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


def check_is_dense(moe: Mapping[str, Any] | None) -> None:
    """Raises a ValueError where a model has a `moe_config`: there is nothing to upcycle."""
    if moe is not None:
        raise ValueError(
            f"The model is sparse already: layers {moe['layers']} have {moe['num_experts']} experts. Upcycle the dense "
            "model that it was made of."
        )


def upcycled(
    config: MoellavaConfig, tensors: dict[str, torch.Tensor], moe: dict[str, Any]
) -> tuple[MoellavaConfig, dict[str, torch.Tensor]]:
    """Returns the config and the weights of the sparse model that `moe` describes, from those of a dense one.

    Args:
        config (`MoellavaConfig`): The dense model's config.
        tensors (`dict[str, torch.Tensor]`): The dense model's weights, under the names of the tree.
        moe (`dict`): Fields of `MoellavaMoeConfig`, and `router_path`.

    Raises:
        ValueError: The dense model or the router does not allow it.
    """
    moe = dict(moe)
    router_path = moe.pop("router_path", None)
    router = None if router_path is None else read_router(router_path)
    if router is not None:
        moe.setdefault("router_bias", "bias" in router)
    sparse_config = upcycled_config(config, moe)
    for reason in differences(sparse_config.moe_config):
        logger.warning("The sparse model will not answer as the dense one does until it is trained: %s", reason)
    return sparse_config, _sparse_tensors(sparse_config, tensors, router, router_path)


def upcycled_config(config: MoellavaConfig, moe: Mapping[str, Any]) -> MoellavaConfig:
    """Returns the config of the sparse model that `moe`, fields of `MoellavaMoeConfig`, makes of a dense one.

    Raises:
        ValueError: The model is sparse already, or a field is wrong.
    """
    check_is_dense(config.moe_config and config.moe_config.to_dict())
    moe = dict(moe)
    if moe.get("norm_topk_prob") is None:
        moe["norm_topk_prob"] = True  # for one expert too: copies of an MLP then add up to it
    parts = with_provenance(config.parts, "experts", UPCYCLED)
    return MoellavaConfig.from_dict(config.to_dict() | {"moe_config": moe, "parts": parts})


def differences(moe: MoellavaMoeConfig) -> list[str]:
    """Returns why an upcycled model answers otherwise than its dense one, a sentence each; none where it does not."""
    reasons = []
    if not moe.norm_topk_prob and moe.num_experts_per_tok < moe.num_experts:
        reasons.append(
            "norm_topk_prob is False, so the weights of a token's experts sum to less than 1. Leave it out to keep the "
            "dense model's answers."
        )
    if moe.use_meta_expert:
        reasons.append("use_meta_expert adds a second copy of the MLP's output. Leave it out to keep the answers.")
    factor = moe.eval_capacity_factor
    if factor is not None and factor * moe.num_experts_per_tok < moe.num_experts:
        reasons.append(
            f"eval_capacity_factor is {factor}, so tokens are dropped when experts are full. Leave it out, or give at "
            f"least {moe.num_experts / moe.num_experts_per_tok:g}."
        )
    return reasons


def _sparse_tensors(
    config: MoellavaConfig,
    tensors: dict[str, torch.Tensor],
    router: dict[str, torch.Tensor] | None,
    router_path: str | os.PathLike | None,
) -> dict[str, torch.Tensor]:
    moe = config.moe_config
    with torch.device("meta"):
        body = AutoModel.from_config(copy.deepcopy(config.text_config)).eval()
    mlps = dense_mlps(body)
    tensors = dict(tensors)
    for index in moe.layers:
        name, mlp = mlps[index]
        form, prefix = DenseForm(mlp), f"{BODY_PREFIX}{name}."
        dense = {
            key.removeprefix(prefix): unmapped(tensors.pop(key)) for key in list(tensors) if key.startswith(prefix)
        }
        _check_dense(dense, mlp, prefix)
        _check_form(form, mlp, dense, config)
        sparse = {f"experts.{key}": tensor for key, tensor in stacked_experts(form, [dense] * moe.num_experts).items()}
        if moe.use_residual:
            sparse |= {f"mlp.{key}": tensor for key, tensor in dense.items()}
        if moe.use_meta_expert:
            sparse |= {f"meta_expert.{key}": tensor.clone() for key, tensor in dense.items()}
        if router is not None:
            _check_router(router, router_path, moe, form.hidden_size)
            sparse |= {f"gate.{key}": tensor.clone() for key, tensor in router.items()}
        tensors |= {f"{prefix}{key}": tensor for key, tensor in sparse.items()}
    return tensors


def _check_dense(dense: dict[str, torch.Tensor], mlp: nn.Module, prefix: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in mlp.state_dict().items()}
    missing = sorted(set(expected) - set(dense))
    if missing:
        raise ValueError(f"The weights {missing} of {prefix}* are not there, so that it cannot be made sparse.")
    strange = sorted(set(dense) - set(expected)) + [
        name for name, shape in expected.items() if tuple(dense[name].shape) != shape
    ]
    if strange:
        raise ValueError(
            f"The weights {strange} of {prefix}* are not those of a {type(mlp).__name__}: a quantised model cannot be "
            "upcycled. Load it without quantisation."
        )


def _check_form(form: DenseForm, mlp: nn.Module, dense: dict[str, torch.Tensor], config: MoellavaConfig) -> None:
    """Compares an expert with the dense MLP on random tokens, so that one with arithmetic of its own is refused."""
    with torch.device("meta"):
        experts = form.build_experts(config, 1)
    weight = dense[f"{form.down_name}.weight"]
    tokens = torch.randn(4, form.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    tensors = stacked_experts(form, [dense])
    up_name = "gate_up_proj" if form.gated else "up_proj"
    names = (up_name, f"{up_name}_bias", "down_proj", "down_proj_bias")
    weights = tuple(tensors[name][0] if name in tensors else None for name in names)
    with torch.no_grad():
        actual = experts.run_expert(weights, tokens).float()
        try:
            expected = torch.func.functional_call(mlp, dense, (tokens,)).float()
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"A {form.name} cannot be made sparse: it could not be run for comparison "
                f"({type(error).__name__}: {error})."
            ) from error
    if not (actual - expected).norm() <= 0.02 * expected.norm():
        raise ValueError(
            f"A {form.name} cannot be made sparse: it computes something else than experts of the form "
            f"{'gate/up/down' if form.gated else 'fc1/fc2'} can."
        )


def read_router(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads a router's file: the `weight` and, where it has one, the `bias` of a linear layer, under any prefix.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no router file {path}. Give the path of a .safetensors, .bin or .pth file.")
    given = list(read_tensors(path))
    router = {name.rpartition(".")[2]: tensor for name, tensor in given}
    is_linear = {"weight"} <= set(router) <= {"weight", "bias"} and len(given) == len(router)
    if not is_linear or router["weight"].dim() != 2:
        raise ValueError(
            f"{path} is no router: expected fc1.weight (num_experts, hidden_size) and, if it has one, fc1.bias; found "
            f"{', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in given) or 'nothing'}."
        )
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
    if "bias" in router and tuple(router["bias"].shape) != shape[:1]:
        raise ValueError(
            f"The router of {path} has a bias of the shape {tuple(router['bias'].shape)}; expected {shape[:1]}."
        )
    if moe.router_bias != ("bias" in router):
        raise ValueError(f"router_bias is {moe.router_bias}, but the router of {path} says otherwise. Leave it out.")


def with_moe_changes(config: MoellavaConfig, moe: dict[str, Any]) -> dict[str, Any]:
    """Returns the `moe_config` of a sparse checkpoint with what a caller changes of it.

    Raises:
        ValueError: The change would be another model than the checkpoint.
    """
    if moe.get("router_path") is not None:
        raise ValueError(
            f"router_path is {moe['router_path']!r}, but the checkpoint is sparse already and has its own routers. "
            "Leave it out, or upcycle the dense model anew."
        )
    own = {name: getattr(config.moe_config, name) for name in MoellavaMoeConfig.__annotations__ if name != "model_type"}
    given = {name: value for name, value in moe.items() if name in own}
    if given.get("norm_topk_prob") is None:
        given.pop("norm_topk_prob", None)
    asked = MoellavaMoeConfig(**own | given)
    asked.layers = resolved_layers(asked.layers, config.text_config.num_hidden_layers)
    for name in sorted(set(given) - _CHANGEABLE):
        if getattr(asked, name) != own[name]:
            raise ValueError(
                f"The checkpoint's {name} is {own[name]!r}, and {getattr(asked, name)!r} is asked for; it is part of "
                "what the model is. Upcycle its dense model anew, or leave it out."
            )
    return {name: getattr(asked, name) for name in own}


__all__ = ["check_is_dense", "differences", "read_router", "upcycled", "upcycled_config", "with_moe_changes"]
