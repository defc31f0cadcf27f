# SPDX-License-Identifier: Apache-2.0
"""`moellava.evaluating`: what it reads, scores against values computed by hand, batches, the report and its page."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import torch
from parts import picture
from PIL import Image

from moellava import evaluate, load_pretrained_model
from moellava.chatting.prompting import question_inputs
from moellava.evaluating import EvaluationReport, ScoredAnswer, score
from moellava.evaluating.choices import chosen, read_choices, stated_letter
from moellava.evaluating.questions import Question, Unusable, open_picture, read_questions
from moellava.evaluating.scoring import bootstrap, mean_scores, wilson, words


# ---------------------------------------------------------------------------------------------------------------------
# Words and scores
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The LEFT lung.", ["left", "lung"]),
        ("an X-ray/CT (axial)", ["x", "ray", "ct", "axial"]),
        ("Two of three", ["2", "of", "3"]),
        ("none", ["0"]),
        ("1,200 cells, 2.5 cm, 30%.", ["1200", "cells", "2.5", "cm", "30%"]),
        ("1,20", ["1", "20"]),
        ("it doesn't / it doesn\u2019t", ["it", "doesnt", "it", "doesnt"]),
        ("A", ["a"]),  # multiple choice, not an article
        ("A type A dissection, hepatitis A", ["type", "a", "dissection", "hepatitis", "a"]),  # names, not articles
        ("THERE IS A MASS of type-a", ["there", "is", "a", "mass", "of", "type", "a"]),
        ("THERE IS A MASS", ["there", "is", "mass"]),
        ("\uff23\uff34", ["ct"]),  # full-width letters
        ("右肺", ["右肺"]),
        ("... !", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("expected", "answer", "accuracy", "published"),
    [
        ("Yes", "Yes, the heart is enlarged.", 1, 1),
        ("No", "There is no fracture.", 1, 1),
        ("no", "Yes, there is not one but two nodules.", 0, 1),  # the published count finds "no" in "not"
        ("yes", "I do not know.", 0, 0),
        ("yes", "", 0, 0),
        ("Left", "On the left side.", 1, 1),
        ("left lung", "lung on the left", 0, 0),
        ("MRI", "An MRI-scan", 1, 1),
        ("right", "brightness", 0, 1),
        ("B", "B. pleural effusion", 1, 1),
        ("B", "(b)", 1, 1),
        ("B", "Both of them", 0, 1),
        ("(A)", "A", 1, 0),
        ("A", "The answer", 0, 1),
    ],
)
def test_scores_of_closed_questions(expected, answer, accuracy, published):
    assert score(expected, answer, "closed") == {"accuracy": accuracy, "published_accuracy": published}


STATED = {
    "B": (
        "B", "b", "B.", "(b)", "[B]", "\"B\"", "**B**", "__B__", "$\\boxed{B}$", "\\boxed{\\text{B}}",
        "<answer>B</answer>", "\uff22", "B. pleural effusion", "B) left", "b) left", "(B) A mass", "B: left",
        "B:left", "B.left", "B, since it is", "B - left", "B\nIt is left.", "B because it is", "B is correct.",
        "B) T wave", "The answer is B.", "the answer is (b).", "The correct answer is option B",
        "The answer would most likely be B", "Answer: **B) left**", "My answer: B", "Option B", "option b",
        "I would choose B", "I'd go with (B) here", "I think it is B", "It's B.", "It is B, not A",
        "B is the best answer", "Option A is wrong. The answer is B.", "The lungs are clear. B",
        "The lungs are clear.\nB", "\u7b54\u6848\u662fB\u3002", "\u9009B", "\u7b54\u6848\uff1a\uff22",
        "La respuesta es B", "Ans: B", "I'd say B.", "The answer is \u201cB\u201d.", "Answer - B",
        "B\u9009\u9879", "Die Antwort ist B.",
    ),
    "A": (
        "A", "a", "A.", "A) mass", "A: mass", "A - mass", "The answer is A.", "The answer is A, because",
        "A is correct.", "Option A",
    ),
    "I": (
        "I", "I.", "The answer is I.",
    ),
    "C": (
        "I think it is C", "I believe the answer is C",
    ),
    "\u0411": (
        "\u0411", "\u0411) \u043b\u0435\u0432\u043e\u0435", "\u041e\u0442\u0432\u0435\u0442: \u0411",
    ),
}  # fmt: skip
NOT_STATED = {
    "A": (
        "A large mass", "A mass.", "a mass", "It is a large mass.", "The answer is a large mass.", "There is a mass",
        "A or B", "Not A", "An A-scan", "The answer is B. A mass is seen.",
    ),
    "B": (
        "Both", "The answer is not B", "A or B", "A and B", "B/C", "B or C", "B and C", "hepatitis B", "None of B",
        "", "?",
    ),
    "C": (
        "C-section", "Vitamin C is low", "CT",
    ),
    "E": (
        "e.g. a mass",
    ),
    "I": (
        "I think it is C", "I am not sure", "I'm not sure", "I, as a model, cannot say", "I do not know.",
    ),
    "S": (
        "finding(s)", "It's left",
    ),
    "X": (
        "X-ray",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("letter", "answer", "accuracy"),
    [(letter, answer, 1) for letter, answers in STATED.items() for answer in answers]
    + [(letter, answer, 0) for letter, answers in NOT_STATED.items() for answer in answers],
)
def test_letters_that_an_answer_states(letter, answer, accuracy):
    for expected in (letter, letter.lower(), f"({letter.lower()})", f"{letter})", f"**{letter}**"):
        assert score(expected, answer, "closed")["accuracy"] == accuracy
    if not accuracy:
        assert stated_letter(answer) != letter


def test_several_letters():
    said = {"A, C": 1, "A and C": 1, "(C), (A).": 1, "A": 0, "C": 0, "A, B, C": 0, "A, C and D": 0, "A cat": 0, "": 0}
    for expected in ("A, C", "A and C", "(A) (C)", "A/C"):
        assert {answer: score(expected, answer, "closed")["accuracy"] for answer in said} == said


def test_a_true_answer_of_a_letter_and_a_text():
    said = {"B": 1, "B. left lung": 1, "The left lung": 1, "C. left lung": 0, "C": 0, "the right lung": 0}
    assert {answer: score("B. left lung", answer, "closed")["accuracy"] for answer in said} == said


@pytest.mark.parametrize(
    ("expected", "answer", "accuracy"),
    [
        ("\u662f", "\u662f", 1),  # yes
        ("\u662f", "\u662f\u7684\uff0c\u6709\u79ef\u6db2\u3002", 1),
        ("\u662f", "\u4e0d\u662f", 0),  # not so
        ("\u5426", "\u5426", 1),
        ("\u6709", "\u6709\u3002", 1),  # there is
        ("\u6709", "\u6ca1\u6709\u3002", 0),  # there is not
        ("\u6ca1\u6709", "\u6ca1\u6709\u3002", 1),
        ("\u5de6", "\u5728\u5de6\u4fa7\u80ba", 1),  # left
        ("\u5de6", "\u53f3\u4fa7", 0),
        ("\u5de6\u80ba", "\u75c5\u7076\u5728\u5de6\u80ba\u3002", 1),
        ("\u306f\u3044", "\u3044\u3044\u3048", 0),  # Japanese: yes, no
        ("\uc608", "\uc608, \uc788\uc2b5\ub2c8\ub2e4", 1),  # Korean
        ("\u0646\u0639\u0645", "\u0646\u0639\u0645.", 1),  # Arabic
        ("\u0434\u0430", "\u0414\u0430, \u0435\u0441\u0442\u044c", 1),  # Russian
        ("2", "two lesions", 1),
        ("2", "12", 0),
    ],
)
def test_closed_answers_of_other_scripts(expected, answer, accuracy):
    assert score(expected, answer, "closed")["accuracy"] == accuracy


CHOICES = [
    ["left", "right"],
    ("left", "right"),
    {"A": "left", "B": "right"},
    {"a": "left", "b": "right", "C": None},  # as a dataset fills its columns
    ["A. left", "B. right"],
    ["(A) left", "(B) right"],
    {"A": "A: left", "B": "B: right"},
    {"label": ["A", "B"], "text": ["left", "right"]},
    [{"label": "A", "text": "left"}, {"label": "B", "text": "right"}],
    "['left', 'right']",
    '["left", "right"]',
]


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize(
    "answer", [1, "1", 1.0, "B", "b", "(b)", "B)", "B.", "**B**", "right", "Right.", "B. right", "(b) right"]
)
def test_choices(name, choices, answer):
    row = {"image": None, "question": "Which side?", name: choices, "answer": answer}
    (question,) = read_questions([row]).questions
    assert question.kind == "closed" and list(question.choices.values()) == ["left", "right"]
    if answer in (1, "1"):
        assert question.expected == "right"
    said = {"B": 1, "b)": 1, "right": 1, "On the right side.": 1, "The answer is B.": 1, "B. right": 1, "Option (b)": 1,
            "A": 0, "left": 0, "left or right": 0, "A or B": 0, "1": 0, "": 0, "neither": 0}  # fmt: skip
    assert {answer: ScoredAnswer(question, answer, False).scores["accuracy"] for answer in said} == said


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("A large mass", "B"),  # and not A
        ("A large mass in the lung", "B"),
        ("The answer is a large mass.", "B"),
        ("A small cyst is seen", "A"),
        ("A", "A"),
        ("E. coli", "C"),
        ("a small cyst, not a large mass", "A"),
        ("D", None),
        ("I cannot say", None),
    ],
)
def test_the_choice_that_an_answer_names(answer, label):
    assert chosen(answer, {"A": "small cyst", "B": "a large mass", "C": "E. coli"}) == label


def test_choices_within_each_other_and_yes_or_no():
    lungs = {"A": "lung", "B": "left lung", "C": "left upper lung"}
    assert [chosen(answer, lungs) for answer in ("the lung", "the left lung", "the left upper lung")] == ["A", "B", "C"]
    assert [chosen(answer, {"A": "Yes", "B": "No"}) for answer in ("No, yes is wrong", "yes", "A", "perhaps")] == [
        "B", "A", "A", None
    ]  # fmt: skip
    assert chosen("4", {"1": "4", "4": "1"}) == "1"  # the text before the letter
    assert chosen("-", {"A": "+", "B": "-"}) == "B"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"choices": ["left", "right"], "answer": 2}, "has the answer 2; expected an index from 0 to 1"),
        ({"choices": ["left", "right"], "answer": -1}, "has the answer -1; expected an index from 0 to 1"),
        (
            {"choices": ["left", "right"], "answer": "both"},
            "has the answer 'both', which is none of its choices (A: left",
        ),
        ({"choices": ["left", "right"], "answer": "C"}, "has the answer 'C', which is none of its choices"),
        ({"choices": [1, 2, 3], "answer": 2}, "has the answer 2, one of its choices and the index of another"),
        ({"choices": ["B", "A"], "answer": "A"}, "the text of one of its choices and the letter of another"),
        ({"choices": ["left", "Left."], "answer": 0}, "has the same twice among its choices"),
        ({"options": ["left", ""], "answer": 0}, "has '' among its options; expected texts"),
        (
            {"choices": "left, right", "answer": 0},
            "has a str as its choices; expected a list of texts, or texts by letter",
        ),
        ({"choices": ["left", "right"], "answer": True}, "has the answer 'True', which is none of its choices"),
    ],
)
def test_choices_that_cannot_be_used(fields, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_questions([{"image": None, "question": "Which side?"} | fields])


def test_an_expected_answer_that_is_none_of_the_choices():
    with pytest.raises(ValueError, match="The expected answer 'both' is none of the choices"):
        score("both", "left", "closed", {"A": "left", "B": "right"})


@pytest.mark.parametrize(
    ("expected", "answer", "exact_match", "f1", "recall", "published_recall"),
    [
        ("The left lung", "left lung.", 1, 1, 1, 1),
        ("left lung", "lung, left", 0, 1, 1, 1),
        # 2 of 4 words are right, and 2 of 3 are there: 2 * 2 / (4 + 3)
        ("left upper lobe", "in left lower lobe", 0, 4 / 7, 2 / 3, 2 / 3),
        # "lung" is said three times: one place of it is common, all three are hits
        ("left lung", "lung lung lung", 0, 2 / 5, 1 / 2, 3 / 4),
        ("two", "2", 1, 1, 1, 1),
        ("pneumonia", "", 0, 0, 0, 0),
        ("pneumonia", "effusion", 0, 0, 0, 0),
    ],
)
def test_scores_of_open_questions(expected, answer, exact_match, f1, recall, published_recall):
    assert score(expected, answer, "open") == pytest.approx(
        {"exact_match": exact_match, "f1": f1, "recall": recall, "published_recall": published_recall}
    )


def test_open_scores_against_another_formulation():
    """By taking words off a list, as one would with pencil and paper, on random answers."""
    generator = np.random.default_rng(0)
    vocabulary = ["left", "right", "lung", "the", "two", "3"]
    for _ in range(200):
        expected, answer = (" ".join(generator.choice(vocabulary, generator.integers(1, 7))) for _ in range(2))
        true, said = words(expected), words(answer)
        left, common = list(said), 0
        for word in true:
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / len(said), common / len(true)
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        # LLaVA-Med's: per word of either side, all places in the answer if it is expected, else in what it is in
        tp = sum(said.count(word) for word in {*true} & {*said})
        fn = sum(true.count(word) for word in {*true} - {*said})
        assert score(expected, answer, "open") == pytest.approx(
            {"exact_match": float(true == said), "f1": f1, "recall": recall, "published_recall": tp / (tp + fn)}
        )


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="kind of the question is 'yes/no'; expected 'closed' or 'open'"):
        score("yes", "yes", "yes/no")
    with pytest.raises(ValueError, match=re.escape("The expected answer '...' has no words")):
        score("...", "yes", "open")


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (8, 10), (7, 7), (250, 451)])
def test_wilson(hits, n):
    low, high = wilson([1.0] * hits + [0.0] * (n - hits))
    expected = scipy.stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= hits / n <= high <= 1


def test_bootstrap():
    values = np.random.default_rng(1).beta(0.5, 0.8, size=120)
    low, high = bootstrap(values)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.006)  # their widths are 0.12
    assert bootstrap(values) == (low, high)
    assert bootstrap([0.5] * 9) == (0.5, 0.5)


def test_means():
    scores = [("closed", score("yes", answer, "closed")) for answer in ("yes", "no", "yes", "yes")]
    scores += [("open", score("left lung", answer, "open")) for answer in ("left", "left lung")]
    metrics = mean_scores(scores)
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"accuracy": 0.75, "published_accuracy": 0.75, "exact_match": 0.5, "f1": (2 / 3 + 1) / 2, "recall": 0.75,
         "published_recall": 0.75}
    )  # fmt: skip
    assert Counter((metric.n, metric.kind, metric.interval) for metric in metrics.values()) == {
        (4, "closed", "Wilson"): 2, (2, "open", "Wilson"): 1, (2, "open", "bootstrap"): 3
    }  # fmt: skip
    assert mean_scores(scores[:4]).keys() == {"accuracy", "published_accuracy"}


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of small pictures: 1.png to 4.png, and one that is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(1, 5):
        picture(number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:90])
    return folder


def conversation(*texts: str, **fields) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def content(turn: dict) -> list:
    """A turn's content, with the names of the pictures."""
    return [part.get("text") or getattr(part["image"], "name", part["image"]) for part in turn["content"]]


@pytest.mark.parametrize(
    ("row", "kind", "name"),
    [
        # LLaVA's, and LLaVA-Med's with its misspelt field
        (conversation("<image>\nWhich organ?", "The lung", image="1.png", id="7"), "open", "7"),
        (conversation("Which organ?\n<image>", "The lung", image=["1.png"], answer_type="OPEN"), "open", None),
        ({"conversatons": conversation("Which organ?", "The lung")["conversations"], "image": "1.png"}, "open", None),
        # LLaVA-Med's question files
        ({"question_id": 3, "image": "1.png", "text": "Which organ?", "answer": "The lung"}, "open", "3"),
        # VQA-RAD as published, with a blank in its types; SLAKE; PathVQA's kinds
        ({"qid": 3, "image_name": "1.png", "question": "Which organ?", "answer": "The lung", "answer_type": "OPEN "},
         "open", "3"),
        ({"img_id": 1, "img_name": "1.png", "question": "Which organ?", "answer": "The lung", "q_lang": "en",
          "answer_type": "CLOSED", "qid": 12}, "closed", "12"),
        ({"image": "1.png", "question": "Which organ?", "answer": "The lung", "answer_type": "other"}, "open", None),
    ],
)  # fmt: skip
def test_rows(folder, row, kind, name):
    (question,) = read_questions([row], folder).questions
    assert (question.row, question.text, question.expected) == (1, "Which organ?", "The lung")
    assert (question.kind, question.id) == (kind, name)
    assert question.pictures == [folder / "1.png"]
    assert [(turn["role"], content(turn)) for turn in question.turns] == [("user", ["1.png", "Which organ?"])]


@pytest.mark.parametrize(
    ("answer", "kind"), [("Yes.", "closed"), ("no", "closed"), ("no fracture", "open"), ("left", "open"), (3, "open")]
)
def test_kind_of_an_answer_that_is_not_told(answer, kind):
    (question,) = read_questions([{"image": None, "question": "?", "answer": answer}]).questions
    assert (question.kind, question.expected) == (kind, str(answer))


def test_each_turn_of_a_conversation_has_the_true_ones_before_it(folder):
    turns = ["Before: <image> and after: <image>. What?", "A cyst", "And here?\n<image>", "Yes", "Sure?", "No"]
    row = conversation(*turns, image=["1.png", "2.png", "3.png"])
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    first, second, third = read_questions([row], folder).questions
    assert content(first.turns[-1]) == ["Before: ", "1.png", " and after: ", "2.png", ". What?"]
    assert [len(question.pictures) for question in (first, second, third)] == [2, 3, 3]
    assert [turn["role"] for turn in third.turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [content(turn) for turn in third.turns[-4:]] == [["A cyst"], ["3.png", "And here?"], ["Yes"], ["Sure?"]]
    assert third.turns[:4] == second.turns and second.turns[:2] == first.turns
    assert [question.kind for question in (first, second, third)] == ["open", "closed", "closed"]


GOOD = {"image": "1.png", "question": "Which organ?", "answer": "The lung"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "is a str; expected an object with a question, an answer and a picture"),
        ({"image": "1.png"}, "has no question: expected 'question' or 'text', found image"),
        ({"image": "1.png", "text": "?"}, "has no true answer: expected 'answer', found image, text"),
        ({"question": "?", "answer": "no"}, "has no picture: expected 'image' or 'image_name' or 'img_name', null"),
        (GOOD | {"answer": " "}, "has no true answer: it is empty"),
        (GOOD | {"answer": None}, "has no true answer, but None"),
        (GOOD | {"answer": "?!"}, "has the true answer '?!', which has no words to compare with"),
        (GOOD | {"question": "<image>"}, "has no text in the question"),
        (GOOD | {"question": "<image> or <image>?"}, "has 2 <image> for 1 picture(s); expected one for each, or none"),
        (GOOD | {"image": "9.png"}, "9.png, and there is no such file"),
        (GOOD | {"image": "iVBORw0KGgo" * 500}, "and there is no such file"),  # more than a name may have
        (GOOD | {"image": 3}, "has a int as 'image'; expected a picture's name"),
        (GOOD | {"image": {"path": "1.png"}}, "has a dictionary without bytes as 'image'; expected a picture's name"),
        (GOOD | {"question": "Cut \ud83d"}, "has a question that is no text in Unicode: 'Cut \\ud83d'"),
        (GOOD | {"answer_type": "MAYBE"}, "has the answer_type 'MAYBE'; expected OPEN or CLOSED"),
        ({"conversations": []}, "has neither conversations nor messages, but conversations"),
        (conversation("Which?"), "ends without an answer"),
        ({"conversations": [{"from": "alien", "value": "?"}]}, "message 0 is of 'alien'; expected one of human"),
        ({"conversations": [{"from": ["human"], "value": "?"}]}, "message 0 is of ['human']; expected one of human"),
        ({"conversations": [{"from": "human"}]}, "turn 0 has no 'from' and 'value'"),
        (conversation("<image> and <image>?", "No", image="1.png"), "has 2 <image> placeholder(s) and 1 picture(s)"),
        (conversation("Which?", "This <image>", image="1.png"), "turn 1, an answer, has a picture"),
    ],
)
def test_rows_that_cannot_be_used_are_named(folder, row, reason):
    found = read_questions([GOOD, row], folder)
    assert (found.num_rows, len(found.questions)) == (2, 1)
    assert [fault.row for fault in found.unusable] == [2]
    assert reason in found.unusable[0].reason
    with pytest.raises(ValueError, match=re.escape("No row of rows can be evaluated (1 read): row 1 ")) as caught:
        read_questions([row], folder)
    assert reason in str(caught.value)


def test_files(folder, tmp_path):
    rows = [GOOD, GOOD | {"answer": "Line\u2028break"}]
    (folder / "rad.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rad.jsonl").write_text(f"{lines}\n\n", encoding="utf-8")
    beside = read_questions(folder / "rad.json")
    apart = read_questions(str(tmp_path / "rad.jsonl"), image_folder=str(folder))
    assert beside == apart
    assert (beside.name, len(beside.questions)) == ("rad", 2)
    assert len(read_questions(folder / "rad.json", limit=1).questions) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.csv", "a,b", "ends in '.csv'; expected a .json file with a list of rows, or a .jsonl file"),
        ("rows.json", "[{", "is no valid JSON"),
        ("rows.json", "{}", "holds a JSON object; expected a list of rows"),
        ("rows.json", "[]", "No row of rows can be evaluated (0 read): it is empty."),
        ("rows.jsonl", "{}\n{", "Line 2 of "),
        ("rows.json", b"\xff\xfe", "is no text in UTF-8"),
    ],
)
def test_files_that_are_none(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        read_questions(tmp_path / name)


def test_data_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*gone.json. Expected a .json or .jsonl file"):
        read_questions(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="There is no folder gone for the pictures"):
        read_questions([GOOD], image_folder="gone")
    with pytest.raises(TypeError, match="data is of type dict; expected the path of a .json or .jsonl file, or rows"):
        read_questions(GOOD)
    with pytest.raises(ValueError, match="limit is 0; expected how many rows to evaluate, at least 1"):
        read_questions([GOOD], limit=0)


def test_pictures_of_datasets(folder):
    """A column of pictures, decoded and as bytes."""
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra `train`")
    rows = datasets.Dataset.from_list([GOOD | {"image": str(folder / "1.png")}]).cast_column("image", datasets.Image())
    for column in (rows, rows.cast_column("image", datasets.Image(decode=False))):
        if column is not rows:  # as on the Hub, where the bytes are in the file
            column = [row | {"image": {"bytes": (folder / "1.png").read_bytes(), "path": None}} for row in column]
        (question,) = read_questions(column).questions
        assert open_picture(question.pictures[0]).tobytes() == picture(1).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# A model, asked
# ---------------------------------------------------------------------------------------------------------------------

TOKENS = 5
QUESTIONS = ("Which organ?", "Is there a lesion in this picture of the chest?", "Where?", "How many birds are there?")


@pytest.fixture(scope="module")
def loaded(parts):
    torch.manual_seed(0)  # of the new projector, on which it depends whether the model says anything
    return load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    )


@pytest.fixture(scope="module")
def said(loaded, folder):
    """What the model says to each question about each picture, asked one by one without this package's batches."""
    said = {}
    for number, question in enumerate(QUESTIONS, start=1):
        inputs = question_inputs(loaded.model, [picture(number)], question)
        output = loaded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
        said[question] = loaded.tokenizer.decode(output, skip_special_tokens=True).strip()
    assert all(words(answer) for answer in said.values()), "an untrained model happened to say nothing"
    return said


@pytest.fixture(scope="module")
def rows(said):
    """Questions of known outcome: what the model says is the true answer to all but the third."""
    rows = [
        {"image": f"{number}.png", "question": question, "answer": said[question], "answer_type": "OPEN"}
        for number, question in enumerate(QUESTIONS, start=1)
    ]
    rows[1]["answer_type"] = "CLOSED"
    rows[2]["answer"] = "pancreas <script>alert(1)</script>"
    return rows


@pytest.fixture(scope="module")
def report(loaded, folder, rows):
    more = [
        rows[0] | {"image": "broken.png"},
        rows[0] | {"question": "Which organ is it? " * 500},
        {"question": "Which?", "answer": "This"},
    ]
    return evaluate(loaded, [*rows, *more], image_folder=folder, batch_size=3, max_new_tokens=TOKENS)


def test_answers_in_batches_are_those_of_one_by_one(report, said):
    assert [answer.answer for answer in report.answers] == list(said.values())
    assert [answer.question.row for answer in report.answers] == [1, 2, 3, 4]  # not the order of lengths


def test_metrics(report):
    values = {name: (metric.value, metric.n) for name, metric in report.metrics.items()}
    assert values["accuracy"] == (1, 1)
    assert values["exact_match"] == (pytest.approx(2 / 3), 3)
    assert values["recall"] == (pytest.approx(2 / 3), 3)
    assert [answer.is_right for answer in report.answers] == [True, True, False, True]
    assert [answer.question.row for answer in report.wrong] == [3]


def test_rows_that_show_only_later_that_they_cannot_be_used(report, caplog, loaded, folder, rows):
    assert (report.num_rows, [fault.row for fault in report.unusable]) == (7, [5, 6, 7])
    broken, long, missing = (fault.reason for fault in report.unusable)
    assert re.match(r"has a picture that cannot be used: The picture \('.*broken.png'\) cannot be decoded", broken)
    length = re.match(r"has a prompt of (\d+) tokens, which with 5 for the answer is more than the 2048 that", long)
    assert int(length[1]) > 2043
    assert missing.startswith("has no picture")
    with pytest.raises(
        ValueError, match=r"No row of rows can be evaluated \(1 read\): row 1 has a picture that cannot"
    ):
        evaluate(loaded, [rows[0] | {"image": "broken.png"}], image_folder=folder)
    assert "1 of 1 rows of rows could not be evaluated and are left out" in caplog.text


def test_prompts_are_counted_with_their_pictures(loaded, folder):
    """The longest prompt that is let through takes, with the answer, exactly what the model has."""
    row = {"image": ["1.png", "2.png"], "question": "Which organ?", "answer": "The lung"}
    (question,) = read_questions([row], folder).questions
    tokens = question_inputs(loaded.model, question.pictures, question.text)["input_ids"].shape[1]
    narrow = loaded._replace(context_len=tokens + 2)
    assert len(evaluate(narrow, [row], image_folder=folder, max_new_tokens=2).answers) == 1
    with pytest.raises(ValueError, match=f"a prompt of {tokens} tokens, which with 3 for the answer is more than the"):
        evaluate(narrow, [row], image_folder=folder, max_new_tokens=3)


def test_a_later_turn_is_asked_after_the_true_answers(loaded, folder, said):
    row = conversation(f"<image>\n{QUESTIONS[0]}", "The pancreas", "Sure?", "Yes", image="1.png")
    first, second = evaluate(loaded, [row], image_folder=folder, max_new_tokens=TOKENS).answers
    assert first.answer == said[QUESTIONS[0]]  # and not what the next question is asked after
    history = [
        {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The pancreas"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    inputs = loaded.model.processor.apply_chat_template(
        history, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = loaded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert second.answer == loaded.tokenizer.decode(output, skip_special_tokens=True).strip()


def test_answers_that_end_are_not_cut_off(report, loaded, folder, rows):
    """With the first token that the model says made its end of text, that answer ends at once, and is empty."""
    assert report.num_cut_off == 4
    inputs = question_inputs(loaded.model, [picture(1)], QUESTIONS[0])
    first = loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    ends = loaded.model.generation_config.eos_token_id
    loaded.model.generation_config.eos_token_id = [ends, first]
    try:
        ended = evaluate(loaded, rows[:1], image_folder=folder, max_new_tokens=TOKENS)
    finally:
        loaded.model.generation_config.eos_token_id = ends
    assert (ended.num_cut_off, len(ended.answers)) == (0, 1)


def test_a_checkpoint_by_name(loaded, folder, rows, report, tmp_path):
    loaded.model.save_pretrained(tmp_path / "model")
    (tmp_path / "rad.json").write_text(json.dumps(rows), encoding="utf-8")
    again = evaluate(
        tmp_path / "model", tmp_path / "rad.json", image_folder=folder, max_new_tokens=TOKENS, limit=3, device="cpu",
        dtype="float32",
    )  # fmt: skip
    assert [answer.answer for answer in again.answers] == [answer.answer for answer in report.answers[:3]]
    assert (again.checkpoint, again.dataset, again.num_rows) == (str(tmp_path / "model"), "rad", 3)
    assert again.settings == {"max_new_tokens": TOKENS, "batch_size": 8, "dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize(("per_row", "over"), [(True, "row"), (False, "batch")])
def test_a_limited_capacity_is_reported(parts, folder, rows, tmp_path, per_row, over):
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "layers": [1], "eval_capacity_factor": 1.5}
    tower, language = parts.vision_tower("clip"), parts.language_model("llama")
    moe["eval_capacity_per_row"] = per_row
    sparse = load_pretrained_model(language, mm_vision_tower=tower, moe_config=moe, device="cpu")
    made = evaluate(sparse, rows[:1], image_folder=folder, max_new_tokens=2)
    assert made.to_dict()["settings"]["eval_capacity_factor"] == 1.5
    assert made.settings["eval_capacity_over"] == over
    assert f"(eval_capacity_factor 1.5), counted per {over}" in " ".join(made.lines())
    assert f"eval_capacity_over {over}" in made.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("answers depend on the batch size" in " ".join(made.lines())) is not per_row


def test_what_cannot_be_evaluated(parts, loaded, rows, folder):
    with pytest.raises(ValueError, match="batch_size is 0; expected a number of at least 1"):
        evaluate(loaded, rows, image_folder=folder, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected a number of at least 1"):
        evaluate(loaded, rows, image_folder=folder, max_new_tokens=0)
    with pytest.raises(TypeError, match="loaded already, and device, load_4bit would have to be known before"):
        evaluate(loaded, rows, image_folder=folder, device="cpu", load_4bit=True)
    with pytest.raises(ValueError, match="is a model of type 'llama', not a checkpoint of this package, so that it"):
        evaluate(parts.language_model("llama"), rows, image_folder=folder)
    with pytest.raises(FileNotFoundError, match="does not exist: expected a folder with a model"):
        evaluate("./no-such-model", rows, image_folder=folder)
    with pytest.raises(ValueError, match="Unknown field 'load_4bits' in the arguments"):
        evaluate("./no-such-model", rows, load_4bits=True)


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def test_report_as_plain_values(report, folder, said):
    told = json.loads(json.dumps(report.to_dict()))
    assert told["metrics"]["exact_match"] | {"low": 0, "high": 0} == {
        "value": 0.6667, "low": 0, "high": 0, "n": 3, "kind": "open", "interval": "Wilson"
    }  # fmt: skip
    assert (told["num_rows"], told["num_questions"], told["num_cut_off"]) == (7, 4, 4)
    assert [fault["row"] for fault in told["unusable"]] == [5, 6, 7]
    assert told["rows"][0] == {
        "row": 1, "id": None, "question": QUESTIONS[0], "pictures": ["1.png"],
        "expected": said[QUESTIONS[0]], "answer": said[QUESTIONS[0]], "kind": "open", "cut_off": True,
        "scores": {"exact_match": 1, "f1": 1, "recall": 1, "published_recall": 1},
    }  # fmt: skip


def test_report_for_a_card(report):
    entries = report.for_card()
    assert [(entry["metric"], entry["value"], entry["n"]) for entry in entries] == [
        ("Accuracy", 1, 1), ("Exact match", 0.6667, 3), ("Token F1", 0.6667, 3), ("Token recall", 0.6667, 3)
    ]  # fmt: skip
    assert all(entry["dataset"] == "rows" and entry["low"] <= entry["value"] <= entry["high"] for entry in entries)


def test_report_as_text(report):
    lines = report.lines()
    assert re.fullmatch(r"Exact match +66.7 %  \(\d+\.\d to \d+\.\d; 3 open\)", lines[2])
    assert "4 of 4 answers were cut off after 5 tokens." in lines
    assert "3 of 7 rows could not be evaluated:" in lines
    assert lines[-1].startswith("  row 7 has no picture")


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='{{ 7 * 7 }}\ud800\u202e&amp;"


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory):
    """The page of answers, names and reasons that would be HTML."""
    name = folder / '"><script>alert(3)<.png'.replace("/", "")
    picture(5, (400, 250)).save(name)
    gone = folder / "gone.png"
    question = Question(1, HOSTILE, HOSTILE, "open", [name, picture(2), gone], [], None)
    right = Question(2, "Right?", "yes", "closed", [], [], None)
    answers = [ScoredAnswer(question, HOSTILE + " more", True), ScoredAnswer(right, "yes", False)]
    made = EvaluationReport(HOSTILE, HOSTILE, answers, [Unusable(3, HOSTILE)], 3, {"device": HOSTILE}, 1.0)
    path = made.save_html(tmp_path_factory.mktemp("page") / "wrong.html")
    return Page(path.read_text(encoding="utf-8"))


def test_page_holds_nothing_that_runs_or_loads(hostile):
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th",
             "td", "img", "span"}  # fmt: skip
    assert {tag for tag, _ in hostile.elements} <= known
    names = {name for _, attributes in hostile.elements for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "src", "alt", "title", "dir"}
    assert all(
        attributes["src"].startswith("data:image/jpeg;base64,") for tag, attributes in hostile.elements if tag == "img"
    )
    (policy,) = (attributes for _, attributes in hostile.elements if "http-equiv" in attributes)
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_page_shows_what_was_said(hostile):
    shown = HOSTILE.replace("\ud800", "?")
    assert hostile.texts.count(shown) >= 3  # question, expected, reason
    assert f"{shown} more …" in hostile.texts
    assert "Wrong answers: 1" in hostile.texts
    assert "Right?" not in hostile.texts
    assert "gone.png is gone" in "".join(hostile.texts)


def test_page_has_small_copies_of_the_pictures(hostile):
    images = [attributes for tag, attributes in hostile.elements if tag == "img"]
    assert len(images) == 2
    sizes = [Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size for image in images]
    assert sizes == [(160, 100), (48, 36)]
    assert images[0]["alt"].endswith('"><script>alert(3)<.png')


def test_page_of_many_wrong_answers(tmp_path):
    answers = [
        ScoredAnswer(Question(row, f"Question {row}?", "yes", "closed", [], []), "no", False) for row in (1, 2, 3)
    ]
    made = EvaluationReport("model", "set", answers, [], 3, {}, 1.0)
    page = Page(made.save_html(tmp_path / "wrong.html", limit=2).read_text(encoding="utf-8"))
    assert "The first 2 are shown." in page.texts
    assert {"Wrong answers: 3", "Question 1?", "Question 2?"} <= set(page.texts)
    assert "Question 3?" not in page.texts


def test_more_rows_that_cannot_be_used_than_lines(report):
    many = [Unusable(row, "is empty") for row in range(1, 26)]
    lines = EvaluationReport("model", "set", report.answers, many, 30, report.settings, 1.0).lines()
    assert lines[-2:] == ["  row 20 is empty.", "  and 5 more."]


# ---------------------------------------------------------------------------------------------------------------------
# Answers as models give them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "answer", "accuracy"),
    [
        ("type A", "Type B.", 0.0),
        ("type A", "A type A dissection", 1.0),
        ("hepatitis A", "hepatitis", 0.0),
        ("left", "not on the left", 1.0),  # a denial stands before what it denies
        ("left", "It is not left.", 0.0),
        ("true", "This is not true.", 0.0),
        ("pneumonia", "There is no pneumonia.", 0.0),
        ("pneumonia", "No effusion, but pneumonia", 1.0),
        ("肺炎", "肺炎です", 1.0),
        ("肺炎", "肺炎が見られます", 1.0),
        ("肺炎", "肺炎ではない", 0.0),
        ("肺炎", "肺炎はありません", 0.0),
        ("ใช่", "ไม่ใช่", 0.0),
        ("B", "So B.", 1.0),
        ("B", "Therefore, B", 1.0),
        ("B", "The lungs are clear. Hence B.", 1.0),
        ("A", "So a mass", 0.0),
        ("B", "정답은 B입니다", 1.0),
        ("B", "La respuesta correcta es la B", 1.0),
        ("Б", "Вариант Б", 1.0),
    ],
)
def test_closed_answers_in_sentences(expected, answer, accuracy):
    assert score(expected, answer, "closed")["accuracy"] == accuracy


@pytest.mark.parametrize(
    ("choices", "answer", "label"),
    [
        (["Vitamin A", "Vitamin B"], "Vitamin", None),
        (["Vitamin A", "Vitamin B"], "It is vitamin A.", "A"),
        (["normal", "pneumonia"], "Not pneumonia", None),
        (["benign", "malignant"], "It is not malignant but benign.", "A"),
        (["normal", "pneumonia"], "B is wrong", None),
        (["-1", "1"], "-1", "A"),
        (["-1", "1"], "1", "B"),
        (["<5", ">5"], "> 5", None),  # the same words
        (["a mass", "mass"], "mass", "B"),
        ([True, False], "false", "B"),
        ({"أ": "يمين", "ب": "يسار"}, "الجواب هو ب", "ب"),
        ({"А": "да", "Б": "нет"}, "Вариант Б", "Б"),
    ],
)
def test_choices_in_sentences(choices, answer, label):
    assert chosen(answer, read_choices({"choices": choices})) == label


def test_true_and_false_are_texts_of_choices():
    row = {"question": "Is it so?", "image": None, "answer": False}
    for choices in ([True, False], ["True", "False"]):
        (question,) = read_questions([row | {"choices": choices}]).questions
        assert question.expected == "False" and chosen("It is false.", question.choices) == "B"
    with pytest.raises(ValueError, match="has the answer 'False', which is none of its choices"):
        read_questions([row | {"choices": ["yes", "no"]}])
