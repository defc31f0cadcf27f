# SPDX-License-Identifier: Apache-2.0
"""`moellava inspect`."""

import json
import subprocess

import pytest
from commands import SCRIPT, fails, run, run_process

from moellava import MoellavaForCausalLM, inspect_checkpoint, load_pretrained_model


def test_inspect_in_a_process_of_its_own(checkpoint):
    done = run_process("inspect", checkpoint, "--json", module=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == inspect_checkpoint(checkpoint).to_dict()


def test_inspect_shows_what_there_is(parts, checkpoint):
    result = run("inspect", checkpoint)
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    total = MoellavaForCausalLM.from_pretrained(checkpoint).num_parameters()
    for line in (
        str(checkpoint),
        "Encoder clip: clip_vision_model, 4 layers, 48 wide, patch tokens of layer -2",
        f"from {parts.vision_tower('clip').name}",
        "Projector mlp: 16 × 48 → 16 × 64 (num_hidden_layers=2, hidden_act=gelu, bias=True)",
        "Language model llama: 4 layers, 64 wide, vocabulary 513, context 2048",
        f"from {parts.language_model('llama').name}",
        "Picture 32 × 32 pixels, padded to a square; 16 tokens",
        f"Weights {total:,} parameters, float32; 1.1 MiB on disk, 1.1 MiB in memory",
        f"total {total:,} 1.1 MiB 1.1 MiB",
        "embeddings.patch_embedding.weight 1 48 × 3 × 8 × 8 float32",
        "layers.*.mlp.down_proj.weight 4 64 × 96 float32",
    ):
        assert line in lines


def test_inspect_shows_active_parameters_where_they_are_fewer(parts, tmp_path):
    load_pretrained_model(
        str(parts.language_model("mixtral")), vision_tower=str(parts.vision_tower("clip")), device="cpu"
    ).model.save_pretrained(tmp_path)
    shown = run("inspect", tmp_path).stdout
    assert "Active" in shown
    assert "4 in each of the layers 0, 1; 2 per token" in shown


@pytest.mark.parametrize("kind", ["absent", "empty", "tower"])
def test_inspect_what_is_no_checkpoint(parts, tmp_path, kind):
    (tmp_path / "empty").mkdir()
    place = parts.vision_tower("clip") if kind == "tower" else tmp_path / kind
    expected = {"absent": "does not exist", "empty": "is no model", "tower": "a model of type 'clip'"}
    assert expected[kind] in fails("inspect", place)


def test_a_closed_pipe_is_no_error(checkpoint):
    process = subprocess.Popen(
        [SCRIPT, "inspect", checkpoint, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    process.stdout.close()
    process.wait(timeout=1200)
    assert "Traceback" not in process.stderr.read()
    assert process.returncode == 1
