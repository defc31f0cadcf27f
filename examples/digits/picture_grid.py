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
RIGHT, WRONG, QUIET, LINE = "#1a7f37", "#cf222e", "#57606a", "#d0d7de"


def draw_grid(results: dict, folder: Path, file: Path, rows: int = 3) -> None:
    """Draws the first held-out pictures in their order, then a row of wrong answers.

    Args:
        results (`dict`): What `answer.py` has written.
        folder (`Path`): What the pictures' paths are relative to.
        file (`Path`): The PNG to write.
        rows (`int`): How many rows of pictures, before the row of wrong answers.
    """
    answers = results["answers"]
    wrong = [item for item in answers if item["answer"] != item["truth"]]
    figure = pyplot.figure(figsize=(10.8, 2.25 * (rows + 1) + 0.7), dpi=100, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[rows + 0.1, 1 + 0.1])
    _draw_title(
        upper,
        f"{len(answers) - len(wrong)} of {len(answers)} held-out scans read right ({results['accuracy']:.1%})",
        f"with a blank picture instead: {results['blank_accuracy']:.1%}; guessing: 10 %",
    )
    _draw_answers(upper, answers[: rows * COLUMNS], folder, rows)
    how_many = f"{COLUMNS} of the {len(wrong)}" if len(wrong) > COLUMNS else f"All {len(wrong)}"
    _draw_title(lower, f"{how_many} wrong answers" if wrong else "No wrong answers")
    _draw_answers(lower, wrong[:COLUMNS], folder, 1)
    figure.savefig(file)
    pyplot.close(figure)


def _draw_title(figure, title: str, remark: str = "") -> None:
    figure.suptitle(title, x=0.008, ha="left", size=14, weight="bold")
    if remark:
        figure.text(0.992, 0.985, remark, size=10.5, color=QUIET, ha="right", va="top")


def _draw_answers(figure, items: list[dict], folder: Path, rows: int) -> None:
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for place in axes.flat[len(items) :]:
        place.set_axis_off()
    for place, item in zip(axes.flat, items, strict=False):
        is_right = item["answer"] == item["truth"]
        with Image.open(folder / item["picture"]) as picture:
            place.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        place.set(xticks=[], yticks=[])
        for edge in place.spines.values():
            edge.set(color=LINE if is_right else WRONG, linewidth=1 if is_right else 2)
        place.set_title(item["question"], size=8.5, pad=4)
        below = {"ha": "center", "va": "top", "transform": place.transAxes}
        place.text(0.5, -0.03, item["answer"], size=11, weight="bold", color=RIGHT if is_right else WRONG, **below)
        place.text(0.5, -0.16, f"truth: {item['truth']}", size=8, color=QUIET, **below)
