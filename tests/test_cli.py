# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The command line: run as users run it, in a process of its own, and in this one where that tells the same."""

import base64
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from parts import picture
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from moellava import MoellavaForCausalLM, inspect_checkpoint, load_pretrained_model
from moellava.cli import app


SCRIPT = str(Path(sys.executable).parent / "moellava")


def run_process(*arguments, module=False, stdin=None, cwd=None):
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "moellava"] if module else [SCRIPT]
    return subprocess.run(
        [*command, *map(str, arguments)], input=stdin, capture_output=True, encoding="utf-8", cwd=cwd, timeout=300
    )


def run(*arguments, stdin=None):
    """Runs the command line in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env={"COLUMNS": "200"})


def fails(*arguments, code=1, stdin=None):
    """Runs the command line, which has to end in one sentence on standard error; returns it."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    return result.stderr


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """`--import` adds to it, for the rest of the process."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "my-model"
    language, tower = str(parts.language_model("llama")), str(parts.vision_tower("clip"))
    load_pretrained_model(language, vision_tower=tower, device="cpu").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    picture(1).save(folder / "first.png")
    picture(2, mode="RGBA").save(folder / "second.png")
    (folder / "notes.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def stock(checkpoint):
    """The same answers by transformers' own classes."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)

    def answer(pictures, question, max_new_tokens):
        content = [{"type": "image", "path": str(path)} for path in pictures] + [{"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        tokens = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        return processor.decode(tokens, skip_special_tokens=True).strip(), tokens

    return answer


# The whole


def test_help_and_version_import_nothing_heavy():
    code = """
import sys
from moellava.cli import app
for arguments in (["--help"], ["ask", "--help"], ["assemble", "--help"], ["inspect", "--help"], ["--version"]):
    app(arguments, standalone_mode=False)
heavy = {"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert "moellava 0.1.0" in done.stdout


def test_completion_imports_nothing_heavy():
    environment = {
        "_MOELLAVA_COMPLETE": "complete_bash",
        "COMP_WORDS": "moellava assemble --projector p",
        "COMP_CWORD": "3",
        "_TYPER_COMPLETE_ARGS": "moellava assemble --projector p",
    }
    code = """
import sys
from moellava.cli import main
try:
    main()
finally:
    print("HEAVY", sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["perceiver", "HEAVY []"]


@pytest.mark.parametrize("module", [False, True])
def test_the_script_and_the_module_are_the_same(module):
    done = run_process("--version", module=module)
    assert (done.returncode, done.stdout, done.stderr) == (0, "moellava 0.1.0\n", "")


@pytest.mark.parametrize("command", ["ask", "assemble", "inspect"])
def test_help_shows_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"moellava {command} " in result.stdout.partition("Examples:")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["ask", "model"],
        ["ask", "model", "scan.png", "What?", "--max-new-tokens", "0"],
        ["ask", "model", "scan.png", "What?", "--dtype", "float17"],
        ["ask", "model", "scan.png", " "],
        ["inspect"],
        ["inspect", "model", "--nothing"],
        ["assemble", "--out", "folder"],
        ["assemble", "--language-model", "model"],
        ["assemble", "--language-model", "model", "--out", "folder", "--projector-field", "hidden_size"],
        ["assemble", "--language-model", "model", "--out", "folder", "--vision-feature-layer", "last"],
        ["assemble", "--language-model", "model", "--out", "folder", "--image-aspect-ratio", "wide"],
        ["assemble", "--config", "nothing.json", "--out", "folder"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails(*arguments, code=2)
    assert "Usage: " in message
    assert os.listdir(tmp_path) == []


def test_errors_are_one_sentence_and_debug_shows_where(tmp_path):
    (tmp_path / "parts.json").write_text("{")
    arguments = ["assemble", "--config", tmp_path / "parts.json", "--out", tmp_path / "model"]
    done = run_process(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {tmp_path / 'parts.json'} is no valid JSON (")
    assert len(done.stderr.splitlines()) == 1

    for with_debug in ([*arguments, "--debug"], ["--debug", *arguments]):
        done = run_process(*with_debug)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback (most recent call last)" in done.stderr
        assert "ValueError: " in done.stderr.splitlines()[-1]


def test_ctrl_c_ends_with_130(tmp_path):
    pipe = tmp_path / "parts.json"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [SCRIPT, "assemble", "--config", pipe, "--out", tmp_path / "model"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with pipe.open("w"):  # returns when the command reads it, and keeps it waiting
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr


def test_logging_is_as_before(checkpoint, scans):
    package, models = logging.getLogger("moellava"), logging.getLogger("transformers.modeling_utils")
    before = (package.level, list(package.handlers), list(models.filters))
    assert run("ask", checkpoint, scans / "first.png", "What?", "--max-new-tokens", 1, "--verbose").exit_code == 0
    assert (package.level, list(package.handlers), list(models.filters)) == before


# ask


def test_ask_in_a_process_of_its_own(checkpoint, scans, stock):
    done = run_process("ask", checkpoint, scans / "first.png", "What is shown?", "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout == stock([scans / "first.png"], "What is shown?", 12)[0] + "\n"


def test_ask_about_several_pictures(checkpoint, scans, stock):
    names = [str(scans / "first.png"), str(scans / "second.png"), str(scans / "first.png")]
    result = run(
        "ask",
        checkpoint,
        names[0],
        "What has changed?",
        "-p",
        names[1],
        "--picture",
        names[2],
        "--max-new-tokens",
        7,
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["answer"] == stock(names, "What has changed?", 7)[0]
    assert (told["checkpoint"], told["pictures"], told["question"]) == (str(checkpoint), names, "What has changed?")
    assert (told["new_tokens"], told["finish_reason"]) == (7, "length")
    assert told["prompt_tokens"] > 3 * 16


def test_ask_the_pictures_matter(checkpoint, scans):
    answers = {
        run("ask", checkpoint, scans / name, "What is shown?", "--max-new-tokens", 12).stdout
        for name in ("first.png", "second.png")
    }
    assert len(answers) == 2


def test_ask_reads_the_question_from_standard_input(checkpoint, scans, stock):
    result = run("ask", checkpoint, scans / "first.png", "-", "--max-new-tokens", 6, stdin="What is shown?\n")
    assert result.stdout == stock([scans / "first.png"], "What is shown?", 6)[0] + "\n"
    assert "question is empty" in fails("ask", checkpoint, scans / "first.png", "-", stdin="\n", code=2)


def test_ask_takes_pictures_from_elsewhere(checkpoint, scans, stock):
    content = base64.b64encode((scans / "first.png").read_bytes()).decode()
    result = run("ask", checkpoint, f"data:image/png;base64,{content}", "What?", "--max-new-tokens", 6)
    assert result.stdout == stock([scans / "first.png"], "What?", 6)[0] + "\n"


def test_ask_says_that_an_answer_was_cut_off(checkpoint, scans):
    result = run("ask", checkpoint, scans / "first.png", "What?", "--max-new-tokens", 3)
    assert "cut off after 3 tokens: raise --max-new-tokens" in result.stderr


def test_ask_ends_where_the_model_does(checkpoint, scans, stock, tmp_path):
    _, tokens = stock([scans / "first.png"], "What?", 6)
    end = next(index for index, token in enumerate(tokens) if index and token not in tokens[:index])
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, tokens[end]]}))
    result = run("ask", folder, scans / "first.png", "What?", "--json")
    told = json.loads(result.stdout)
    assert (told["new_tokens"], told["finish_reason"]) == (end + 1, "stop")
    assert "cut off" not in result.stderr


def test_ask_does_not_sample(checkpoint, scans, stock, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 9.0, "top_k": 400, "top_p": 0.99}
    (folder / "generation_config.json").write_text(json.dumps(settings | sampling))
    result = run("ask", folder, scans / "first.png", "What?", "--max-new-tokens", 12)
    assert result.stdout == stock([scans / "first.png"], "What?", 12)[0] + "\n"
    for setting in sampling:
        assert setting not in result.stderr


def test_ask_in_another_dtype(checkpoint, scans):
    result = run("ask", checkpoint, scans / "first.png", "What?", "--max-new-tokens", 4, "--dtype", "bfloat16", "-v")
    assert result.exit_code == 0, result.stderr
    assert "torch.bfloat16" in result.stderr
    assert "torch.float32" not in result.stderr


def test_ask_an_adapter(checkpoint, scans, stock, tmp_path):
    peft = pytest.importorskip("peft")
    model = MoellavaForCausalLM.from_pretrained(checkpoint)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = ["ask", tmp_path / "adapter", scans / "first.png", "What?", "--max-new-tokens", 12]
    assert "adapter" in fails(*arguments)
    result = run(*arguments, "--model-base", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() not in ("", stock([scans / "first.png"], "What?", 12)[0])


def test_ask_with_a_device_map(checkpoint, scans, stock):
    result = run("ask", checkpoint, scans / "first.png", "What?", "--max-new-tokens", 6, "--device-map", "auto")
    assert result.stdout == stock([scans / "first.png"], "What?", 6)[0] + "\n"


def test_ask_writes_to_a_terminal_while_it_answers(checkpoint, scans, stock):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [SCRIPT, "ask", checkpoint, scans / "first.png", "What is shown?", "--max-new-tokens", "12"],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 1024):
            written += chunk
    except OSError:  # how a terminal tells that the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0
    answer = written.decode(errors="replace").replace("\r\n", "\n").strip()
    assert answer.split() == stock([scans / "first.png"], "What is shown?", 12)[0].split()


def test_ask_refuses_what_is_too_long(checkpoint, scans):
    message = fails("ask", checkpoint, scans / "first.png", "why? " * 3000)
    assert "but the language model takes 2048 with the answer" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.png", "There is no picture"),
        ("notes.png", "cannot be decoded"),
        (".", "is a folder; expected a picture file"),
        ("http://127.0.0.1:9/scan.png", "cannot be fetched"),
    ],
)
@pytest.mark.parametrize("further", [False, True])
def test_ask_with_a_picture_that_is_none(checkpoint, scans, name, message, further):
    name = name if "://" in name else str(scans / name)
    pictures = [str(scans / "first.png"), "What?", "--picture", name] if further else [name, "What?"]
    told = fails("ask", checkpoint, *pictures)
    assert message in told
    assert name in told
    assert "0x" not in told  # no object's place in memory


def test_ask_a_path_that_does_not_exist(scans, tmp_path):
    assert f"{tmp_path}/absent does not exist" in fails("ask", tmp_path / "absent", scans / "first.png", "What?")


def test_ask_a_name_that_is_nowhere(scans):
    assert "nobody/nothing" in fails("ask", "nobody/nothing", scans / "first.png", "What?")


def test_ask_a_folder_that_is_no_model(scans):
    message = fails("ask", scans, scans / "first.png", "What?")
    assert f"{scans} is no model: it has no config.json. It holds: first.png, notes.png, second.png." in message


def test_ask_a_language_model(parts, scans):
    message = fails("ask", parts.language_model("llama"), scans / "first.png", "What?")
    assert "is a model of type 'llama'" in message
    assert "`moellava assemble`" in message


def test_ask_damaged_weights(checkpoint, scans, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "model.safetensors" in fails("ask", folder, scans / "first.png", "What?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load-4bit", "--load-8bit"], "load_4bit and load_8bit"),
        (["--device", "nothing"], "'nothing'"),
        (["--device", "cpu", "--device-map", "auto"], "give one of the two"),
        (["--model-base", "./absent"], "no LoRA adapter"),
    ],
)
def test_ask_with_options_that_do_not_work(checkpoint, scans, options, message):
    assert message in fails("ask", checkpoint, scans / "first.png", "What?", *options)


# assemble


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
    assert "The projector is new: train the model" in done.stderr
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
    assert "projector is new" not in result.stderr
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


def test_an_imported_file_that_another_module_hides(parts, tmp_path):
    (tmp_path / "json.py").write_text("")
    message = fails(
        "assemble", "--language-model", parts.language_model("llama"), "--import", tmp_path / "json.py",
        "--out", tmp_path / "model",
    )  # fmt: skip
    assert "is the name of" in message


# inspect


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
        f"from {parts.vision_tower('clip')}",
        "Projector mlp: 16 × 48 → 16 × 64 (num_hidden_layers=2, hidden_act=gelu, bias=True)",
        "Language model llama: 4 layers, 64 wide, vocabulary 513, context 2048",
        f"from {parts.language_model('llama')}",
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
    process.wait(timeout=120)
    assert "Traceback" not in process.stderr.read()
    assert process.returncode == 1
