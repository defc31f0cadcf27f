# SPDX-License-Identifier: Apache-2.0
"""`MoellavaConfig`: what a model is made of, by value.

The language model and the vision tower are described by their own transformers configs, the projector by its type and
that type's fields. Nothing in a config is a name to be looked up: a model is built from it without a network and
without any other file.
"""

import copy
import os
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .config_base_moellava import (
    CHOICES,
    EXPERT_COUNTS,
    FOREIGN_KEYS,
    ROUTER_LOSS,
    WithValueErrors,
    check_choice,
    own_config,
    split_library_fields,
)
from .tools_moellava import AUTO_MAP, tools


_DEFAULT_TEXT = {"model_type": "llama", "vocab_size": 32064}
_DEFAULT_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


@strict
class MoellavaProjectorConfig(PreTrainedConfig, metaclass=WithValueErrors):
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
        library, fields = split_library_fields(kwargs)
        fields = tools().canonical_projector(fields, self.type)
        self.type = fields.pop("type")
        fields = _projectors().complete_fields(self.type, fields)
        super().__post_init__(**library, **fields)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the projector's own, as its constructor takes them."""
        return {name: getattr(self, name) for name in _projectors().fields(self.type)}


@strict
class MoellavaConfig(PreTrainedConfig, metaclass=WithValueErrors):
    r"""
    The configuration of a MoELLaVA model. The defaults are those of LLaVA-1.5: a CLIP ViT-L/14 tower at 336 pixels, a
    two-layer MLP and a LLaMA.

    An unknown name is an error. Where moellava is installed, the older builder's names of these fields are accepted as
    well (`mm_vision_select_layer`, `mm_projector_type`, `num_query_tokens`, ...).

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
        kwargs = tools().take_other_names(self, kwargs)
        self.text_config = part_config("text_config", self.text_config, _DEFAULT_TEXT)
        self.vision_config = part_config("vision_config", self.vision_config, _DEFAULT_VISION)
        self.projector_config = own_config("projector_config", self.projector_config, MoellavaProjectorConfig)
        for name in ("encoder_type", "parts", "vision_feature_select_strategy"):
            setattr(self, name, tools().canonical_value(name, getattr(self, name)))
        if self.moe_config is not None:
            from ..parts.parts_moellava import optional  # late, as in `_projectors`

            self.moe_config = own_config("moe_config", self.moe_config, optional("sparse").config_class)
            self.moe_config.resolve(self.text_config.num_hidden_layers)
            self.moe_config.tell_serving_engines(self.text_config)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for name in CHOICES:
            check_choice(name, getattr(self, name))
        for key in FOREIGN_KEYS:
            if key not in ("attn_implementation", "experts_implementation", "name_or_path"):  # the caller's own word
                kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self._check_and_measure()

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
        tools().check_ties(self, again)
        read = again.to_dict()
        for name in names:
            if written[name] != read[name] or isinstance(getattr(self, name), dict):
                setattr(self, name, getattr(again, name))

    def _check_and_measure(self) -> None:
        """Checks that the parts fit together, and writes down what follows from them."""
        from ..parts.parts_moellava import encoder_for, projector_for  # late, as in `_projectors`

        tools().check_config(self)
        with tools().measuring(self):
            encoder = encoder_for(self)
        self.encoder_type = encoder.encoder_type
        projector = projector_for(self, encoder.feature_size)
        tokens = projector.num_output_tokens(encoder.num_selected_tokens)
        if tokens is not None:
            self.image_seq_length = tokens

    @property
    def text_embedding_size(self) -> int:
        """The width of the language model's input embeddings, which is not that of its layers in OPT-350M."""
        return getattr(self.text_config, "word_embed_proj_dim", None) or self.text_config.hidden_size  # type: ignore[union-attr] # a config, once made

    @PreTrainedConfig._experts_implementation.setter  # type: ignore[attr-defined] # mypy knows a setter within its class alone
    def _experts_implementation(self, value: str | dict | None):
        # transformers hands a plain name to every part, which towers and dense language models refuse. It is meant for
        # the sparse layers: ours, and those of a language model that is sparse by itself.
        if not isinstance(value, dict):
            value = {"": value, "text_config": value} if self.is_natively_sparse else {"": value}
        self._experts_implementation_internal = value.get("", getattr(self, "_experts_implementation", None))
        for key in self.sub_configs:
            if key in value and isinstance(getattr(self, key, None), PreTrainedConfig):
                getattr(self, key)._experts_implementation = value[key]

    @property
    def is_natively_sparse(self) -> bool:
        """Whether the language model is a mixture of experts by itself."""
        text, names = getattr(self, "text_config", None), ("num_experts", "num_local_experts", "n_routed_experts")
        return self.moe_config is None and any(isinstance(getattr(text, name, None), int) for name in names)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The language model's config; arguments as in transformers."""
        text = super().get_text_config(*args, **kwargs)
        if self.moe_config is not None and text is self.text_config:
            for name in ROUTER_LOSS:  # here TRL looks for the router loss, and for its weight
                setattr(text, name, getattr(self.moe_config, name))
        return text

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for key in (*self.sub_configs, "moe_config"):
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
        for key in (*self.sub_configs, "moe_config"):
            if isinstance(output.get(key), dict):
                output[key].pop("_name_or_path", None)
        return output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Self:
        """Makes a config of the fields of a file; arguments as in transformers. Fields among `kwargs` are laid over."""
        return tools().config_from_dict(super().from_dict, cls, config_dict, kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves `config.json` and the code that loads it; arguments as in transformers."""
        self.check()
        with tools().saving(save_directory, self) as folder:
            super().save_pretrained(folder, push_to_hub=False)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: `auto_map` holds every auto class already, and the code is written with every save."""


def _projectors():
    from ..parts.parts_moellava import PROJECTORS  # late: it is built on PyTorch, as are the other parts

    return PROJECTORS


def part_config(key: str, given: dict | PreTrainedConfig | None, default: dict[str, Any]) -> PreTrainedConfig:
    """Returns a part's config, without anything in it that names other files or other processes."""
    config = _read_part_config(key, given, default)
    tools().check_part_config(key, config)
    return config


def _read_part_config(key: str, given: dict | PreTrainedConfig | None, default: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)
        for foreign in ("auto_map", "trust_remote_code"):
            if foreign in vars(config):
                delattr(config, foreign)
        config._name_or_path = ""
        return config
    fields = dict(default if given is None else given)
    tools().check_part(key, fields)
    for foreign in FOREIGN_KEYS:
        fields.pop(foreign, None)
    model_type = fields.pop("model_type", default["model_type"])
    if model_type == "moellava_encoder":
        from ..parts.parts_moellava import optional  # late, as in `_projectors`

        return optional("user_encoder_config")(**fields)
    with tools().reading_part(key, model_type):
        return CONFIG_MAPPING[model_type](**fields)


__all__ = ["MoellavaConfig", "MoellavaProjectorConfig", "part_config"]
