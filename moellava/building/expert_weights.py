# SPDX-License-Identifier: Apache-2.0
"""The weights of experts, of those of dense MLPs."""

import torch

from ..parts.moe_block_moellava import DenseForm


def stacked_experts(form: DenseForm, experts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the tensors of experts together, of the weights of an MLP of some form for each."""
    up_name = "gate_up_proj" if form.gated else "up_proj"
    tensors = {}
    for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 1 + form.biased]:
        tensors[f"{up_name}{suffix}"] = _stacked(
            [[expert[f"{name}.{kind}"] for name in form.up_names] for expert in experts]
        )
        tensors[f"down_proj{suffix}"] = _stacked([[expert[f"{form.down_name}.{kind}"]] for expert in experts])
    return tensors


def _stacked(experts: list[list[torch.Tensor]]) -> torch.Tensor:
    """Stacks the experts, each the rows of several tensors, without any tensor in between."""
    first = experts[0]
    stack = first[0].new_empty(len(experts), sum(part.shape[0] for part in first), *first[0].shape[1:])
    for rows, expert in zip(stack, experts, strict=True):
        torch.cat(expert, out=rows)
    return stack


__all__ = ["stacked_experts"]
