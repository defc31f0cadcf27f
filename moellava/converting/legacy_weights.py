# SPDX-License-Identifier: Apache-2.0
"""The weights of an older checkpoint, under the names of our tree: each as it is, split, or stacked with its like.

Nothing is left over in silence: what no part of the model takes is named with the reason, and a weight that no rule
knows is an error.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from ..building.expert_weights import stacked_experts
from ..parts.moe_block_moellava import DenseForm
from ..parts.sparse_layers_moellava import dense_mlps
from ..reading.projector_file import legacy_projector_tensors
from ..reading.sources import unmapped
from ..tree import BODY_PREFIX, PROJECTOR_PREFIX, TOWER_PREFIX
from .legacy_config import LegacyModel, OlderCheckpointError


_TOWER = re.compile(
    r"(?:model|transformer)\.(?:image_tower\.image_tower|vision_tower(?:\.vision_tower)?)\.(?:vision_model\.)?(.+)"
)
_PROJECTOR = re.compile(r"(?:model|transformer)\.mm_projector\.(?:image_spatial_proj\.)?(.+)")
_LANGUAGE = re.compile(
    r"(?:model\.(?:embed_tokens|layers|norm|final_layernorm)|transformer\.(?:wte|h|ln_f)|lm_head)\..+"
)
_LORA = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_SPARSE = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.mlp\."
    r"(?:deepspeed_moe\.gate\.wg\.(?P<gate>weight|bias)"
    r"|deepspeed_moe\.experts\.deepspeed_experts\.(?P<expert>\d+)\.(?P<weight>.+)"
    r"|(?P<coefficient>coefficient\.(?:weight|bias))"
    r"|mlp\.(?P<residual>.+)"
    r"|meta_moe\.(?P<meta>.+))"
)
# Weights that are known and not taken over.
_LEFT_OUT = (
    (re.compile(r".*\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)"), "computed anew"),
    (re.compile(r".*\.embeddings\.position_ids"), "computed anew"),
    (re.compile(r".*\.attn\.(?:masked_bias|bias)"), "a mask, which is computed anew"),
    (re.compile(r".*\.mm_projector\.video_.*|.*\.video_tower\..*"), "videos are not supported"),
    (re.compile(r".*\.image_newline"), "one picture is seen as a whole, without tiles"),
)


@dataclass
class WeightReport:
    """What became of the weights of a checkpoint.

    Attributes:
        num_used (`int`): How many have their place in the model.
        num_merged (`int`): How many of them are weights of LoRA adapters within the checkpoint.
        left_out (`dict[str, str]`): Those that have none, with the reason.
        added (`dict[str, str]`): Weights of the model that the checkpoint does not have, with what they are.
    """

    num_used: int = 0
    num_merged: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)


def sort_weights(
    source: Mapping[str, torch.Tensor], older: LegacyModel, origin: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], WeightReport]:
    """Sorts the weights of an older checkpoint by part.

    Returns:
        `tuple`: Those of the language model, under the names of transformers' class, but for those of sparse layers,
        which keep the older ones; those of the projector; those of the vision tower; the report.

    Raises:
        OlderCheckpointError: There is one that no rule knows.
    """
    language: dict[str, torch.Tensor] = {}
    projector: dict[str, torch.Tensor] = {}
    tower: dict[str, torch.Tensor] = {}
    merged, unknown = merge_lora(source, older.lora_scale, origin), []
    num_merged = len(source) - len(merged)
    report = WeightReport(num_used=num_merged, num_merged=num_merged)
    for name, tensor in merged.items():
        reason = next((reason for pattern, reason in _LEFT_OUT if pattern.fullmatch(name)), None)
        if name == "lm_head.bias" and older.family.drops_head_bias:
            reason = "the older class has no bias in its head"
        if reason is not None:
            report.left_out[name] = reason
            continue
        report.num_used += 1
        if match := _PROJECTOR.fullmatch(name):
            projector[match[1]] = tensor
        elif match := _TOWER.fullmatch(name):
            tower[match[1]] = tensor
        elif _LANGUAGE.fullmatch(name):
            language |= older.family.renamed(name, tensor)
        else:
            unknown.append(name)
    if unknown:
        raise OlderCheckpointError(
            f"{len(unknown)} weight(s) of {origin} belong to no part of a {older.family.name} model: "
            f"{', '.join(sorted(unknown)[:5])}. Its files and its config do not belong together, or it is of a kind "
            "that cannot be converted."
        )
    return language, projector, tower, report


def merge_lora(tensors: Mapping[str, torch.Tensor], scale: float | None, origin: str) -> dict[str, torch.Tensor]:
    """Returns weights with the adapters among them added: `W + scale * B A` (Hu et al. 2021, arXiv:2106.09685).

    Args:
        tensors (`Mapping`): The weights under their older names.
        scale (`float`, *optional*): What the adapters are multiplied by; `None` where the config does not tell.
        origin (`str`): The checkpoint's name, for error messages.

    Raises:
        OlderCheckpointError: There are adapters, and nothing tells their scale, or one of them is not whole.
    """
    merged, adapters = {}, {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            merged[name.replace(".base_layer.", ".")] = tensor
        else:
            adapters.setdefault(match[1], {})[match[2]] = tensor
    if adapters and scale is None:
        raise OlderCheckpointError(
            f"The files of {origin} hold LoRA weights ({next(iter(adapters))}, ...), but its config.json does not tell "
            "what they are multiplied by: 'lora' has no lora_alpha and lora_r. Write them there, as the model was "
            "trained with them."
        )
    for name, pair in adapters.items():
        weight = merged.get(f"{name}.weight")
        if weight is None or set(pair) != {"A", "B"}:
            raise OlderCheckpointError(
                f"The adapter of {name} in {origin} is not whole: expected weight, lora_A, lora_B."
            )
        ranks = {pair["A"].shape[0], pair["B"].shape[-1]}
        if len(ranks) > 1 or weight.shape != (pair["B"].shape[0], pair["A"].shape[-1]):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (weight, pair["A"], pair["B"]))
            raise OlderCheckpointError(
                f"The weight, lora_A and lora_B of {name} in {origin} are {shapes}, which do not belong together."
            )
        merged[f"{name}.weight"] = (weight.float() + scale * (pair["B"].float() @ pair["A"].float())).to(weight.dtype)
    return merged


def our_names(name: str, tensor: torch.Tensor, older: LegacyModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Goes through the weights of our tree that hold a weight of an older model, each with its share.

    Raises:
        ValueError: It is one that the projector does not have.
    """
    if match := _PROJECTOR.fullmatch(name):
        renamed = legacy_projector_tensors(dict(older.projector), {match[1]: tensor})
        yield from ((f"{PROJECTOR_PREFIX}{own_name}", share) for own_name, share in renamed.items())
    elif match := _TOWER.fullmatch(name):
        yield f"{TOWER_PREFIX}{match[1]}", tensor
    else:
        for own_name, share in older.family.renamed(name, tensor):
            yield _in_our_tree(own_name), share


def _in_our_tree(name: str) -> str:
    """The place of a weight of transformers' causal language model in our tree."""
    return name if name.startswith("lm_head.") else f"{BODY_PREFIX}{name.removeprefix('model.')}"


def moe_fields_told_by(language: Mapping[str, torch.Tensor], moe: Mapping[str, object]) -> dict[str, object]:
    """Returns the fields of the sparse layers with what the weights tell: Med-MoE's are known by theirs."""
    groups = [match.groupdict() for name in language if (match := _SPARSE.fullmatch(name))]
    # Med-MoE trains its router apart and freezes it.
    has_bias = any(group["gate"] == "bias" for group in groups)
    return {
        **moe,
        "router_bias": has_bias,
        "freeze_router": has_bias,
        "use_meta_expert": any(group["meta"] for group in groups),
    }


def language_tensors(
    language: Mapping[str, torch.Tensor], text_config: PreTrainedConfig, moe: object | None, origin: str
) -> dict[str, torch.Tensor]:
    """Returns the weights of the language model under the names of our tree, experts stacked.

    Args:
        language (`Mapping`): What `sort_weights` returns of it.
        text_config (`PreTrainedConfig`): Its config.
        moe (`MoellavaMoeConfig`, *optional*): The sparse layers.
        origin (`str`): The checkpoint's name, for error messages.

    Raises:
        OlderCheckpointError: The sparse layers of the config and of the files differ, or an expert is not whole.
    """
    tensors: dict[str, torch.Tensor] = {}
    blocks: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in language.items():
        match = _SPARSE.fullmatch(name)
        if match is None:
            tensors[_in_our_tree(name)] = tensor
            continue
        kind, key = next(
            (kind, key) for kind in ("gate", "weight", "coefficient", "residual", "meta") if (key := match[kind])
        )
        kind = f"expert {match['expert']}" if kind == "weight" else kind
        blocks.setdefault(int(match["layer"]), {}).setdefault(kind, {})[key] = tensor
    layers = [] if moe is None else moe.layers
    if sorted(blocks) != list(layers):
        raise OlderCheckpointError(
            f"The files of {origin} have experts in the layers {sorted(blocks)}, its config says {list(layers)}. They "
            "do not belong together."
        )
    if not blocks:
        return tensors
    with torch.device("meta"):
        mlps = dense_mlps(AutoModel.from_config(text_config))
    for layer, block in transformers_logging.tqdm(blocks.items(), desc="Stacking experts"):
        name, mlp = mlps[layer]
        form = DenseForm(mlp)
        shapes = {key: tuple(tensor.shape) for key, tensor in mlp.state_dict().items()}
        names = [f"expert {expert}" for expert in range(moe.num_experts)]
        whole = [*names, *(["residual"] if moe.use_residual else []), *(["meta"] if moe.use_meta_expert else [])]
        for kind in whole:
            found = {key: tuple(tensor.shape) for key, tensor in block.get(kind, {}).items()}
            if found != shapes:
                raise OlderCheckpointError(
                    f"In layer {layer} of {origin}, {kind} has {found or 'no weights'}; expected {shapes}."
                )
        strange = sorted(set(block) - {*whole, "gate", "coefficient"})
        if strange:
            raise OlderCheckpointError(
                f"In layer {layer} of {origin} there is {', '.join(strange)}, of which its config says nothing."
            )
        sparse = {f"gate.{key}": tensor for key, tensor in block.get("gate", {}).items()}
        experts = [{key: unmapped(tensor) for key, tensor in block[kind].items()} for kind in names]
        sparse |= {f"experts.{key}": tensor for key, tensor in stacked_experts(form, experts).items()}
        sparse |= block.get("coefficient", {})
        sparse |= {f"mlp.{key}": tensor for key, tensor in block.get("residual", {}).items()}
        sparse |= {f"meta_expert.{key}": tensor for key, tensor in block.get("meta", {}).items()}
        tensors |= {f"{BODY_PREFIX}{name}.{key}": tensor for key, tensor in sparse.items()}
    return tensors


__all__ = ["WeightReport", "language_tensors", "merge_lora", "moe_fields_told_by", "our_names", "sort_weights"]
