# SPDX-License-Identifier: Apache-2.0
"""Every version's checkpoints load in this one, say what they said, and can be saved; `kept_checkpoints.py` wrote them.

A checkpoint is loaded by the installed classes, and by the code that it carries in a process without the package. What
it says is compared in float32, with a tolerance for another processor's order of summation.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from kept_checkpoints import CHECKPOINTS, LAST, NEW_TOKENS, WRITERS, said, write
from parts import run_python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import moellava
from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaProcessor, load_pretrained_model


KEPT = sorted(path for path in CHECKPOINTS.glob("*/*") if path.is_dir())
NAMES = [path.relative_to(CHECKPOINTS).as_posix() for path in KEPT]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

# Loads every checkpoint by the code in it, compares, and saves it.
BY_ITS_OWN_CODE = """
import json
import re
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

target = Path({target!r})
for path in {folders!r}:
    folder = Path(path)
    questions = json.loads((folder.parent / "questions.json").read_text())
    rows = [[Image.open(folder.parent / f"{{i}}.png") for i in row] for row in questions["rows"]]
    expected = load_file(folder.with_name(folder.name + ".safetensors"))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=rows, text=questions["text"], padding=True, return_tensors="pt")
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    faults = [report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert not any(faults), (path, faults)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    for key, value in inputs.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -{last}:]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    tokens = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=False)[:, -{new_tokens}:]
    assert torch.equal(tokens, expected["tokens"]), path
    # In the dtype that it has on disk.
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(target / folder.parent.name / folder.name)
    print(path)
"""


def files_of(folder: Path, suffix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == suffix}


def expected_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder.with_name(f"{folder.name}.safetensors"))


def inputs_of(folder: Path, processor) -> dict[str, torch.Tensor]:
    questions = json.loads((folder.parent / "questions.json").read_text(encoding="utf-8"))
    rows = [[Image.open(folder.parent / f"{index}.png") for index in row] for row in questions["rows"]]
    return processor(images=rows, text=questions["text"], padding=True, return_tensors="pt")


def assert_says(model: MoellavaForCausalLM, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Compares inputs and outputs with what was written down beside a checkpoint."""
    for name, value in {**inputs, **said(model, inputs)}.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE)


def test_this_version_has_its_checkpoints():
    assert KEPT
    folder = CHECKPOINTS / moellava.__version__
    assert folder.is_dir(), f"version {moellava.__version__} has written no checkpoints yet: make fixture"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(WRITERS)


@pytest.mark.parametrize("folder", KEPT, ids=NAMES)
def test_loads_by_the_installed_classes(folder):
    expected = expected_of(folder)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MoellavaConfig
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is MoellavaProcessor
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model) is MoellavaForCausalLM
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = inputs_of(folder, processor)
    assert inputs.keys() | said(model, inputs).keys() == expected.keys()
    assert_says(model, inputs, expected)


@pytest.mark.parametrize("folder", KEPT, ids=NAMES)
def test_is_saved_by_this_version_and_loads_again(folder, tmp_path):
    model = load_pretrained_model(folder, device="cpu", dtype="auto").model
    model.save_pretrained(tmp_path)
    # The same weights, bit by bit, under the same names; in the same dtypes, but for routers, which are loaded in fp32.
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    wider = [name for name in before if after[name].dtype != before[name].dtype]
    assert [name for name in wider if not re.search(r"\.mlp\.(gate|coefficient)\.", name)] == []
    again = MoellavaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_says(again, inputs_of(folder, MoellavaProcessor.from_pretrained(tmp_path)), expected_of(folder))


def test_load_by_their_own_code_without_the_package(tmp_path):
    folders = [str(folder) for folder in KEPT]
    code = BY_ITS_OWN_CODE.format(folders=folders, target=str(tmp_path), last=LAST, new_tokens=NEW_TOKENS)
    assert run_python(code).split() == folders
    for folder, name in zip(KEPT, NAMES, strict=True):
        # What it saved is what it was: the code too.
        assert files_of(tmp_path / name, ".py") == files_of(folder, ".py")
        before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        assert after.keys() == before.keys(), name
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("folder", KEPT, ids=NAMES)
def test_is_small_and_names_no_place(folder):
    sizes = {path.name: path.stat().st_size for path in [*folder.iterdir(), *folder.parent.glob("*.safetensors")]}
    assert sum(sizes.values()) < 1_250_000, sizes
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} <= {"BF16", "F32"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert all("/" not in origin for origin in config["parts"].values())


def test_what_was_written_is_not_written_again(tmp_path):
    (tmp_path / "0.1.0").mkdir()
    with pytest.raises(FileExistsError, match=r"0\.1\.0 is there, and what a version has written is not written again"):
        write(tmp_path / "0.1.0")
    assert not any((tmp_path / "0.1.0").iterdir())


def test_the_writer_writes_what_is_tested(tmp_path):
    write(tmp_path / "next")
    for name in WRITERS:
        folder = tmp_path / "next" / name
        model = MoellavaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert_says(model, inputs_of(folder, MoellavaProcessor.from_pretrained(folder)), expected_of(folder))
