# SPDX-License-Identifier: Apache-2.0
"""`load_pretrained_model`: one call from a configuration to a model that is ready to use."""

import dataclasses
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import BitsAndBytesConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import is_deepspeed_zero3_enabled

from .assembling import (
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    assemble,
    fit_projector,
    projector_shapes,
    read_generation_config,
    read_vision_part,
    report_claims,
    with_projector_origin,
    with_tower_origin,
)
from .building import build, make_processor
from .configuration import MoellavaConfig
from .configuration.checkpoint_moellava import AUTO_MAP
from .configuration.custom_code_moellava import CUSTOM_MODULE, is_own_class, registered_in
from .configuration.names_moellava import canonical_projector, stacked_projector
from .configuration.registry_moellava import ENCODERS, PROJECTORS, plain_value
from .converting import is_older, load_older
from .converting.adapters import ADAPTER_FILES
from .lora import merge_adapter, put_adapter
from .modeling import MoellavaForCausalLM
from .modeling.weight_files_moellava import check_adapter
from .origins import folder_name
from .processing import MoellavaProcessor
from .projector_files import read_projector
from .quantizing import STACKED, quantization_coverage
from .request import LoadRequest, is_custom_encoder, read_request
from .sources import CONFIG_NAME, Source, are_same_weights, read_tensors
from .upcycling import is_new_weight, upcycled, with_moe_changes


logger = logging.getLogger(__name__)

# What a device_map may say beside devices: transformers' ways of spreading a model, and where it may be put off to.
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


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
        placement = _placement(request.options["device"], request.options["device_map"])
    request.options["quantization_config"] = _quantization(request.options)
    with _logs_shown(request.options["encoder_debug"] or request.options["projector_debug"]):
        model = _load(request, placement) if request.model_base is None else _load_adapter(request, placement)
        _log_parts(model, request)
        _log_coverage(model)
    return LoadedModel(
        model, model.processor.image_processor, model.processor.tokenizer, context_length(model.config.text_config)
    )


def _load(request: LoadRequest, placement: Any) -> Any:
    source = Source(request.model_path, request.hub_options)
    fields = source.config_dict()
    if is_older(fields):
        return _load_older(source, None, request, placement)
    if fields.get("model_type") != MoellavaConfig.model_type:
        return assemble(request, device_map=placement)
    return _load_checkpoint(source, fields, request, placement)


def _load_older(source: Source, base: Source | None, request: LoadRequest, placement: Any) -> Any:
    """Loads a LLaVA, MoE-LLaVA or Med-MoE checkpoint, or an adapter or a projector of one."""
    if request.projector or request.projector_path or request.moe:
        raise ValueError(
            f"{source} is an older checkpoint, whose projector and experts are part of what it is. Convert it first "
            "(`moellava convert`), then load the result with another projector_config or moe_config."
        )
    model, converted = load_older(
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
    own_code = _needs_its_own_code(source, fields)
    if own_code:
        return _load_with_its_own_code(source, own_code, request, options)
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


def read_processor(source: Source) -> Any:
    """Returns the processor of a checkpoint of this package.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        # Not AutoProcessor, which looks for the class that a file of the checkpoint names.
        return MoellavaProcessor.from_pretrained(
            source.name, trust_remote_code=source.trust_remote_code, **source.hub_options
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The processor of {source} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Expected processor_config.json and the tokenizer's files beside the model, as save_pretrained writes them."
        ) from error


def _takes_other_parts(source: Source, config: MoellavaConfig, request: LoadRequest) -> bool:
    """Whether a request asks for other weights than those that the checkpoint holds."""
    return (
        _asks_for_another_tower(source, config, request)
        or request.projector_path is not None
        or _changed_projector(config, request) is not None
        or (request.moe is not None and config.moe_config is None)
    )


def _asks_for_another_tower(source: Source, config: MoellavaConfig, request: LoadRequest) -> bool:
    if request.vision_tower is not None and not _has_tower(source, config, request):
        return True
    encoder_type = request.model_fields.get("encoder_type", config.encoder_type)
    if not is_custom_encoder(encoder_type):
        return False
    own = {name: plain_value(value, name) for name, value in request.encoder_fields.items()}
    return encoder_type != config.encoder_type or any(
        getattr(config.vision_config, name, None) != value for name, value in own.items()
    )


def _has_tower(source: Source, config: MoellavaConfig, request: LoadRequest) -> bool:
    """Whether the vision tower that a request names is the one that the checkpoint holds.

    A Hub id is compared with what the checkpoint was assembled from. Of a folder a checkpoint keeps no more than the
    name, which others may have too: there the weights are compared.
    """
    name = os.path.expanduser(request.vision_tower)
    recorded = (config.parts or {}).get("vision_tower")
    if not os.path.isdir(name) or recorded not in (name, folder_name(name)):
        return name == recorded and not os.path.isdir(name)
    if is_custom_encoder(config.encoder_type):
        kept = {field: getattr(config.vision_config, field, None) for field in ENCODERS.fields(config.encoder_type)}
        request = dataclasses.replace(
            request,
            encoder_fields={field: value for field, value in kept.items() if value is not None}
            | request.encoder_fields,
            model_fields={"encoder_type": config.encoder_type, **request.model_fields},
        )
    vision = read_vision_part(request)
    is_same = are_same_weights(_part(source.tensors(), TOWER_PREFIX), vision.tensors())
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
    vision, replaced = None, set()
    if _asks_for_another_tower(source, config, request):
        vision = read_vision_part(request)
        changed |= {"vision_config": vision.config, "encoder_type": vision.encoder_type}
        changed["parts"] = with_tower_origin(config.parts, request)
        replaced = {"vision_tower"}
        processor.image_processor = vision.image_processor
    else:
        report_claims(request, config.vision_config, f"of {source}")
    projector, file_tensors = _changed_projector(config, request), None
    if request.projector_path is not None:
        own = {"type": config.projector_config.type, **config.projector_config.fields}
        # What these two are, their files tell; of the others the checkpoint's config tells what nobody says.
        own = None if own["type"] in ("linear", "mlp") else own
        projector, file_tensors = read_projector(
            request.projector_path, stacked_projector(own, request.projector) or {}
        )
    if projector is not None:
        changed["projector_config"] = projector
    earlier_shapes, config = projector_shapes(config), _with_changes(config, changed)
    shapes = projector_shapes(config)
    if file_tensors is not None:
        file_tensors = fit_projector(request.projector_path, file_tensors, config, shapes)

    # What can be wrong apart from the weights has been found by now.
    tensors = source.tensors()
    new_tower, other_tower = False, False
    if vision is not None:
        tower_tensors = vision.tensors()
        new_tower = not tower_tensors
        other_tower = not are_same_weights(_part(tensors, TOWER_PREFIX), tower_tensors)
        tensors = _with_part(tensors, TOWER_PREFIX, tower_tensors)
    new_projector = file_tensors is None and (projector is not None or other_tower or shapes != earlier_shapes)
    if file_tensors is not None:
        tensors = _with_part(tensors, PROJECTOR_PREFIX, file_tensors)
    elif new_projector:
        reason = "does not fit what was asked for"
        if other_tower:
            reason = (
                'was trained with another vision tower (to keep it, give its file as projector_config={"path": ...})'
            )
        logger.warning("The projector of %s %s; a new one is initialised.", source, reason)
        tensors = _with_part(tensors, PROJECTOR_PREFIX, {})
    if file_tensors is not None or new_projector:
        config.parts = with_projector_origin(config.parts, request)
        replaced.add("multi_modal_projector")
    # Of these, `from_pretrained` notes again what it draws at random.
    if config.untrained_parts is not None:
        config.untrained_parts = [part for part in config.untrained_parts if part not in replaced]
    new_experts = request.moe is not None and config.moe_config is None
    if new_experts:
        config, tensors = upcycled(config, tensors, request.moe)
    model = build(
        config,
        tensors,
        is_new=lambda name: (
            (new_projector and name.startswith(PROJECTOR_PREFIX))
            or (new_tower and name.startswith(TOWER_PREFIX))
            or (new_experts and is_new_weight(name))
        ),
        **options,
    )
    model.generation_config = read_generation_config(source) or model.generation_config
    model.processor = make_processor_like(processor, model)
    return model


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the weights of one part, by its own names."""
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def _with_part(tensors: dict[str, torch.Tensor], prefix: str, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the weights with those of one part replaced."""
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    return others | {f"{prefix}{name}": tensor for name, tensor in part.items()}


def _with_changes(config: MoellavaConfig, changed: dict[str, Any]) -> MoellavaConfig:
    return MoellavaConfig.from_dict(config.to_dict() | {"image_seq_length": None} | changed)


def _changed_projector(config: MoellavaConfig, request: LoadRequest) -> dict[str, Any] | None:
    """Returns the projector that the request asks for, or `None` where it is the checkpoint's."""
    asked = request.projector
    own = {"type": config.projector_config.type, **config.projector_config.fields}
    if asked is None:
        return None
    asked = canonical_projector({"type": own["type"], **asked})
    if asked["type"] == own["type"]:
        asked = {name: plain_value(value, name) for name, value in asked.items()}
        if all(own.get(name) == value for name, value in asked.items()):
            return None
        asked = own | asked
    PROJECTORS.check_fields(asked["type"], [name for name in asked if name != "type"])
    return asked


def make_processor_like(processor: Any, model: MoellavaForCausalLM) -> Any:
    """Returns a processor for a model whose pictures differ from those that `processor` prepares."""
    remade = make_processor(model, processor.image_processor, processor.tokenizer)
    remade.chat_template = processor.chat_template
    return remade


def _needs_its_own_code(source: Source, fields: dict[str, Any]) -> str | None:
    """Returns the name of a part of the checkpoint that is not registered here, if there is one."""
    custom_code = source.find(f"{CUSTOM_MODULE}.py")
    own_names = registered_in(custom_code.read_text(encoding="utf-8")) if custom_code is not None else []
    projector = fields.get("projector_config")
    projector = projector.get("type") if isinstance(projector, dict) else None
    for name, table, registry in (
        (fields.get("encoder_type"), "ENCODERS", ENCODERS),
        (projector, "PROJECTORS", PROJECTORS),
    ):
        if not isinstance(name, str):
            continue
        # Its author may have taken the place of a part of this package.
        if name not in registry or ((table, name) in own_names and not is_own_class(registry[name])):
            return name
    return None


def _load_with_its_own_code(source: Source, part: str, request: LoadRequest, options: dict[str, Any]) -> Any:
    """Loads a checkpoint with a part of its author's own by the code that it carries."""
    if not source.trust_remote_code:
        raise ValueError(
            f"{source} has a part {part!r} of its author's own, whose code lies in the checkpoint. Pass "
            "trust_remote_code=True to run it, where you trust its author; or import the file that registers it."
        )
    changes = (request.model_fields, request.projector, request.projector_path, request.vision_tower)
    if any(changes) or request.moe is not None:
        raise ValueError(
            f"{source} is loaded by its own code, because of its part {part!r}, and cannot be changed while loading. "
            f"Import the file that registers {part!r} first, or leave the settings of its parts out."
        )
    model_class = get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], source.name, **source.hub_options)
    processor_class = get_class_from_dynamic_module(AUTO_MAP["AutoProcessor"], source.name, **source.hub_options)
    source.tensors()  # opens every file, since transformers' errors on damaged ones do not say which it is
    model = model_class.from_pretrained(source.name, **source.hub_options, **options)
    # The tokenizer's loader asks the installed package for the config, which does not know the part, and then warns.
    library = logging.getLogger("transformers.configuration_utils")
    library.addFilter(_is_not_about_the_type)
    try:
        model.processor = processor_class.from_pretrained(source.name, **source.hub_options)
    finally:
        library.removeFilter(_is_not_about_the_type)
    return model


def _is_not_about_the_type(record: logging.LogRecord) -> bool:
    return "to instantiate a model of type" not in record.getMessage()


def _load_adapter(request: LoadRequest, placement: Any) -> Any:
    """Loads a LoRA adapter, or the projector of an older checkpoint, onto its base."""
    adapter = Source(request.model_path, request.hub_options)
    fields = adapter.read_json(CONFIG_NAME)
    if fields is not None and is_older(fields):
        return _load_older(adapter, Source(request.model_base, request.hub_options), request, placement)
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
    base = _load(dataclasses.replace(request, model_path=request.model_base, model_base=None), placement)
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


def context_length(text_config: Any) -> int:
    """Returns the number of positions that a language model takes."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(getattr(text_config, name, None), int):
            return getattr(text_config, name)
    return 2048  # families without a table of positions (BLOOM's ALiBi) name none; LLaVA's own value


def _placement(device: Any, device_map: Any) -> Any:
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


def _quantization(options: dict[str, Any]) -> Any:
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


@contextmanager
def _logs_shown(wanted: bool) -> Iterator[None]:
    """Makes the package's log visible while a model is loaded whose user asked for it; on a terminal of its own where
    no logging is configured."""
    if not wanted:
        yield
        return
    package = logging.getLogger("moellava")
    level, handler = package.level, None if package.hasHandlers() else logging.StreamHandler()
    package.setLevel(min(logging.INFO, package.getEffectiveLevel()))
    if handler is not None:
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        if handler is not None:
            package.removeHandler(handler)


def _log_parts(model: Any, request: LoadRequest) -> None:
    """Logs what the vision tower and the projector are, where they come from, and every shape in them."""
    config, parts = model.config, model.config.parts or {}
    checkpoint = request.model_base or request.model_path
    fields = Source(checkpoint, request.hub_options).config_dict()
    is_assembled = fields["model_type"] != MoellavaConfig.model_type and not is_older(fields)
    inner = next(module for module in model.modules() if hasattr(module, "vision_tower") and hasattr(module, "encoder"))
    if request.options["encoder_debug"]:
        encoder = inner.encoder
        how = "as encoder_type says" if "encoder_type" in request.model_fields else "detected"
        logger.info(
            "encoder: %r, %s; model_type %r of the vision tower's config", config.encoder_type, how,
            config.vision_config.model_type,
        )  # fmt: skip
        has_own_source = is_assembled or request.vision_tower is not None
        source = parts.get("vision_tower") if has_own_source else checkpoint
        logger.info("encoder: %s", "has no source, and starts new" if source is None else f"loaded from {source}")
        logger.info(
            "encoder: pictures of %s pixels (natively %s); layers %s of %s; %s features of width %s per picture",
            encoder.image_size, encoder.native_image_size, encoder.feature_layers, encoder.num_hidden_layers,
            encoder.num_selected_tokens, encoder.feature_size,
        )  # fmt: skip
        _log_shapes("encoder", inner.vision_tower)
    if request.options["projector_debug"]:
        how = "by default" if is_assembled else "as the checkpoint has it"
        if (request.projector or {}).get("type"):
            how = "as asked for"
        if request.projector_path is not None:
            how = f"loaded from {request.projector_path}"
        logger.info("projector: %r, %s; %s", config.projector_config.type, how, config.projector_config.fields)
        logger.info(
            "projector: from %s features of width %s to %s tokens of width %s per picture",
            inner.encoder.num_selected_tokens, inner.encoder.feature_size, config.image_seq_length,
            config.text_embedding_size,
        )  # fmt: skip
        _log_shapes("projector", inner.multi_modal_projector)


def _log_coverage(model: Any) -> None:
    """Logs what of a quantised model is quantised, what is not and why."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    coverage = quantization_coverage(model)
    for line in coverage.lines():
        logger.info("quantised: %s", line)
    for part in coverage.parts:
        if STACKED in part.left:
            logger.warning(
                "The experts of this %r are %s, which %s leaves in full precision: %s bytes.",
                model.config.text_config.model_type, STACKED, coverage.method,
                f"{part.bytes:,}",
            )  # fmt: skip


def _log_shapes(label: str, part: torch.nn.Module) -> None:
    for name, parameter in part.named_parameters():
        logger.info("%s: %s %s %s", label, name, tuple(parameter.shape), parameter.dtype)


__all__ = ["LoadedModel", "context_length", "load_pretrained_model", "read_processor"]
