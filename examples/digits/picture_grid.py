# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Draws the demo's answers as one picture."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # draws into a file, with or without a screen

from matplotlib import pyplot
from PIL import Image


COLUMNS = 6
RIGHT, WRONG, QUIET = "#1a7f37", "#cf222e", "#57606a"


def draw_grid(results: dict, folder: Path, file: Path, rows: int = 3) -> None:
    """Draws the first held-out pictures in their order, then a row of the wrong answers, each beside the truth.

    Args:
        results (`dict`): What `answer.py` has written.
        folder (`Path`): What the pictures' paths are relative to.
        file (`Path`): The PNG to write.
        rows (`int`): How many rows of pictures, before the row of wrong answers.
    """
    answers = results["answers"]
    wrong = [item for item in answers if item["answer"] != item["truth"]]
    shown = answers[: rows * COLUMNS]
    figure, axes = pyplot.subplots(
        rows + 1, COLUMNS, figsize=(10.8, 2.05 * (rows + 1) + 0.9), dpi=100, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.14, w_pad=0.04, rect=(0, 0, 1, 0.93))
    right = len(answers) - len(wrong)
    figure.text(
        0.012, 0.975, f"{right} of {len(answers)} held-out scans answered right", size=15, weight="bold", va="top"
    )
    figure.text(
        0.988, 0.972, f"{results['accuracy']:.1%} right; with a blank picture {results['blank_accuracy']:.1%}",
        size=11, color=QUIET, va="top", ha="right",
    )  # fmt: skip
    for place, item in zip(axes[:rows].flat, shown, strict=False):
        _draw_answer(place, item, folder)
    for place, item in zip(axes[rows], wrong, strict=False):
        _draw_answer(place, item, folder)
    for place in axes.flat:
        if not place.images:
            place.set_axis_off()
    figure.savefig(file)
    pyplot.close(figure)
    # A palette is enough for ink, paper and three colours of text, and takes a third of the space.
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def _draw_answer(place, item: dict, folder: Path) -> None:
    is_right = item["answer"] == item["truth"]
    color = RIGHT if is_right else WRONG
    with Image.open(folder / item["picture"]) as picture:
        place.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    place.set(xticks=[], yticks=[])
    for edge in place.spines.values():
        edge.set(color="#d0d7de" if is_right else WRONG, linewidth=1.0 if is_right else 2.0)
    place.set_title(item["question"], size=8.5, color=QUIET, pad=4)
    place.set_xlabel(item["answer"], size=11, color=color, weight="bold", labelpad=3)
    if not is_right:
        place.text(
            0.5, -0.235, f"truth: {item['truth']}", size=8.5, color=QUIET, ha="center", va="top",
            transform=place.transAxes,
        )  # fmt: skip
