# SPDX-License-Identifier: Apache-2.0
"""The experts of a sparse layer as modules of their own, in which a quantised model holds them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .experts_moellava import one_after_the_other
from .moe_block_moellava import EXPERTS_BUILDER


class ExpertMlp(nn.Module):
    """One expert as a module of linear layers; the arguments are those of the experts together."""

    # trf-ignore: TRF029  the sizes are those of the dense MLP, whatever its family's config calls them
    def __init__(self, hidden_size: int, intermediate_size: int, act_fn: nn.Module, gated: bool, biased: bool):
        super().__init__()
        self.act_fn = act_fn
        if gated:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=biased)
        else:
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=biased)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=biased)
        self.gated = gated

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes and returns tokens of shape `(num_tokens, hidden_size)`."""
        if not self.gated:
            return self.down_proj(self.act_fn(self.up_proj(tokens)))
        gate, up = self.gate_up_proj(tokens).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class ModularExperts(nn.ModuleList):
    """The experts of one block as modules of their own, in which a quantised model holds them.

    What quantises a model, whichever method it is, looks for linear layers, and leaves tensors of three dimensions in
    full precision; so do the tools that put adapters onto quantised layers. The weights are those of the experts
    together, taken apart: `experts.gate_up_proj[3]` is `experts.3.gate_up_proj.weight`.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the forward of the experts together: every touched expert runs on its own tokens."""
        return one_after_the_other(self, hidden_states, top_k_index, top_k_weights)

    @classmethod
    def are_in(cls, model: nn.Module) -> bool:
        """Whether a model holds its experts so."""
        return any(isinstance(module, cls) for module in model.modules())


@contextmanager
def modular_experts() -> Iterator[None]:
    """Makes the sparse layers that are built within hold their experts as modules."""
    token = EXPERTS_BUILDER.set(_build)
    try:
        yield
    finally:
        EXPERTS_BUILDER.reset(token)


def _build(num_experts: int, *form: Any) -> ModularExperts:
    return ModularExperts(ExpertMlp(*form) for _ in range(num_experts))


_STACKED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|up_proj|down_proj)(_bias)?")


_ONE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_up_proj|up_proj|down_proj)\.(weight|bias)")


def experts_apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights with those of the experts under the names of modules of their own, nothing copied."""
    apart = {}
    for name, tensor in tensors.items():
        match = _STACKED_EXPERTS.fullmatch(name)
        if match is None:
            apart[name] = tensor
            continue
        kind = "bias" if match[3] else "weight"
        apart |= {f"{match[1]}.{expert}.{match[2]}.{kind}": share for expert, share in enumerate(tensor.unbind(0))}
    return apart


def experts_together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights with those of experts that are modules of their own stacked: the inverse of `experts_apart`."""
    together, shares = {}, {}
    for name, tensor in tensors.items():
        match = _ONE_EXPERT.fullmatch(name)
        if match is None:
            together[name] = tensor
        else:
            stack = f"{match[1]}.{match[3]}{'_bias' if match[4] == 'bias' else ''}"
            shares.setdefault(stack, {})[int(match[2])] = tensor
    return together | {name: torch.stack([share[i] for i in sorted(share)]) for name, share in shares.items()}


class Modular:
    """What a model's quantised weights need of its experts."""

    building = staticmethod(modular_experts)
    apart = staticmethod(experts_apart)
    together = staticmethod(experts_together)
    are_in = ModularExperts.are_in
