# SPDX-License-Identifier: Apache-2.0
"""The data of the demo: scans of handwritten digits, each with a question and its answer in words.

The scans ship with scikit-learn: 1797 digits that 43 people wrote, as 8x8 counts of inked dots from 0 to 16 (Alpaydin
and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository).
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


IMAGE_SIZE = 32  # pixels, four for each dot of a scan
HELD_OUT = 400

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The form of the answer depends on the question, so that only a model that reads both gets it right.
PHRASINGS = {
    "What digit is this?": "It is {a} {digit}.",
    "What is written here?": "It is {a} {digit}.",
    "Which number do you see?": "I see {a} {digit}.",
    "What do you see?": "I see {a} {digit}.",
    "Name the digit.": "{digit}",
    "Read the number.": "{digit}",
}


@dataclass(frozen=True)
class Example:
    """A scan (8, 8), its digit, a question about it, and the answer."""

    number: int
    scan: np.ndarray
    digit: int
    question: str

    @property
    def word(self) -> str:
        return WORDS[self.digit]

    @property
    def answer(self) -> str:
        return answer_to(self.question, self.digit)


def answer_to(question: str, digit: int) -> str:
    """Returns the right answer, in the form that the question asks for."""
    word = WORDS[digit]
    return PHRASINGS[question].format(a="an" if word == "eight" else "a", digit=word)


def load_examples(held_out: int = HELD_OUT) -> tuple[list[Example], list[Example]]:
    """Returns the examples to learn from and those held out; every scan is in one of the two, always the same one.

    Questions are dealt out in turn; in training, every epoch asks about a scan in another way.
    """
    digits = load_digits()
    questions = list(PHRASINGS)
    numbers = train_test_split(
        np.arange(len(digits.target)), test_size=held_out, stratify=digits.target, random_state=0
    )
    train, asked = (
        [
            Example(int(number), digits.images[number], int(digits.target[number]), questions[turn % len(questions)])
            for turn, number in enumerate(chosen)
        ]
        for chosen in numbers
    )
    return train, asked


def draw(scan: np.ndarray, wobble: random.Random | None = None) -> Image.Image:
    """Draws a scan as a picture, ink on white; with `wobble` turned, sheared, scaled and shifted a little."""
    paper = Image.fromarray((255 - scan * (255 / 16)).astype(np.uint8))
    angle, shear, scale, right, down = 0.0, 0.0, 1.0, 0.0, 0.0
    if wobble is not None:
        angle, shear = math.radians(wobble.uniform(-8, 8)), wobble.uniform(-0.1, 0.1)
        scale, right, down = wobble.uniform(0.93, 1.1), wobble.uniform(-1.4, 1.4), wobble.uniform(-1.4, 1.4)
    # From the picture's pixels to the scan's dots, both seen from their centres.
    step = len(scan) / IMAGE_SIZE / scale
    across = (step * math.cos(angle), step * (math.sin(angle) + shear))
    along = (-step * math.sin(angle), step * math.cos(angle))
    x, y = IMAGE_SIZE / 2 + right, IMAGE_SIZE / 2 + down
    centre = len(scan) / 2
    picture = paper.transform(
        (IMAGE_SIZE, IMAGE_SIZE),
        Image.Transform.AFFINE,
        (*across, centre - across[0] * x - across[1] * y, *along, centre - along[0] * x - along[1] * y),
        resample=Image.Resampling.BICUBIC,
        fillcolor=255,
    )
    return picture.convert("RGB")


def blank_picture() -> Image.Image:
    """White paper: a picture of nothing."""
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
