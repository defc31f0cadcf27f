# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of older checkpoints, put onto the converted model by PEFT."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from ..building.lora import with_adapter
from ..reading.sources import Source, read_tensors
from ..tree import PEFT_PREFIX
from .legacy_config import LegacyModel, OlderCheckpointError, read_legacy_config
from .legacy_weights import our_names


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Options of PEFT's that go by the names or the number of layers, which are others here, that add other weights, or that
# name a module to import.
_REFUSED = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "target_parameters",
    "trainable_token_indices", "use_dora", "lora_bias", "alora_invocation_tokens", "arrow_config", "megatron_config",
)  # fmt: skip
_INITIALISATIONS = (True, False, None, "gaussian")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of an older checkpoint: PEFT's config of it, and A and B of each of its layers, by older names."""

    source: Source
    config: Any
    pairs: dict[str, dict[str, torch.Tensor]]


def read_adapter(source: Source) -> Adapter:
    """Reads the LoRA adapter of an older checkpoint, which needs no model yet.

    Raises:
        FileNotFoundError: There are no weights of an adapter.
        ImportError: PEFT is not installed.
        OlderCheckpointError: It is damaged, or has options that cannot be taken over.
    """
    return Adapter(source, _read_adapter_config(source), _read_pairs(source))


def attach_adapter(model: Any, adapter: Adapter, merge: bool) -> Any:
    """Puts an adapter onto a model.

    Args:
        model (`MoellavaForCausalLM`): What the adapter's base has become.
        adapter (`Adapter`): As `read_adapter` returns it; its config is changed.
        merge (`bool`): Whether it is added to the weights.

    Returns:
        `MoellavaForCausalLM` with `merge`, otherwise `PeftModel`, of which the adapter's weights can be trained; both
        with the model's processor.

    Raises:
        OlderCheckpointError: The adapter does not fit the model.
    """
    config, source = adapter.config, adapter.source
    older = read_legacy_config(source.config_dict(), source.name)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tensors = _renamed(adapter.pairs, older, layers, config.r, source)
    config.target_modules = {name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    # These choose among layers by number and name; the file tells which it was.
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.inference_mode = merge
    processor = model.processor
    adapted, _ = with_adapter(model, config, {f"{PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    adapted = adapted.merge_and_unload() if merge else adapted
    adapted.processor = processor
    return adapted.eval()


def _read_adapter_config(source: Source) -> Any:
    try:
        from peft import PeftConfig, PeftType
    except ImportError as error:
        raise ImportError("A LoRA adapter needs PEFT, which is not installed: `pip install moellava[peft]`.") from error
    try:
        config = PeftConfig.from_pretrained(source.name, **source.hub_options)
    except (KeyError, TypeError, ValueError) as error:
        raise OlderCheckpointError(
            f"The adapter_config.json of {source} cannot be read by PEFT ({type(error).__name__}: {error}). Expected "
            "what PEFT saves beside a LoRA adapter."
        ) from error
    if config.peft_type != PeftType.LORA:
        raise OlderCheckpointError(
            f"The adapter of {source} is of PEFT's type {getattr(config.peft_type, 'value', config.peft_type)}; only "
            "LORA can be taken over."
        )
    for name in ("r", "lora_alpha"):
        value = getattr(config, name)
        if not isinstance(value, int | float):
            raise OlderCheckpointError(f"The adapter_config.json of {source} says {name}={value!r}; expected a number.")
    used = [name for name in _REFUSED if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        used.append(f"bias={config.bias!r}")
    if config.init_lora_weights not in _INITIALISATIONS:
        # PiSSA and its like change the base too, by what they computed of its own layers.
        used.append(f"init_lora_weights={config.init_lora_weights!r}")
    if used:
        raise OlderCheckpointError(
            f"The adapter of {source} uses {', '.join(used)}, which cannot be taken over. Merge it into its base with "
            "the code that it was trained with."
        )
    return config


def _read_pairs(source: Source) -> dict[str, dict[str, torch.Tensor]]:
    """Reads the weights of an adapter: for each of its layers, by the older name, A and B."""
    path = next((path for name in ADAPTER_FILES if (path := source.find(name)) is not None), None)
    if path is None:
        raise FileNotFoundError(
            f"{source} has an adapter_config.json, but no weights of an adapter: expected {' or '.join(ADAPTER_FILES)} "
            "beside it. Save or download it again."
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(path):
        match = _NAME.fullmatch(name)
        if match is None:
            raise OlderCheckpointError(
                f"{path} holds {name}, which is no weight of a LoRA layer. Expected names such as "
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise OlderCheckpointError(f"{path} holds no weights. Save or download the adapter again.")
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise OlderCheckpointError(
                f"{path} holds lora_{next(iter(pair))} of {name} alone. Save or download the adapter again."
            )
    return pairs


def _renamed(
    pairs: dict[str, dict[str, torch.Tensor]],
    older: LegacyModel,
    layers: dict[str, torch.nn.Linear],
    rank: int,
    source: Source,
) -> dict[str, torch.Tensor]:
    """Returns the weights of an adapter under the names of our layers.

    Where one layer of the older model has become several, each has A and its own rows of B.
    """
    tensors: dict[str, torch.Tensor] = {}
    strange, misfits = [], []
    for older_name, pair in pairs.items():
        try:
            targets = list(our_names(f"{older_name}.weight", pair["B"], older))
        except ValueError:
            targets = []  # the projector has no such layer
        targets = [(name.removesuffix(".weight"), share) for name, share in targets]
        if not targets or any(name not in layers for name, _ in targets):
            strange.append(older_name)
            continue
        for name, share in targets:
            layer, a = layers[name], pair["A"]
            expected = (rank, layer.in_features), (layer.out_features, rank)
            if (tuple(a.shape), tuple(share.shape)) != expected:
                misfits.append(f"{older_name} has {tuple(a.shape)} and {tuple(share.shape)}, expected {expected}")
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": share}
    if strange:
        hint = " The experts of a sparse model take no adapter from outside." if older.moe is not None else ""
        raise OlderCheckpointError(
            f"The adapter of {source} belongs to {len(strange)} layer(s) that a {older.family.name} model of this "
            f"config does not have: {', '.join(strange[:4])}.{hint} Its files and its config.json do not belong "
            "together, or it was trained on another model."
        )
    if misfits:
        raise OlderCheckpointError(
            f"{len(misfits)} layer(s) of the adapter of {source} do not fit the model, (lora_A) and (lora_B): "
            f"{'; '.join(misfits[:3])}. Give the base that it was trained on, and the adapter_config.json that was "
            "saved with it."
        )
    return tensors


__all__ = ["ADAPTER_FILES", "Adapter", "attach_adapter", "read_adapter"]
