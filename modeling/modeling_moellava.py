# SPDX-License-Identifier: Apache-2.0
"""`MoellavaModel` and `MoellavaForCausalLM`: a vision tower, a projector and a language model in one forward path.

The tree is that of transformers' LLaVA: `model.vision_tower`, `model.multi_modal_projector`, `model.language_model`,
`lm_head`.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_moellava import MoellavaConfig
from ..configuration.tools_moellava import tools
from ..configuration.versions_moellava import CACHE
from ..parts.parallel_moellava import add_plans
from ..parts.parts_moellava import OPTIONAL, encoder_for, optional, projector_for
from .language_moellava import apply_head, build_head


logger = logging.get_logger(__name__)


@dataclass
class MoellavaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(num_images * image_seq_length, hidden_size)`, *optional*):
        The projected features of all pictures, one after the other.
    router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True` by a sparse model):
        The logits of every sparse layer's router, of shape `(batch_size * sequence_length, num_experts)`.
    """

    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class MoellavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
        The next-token loss.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        The scores of every token of the vocabulary.
    past_key_values, hidden_states, attentions (*optional*):
        As in `CausalLMOutputWithPast`; the first is `cache` from transformers 5.24 on.
    image_hidden_states (`torch.Tensor` of shape `(num_images * image_seq_length, hidden_size)`, *optional*):
        The projected features of all pictures, one after the other.
    aux_loss (`torch.Tensor` of shape `()`, *optional*, returned along with `router_logits`):
        The load-balancing loss, before it is weighted by `router_aux_loss_coef`.
    router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True` by a sparse model):
        The logits of every sparse layer's router, of shape `(batch_size * sequence_length, num_experts)`.
    """

    image_hidden_states: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


# What `save_pretrained` hands on to `push_to_hub`; to that alone, but for the size of shards.
_HUB_ARGUMENTS = ("commit_message", "private", "create_pr", "revision", "commit_description", "tags", "token")


# Support for quantised weights, where a checkpoint has it; and what bitsandbytes leaves alone where it has none.
_QUANTISED = [OPTIONAL["quantised"]] if "quantised" in OPTIONAL else []
_IN_FULL_PRECISION = ("model.vision_tower", "model.multi_modal_projector", "vision_tower", "lm_head")


class MoellavaPreTrainedModel(*_QUANTISED, PreTrainedModel):
    """What the two models share: initialisation of the parts, and saving."""

    config: MoellavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # The MoellavaProcessor that belongs to the model, saved and pushed along with it; set by the tools that make one.
    processor = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # which PEFT sets once it has put on the adapters, by whatever way it was called
            tools().check_adapters(self, value)

    @torch.no_grad()
    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, MoellavaModel):
                module.encoder.initialize(module.vision_tower)
                module.projector.initialize(module.multi_modal_projector)
        # The tower and the language model are transformers' own. From here, transformers takes them for custom code,
        # of which it leaves out modules without parameters of their own: CLIP's and SigLIP's attention draws its
        # projections as a whole.
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and not module.is_custom_code():
                module.initialize_weights()
        super().initialize_weights()
        # A part's parameters that are no standard layer's (queries, latents): transformers' initialisation skips
        # modules of custom code that hold none of their own, so that a hook in `_init_weights` would not be reached.
        for module in self.modules():
            if hasattr(module, "frozen"):  # a router
                module.requires_grad_(not module.frozen)  # weights of a checkpoint come unfrozen
            initialize_parameters = getattr(module, "initialize_parameters", None)
            if initialize_parameters is None or getattr(module, "_parameters_initialized", False):
                continue
            if not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                initialize_parameters()
            module._parameters_initialized = True

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ):
        # Every way to switch it on comes through here.
        for module in self.modules():
            if isinstance(module, MoellavaModel) and module.routing is not None:
                gradient_checkpointing_func = module.routing.checkpointing(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed anew in the backward pass; PEFT asks, and transformers' own warns."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        """Loads a checkpoint; arguments as in transformers."""
        if not _QUANTISED and hasattr(kwargs.get("quantization_config"), "llm_int8_skip_modules"):
            kwargs["quantization_config"] = config = copy.copy(kwargs["quantization_config"])
            config.llm_int8_skip_modules = config.llm_int8_skip_modules or list(_IN_FULL_PRECISION)
        if getattr(kwargs.get("config"), "model_type", None) == cls.config_class.model_type:
            kwargs["config"].check()
        if pretrained_model_name_or_path is not None:
            tools().check_files(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        # With an adapter, `info` is about the adapter's weights alone.
        if not model._hf_peft_config_loaded:
            model._note_untrained_parts([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: MoellavaConfig, **kwargs):
        config.check()  # a part that was set as a dictionary has no dtype for transformers to set
        return super()._from_config(config, **kwargs)

    def _note_untrained_parts(self, random_weights: list[str]) -> None:
        """Adds the parts of weights that no file gave to the config's `untrained_parts`, and warns of all of these."""
        # New routers choose among equal experts, so that the answers are right before they are trained.
        routers = {name for name, module in self.named_modules() if hasattr(module, "frozen")}
        new = [name for name in random_weights if name.rpartition(".")[0] not in routers]
        new = {name.removeprefix("model.").partition(".")[0] for name in new}
        if new:
            self.config.untrained_parts = sorted({*(self.config.untrained_parts or ()), *new})
        if self.config.untrained_parts:
            logger.warning(
                "Never trained: %s. The weights are random, so answers about images are meaningless. Train the model "
                "first, or load trained weights.", " and ".join(self.config.untrained_parts),
            )  # fmt: skip

    def _note_training(self, *parts: str) -> None:
        """Takes those of the parts that a forward pass is about to train off the config's `untrained_parts`."""
        untrained = self.config.untrained_parts
        if not (untrained and self.training and torch.is_grad_enabled()):
            return
        trained = {part for part in parts if any(weight.requires_grad for weight in getattr(self, part).parameters())}
        if not trained.isdisjoint(untrained):
            self.config.untrained_parts = [part for part in untrained if part not in trained]

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        tools().check_size(model, state_dict, checkpoint_files)
        load = super()._load_pretrained_model
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Saves weights, config, code and, where the model has one, its processor; arguments as in transformers.

        Where moellava is installed, an interrupted save leaves an earlier checkpoint as it was, but for
        `distributed_checkpoint=True`, with which each process writes its part in place; what else lies in the folder is
        kept, the weights of another `variant` included.

        Raises:
            OSError: The folder, or the disk that it is on, cannot be written to.
            ValueError: A user's part is defined where it cannot travel; or the config has been set to what cannot be
                loaded, or to what the processor does not fit.
        """
        self.config.check()
        is_main_process = is_main_process and not (dist.is_available() and dist.is_initialized() and dist.get_rank())
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
        hub_kwargs = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        hub_kwargs |= {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
        with tools().saving(save_directory, self, is_main_process) as folder:
            super().save_pretrained(folder, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
            if self.processor is not None and is_main_process:
                self.processor.save_pretrained(folder)
        if push_to_hub and is_main_process:
            self.push_to_hub(repo_id, **hub_kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict, **kwargs):
        upload = super()._upload_modified_files
        return tools().upload(self, upload, working_dir, repo_id, files_timestamps, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        """Sets how attention is computed; arguments as in transformers."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, MoellavaModel):
                module.follow_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in the source of this file; ours is in another

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # One of our own, which no other model has.
        if requested_experts in (None, "sorted_mm"):
            return "sorted_mm"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: `auto_map` holds every auto class already, and the code is written with every save."""


class MoellavaModel(MoellavaPreTrainedModel):
    """A vision tower, a projector and a language model's body.

    Args:
        config (`MoellavaConfig`): What it is made of.
    """

    def __init__(self, config: MoellavaConfig):
        config.check()  # its fields may have been set since it was made
        super().__init__(config)
        self.encoder = encoder_for(config)
        self.image_size = self.encoder.image_size  # here, because torch.compile cannot trace how encoders find it
        self.projector = projector_for(config, self.encoder.feature_size)
        self.vision_tower = self.encoder.build()
        self.multi_modal_projector = self.projector.build()
        with tools().building_part("text_config", config.text_config):
            self.language_model = AutoModel.from_config(config.text_config)
        # CODEPATH: sparse checkpoints (MoE-LLaVA's kind) have a moe_config; of dense ones (LLaVA's kind), some have a
        # language model that is sparse by itself, as Mixtral.
        kind = "sparse" if config.moe_config is not None else "routing" if config.is_natively_sparse else None
        self.routing = None if kind is None else optional(kind)(config)
        if self.routing is not None:
            self.routing.build(self)
        add_plans(self.language_model, {})
        if isinstance(self.vision_tower, PreTrainedModel):
            add_plans(self.vision_tower, self.encoder.plans)
        # transformers adds the blocks of the tower and the language model; a projector stays on one device as a whole,
        # and so does a tower whose blocks it does not know.
        self._no_split_modules = [type(self.multi_modal_projector).__name__]
        if not isinstance(self.vision_tower, PreTrainedModel):
            self._no_split_modules.append(type(self.vision_tower).__name__)
        self.follow_attn_implementation()
        self.post_init()
        # A family names its text layers beside those of its tower; accelerate's FSDP looks for each of them.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def follow_attn_implementation(self) -> None:
        """Lets the projector compute its attention as the config says of it."""
        self.projector.follow_attention(self.multi_modal_projector, self.config.projector_config._attn_implementation)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model

    def set_decoder(self, decoder: PreTrainedModel):
        self.language_model = decoder

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes and projects pictures.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, channels, image_size, image_size)`):
                Pictures as the processor prepares them.
            vision_feature_layer, vision_feature_select_strategy (*optional*):
                For callers of LLaVA, who may repeat what the config says.
            output_hidden_states (`bool`, *optional*):
                Whether to return the tower's hidden states, up to the last feature layer: the layers behind it are
                not run.
            output_attentions (`bool`, *optional*):
                Whether to return the tower's attention weights, which only `attn_implementation="eager"` computes.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `last_hidden_state` holds the tower's
            features, of shape `(num_images, tokens, feature_size)`; `pooler_output` the projected ones, as a list of
            one tensor of shape `(image_seq_length, hidden_size)` per picture.

        Raises:
            ValueError: Another feature layer or strategy than the config's, or pictures of another size.
        """
        asked = (vision_feature_layer, vision_feature_select_strategy)
        for name, value in zip(("vision_feature_layer", "vision_feature_select_strategy"), asked, strict=True):
            own = getattr(self.config, name)
            if value not in (None, own):
                raise ValueError(
                    f"{name} is {value!r}, but the model is made for {own!r}: its tower ends there, and its projector "
                    f"was trained on it. Load it for another by from_pretrained(..., {name}={value!r})."
                )
        side = self.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"The pictures are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels, but the model takes "
                f"{side}x{side}. Let its processor prepare them; one that was saved with another image_size has to be "
                "given the new size too."
            )
        # Not among the named arguments: `generate` would take those of its own call for the pictures' alone.
        asked = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
        pixel_values = pixel_values.to(_floating_dtype(self.vision_tower))
        encoded = self.encoder.encode(self.vision_tower, pixel_values, **asked)
        projected = self.multi_modal_projector(encoded.last_hidden_state)
        # CODEPATH: converted MiniCPM checkpoints take pictures unscaled; all others have a scale of 1.
        if self.config.image_feature_scale != 1:
            projected = projected * self.config.image_feature_scale
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=list(projected),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Returns where the placeholders are, of shape `(batch_size, sequence_length, 1)`, and checks their number.

        Raises:
            ValueError: There are more or fewer placeholders than image features.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        expected = image_features.shape[0]  # (features, hidden_size)
        found = mask.sum()
        torch_compilable_check(
            found == expected,
            lambda: (
                f"The prompt has {int(found)} image tokens, but the pictures give {expected} features: "
                f"{expected // self.config.image_seq_length} pictures of {self.config.image_seq_length} tokens. Let "
                "the processor prepare text and pictures together; its num_image_tokens has to be "
                f"{self.config.image_seq_length}."
            ),
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoellavaModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with `image_seq_length` placeholders in the place of every picture.
            pixel_values (`torch.Tensor` of shape `(num_images, channels, image_size, image_size)`, *optional*):
                The pictures of the whole batch, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions; by default counted from 0 without regard to padding, as the language models do.
            past_key_values (`Cache`, *optional*):
                Keys and values of earlier tokens.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                `{"image": model.get_image_features(pixel_values)}` instead of `pixel_values`, to ask several questions
                about pictures that are encoded once.
            output_router_logits (`bool`, *optional*):
                Whether to return the logits of the routers of a sparse model.
            cache (`Cache`, *optional*):
                The name of `past_key_values` from transformers 5.24 on. Either is taken on every version.
            vision_feature_layer, vision_feature_select_strategy (*optional*):
                See `get_image_features`.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, both of `pixel_values` and
                `mm_encoder_outputs`, both of `past_key_values` and `cache`, numbers of placeholders and of features
                that differ, or another feature layer or strategy than the config's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("Give only one of pixel_values and mm_encoder_outputs.")
        cache = one_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if pixel_values is not None and pixel_values.shape[0] > 0:
            encoded = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
            )
        if encoded is not None:
            # per picture (image_seq_length, hidden_size) -> (num_images * image_seq_length, hidden_size)
            image_features = torch.cat(list(encoded.pooler_output), dim=0)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
            if image_features.requires_grad:
                self._note_training("vision_tower", "multi_modal_projector")
        elif self.training and in_several_processes():
            # Another process may have pictures, and each waits for the gradients, or the shards, of the others.
            size = self.image_size
            blank = self.get_image_features(inputs_embeds.new_zeros(1, 3, size, size), return_dict=True)
            unseen = torch.cat(blank.pooler_output).sum() * 0
            inputs_embeds = inputs_embeds + unseen.to(inputs_embeds.device, inputs_embeds.dtype)

        # Here, and not where the logits are computed: TRL's losses by chunks call this model and the head apart.
        self._note_training("language_model")
        # Continuous batching's own cache passes through the language model to its attention, by one name everywhere.
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache" if isinstance(cache, PagedAttentionCache) else CACHE: cache,
            "inputs_embeds": inputs_embeds,
            "return_dict": True,
            **kwargs,
        }
        if self.routing is None:
            outputs, router_logits = self.language_model(**inputs), None
        else:
            outputs, router_logits = self.routing.run(self.language_model, inputs, cache, output_router_logits)
        return MoellavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            router_logits=router_logits,
            **{CACHE: outputs.get(CACHE)},
        )


class MoellavaForCausalLM(MoellavaPreTrainedModel, GenerationMixin):
    """A MoELLaVA model with its language-model head: answers questions about pictures.

    Args:
        config (`MoellavaConfig`): What it is made of.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained("me/my-model", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("me/my-model", trust_remote_code=True)
    >>> content = [{"type": "image", "path": "scan.png"}, {"type": "text", "text": "What is shown?"}]
    >>> message = {"role": "user", "content": content}
    >>> inputs = processor.apply_chat_template(
    ...     [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    >>> answer = model.generate(**inputs, max_new_tokens=20)
    ```"""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoellavaConfig):
        config.check()  # transformers reads the text config before the body is built
        super().__init__(config)
        self.model = MoellavaModel(config)
        self.lm_head = build_head(config.text_config)
        if self.model.routing is not None:
            self.model.routing.count_experts()
        # The name of the embedding differs by family, so the tie belongs to the instance.
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def _get_name(self) -> str:
        # By this name transformers' Trainer looks up, for label smoothing, whether logits are those of the next token.
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.config.text_config.model_type, type(self).__name__)

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    def get_decoder(self) -> PreTrainedModel:
        return self.model.get_decoder()

    def set_decoder(self, decoder: PreTrainedModel):
        self.model.set_decoder(decoder)

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects pictures; see `MoellavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def generate(self, *args, mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None, **kwargs):
        """Generates tokens; arguments as in transformers, and those of `forward`."""
        if mm_encoder_outputs is not None:
            # With beams, or several sequences for a prompt, transformers repeats the features in the very object that
            # it is given: the next question about the same pictures would get those of others.
            kwargs["mm_encoder_outputs"] = {name: copy.copy(output) for name, output in mm_encoder_outputs.items()}
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoellavaCausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to be predicted, aligned with `input_ids`; -100 where nothing is to be learnt.
            output_router_logits (`bool`, *optional*):
                Whether to return the routers' logits and the load-balancing loss of a sparse model. That loss is part
                of `loss` in any case.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions, or which positions, get logits; 0 for all.

        The other arguments are those of `MoellavaModel.forward`.
        """
        self._note_training("lm_head")
        cache = one_cache(past_key_values, cache)
        routing, mask, wants_router_logits, balances = self.model.routing, None, False, False
        if routing is not None:
            wants_router_logits = routing.wants_logits(output_router_logits)
            balances = routing.balances and labels is not None
            if balances or wants_router_logits:
                tokens = input_ids if inputs_embeds is None else inputs_embeds
                mask = None if tokens is None else routing.token_mask(attention_mask, tokens, cache)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=wants_router_logits or balances or output_router_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept, :]
        logits = apply_head(self.lm_head, hidden_states, self.config.text_config)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        elif routing is not None and self.training and "num_items_in_batch" in kwargs and not wants_router_logits:
            routing.warn_of_lost_loss()
        aux_loss = None
        if outputs.router_logits:
            aux_loss = routing.aux_loss(outputs.router_logits, mask)
            if labels is not None:
                loss = loss + routing.aux_weight(labels, **kwargs) * aux_loss.to(loss.device)
        return MoellavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            aux_loss=aux_loss if wants_router_logits else None,
            router_logits=outputs.router_logits if wants_router_logits else None,
            **{CACHE: outputs.get(CACHE)},
        )


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a pass, by whichever of its names it was given; raises a ValueError for both."""
    if past_key_values is not None and cache is not None:
        raise ValueError("Give only one of past_key_values and cache: they are two names of one argument.")
    return past_key_values if cache is None else cache


def in_several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _floating_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in, which a quantised parameter does not tell."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


__all__ = [
    "MoellavaCausalLMOutputWithPast", "MoellavaForCausalLM", "MoellavaModel", "MoellavaModelOutputWithPast",
    "MoellavaPreTrainedModel",
]  # fmt: skip
