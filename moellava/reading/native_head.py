# SPDX-License-Identifier: Apache-2.0
"""Whether the head of a language model is computed here as its family's own class computes it."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..modeling.language_moellava import apply_head, build_head, native_causal_lm


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
        own = native_causal_lm(config)
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


__all__ = ["check_head"]
