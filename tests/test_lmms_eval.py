# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in lmms-eval, where that is installed: a task of our own, run by its evaluator."""

import json

import pytest
from parts import picture

from moellava import evaluate, load_pretrained_model


pytest.importorskip("lmms_eval", reason="lmms-eval is no extra: it brings about seventy packages")

TASK = """
task: own_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/rows.json
test_split: test
output_type: generate_until
doc_to_visual: !function own_task.doc_to_visual
doc_to_text: !function own_task.doc_to_text
doc_to_target: answer
process_results: !function own_task.process_results
generation_kwargs:
  max_new_tokens: 4
  temperature: {temperature}
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"])]


def doc_to_text(doc):
    return doc["question"]


def process_results(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    ).model
    model.save_pretrained(folder)
    return folder


def run(folder, checkpoint, rows, temperature=0):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "own_task.py").write_text(FUNCTIONS, encoding="utf-8")
    (folder / "own_task.yaml").write_text(TASK.format(folder=folder, temperature=temperature), encoding="utf-8")
    return simple_evaluate(
        model="moellava", model_args=f"pretrained={checkpoint}", device="cpu", batch_size=2, tasks=["own_task"],
        task_manager=TaskManager(include_path=str(folder)), log_samples=True, bootstrap_iters=0,
    )  # fmt: skip


def test_answers_are_those_of_evaluate(checkpoint, tmp_path):
    rows = []
    for number, question in enumerate(("Which organ?", "Is there a lesion in this picture?", "Where?")):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append(
            {"image": str(tmp_path / f"{number}.png"), "question": question, "answer": "?", "answer_type": "OPEN"}
        )
    rows[0]["answer"] = "the lung"
    report = evaluate(checkpoint, [row | {"answer": "the lung"} for row in rows], max_new_tokens=4, device="cpu")
    rows[1]["answer"] = report.answers[1].answer
    found = run(tmp_path, checkpoint, rows)
    assert [sample["filtered_resps"][0] for sample in found["samples"]["own_task"]] == [
        answer.answer for answer in report.answers
    ]
    assert found["results"]["own_task"]["exact,none"] == pytest.approx(1 / 3)


def test_tasks_that_sample_are_refused(checkpoint, tmp_path):
    picture(0).save(tmp_path / "0.png")
    row = {"image": str(tmp_path / "0.png"), "question": "Which organ?", "answer": "the lung"}
    with pytest.raises(ValueError, match="own_task asks for .*; answers are the most probable ones here"):
        run(tmp_path, checkpoint, [row], temperature=0.7)
