# SPDX-License-Identifier: Apache-2.0
"""The config of sparse layers; a checkpoint has this file where it has such layers."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_base_moellava import EXPERT_COUNTS, WithValueErrors, known_names, split_library_fields
from .tools_moellava import tools


@strict
class MoellavaMoeConfig(PreTrainedConfig, metaclass=WithValueErrors):
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
        library, fields = split_library_fields(kwargs)
        fields = tools().canonical_moe({**fields, "num_experts": self.num_experts})
        for name in fields:
            if name not in type(self).__annotations__:
                raise ValueError(f"Unknown field {name!r} in moe_config{known_names(name, type(self).__annotations__)}")
            earlier, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if name != "num_experts" and earlier not in (default, fields[name]):
                raise ValueError(
                    f"moe_config gives {name} twice, as {earlier!r} and by an older name as {fields[name]!r}. Give one."
                )
            setattr(self, name, fields[name])
        super().__post_init__(**library)
        self._check()

    def _check(self) -> None:
        if not isinstance(self.num_experts, int) or not 1 <= self.num_experts_per_tok <= self.num_experts:
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

    def tell_serving_engines(self, text_config: PreTrainedConfig) -> None:
        """Names the experts where vLLM looks for them, so that it runs and shards them by its own kernels.

        It computes every expert as `down(silu(gate(x)) * up(x))`, whatever the config says, and looks at no other
        activation. Experts of another form it runs as they are: they must not be announced.
        """
        if getattr(text_config, "hidden_act", None) == "silu" and not getattr(text_config, "mlp_bias", False):
            for name in EXPERT_COUNTS:
                setattr(text_config, name, getattr(self, name))
