# SPDX-License-Identifier: Apache-2.0
"""Which expert took which picture patch and which word: traced through a model, and drawn."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .chatting.prompting import question_inputs


# Projectors whose tokens are queries or latents, which look at the whole picture.
_WITHOUT_PLACES = ("older_qformer", "perceiver", "qformer")
# The share of all choices that the same few experts get at most in what still is a mixture.
_MOST_LOAD = 0.95


@dataclass
class LayerRouting:
    """What one sparse layer did with a prompt.

    Attributes:
        layer (`int`): The index of the layer.
        experts (`torch.Tensor` of shape `(num_tokens, num_experts_per_tok)`): The experts of every token, first choice
            first.
        weights (`torch.Tensor` of shape `(num_tokens, num_experts_per_tok)`): Their weights.
        load (`list[float]`): Every expert's share of all choices; they add up to 1.
    """

    layer: int
    experts: torch.Tensor
    weights: torch.Tensor
    load: list[float]


def is_collapsed(load: list[float], num_experts_per_tok: int) -> bool:
    """Whether a layer has learned no mixture: nearly every token goes to the same experts, while there are others."""
    return len(load) > num_experts_per_tok and sum(sorted(load)[-num_experts_per_tok:]) > _MOST_LOAD


@dataclass
class RoutingTrace:
    """What all sparse layers of a model did with a prompt.

    Attributes:
        tokens (`list[str]`): The prompt's tokens as text.
        is_image (`list[bool]`): Which of them are a picture's.
        pictures (`list`): The pictures as the vision tower got them, arrays of shape `(height, width, 3)` from 0 to 1.
        layers (`list[LayerRouting]`): The sparse layers, from first to last.
        num_experts (`int`): The number of experts of a layer.
        tokens_per_image (`int`): How many tokens a picture is.
        grid_side (`int` or `None`): The side of the square that a picture's tokens make on it, row by row; `None` where
            they have no places in the picture.
    """

    tokens: list[str]
    is_image: list[bool]
    pictures: list[Any]
    layers: list[LayerRouting]
    num_experts: int
    tokens_per_image: int
    grid_side: int | None = None
    collapsed: list[int] = field(init=False)

    def __post_init__(self):
        self.collapsed = [
            routing.layer for routing in self.layers if is_collapsed(routing.load, routing.experts.shape[1])
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns tokens, choices and loads as plain numbers, for JSON."""
        return {
            "tokens": self.tokens,
            "is_image": self.is_image,
            "num_experts": self.num_experts,
            "collapsed_layers": self.collapsed,
            "layers": [
                {
                    "layer": routing.layer,
                    "experts": routing.experts.tolist(),
                    "weights": [[round(weight, 4) for weight in row] for row in routing.weights.tolist()],
                    "load": [round(share, 4) for share in routing.load],
                }
                for routing in self.layers
            ],
        }


def trace_routing(model: Any, pictures: list[Any], question: str) -> RoutingTrace:
    """Runs a question about pictures through a sparse model and notes where every token went.

    Args:
        model (`MoellavaForCausalLM`): A sparse model with its processor.
        pictures (`list`): Pictures, in any form that the processor takes; may be empty.
        question (`str`): The question.

    Raises:
        ValueError: The model is dense.
    """
    return trace_prompt(model, question_inputs(model, pictures, question))


@torch.no_grad()
def trace_prompt(model: Any, inputs: Any) -> RoutingTrace:
    """Runs a prepared prompt, such as that of a whole conversation, through a sparse model; see [`trace_routing`].

    Args:
        model (`MoellavaForCausalLM`): A sparse model with its processor.
        inputs (`BatchFeature`): One prompt, as the processor returns it, on the model's device.

    Raises:
        ValueError: The model is dense.
    """
    if model.config.moe_config is None:
        raise ValueError("The model is dense: it has no experts to route to. Make it sparse by `moellava upcycle`.")
    processor = model.processor
    router_logits = model.eval()(**inputs, output_router_logits=True).router_logits
    blocks = [module for module in model.modules() if type(module).__name__ == "SparseMoeBlock"]
    layers = []
    for layer, block, logits in zip(model.config.moe_config.layers, blocks, router_logits, strict=True):
        weights, experts = (tensor.cpu() for tensor in block.route(logits))
        counts = torch.bincount(experts.flatten(), minlength=block.num_experts).double()
        layers.append(LayerRouting(layer, experts, weights, (counts / counts.sum()).tolist()))
    input_ids = inputs["input_ids"][0].tolist()
    return RoutingTrace(
        tokens=[processor.tokenizer.decode([token]) for token in input_ids],
        is_image=[token == model.config.image_token_id for token in input_ids],
        pictures=_shown(inputs.get("pixel_values"), processor.image_processor),
        layers=layers,
        num_experts=model.config.moe_config.num_experts,
        tokens_per_image=model.config.image_seq_length,
        grid_side=_grid_side(model.config),
    )


def _grid_side(config: Any) -> int | None:
    side = math.isqrt(config.image_seq_length)
    has_places = config.projector_config.type not in _WITHOUT_PLACES and side * side == config.image_seq_length
    return side if has_places else None


def _shown(pixel_values: torch.Tensor | None, image_processor: Any) -> list[Any]:
    """Takes the normalisation off prepared pictures."""
    if pixel_values is None:
        return []
    pixels = pixel_values.float().cpu()
    if getattr(image_processor, "do_normalize", False):
        shape = (1, -1, 1, 1)
        pixels = pixels * torch.tensor(image_processor.image_std).view(shape)
        pixels = pixels + torch.tensor(image_processor.image_mean).view(shape)
    return list(pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy())


def draw_routing(trace: RoutingTrace, out: str | os.PathLike) -> None:
    """Draws a trace as a picture: a row per sparse layer, with the patches and words in the colours of their experts.

    Args:
        trace (`RoutingTrace`): What to draw.
        out (`str` or `os.PathLike`): The file; its ending says the format, such as `.png` (which it is without one)
            or `.svg`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install moellava[demo].") from error
    colors = [colormaps["tab10" if trace.num_experts <= 10 else "tab20"](i % 20) for i in range(trace.num_experts)]
    num_pictures = len(trace.pictures)
    widths = [1.0] * max(num_pictures, 0) + [2.6, 1.2]
    figure = Figure(figsize=(2.2 * sum(widths), 2.3 * len(trace.layers) + 0.7), layout="constrained")
    axes = figure.subplots(len(trace.layers), len(widths), squeeze=False, width_ratios=widths)
    for row, routing in zip(axes, trace.layers, strict=True):
        image_positions = [i for i, is_image in enumerate(trace.is_image) if is_image]
        first = routing.experts[:, 0]
        for number in range(num_pictures):
            span = image_positions[number * trace.tokens_per_image : (number + 1) * trace.tokens_per_image]
            _draw_patches(row[number], trace.pictures[number], first[span].tolist(), trace.grid_side, colors)
        row[0].set_ylabel(f"layer {routing.layer}", fontsize=11)
        words = [
            (token, int(expert))
            for token, is_image, expert in zip(trace.tokens, trace.is_image, first, strict=True)
            if not is_image
        ]
        _draw_words(row[num_pictures], words, colors)
        _draw_load(row[-1], routing.load, colors)
    figure.suptitle("Colour: the expert of a token's first choice", fontsize=11)
    figure.savefig(out, dpi=130, format=Path(out).suffix.removeprefix(".") or "png")


def _draw_patches(axis: Any, picture: Any, experts: list[int], side: int | None, colors: list[Any]) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    # In grey, so that the only colours are the experts'.
    axis.imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
    if side is not None:
        overlay = [[colors[experts[row * side + column]] for column in range(side)] for row in range(side)]
        axis.imshow(overlay, extent=(0, 1, 1, 0), alpha=0.5, interpolation="nearest")
    else:
        overlay = [[colors[expert] for expert in experts]]
        axis.imshow(overlay, extent=(0, 1, 1.15, 1.03), aspect="auto", interpolation="nearest", clip_on=False)
        axis.set_ylim(1.15, 0)
    axis.set_aspect("equal")


def _draw_words(axis: Any, words: list[tuple[str, int]], colors: list[Any], columns: int = 46, rows: int = 9) -> None:
    """Writes the words in lines, each on the colour of its expert; the end of a long prompt is what is shown."""
    axis.set_axis_off()
    lines: list[list[tuple[str, int]]] = [[]]
    for word, expert in words:
        text = word.replace("\n", "\u21b5") or " "
        if sum(len(other) for other, _ in lines[-1]) + len(text) > columns and lines[-1]:
            lines.append([])
        lines[-1].append((text, expert))
    shown = lines[-rows:]
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    for number, line in enumerate(shown):
        place = 0
        for text, expert in line:
            box = {"boxstyle": "square,pad=0.12", "facecolor": (*colors[expert][:3], 0.45), "edgecolor": "none"}
            axis.text(place, number + 0.5, text, family="monospace", fontsize=7.5, va="center", bbox=box)
            place += len(text)
    if len(lines) > rows:
        axis.text(0, -0.3, f"... {len(lines) - rows} earlier lines not shown", fontsize=7, va="center")


def _draw_load(axis: Any, load: list[float], colors: list[Any]) -> None:
    axis.barh(range(len(load)), load, color=colors)
    axis.axvline(1 / len(load), color="black", linewidth=0.8, linestyle=":")  # an even load
    axis.set_yticks(range(len(load)), [f"expert {expert}" for expert in range(len(load))], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(1.3 / len(load), *load) * 1.05)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title("share of choices", fontsize=8)


__all__ = ["LayerRouting", "RoutingTrace", "draw_routing", "is_collapsed", "trace_prompt", "trace_routing"]
