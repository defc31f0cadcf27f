# SPDX-License-Identifier: Apache-2.0
"""Tests of the demo (`moellava/demo`): its data, its labels, its proofs, and a short run from end to end."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import set_seed
from typer.testing import CliRunner


pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from moellava import load_pretrained_model, upcycle
from moellava.cli import app
from moellava.demo import lessons, running, scans
from moellava.demo.picture_grid import draw_grid
from moellava.demo.running import Demo, clear, mark
from moellava.demo.specialisation import ROWS, ExpertLoad, draw_expert_load, expert_load
from moellava.training import check_data, read_recipe
from moellava.training.data import Collator, Examples
from moellava.training.encoding import Encoder
from moellava.training.rows import open_data


DEMO = Path(running.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = running.Demo(tmp_path_factory.mktemp("demo"), epochs=1)
    set_seed(0)
    running.make_parts(run)
    return load_pretrained_model(
        run.parts / "language-model", mm_vision_tower=run.parts / "vision-tower", device="cpu"
    ).model


# ---------------------------------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------------------------------


def test_every_scan_is_either_learnt_or_held_out_and_always_the_same():
    train, held_out = scans.load_examples()
    numbers = [[example.number for example in part] for part in (train, held_out)]
    assert len(held_out) >= 300
    assert sorted(numbers[0] + numbers[1]) == list(range(1797))
    assert [[example.number for example in part] for part in scans.load_examples()] == numbers
    # No scan is there twice, so no held-out one is known from training.
    assert not {example.scan.tobytes() for example in train} & {example.scan.tobytes() for example in held_out}
    assert {example.digit for example in held_out} == set(range(10))
    assert {example.question for example in held_out} == set(scans.PHRASINGS)


def test_answers_name_the_digit_in_the_form_that_the_question_asks_for():
    assert scans.answer_to("What digit is this?", 7) == "It is a seven."
    assert scans.answer_to("Which number do you see?", 8) == "I see an eight."
    assert scans.answer_to("Name the digit.", 0) == "zero"
    for question in scans.PHRASINGS:
        assert len({scans.answer_to(question, digit) for digit in range(10)}) == 10


def test_pictures_show_the_scan_and_wobble_only_when_asked():
    train, _ = scans.load_examples()
    scan = train[0].scan
    plain = scans.draw(scan)
    assert plain.size == (scans.IMAGE_SIZE, scans.IMAGE_SIZE) and plain.mode == "RGB"
    assert plain.tobytes() == scans.draw(scan).tobytes()
    # Shrunk to the scan's size again, the ink is where it was.
    ink = 255 - np.asarray(plain.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(ink.ravel(), scan.ravel())[0, 1] > 0.95
    wobbly = [scans.draw(scan, wobble=random.Random(seed)).tobytes() for seed in (0, 0, 1)]
    assert wobbly[0] == wobbly[1] and len({plain.tobytes(), *wobbly}) == 3
    assert set(scans.blank_picture().tobytes()) == {255}


# ---------------------------------------------------------------------------------------------------------------------
# The lessons
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(model, tmp_path_factory):
    """The lessons of a few scans, in LLaVA's JSON."""
    return lessons.write_lessons(scans.load_examples()[0][:60], tmp_path_factory.mktemp("taught") / "lessons", 3)


def test_lessons_are_rows_that_training_can_use(model, taught):
    report = check_data(taught, processor=model.processor)
    assert report.rows == report.usable == report.pictures == 180
    rows = json.loads(taught.read_text(encoding="utf-8"))
    drawn = {(taught.parent / row["image"]).read_bytes() for row in rows if row["image"] != "blank.png"}
    assert len(drawn) == sum(row["image"] != "blank.png" for row in rows) < len(rows)  # no two drawings are alike
    digit = {example.number: example.digit for example in scans.load_examples()[0]}
    for row in rows:
        asked, said = (turn["value"] for turn in row["conversations"])
        assert said == scans.answer_to(asked.removeprefix("<image>\n"), digit[int(row["id"].partition("-")[0])])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_are_the_answers_and_nothing_else(model, taught, padding_side, monkeypatch):
    tokenizer = model.processor.tokenizer
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    examples = Examples(open_data(taught), Encoder(model.processor))
    rows = json.loads(taught.read_text(encoding="utf-8"))[:12]
    batch = Collator(model.processor)([examples[index] for index in range(12)])
    assert batch["pixel_values"].shape == (12, 3, scans.IMAGE_SIZE, scans.IMAGE_SIZE)
    assert not batch["attention_mask"].all()  # the rows differ in length, so that padding is tested
    for row, lesson in enumerate(rows):
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in lesson["conversations"])
        labels = batch["labels"][row]
        learnt = labels != -100
        assert tokenizer.decode(labels[learnt]).strip() == answer + tokenizer.eos_token
        assert torch.equal(labels[learnt], batch["input_ids"][row][learnt])
        assert batch["attention_mask"][row][learnt].all()
        asked = tokenizer.decode(batch["input_ids"][row][~learnt & batch["attention_mask"][row].bool()])
        assert asked.endswith(f"{question} ASSISTANT:")
        assert (batch["input_ids"][row] == model.config.image_token_id).sum() == model.config.image_seq_length


def test_the_recipe_is_of_three_stages(taught, tmp_path):
    file = lessons.write_recipe(tmp_path / "recipe.yaml", tmp_path / "parts", taught, tmp_path / "out", 2, 1.5)
    recipe = read_recipe(file)
    assert [stage.stage for stage in recipe.stages] == ["align", "instruct", "moe"]
    assert [stage.arguments.get("num_train_epochs") for stage in recipe.stages] == [None, 2, 1.5]
    assert recipe.stages[2].moe == lessons.MOE


# ---------------------------------------------------------------------------------------------------------------------
# What the demo proves
# ---------------------------------------------------------------------------------------------------------------------


def test_the_answering_process_cannot_import_moellava():
    code = "import answer; answer.block_moellava(); import moellava.modeling"
    done = subprocess.run([sys.executable, "-c", code], cwd=DEMO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'moellava'" in done.stderr


def test_the_answering_process_refuses_to_start_with_moellava():
    code = "import moellava, answer; answer.block_moellava()"
    done = subprocess.run([sys.executable, "-c", code], cwd=DEMO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: moellava is imported already" in done.stderr


GOOD = {"accuracy": 0.97, "blank_accuracy": 0.1}
GOOD_SPARSE = {**GOOD, "collapsed_layers": []}


@pytest.mark.parametrize(
    ("dense", "sparse", "messages"),
    [
        ({}, {}, []),
        ({"accuracy": 0.95, "blank_accuracy": 0.2}, {"accuracy": 0.95, "blank_accuracy": 0.2}, []),
        ({"accuracy": 0.949}, {}, ["the model: 94.9% right; expected at least 95%"]),
        ({"blank_accuracy": 0.21}, {}, ["the model: 21.0% right without a picture"]),
        ({}, {"accuracy": 0.99}, []),
        ({}, {"accuracy": 0.961}, []),
        (
            {},
            {"accuracy": 0.959},
            ["the sparse model: 95.9% right, of the dense one's 97.0%; expected at most 1% less"],
        ),
        (
            {"accuracy": 0.96},
            {"accuracy": 0.94},
            [
                "the sparse model: 94.0% right; expected at least 95%",
                "the sparse model: 94.0% right, of the dense one's",
            ],
        ),
        ({}, {"blank_accuracy": 0.4}, ["the sparse model: 40.0% right without a picture"]),
        ({}, {"collapsed_layers": [1]}, ["the sparse model has collapsed: in its layers [1]"]),
    ],
)
def test_the_demo_fails_when_it_does_not_keep_its_promises(dense, sparse, messages, capsys):
    kept = running.keeps_promises({**GOOD, **dense, "sparse": {**GOOD_SPARSE, **sparse}})
    assert kept == (not messages)
    said = capsys.readouterr().err
    assert said.count("FAILED: ") == len(messages)
    assert all(f"FAILED: {message}" in said for message in messages)


# ---------------------------------------------------------------------------------------------------------------------
# The experts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse_model(model):
    set_seed(0)
    return upcycle(model, **lessons.MOE, router_bias=True)


@pytest.fixture(scope="module")
def some_held_out():
    return scans.load_examples()[1][:12]


def test_the_load_counts_every_choice_once(sparse_model, some_held_out):
    load = expert_load(sparse_model, some_held_out)
    assert load.layers == [0, 1]
    assert load.counts.shape == (2, len(ROWS), lessons.MOE["num_experts"]) == (2, 11, 4)
    of_digits = [sum(example.digit == digit for example in some_held_out) for digit in range(10)]
    patches = sparse_model.config.image_seq_length
    choices = load.counts.sum(dim=-1)
    for layer in range(2):
        assert choices[layer, :10].tolist() == [number * patches * 2 for number in of_digits]
    assert (choices[:, 10] > 0).all()
    for shares in (load.by_row, load.overall.unsqueeze(1)):
        sums = shares.sum(dim=-1)
        assert torch.all(torch.isclose(sums, torch.ones_like(sums)) | (sums == 0))


def test_an_untouched_mixture_is_not_collapsed(sparse_model, some_held_out):
    load = expert_load(sparse_model, some_held_out)
    assert load.collapsed == []
    assert running.keeps_promises({**GOOD, "sparse": {**GOOD, "collapsed_layers": load.collapsed}})


@pytest.mark.parametrize("layers", [[0, 1], [1]])
def test_a_mixture_whose_routers_always_choose_alike_is_collapsed(layers, model, some_held_out, capsys):
    collapsed = upcycle(model, **lessons.MOE, router_bias=True)
    for layer in layers:
        gate = collapsed.model.language_model.layers[layer].mlp.gate
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.copy_(torch.tensor([0.0, 5.0, -5.0, 4.0]))
    load = expert_load(collapsed, some_held_out)
    assert load.collapsed == layers
    for layer in layers:
        assert load.overall[layer].tolist() == [0, 0.5, 0, 0.5]
        assert load.specialisation[layer] < 0.5
    assert not running.keeps_promises({**GOOD, "sparse": {**GOOD, "collapsed_layers": load.collapsed}})
    assert f"FAILED: the sparse model has collapsed: in its layers {layers}" in capsys.readouterr().err
    running.say_load(load)
    assert f"in layers {layers} the same experts take everything" in capsys.readouterr().out


def test_specialisation_is_how_far_the_rows_lie_from_the_whole():
    alike = ExpertLoad([0], torch.full((1, 11, 4), 3.0), 2)
    assert alike.specialisation.tolist() == [0] and alike.collapsed == []
    # Two rows, which share no expert: each lies half of everything away from the whole.
    apart = ExpertLoad([0], torch.tensor([[[8.0, 8, 0, 0], [0, 0, 8, 8]]]), 2)
    assert apart.specialisation.tolist() == [0.5] and apart.collapsed == []
    # Just above and just below the limit.
    assert ExpertLoad([7], torch.tensor([[[48.0, 48, 2, 2]]]), 2).collapsed == [7]
    assert ExpertLoad([7], torch.tensor([[[47.0, 47, 3, 3]]]), 2).collapsed == []


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_load_is_drawn(num_layers, tmp_path):
    counts = torch.zeros(num_layers, len(ROWS), 4)
    counts[..., 0] = 30
    counts[..., 2] = torch.arange(len(ROWS)) * 10.0
    draw_expert_load(ExpertLoad(list(range(num_layers)), counts, 2), tmp_path / "experts.png")
    with Image.open(tmp_path / "experts.png") as drawing:
        assert drawing.format == "PNG" and min(drawing.size) > 300
        colors = {color for _, color in drawing.convert("RGB").getcolors(maxcolors=1 << 24)}
        width = drawing.width
    # From white for nothing to the darkest blue for the most.
    assert (255, 255, 255) in colors
    assert any(blue > red + 50 and red < 30 for red, _, blue in colors)
    assert width > 500 * num_layers * 0.7


@pytest.mark.parametrize("mistakes", [0, 3, 40])
def test_the_grid_is_drawn_with_few_and_many_mistakes(mistakes, tmp_path):
    scans.blank_picture().save(tmp_path / "blank.png")
    item = {"picture": "blank.png", "question": "What do you see?", "truth": "I see a two.", "answer": "I see a two."}
    answers = [{**item, "answer": "I see a six."}] * mistakes + [item] * (60 - mistakes)
    results = {"answers": answers, "accuracy": 1 - mistakes / 60, "blank_accuracy": 0.1}
    draw_grid(results, tmp_path, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.format == "PNG" and min(grid.size) > 600
        colors = {color for _, color in grid.convert("RGB").getcolors(maxcolors=1 << 24)}
    reddish = [color for color in colors if color[0] > 180 and color[1] < 90 and color[2] < 90]
    assert bool(reddish) == (mistakes > 0)


# ---------------------------------------------------------------------------------------------------------------------
# A short run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_short_run_writes_everything_and_fails_for_lack_of_training(tmp_path):
    output = tmp_path / "demo"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    done = subprocess.run(
        [Path(sys.executable).with_name("moellava"), "demo", "--out", output, "--epochs", "4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=6000,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stderr and "expected at least 95%" in done.stderr
    assert "Traceback" not in done.stderr
    assert "100%" in done.stderr  # the progress bars

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    answers = results["answers"]
    assert len(answers) == scans.HELD_OUT
    right = sum(item["answer"] == item["truth"] for item in answers)
    assert results["accuracy"] == pytest.approx(right / len(answers))
    # It has begun to learn to see, and without a picture it can only guess.
    assert results["accuracy"] > 0.5
    assert results["blank_accuracy"] <= 0.2
    # One picture and one question have one answer.
    blank = {}
    for item in answers:
        assert blank.setdefault(item["question"], item["blank_answer"]) == item["blank_answer"]

    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "modeling_moellava.py"} <= {
        path.name for path in (output / "checkpoint").iterdir()
    }
    assert len(list((output / "pictures").glob("*.png"))) == scans.HELD_OUT + 1
    with Image.open(output / "answers.png") as grid:
        assert grid.format == "PNG"

    # The sparse model, and what its experts do.
    sparse = results["sparse"]
    answered = json.loads((output / "sparse-results.json").read_text(encoding="utf-8"))
    assert [item["truth"] for item in answered["answers"]] == [item["truth"] for item in answers]
    assert sparse["accuracy"] == answered["accuracy"] > 0.5
    assert sparse["blank_accuracy"] == answered["blank_accuracy"] <= 0.2
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_moellava.py"} <= {
        path.name for path in (output / "sparse-checkpoint").iterdir()
    }
    config = json.loads((output / "sparse-checkpoint" / "config.json").read_text(encoding="utf-8"))
    assert config["moe_config"]["num_experts"] == 4 and config["moe_config"]["layers"] == [0, 1]
    assert np.array(sparse["load"]).shape == (2, 4) and np.array(sparse["load_by_row"]).shape == (2, len(ROWS), 4)
    assert np.allclose(np.array(sparse["load"]).sum(axis=-1), 1)
    assert len(sparse["specialisation"]) == 2 and sparse["collapsed_layers"] == []
    with Image.open(output / "experts.png") as drawing:
        assert drawing.format == "PNG"

    # The next run may replace all of it, and nothing else.
    again = shutil.copytree(output, tmp_path / "again")
    clear(Demo(again, 1))
    assert [path.name for path in again.iterdir()] == ["notes.txt"]

    # The recipe can be typed, and begins anew.
    assert not (output / "training").exists()
    again = subprocess.run(
        [Path(sys.executable).with_name("moellava"), "train", output / "recipe.yaml", "--set", "max_steps=1"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=3000,
        check=False,
    )
    assert again.stdout.strip() == str(output / "training" / "moe" / "model"), again.stderr

    # That training is the user's own.
    with pytest.raises(FileExistsError, match=r"demo has training, which the demo would replace"):
        clear(Demo(output, 1))
    assert (output / "training" / "moe" / "model" / "config.json").is_file()

    # What is printed at the end can be typed.
    command = done.stdout.split("Ask it yourself:")[1].strip().splitlines()[0]
    assert f" ask {os.path.relpath(output / 'checkpoint', tmp_path)} " in command
    picture = command.split()[3]
    assert (tmp_path / picture).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# What a run may delete
# ---------------------------------------------------------------------------------------------------------------------


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def earlier(tmp_path):
    """A folder as a run leaves it, small."""
    demo = Demo(tmp_path / "demo", 1)
    clear(demo)
    for path in demo.made:
        if path.suffix:
            path.write_text(path.name)
        elif path != demo.training:
            (path / "inner").mkdir(parents=True)
            (path / "inner" / "file.json").write_text(path.name)
    mark(demo)
    (demo.folder / "notes.txt").write_text("mine")
    (demo.folder / "scans").mkdir()
    return demo


def test_a_second_run_replaces_what_the_first_has_written(earlier):
    clear(earlier)
    assert set(everything(earlier.folder)) == {"notes.txt", "scans"}
    clear(earlier)


def changed(name):
    return lambda demo: (demo.folder / name).write_text("changed")


def linked(demo):
    shutil.move(demo.checkpoint, demo.folder / "scans" / "checkpoint")
    demo.checkpoint.symlink_to(demo.folder / "scans" / "checkpoint")


def unmarked(demo):
    demo.marker.unlink()


def marked_by_hand(demo):
    demo.marker.write_text(json.dumps({path.name: True for path in demo.made}))


@pytest.mark.parametrize(
    "change, foreign",
    [
        (changed("recipe.yaml"), ["recipe.yaml"]),
        (changed("checkpoint/inner/file.json"), ["checkpoint"]),
        (changed("pictures/scan.png"), ["pictures"]),
        (lambda demo: (demo.parts / "mine").mkdir(), ["parts"]),
        (lambda demo: demo.training.mkdir(), ["training"]),
        (lambda demo: (demo.lessons / "all").symlink_to("/"), ["lessons"]),
        (lambda demo: (demo.lessons / "inner" / "file.json").rename(demo.lessons / "file.json"), ["lessons"]),
        (linked, ["checkpoint"]),
        (unmarked, ["parts", "lessons", "recipe.yaml", "checkpoint", "pictures"]),
        (marked_by_hand, ["parts", "experts.png"]),
        (lambda demo: demo.marker.write_text("[]"), ["checkpoint"]),
        (lambda demo: demo.marker.write_bytes(b"\xff"), ["checkpoint"]),
    ],
)
def test_what_the_demo_has_not_written_is_in_its_way_and_stays(earlier, change, foreign):
    change(earlier)
    before = everything(earlier.folder)
    with pytest.raises(FileExistsError, match="Nothing was deleted. Give another folder, or move it away") as raised:
        clear(earlier)
    assert all(name in str(raised.value) for name in foreign)
    assert everything(earlier.folder) == before


def test_what_no_demo_has_recorded_is_not_read(tmp_path, monkeypatch):
    """The pictures of a home folder may be many."""
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(running, "_digest", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(FileExistsError, match="has pictures, which the demo would replace"):
        clear(Demo(tmp_path, 1))


def test_the_command_deletes_no_folders_of_a_user(tmp_path):
    for name in ("pictures/scan.png", "checkpoint/config.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = everything(tmp_path)
    ran = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert ran.exit_code == 1
    assert "has checkpoint, pictures, which the demo would replace" in " ".join(ran.stderr.split())
    assert everything(tmp_path) == before


def test_a_run_that_breaks_off_marks_what_it_has_written(tmp_path, monkeypatch):
    demo = Demo(tmp_path / "demo", 1)

    def teach(demo):
        demo.training.mkdir()
        (demo.training / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "teach", teach)
    with pytest.raises(KeyboardInterrupt):
        running.run(demo)
    assert {"parts", "lessons", "training", "recipe.yaml"} <= {path.name for path in demo.folder.iterdir()}
    clear(demo)
    assert list(demo.folder.iterdir()) == []
