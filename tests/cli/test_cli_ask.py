# SPDX-License-Identifier: Apache-2.0
"""`moellava ask`."""

import base64
import json
import os
import pty
import shutil
import subprocess

import pytest
from commands import SCRIPT, fails, run, run_process

from moellava import MoellavaForCausalLM


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
    assert process.wait(timeout=600) == 0
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
