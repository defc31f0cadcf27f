# SPDX-License-Identifier: Apache-2.0
"""No path of this machine in what training, evaluating and pushing write."""

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from moellava import load_pretrained_model, train
from moellava.cli import app
from moellava.hub import _stage, checkpoint_files
from moellava.reading.sources import Source


def naming(folder, text):
    """The files below a folder that name a path, but for those of transformers' Trainer, which reads them again."""
    own = {"training_args.bin", "trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in own]
    return sorted(str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes())


@pytest.fixture(scope="module")
def written(parts, tmp_path_factory):
    home = tmp_path_factory.mktemp("janes_home")
    language, tower = parts.language_model("llama"), parts.vision_tower("clip")
    model = load_pretrained_model(language, mm_vision_tower=tower, dtype=torch.bfloat16, device="cpu").model
    model.save_pretrained(home / "model")
    (home / "pictures" / "a").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(home / "pictures" / "a" / "red.png")
    talk = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"image": "a/red.png", "conversations": talk}] * 4 + [{"image": "a/missing.png", "conversations": talk}]
    (home / "rows.json").write_text(json.dumps(rows))
    report = train(
        {
            "model": str(home / "model"), "data": str(home / "rows.json"), "eval_data": str(home / "rows.json"),
            "image_folder": str(home / "pictures"), "output_dir": str(home / "out"),
            "stages": [{"stage": "align"}, {"stage": "instruct", "lora": {"r": 2}}],
            "use_cpu": True, "max_steps": 2, "save_steps": 1, "disable_tqdm": True, "report_to": "none",
        }
    )  # fmt: skip
    asked = CliRunner().invoke(
        app,
        [
            "evaluate",
            str(report.checkpoint),
            str(home / "rows.json"),
            "--images",
            str(home / "pictures"),
            "--device",
            "cpu",
            "--max-new-tokens",
            "2",
            "--html",
            str(home / "out" / "wrong.html"),
            "--card",
            "--json",
        ],
    )
    assert asked.exit_code == 0, asked.output
    (home / "out" / "evaluation.json").write_text(asked.stdout)
    source = Source(report.checkpoint)
    _stage(source, checkpoint_files(source), home / "sent", None)
    return home, report


def test_nothing_that_is_written_names_a_path_of_this_machine(written):
    home, report = written
    assert naming(home / "sent", "janes_home") == []
    assert naming(home / "out", "janes_home") == []


def test_a_stage_is_found_again_where_its_folder_was_moved(written, tmp_path, monkeypatch):
    home, report = written
    (home / "out").rename(home / "elsewhere")
    fields = json.loads((home / "elsewhere" / "instruct" / "stage.json").read_text())
    assert (fields["folder"], fields["checkpoint"]) == (".", "model")
    fields = json.loads((home / "elsewhere" / "align" / "recipe.json").read_text())
    assert fields["data"].startswith("rows.json@") and fields["model"].startswith("model@")


def test_a_merged_adapter_keeps_the_dtype_of_its_base(written):
    home, report = written
    folder = next(home.glob("*/instruct/model"))
    for name, tensor in Source(folder).tensors().items():
        assert tensor.dtype == (torch.float32 if ".multi_modal_projector." in name else torch.bfloat16), name
    before, after = (Source(path).tensors() for path in (home / "model", folder))
    assert any(not after[name].equal(before[name]) for name in after if ".language_model." in name)
