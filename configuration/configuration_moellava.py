# SPDX-License-Identifier: Apache-2.0
"""`MoellavaConfig`: what a model is made of, by value.

The language model and the vision tower are described by their own transformers configs, the projector by its type and
that type's fields. Nothing in a config is a name to be looked up: a model is built from it without a network and
without any other file.
"""

import copy
import difflib
import functools
import math
import os
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from .checkpoint_moellava import AUTO_MAP, export_code
from .custom_code_moellava import is_own_class
from .names_moellava import (
    CHOICES,
    FIELD_NAMES,
    MOE_FIELD_NAMES,
    canonical_encoder_type,
    canonical_moe,
    canonical_projector,
    canonical_strategy,
    check_choice,
    given_type,
    stacked_projector,
    translate_fields,
)
from .part_checks_moellava import check_dtype, check_part
from .registry_moellava import ENCODERS, FOREIGN_KEYS, PROJECTORS, known_names, plain_value
from .staging_moellava import staged_folder


logger = logging.get_logger(__name__)

# Fields without a declaration of ours that transformers and its trainers pass to a config or set on one.
_LIBRARY_FIELDS = frozenset(
    {
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "distributed_config",
        "eos_token_id",
        "experts_implementation",
        "fusion_config",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "pad_token_id",
        "quantization_config",
        "tie_last_hidden_states",
        "torch_dtype",
        "transformers_weights",
        "use_cache",
    }
)

# What serving engines ask a language model's config about its experts.
EXPERT_COUNTS = ("num_experts", "num_experts_per_tok")
ROUTER_LOSS = ("output_router_logits", "router_aux_loss_coef")

# What a processor has to agree with.
_FOR_PROCESSOR = ("image_aspect_ratio", "image_seq_length", "image_size")

# What a field of a user's own encoder or projector cannot be called.
RESERVED_FIELDS = frozenset({*dir(PreTrainedConfig()), *_LIBRARY_FIELDS, *FOREIGN_KEYS, "fields"})

# Of a part: what there has to be at least one of.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")

_DEFAULT_TEXT = {"model_type": "llama", "vocab_size": 32064}
_DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


# What config classes of transformers raise on fields that make no sense.
CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def config_fault(error: Exception) -> str:
    """Returns what an error of a config class says is wrong."""
    reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return f"{type(reason).__name__}: {reason}"


def _with_value_errors(cls: type) -> type:
    """Makes a ValueError of what `@strict` raises on a wrong field, which is none."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {error.__cause__ or error}") from error

    cls.__init__ = __init__
    return cls


@_with_value_errors
@strict
class MoellavaProjectorConfig(PreTrainedConfig):
    r"""
    What the projector is: its type, and the fields that this type's class takes.

    Args:
        type (`str`, *optional*, defaults to `"mlp"`):
            The registered name of the projector, or a spelling that stands for one (`"mlp2x_gelu"`).
        kwargs:
            The fields of that projector, as its constructor names them; those left out take its defaults.
    """

    model_type = "moellava_projector"

    type: str = "mlp"

    def __post_init__(self, **kwargs):
        # A sub-config is written with what every config has (labels, dtype and so on); only the rest are fields.
        library = {key: kwargs.pop(key) for key in list(kwargs) if key in _LIBRARY_FIELDS or key in FOREIGN_KEYS}
        by_other_name = self.type == type(self).type and given_type(kwargs) is not None
        fields = canonical_projector(kwargs if by_other_name else {**kwargs, "type": self.type})
        self.type = fields.pop("type")
        fields = PROJECTORS.complete_fields(self.type, fields)
        super().__post_init__(**{key: value for key, value in library.items() if key not in FOREIGN_KEYS}, **fields)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the projector's own, as its constructor takes them."""
        return {name: getattr(self, name) for name in PROJECTORS.fields(self.type)}


@_with_value_errors
@strict
class MoellavaEncoderConfig(PreTrainedConfig):
    r"""
    The vision config of a user's own encoder: the fields that its class takes.

    Args:
        kwargs:
            The fields of the encoder, as its constructor names them.
    """

    model_type = "moellava_encoder"

    def __post_init__(self, **kwargs):
        library = {key: value for key, value in kwargs.items() if key in RESERVED_FIELDS}
        fields = {
            key: plain_value(value, f"vision_config.{key}") for key, value in kwargs.items() if key not in library
        }
        super().__post_init__(**{key: value for key, value in library.items() if key not in FOREIGN_KEYS}, **fields)

    @property
    def fields(self) -> dict[str, Any]:
        """Every field that is not common to all configs of transformers."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in RESERVED_FIELDS and not name.startswith("_")
        }


@_with_value_errors
@strict
class MoellavaMoeConfig(PreTrainedConfig):
    r"""
    The sparse layers: which they are, how many experts they have, how tokens are routed.

    Args:
        num_experts (`int`, *optional*, defaults to 4):
            The number of experts of every sparse layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            The number of experts that a token goes to.
        layers (`str` or `list[int]`, *optional*, defaults to `"sparse"`):
            The sparse layers: `"first_half"`, `"second_half"`, `"sparse"` (every other, from 0), `"dense"` (all), or
            their indices. In a model's config always the indices.
        norm_topk_prob (`bool`, *optional*):
            Whether the weights of a token's experts are divided by their sum. By default with more than one; upcycling
            does so with one too. In a model's config never `None`.
        router_bias (`bool`, *optional*, defaults to `False`):
            Whether the router has a bias.
        freeze_router (`bool`, *optional*, defaults to `False`):
            Whether the router is left out of training.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            The weight of the load-balancing loss.
        router_jitter_noise (`float`, *optional*, defaults to 0.0):
            In training, the router's input is multiplied by noise from `1 - x` to `1 + x`.
        sample_second_expert (`bool`, *optional*, defaults to `False`):
            In training with two experts per token, whether the second one is sampled.
        capacity_factor, eval_capacity_factor (`float`, *optional*):
            How many times its even share of the tokens an expert takes, in training and otherwise; what is over is
            dropped. By default nothing is.
        eval_capacity_per_row (`bool`, *optional*, defaults to `True`):
            Whether `eval_capacity_factor` counts each row of a batch alone, so that an answer does not depend on its
            neighbours. Checkpoints of 0.1.0 do not have the field, and count over the batch.
        min_capacity (`int`, *optional*, defaults to 0):
            The number of tokens that an expert takes in any case.
        use_residual (`bool`, *optional*, defaults to `False`):
            Whether the dense MLP stays and is mixed with the experts by a learned coefficient.
        use_meta_expert (`bool`, *optional*, defaults to `False`):
            Whether a copy of the dense MLP is added to the experts' output (Med-MoE).
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the model returns its router logits and the load-balancing loss without being asked.
    """

    model_type = "moellava_moe"

    num_experts: int | list[int] = 4
    num_experts_per_tok: int = 2
    layers: str | list[int] = "sparse"
    norm_topk_prob: bool | None = None
    router_bias: bool = False
    freeze_router: bool = False
    router_aux_loss_coef: float | int = 0.01
    router_jitter_noise: float | int = 0.0
    sample_second_expert: bool = False
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    eval_capacity_per_row: bool = True
    min_capacity: int = 0
    use_residual: bool = False
    use_meta_expert: bool = False
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        library = {key: kwargs.pop(key) for key in list(kwargs) if key in _LIBRARY_FIELDS or key in FOREIGN_KEYS}
        fields = canonical_moe(kwargs)
        self.num_experts = canonical_moe({"num_experts": self.num_experts})["num_experts"]
        for name in fields:
            if name not in type(self).__annotations__:
                raise ValueError(f"Unknown field {name!r} in moe_config{known_names(name, MOE_FIELD_NAMES)}")
            earlier, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if earlier not in (default, fields[name]):
                raise ValueError(
                    f"moe_config gives {name} twice, as {earlier!r} and by an older name as {fields[name]!r}. Give one."
                )
            setattr(self, name, fields[name])
        super().__post_init__(**{key: value for key, value in library.items() if key not in FOREIGN_KEYS})
        self._check()

    def _check(self) -> None:
        if self.num_experts < 1 or not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of num_experts {self.num_experts}; expected from 1 "
                "to the number of experts."
            )
        if self.sample_second_expert and self.num_experts_per_tok != 2:
            raise ValueError(
                f"sample_second_expert needs num_experts_per_tok=2, got {self.num_experts_per_tok}. Leave it out."
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a number above 0, or None to drop no token.")
        for name in ("router_aux_loss_coef", "min_capacity"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from 0.")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"router_jitter_noise is {self.router_jitter_noise}; expected from 0 to below 1.")

    def resolve(self, num_hidden_layers: int) -> None:
        """Sets what is open until the fields are those of a model with so many layers; see `resolved_layers`."""
        self.layers = self.resolved_layers(num_hidden_layers)
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1

    def resolved_layers(self, num_hidden_layers: int) -> list[int]:
        """Returns the indices of the sparse layers of a language model with so many layers, ascending.

        Raises:
            ValueError: An unknown word, or an index that the language model does not have.
        """
        modes = {
            "first_half": range(num_hidden_layers // 2),
            "second_half": range(num_hidden_layers // 2, num_hidden_layers),
            "sparse": range(0, num_hidden_layers, 2),
            "dense": range(num_hidden_layers),
        }
        if isinstance(self.layers, str):
            if self.layers not in modes:
                raise ValueError(f"Unknown choice of layers {self.layers!r}{known_names(self.layers, modes)}")
            if not modes[self.layers]:
                raise ValueError(
                    f"layers is {self.layers!r}, which is none of a language model's {num_hidden_layers} layers."
                )
            return list(modes[self.layers])
        wrong = [i for i in self.layers if not -num_hidden_layers <= i < num_hidden_layers]
        if wrong or not self.layers:
            raise ValueError(
                f"layers is {self.layers}, but the language model has the layers 0 to {num_hidden_layers - 1}."
            )
        return sorted({index % num_hidden_layers for index in self.layers})


@_with_value_errors
@strict
class MoellavaConfig(PreTrainedConfig):
    r"""
    The configuration of a MoELLaVA model. The defaults are those of LLaVA-1.5: a CLIP ViT-L/14 tower at 336 pixels, a
    two-layer MLP and a LLaMA.

    The older builder's names of these fields (`mm_vision_select_layer`, `mm_projector_type`, `num_query_tokens`, ...)
    are accepted as well; an unknown name is an error.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The language model's config; any decoder with an `AutoModelForCausalLM` class.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            The vision tower's config.
        projector_config (`MoellavaProjectorConfig` or `dict`, *optional*):
            The projector's `type` and fields.
        moe_config (`MoellavaMoeConfig` or `dict`, *optional*):
            The sparse layers; `None` for a dense model.
        encoder_type (`str`, *optional*):
            The registered name of the encoder. Told by `vision_config.model_type` when left out.
        image_token_id (`int`, *optional*, defaults to 32000):
            The id of the placeholder that image features take the place of; within the vocabulary.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            The index into the tower's hidden states (0 is the embeddings) that the projector gets; of several layers
            the features are concatenated.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` and `"patch"`: the patch tokens, without class and register tokens where the tower has them;
            `"cls"`: the class token alone; `"full"`: every token.
        image_size (`int`, *optional*):
            The side in pixels of the square pictures that the tower gets. Defaults to the tower's own; otherwise its
            position embeddings are interpolated.
        image_aspect_ratio (`str`, *optional*, defaults to `"pad"`):
            `"pad"`: a picture is padded to a square; `"square"`: the image processor's own resizing and cropping.
        image_seq_length (`int`, *optional*):
            How many language-model tokens a picture becomes. Always computed from the parts.
        drop_first_patch (`bool`, *optional*, defaults to `False`):
            Whether the first of the selected tokens is left out as well. MoE-LLaVA's models with a SigLIP tower were
            trained so (728 tokens of 729); the converter sets it.
        image_feature_scale (`float`, *optional*, defaults to 1.0):
            What projected features are multiplied by. A language model that scales all that comes in (Granite,
            MiniCPM) gets unscaled pictures by the inverse; the converter sets it.
        parts (`dict`, *optional*):
            Where each part came from, for the model card. Never read to load anything.
        untrained_parts (`list[str]`, *optional*):
            The parts whose weights are random and have not been trained since, such as `"multi_modal_projector"`;
            `None` if that is not known. Written by `from_pretrained`; a forward pass in training mode, with gradients,
            removes the parts that it trains.
        tie_word_embeddings (`bool`, *optional*):
            Taken from the text config.

    Raises:
        ValueError: Unknown fields, unknown parts, or fields that do not fit together; the message says what to change.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig
    >>> from moellava import MoellavaConfig, MoellavaForCausalLM

    >>> config = MoellavaConfig(
    ...     text_config=LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                             num_attention_heads=2),
    ...     vision_config=CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=48, intermediate_size=64,
    ...                                    num_hidden_layers=3, num_attention_heads=2),
    ...     image_token_id=99,
    ... )
    >>> config.image_seq_length
    16
    >>> model = MoellavaForCausalLM(config)
    ```"""

    model_type = "moellava"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "projector_config": MoellavaProjectorConfig,
        "moe_config": MoellavaMoeConfig,
    }
    # The names that transformers has here are a language model's; its own config brings them.
    base_model_fsdp_plan = {}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    moe_config: dict | PreTrainedConfig | None = None
    encoder_type: str | None = None
    image_token_id: int = 32000
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: str = "default"
    image_size: int | None = None
    image_aspect_ratio: str = "pad"
    image_seq_length: int | None = None
    drop_first_patch: bool = False
    image_feature_scale: float | int = 1.0
    parts: dict | None = None
    untrained_parts: list[str] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        claims = self._take_other_names(kwargs)
        self.text_config = _part_config("text_config", self.text_config, _DEFAULT_TEXT)
        self.vision_config = _part_config("vision_config", self.vision_config, _DEFAULT_VISION)
        if not isinstance(getattr(self.text_config, "vocab_size", None), int):
            raise ValueError(
                f"text_config describes a {self.text_config.model_type!r} model, which has no vocabulary; expected the "
                "config of a language model."
            )
        self._check_claims(claims)
        self.projector_config = _own_config("projector_config", self.projector_config, MoellavaProjectorConfig)
        if self.parts is not None:
            self.parts = {part: public_name(origin) for part, origin in self.parts.items()}
        if self.moe_config is not None:
            self.moe_config = _own_config("moe_config", self.moe_config, MoellavaMoeConfig)
            self.moe_config.resolve(self.text_config.num_hidden_layers)
            self._tell_serving_engines()
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.vision_feature_select_strategy = canonical_strategy(self.vision_feature_select_strategy)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(
                f"image_size is {self.image_size}; expected a number of pixels, or None for the tower's own."
            )
        for key in FOREIGN_KEYS:
            if key not in ("attn_implementation", "experts_implementation", "name_or_path"):  # the caller's own word
                kwargs.pop(key, None)
        if not 0 < self.image_feature_scale < math.inf:
            raise ValueError(f"image_feature_scale is {self.image_feature_scale}; expected a number above 0.")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self._check_and_measure()

    def _take_other_names(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Moves the fields that `kwargs` gives by another name to where they belong, and refuses unknown ones.

        Returns:
            `dict[str, Any]`: What is said of a part that the part itself tells.
        """
        foreign = {
            key: kwargs.pop(key) for key in list(kwargs) if key not in _LIBRARY_FIELDS and key not in FOREIGN_KEYS
        }
        for name in foreign:
            if name not in FIELD_NAMES:
                fields = {*self.default_field_names(), *FIELD_NAMES}
                raise ValueError(f"Unknown field {name!r} in {type(self).__name__}{known_names(name, fields)}")
        sections = translate_fields(foreign, type(self).__name__)
        for name, value in sections.get("model", {}).items():
            earlier = getattr(self, name)
            if earlier not in (type(self).__dataclass_fields__[name].default, value):
                other = next(key for key in foreign if FIELD_NAMES[key] == ("model", name))
                raise ValueError(
                    f"{name!r} is {earlier!r} and {other!r} is {value!r}, but they are one field. Give one."
                )
            setattr(self, name, value)
        if "source" in sections:
            self.parts = {**(self.parts or {}), **sections["source"]}
        if "projector" in sections:
            given = self.projector_config
            given = {"type": given.type, **given.fields} if isinstance(given, MoellavaProjectorConfig) else given
            self.projector_config = stacked_projector(given, sections["projector"])
        return sections.get("check", {})

    def _tell_serving_engines(self) -> None:
        """Names the experts where vLLM looks for them, so that it runs and shards them by its own kernels.

        It computes every expert as `down(silu(gate(x)) * up(x))`, whatever the config says, and looks at no other
        activation. Experts of another form it runs as they are: they must not be announced.
        """
        text = self.text_config
        if getattr(text, "hidden_act", None) == "silu" and not getattr(text, "mlp_bias", False):
            for name in EXPERT_COUNTS:
                setattr(text, name, getattr(self.moe_config, name))

    def _check_claims(self, claims: dict[str, Any]) -> None:
        claimed, actual = claims.get("mm_hidden_size"), getattr(self.vision_config, "hidden_size", None)
        if claimed is not None and actual is not None and claimed != actual:
            logger.warning("mm_hidden_size is given as %s, but the vision tower is %s wide.", claimed, actual)

    @classmethod
    def default_field_names(cls) -> list[str]:
        """The names of the fields that this class declares."""
        return list(cls.__annotations__)

    def check(self) -> None:
        """Checks the fields as they are now, as those of a file, and measures anew what follows from them.

        A field can be set at any time. A model is built, and a config saved, of what the fields say by then.

        Raises:
            ValueError: As when a config is made.
        """
        written, names = self.to_dict(), self.default_field_names()
        again = type(self)(**{name: written[name] for name in names})
        if self.tie_word_embeddings != again.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings is {self.tie_word_embeddings}, but text_config.tie_word_embeddings is "
                f"{again.tie_word_embeddings}. They are one field: set both."
            )
        read = again.to_dict()
        for name in names:
            if written[name] != read[name] or isinstance(getattr(self, name), dict):
                setattr(self, name, getattr(again, name))

    def _check_and_measure(self) -> None:
        """Checks that the parts fit together, and writes down what follows from them."""
        from ..modeling.encoders_moellava import encoder_for  # late: modeling is built on this file
        from ..modeling.own_parts_moellava import measured_output_tokens

        vocab_size = self.text_config.vocab_size
        if not 0 <= self.image_token_id < vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id}, but the language model's vocabulary has {vocab_size} rows: "
                f"expected 0 to {vocab_size - 1}. Add the token to the tokenizer and set text_config.vocab_size."
            )
        if self.encoder_type is not None:
            self.encoder_type = canonical_encoder_type(self.encoder_type)
        try:
            encoder = encoder_for(self)
        except (ArithmeticError, AttributeError, TypeError) as error:
            raise ValueError(
                f"vision_config does not describe a {self.vision_config.model_type!r} tower that can be built "
                f"({type(error).__name__}: {error}). Expected a config that transformers builds a vision model of."
            ) from error
        self.encoder_type = encoder.encoder_type
        projector = PROJECTORS[self.projector_config.type]
        fields, tokens = self.projector_config.fields, encoder.num_selected_tokens
        if is_own_class(projector):
            widths = (encoder.feature_size, self.text_embedding_size)
            self.image_seq_length = measured_output_tokens(projector, fields, tokens, widths)
        else:
            self.image_seq_length = projector.num_output_tokens(tokens, **fields)

    @property
    def text_embedding_size(self) -> int:
        """The width of the language model's input embeddings, which is not that of its layers in OPT-350M."""
        return getattr(self.text_config, "word_embed_proj_dim", None) or self.text_config.hidden_size

    @property
    def _experts_implementation(self) -> str | None:
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None):
        # transformers hands a plain name to every part, which towers and dense language models refuse. It is meant for
        # the sparse layers: ours, and those of a language model that is sparse by itself.
        own = value.get("", getattr(self, "_experts_implementation", None)) if isinstance(value, dict) else value
        self._experts_implementation_internal = own
        for key in self.sub_configs:
            part = getattr(self, key, None)
            if not isinstance(part, PreTrainedConfig):
                continue
            if isinstance(value, dict):
                part._experts_implementation = value.get(key, getattr(part, "_experts_implementation", None))
            elif key == "text_config" and self.moe_config is None and _is_sparse(part):
                part._experts_implementation = value

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's config; arguments as in transformers."""
        text = super().get_text_config(*args, **kwargs)
        if self.moe_config is not None and text is self.text_config:
            for name in ROUTER_LOSS:  # here TRL looks for the router loss, and for its weight
                setattr(text, name, getattr(self.moe_config, name))
        return text

    def part_classes(self) -> list[type]:
        """The classes that the encoder and the projector are made of; a user's own ones travel with the checkpoint."""
        return [ENCODERS[self.encoder_type], PROJECTORS[self.projector_config.type]]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for key in self.sub_configs:
            if isinstance(output.get(key), dict):
                for foreign in FOREIGN_KEYS:
                    output[key].pop(foreign, None)
                output[key]["_name_or_path"] = ""  # every config has one: a part's is then equal to its own class's
        if self.moe_config is not None and isinstance(output.get("text_config"), dict):
            for name in (*EXPERT_COUNTS, *ROUTER_LOSS):  # the text config is that of the dense language model
                output["text_config"].pop(name, None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        output = super().to_diff_dict()
        for key in self.sub_configs:
            if isinstance(output.get(key), dict):
                output[key].pop("_name_or_path", None)
        return output

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            raise ValueError(
                f"The config.json of {pretrained_model_name_or_path} is nested too deeply to be read. Save or download "
                "the model again."
            ) from error

    @classmethod
    def _with_overrides(cls, config_dict: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """Lays what a caller says over what a file says. transformers would set it on the finished config."""
        translate_fields({name: value for name, value in overrides.items() if name in FIELD_NAMES}, "the arguments")
        fields, places = dict(config_dict), {}
        for name, value in overrides.items():
            section, place = FIELD_NAMES.get(name, ("model", name))
            if section == "source":
                raise ValueError(
                    f"{name} is {value!r}, but from_pretrained changes fields and loads no other part. Use "
                    "load_pretrained_model, which takes parts from elsewhere."
                )
            places[place if section == "model" else name] = value
        if "tie_word_embeddings" in places:  # the text config's
            tied = {"tie_word_embeddings": places.pop("tie_word_embeddings")}
            text = places.get("text_config", {})
            places["text_config"] = tied | text if isinstance(text, dict) else text
        vision = places.get("vision_config")
        if vision is not None and "encoder_type" not in places:
            kind = vision.get("model_type") if isinstance(vision, dict) else vision.model_type
            if kind not in (None, (fields.get("vision_config") or {}).get("model_type")):
                fields.pop("encoder_type", None)
        for name, value in places.items():
            earlier = fields.get(name)
            if name in cls.sub_configs and isinstance(value, dict) and isinstance(earlier, dict):
                if name == "projector_config":
                    value = stacked_projector(earlier, value)
                elif value.get("model_type", earlier.get("model_type")) == earlier.get("model_type"):
                    names = MOE_FIELD_NAMES if name == "moe_config" else {}
                    value = {**earlier, **{names.get(key, key): entry for key, entry in value.items()}}
            fields[name] = value
        return fields

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        known = {*cls.default_field_names(), *FIELD_NAMES}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        saved, config_dict = config_dict, cls._with_overrides(config_dict, overrides)
        moe = config_dict.get("moe_config")
        if isinstance(moe, dict) and MoellavaMoeConfig.__annotations__.keys() - moe.keys() == {"eval_capacity_per_row"}:
            config_dict["moe_config"] = {**moe, "eval_capacity_per_row": False}  # 0.1.0: answers stay what they were
            if moe["eval_capacity_factor"] is not None:
                logger.warning(
                    "eval_capacity_factor is %s and counts over the batch, so an answer depends on its neighbours. "
                    "Set moe_config.eval_capacity_per_row to count each row alone.",
                    moe["eval_capacity_factor"],
                )
        if not kwargs.get("return_unused_kwargs"):  # else a model refuses them; tokenizers pass theirs on to here
            for name in kwargs:
                if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
                    raise ValueError(f"Unknown field {name!r} in {cls.__name__}; did you mean {close[0]!r}?")
        for name in ("projector_config", "moe_config"):
            if isinstance(config_dict.get(name), dict):
                check_part(name, config_dict[name])
        if isinstance(config_dict.get("dtype"), str):
            check_dtype("dtype", config_dict["dtype"])
        if isinstance(config_dict.get("quantization_config"), bool | float | int | list | str):
            raise ValueError(
                f"quantization_config is {config_dict['quantization_config']!r}; expected an object with the method "
                "and its fields. Save or download the model again."
            )
        # A file may carry what a trainer wrote on the config, or a field of a later version: kept where it can do no
        # harm, and said. A field that a caller misspells is an error, in `__post_init__`.
        declared = {*cls.__dataclass_fields__, *_LIBRARY_FIELDS, *FIELD_NAMES, *FOREIGN_KEYS}
        strange = {key: value for key, value in config_dict.items() if key not in declared}
        # What the file says of how to run the model is data; what the caller says of it is in `kwargs`.
        config_dict = {key: value for key, value in config_dict.items() if key in declared and key not in FOREIGN_KEYS}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        asked = overrides.get("image_seq_length")
        if asked not in (None, config.image_seq_length):
            raise ValueError(
                f"image_seq_length is {asked}, but the parts make {config.image_seq_length} tokens of a picture. Leave "
                "it out: it is always computed."
            )
        for name in _FOR_PROCESSOR if overrides else ():
            earlier, value = saved.get(name, cls.__dataclass_fields__[name].default), getattr(config, name)
            if value != earlier:
                logger.warning(
                    "%s is %s, and was %s when the model was saved: so the processor beside it goes on to prepare "
                    "pictures. Load both by load_pretrained_model, or give the processor the new value too.",
                    name, value, earlier,
                )  # fmt: skip
        for key, value in strange.items():
            if hasattr(cls, key):
                logger.warning("The config's field %r is not one of MoellavaConfig's; it is left out.", key)
            else:
                logger.warning("The config's field %r is not one of MoellavaConfig's; it is kept without effect.", key)
                setattr(config, key, value)
        return result

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves `config.json` and the code that loads it; arguments as in transformers.

        Raises:
            ValueError: A field has been set to what cannot be loaded; nothing has been written.
        """
        self.check()
        with staged_folder(save_directory) as staging:
            super().save_pretrained(staging, push_to_hub=False)
            export_code(staging, parts=self.part_classes())
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: `auto_map` holds every auto class already, and the code is copied by `export_code`."""


def public_name(origin: Any) -> Any:
    """Returns the last part of a local path, since a config is published; a Hub id and all else as it is."""
    is_path = isinstance(origin, str) and (
        origin.startswith(("/", "~", ".")) or "\\" in origin or origin.count("/") > 1
    )
    return last_part(origin) if is_path else origin


def last_part(path: str) -> str:
    """Returns the last part of a path of any system, or of a Hub id."""
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]


def _is_sparse(text_config: PreTrainedConfig) -> bool:
    """Whether a language model is a mixture of experts by itself."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(isinstance(getattr(text_config, name, None), int) for name in names)


def _own_config(key: str, given: dict | PreTrainedConfig | None, config_class: type) -> PreTrainedConfig:
    """Returns the config of a part that this package describes by a class of its own."""
    if isinstance(given, PreTrainedConfig):
        # By its name: loaded from a checkpoint, the class may be there twice.
        if given.model_type != config_class.model_type:
            raise ValueError(
                f"{key} is a {type(given).__name__}; expected a {config_class.__name__}, or a dictionary of its fields."
            )
        return copy.deepcopy(given)
    return config_class(**{name: value for name, value in (given or {}).items() if name != "model_type"})


def _part_config(key: str, given: dict | PreTrainedConfig | None, default: dict[str, Any]) -> PreTrainedConfig:
    """Returns a part's config, without anything in it that names other files or other processes."""
    config = _read_part_config(key, given, default)
    # Not checked by all of transformers' classes, whose models then fail when they are run.
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{key}.{name} is {size}; expected at least 1.")
    heads, groups = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 1)
    if heads % groups:
        raise ValueError(
            f"{key}.num_attention_heads is {heads} and num_key_value_heads is {groups}; expected a multiple of it."
        )
    _check_rotary_channels(key, config)
    return config


def _check_rotary_channels(key: str, config: PreTrainedConfig) -> None:
    """Refuses heads that rotary embeddings cannot turn: they take channels in pairs (Su et al. 2021, arXiv:2104.09864).

    Where they turn a part of the channels, some families round it up.
    """
    fields = config.to_dict()
    rope, heads, head_dim = (fields.get(name) for name in ("rope_parameters", "num_attention_heads", "head_dim"))
    differ = any("head" in name and "dim" in name and name != "head_dim" for name in fields)
    if not rope or not isinstance(heads, int) or differ:
        return
    if head_dim is None:
        head_dim = config.hidden_size // heads
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # of layers
    if head_dim % 2 and any(kind.get("partial_rotary_factor", 1) == 1 for kind in kinds):
        raise ValueError(
            f"{key} has heads of {head_dim} channels, which rotary embeddings turn in pairs; expected an even number. "
            "It is head_dim or, without one, hidden_size divided by num_attention_heads."
        )


def _read_part_config(key: str, given: dict | PreTrainedConfig | None, default: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)
        for foreign in ("auto_map", "trust_remote_code"):
            if foreign in vars(config):
                delattr(config, foreign)
        config._name_or_path = ""
        return config
    fields = dict(default if given is None else given)
    check_part(key, fields)
    for foreign in FOREIGN_KEYS:
        fields.pop(foreign, None)
    model_type = fields.pop("model_type", default["model_type"])
    if model_type == MoellavaEncoderConfig.model_type:
        return MoellavaEncoderConfig(**fields)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}.model_type is {model_type!r}, which transformers {__version__} does not have. Expected the type of "
            "one of its own models; code that a part brings with it is not run."
        )
    try:
        return CONFIG_MAPPING[model_type](**fields)
    except CONFIG_ERRORS as error:
        raise ValueError(
            f"{key} does not describe a {model_type!r} model ({config_fault(error)}). Expected the fields of "
            f"transformers' {CONFIG_MAPPING[model_type].__name__}."
        ) from error


__all__ = ["MoellavaConfig", "MoellavaEncoderConfig", "MoellavaMoeConfig", "MoellavaProjectorConfig"]
