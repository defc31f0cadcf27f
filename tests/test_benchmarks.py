# SPDX-License-Identifier: Apache-2.0
"""The benchmarks in tiny sizes: they run to the end, and what they write has the form that is documented."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import logging


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("bench", "generation", "loading", "measuring", "moe", "scaling", "training", "vision")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Makes the benchmarks importable, as they are when one of them is run, and undoes what they set."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    for name in MODULES:
        sys.modules.pop(name, None)


def test_all_run_and_write_a_table_and_a_picture(tmp_path, capsys):
    import bench

    only = ["--only", "vision", "--only", "generation", "--only", "training", "--only", "moe"]
    bench.main(["--quick", "--threads", "1", "--out", str(tmp_path / "out"), *only])
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["command"].startswith("python benchmarks/bench.py --quick")
    assert {"cpu", "cores", "threads", "torch", "transformers"} <= written["machine"].keys()
    assert written["machine"]["threads"] == 1
    rows = written["rows"]
    assert {row["benchmark"] for row in rows} == {"vision", "generation", "training", "moe"}
    for row in rows:
        assert row["ratio"] > 0, row
        assert row["name"] and row["peer"], row
    growths = [row for row in rows if row["sizes"]]
    assert len(growths) == 4
    assert all(row["exponent"] is not None and len(row["costs"]) == len(row["sizes"]) > 1 for row in growths)
    with Image.open(tmp_path / "out" / "bench.png") as picture:
        assert min(picture.size) > 300
    assert "divided by" in capsys.readouterr().out


def test_loading_is_measured_in_a_fresh_process(tmp_path):
    import loading

    loading.make(tmp_path, tiny=True)
    assert torch.get_default_dtype() == torch.float32
    (row,) = loading.as_rows(loading.take_turns(["load"], 1, tmp_path, warms_up=False))
    assert (row.name, row.peer, row.unit) == ("load: peak memory", "bytes of the model", "MB")
    assert row.ratio > 0 and row.value == pytest.approx(row.ratio * row.peer_value)


def test_times_of_loading_are_ratios_to_transformers():
    import loading

    measured = {"peak": 1.05, "seconds": 2.0, "bytes": 10**6}
    rows = loading.as_rows({"load": [measured] * 3, loading.PEER: [{**measured, "seconds": 4.0}] * 3})
    assert {row.name: row.ratio for row in rows} == pytest.approx(
        {"load: peak memory": 1.05, "load: time": 0.5, "transformers_llava: peak memory": 1.05}
    )


def test_models_with_other_weights_are_not_compared(tmp_path):
    import generation

    sizes, dtype = generation.TINY, torch.float32
    generation.make_llava(tmp_path, sizes)
    ours, peer = generation.load_ours(tmp_path, dtype), generation.load_peer(tmp_path, dtype)
    tokens = sizes.num_image_tokens(sizes.image_size)
    inputs = generation.make_inputs(sizes, dtype, num_image_tokens=tokens, image_size=sizes.image_size)
    generation.check_same_logits(ours, peer, inputs)
    with torch.no_grad():
        ours.model.multi_modal_projector.linear_2.bias[0] += 0.5
    with pytest.raises(ValueError, match="The logits of the two models differ by up to .* nothing may be concluded"):
        generation.check_same_logits(ours, peer, inputs)


def test_decoding_begins_at_the_end_of_the_prompt_every_time(tmp_path):
    import generation

    sizes = generation.TINY
    model = generation.make_model(sizes, torch.float32, image_size=sizes.image_size)
    tokens = sizes.num_image_tokens(sizes.image_size)
    inputs = generation.make_inputs(sizes, torch.float32, num_image_tokens=tokens, image_size=sizes.image_size)
    decoding = generation.Decoding(model, inputs, sizes.new_tokens)
    for _ in range(2):
        decoding()
        assert decoding.cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_active_bytes_are_those_of_the_chosen_experts():
    import generation

    sizes = generation.TINY
    counted = {}
    for experts, chosen in ((2, 1), (4, 1), (4, 2)):
        moe = {"num_experts": experts, "num_experts_per_tok": chosen, "layers": "dense"}
        model = generation.make_model(sizes, torch.float32, image_size=sizes.image_size, moe_config=moe)
        routers = sizes.num_layers * experts * sizes.hidden_size * 4
        counted[experts, chosen] = generation.active_bytes(model) - routers
    expert = sizes.num_layers * 3 * sizes.hidden_size * sizes.intermediate_size * 4
    assert counted[2, 1] == counted[4, 1]
    assert counted[4, 2] - counted[4, 1] == expert


def test_the_page_on_scaling_has_what_is_planned():
    """A line of each table; `python benchmarks/scaling.py --check` compares them all."""
    import scaling

    page = scaling.PAGE.read_text(encoding="utf-8").splitlines()
    (case,) = (case for case in scaling.CASES if (case.size, case.stage) == ("1.6B", "align"))
    for table in (scaling.memory_table, scaling.time_table):
        header, _, line = table([case])
        assert header in page and line in page


def test_medians_turns_and_exponents():
    import measuring

    order = []
    times = measuring.alternating({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    row = measuring.compared("x", "y", "z", [2.0, 9.0, 4.0], [2.0, 2.0, 2.0], per=2)
    assert (row.value, row.peer_value, row.ratio) == (2000, 2000, 1)
    assert measuring.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_a_process_that_fails_says_why(tmp_path):
    import measuring

    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('no such case')\n")
    with pytest.raises(RuntimeError, match="ended with 1:[^$]*no such case"):
        measuring.in_fresh_process(script)
