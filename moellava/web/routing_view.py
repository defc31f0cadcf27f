# SPDX-License-Identifier: Apache-2.0
"""The routing of a prompt as HTML: patches and words in the colours of their experts, for one layer."""

from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ..routing import LayerRouting, RoutingTrace
from .pictures import data_uri


# Told apart in light and dark, and by readers who see no difference between red and green: the first six are those of
# Okabe and Ito ("Color Universal Design", 2008).
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a7500", "#7a5ea8")


def routing_html(trace: RoutingTrace | None, layer: int) -> str:
    """Returns what one layer did with a prompt: the pictures with their patches, the words, every expert's share.

    Args:
        trace (`RoutingTrace` or `None`): What to show; `None` for a prompt that has not been traced yet.
        layer (`int`): The index of the layer.
    """
    if trace is None:
        return '<p class="mv-hint">Ask a question: then this shows which expert took which patch and which word.</p>'
    routing = next((routing for routing in trace.layers if routing.layer == layer), None)
    if routing is None:
        return f'<p class="mv-hint">Layer {layer} of this model has no experts.</p>'
    positions = [position for position, is_image in enumerate(trace.is_image) if is_image]
    size = trace.tokens_per_image
    pictures = "".join(
        _picture_html(picture, number, routing, positions[number * size : (number + 1) * size], trace.grid_side)
        for number, picture in enumerate(trace.pictures)
    )
    collapsed = (
        '<p class="mv-hint">Nearly all tokens go to the same experts: this layer has collapsed.</p>'
        if layer in trace.collapsed
        else ""
    )
    return (
        f'<div class="mv-routing"><div class="mv-pictures">{pictures}</div>'
        f'<div class="mv-facts">{_load_html(routing)}{collapsed}{_words_html(trace, routing)}</div></div>'
    )


def _color(expert: int) -> str:
    if expert < len(_COLORS):
        return _COLORS[expert]
    return f"hsl({expert * 137.5 % 360:.0f} 55% 48%)"  # the golden angle: neighbours differ most


def _choices(routing: LayerRouting, position: int) -> str:
    pairs = zip(routing.experts[position].tolist(), routing.weights[position].tolist(), strict=True)
    return ", ".join(f"expert {expert} ({weight:.2f})" for expert, weight in pairs)


def _picture_html(picture: Any, number: int, routing: LayerRouting, positions: list[int], side: int | None) -> str:
    """Draws a picture in grey, so that the only colours are the experts', with one square per token on or below it."""
    height, width = picture.shape[:2]
    grey = Image.fromarray((picture.mean(axis=-1) * 255).round().astype(np.uint8))
    is_grid = side is not None
    columns, rows = (side, side) if is_grid else (len(positions), 1)
    band = height if is_grid else height / 8
    top = 0 if is_grid else height * 1.05
    squares = []
    for index, position in enumerate(positions):
        row, column = divmod(index, columns)
        place = f"row {row + 1}, column {column + 1}" if is_grid else f"token {index + 1}"
        squares.append(
            f'<rect x="{column * width / columns:.2f}" y="{top + row * band / rows:.2f}" width="{width / columns:.2f}" '
            f'height="{band / rows:.2f}" fill="{_color(int(routing.experts[position, 0]))}">'
            f"<title>{place}: {_choices(routing, position)}</title></rect>"
        )
    label = f"Picture {number + 1}, each patch in the colour of the expert that layer {routing.layer} sends it to first"
    return (
        f'<svg class="{"mv-patches" if is_grid else "mv-queries"}" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width} {height if is_grid else top + band:.2f}">'
        f'<image href="{data_uri(grey)}" width="{width}" height="{height}"/><g>{"".join(squares)}</g></svg>'
    )


def _load_html(routing: LayerRouting) -> str:
    largest = max(routing.load)
    rows = "".join(
        f'<li><span>expert {expert}</span><span class="mv-bar"><i style="width:{100 * share / largest:.0f}%;'
        f'background:{_color(expert)}"></i></span><span>{share:.0%}</span></li>'
        for expert, share in enumerate(routing.load)
    )
    return f'<p class="mv-hint">Share of all choices</p><ul class="mv-load">{rows}</ul>'


def _words_html(trace: RoutingTrace, routing: LayerRouting) -> str:
    words = "".join(
        f'<span style="--expert:{_color(int(routing.experts[position, 0]))}" '
        f'title="{_choices(routing, position)}">{escape(token).replace(chr(10), "↵") or "·"}</span>'
        for position, (token, is_image) in enumerate(zip(trace.tokens, trace.is_image, strict=True))
        if not is_image
    )
    return f'<p class="mv-words">{words}</p>'


__all__ = ["routing_html"]
