# SPDX-License-Identifier: Apache-2.0
"""What the `config.json` of an older checkpoint says: LLaVA, MoE-LLaVA and Med-MoE, in our terms.

The older code keeps the fields of the language model and those of everything around it side by side, and has a class
for each language model. `read_legacy_config` takes the two apart. What a checkpoint is, its config decides, and never
the name of its folder.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig, PhiConfig, PreTrainedConfig, Qwen2Config, StableLmConfig

from ..authoring.older_names import canonical_projector
from ..checks.configs import CONFIG_ERRORS, config_fault
from ..reading.language_model import minicpm_as_granite


# What every config may say of a language model beside the fields that its class declares.
_COMMON = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "rope_scaling", "rope_theta", "torch_dtype")


class OlderCheckpointError(ValueError):
    """An older checkpoint that cannot be taken over; nothing has been written."""


@dataclass(frozen=True)
class Family:
    """A language model as the older code holds it.

    Attributes:
        name (`str`): Its name in the older code, and that of its conversation.
        text_config (callable): From the older fields to the config of transformers.
        renamed (callable): From one of its weights to those of transformers' class that hold it, without the name of
            the part that it lies in.
        drops_head_bias (`bool`): Whether the older class leaves out the bias that transformers' head has.
    """

    name: str
    text_config: Callable[[Mapping[str, Any]], PreTrainedConfig]
    renamed: Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]
    drops_head_bias: bool = False


@dataclass
class LegacyModel:
    """What an older checkpoint is.

    Attributes:
        family (`Family`): Its language model.
        text_config (`PreTrainedConfig`): That one's config.
        is_tied (`bool`, *optional*): Whether the head is the embedding; `None` where only the weights tell.
        vision_tower (`str`, *optional*): Where its vision tower comes from: a Hub id, or a path of its trainer.
        vision_feature_layer (`int`): Of which hidden state the features are.
        vision_feature_select_strategy (`str`): `"patch"` or `"full"`.
        projector (`dict`): The projector's type and fields.
        moe (`dict`, *optional*): The fields of the sparse layers.
        lora_scale (`float`, *optional*): What adapters within the checkpoint are multiplied by, if the config tells.
        image_aspect_ratio (`str`): How pictures are made square.
        has_picture_marks (`bool`): Whether a picture stands between `<im_start>` and `<im_end>`.
        notes (`list[str]`): What is not taken over as it is, and why.
    """

    family: Family
    text_config: PreTrainedConfig
    is_tied: bool | None
    vision_tower: str | None
    vision_feature_layer: int
    vision_feature_select_strategy: str
    projector: dict[str, Any]
    moe: dict[str, Any] | None
    lora_scale: float | None
    image_aspect_ratio: str
    has_picture_marks: bool
    notes: list[str]


def _declared(config_class: type, fields: Mapping[str, Any], **others: Any) -> PreTrainedConfig:
    """Builds a config of those of the older fields that its class declares, and of others."""
    names = {*config_class.__annotations__, *_COMMON} - {"tie_word_embeddings", "model_type"}
    # An older config writes null for most of what is not set; of a window it means that there is none.
    taken = {name: fields[name] for name in names if fields.get(name) is not None}
    if "sliding_window" in names and "sliding_window" in fields:
        taken["sliding_window"] = fields["sliding_window"]
    return config_class(**taken, **others)


def _stablelm(fields: Mapping[str, Any]) -> StableLmConfig:
    others = {
        ours: fields[theirs]
        for theirs, ours in (("norm_eps", "layer_norm_eps"), ("rope_pct", "partial_rotary_factor"))
        if theirs in fields
    }
    return _declared(StableLmConfig, _without(fields, others), **others)


def _phi(fields: Mapping[str, Any]) -> PhiConfig:
    others = {name: fields[name] for name in ("partial_rotary_factor",) if name in fields}
    return _declared(PhiConfig, fields, **others)


def _qwen(fields: Mapping[str, Any]) -> Qwen2Config:
    """Qwen (Bai et al. 2023, arXiv:2309.16609) is Qwen2 under other names, as far as `seq_length` tokens."""
    heads = fields["num_attention_heads"]
    expected = {
        "kv_channels": fields["hidden_size"] // heads,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
    }
    for name, value in expected.items():
        if fields.get(name, value) != value:
            raise OlderCheckpointError(
                f"The Qwen config says {name}={fields[name]!r}; only {value!r} can be taken over."
            )
    return Qwen2Config(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"] // 2,
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=fields.get("seq_length") or fields.get("max_position_embeddings", 8192),
        initializer_range=fields.get("initializer_range", 0.02),
        rms_norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        rope_theta=float(fields.get("rotary_emb_base", 10000)),
        **{name: fields[name] for name in _COMMON[:4] if fields.get(name) is not None},
    )


def _same(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor


_QWEN_NAMES = (
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.ln_f.", "model.norm."),
    ("transformer.h.", "model.layers."),
    (".ln_1.", ".input_layernorm."),
    (".ln_2.", ".post_attention_layernorm."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".w1.", ".up_proj."),
    (".w2.", ".gate_proj."),
    (".c_proj.", ".down_proj."),
)


def _qwen_names(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for theirs, ours in _QWEN_NAMES:
        name = name.replace(theirs, ours)
    if ".attn.c_attn." not in name:
        yield name, tensor
        return
    if tensor.shape[0] % 3:
        raise OlderCheckpointError(f"{name} is {tuple(tensor.shape)}; expected queries, keys and values of one width.")
    for part, share in zip("qkv", tensor.chunk(3), strict=True):
        yield name.replace(".attn.c_attn.", f".self_attn.{part}_proj."), share


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", lambda fields: _declared(LlamaConfig, fields), _same),
        Family("mistral", lambda fields: _declared(MistralConfig, fields), _same),
        Family("phi", _phi, _same, drops_head_bias=True),
        Family("stablelm", _stablelm, _same),
        Family("qwen", _qwen, _qwen_names),
        Family("qwen1_5", lambda fields: _declared(Qwen2Config, fields), _same),
        Family("minicpm", lambda fields: minicpm_as_granite(dict(fields)), _same),
    )
}
# LLaVA's first name for all of its models; the class tells which language model it is.
_CLASSES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaPhiForCausalLM": "phi",
}


def _family_name(fields: Mapping[str, Any]) -> str | None:
    model_type = str(fields.get("model_type"))
    if model_type == "llava":
        return next((_CLASSES[name] for name in fields.get("architectures") or () if name in _CLASSES), "llama")
    kind = model_type.removeprefix("moe_")
    return kind.removeprefix("llava_") if kind.startswith("llava_") else None


def is_legacy(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of an older checkpoint: LLaVA, MoE-LLaVA or Med-MoE, or transformers' LLaVA."""
    return _family_name(fields) in (*FAMILIES, "mpt")


def is_llava_hf(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of transformers' own `LlavaForConditionalGeneration`."""
    return fields.get("model_type") == "llava" and "text_config" in fields


def read_legacy_config(fields: Mapping[str, Any], origin: str) -> LegacyModel:
    """Reads the `config.json` of an older checkpoint.

    Args:
        fields (`Mapping`): Its content.
        origin (`str`): The checkpoint's name, for error messages.

    Raises:
        OlderCheckpointError: It says something that cannot be taken over, or leaves out what has to be known.
    """
    name = _family_name(fields)
    if name not in FAMILIES:
        raise OlderCheckpointError(
            f"{origin} has a language model {name!r}, which cannot be converted. Known: {', '.join(FAMILIES)}."
        )
    family, notes = FAMILIES[name], []
    try:
        text_config = family.text_config(fields)
    except OlderCheckpointError:
        raise
    except CONFIG_ERRORS as error:
        raise OlderCheckpointError(
            f"The config.json of {origin} does not describe a {name} language model ({config_fault(error)})."
        ) from error
    is_tied = fields.get("tie_word_embeddings")
    if is_tied is None and name == "minicpm":
        is_tied = True  # the default of the class that wrote it, which is not written
    if is_tied is not None:
        text_config.tie_word_embeddings = bool(is_tied)
    if fields.get("max_sequence_length"):  # what the older loader goes by
        text_config.max_position_embeddings = fields["max_sequence_length"]
    pad = text_config.pad_token_id
    if pad is not None and not 0 <= pad < text_config.vocab_size:
        notes.append(f"pad_token_id {pad} lies outside the vocabulary and is left out")
        text_config.pad_token_id = None
    tower = next((fields[key] for key in ("mm_image_tower", "mm_vision_tower") if fields.get(key)), None)
    if isinstance(tower, list):
        tower = tower[0]
    if fields.get("mm_video_tower"):
        notes.append("the video tower is left out: videos are not supported")
    projector = next(
        (fields[key] for key in ("image_projector_type", "mm_projector_type") if fields.get(key)), "linear"
    )
    strategy = fields.get("mm_vision_select_feature", "patch")
    if strategy not in ("patch", "cls_patch"):
        raise OlderCheckpointError(
            f"The config.json of {origin} says mm_vision_select_feature={strategy!r}; expected 'patch' or 'cls_patch'."
        )
    return LegacyModel(
        family=family,
        text_config=text_config,
        is_tied=is_tied,
        vision_tower=tower,
        vision_feature_layer=fields.get("mm_vision_select_layer", -1),  # the default of the older trainer
        vision_feature_select_strategy="full" if strategy == "cls_patch" else "patch",
        projector=canonical_projector({"type": projector}),
        moe=_moe_fields(fields, origin, notes),
        lora_scale=_lora_scale(fields),
        image_aspect_ratio=_aspect_ratio(fields, notes),
        has_picture_marks=bool(fields.get("mm_use_im_start_end", False)),
        notes=notes,
    )


def _moe_fields(fields: Mapping[str, Any], origin: str, notes: list[str]) -> dict[str, Any] | None:
    moe = fields.get("moe")
    is_sparse = str(fields.get("model_type")).startswith("moe_")
    if not isinstance(moe, Mapping) or not moe.get("moe_enable", is_sparse):
        if is_sparse:
            found = "moe_enable is false" if isinstance(moe, Mapping) else "it has none"
            raise OlderCheckpointError(
                f"The config.json of {origin} says model_type {fields['model_type']!r}, but under 'moe', where its "
                f"sparse layers should be described, {found}. Expected what MoE-LLaVA writes: moe_enable: true, "
                "moe_layers_idx, num_experts, ..."
            )
        return None
    if moe.get("num_experts") in (None, []):
        raise OlderCheckpointError(
            f"The config.json of {origin} does not tell the number of experts: 'moe' has no num_experts. Write it "
            "there, as a number or as a list with one for each sparse layer."
        )
    layers = moe.get("moe_layers_idx")
    if layers is None:
        layers = moe.get("moe_mode", "sparse")
    if any(moe.get(name) for name in ("capacity_factor", "eval_capacity_factor")):
        notes.append(
            "capacity factors are left out: no token is dropped, as none was when the published models answered"
        )
    if moe.get("ep_size", 1) > 1:
        raise OlderCheckpointError(
            f"{origin} was trained with ep_size {moe['ep_size']}: its files hold the experts of one process. Merge "
            "them first."
        )
    return {
        "num_experts": moe["num_experts"],
        "num_experts_per_tok": moe.get("top_k_experts", 2),
        "layers": layers,
        "use_residual": bool(moe.get("use_residual", False)),
        "router_aux_loss_coef": moe.get("router_aux_loss_coef", 0.01),
    }


def _lora_scale(fields: Mapping[str, Any]) -> float | None:
    lora = fields.get("lora")
    if not isinstance(lora, Mapping) or not lora.get("lora_r") or lora.get("lora_alpha") is None:
        return None
    return lora["lora_alpha"] / lora["lora_r"]


def _aspect_ratio(fields: Mapping[str, Any], notes: list[str]) -> str:
    ratio = fields.get("image_aspect_ratio") or "square"
    if ratio in ("pad", "square"):
        return ratio
    notes.append(
        f"image_aspect_ratio {ratio!r} is left out: the model sees one picture, padded to a square, and no tiles"
    )
    return "pad"


def _without(fields: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


__all__ = [
    "FAMILIES",
    "Family",
    "OlderCheckpointError",
    "LegacyModel",
    "is_llava_hf",
    "is_legacy",
    "read_legacy_config",
]
