# SPDX-License-Identifier: Apache-2.0
"""`moellava.routing` and the commands `upcycle` and `routing`: which expert took what."""

import json
import sys

import pytest
import torch
from parts import picture
from PIL import Image
from typer.testing import CliRunner

from moellava import load_pretrained_model
from moellava.cli import app
from moellava.routing import LayerRouting, RoutingTrace, draw_routing, trace_routing


MOE = {"num_experts": 3, "num_experts_per_tok": 2, "layers": "sparse"}


def assemble(parts, **options):
    fields = {"mm_vision_tower": str(parts.vision_tower("clip")), "device": "cpu", **options}
    return load_pretrained_model(str(parts.language_model("llama")), **fields).model


@pytest.fixture(scope="module")
def sparse(parts):
    return assemble(parts, moe_config=MOE)


def test_the_trace_is_what_the_router_says(sparse):
    trace = trace_routing(sparse, [picture(1), picture(2)], "What is shown?")

    assert [routing.layer for routing in trace.layers] == [0, 2]
    assert sum(trace.is_image) == 2 * sparse.config.image_seq_length == 2 * trace.tokens_per_image
    assert len(trace.tokens) == len(trace.is_image) == trace.layers[0].experts.shape[0]
    assert [shown.shape for shown in trace.pictures] == [(32, 32, 3)] * 2
    assert trace.grid_side == 4
    inputs = sparse.processor.apply_chat_template(
        [{"role": "user", "content": [
            {"type": "image", "image": picture(1)},
            {"type": "image", "image": picture(2)},
            {"type": "text", "text": "What is shown?"},
        ]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = sparse(**inputs, output_router_logits=True).router_logits
    for routing, layer_logits in zip(trace.layers, logits, strict=True):
        torch.testing.assert_close(routing.experts, layer_logits.topk(2, dim=-1).indices)
        assert sum(routing.load) == pytest.approx(1)
        for expert, share in enumerate(routing.load):
            assert share == pytest.approx((routing.experts == expert).double().mean().item())


@pytest.mark.parametrize(
    "arguments",
    [
        ["routing", "no-model", "scan.png", "What?", "--out", "folder/../scan.png"],
        ["routing", "no-model", "other.png", "What?", "--picture", "scan.png", "--out", "scan.png"],
        ["evaluate", "no-model", "scan.png", "--html", "scan.png"],
    ],
)
def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("scan.png", "other.png"):
        picture(1).save(name)
    before = (tmp_path / "scan.png").read_bytes()
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 1 and "would be written over scan.png, which is read" in " ".join(ran.stderr.split())
    assert (tmp_path / "scan.png").read_bytes() == before


def test_a_dense_model_has_no_routing(parts):
    with pytest.raises(ValueError, match="dense.*moellava upcycle"):
        trace_routing(assemble(parts), [], "What?")


def test_latents_have_no_places_in_the_picture_however_many_they_are(parts):
    model = assemble(parts, moe_config=MOE, projector_type="perceiver", num_latents=9)
    trace = trace_routing(model, [picture(1)], "What is shown?")
    assert trace.tokens_per_image == 9
    assert trace.grid_side is None


def test_a_collapsed_layer_is_told():
    def layer(index, load):
        return LayerRouting(index, torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), load)

    trace = RoutingTrace(["a"] * 4, [False] * 4, [], [layer(0, [0.97, 0.03]), layer(2, [0.5, 0.5])], 2, 16)
    assert trace.collapsed == [0]
    assert trace.to_dict()["collapsed_layers"] == [0]


def test_drawing_needs_matplotlib(sparse, tmp_path, monkeypatch):
    trace = trace_routing(sparse, [], "What?")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Drawing needs matplotlib: pip install moellava\[demo\]"):
        draw_routing(trace, tmp_path / "routing.svg")


@pytest.mark.parametrize("times", [1, 60])
def test_of_a_long_prompt_the_end_is_drawn(sparse, tmp_path, times):
    question = "What is shown in this picture? " * times
    draw_routing(trace_routing(sparse, [], question), tmp_path / "routing.svg")
    drawing = (tmp_path / "routing.svg").read_text(encoding="utf-8")
    assert ("earlier lines not shown" in drawing) == (times > 1)


@pytest.mark.parametrize("projector", ["mlp", "qformer"])
def test_the_drawing_is_a_picture_with_the_colours_of_the_experts(parts, tmp_path, projector):
    small = {"num_query_tokens": 5, "qformer_hidden_size": 32} if projector == "qformer" else {}
    model = assemble(parts, moe_config=MOE, projector_type=projector, **small)
    draw_routing(trace_routing(model, [picture(1)], "What is shown?"), tmp_path / "routing.png")
    with Image.open(tmp_path / "routing.png") as drawing:
        colors = {color for count, color in drawing.convert("RGB").getcolors(maxcolors=1 << 20) if count > 50}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colors  # the bars of experts 0, 1, 2


def test_upcycle_and_routing_commands(parts, tmp_path):
    assemble(parts).save_pretrained(tmp_path / "dense")
    picture(4).save(tmp_path / "picture.png")
    run = CliRunner().invoke
    made = run(app, ["upcycle", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--top-k", "1", "--json",
                     "--layers", "0,3", "--moe-field", "use_meta_expert=true"])  # fmt: skip
    assert made.exit_code == 0, made.stderr
    summary = json.loads(made.stdout)
    assert summary["parameters"]["active"] < summary["parameters"]["total"]

    traced = run(app, ["routing", str(tmp_path / "sparse"), str(tmp_path / "picture.png"), "What?", "--json",
                       "--out", str(tmp_path / "routing.png")])  # fmt: skip
    assert traced.exit_code == 0, traced.stderr
    trace = json.loads(traced.stdout)
    assert [layer["layer"] for layer in trace["layers"]] == [0, 3]
    assert (tmp_path / "routing.png").stat().st_size > 5000

    model = load_pretrained_model(str(tmp_path / "sparse"), device="cpu").model
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.zeros_(parameter)  # no expert is preferred, so that all tokens go to the same one
    model.save_pretrained(tmp_path / "collapsed")
    traced = run(app, ["routing", str(tmp_path / "collapsed"), str(tmp_path / "picture.png"), "What?",
                       "--out", str(tmp_path / "routing.png")])  # fmt: skip
    assert traced.exit_code == 0, traced.stderr
    assert "layer 3: " in traced.stdout and "100%" in traced.stdout
    assert "The layers [0, 3] send nearly everything to the same experts: no mixture." in traced.stderr

    # Also with the settings that it has: a copy of it is no upcycled model.
    for same in ([], ["--top-k", "1", "--layers", "0,3", "--moe-field", "use_meta_expert=true"]):
        again = run(app, ["upcycle", str(tmp_path / "sparse"), str(tmp_path / "other"), *same])
        assert again.exit_code == 1 and "The model is sparse already" in again.stderr
        assert not (tmp_path / "other").exists()
    for layers in ("0,,2", "0,", "\u00b2"):
        wrong = run(app, ["upcycle", str(tmp_path / "dense"), str(tmp_path / "other"), "--layers", layers])
        assert wrong.exit_code == 1 and f"Unknown choice of layers '{layers}'" in wrong.stderr


def test_a_drawing_without_an_ending_is_where_it_was_asked_for(sparse, tmp_path):
    draw_routing(trace_routing(sparse, [], "What?"), tmp_path / "routing")
    with Image.open(tmp_path / "routing") as drawing:
        assert drawing.format == "PNG"
