# SPDX-License-Identifier: Apache-2.0
"""The config of sparse layers; a checkpoint has this file where it has such layers."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_base_moellava import EXPERT_COUNTS, WithValueErrors, split_library_fields
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
        fields = tools().canonical_moe(self, {**fields, "num_experts": self.num_experts})
        for name, value in fields.items():
            setattr(self, name, value)
        super().__post_init__(**library)
        tools().check_moe(self)

    def resolve(self, num_hidden_layers: int) -> None:
        """Sets what is open until the fields are those of a model with so many layers: `layers` are then indices."""
        self.layers = tools().resolved_layers(self.layers, num_hidden_layers)
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1

    def tell_serving_engines(self, text_config: PreTrainedConfig) -> None:
        """Names the experts where vLLM looks for them, so that it runs and shards them by its own kernels.

        It computes every expert as `down(silu(gate(x)) * up(x))`, whatever the config says, and looks at no other
        activation. Experts of another form it runs as they are: they must not be announced.
        """
        if getattr(text_config, "hidden_act", None) == "silu" and not getattr(text_config, "mlp_bias", False):
            for name in EXPERT_COUNTS:
                setattr(text_config, name, getattr(self, name))
