# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and versions of transformers: written on one, loaded, run and saved on each other.

`make test-versions` runs this folder on the pinned version, and names the folders of the other versions in
`MOELLAVA_OTHER_TRANSFORMERS`, one after the other with colons; without it, only what needs no other version is run.
"""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from parts import pictures, run_python

from moellava import load_pretrained_model


TESTS = Path(__file__).resolve().parents[1]
# Version -> the folder that it lies in; `None` for the one that runs the tests.
VERSIONS = {transformers.__version__: None} | {
    folder.rpartition("-")[2]: folder
    for folder in filter(None, os.environ.get("MOELLAVA_OTHER_TRANSFORMERS", "").split(os.pathsep))
}
COMBINATIONS = [
    "clip-mlp-llama",
    "siglip-qformer-phi",
    "dinov2-perceiver-qwen2",
    "biomedclip-linear-granite",
    "clip-mlp-mistral-sparse",
    "siglip-qformer-stablelm-sparse",
]

# Assembles and saves every combination with the package, and writes down what the models say.
WRITE = """
import sys
sys.path.insert(0, {tests!r})
import torch
import transformers
from parts import Parts
from pathlib import Path
from PIL import Image
from moellava import load_pretrained_model

root = Path({root!r})
parts = Parts(root / "parts")
small = {{
    "qformer": {{"num_query_tokens": 4, "qformer_hidden_size": 32}},
    "perceiver": {{"num_latents": 4, "latent_dim": 32}},
}}
expected = {{}}
for name in {combinations!r}:
    encoder, projector, family, *sparse = name.split("-")
    tower = parts.biomedclip() if encoder == "biomedclip" else parts.vision_tower(encoder)
    model = load_pretrained_model(
        parts.language_model(family),
        mm_vision_tower=tower,
        projector_config={{"type": projector, **small.get(projector, {{}})}},
        moe_config={{"num_experts": 4, "num_experts_per_tok": 2, "use_residual": True}} if sparse else None,
        device="cpu",
    ).model
    images = [[Image.open(root / f"{{i}}.png") for i in row] for row in {rows!r}]
    inputs = model.processor(images=images, text={text!r}, padding=True, return_tensors="pt")
    for path, parameter in model.named_parameters():
        parameter.data = parameter.data.clone()
        if sparse and ".mlp." in path:  # experts that differ
            parameter.data += torch.randn(parameter.shape) * 0.1
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected[name] = {{
        "inputs": dict(inputs),
        "weights": model.state_dict(),
        "logits": logits,
        "tokens": tokens,
        "config": model.config.to_dict(),
    }}
    model.save_pretrained(root / "written" / name)
torch.save(expected, root / "expected.pt")
print(transformers.__version__)
"""

# Loads every combination by the Auto classes, without the package, compares, and saves it.
LOAD = """
import torch
import transformers
from pathlib import Path
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

root = Path({root!r})
expected_of = torch.load(root / "expected.pt", weights_only=False)
trusted = {{"trust_remote_code": True}}
for name, expected in expected_of.items():
    folder = root / {source!r} / name
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    images = [[Image.open(root / f"{{i}}.png") for i in row] for row in {rows!r}]
    inputs = processor(images=images, text={text!r}, padding=True, return_tensors="pt")
    assert inputs.keys() == expected["inputs"].keys()
    for key, value in expected["inputs"].items():
        assert torch.equal(inputs[key], value), (name, key)
    config = AutoConfig.from_pretrained(folder, **trusted)
    fields = config.to_dict()
    for key in ("image_seq_length", "image_token_id", "encoder_type", "vision_feature_layer", "parts", "auto_map"):
        assert fields[key] == expected["config"][key], (name, key)
    AutoModel.from_pretrained(folder, **trusted)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model, report = auto_class.from_pretrained(folder, output_loading_info=True, **trusted)
        faults = [report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")]
        assert not any(faults), (name, faults)
        assert type(model).__module__.startswith("transformers_modules.")
        assert type(config) is model.config_class
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    weights = model.state_dict()
    assert weights.keys() == expected["weights"].keys(), name
    for key, value in expected["weights"].items():
        assert torch.equal(weights[key], value), (name, key)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.equal(logits, expected["logits"]), (name, (logits - expected["logits"]).abs().max())
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, expected["tokens"]), name
    model.save_pretrained(root / {target!r} / name)
    processor.save_pretrained(root / {target!r} / name)
print(transformers.__version__)
"""

INPUTS = {
    "rows": [[0], [], [1, 2]],
    "text": ["<image> What is it?", "No picture here, only words.", "Is <image> like <image> or not?"],
}


def run(script: str, root: Path, version: str | None, package: bool = False, **values) -> str:
    """Runs a script on a version of transformers (a folder; `None` for this one), and returns that version."""
    code = script.format(root=str(root), tests=str(TESTS), combinations=COMBINATIONS, **INPUTS, **values)
    env = {} if version is None else {"PYTHONPATH": version}
    return run_python(code, block_moellava=not package, env=env).split()[-1]


def save_pictures(root: Path):
    for index, picture in enumerate(pictures(3)):
        picture.save(root / f"{index}.png")


def same_files(one: Path, other: Path, suffixes: tuple[str, ...]):
    for name in COMBINATIONS:
        files = {path.name for path in (one / name).iterdir() if path.suffix in suffixes}
        assert files == {path.name for path in (other / name).iterdir() if path.suffix in suffixes}
        for file in files:
            assert (one / name / file).read_bytes() == (other / name / file).read_bytes(), (name, file)


def without_version(folder: Path, name: str) -> dict:
    fields = json.loads((folder / name / "config.json").read_text())
    fields.pop("transformers_version")
    return fields


def test_on_this_version(tmp_path, written_by):
    """Written by the package, loaded and saved without it."""
    root = Path(shutil.copytree(written_by(transformers.__version__), tmp_path / "journey"))
    assert run(LOAD, root, None, source="written", target="again") == transformers.__version__
    same_files(root / "written", root / "again", (".py", ".jinja"))
    for name in COMBINATIONS:
        for file in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
            assert (root / "written" / name / file).read_bytes() == (root / "again" / name / file).read_bytes()


@pytest.fixture(scope="module")
def written_by(tmp_path_factory):
    """A function: the folder that a version has written everything into, once."""
    roots = {}

    def write(version: str) -> Path:
        if version not in roots:
            roots[version] = tmp_path_factory.mktemp(f"by-{version}")
            save_pictures(roots[version])
            assert run(WRITE, roots[version], VERSIONS[version], package=True) == version
        return roots[version]

    return write


@pytest.mark.skipif(len(VERSIONS) == 1, reason="needs another transformers: make test-versions")
@pytest.mark.parametrize(("writer", "reader"), list(itertools.permutations(VERSIONS, 2)))
def test_from_one_version_to_another_and_back(tmp_path, written_by, writer, reader):
    """Written on one version; loaded, run and saved on another; and that loaded, run and saved on the first."""
    root = Path(shutil.copytree(written_by(writer), tmp_path / "journey"))
    assert run(LOAD, root, VERSIONS[reader], source="written", target="there") == reader
    assert run(LOAD, root, VERSIONS[writer], source="there", target="back") == writer
    if VERSIONS[writer] is None or VERSIONS[reader] is None:  # with the package too, where this process has the version
        expected = torch.load(root / "expected.pt", weights_only=False)
        for name in COMBINATIONS:
            model = load_pretrained_model(root / "there" / name, device="cpu").model
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            with torch.no_grad():
                assert torch.equal(model(**expected[name]["inputs"]).logits, expected[name]["logits"])

    # The code is what the first process wrote, and what the model is has not changed on the way.
    same_files(root / "written", root / "there", (".py",))
    same_files(root / "written", root / "back", (".py",))
    for name in COMBINATIONS:
        there, back = without_version(root / "there", name), without_version(root / "back", name)
        written = without_version(root / "written", name)
        own = [key for key in written if not key.endswith("_config")]
        assert [back[key] for key in own] == [written[key] for key in own] == [there[key] for key in own]
        for part in ("text_config", "vision_config", "projector_config"):
            common = written[part].keys() & there[part].keys()
            assert {"model_type", "type" if part == "projector_config" else "hidden_size"} <= common
            assert {key: there[part][key] for key in common} == {key: written[part][key] for key in common}
