# SPDX-License-Identifier: Apache-2.0
"""What of a model is quantised, what is not and why, and how many bytes its weights take."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..parts.quantised_moellava import SKIP_LISTS, default_skips
from ..tree import PEFT_PREFIX, ROUTED_EXPERTS, ROUTER, place_of


PARTS = (
    "vision_tower",
    "multi_modal_projector",
    "attention",
    "mlp",
    "experts",
    "routers",
    "embeddings",
    "norms",
    "lm_head",
    "adapters",
    "other",
)
BY_DEFAULT = "left by default"
BY_LIST = "named by the list of what is left alone"
NOT_LINEAR = "no linear layer"
STACKED = "tensors of three dimensions"
BY_METHOD = "left by the method"

_LIKE_LINEAR = re.compile(
    r"(.*\.)?(\w*proj\w*|fc\d|\w*linear\w*|dense\w*|lm_head|query|key|value|query_key_value|c_attn|c_fc)"
)
_ATTENTION = re.compile(r"(^|\.)\w*att(n|ention)\w*(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)\w*(embed|wte|wpe)\w*$")
_NORM = re.compile(r"(^|\.)(\w*norm\w*|ln_\w+)$")
_MLP = re.compile(r"(^|\.)(\w*mlp|fc1|fc2|meta_expert|shared_expert)(\.|$)|(^|\.)(gate|up|gate_up|down)_proj$")


@dataclasses.dataclass(frozen=True)
class PartCoverage:
    """How much of one part of a model is quantised.

    Attributes:
        name (`str`): One of `PARTS`; attention, mlp, experts, routers, embeddings and norms are the language model's.
        modules (`int`): The modules that hold weights.
        quantized_modules (`int`): Those of them whose weights are quantised.
        parameters (`int`): How many parameters they have, however these are packed.
        quantized_parameters (`int`): How many of them are quantised.
        bytes (`int`): What they take, scales and tables of the quantisation included.
        bytes_bf16 (`int`): What they would take in bf16.
        left (`dict[str, int]`): Why modules are not quantised, with the number of them.
    """

    name: str
    modules: int
    quantized_modules: int
    parameters: int
    quantized_parameters: int
    bytes: int
    bytes_bf16: int
    left: dict[str, int]


@dataclasses.dataclass(frozen=True)
class QuantizationCoverage:
    """What of a model is quantised; `quantization_coverage` returns it.

    Attributes:
        method (`str`): The method, such as `"bitsandbytes"`.
        bits (`int`, *optional*): The bits of a quantised weight, where the config tells.
        parts (`list[PartCoverage]`): In the order of `PARTS`, those that the model has.
    """

    method: str
    bits: int | None
    parts: list[PartCoverage]

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(part.parameters for part in self.parts)

    @property
    def quantized_parameters(self) -> int:
        """How many of them are quantised."""
        return sum(part.quantized_parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """What the model's weights take."""
        return sum(part.bytes for part in self.parts)

    @property
    def bytes_bf16(self) -> int:
        """What they would take in bf16."""
        return sum(part.bytes_bf16 for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, the sums too, as dictionaries, lists, texts and numbers, ready for `json.dumps`."""
        sums = ("parameters", "quantized_parameters", "bytes", "bytes_bf16")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in sums}}

    def lines(self) -> list[str]:
        """Returns the report as lines of text: one for the whole, one for each part."""
        kind = self.method if self.bits is None else f"{self.method}, {self.bits} bits"
        lines = [
            f"{kind}: {self.quantized_parameters:,} of {self.parameters:,} parameters are quantised; "
            f"{_share(self.bytes, self.bytes_bf16)}"
        ]
        for part in self.parts:
            left = "; ".join(f"{count} {reason}" for reason, count in part.left.items())
            lines.append(
                f"{part.name}: {part.quantized_modules} of {part.modules} modules are quantised; "
                f"{_share(part.bytes, part.bytes_bf16)}{f'; {left}' if left else ''}"
            )
        return lines


def _share(size: int, in_bf16: int) -> str:
    return f"{size:,} bytes, {size / in_bf16:.3f} of bf16's {in_bf16:,}" if in_bf16 else f"{size:,} bytes"


class Weights(NamedTuple):
    """The weights of one module.

    Attributes:
        module (`str`): Its name within the model.
        parameters (`int`): How many parameters it has.
        bytes (`int`): What they take.
        is_quantized (`bool`): Whether they are quantised.
        is_linear (`bool`): Whether the module is a linear layer.
        is_stacked (`bool`): Whether they are experts in tensors of three dimensions.
    """

    module: str
    parameters: int
    bytes: int
    is_quantized: bool
    is_linear: bool
    is_stacked: bool


def quantization_coverage(model: nn.Module) -> QuantizationCoverage:
    """Tells what of a model is quantised, what is not and why.

    Args:
        model (`nn.Module`): A model that was loaded quantised, or one with adapters on top.

    Raises:
        ValueError: The model is not quantised.

    Example:

    ```python
    >>> from moellava import load_pretrained_model, quantization_coverage

    >>> model = load_pretrained_model("my-sparse-model", load_4bit=True).model
    >>> print(*quantization_coverage(model).lines(), sep="\\n")
    ```"""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        raise ValueError("The model is not quantised: load it with load_4bit, load_8bit or a quantization_config.")
    return coverage_of(_weights_of(model), config)


def coverage_of(weights: Iterable[Weights], config: Any) -> QuantizationCoverage:
    """Makes the report of weights and a quantisation config, an object or a dictionary."""
    fields = config if isinstance(config, dict) else config.to_dict()
    skips = next((list(fields[name] or []) for name in SKIP_LISTS if name in fields), [])
    parts: dict[str, list[Weights]] = {}
    for entry in weights:
        parts.setdefault(part_of(entry.module), []).append(entry)
    method = fields.get("quant_method", "unknown")
    return QuantizationCoverage(
        method=str(getattr(method, "value", method)),
        bits=4 if fields.get("load_in_4bit") else 8 if fields.get("load_in_8bit") else fields.get("bits"),
        parts=[_part(name, parts[name], skips) for name in PARTS if name in parts],
    )


def _part(name: str, weights: list[Weights], skips: list[str]) -> PartCoverage:
    quantized = [entry for entry in weights if entry.is_quantized]
    left: dict[str, int] = {}
    for entry in weights:
        if not entry.is_quantized:
            reason = _why_left(entry, skips)
            left[reason] = left.get(reason, 0) + 1
    parameters = sum(entry.parameters for entry in weights)
    return PartCoverage(
        name=name,
        modules=len(weights),
        quantized_modules=len(quantized),
        parameters=parameters,
        quantized_parameters=sum(entry.parameters for entry in quantized),
        bytes=sum(entry.bytes for entry in weights),
        bytes_bf16=2 * parameters,
        left=left,
    )


def _why_left(entry: Weights, skips: list[str]) -> str:
    if entry.is_stacked:
        return STACKED
    by = [skip for skip in skips if _matches(entry.module, skip)]
    if by:
        return BY_DEFAULT if set(by) & set(default_skips()) else BY_LIST
    return BY_METHOD if entry.is_linear else NOT_LINEAR


def _matches(module: str, skip: str) -> bool:
    """Whether transformers leaves a module alone for this entry of the list."""
    if module.endswith(skip):
        return True
    try:
        return re.match(rf"(?:{skip})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:
        return False


def part_of(module: str) -> str:
    """Returns the part that a module belongs to, one of `PARTS`."""
    if ".lora_" in module or ".modules_to_save." in module:
        return "adapters"
    name, place = _plain_name(module), place_of(module)
    if place not in (None, "language_model"):
        return place
    kinds = {
        "experts": ROUTED_EXPERTS,
        "routers": ROUTER,
        "embeddings": _EMBEDDING,
        "norms": _NORM,
        "attention": _ATTENTION,
        "mlp": _MLP,
    }
    return next((part for part, kind in kinds.items() if kind.search(name)), "other")


def _plain_name(module: str) -> str:
    """Returns the name that a module has without a head and without adapters."""
    return module.removeprefix(PEFT_PREFIX).removesuffix(".base_layer").removeprefix("model.")


def is_expert(name: str) -> bool:
    """Whether a module or a weight belongs to the routed experts of a sparse layer."""
    return ROUTED_EXPERTS.search(name) is not None


def looks_linear(module: str, dimensions: int) -> bool:
    """Whether a weight is that of a linear layer, judged by its module's name and its number of dimensions."""
    return dimensions == 2 and _LIKE_LINEAR.fullmatch(module) is not None


def resident_bytes(model: nn.Module) -> int:
    """Returns the bytes that the weights of a model take in memory, each counted once.

    Of quantised weights the packed ones and all that belongs to them: scales, tables, and what these are themselves
    quantised with. Buffers count, weights that are put off to disk do not.

    Args:
        model (`nn.Module`): A model, quantised or not.
    """
    seen: set[tuple[int, int]] = set()
    return sum(_size(tensor, seen) for module in model.modules() for tensor in _tensors_of(module))


def _weights_of(model: nn.Module) -> Iterator[Weights]:
    seen: set[tuple[int, int]] = set()
    for name, module in model.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        size = sum(_size(tensor, seen) for tensor in _tensors_of(module))
        # Some methods keep their packed weights as buffers.
        own += [buffer for buffer in module._buffers.values() if buffer is not None and _is_packed(buffer)]
        if own and size:
            yield Weights(
                module=name.removesuffix(".base_layer"),
                parameters=sum(_elements(tensor) for tensor in own if tensor.is_floating_point() or _is_packed(tensor)),
                bytes=size,
                is_quantized=_is_quantized(module, own),
                is_linear=isinstance(module, nn.Linear),
                is_stacked=any(tensor.dim() == 3 for tensor in own) and is_expert(name),
            )


def _is_quantized(module: nn.Module, own: list[torch.Tensor]) -> bool:
    if any(_is_packed(tensor) for tensor in own):
        return True
    # Linear layers that quantise while they compute are classes of the method's own. bitsandbytes' pack their weights.
    home = type(module).__module__
    return isinstance(module, nn.Linear) and home.startswith("transformers.integrations.")


def _is_packed(tensor: torch.Tensor) -> bool:
    data = getattr(tensor, "data", tensor)
    return (
        getattr(tensor, "quant_state", None) is not None
        or hasattr(data, "__tensor_flatten__")  # a tensor made of several
        or (tensor.element_size() == 1 and tensor.dtype != torch.bool)
    )


def _elements(tensor: torch.Tensor) -> int:
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def _tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Goes through all tensors that a module keeps itself, with what belongs to quantised ones."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None:
            continue
        yield from _inner(tensor)
        state = getattr(tensor, "quant_state", None)
        while state is not None:  # bitsandbytes, 4 bits: scales, and what they are quantised with
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
            state = getattr(state, "state2", None) or getattr(state, "kept_statistics", None)
        yield from (value for name in ("CB", "SCB") if (value := getattr(tensor, name, None)) is not None)
    state = getattr(module, "state", None)  # bitsandbytes, 8 bits, after the first pass
    yield from (value for name in ("CB", "SCB") if (value := getattr(state, name, None)) is not None)


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    data = getattr(tensor, "data", tensor)
    if not hasattr(data, "__tensor_flatten__"):
        yield tensor
        return
    for name in data.__tensor_flatten__()[0]:
        yield from _inner(getattr(data, name))


def _size(tensor: torch.Tensor, seen: set[tuple[int, int]]) -> int:
    key = (tensor.data_ptr(), tensor.nbytes)
    if tensor.is_meta or key in seen:
        return 0
    seen.add(key)
    return tensor.nbytes


__all__ = [
    "PartCoverage",
    "QuantizationCoverage",
    "Weights",
    "coverage_of",
    "is_expert",
    "looks_linear",
    "part_of",
    "quantization_coverage",
    "resident_bytes",
]
