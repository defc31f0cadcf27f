# SPDX-License-Identifier: Apache-2.0
"""The language model's head: text parity with the family's own `ForCausalLM` class.

A family's causal language model is its body, an output projection, and little arithmetic of its own around it. The body
is the family's `AutoModel`; the projection gets the shape that the family's class gives it; of the arithmetic, the
three forms that families of transformers use are applied where the config asks for them. `check_head` runs the family's
own class on the same hidden states, so that a family with other arithmetic is refused instead of being wrong.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import MoeModelOutputWithPast


def own_causal_lm(text_config: PreTrainedConfig) -> PreTrainedModel:
    """Builds the family's own causal language model on the meta device: its structure, without memory."""
    config = copy.deepcopy(text_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def build_head(text_config: PreTrainedConfig) -> nn.Linear:
    """Returns a new output projection of the shape and with the bias that the family's own class has.

    Raises:
        ValueError: The family's output projection is no linear layer.
    """
    with no_init_weights():  # of the whole model nothing but the head's shape is wanted
        own = own_causal_lm(text_config).get_output_embeddings()
    if not isinstance(own, nn.Linear):
        raise ValueError(
            f"A {text_config.model_type} language model has no linear output projection (found "
            f"{type(own).__name__}), so that it cannot be the language model here."
        )
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


@dataclass
class _BodyOutput(MoeModelOutputWithPast):
    """What the bodies of all families return, sparse ones and those that can attend to an encoder."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


class _HiddenStates(nn.Module):
    """Stands in for a language model's body: returns the same hidden states for any input."""

    def __init__(self, hidden_states: torch.Tensor):
        super().__init__()
        self.hidden_states = hidden_states

    @property
    def decoder(self) -> nn.Module:  # OPT's class asks its body's decoder
        return self

    def forward(self, *args, **kwargs) -> _BodyOutput:
        return _BodyOutput(last_hidden_state=self.hidden_states)


def check_head(text_config: PreTrainedConfig) -> None:
    """Checks, on random hidden states, that `apply_head` gives the logits of the family's own class.

    Raises:
        ValueError: It does not, or the family's class cannot be run so: the language model cannot be used.
    """
    config = copy.deepcopy(text_config)
    config.vocab_size = 16  # the arithmetic does not depend on the vocabulary
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    generator = torch.Generator().manual_seed(0)
    reason = None
    try:
        own = own_causal_lm(config)
        head = build_head(config)
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        hidden_states = torch.randn(1, 3, head.in_features, generator=generator)
        setattr(own, own.base_model_prefix, _HiddenStates(hidden_states))
        own.set_output_embeddings(head)
        with torch.no_grad():
            expected = own(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
            actual = apply_head(head, hidden_states, config)
        if expected.device.type == "meta" or not torch.equal(expected, actual):
            reason = "its own class computes the logits in a way that this package does not know"
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = f"its own class could not be run for comparison ({type(error).__name__}: {error})"
    if reason is not None:
        raise ValueError(
            f"A {text_config.model_type} language model cannot be used here without changing what it says: {reason}."
        )


__all__ = ["apply_head", "build_head", "check_head", "own_causal_lm"]
