# SPDX-License-Identifier: Apache-2.0
"""The language model's head: text parity with the family's own `ForCausalLM` class.

A causal language model is its body, an output projection, and little arithmetic of its own around it. The body is the
family's `AutoModel`; the projection gets the shape that the family's class gives it; of the arithmetic, the three forms
that families use are applied. A family with another is refused while a model is assembled.
"""

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..configuration.tools_moellava import tools


def native_causal_lm(text_config: PreTrainedConfig) -> PreTrainedModel:
    """Builds the family's own causal language model on the meta device: its structure, without memory."""
    config = copy.deepcopy(text_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def build_head(text_config: PreTrainedConfig) -> nn.Linear:
    """Returns a new output projection of the shape and with the bias that the family's own class has."""
    with no_init_weights():  # of the whole model nothing but the head's shape is wanted
        own = native_causal_lm(text_config).get_output_embeddings()
    tools().check_head(text_config, own)
    return nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)


def apply_head(head: nn.Module, hidden_states: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """Computes the logits.

    Args:
        head (`nn.Module`): The output projection.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): What the body returns.
        text_config (`PreTrainedConfig`): The language model's config.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`.
    """
    logits = head(hidden_states)
    # Granite and MiniCPM: `GraniteForCausalLM.forward`
    if (scaling := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / scaling
    # Cohere: `CohereForCausalLM.forward`
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * scale
    # Gemma 2: `Gemma2ForCausalLM.forward`
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
