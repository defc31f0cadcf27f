# SPDX-License-Identifier: Apache-2.0
"""What the experts of a sparse model have come to do: the load of each by digit, counted and drawn."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # draws into a file, with or without a screen

import torch
from matplotlib import pyplot

from ..routing import is_collapsed, trace_routing
from .scans import WORDS, Example, draw


# What is counted apart: the patches of the pictures of each digit, and the words of all prompts.
ROWS = (*(f"the {word}s" if word != "six" else "the sixes" for word in WORDS), "the words")


@dataclass
class ExpertLoad:
    """Which expert took how many tokens.

    Attributes:
        layers (`list[int]`): The sparse layers.
        counts (`torch.Tensor` of shape `(num_layers, num_rows, num_experts)`): Choices, by the rows of `ROWS`.
        num_experts_per_tok (`int`): How many experts a token goes to.
    """

    layers: list[int]
    counts: torch.Tensor
    num_experts_per_tok: int

    @property
    def by_row(self) -> torch.Tensor:
        """The share of each expert in the choices of a row, `(num_layers, num_rows, num_experts)`."""
        return self.counts / self.counts.sum(dim=-1, keepdim=True).clamp_min(1)

    @property
    def overall(self) -> torch.Tensor:
        """The share of each expert in all choices, `(num_layers, num_experts)`."""
        counts = self.counts.sum(dim=1)
        return counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)

    @property
    def specialisation(self) -> torch.Tensor:
        """How far the load of a row lies from the overall one, averaged over the rows, `(num_layers,)`.

        It is the total variation distance: 0 where every row goes to the same experts, 1 where no two share one.
        """
        distance = (self.by_row - self.overall.unsqueeze(1)).abs().sum(dim=-1) / 2
        return distance.mean(dim=-1)

    @property
    def collapsed(self) -> list[int]:
        """The layers in which all tokens go to the same expert or experts."""
        loads = zip(self.layers, self.overall.tolist(), strict=True)
        return [layer for layer, load in loads if is_collapsed(load, self.num_experts_per_tok)]


def expert_load(model, examples: list[Example]) -> ExpertLoad:
    """Asks a sparse model about every example and counts where its tokens went."""
    moe = model.config.moe_config
    counts = torch.zeros(len(moe.layers), len(ROWS), moe.num_experts, dtype=torch.float64)
    for example in examples:
        trace = trace_routing(model, [draw(example.scan)], example.question)
        is_image = torch.tensor(trace.is_image)
        for number, routing in enumerate(trace.layers):
            for row, tokens in ((example.digit, is_image), (-1, ~is_image)):
                counts[number, row] += torch.bincount(routing.experts[tokens].flatten(), minlength=moe.num_experts)
    return ExpertLoad(list(moe.layers), counts, moe.num_experts_per_tok)


def draw_expert_load(load: ExpertLoad, file: Path) -> None:
    """Draws a sheet for each layer: a row per digit and one for the words, a column per expert, the darker the more."""
    num_layers, num_rows, num_experts = load.counts.shape
    figure, places = pyplot.subplots(
        1, num_layers, figsize=(2.2 + 0.85 * num_experts * num_layers, 5.4), squeeze=False, layout="constrained"
    )
    shares = load.by_row
    for row, place in enumerate(places[0]):
        image = place.imshow(shares[row].numpy(), cmap="Blues", vmin=0, vmax=float(shares.max()), aspect="auto")
        for digit in range(num_rows):
            for expert in range(num_experts):
                share = float(shares[row, digit, expert])
                color = "white" if share > 0.6 * float(shares.max()) else "black"
                place.text(expert, digit, f"{share:.0%}", ha="center", va="center", size=9, color=color)
        place.set_title(f"layer {load.layers[row]}", size=11)
        place.set_yticks(range(num_rows), ROWS if row == 0 else [""] * num_rows)
        names = [f"expert {expert}\n{share:.0%}" for expert, share in enumerate(load.overall[row].tolist())]
        place.set_xticks(range(num_experts), names, size=9)
        place.tick_params(length=0)
    figure.colorbar(image, ax=places[0], format=lambda share, _: f"{share:.0%}", label="share of the row's choices")
    figure.suptitle("Which expert takes what (below: its share of all)", size=12, weight="bold")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
