# SPDX-License-Identifier: Apache-2.0
"""`moellava plan`."""

import json

import pytest
from commands import fails, run

from moellava import inspect_checkpoint, plan


SHORT = ["--max-length", 128, "--batch-size", 1]


def with_config(checkpoint, folder, **changes):
    """A copy of a checkpoint's config, and of nothing else: planning reads no more."""
    folder.mkdir()
    fields = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    return folder


def test_plan_as_json(checkpoint):
    result = run("plan", checkpoint, *SHORT, "--devices", 8, "--memory", "80GB", "--rows", 1000, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == plan(checkpoint, max_length=128, batch_size=1, devices=8, memory="80GB", rows=1000).to_dict()
    assert told["fits"] and told["hours"] > 0
    parts = told["parts"].values()
    assert sum(part["parameters"] for part in parts) == inspect_checkpoint(checkpoint).parameters.total


def test_plan_reads_the_config_alone_and_shows_a_table(checkpoint, tmp_path):
    folder = with_config(checkpoint, tmp_path / "model")
    options = ["--stage", "moe", "--moe-field", "num_experts=4", "--lora-rank", 2, "--strategy", "zero3"]
    result = run("plan", folder, *SHORT, *options, "--devices", 2, "--memory", "1MB")
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert f"{folder}, stage moe" in lines
    assert any(line.startswith("optimizer ") for line in lines)
    assert any(line.startswith("Does not fit in 976.6 KiB") for line in lines)
    assert "give rows fewer tokens (max_length)" in lines


def test_plan_of_what_cannot_be_planned(parts, checkpoint, tmp_path):
    assert "is a model of type 'llama'" in fails("plan", parts.language_model("llama"))
    assert "no-such-model" in fails("plan", "./no-such-model")
    own = with_config(checkpoint, tmp_path / "own", projector_config={"type": "gated_by_somebody"})
    assert "has parts of its author's own (projector 'gated_by_somebody')" in fails("plan", own)
    quantised = with_config(
        checkpoint, tmp_path / "quantised", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    assert "are quantised, which is not planned for" in fails("plan", quantised)
    sparse = with_config(checkpoint, tmp_path / "sparse", moe_config={"num_experts": 4, "layers": [0]})
    options = ["--stage", "moe", "--moe-field", "num_experts=2"]
    assert "the model is sparse already" in fails("plan", sparse, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "much"], "memory is 'much'; expected a size such as 80GB"),
        (["--gpu", "V100"], "Unknown gpu 'V100'; did you mean 'H100'"),
        (["--utilization", 2], "utilization is 2.0; expected a share"),
        (["--text-tokens", 5000], "does not go with at most 2048 tokens"),
        (["--moe-field", "num_experts=4"], "moe is given in the stage 'instruct'"),
        (["--stage", "moe", "--moe-field", "num_expert=4"], "did you mean 'num_experts'"),
    ],
)
def test_options_that_are_wrong(checkpoint, options, message):
    assert message in fails("plan", checkpoint, *options)
