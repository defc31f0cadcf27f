# SPDX-License-Identifier: Apache-2.0
"""Models whose weights are quantised: which parts stay in full precision, and bitsandbytes' 4-bit layers on CPUs."""

import copy
import os
import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from .part_table_moellava import OPTIONAL


logger = logging.get_logger(__name__)

# What stays in full precision when a model is quantised: small, and what the rest depends on.
UNQUANTISED = ("vision_tower", "multi_modal_projector", "lm_head", "mlp.gate", "mlp.coefficient")
# Those of them that may be quantised when somebody asks for it.
_CHOICES = UNQUANTISED[:3]
# What the configs of transformers call the list of what they leave alone.
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules", "ignore")
# bitsandbytes' kernel for CPUs with bf16 takes matrices of so many rows and columns, or of several times as many.
_PACKED_ROWS = 32
_PACKED_COLUMNS = 64


def with_unquantised_parts(quantization_config: object, modules_to_quantize: list[str] | None = None) -> object:
    """Returns a quantisation config that leaves the vision tower, the projector, the routers and the head alone.

    Args:
        quantization_config (`QuantizationConfigMixin` or `dict`): What the user gives; its own list is added to.
        modules_to_quantize (`list[str]`, *optional*): Which of those parts are not to be left alone, whatever the
            config's own list says of them.

    Raises:
        TypeError: `modules_to_quantize` is no list.
        ValueError: `modules_to_quantize` names something else, or the config's own list something that transformers
            cannot compare names with.
    """
    if quantization_config is None:
        raise ValueError(
            f"modules_to_quantize is {modules_to_quantize!r}, but nothing says how to quantise. Give a "
            "quantization_config, or leave it out: what a checkpoint has quantised, it tells by itself."
        )
    if isinstance(modules_to_quantize, str):
        raise TypeError(f"modules_to_quantize is {modules_to_quantize!r}; expected a list of names.")
    chosen = set(modules_to_quantize or ())
    if strange := sorted(chosen - set(_CHOICES)):
        raise ValueError(
            f"modules_to_quantize names {strange}; expected some of 'vision_tower', 'multi_modal_projector' and "
            "'lm_head', which are left in full precision otherwise."
        )
    skipped = default_skips(chosen)
    config = copy.deepcopy(quantization_config)
    if isinstance(config, dict):
        method = str(config.get("quant_method", "bitsandbytes"))
        by_method = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}
        name = next((name for name in SKIP_LISTS if name in config), by_method.get(method, "modules_to_not_convert"))
        return config | {name: _joined(config.get(name), skipped, chosen)}
    name = next((name for name in SKIP_LISTS if hasattr(config, name)), None)
    if name is None:
        logger.warning(
            "A %s has no list of modules to leave alone: whether the vision tower, the projector and the head stay in "
            "full precision is up to it.",
            type(config).__name__,
        )
    else:
        setattr(config, name, _joined(getattr(config, name), skipped, chosen))
    return config


def default_skips(chosen: set[str] = frozenset()) -> list[str]:
    """Returns the names that are left alone but for those chosen, with the name that a part has beside a head too."""
    parts = [part for part in UNQUANTISED if part not in chosen]
    return [*parts, *(f"model.{part}" for part in parts if part in ("vision_tower", "multi_modal_projector"))]


def _joined(own: list[str] | None, skipped: list[str], chosen: set[str]) -> list[str]:
    for name in own or []:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(
                f"The list of modules that are not to be quantised has {name!r}, which is no regular expression "
                f"({error}). Expected names of modules, whole, their beginning or their end, or such as '.*q_proj'."
            ) from error
    # Some configs name the head by themselves, without their user having said so.
    own = [name for name in own or [] if name.removeprefix("model.") not in chosen]
    return [*own, *(name for name in skipped if name not in own)]


def mend_4bit_layers(model: nn.Module) -> None:
    """Makes bitsandbytes' 4-bit layers of a model save, train and dequantise on CPUs what they compute.

    On a CPU with AVX-512 and bf16, such a layer puts its weight into another order at the first pass in evaluation
    mode. Its own way back loses the scales, wholly or in part; in training, gradients end at a layer in that order, and
    dequantising it gives other numbers. Nothing of this is an error there.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if module.in_features % _PACKED_COLUMNS or module.out_features % _PACKED_ROWS:
            module.support_avx512bf16_for_cpu = False  # bitsandbytes takes it for any width, and fails
        module.register_forward_pre_hook(_before_forward)
        module.register_state_dict_pre_hook(_before_saving)


def check_quantized(model: nn.Module) -> None:
    """Checks that every layer that bitsandbytes is to quantise had a weight for it.

    Raises:
        ValueError: A layer has none, since it is new or its weight is another part's.
    """
    without = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            is_packed = getattr(weight, "quant_state", None) is not None
        elif type(module).__name__ == "Linear8bitLt" and not module.state.has_fp16_weights:
            is_packed = not weight.is_floating_point()
        else:
            continue
        if not is_packed and not weight.is_meta:
            without.append(name)
    if without:
        raise ValueError(
            f"{', '.join(without[:4])}{' and others' if len(without) > 4 else ''} cannot be quantised: the files have "
            "no weight for it, since it is new, or it is tied to the embedding. Leave the part out of "
            "modules_to_quantize, or save the model in full precision first and quantise that."
        )


def reads_packed_weights(conversion: object) -> bool:
    """Whether one of transformers' conversions makes quantised weights of the tensors that they are saved as."""
    return any(getattr(operation, "hf_quantizer", None) for operation in getattr(conversion, "operations", ()))


def _before_forward(module: nn.Module, args: tuple) -> None:
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        if module.training or any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            unpack_4bit_layer(module)
    elif getattr(state, "nested", False):
        state.kept_statistics = state.state2  # packing drops it


def _before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    unpack_4bit_layer(module)


def unpack_4bit_layer(module: nn.Module) -> None:
    """Puts the weight of a 4-bit layer back into the order that it is saved in, if it is in that of the CPU's kernel.

    Packed again, it gives exactly what it gave. Its scales are what the kernel has of them: rounded to bf16.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    try:  # so that transformers does not take bitsandbytes for a requirement of every checkpoint with this file
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("The model has bitsandbytes' layers: pip install bitsandbytes.") from error
    absmax, is_nested = state.absmax.T.reshape(-1).float(), state.original_nested  # one for each block of a row
    state.original_nested = False
    module.weight.data, state = functional._convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    state.absmax, state.original_nested = absmax, is_nested
    if not is_nested:
        return
    statistics = getattr(state, "kept_statistics", None)
    if statistics is None:
        state.offset = absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(absmax - state.offset, blocksize=256)
    else:
        state.absmax, state.state2 = _codes(absmax, state.offset, statistics), statistics
    state.nested = True


def _codes(values: torch.Tensor, offset: torch.Tensor, statistics) -> torch.Tensor:
    """Returns the 8-bit codes of scales that have been rounded to bf16, so that they are rounded to the same again."""
    code = statistics.code
    scales = statistics.absmax.repeat_interleave(statistics.blocksize)[: values.numel()]
    parts = (values - offset) / scales.clamp_min(torch.finfo(scales.dtype).tiny)
    nearest = torch.bucketize(parts, (code[1:] + code[:-1]) / 2)
    found = nearest
    # Around powers of two bf16 is finer on one side: there, the nearest code may be one that is rounded elsewhere.
    for step in (1, -1, 0):
        candidate = (nearest + step).clamp(0, code.numel() - 1)
        fits = (code[candidate] * scales + offset).to(torch.bfloat16) == values.to(torch.bfloat16)
        found = torch.where(fits, candidate, found)
    return found.to(torch.uint8)


class Quantised:
    """What a model does with quantised weights beside what transformers does; a base of its class."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        quantization_config: object | None = None,
        modules_to_quantize: list[str] | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        r"""
        Loads a checkpoint; arguments as in transformers, but for those named here.

        Args:
            quantization_config (`QuantizationConfigMixin` or `dict`, *optional*):
                How to quantise. The vision tower, the projector, the routers and the head stay in full precision beside
                what the config names itself; the experts are quantised like every other linear layer.
            modules_to_quantize (`list[str]`, *optional*):
                Which of those are quantised as well: `"vision_tower"`, `"multi_modal_projector"`, `"lm_head"`.

        Raises:
            ValueError: `modules_to_quantize` names something else, is given without a way to quantise, or names a part
                without weights of its own: a new projector, a head that is tied to the embedding.
        """
        if quantization_config is not None or modules_to_quantize is not None:
            kwargs["quantization_config"] = with_unquantised_parts(quantization_config, modules_to_quantize)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if quantization_config is not None:
            check_quantized(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def get_init_context(cls, dtype, is_quantized, *args, **kwargs):
        contexts = super().get_init_context(dtype, is_quantized, *args, **kwargs)
        modular = OPTIONAL.get("modular_experts")
        return [*contexts, modular.building()] if is_quantized and modular is not None else contexts

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        modular = OPTIONAL.get("modular_experts")
        if modular is not None and modular.are_in(model):
            if state_dict is None:
                state_dict = {}
                for file in checkpoint_files:
                    state_dict |= load_state_dict(file)  # memory-mapped
                checkpoint_files = None
            state_dict = modular.apart(state_dict)
        mend_4bit_layers(model)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def dequantize(self, dtype: torch.dtype | None = None):
        """Puts full-precision weights in the place of quantised ones; arguments as in transformers."""
        for module in self.modules():
            unpack_4bit_layer(module)
        return super().dequantize(dtype or self.dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, state_dict: dict | None = None, **kwargs):
        """Saves a model; arguments as in transformers."""
        modular = OPTIONAL.get("modular_experts")
        if getattr(self, "hf_quantizer", None):
            if getattr(self, "_weight_conversions", None):
                # Packed weights are saved as they are; what reads them while loading has no way back.
                self._weight_conversions = [kept for kept in self._weight_conversions if not reads_packed_weights(kept)]
        elif modular is not None and modular.are_in(self):
            # It was quantised and is no more: its experts go back to the form that such a model is loaded in.
            state_dict = modular.together(self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
