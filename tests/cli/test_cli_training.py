# SPDX-License-Identifier: Apache-2.0
"""`moellava train`, `moellava data check` and `moellava evaluate`, on three questions about three pictures."""

import json
import shutil

import pytest
from commands import fails, run, run_process
from parts import picture

from moellava import inspect_checkpoint


pytest.importorskip("moellava.training", reason="training is not there")
pytest.importorskip("moellava.evaluating", reason="evaluating is not there")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with `train.json`, of which every row can be used, and `faulty.json`, of which one cannot."""
    folder = tmp_path_factory.mktemp("rows")
    content = []
    for index in range(3):
        picture(index).save(folder / f"{index}.png")
        talk = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]
        content.append({"id": f"row-{index}", "image": f"{index}.png", "conversations": talk})
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "faulty.json").write_text(json.dumps([*content, {**content[0], "id": "row-3", "image": "absent.png"}]))
    return folder


def test_check_data(checkpoint, rows):
    result = run("data", "check", rows / "train.json", "--model", checkpoint, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["rows"], told["usable"], told["pictures"], told["problems"]) == (3, 3, 3, [])
    assert told["longest"] > 16

    result = run("data", "check", rows / "faulty.json")
    assert result.exit_code == 1
    assert "3 of 4 rows can be used" in result.stdout
    assert "row-3" in result.stdout and "absent.png" in result.stdout
    assert "Error" not in result.stderr


def test_check_data_cut_within_characters(rows, tmp_path):
    (tmp_path / "cut.json").write_text(
        json.dumps([{"id": "\ud83d", "conversations": []}, {"id": "\ud83d", "messages": 3}])
    )
    result = run_process("data", "check", tmp_path / "cut.json", "--json")
    assert result.returncode == 1 and json.loads(result.stdout)["problems"][0]["row"] == "row 0 (id \\ud83d)"
    assert "row 1 (id \\ud83d): form" in run_process("data", "check", tmp_path / "cut.json").stdout


def test_check_data_that_is_not_there(tmp_path):
    assert "absent.json" in fails("data", "check", tmp_path / "absent.json")


def test_train(checkpoint, rows, tmp_path):
    recipe = tmp_path / "align.yaml"
    recipe.write_text(
        f"model: {checkpoint}\ndata: {rows / 'train.json'}\nstage: align\noutput_dir: {tmp_path / 'out'}\n"
    )
    options = ["--set", "max_steps=1", "--set", "report_to=none", "--set", "learning_rate=1e-3"]
    result = run("train", recipe, *options)
    assert result.exit_code == 0, result.stderr
    (folder,) = result.stdout.splitlines()  # what the Trainer logs goes elsewhere
    assert inspect_checkpoint(folder).projector.type == "mlp"

    result = run("train", recipe, *options, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["checkpoint"], told["stages"][0]["steps"]) == (folder, 1)


def test_the_json_of_a_training_that_diverges_is_json(checkpoint, rows, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {checkpoint}\ndata: {rows / 'train.json'}\nstage: instruct\noutput_dir: {tmp_path / 'out'}\n"
    )
    options = ["--set", "max_steps=3", "--set", "report_to=none", "--set", "learning_rate=1e30", "--json"]
    result = run("train", recipe, *options)
    assert result.exit_code == 0, result.stderr
    assert "NaN" in (tmp_path / "out" / "instruct" / "stage.json").read_text(encoding="utf-8")
    assert "NaN" not in result.stdout
    assert None in [entry.get("grad_norm", 0) for entry in json.loads(result.stdout)["stages"][0]["log"]]


SCALED = """
import torch.nn as nn

from moellava import register_projector


@register_projector("scaled_linear")
class ScaledLinear(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size, scale=0.5):
        super().__init__()
        self.linear, self.scale = nn.Linear(vision_hidden_size, text_hidden_size), scale

    def forward(self, x):
        return self.linear(x) * self.scale
"""


def test_train_and_upcycle_a_model_with_a_part_of_ones_own(parts, rows, tmp_path):
    """Each command in a process of its own, which knows the part by the file, or by the checkpoint's copy of it."""
    (tmp_path / "scaled.py").write_text(SCALED)

    def done(*arguments, code=0):
        result = run_process(*arguments, cwd=tmp_path)
        assert result.returncode == code, result.stderr
        return result.stderr if code else result.stdout

    def train(stages, *arguments, out, **options):
        model = "{model_path: model, trust_remote_code: true}"
        (tmp_path / "recipe.yaml").write_text(
            f"model: {model}\ndata: {rows / 'train.json'}\noutput_dir: {out}\nstages: {stages}\nmax_steps: 1\n"
            "report_to: none\n"
        )
        return done("train", "recipe.yaml", *arguments, **options)

    own = "--import", "scaled.py"
    language, tower = parts.language_model("llama"), parts.vision_tower("clip")
    done("assemble", *own, "--language-model", language, "--vision-tower", tower, "--projector", "scaled_linear",
         "--out", "model")  # fmt: skip
    assert train("[{stage: align}, {stage: instruct}]", out="trusted") == "trusted/instruct/model\n"
    # By its own code, a model is what it is: no stage goes on as if it had been made sparse.
    assert "cannot be changed while loading" in train("[{stage: moe}]", out="refused", code=1)
    assert train("[{stage: align}, {stage: moe}]", *own, out="imported") == "imported/moe/model\n"
    assert "Experts" in done("upcycle", *own, "model", "sparse")
    for sparse in ("imported/moe/model", "sparse"):
        told = inspect_checkpoint(tmp_path / sparse)
        assert told.projector.type == "scaled_linear" and told.sparse.num_experts == 4


def test_train_by_what_is_no_recipe(tmp_path):
    assert "absent.yaml" in fails("train", tmp_path / "absent.yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: my-model\ndata: train.json\nstage: align\noutput_dir: out\n")
    assert "did you mean 'max_steps'" in fails("train", recipe, "--set", "max_stepz=1")
    assert "is no YAML" in fails("train", recipe, "--set", "max_steps=[", code=2)


def test_evaluate(checkpoint, rows, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    options = ["--max-new-tokens", 3, "--limit", 2, "--html", tmp_path / "report.html"]
    result = run("evaluate", copy, rows / "train.json", *options, "--card", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["num_questions"], told["metrics"]["accuracy"]["n"]) == (2, 2)
    assert "model-index:" in (copy / "README.md").read_text(encoding="utf-8")
    assert "Is it red?" in (tmp_path / "report.html").read_text(encoding="utf-8")

    result = run("evaluate", checkpoint, rows / "train.json", *options)
    assert result.exit_code == 0, result.stderr
    assert "Accuracy" in result.stdout


def test_rows_as_written(checkpoint, rows, tmp_path):
    """By --as-written, images at the end of a question stay there: the same tokens in all three commands."""
    question = "Is it red? Is it red?\n\n\n<image>"
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    row = {"image": str(rows / "0.png"), "conversations": talk}
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    tokens = []
    for option in ([], ["--as-written"]):
        checked = run("data", "check", tmp_path / "rows.json", "--model", checkpoint, "--json", *option)
        asked = run("ask", checkpoint, rows / "0.png", question, "--max-new-tokens", 1, "--json", *option)
        assert checked.exit_code == asked.exit_code == 0, (checked.stderr, asked.stderr)
        told = json.loads(checked.stdout)
        tokens.append(json.loads(asked.stdout)["prompt_tokens"])
        assert told["tokens"] - told["answer_tokens"] == tokens[-1]
        done = run("evaluate", checkpoint, tmp_path / "rows.json", "--max-new-tokens", 1, "--json", *option)
        assert json.loads(done.stdout)["settings"].get("as_written", False) is bool(option)
    assert tokens[0] < tokens[1]  # the blanks before the image are tokens


def test_evaluate_what_cannot_be(parts, checkpoint, rows, tmp_path):
    assert "absent.json" in fails("evaluate", checkpoint, tmp_path / "absent.json")
    told = fails("evaluate", checkpoint, rows / "train.json", "--html", tmp_path)
    assert f"{tmp_path} is a folder; the page is a file" in told and "Loading weights" not in told
    assert "is a model of type 'llama'" in fails("evaluate", parts.language_model("llama"), rows / "train.json")
