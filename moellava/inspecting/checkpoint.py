# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is made of, told by its config and the headers of its weight files.

No weight is read and no code of the checkpoint is run, so that a checkpoint can be looked at before it is trusted, and
one on the Hub before it is downloaded.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
import huggingface_hub.errors
from safetensors import SafetensorError, safe_open

from ..configuration import MoellavaConfig, MoellavaProjectorConfig
from ..configuration.configuration_moellava import part_config
from ..parts.parts_moellava import ENCODERS, PROJECTORS, encoder_for
from ..reading.language_model import context_length
from ..reading.sources import Source, read_tensors
from ..tree import HEAD, PART_NAMES
from .quantization import QuantizationCoverage, Weights, coverage_of, is_expert, looks_linear


_SAFETENSORS_DTYPE = re.compile(r"(BF|F|I|U)(\d+)(_\w+)?")
_TORCH_PREFIXES = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}
# What torch's normalisation layers keep beside their parameters.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# What bitsandbytes keeps beside a quantised weight.
_QUANTISATION_STATE = re.compile(
    r"(?P<weight>.+)\.(absmax|nested_absmax|nested_quant_map|quant_map|quant_state\.bitsandbytes__\w+)"
    r"|(?P<module>.+)\.(SCB|weight_format)"
)
_PACKED_4BIT = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")


class Parameters(NamedTuple):
    """A number of parameters: all there are, and those that one token passes through."""

    total: int
    active: int


class Bytes(NamedTuple):
    """A size in bytes: of the weight files, and of the weights in memory in the checkpoint's own dtype."""

    disk: int
    memory: int


@dataclasses.dataclass(frozen=True)
class WeightGroup:
    """Weights of one shape under one name in layers that repeat.

    Attributes:
        name (`str`): The name within the part, with `*` in the place of numbers.
        shape (`tuple[int, ...]`): The shape of each.
        dtype (`str`): The dtype that they are stored in; `"nf4"` or `"fp4"` for packed 4-bit weights.
        count (`int`): How many there are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the model: `vision_tower`, `multi_modal_projector`, `language_model` or `lm_head`.

    Attributes:
        name (`str`): The part's place in the model.
        type (`str`): The `model_type` of its config, or the projector's registered name.
        source (`str`, *optional*): The folder or Hub id that it was assembled from, as the checkpoint remembers it.
        parameters (`Parameters`): How many parameters it has; a tied head has none of its own.
        bytes (`Bytes`): How large they are.
        groups (`list[WeightGroup]`): Its weights, in their order in the file.
    """

    name: str
    type: str
    source: str | None
    parameters: Parameters
    bytes: Bytes
    groups: list[WeightGroup]


@dataclasses.dataclass(frozen=True)
class EncoderFacts:
    """The vision encoder. What only the code of somebody's own encoder could tell is `None`.

    Attributes:
        type (`str`): The encoder's registered name.
        model_type (`str`): The `model_type` of the tower's config.
        num_hidden_layers (`int`, *optional*): The tower's layers.
        hidden_size (`int`, *optional*): The tower's width.
        image_size (`int`, *optional*): The side in pixels of the pictures that the tower gets.
        native_image_size (`int`, *optional*): The side that it was made for.
        vision_feature_layer (`int` or `list[int]`): As configured.
        feature_layers (`list[int]`, *optional*): The same, counted from 0, the output of the embeddings.
        vision_feature_select_strategy (`str`): Which tokens are taken.
        num_features (`int`, *optional*): The tokens of one picture that the projector gets.
        feature_size (`int`, *optional*): Their width.
    """

    type: str
    model_type: str
    num_hidden_layers: int | None
    hidden_size: int | None
    image_size: int | None
    native_image_size: int | None
    vision_feature_layer: int | list[int]
    feature_layers: list[int] | None
    vision_feature_select_strategy: str
    num_features: int | None
    feature_size: int | None


@dataclasses.dataclass(frozen=True)
class ProjectorFacts:
    """The projector: its registered name, and the fields of its own."""

    type: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LanguageModelFacts:
    """The language model.

    Attributes:
        model_type (`str`): The `model_type` of its config.
        num_hidden_layers (`int`, *optional*): Its layers.
        hidden_size (`int`, *optional*): Its width.
        vocab_size (`int`): The rows of its vocabulary.
        context_length (`int`): The positions that it takes.
        tie_word_embeddings (`bool`): Whether the head is the embedding.
    """

    model_type: str
    num_hidden_layers: int | None
    hidden_size: int | None
    vocab_size: int
    context_length: int
    tie_word_embeddings: bool


@dataclasses.dataclass(frozen=True)
class SparseFacts:
    """The sparse layers of the language model.

    Attributes:
        num_experts (`int`): The routed experts of a layer.
        num_experts_per_tok (`int`): How many of them a token passes through.
        layers (`list[int]`): The layers that have experts.
    """

    num_experts: int
    num_experts_per_tok: int
    layers: list[int]


@dataclasses.dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint is made of; `inspect_checkpoint` returns it.

    Attributes:
        checkpoint (`str`): The folder or Hub id.
        encoder (`EncoderFacts`): The vision encoder.
        projector (`ProjectorFacts`): The projector.
        language_model (`LanguageModelFacts`): The language model.
        sparse (`SparseFacts`, *optional*): The experts; `None` for a dense model.
        tokens_per_image (`int`): How many tokens one picture becomes in the language model.
        image_size (`int`, *optional*): The side in pixels of the pictures that the tower gets.
        image_aspect_ratio (`str`): `"pad"` or `"square"`.
        image_token_id (`int`): The id of the placeholder.
        dtype (`str`): The dtype that the model is loaded in when nobody asks for another.
        quantization (`str`, *optional*): The method that the weights are quantised with.
        coverage (`QuantizationCoverage`, *optional*): What of a quantised model is quantised, what is not and why.
        parameters (`Parameters`): Of the whole model.
        bytes (`Bytes`): Of the whole model; `disk` is the size of the weight files.
        parts (`list[Part]`): The weights, part by part.
        untrained_parts (`list[str]`): The parts that have never been trained, such as `"multi_modal_projector"`.
        own_code (`list[str]`): The parts of the author's own, such as `"projector 'gated'"`, that are not registered
            here: loading the checkpoint runs the code that it carries, and needs `trust_remote_code=True`.
        transformers_version (`str`, *optional*): The version that saved it.
    """

    checkpoint: str
    encoder: EncoderFacts
    projector: ProjectorFacts
    language_model: LanguageModelFacts
    sparse: SparseFacts | None
    tokens_per_image: int
    image_size: int | None
    image_aspect_ratio: str
    image_token_id: int
    dtype: str
    quantization: str | None
    coverage: QuantizationCoverage | None
    parameters: Parameters
    bytes: Bytes
    parts: list[Part]
    untrained_parts: list[str]
    own_code: list[str]
    transformers_version: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as dictionaries, lists, texts and numbers, ready for `json.dumps`."""
        return _plain(self)


def inspect_checkpoint(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    proxies: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> CheckpointSummary:
    r"""
    Tells what a checkpoint of this package is made of, from `config.json` and the headers of its weight files.

    Of a checkpoint on the Hub only these are fetched. No weight is loaded and no code of the checkpoint is run.

    Args:
        path_or_id (`str` or `os.PathLike`): A folder or a Hub id.
        revision, token, cache_dir, local_files_only, force_download, proxies (*optional*):
            As in transformers' `from_pretrained`.
        trust_remote_code (`bool`, *optional*): Without effect, so that options can be shared with the functions that
            load.

    Raises:
        FileNotFoundError: A path that does not exist, or a checkpoint without weights.
        OSError: A Hub repository that does not exist, cannot be reached or may not be read.
        ValueError: A folder that is no model, a model of another kind, or a damaged file.

    Example:

    ```python
    >>> from moellava import inspect_checkpoint

    >>> summary = inspect_checkpoint("my-model")
    >>> summary.tokens_per_image, summary.parameters.total
    ```"""
    hub_options = {
        "revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None,
        "force_download": force_download or None, "proxies": proxies,
    }  # fmt: skip
    source = Source(path_or_id, {name: value for name, value in hub_options.items() if value is not None})
    fields = source.config_dict()
    if fields.get("model_type") != MoellavaConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {fields.get('model_type')!r}, not a checkpoint of this package (type "
            f"{MoellavaConfig.model_type!r}). A language model becomes one by `moellava assemble`."
        )
    user_parts = unregistered_parts(fields)
    config = MoellavaConfig.from_dict(dict(fields)) if not user_parts else _config_without_code(source, fields)
    headers, disk = _read_headers(source)
    sparse = _sparse_facts(config, headers)
    dtype, quantization = _dtype_name(config.dtype), fields.get("quantization_config")
    parts = _parts(config, headers, dtype, sparse)
    encoder = _encoder_facts(config)
    return CheckpointSummary(
        checkpoint=source.name,
        encoder=encoder,
        projector=_projector_facts(config),
        language_model=_language_facts(config.text_config),
        sparse=sparse,
        tokens_per_image=config.image_seq_length,
        image_size=encoder.image_size,
        image_aspect_ratio=config.image_aspect_ratio,
        image_token_id=config.image_token_id,
        dtype=_dtype_name(config.dtype) or _most_common_dtype(headers),
        quantization=(quantization or {}).get("quant_method"),
        coverage=coverage_of(_weights(headers, dtype), quantization) if quantization else None,
        parameters=Parameters(*map(sum, zip(*(part.parameters for part in parts), strict=True))),
        bytes=Bytes(disk, sum(part.bytes.memory for part in parts)),
        parts=parts,
        untrained_parts=list(config.untrained_parts or ()),
        own_code=user_parts,
        transformers_version=fields.get("transformers_version"),
    )


# The config


def unregistered_parts(fields: Mapping[str, Any]) -> list[str]:
    """Returns which parts of a config are of its author's own, and not registered here."""
    encoder, projector = fields.get("encoder_type"), fields.get("projector_config")
    projector = projector.get("type") if isinstance(projector, Mapping) else None
    own = [] if encoder is None or encoder in ENCODERS else [f"encoder {encoder!r}"]
    return own if projector is None or projector in PROJECTORS else [*own, f"projector {projector!r}"]


def _config_without_code(source: Source, fields: Mapping[str, Any]) -> SimpleNamespace:
    """Returns as much of the config as can be read without the code of a part of its author's own."""
    missing = [
        name for name in ("text_config", "vision_config", "image_seq_length", "image_token_id") if name not in fields
    ]
    if missing:
        raise ValueError(f"The config of {source} has no {', '.join(missing)}. Save or download the model again.")
    declared = {field.name: field.default for field in dataclasses.fields(MoellavaConfig)}
    config = SimpleNamespace(**{**declared, **fields})
    for name in ("text_config", "vision_config"):
        setattr(config, name, part_config(name, fields[name], {"model_type": None}))
    return config


def _encoder_facts(config: Any) -> EncoderFacts:
    vision = config.vision_config
    encoder = encoder_for(config) if config.encoder_type in (None, *ENCODERS.names()) else None
    hidden_size = getattr(vision, "hidden_size", None)
    return EncoderFacts(
        type=encoder.encoder_type if encoder else config.encoder_type,
        model_type=vision.model_type,
        num_hidden_layers=encoder.num_hidden_layers if encoder else None,
        hidden_size=hidden_size if isinstance(hidden_size, int) else None,
        image_size=encoder.image_size if encoder else config.image_size or getattr(vision, "image_size", None),
        native_image_size=encoder.native_image_size if encoder else getattr(vision, "image_size", None),
        vision_feature_layer=config.vision_feature_layer,
        feature_layers=encoder.feature_layers if encoder else None,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_features=encoder.num_selected_tokens if encoder else None,
        feature_size=encoder.feature_size if encoder else None,
    )


def _projector_facts(config: Any) -> ProjectorFacts:
    projector = config.projector_config
    if isinstance(projector, MoellavaProjectorConfig):
        return ProjectorFacts(projector.type, projector.fields)
    common = {"model_type", "type", *MoellavaProjectorConfig().to_dict()}
    if projector["type"] in PROJECTORS:
        common -= set(PROJECTORS.fields(projector["type"]))
    else:
        # A field of the built-in MLP may be one of this projector's too.
        common -= set(PROJECTORS.fields(MoellavaProjectorConfig.type))
    return ProjectorFacts(projector["type"], {key: value for key, value in projector.items() if key not in common})


def _language_facts(text: Any) -> LanguageModelFacts:
    return LanguageModelFacts(
        model_type=text.model_type,
        num_hidden_layers=getattr(text, "num_hidden_layers", None),
        hidden_size=getattr(text, "hidden_size", None),
        vocab_size=text.vocab_size,
        context_length=context_length(text),
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def _sparse_facts(config: Any, headers: Iterable[str]) -> SparseFacts | None:
    """Reads our own `moe_config`, or the config of a language model that is a mixture by itself."""
    routing = getattr(config, "moe_config", None) or config.text_config
    read = routing.get if isinstance(routing, Mapping) else lambda name: getattr(routing, name, None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((read(name) for name in names if isinstance(read(name), int)), None)
    layers = set()
    for name in headers:
        words = name.split(".")
        if "experts" in words:
            layers.add(next(int(word) for word in words if word.isdigit()))
    chosen = read("num_experts_per_tok")
    return SparseFacts(experts, chosen, sorted(layers)) if experts and isinstance(chosen, int) and layers else None


def _dtype_name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


# The weights


class _Header(NamedTuple):
    """What is known of a tensor without reading it; `packed` names the format of packed 4-bit weights."""

    dtype: str  # as torch calls it
    shape: tuple[int, ...]
    packed: str | None = None
    packed_shape: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """In bytes, as stored."""
        return math.prod(self.shape) * _itemsize(self.dtype)

    @property
    def elements(self) -> int:
        if self.packed is None:
            return math.prod(self.shape)
        return math.prod(self.packed_shape) if self.packed_shape else 2 * self.size

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.startswith(("bfloat", "float"))


def _torch_name(dtype: str) -> str:
    """Returns torch's name of a dtype, for safetensors' name."""
    match = _SAFETENSORS_DTYPE.fullmatch(dtype)
    if match is None:
        return dtype.lower()
    return f"{_TORCH_PREFIXES[match.group(1)]}{match.group(2)}{(match.group(3) or '').lower()}"


def _itemsize(dtype: str) -> int:
    return 1 if dtype == "bool" else int(re.search(r"\d+", dtype).group()) // 8  # float32, bfloat16, float8_e4m3, ...


def _read_headers(source: Source) -> tuple[dict[str, _Header], int]:
    """Returns the header of every tensor, and the size of the weight files in bytes."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or source.hub_options.get("local_files_only")
    if not source.is_local and not offline:
        headers, disk = _hub_headers(source)
    else:
        headers, disk = {}, 0
        for path in source.weight_files():
            headers |= _file_headers(path)
            disk += path.stat().st_size
    packed = {match.group(1): match.group(2) for name in headers if (match := _PACKED_4BIT.fullmatch(name))}
    for weight, kind in packed.items():
        if weight in headers:
            state = headers[f"{weight}.quant_state.bitsandbytes__{kind}"]
            headers[weight] = headers[weight]._replace(packed=kind, packed_shape=state.packed_shape)
    return headers, disk


def _file_headers(path: Any) -> dict[str, _Header]:
    headers = {}
    if path.suffix != ".safetensors":
        for name, tensor in read_tensors(path):  # memory-mapped: no weight is read
            headers[name] = _Header(_dtype_name(tensor.dtype), tuple(tensor.shape))
        return headers
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                entry = file.get_slice(name)
                header = _Header(_torch_name(entry.get_dtype()), tuple(entry.get_shape()))
                if _PACKED_4BIT.fullmatch(name):  # a short text that tells the shape of the weight
                    header = header._replace(packed_shape=tuple(json.loads(bytes(file.get_tensor(name)))["shape"]))
                headers[name] = header
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is cut off or damaged. Save or download it again."
        ) from error
    return headers


def _hub_headers(source: Source) -> tuple[dict[str, _Header], int]:
    revision = source.hub_options.get("revision")
    hub = huggingface_hub.HfApi(token=source.hub_options.get("token"))
    try:
        metadata = hub.get_safetensors_metadata(source.name, revision=revision)
    except huggingface_hub.errors.NotASafetensorsRepoError as error:
        raise ValueError(
            f"{source} has no safetensors weights, whose headers could be read. Download it first."
        ) from error
    except huggingface_hub.errors.SafetensorsParsingError as error:
        raise ValueError(f"The weights of {source} are damaged: {error}") from error
    headers = {
        name: _Header(_torch_name(str(tensor.dtype)), tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    files = hub.get_paths_info(source.name, list(metadata.files_metadata), revision=revision)
    return headers, sum(file.size for file in files)


def _most_common_dtype(headers: Mapping[str, _Header]) -> str:
    sizes: dict[str, int] = {}
    for header in headers.values():
        sizes[header.dtype] = sizes.get(header.dtype, 0) + header.size
    return max(sizes, key=sizes.__getitem__)


def _parts(config: Any, headers: Mapping[str, _Header], dtype: str | None, sparse: SparseFacts | None) -> list[Part]:
    by_part: dict[str, dict[str, _Header]] = {name: {} for name in PART_NAMES}
    for name, header in headers.items():
        part, _, rest = name.removeprefix("model.").partition(".")  # the base model saved alone has no "model."
        by_part.setdefault(part, {})[rest] = header
    projector = config.projector_config
    text_type = config.text_config.model_type
    types = {
        "vision_tower": config.vision_config.model_type,
        "multi_modal_projector": projector["type"] if isinstance(projector, Mapping) else projector.type,
        "language_model": text_type,
        HEAD: "tied to the embedding" if config.tie_word_embeddings and not by_part[HEAD] else text_type,
    }
    sources = config.parts or {}
    origins = {
        "vision_tower": sources.get("vision_tower"),
        "language_model": sources.get("language_model") or sources.get("model_path"),
    }
    origins[HEAD] = origins["language_model"]
    share = sparse.num_experts_per_tok / sparse.num_experts if sparse else 1.0
    return [
        _part(
            name, types.get(name, "unknown"), origins.get(name), own, dtype, share if name == "language_model" else 1.0
        )
        for name, own in by_part.items()
    ]


def _part(
    name: str, kind: str, source: str | None, headers: Mapping[str, _Header], dtype: str | None, active_share: float
) -> Part:
    state = _quantisation_state(headers)
    quantised = set(state.values())
    total, routed, disk, memory = 0, 0, 0, 0
    for tensor, header in headers.items():
        disk += header.size
        memory += _memory(tensor, header, dtype, state)
        if tensor in state or tensor.rpartition(".")[2] in _BUFFERS:
            continue
        if header.is_floating_point or tensor in quantised:
            total += header.elements
            routed += header.elements if is_expert(tensor) else 0
    active = total - routed + round(routed * active_share)
    shown = {tensor: header for tensor, header in headers.items() if tensor not in state}
    return Part(name, kind, source, Parameters(total, active), Bytes(disk, memory), _groups(shown))


def _quantisation_state(headers: Iterable[str]) -> dict[str, str]:
    """Returns the tensors that belong to quantised weights, with the name of the weight."""
    state = {}
    for tensor in headers:
        if match := _QUANTISATION_STATE.fullmatch(tensor):
            state[tensor] = match.group("weight") or f"{match.group('module')}.weight"
    return state


def _memory(tensor: str, header: _Header, dtype: str | None, state: Mapping[str, str]) -> int:
    """Returns the bytes of a tensor in a model that is loaded in the checkpoint's own dtype."""
    is_plain = tensor not in state and tensor not in state.values()
    if header.is_floating_point and dtype is not None and is_plain:
        return header.elements * _itemsize(dtype)
    return header.size


def _weights(headers: Mapping[str, _Header], dtype: str | None) -> Iterator[Weights]:
    """Goes through the modules of a checkpoint."""
    state = _quantisation_state(headers)
    quantised = set(state.values())
    modules: dict[str, list[str]] = {}
    for tensor in headers:
        modules.setdefault(state.get(tensor, tensor).rpartition(".")[0], []).append(tensor)
    for module, tensors in modules.items():
        own = [tensor for tensor in tensors if tensor not in state and tensor.rpartition(".")[2] not in _BUFFERS]
        counted = [tensor for tensor in own if headers[tensor].is_floating_point or tensor in quantised]
        dimensions = max((len(headers[tensor].packed_shape or headers[tensor].shape) for tensor in own), default=0)
        if counted:
            yield Weights(
                module=module,
                parameters=sum(headers[tensor].elements for tensor in counted),
                bytes=sum(_memory(tensor, headers[tensor], dtype, state) for tensor in tensors),
                is_quantized=not quantised.isdisjoint(own),
                is_linear=looks_linear(module, dimensions),
                is_stacked=is_expert(module) and dimensions == 3,
            )


def _groups(headers: Mapping[str, _Header]) -> list[WeightGroup]:
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, header in sorted(headers.items(), key=lambda item: _natural(item[0])):
        pattern = ".".join("*" if word.isdigit() else word for word in name.split("."))
        key = (pattern, header.packed_shape or header.shape, header.packed or header.dtype)
        counts[key] = counts.get(key, 0) + 1
    return [WeightGroup(*key, count) for key, count in counts.items()]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]


def _plain(value: Any) -> Any:
    if isinstance(value, QuantizationCoverage):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value


__all__ = [
    "Bytes",
    "CheckpointSummary",
    "EncoderFacts",
    "LanguageModelFacts",
    "Parameters",
    "Part",
    "ProjectorFacts",
    "SparseFacts",
    "WeightGroup",
    "inspect_checkpoint",
    "unregistered_parts",
]
