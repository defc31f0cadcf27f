# SPDX-License-Identifier: Apache-2.0
"""Draws the demo's answers as one picture."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # draws into a file, with or without a screen

from matplotlib import pyplot

from ..checks.pictures import load_picture


COLUMNS = 6
RIGHT, WRONG, QUIET, LINE = "#1a7f37", "#cf222e", "#57606a", "#d0d7de"

# Inches.
SIDE, GAP, ABOVE, BELOW, TITLE, EDGE = 1.4, 0.4, 0.24, 0.46, 0.42, 0.22


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
    sheet = _Sheet(rows + bool(wrong), 2 if wrong else 1, folder)
    sheet.title(
        f"{len(answers) - len(wrong)} of {len(answers)} held-out scans read right ({results['accuracy']:.1%})",
        f"a blank picture instead: {results['blank_accuracy']:.1%}; guessing: 10%",
    )
    for row in range(rows):
        sheet.answers(answers[row * COLUMNS : (row + 1) * COLUMNS])
    if wrong:
        sheet.title(f"{COLUMNS} of the {len(wrong)} wrong answers" if len(wrong) > COLUMNS else "The wrong answers")
        sheet.answers(wrong[:COLUMNS])
    sheet.figure.savefig(file)
    pyplot.close(sheet.figure)


class _Sheet:
    """A figure that is filled from the top, line by line."""

    def __init__(self, rows: int, titles: int, folder: Path):
        self.folder = folder
        self.width = 2 * EDGE + COLUMNS * SIDE + (COLUMNS - 1) * GAP
        self.height = self.left_over = 0.12 + titles * TITLE + rows * (ABOVE + SIDE + BELOW)
        self.figure = pyplot.figure(figsize=(self.width, self.height), dpi=100)

    def title(self, text: str, remark: str = "") -> None:
        self.left_over -= TITLE
        y = (self.left_over + 0.12) / self.height
        self.figure.text(EDGE / self.width, y, text, size=14, weight="bold")
        self.figure.text(1 - EDGE / self.width, y, remark, size=11, color=QUIET, ha="right")

    def answers(self, items: list[dict]) -> None:
        self.left_over -= ABOVE + SIDE
        for column, item in enumerate(items):
            left = EDGE + column * (SIDE + GAP)
            place = self.figure.add_axes(
                (left / self.width, self.left_over / self.height, SIDE / self.width, SIDE / self.height)
            )
            self._draw(place, item)
        self.left_over -= BELOW

    def _draw(self, place, item: dict) -> None:
        is_right = item["answer"] == item["truth"]
        picture = load_picture(self.folder / item["picture"])
        place.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        place.set(xticks=[], yticks=[])
        for edge in place.spines.values():
            edge.set(color=LINE if is_right else WRONG, linewidth=1 if is_right else 2)
        below = {"ha": "center", "va": "top", "transform": place.transAxes}
        place.text(0.5, 1.04, item["question"], size=8.5, ha="center", transform=place.transAxes)
        place.text(0.5, -0.04, item["answer"], size=11, weight="bold", color=RIGHT if is_right else WRONG, **below)
        place.text(0.5, -0.185, f"truth: {item['truth']}", size=8, color=QUIET, **below)
