# SPDX-License-Identifier: Apache-2.0
"""`load_pretrained_model`: one call from a configuration to a model that is ready to use."""

import dataclasses
import importlib
import logging
import os
from typing import Any, NamedTuple

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ..authoring.load_request import LoadRequest, is_user_encoder, read_request
from ..authoring.older_names import canonical_projector, stacked_projector
from ..authoring.part_fields import check_fields, plain_value
from ..building.assembling import assemble, with_projector_provenance, with_tower_provenance
from ..building.build import build
from ..building.dense_to_sparse import upcycled, with_moe_changes
from ..building.lora import merge_adapter, put_adapter
from ..checks.weight_files import check_adapter
from ..configuration import MoellavaConfig
from ..converting.legacy_adapters import ADAPTER_FILES
from ..converting.legacy_checkpoint import load_legacy
from ..converting.legacy_config import is_legacy
from ..modeling import MoellavaForCausalLM
from ..parts.parts_moellava import ENCODERS, PROJECTORS
from ..reading.language_model import context_length, read_generation_config
from ..reading.processor import make_processor_like, read_processor
from ..reading.projector_file import fit_projector, projector_shapes, read_projector
from ..reading.provenance import folder_name
from ..reading.sources import CONFIG_NAME, Source, are_same_weights, read_tensors
from ..reading.vision_tower import read_vision_part, report_claims
from ..tree import PROJECTOR_PREFIX, TOWER_PREFIX, is_new_weight, part_weights, with_part
from .load_log import log_coverage, log_parts, logs_shown
from .placement import placement_of, quantization_of
from .remote_code import load_by_remote_code, unregistered_part


logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """What `load_pretrained_model` returns, in the older builder's order.

    Attributes:
        model (`MoellavaForCausalLM`): The model in evaluation mode; `model.processor` prepares text and pictures.
        image_processor: The vision tower's image processor.
        tokenizer: The language model's tokenizer, with the image token.
        context_len (`int`): The number of positions that the language model takes.
    """

    model: Any
    image_processor: Any
    tokenizer: Any
    context_len: int


def load_pretrained_model(
    model_path: Any = None,
    model_base: str | os.PathLike | None = None,
    model_name: str | None = None,
    load_8bit: bool | None = None,
    load_4bit: bool | None = None,
    device_map: Any = None,
    device: str | torch.device | None = None,
    **kwargs,
) -> LoadedModel:
    r"""
    Loads a checkpoint, or assembles a model from a language model, a vision tower and a projector.

    Every setting may be given by keyword, in a dictionary or object as first argument, or in the objects
    `custom_vision_config`, `projector_config` and `moe_config`. Where they disagree: the keyword, then the object or
    dictionary, then the checkpoint's own config, then the default. `docs/configuration.md` lists every field and its
    older names.

    Args:
        model_path (`str`, `os.PathLike`, `Mapping` or object):
            A checkpoint of this package; or a language model, to which a vision tower and a new projector are added; as
            a folder or a Hub id. Or a configuration: a dictionary, a dataclass, any object with attributes.
        model_base (`str`, *optional*):
            The model that `model_path` is a LoRA adapter of.
        model_name (`str`, *optional*):
            Without effect; the older builder chose classes by it, this one reads the config.
        load_8bit, load_4bit (`bool`, *optional*):
            Quantise with bitsandbytes: LLM.int8(), or nf4 with double quantisation.
        device_map (`str` or `dict`, *optional*):
            Where the weights go, as in transformers; instead of `device`.
        device (`str` or `torch.device`, *optional*):
            Where the model goes. Defaults to the best device there is.
        kwargs:
            The fields of the configuration (`mm_vision_tower`, `encoder_type`, `projector_type`,
            `vision_feature_layer`, ...); `dtype`; `quantization_config`; `merge=False` to keep a LoRA adapter apart;
            `encoder_debug` and `projector_debug` to log what is detected, loaded, skipped and newly initialised;
            `revision`, `token`, `cache_dir`, `local_files_only`, `trust_remote_code` for the Hub;
            `modules_to_quantize`, `attn_implementation`, `max_memory`, `offload_folder` and the like for
            `from_pretrained`.

    Returns:
        [`LoadedModel`]: `(model, image_processor, tokenizer, context_len)`.

    Raises:
        FileNotFoundError: A path that does not exist.
        ImportError: A part needs an extra that is not installed.
        TypeError: A configuration that is neither a dictionary nor an object with attributes.
        ValueError: An unknown field or part, parts that do not fit together, a device that is not there, or a file
            that is damaged; the message says what to change. No weights have been read by then, but for damage that
            only reading them shows.

    Example:

    ```python
    >>> from moellava import load_pretrained_model

    >>> model, image_processor, tokenizer, context_len = load_pretrained_model(
    ...     "TinyLlama/TinyLlama-1.1B-Chat-v1.0", mm_vision_tower="openai/clip-vit-large-patch14", projector_type="mlp"
    ... )
    ```"""
    keywords = {
        "model_base": model_base, "load_8bit": load_8bit, "load_4bit": load_4bit, "device_map": device_map,
        "device": device, **kwargs,
    }  # fmt: skip
    if model_name is not None:
        logger.debug("model_name %r has no effect: what a checkpoint is, its config tells.", model_name)
    request = read_request(model_path, keywords)
    placement = None
    # Both say themselves where weights go.
    if "distributed_config" not in request.model_options and not is_deepspeed_zero3_enabled():
        placement = placement_of(request.options["device"], request.options["device_map"])
    request.options["quantization_config"] = quantization_of(request.options)
    with logs_shown(request.options["encoder_debug"] or request.options["projector_debug"]):
        base = request.model_base
        model = _load(request, placement) if base is None else _load_adapter(request, base, placement)
        log_parts(model, request)
        log_coverage(model)
    return LoadedModel(
        model, model.processor.image_processor, model.processor.tokenizer, context_length(model.config.text_config)
    )


def _load(request: LoadRequest, placement: Any) -> Any:
    source = Source(request.model_path, request.hub_options)
    fields = source.config_dict()
    if is_legacy(fields):
        return _load_legacy(source, None, request, placement)
    if fields.get("model_type") != MoellavaConfig.model_type:
        return assemble(request, device_map=placement)
    return _load_checkpoint(source, fields, request, placement)


def _load_legacy(source: Source, base: Source | None, request: LoadRequest, placement: Any) -> Any:
    """Loads a LLaVA, MoE-LLaVA or Med-MoE checkpoint, or an adapter or a projector of one."""
    if request.projector or request.projector_path or request.moe:
        raise ValueError(
            f"{source} is an older checkpoint, whose projector and experts are part of what it is. Convert it first "
            "(`moellava convert`), then load the result with another projector_config or moe_config."
        )
    model, converted = load_legacy(
        source,
        base,
        request.vision_tower,
        changes=request.model_fields,
        merge=request.options["merge"],
        dtype=request.options["dtype"],
        device_map=placement,
        quantization_config=request.options["quantization_config"],
        **request.model_options,
    )
    for note in converted.notes:
        logger.warning("%s: %s.", source, note)
    return model


def _load_checkpoint(source: Source, fields: dict[str, Any], request: LoadRequest, placement: Any) -> Any:
    """Loads a checkpoint of this package, with what the request changes of it."""
    options = {
        "device_map": placement,
        "dtype": request.options["dtype"] or "auto",
        "quantization_config": request.options["quantization_config"],
        **request.model_options,
    }
    options = {name: value for name, value in options.items() if value is not None}
    part = unregistered_part(source, fields)
    if part:
        return load_by_remote_code(source, part, request, options)
    missing = [name for name in ("text_config", "vision_config") if not fields.get(name)]
    if missing:
        raise ValueError(
            f"The config.json of {source} has no {' and no '.join(missing)}, so that it does not tell what the model "
            "is made of. Save or download it again."
        )
    config = MoellavaConfig.from_dict(dict(fields))
    processor = read_processor(source)
    if processor.num_image_tokens != config.image_seq_length:
        raise ValueError(
            f"The processor of {source} makes {processor.num_image_tokens} tokens of a picture, its model "
            f"{config.image_seq_length}. Save the processor and the model together again."
        )
    changed = {name: value for name, value in request.model_fields.items() if getattr(config, name) != value}
    if request.moe is not None and config.moe_config is not None:
        changed["moe_config"] = with_moe_changes(config, request.moe)
    changed_config = config
    if not _takes_other_parts(source, config, request):
        if changed:
            changed_config = _with_changes(config, changed)
        if projector_shapes(changed_config) == projector_shapes(config):
            report_claims(request, config.vision_config, f"of {source}")
            source.tensors()  # opens every file, since transformers' errors on damaged ones do not say which it is
            model = build(changed_config, source.name, **source.hub_options, **options)
            model.processor = make_processor_like(processor, model) if changed else processor
            return model
    return _load_with_other_parts(source, config, processor, changed, request, options)


def _takes_other_parts(source: Source, config: MoellavaConfig, request: LoadRequest) -> bool:
    """Whether a request asks for other weights than those that the checkpoint holds."""
    return (
        _asks_for_another_tower(source, config, request)
        or request.projector_path is not None
        or _changed_projector(config, request) is not None
        or (request.moe is not None and config.moe_config is None)
    )


def _asks_for_another_tower(source: Source, config: MoellavaConfig, request: LoadRequest) -> bool:
    if request.vision_tower is not None and not _has_tower(source, config, request, request.vision_tower):
        return True
    encoder_type = request.model_fields.get("encoder_type", config.encoder_type)
    if not is_user_encoder(encoder_type):
        return False
    own = {name: plain_value(value, name) for name, value in request.encoder_fields.items()}
    return encoder_type != config.encoder_type or any(
        getattr(config.vision_config, name, None) != value for name, value in own.items()
    )


def _has_tower(source: Source, config: MoellavaConfig, request: LoadRequest, name: str) -> bool:
    """Whether the vision tower that a request names is the one that the checkpoint holds.

    A Hub id is compared with what the checkpoint was assembled from. Of a folder a checkpoint keeps no more than the
    name, which others may have too: there the weights are compared.
    """
    name = os.path.expanduser(name)
    recorded = (config.parts or {}).get("vision_tower")
    if not os.path.isdir(name) or recorded not in (name, folder_name(name)):
        return name == recorded and not os.path.isdir(name)
    if is_user_encoder(config.encoder_type):
        kept = {field: getattr(config.vision_config, field, None) for field in ENCODERS.fields(config.encoder_type)}
        request = dataclasses.replace(
            request,
            encoder_fields={field: value for field, value in kept.items() if value is not None}
            | request.encoder_fields,
            model_fields={"encoder_type": config.encoder_type, **request.model_fields},
        )
    vision = read_vision_part(request)
    is_same = are_same_weights(part_weights(source.tensors(), TOWER_PREFIX), vision.tensors())
    if not is_same:
        logger.warning("%s has other weights than the vision tower in %s, and takes its place.", name, source)
    return is_same


def _load_with_other_parts(
    source: Source,
    config: MoellavaConfig,
    processor: Any,
    changed: dict[str, Any],
    request: LoadRequest,
    options: dict[str, Any],
) -> MoellavaForCausalLM:
    """Loads a checkpoint with another tower or projector, or upcycled."""
    vision, earlier = None, config
    if _asks_for_another_tower(source, config, request):
        vision = read_vision_part(request)
        changed |= {"vision_config": vision.config, "encoder_type": vision.encoder_type}
        changed["parts"] = with_tower_provenance(config.parts, request)
        processor.image_processor = vision.image_processor
    else:
        report_claims(request, config.vision_config, f"of {source}")
    projector, file_tensors = _other_projector(config, request)
    if projector is not None:
        changed["projector_config"] = projector
    config = _with_changes(config, changed)
    shapes = projector_shapes(config)
    if file_tensors is not None and request.projector_path is not None:
        file_tensors = fit_projector(request.projector_path, file_tensors, config, shapes)

    # What can be wrong apart from the weights has been found by now.
    tensors = source.tensors()
    new_tower, other_tower = False, False
    if vision is not None:
        tower_tensors = vision.tensors()
        new_tower = not tower_tensors
        other_tower = not are_same_weights(part_weights(tensors, TOWER_PREFIX), tower_tensors)
        tensors = with_part(tensors, TOWER_PREFIX, tower_tensors)
    new_projector = file_tensors is None and (
        projector is not None or other_tower or shapes != projector_shapes(earlier)
    )
    if new_projector:
        reason = "does not fit what was asked for"
        if other_tower:
            reason = (
                'was trained with another vision tower (to keep it, give its file as projector_config={"path": ...})'
            )
        logger.warning("The projector of %s %s; a new one is initialised.", source, reason)
    replaced = set() if vision is None else {"vision_tower"}
    if file_tensors is not None or new_projector:
        tensors = with_part(tensors, PROJECTOR_PREFIX, file_tensors or {})
        config.parts = with_projector_provenance(config.parts, request)
        replaced.add("multi_modal_projector")
    # Of these, `from_pretrained` notes again what it draws at random.
    if config.untrained_parts is not None:
        config.untrained_parts = [part for part in config.untrained_parts if part not in replaced]
    new_experts = request.moe if config.moe_config is None else None
    if new_experts is not None:
        config, tensors = upcycled(config, tensors, new_experts)
    new = (*[PROJECTOR_PREFIX] * new_projector, *[TOWER_PREFIX] * new_tower)
    model = build(
        config,
        tensors,
        lambda name: name.startswith(new) or (new_experts is not None and is_new_weight(name)),
        **options,
    )
    model.generation_config = read_generation_config(source) or model.generation_config
    model.processor = make_processor_like(processor, model)
    return model


def _other_projector(
    config: MoellavaConfig, request: LoadRequest
) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None]:
    """Returns the fields and the weights of the projector that a request asks for, `None` where it is the checkpoint's
    and where it is to be new."""
    if request.projector_path is None:
        return _changed_projector(config, request), None
    own = _own_projector(config)
    # What these two are, their files tell; of the others the checkpoint's config tells what nobody says.
    lower = None if own["type"] in ("linear", "mlp") else own
    return read_projector(request.projector_path, stacked_projector(lower, request.projector) or {})


def _own_projector(config: MoellavaConfig) -> dict[str, Any]:
    projector: Any = config.projector_config  # no dictionary, once the config is made
    return {"type": projector.type, **projector.fields}


def _with_changes(config: MoellavaConfig, changed: dict[str, Any]) -> MoellavaConfig:
    return MoellavaConfig.from_dict(config.to_dict() | {"image_seq_length": None} | changed)


def _changed_projector(config: MoellavaConfig, request: LoadRequest) -> dict[str, Any] | None:
    """Returns the projector that the request asks for, or `None` where it is the checkpoint's."""
    asked = request.projector
    own = _own_projector(config)
    if asked is None:
        return None
    asked = canonical_projector({"type": own["type"], **asked})
    if asked["type"] == own["type"]:
        asked = {name: plain_value(value, name) for name, value in asked.items()}
        if all(own.get(name) == value for name, value in asked.items()):
            return None
        asked = own | asked
    check_fields(PROJECTORS, asked["type"], [name for name in asked if name != "type"])
    return asked


def _load_adapter(request: LoadRequest, model_base: str, placement: Any) -> Any:
    """Loads a LoRA adapter, or the projector of an older checkpoint, onto its base."""
    adapter = Source(request.model_path, request.hub_options)
    fields = adapter.read_json(CONFIG_NAME)
    if fields is not None and is_legacy(fields):
        return _load_legacy(adapter, Source(model_base, request.hub_options), request, placement)
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("A LoRA adapter needs PEFT, which is not installed: `pip install moellava[peft]`.") from error
    adapter_config = adapter.find("adapter_config.json")
    if adapter_config is None:
        raise ValueError(
            f"model_base is given, but {adapter} is no LoRA adapter: it has no adapter_config.json. To load a "
            "checkpoint, give its path as model_path and leave model_base out."
        )
    check_adapter(adapter_config)
    weights = next((path for name in ADAPTER_FILES if (path := adapter.find(name)) is not None), None)
    if weights is None:
        raise FileNotFoundError(
            f"{adapter} has an adapter_config.json, but no weights of an adapter: expected "
            f"{' or '.join(ADAPTER_FILES)} beside it. Save or download it again."
        )
    tensors = dict(read_tensors(weights))
    base = _load(dataclasses.replace(request, model_path=model_base, model_base=None), placement)
    processor = base.processor
    model = put_adapter(base, adapter, tensors, request.options["merge"])
    if base.config.untrained_parts is not None:
        adapted = [name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name]
        base.config.untrained_parts = [
            part for part in base.config.untrained_parts if not any(f".{part}." in name for name in adapted)
        ]
    if request.options["merge"]:
        model = merge_adapter(model)
    else:
        model.processor = processor
    return model


__all__ = ["LoadedModel", "load_pretrained_model", "read_processor"]
