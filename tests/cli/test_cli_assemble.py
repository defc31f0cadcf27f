# SPDX-License-Identifier: Apache-2.0
"""`moellava assemble`."""

import json
import os
import shutil

import pytest
from commands import fails, run, run_process

from moellava import MoellavaForCausalLM, inspect_checkpoint, load_pretrained_model


def test_assemble_in_a_process_of_its_own_with_a_projector_of_ones_own(parts, scans, tmp_path):
    (tmp_path / "gated_on_the_command_line.py").write_text(
        """
from torch import nn
from moellava import register_projector

@register_projector("gated_cli")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size, bias=bias)
        self.gate = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, image_features):
        return self.linear(image_features) * self.gate(image_features).sigmoid()
"""
    )
    arguments = [
        "--language-model", parts.language_model("llama"), "--vision-tower", parts.vision_tower("clip"),
        "--projector", "gated_cli", "--projector-field", "bias=false",
    ]  # fmt: skip
    assert "Unknown projector 'gated_cli'" in fails("assemble", *arguments, "--out", tmp_path / "model")
    assert not (tmp_path / "model").exists()

    done = run_process(
        "assemble", *arguments, "--import", "gated_on_the_command_line.py", "--out", "model", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "model: clip encoder, gated_cli projector, llama language model; 16 tokens per picture" in done.stderr
    assert "Never trained: multi_modal_projector" in done.stderr
    assert "LOAD REPORT" not in done.stderr
    assert (tmp_path / "model" / "custom_gated_on_the_command_line.py").is_file()

    summary = inspect_checkpoint(tmp_path / "model")
    assert summary.projector.fields == {"bias": False}
    assert "needs --trust-remote-code" in run("inspect", tmp_path / "model").stdout

    ask = ["ask", tmp_path / "model", scans / "first.png", "What?", "--max-new-tokens", 4]
    assert "trust_remote_code=True" in fails(*ask)
    result = run(*ask, "--trust-remote-code", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 4


def test_every_option_of_assemble_arrives(parts, tmp_path):
    language, tower = str(parts.language_model("llama")), str(parts.vision_tower("siglip"))
    arguments = [
        "--language-model", language, "--vision-tower", tower, "--encoder-type", "sigclip",
        "--projector", "perceiver", "--projector-field", "num_latents=4", "--projector-field", "latent_dim=32",
        "--vision-feature-layer", "-2,-3", "--select-strategy", "patch", "--image-size", 48,
        "--image-aspect-ratio", "square", "--dtype", "bfloat16", "--device", "cpu", "--max-shard-size", "100KB",
    ]  # fmt: skip
    result = run("assemble", *arguments, "--out", tmp_path / "model", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told == inspect_checkpoint(tmp_path / "model").to_dict()
    expected = load_pretrained_model(
        language, vision_tower=tower, encoder_type="siglip", vision_feature_layer=[-2, -3], image_size=48,
        vision_feature_select_strategy="patch", image_aspect_ratio="square", device="cpu", dtype="bfloat16",
        projector_config={"type": "perceiver", "num_latents": 4, "latent_dim": 32},
    ).model  # fmt: skip
    model = MoellavaForCausalLM.from_pretrained(tmp_path / "model")
    ours, theirs = model.config.to_dict(), expected.config.to_dict()
    for fields in (ours, theirs):
        for name in ("_name_or_path", "architectures", "transformers_version"):  # what saving and loading note
            fields.pop(name, None)
    assert ours == theirs
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert (tmp_path / "model" / "processor_config.json").is_file()
    assert (tmp_path / "model" / "moellava_entry.py").is_file()


def test_assemble_makes_a_sparse_model(parts, tmp_path):
    result = run(
        "assemble", "--language-model", parts.language_model("llama"), "--vision-tower", parts.vision_tower("clip"),
        "--moe-field", "num_experts=3", "--moe-field", "layers=[1, 3]", "--out", tmp_path / "model", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["sparse"] == {"num_experts": 3, "num_experts_per_tok": 2, "layers": [1, 3]}
    an_expert = 3 * 64 * 96
    assert told["parameters"]["total"] - told["parameters"]["active"] == 2 * an_expert
    assert told["parameters"]["total"] == MoellavaForCausalLM.from_pretrained(tmp_path / "model").num_parameters()


def test_assemble_from_a_config_file_which_options_win_over(parts, tmp_path):
    fields = {
        "model_name_or_path": str(tmp_path / "absent"),
        "mm_vision_tower": str(parts.vision_tower("clip")),
        "projector_type": "qformer",
        "num_query_tokens": 5,
        "qformer_hidden_size": 32,
        "mm_vision_select_layer": -3,
        "dtype": "bfloat16",
    }
    (tmp_path / "parts.json").write_text(json.dumps(fields))
    result = run(
        "assemble", "--config", tmp_path / "parts.json", "--language-model", parts.language_model("llama"),
        "--projector-field", "num_query_tokens=3", "--out", tmp_path / "model", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["projector"]["type"], told["projector"]["fields"]["qformer_hidden_size"]) == ("qformer", 32)
    assert (told["tokens_per_image"], told["encoder"]["vision_feature_layer"], told["dtype"]) == (3, -3, "bfloat16")


def test_assemble_with_projector_weights(parts, checkpoint, tmp_path):
    from safetensors.torch import save_file

    trained = MoellavaForCausalLM.from_pretrained(checkpoint).model.multi_modal_projector.state_dict()
    save_file(trained, tmp_path / "projector.safetensors")
    result = run(
        "assemble", "--language-model", parts.language_model("llama"), "--vision-tower", parts.vision_tower("clip"),
        "--projector-weights", tmp_path / "projector.safetensors", "--out", tmp_path / "model",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "Never trained" not in result.stderr
    assembled = MoellavaForCausalLM.from_pretrained(tmp_path / "model").model.multi_modal_projector.state_dict()
    assert all(assembled[name].equal(tensor) for name, tensor in trained.items())


def test_assemble_replaces_a_model_only_when_told_to(parts, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    arguments = [
        "assemble", "--language-model", parts.language_model("llama"), "--vision-tower", parts.vision_tower("siglip"),
        "--out", folder,
    ]  # fmt: skip
    assert "holds a model already" in fails(*arguments)
    assert inspect_checkpoint(folder).encoder.type == "clip"
    assert run(*arguments, "--overwrite").exit_code == 0
    assert inspect_checkpoint(folder).encoder.type == "siglip"
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model-00001-of-00002.bin", "tokenizer.json"])
def test_a_part_of_a_model_is_not_replaced_unasked(parts, tmp_path, name):
    """A save deletes the weights that its own take the place of."""
    (tmp_path / name).write_bytes(b"mine")
    arguments = ["--language-model", parts.language_model("llama"), "--vision-tower", parts.vision_tower("clip")]
    assert "holds a model already" in fails("assemble", *arguments, "--out", tmp_path)
    assert (tmp_path / name).read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--projector", "qfomer"], "Unknown projector 'qfomer'; did you mean 'qformer'?"),
        (["--projector", "identity"], "identity"),
        (["--projector-field", "hidden_sise=4"], "no field 'hidden_sise'; did you mean 'hidden_size'?"),
        (["--projector-field", "hidden_size=wide"], "'wide'"),
        (["--projector-weights", "absent.safetensors"], "absent.safetensors"),
        (["--encoder-type", "clap"], "Unknown encoder 'clap'"),
        (["--encoder-type", "siglip"], "encoder_type is 'siglip'"),
        (["--encoder-field", "width=4"], "'width'"),
        (["--vision-tower", "./absent"], "./absent does not exist"),
        (["--vision-feature-layer", "9"], "vision_feature_layer 9 is out of range"),
        (["--select-strategy", "best"], "'best'"),
        (["--image-size", "33"], "no multiple of the tower's patches"),
        (["--import", "absent.py"], "no Python file absent.py"),
        (["--import", "absent_module"], "absent_module"),
    ],
)
def test_assemble_with_what_does_not_work_leaves_nothing(parts, tmp_path, options, message):
    (tmp_path / "work").mkdir()
    tower = [] if "--vision-tower" in options else ["--vision-tower", parts.vision_tower("clip")]
    out = tmp_path / "work" / "model"
    told = fails("assemble", "--language-model", parts.language_model("llama"), *tower, *options, "--out", out)
    assert message in told
    assert os.listdir(tmp_path / "work") == []


def test_assemble_where_nothing_can_be_saved(parts, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = ["assemble", "--language-model", parts.language_model("llama"), "--out"]
    assert "is a file" in fails(*arguments, tmp_path / "file")
    assert "cannot be written" in fails(*arguments, tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("imported", ["parts_of_mine/gated.py", "parts_of_mine.gated"])
def test_an_imported_package(parts, tmp_path, monkeypatch, imported):
    """By its file, whose siblings are found; by its name, from where the command is run."""
    (tmp_path / "parts_of_mine").mkdir()
    for name, source in {
        "__init__": "from . import gated",
        "gates": "from torch import nn\n\ngate = nn.Sigmoid()",
        "gated": """
from torch import nn
from moellava import register_projector
from .gates import gate

@register_projector("gated_in_a_package")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, image_features):
        return gate(self.linear(image_features))
""",
    }.items():
        (tmp_path / "parts_of_mine" / f"{name}.py").write_text(source)
    done = run_process(
        "assemble", "--language-model", parts.language_model("llama"), "--vision-tower", parts.vision_tower("clip"),
        "--projector", "gated_in_a_package", "--import", imported, "--out", "model", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert inspect_checkpoint(tmp_path / "model").projector.type == "gated_in_a_package"


@pytest.mark.parametrize("imported", ["absent.py", "absent_module"])
def test_an_import_that_is_not_there(parts, tmp_path, imported):
    arguments = ["assemble", "--language-model", parts.language_model("llama"), "--out", tmp_path / "model"]
    assert imported in fails(*arguments, "--import", imported)
    assert not (tmp_path / "model").exists()


def test_an_imported_file_that_another_module_hides(parts, tmp_path):
    (tmp_path / "json.py").write_text("")
    message = fails(
        "assemble", "--language-model", parts.language_model("llama"), "--import", tmp_path / "json.py",
        "--out", tmp_path / "model",
    )  # fmt: skip
    assert "is the name of" in message
