# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters, put onto a loaded model: of the model as a whole, or of its language model alone.

An adapter that was trained on a language model names that model's layers; in ours they lie one level deeper, beside a
vision tower whose layers often have the same short names.
"""

import copy
import logging
import re
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from ..formatting import first_few
from ..modeling.language_moellava import native_causal_lm
from ..reading.language_model import module_name
from ..reading.sources import Source
from ..tree import BODY_PREFIX, HEAD, PEFT_PREFIX


logger = logging.getLogger(__name__)

# What PEFT puts behind a layer's name, and beside its weight.
_OF_LAYER = re.compile(
    r"\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save|token_adapter"
    r"|trainable_tokens_delta)(?:\..+)?$|\.(?:weight|bias)$"
)
# What PEFT raises of a config or of weights that are not the model's.
_MISFITS = (AttributeError, KeyError, RuntimeError, TypeError, ValueError, re.error)


def put_adapter(base: Any, source: Source, tensors: dict[str, torch.Tensor], merges: bool = False) -> Any:
    """Puts a LoRA adapter onto a model.

    Args:
        base (`MoellavaForCausalLM`): The model; it gets the adapter's layers.
        source (`Source`): Where the adapter is.
        tensors (`dict[str, torch.Tensor]`): Its weights, by the names in its file.
        merges (`bool`, *optional*, defaults to `False`): Whether it is to be added to the model's weights.

    Returns:
        `PeftModel`: The model with the adapter, of which nothing can be trained.

    Raises:
        ValueError: A weight of the adapter finds no place in the model, or has another shape than the place; or the
            adapter cannot be put onto offloaded weights.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(source.name, **source.hub_options)
    config.inference_mode = True
    # PEFT reads the base's own weights for these, past the hooks that bring them.
    reads_base = bool(config.trainable_token_indices) or (config.use_dora and not merges)
    if reads_base and any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            f"The adapter {source} {'trains single tokens' if config.trainable_token_indices else 'uses DoRA'}, which "
            "needs the base's weights in memory, and some of them are offloaded. Load it without a device_map that "
            f"offloads{'' if config.trainable_token_indices else ', or merge it'}."
        )
    modules = dict(base.named_modules())
    renames = _language_model_names(base)
    layers = {name: _OF_LAYER.sub("", name.removeprefix(PEFT_PREFIX)) for name in tensors}
    mapping: dict[str, str] = {}
    asked: set[str] = set()
    if not any(_is_place(layer, modules) for layer in layers.values() if layer.partition(".")[0] != HEAD):
        mapping = renames
        asked = _layers_asked_for(base, config, source)
        _aim_at_language_model(config, {name: _renamed(layer, renames) for name, layer in layers.items()}, modules)
    placed = {PEFT_PREFIX + _renamed(name.removeprefix(PEFT_PREFIX), mapping): tensors[name] for name in tensors}
    lost = [name for name, layer in layers.items() if not _is_place(_renamed(layer, mapping), modules)]
    if lost:
        raise ValueError(_lost(source, lost))
    placed = _with_rows_of_new_tokens(placed, base)
    try:
        adapted, (missing, unexpected) = with_adapter(base, config, placed)
    except _MISFITS as error:
        raise ValueError(_misfit(source, error)) from error
    if unexpected:
        raise ValueError(_lost(source, unexpected))
    _part_ends(base)
    bare = {_OF_LAYER.sub("", name.removeprefix(PEFT_PREFIX)) for name in missing if ".lora_" in name}
    bare |= asked - set(layers.values())
    if bare:
        logger.warning(
            "The adapter %s lacks weights of %d layer(s) that its config asks for, which stay as in the base: %s. "
            "Save or download it again.",
            source,
            len(bare),
            first_few(bare),
        )
    return adapted.eval()


def merge_adapter(adapted: Any) -> Any:
    """Adds an adapter to the weights of its model.

    Returns:
        `MoellavaForCausalLM`: The model, whose config says whether its head is still its embedding.
    """
    _part_ends(adapted.base_model.model)
    model = adapted.merge_and_unload()
    embedding, head = _ends(model)
    # PEFT changes one of the two fields alone, and a checkpoint whose fields disagree cannot be loaded.
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = head.weight is embedding.weight
    return model


def _is_offloaded(base: Any) -> bool:
    places = set((getattr(base, "hf_device_map", None) or {}).values())
    return "disk" in places or ("cpu" in places and len(places) > 1)


def with_adapter(base: Any, config: Any, tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Puts an adapter's layers onto a model, some of whose weights may be offloaded, and gives them their weights.

    PEFT's own loader for offloaded models copies the base's files to below the current folder, or over themselves where
    their path is relative. Here the base's hooks stay as they are, and the adapter is held in memory.

    Args:
        base (`MoellavaForCausalLM`): The model.
        config (`LoraConfig`): The adapter's config.
        tensors (`dict[str, torch.Tensor]`): Its weights, by PEFT's names in files.

    Returns:
        `tuple`: The `PeftModel`, and what `load_state_dict` returns: the missing and the unexpected names.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, set_peft_model_state_dict

    own = {id(parameter) for parameter in base.parameters()}
    adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(base, config)
    if _is_offloaded(base):
        for module in adapted.modules():
            hook = getattr(_inner(module), "_hf_hook", None)
            if hook is not None and _inner(module) is not module:
                _materialize(module, own, hook.execution_device)
    return adapted, set_peft_model_state_dict(adapted, tensors)


def _materialize(adapted: nn.Module, own: set[int], device: Any) -> None:
    """Gives what an adapter adds to an offloaded layer a place in memory, where PEFT puts it off beside the layer."""
    for module in adapted.modules():
        added = {
            name: nn.Parameter(torch.zeros_like(parameter, device=device), requires_grad=False)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_meta and id(parameter) not in own
        }
        if added:
            remove_hook_from_module(module)  # of a copy of a layer, which would bring the base's weights
        for name, parameter in added.items():
            module.register_parameter(name, parameter)


def _ends(base: Any) -> tuple[Any, Any]:
    """Returns the embedding and the head, without what PEFT puts around them."""
    return _inner(base.get_input_embeddings()), _inner(base.get_output_embeddings())


def _inner(module: Any) -> Any:
    while (inner := getattr(module, "original_module", getattr(module, "base_layer", None))) is not None:
        module = inner
    return module


def _part_ends(base: Any) -> None:
    """Gives a tied head that an adapter changes, or whose embedding it changes, a weight of its own."""
    outer = (base.get_input_embeddings(), base.get_output_embeddings())
    embedding, head = _ends(base)
    if head.weight is embedding.weight and outer != (embedding, head):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = False


def _layers_asked_for(base: Any, config: Any, source: Source) -> set[str]:
    """Returns the names of the layers that an adapter's config asks for in the language model alone."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = native_causal_lm(base.config.text_config)
    fields = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
    asked = LoraConfig(r=1, **{name: copy.copy(getattr(config, name)) for name in fields})
    try:
        inject_adapter_in_model(asked, own, low_cpu_mem_usage=True)
    except _MISFITS as error:
        raise ValueError(_misfit(source, error)) from error
    return {_OF_LAYER.sub("", name) for name, module in own.named_modules() if isinstance(module, BaseTunerLayer)}


def _misfit(source: Source, error: Exception) -> str:
    return (
        f"The adapter {source} does not fit the model ({type(error).__name__}: {error}). Give the base that it was "
        "trained on, and the adapter_config.json that was saved with it."
    )


def _lost(source: Source, names: list[str]) -> str:
    return (
        f"{len(names)} weight(s) of the adapter {source} have no place in the model: {first_few(names)}. "
        "Expected an adapter of the model given as model_base, or of its language model alone. Give the base that it "
        "was trained on."
    )


def _language_model_names(base: Any) -> dict[str, str]:
    """Returns patterns of the names in a language model of this family, and what they are in ours."""
    own = native_causal_lm(base.config.text_config)
    head = module_name(own, own.get_output_embeddings())
    return {
        rf"^{re.escape(own.base_model_prefix)}\.(?!language_model\.)": BODY_PREFIX,
        rf"^{re.escape(head)}(?=\.|$)": HEAD,
    }


def _renamed(name: str, mapping: dict[str, str]) -> str:
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _is_place(layer: str, modules: dict[str, Any]) -> bool:
    # Adapters of parameters lie one within the other: `experts.base_layer`.
    return re.sub(r"(?:\.base_layer)+$", "", layer) in modules


def _aim_at_language_model(config: Any, layers: dict[str, str], modules: dict[str, Any]) -> None:
    """Lets an adapter's config name in full the very layers that its file has weights of, and no others."""
    adapted, saved = set(), set()
    for name, layer in layers.items():
        (adapted if ".lora_" in name else saved).add(layer)
    if not config.target_parameters:
        config.target_modules = adapted
    else:
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        config.target_modules = {layer for layer in adapted if isinstance(modules.get(layer), kinds)}
    if config.modules_to_save:
        config.modules_to_save = sorted(saved - adapted)
    # These choose among layers by name and number; the file tells which it was.
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    body = re.compile(r"^\^?(?:\w+\\?\.)+?(?=(?:layers|h|blocks)\\?\.)")
    for name in ("rank_pattern", "alpha_pattern"):
        setattr(config, name, {body.sub("", key): value for key, value in (getattr(config, name) or {}).items()})


def _weight(module: nn.Module, name: str) -> torch.Tensor:
    """Returns a weight of a layer, also of one that is offloaded."""
    weight = getattr(module, name)
    return module._hf_hook.weights_map[name] if weight.is_meta else weight


def _with_rows_of_new_tokens(tensors: dict[str, torch.Tensor], base: Any) -> dict[str, torch.Tensor]:
    """Gives weights of the embedding and the head the rows that our vocabulary has more: the image token's.

    What an adapter adds to them is nothing; where it holds the whole weight, they are the base's own.
    """
    whole = {
        f"{name}.{leaf}": (module, leaf)
        for name, module in base.named_modules()
        if module in (base.get_input_embeddings(), base.get_output_embeddings())
        for leaf, _ in module.named_parameters(recurse=False)
    }
    rows = base.config.text_config.vocab_size
    padded = {}
    for name, tensor in tensors.items():
        layer = _OF_LAYER.sub("", name.removeprefix(PEFT_PREFIX))
        own = whole.get(f"{layer}.weight")
        if own is not None and not name.endswith("trainable_tokens_delta"):
            by_columns = ".lora_embedding_A" in name
            has_rows = by_columns or not any(part in name for part in (".lora_A", ".lora_embedding_B"))
            missing = rows - tensor.shape[1 if by_columns else 0]
            if has_rows and missing > 0:
                if ".lora_" in name:
                    shape = (tensor.shape[0], missing) if by_columns else (missing, *tensor.shape[1:])
                    tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=1 if by_columns else 0)
                else:
                    weight = _weight(*whole[f"{layer}.{name.rpartition('.')[2]}"])
                    tensor = torch.cat([tensor, weight[-missing:].detach().to(tensor)])
        padded[name] = tensor
    return padded


__all__ = ["merge_adapter", "put_adapter", "with_adapter"]
