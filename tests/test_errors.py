# SPDX-License-Identifier: Apache-2.0
"""Everything that can be wrong and is told: the type of the error, what was wrong, what was expected, what to do.

What can be known without the weights is told before they are opened: where it says `without_weights`, the weight files
are not there. No error leaves a file behind: `nothing_left_behind` watches every test.
"""

import json
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
from parts import picture
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, RecurrentGemmaConfig

from moellava import load_pretrained_model


PROMPT = "USER: <image>\nWhat is shown in this picture? ASSISTANT:"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, not mapped to it, so that the file can be written anew."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    """Enters an empty working folder; afterwards, neither it nor the parts hold a file that the test did not write."""
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    yield
    assert files_below(working) == set()
    assert not list(tmp_path.rglob("*.saving"))


@pytest.fixture(scope="session")
def lm(parts) -> Path:
    return parts.language_model("llama")


@pytest.fixture(scope="session")
def clip(parts) -> Path:
    return parts.vision_tower("clip")


@pytest.fixture(scope="session")
def checkpoint(parts, lm, clip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors") / "model"
    load_pretrained_model(lm, mm_vision_tower=clip, device="cpu").model.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(checkpoint):
    return load_pretrained_model(checkpoint, device="cpu")


@pytest.fixture
def without_weights(parts, lm, clip, checkpoint, tmp_path) -> dict[str, Path]:
    """Copies of the parts that lack their weights: whatever opens them fails by that."""
    copies = {}
    for name, folder in {"lm": lm, "clip": clip, "siglip": parts.vision_tower("siglip"), "model": checkpoint}.items():
        copies[name] = parts.copy(folder, tmp_path / "bare" / name)
        (copies[name] / "model.safetensors").unlink()
    return copies


def load(folder, **settings):
    return load_pretrained_model(folder, device="cpu", **settings)


def test_the_parts_without_weights_lack_them(without_weights):
    for tower in ("clip", "siglip"):
        with pytest.raises(
            FileNotFoundError, match="bare/lm has no weights: expected model.safetensors or pytorch_model"
        ):
            load(without_weights["lm"], mm_vision_tower=without_weights[tower])
    with pytest.raises(FileNotFoundError, match="bare/model has no weights: expected model.safetensors"):
        load(without_weights["model"])


# ---------------------------------------------------------------------------------------------------------------------
# Settings: told before any weight is opened
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = [
    ({"encoder_type": "clpi"}, "Unknown encoder 'clpi'; did you mean 'clip'. Known: auto, biomedclip, clip, dinov2"),
    ({"encoder_type": "sglip"}, "Unknown encoder 'sglip'; did you mean 'siglip'"),
    ({"projector_type": "perciever"}, "Unknown projector 'perciever'; did you mean 'perceiver'. Known: identity"),
    ({"projector_config": {"type": "qfromer"}}, "Unknown projector 'qfromer'; did you mean 'qformer'"),
    (
        {"vision_feature_select_strategy": "patches"},
        "Unknown vision_feature_select_strategy 'patches'; did you mean 'patch'. Known: cls, default, full, patch",
    ),
    ({"image_aspect_ratio": "padd"}, "Unknown image_aspect_ratio 'padd'; did you mean 'pad'. Known: pad, square"),
    ({"mm_vision_towers": "x"}, "Unknown field 'mm_vision_towers' in the arguments; did you mean 'mm_vision_tower'"),
    ({"projector_config": {"type": "mlp", "hidden": 1}}, "The projector 'mlp' has no field 'hidden'; did you mean 'hi"),
    ({"projector_config": {"hidden_sizes": 1}}, "The projector 'mlp' has no field 'hidden_sizes'; did you mean"),
    ({"num_query_tokens": 4}, "The projector 'mlp' has no field 'num_query_tokens'. Known: bias, hidden_act"),
    ({"custom_vision_config": {"image_sizes": 32}}, "Unknown field 'image_sizes' in custom_vision_config; did you"),
    (
        {"projector_type": "identity"},
        "'identity' needs equal widths, got vision_hidden_size=48 and text_hidden_size=64. Use the projector 'mlp'",
    ),
    ({"vision_feature_layer": 5}, "layer 5 is out of range: .* has 4 layers, so expected an integer from -5 to 4"),
    ({"vision_feature_layer": -6}, "layer -6 is out of range: .* has 4 layers, so expected an integer from -5 to 4"),
    ({"vision_feature_layer": [-2, 9]}, "layer 9 is out of range"),
    ({"vision_feature_layer": []}, "vision_feature_layer is an empty list; give one layer or several, such as -2"),
    ({"vision_feature_layer": "last"}, "'vision_feature_layer' .*'last'.*int"),
    ({"image_size": 30}, "image_size is 30, which is no multiple of the tower's patches of 8 pixels. .* 32"),
    ({"image_size": 0}, "image_size is 0; expected a number of pixels"),
    ({"image_size": "32"}, "'image_size' .*'32'.*int"),
    ({"projector_config": {"type": "mlp", "hidden_size": 0}}, "needs hidden_size as an integer of at least 1, got 0"),
    ({"projector_config": {"hidden_act": "gleu"}}, "does not know hidden_act='gleu'"),
    (
        {"projector_type": "qformer", "qformer_hidden_size": 32, "projector_config": {"num_attention_heads": 5}},
        "cannot split qformer_hidden_size=32 into num_attention_heads=5 heads",
    ),
    ({"load_4bit": True, "load_8bit": True}, "load_4bit and load_8bit are both set; .* Leave one out"),
    ({"dtype": "brain16"}, "dtype is 'brain16'; expected a floating-point dtype of PyTorch or its name"),
    ({"projector_config": {"path": "nowhere.bin"}}, "There is no projector file nowhere.bin. Give the path of"),
    ({"mm_vision_tower": "/nowhere/tower"}, "/nowhere/tower does not exist: expected a folder with a model"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_a_setting_is_told_while_assembling(without_weights, settings, message):
    if "mm_vision_tower" not in settings:
        settings = {"mm_vision_tower": without_weights["clip"], **settings}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(without_weights["lm"], **settings)


@pytest.mark.parametrize(
    "settings, message",
    [entry for entry in SETTINGS if entry[0] != {"encoder_type": "sglip"}],
    ids=[str(settings) for settings, _ in SETTINGS if settings != {"encoder_type": "sglip"}],
)
def test_a_setting_is_told_of_a_checkpoint(without_weights, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(without_weights["model"], **settings)


def test_a_class_token_where_there_is_none(without_weights):
    with pytest.raises(ValueError, match="is 'cls', but a siglip_vision_model tower has no class token. Use 'default'"):
        load(without_weights["lm"], mm_vision_tower=without_weights["siglip"], vision_feature_select_strategy="cls")
    with pytest.raises(ValueError, match="siglip_vision_model tower has no class token"):
        load(without_weights["model"], mm_vision_tower=without_weights["siglip"], vision_feature_select_strategy="cls")


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_a_class_token_where_an_unnamed_tower_has_none(parts, lm, kind):
    with pytest.raises(ValueError, match="tower has no class token"):
        load(lm, mm_vision_tower=parts.vision_tower(kind), vision_feature_select_strategy="cls")


@pytest.mark.parametrize("encoder_type", ["clip", "dinov2", "vit", "biomedclip"])
def test_an_encoder_that_the_towers_config_contradicts(without_weights, encoder_type):
    with pytest.raises(ValueError, match=f"encoder_type is '{encoder_type}', but "):
        load(without_weights["lm"], mm_vision_tower=without_weights["siglip"], encoder_type=encoder_type)
    with pytest.raises(ValueError, match=f"encoder_type is '{encoder_type}', but "):
        load(without_weights["model"], mm_vision_tower=without_weights["siglip"], encoder_type=encoder_type)


@pytest.mark.parametrize("wrong", [["a"], 3, dict, print, Ellipsis], ids=["list", "int", "class", "function", "dots"])
def test_a_configuration_object_of_a_wrong_type(wrong):
    with pytest.raises(TypeError, match="The configuration is .*expected") as caught:
        load(wrong)
    assert type(wrong).__name__ in str(caught.value) or wrong.__name__ in str(caught.value)
    for name in ("custom_vision_config", "projector_config"):
        with pytest.raises(TypeError, match=f"{name} is .*expected"):
            load("some/model", **{name: wrong})


# ---------------------------------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("settings", [
    {"device": "cuda"}, {"device": "cuda:1"}, {"device": torch.device("cuda")}, {"device": 0},
    {"device_map": "cuda"}, {"device_map": {"": "cuda:0"}}, {"device_map": {"model": "cpu", "lm_head": 0}},
], ids=str)  # fmt: skip
def test_cuda_where_there_is_none(without_weights, settings):
    (name,) = settings
    message = (
        f"{name} is .*, but this machine has no CUDA device that PyTorch can use. Use {name}='cpu', or leave it out"
    )
    for folder in (without_weights["model"], without_weights["lm"]):
        with pytest.raises(ValueError, match=message):
            load_pretrained_model(folder, mm_vision_tower=without_weights["clip"], **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_cuda_device_beyond_the_last(without_weights):
    with pytest.raises(ValueError, match=r"this machine has \d+ CUDA device"):
        load_pretrained_model(without_weights["model"], device="cuda:99")


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "", 1.5, object])
def test_a_device_that_is_none(without_weights, device):
    with pytest.raises(ValueError, match="which is no device. Expected such as 'cpu', 'cuda' or 'cuda:0'"):
        load_pretrained_model(without_weights["model"], device=device)


def test_a_device_map_that_is_none(without_weights):
    with pytest.raises(ValueError, match="device_map is 'atuo', which is no device. .*or one of auto, balanced"):
        load_pretrained_model(without_weights["model"], device_map="atuo")
    with pytest.raises(ValueError, match="device is 'cpu' and device_map is 'auto'; give one of the two"):
        load_pretrained_model(without_weights["model"], device="cpu", device_map="auto")


# ---------------------------------------------------------------------------------------------------------------------
# Paths and folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "../nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_path_that_does_not_exist(lm, path):
    message = "does not exist: expected a folder with a model, or a Hub id such as 'owner/name'"
    with pytest.raises(FileNotFoundError, match=message):
        load(path)
    with pytest.raises(FileNotFoundError, match=message):
        load(lm, mm_vision_tower=path)


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_a_name_that_is_neither_a_folder_nor_to_be_had_from_the_hub(lm, name):
    message = (
        f"There is no folder '{name}', and no config.json of a Hub repository of that name could be had.*check the id"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load(name)
    with pytest.raises(FileNotFoundError, match=message):
        load(lm, mm_vision_tower=name)


def test_the_default_tower_that_cannot_be_had(lm):
    with pytest.raises(FileNotFoundError, match="There is no folder 'openai/clip-vit-large-patch14'.*connection"):
        load(lm)


def test_a_file_where_a_folder_is_expected(lm, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("no model")
    with pytest.raises(FileNotFoundError, match="file.txt is a file: expected a folder with a model"):
        load(path)
    with pytest.raises(FileNotFoundError, match="file.txt is a file: expected a folder with a model"):
        load(lm, mm_vision_tower=path)


def test_a_folder_that_is_no_model(lm, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        ValueError, match=r"folder is no model: it has no config.json. It holds: nothing. Expected what"
    ):
        load(tmp_path / "folder")
    (tmp_path / "folder/readme.md").write_text("no model")
    for settings in ({"model_path": tmp_path / "folder"}, {"model_path": lm, "mm_vision_tower": tmp_path / "folder"}):
        with pytest.raises(
            ValueError, match=r"is no model: it has no config.json. It holds: readme.md. Expected what sa"
        ):
            load(settings)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json is no valid JSON .* Save or download the model again"),
        ("[]", "config.json holds a list; expected a JSON object"),
        (
            "{}",
            "config.json of .* does not tell what the model is: its model_type is None. Expected what save_pretrained",
        ),
        ('{"model_type": 3}', "its model_type is 3"),
        ('{"model_type": "nonesuch"}', "'nonesuch' model, which transformers .* does not have"),
    ],
)
def test_a_config_that_says_nothing(lm, tmp_path, content, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text(content)
    for settings in ({"model_path": tmp_path / "folder"}, {"model_path": lm, "mm_vision_tower": tmp_path / "folder"}):
        with pytest.raises(ValueError, match=message):
            load(settings)


def test_a_checkpoint_whose_config_is_damaged(parts, checkpoint, tmp_path):
    folder = parts.copy(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("text_config", {"model_type": "llama", "hidden_size": "x"}, "text_config does not describe a 'llama' model"),
        ("vision_config", {"model_type": "nonesuch"}, "vision_config.model_type is 'nonesuch'"),
        ("projector_config", "mlp", "'projector_config'"),
        ("encoder_type", "dinov2", "encoder_type is 'dinov2', but"),
        ("image_token_id", 10**6, "image_token_id is 1000000, but the language model's vocabulary has 513 rows"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=message):
            load(folder)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_a_checkpoint_whose_config_lacks_a_part(without_weights, key):
    """A default in its place would be a model of 7B parameters."""
    config = json.loads((without_weights["model"] / "config.json").read_text())
    del config[key]
    (without_weights["model"] / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"config.json of .* has no {key}, so that it does not tell what the model is made"
    ):
        load(without_weights["model"])


@pytest.mark.parametrize(
    "change", [{"hidden_size": "large"}, {"num_attention_heads": 7}, {"rope_parameters": 3}], ids=str
)
def test_a_language_models_config_that_makes_no_sense(without_weights, change):
    path = without_weights["lm"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="config.json of .*bare/lm does not describe a 'llama' model .*Expected what"):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"])


@pytest.mark.parametrize("change", [{"hidden_size": "large"}, {"patch_size": 0}, {"num_hidden_layers": {}}], ids=str)
def test_a_towers_config_that_makes_no_sense(without_weights, change):
    path = without_weights["clip"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"vision_config": config["vision_config"] | change}))
    with pytest.raises(ValueError, match="does not describe a 'clip(_vision_model)?' (model|tower).*Expected"):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(without_weights, file):
    (without_weights["lm"] / file).write_text("{")
    with pytest.raises(
        ValueError, match="The tokenizer of .*bare/lm cannot be loaded .*Expected tokenizer.json and tok"
    ):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"])


@pytest.mark.parametrize("limit", ["abc", [3], True, -5, 0])
@pytest.mark.parametrize("part", ["lm", "model"])
def test_a_length_that_is_none(without_weights, part, limit):
    path = without_weights[part] / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
    with pytest.raises(
        ValueError, match=r"has model_max_length .*; expected a number of tokens, or take the field out"
    ):
        load(without_weights[part], **({"mm_vision_tower": without_weights["clip"]} if part == "lm" else {}))


def test_a_language_model_without_a_tokenizer(without_weights):
    for path in without_weights["lm"].glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"The tokenizer of .*bare/lm cannot be loaded .*moellava\[sentencepiece\]"):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"])


def test_a_processor_that_asks_for_code_is_not_given_any(without_weights):
    """transformers would ask on the terminal whether to run it."""
    folder = without_weights["model"]
    path = folder / "processor_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}))
    (folder / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('EXECUTED').touch()\n")
    with pytest.raises(FileNotFoundError, match="has no weights"):  # everything but the weights is there
        load(folder)
    assert not list(folder.rglob("EXECUTED"))


def test_a_processor_of_another_model(without_weights):
    path = without_weights["model"] / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_image_tokens": 9}))
    with pytest.raises(ValueError, match="makes 9 tokens of a picture, its model 16. Save the processor and the model"):
        load(without_weights["model"])


def test_a_checkpoint_without_its_processor(parts, checkpoint, tmp_path):
    folder = parts.copy(checkpoint, tmp_path / "model")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    with pytest.raises(
        ValueError, match="processor of .*model cannot be loaded .*Expected processor_config.json and the"
    ):
        load(folder)


def test_a_tower_without_an_image_processor(parts, lm, clip, tmp_path):
    folder = parts.copy(clip, tmp_path / "tower")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="tower has no image processor .*Expected a preprocessor_config.json beside"):
        load(lm, mm_vision_tower=folder)


# ---------------------------------------------------------------------------------------------------------------------
# Parts that are something else
# ---------------------------------------------------------------------------------------------------------------------


def test_a_language_model_as_a_tower(without_weights):
    with pytest.raises(
        ValueError, match="is a 'llama' language model, not a vision tower. Give a CLIP, SigLIP, DINOv2"
    ):
        load(without_weights["lm"], mm_vision_tower=without_weights["lm"])
    with pytest.raises(ValueError, match="is a 'llama' language model, not a vision tower"):
        load(without_weights["model"], mm_vision_tower=without_weights["lm"])


@pytest.mark.parametrize("kind", ["clip", "clip_vision", "siglip", "dinov2", "vit"])
def test_a_tower_as_a_language_model(parts, clip, kind):
    message = (
        "is a '.*' model, which is no causal language model. Expected a decoder .*give a vision tower as mm_vision"
    )
    with pytest.raises(ValueError, match=message):
        load(parts.vision_tower(kind), mm_vision_tower=clip)


def test_an_open_clip_checkpoint_as_a_language_model(parts, clip):
    with pytest.raises(
        ValueError, match="biomedclip is no model: it has no config.json. It holds: open_clip_config.json"
    ):
        load(parts.biomedclip(), mm_vision_tower=clip)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            RecurrentGemmaConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, lru_width=16),
            "A recurrent_gemma language model .*: its own class computes the logits in a way that this package",
        ),
        (MambaConfig(hidden_size=16, num_hidden_layers=1), "A mamba .*: its own class could not be run for comparison"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_language_model_whose_logits_would_be_others(without_weights, config, reason):
    folder = without_weights["lm"]
    config.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=reason):
        load(folder, mm_vision_tower=without_weights["clip"])


def test_a_model_base_that_nothing_is_an_adapter_of(lm, clip):
    with pytest.raises(
        ValueError, match="model_base is given, but .* is no LoRA adapter: it has no adapter_config.json"
    ):
        load(lm, model_base=lm, mm_vision_tower=clip)


# ---------------------------------------------------------------------------------------------------------------------
# Extras
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["load_4bit", "load_8bit"])
def test_bitsandbytes_is_an_extra(without_weights, monkeypatch, option):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=rf"{option} needs bitsandbytes, .*`pip install moellava\[quantized\]`"):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"], **{option: True})


def test_peft_is_an_extra(without_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"A LoRA adapter needs PEFT.*pip install moellava\[peft\]"):
        load(without_weights["lm"], model_base=without_weights["lm"])


def test_timm_is_an_extra(parts, without_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"timm, which is not installed: `pip install moellava\[biomedclip\]`"):
        load(without_weights["lm"], mm_vision_tower=parts.biomedclip())


def test_what_needs_no_extra_does_without(lm, clip, monkeypatch):
    for name in ("bitsandbytes", "peft", "timm", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load(lm, mm_vision_tower=clip).model.config.encoder_type == "clip"


# ---------------------------------------------------------------------------------------------------------------------
# Weight files
# ---------------------------------------------------------------------------------------------------------------------

# Which part, and a weight in it that the model uses.
PARTS = {
    "language model": "model.layers.0.mlp.up_proj.weight",
    "vision tower": "vision_model.encoder.layers.1.mlp.fc1.weight",
    "checkpoint": "model.language_model.layers.0.mlp.up_proj.weight",
}


@pytest.fixture(params=PARTS)
def damageable(request, parts, lm, clip, checkpoint, tmp_path):
    """A copy of one part; a function that loads the model with it; the name of a weight in it."""
    folder = parts.copy(
        {"language model": lm, "vision tower": clip, "checkpoint": checkpoint}[request.param], tmp_path / "part"
    )
    settings = {
        "language model": {"model_path": folder, "mm_vision_tower": clip},
        "vision tower": {"model_path": lm, "mm_vision_tower": folder},
        "checkpoint": {"model_path": folder},
    }[request.param]  # fmt: skip
    return folder, lambda: load(settings), PARTS[request.param]


def as_bin(folder: Path) -> Path:
    """Saves a folder's weights again as torch.save does, and returns that file."""
    tensors = read_weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_undamaged_bin_files_load(damageable):
    folder, load_it, _ = damageable
    as_bin(folder)
    assert load_it().model.config.encoder_type == "clip"


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_a_truncated_safetensors_file(damageable, kept):
    folder, load_it, _ = damageable
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    message = (
        "part/model.safetensors cannot be read as safetensors .*: it is truncated or damaged. Save or download it again"
    )
    with pytest.raises(ValueError, match=message):
        load_it()


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_bin_file(damageable, kept):
    folder, load_it, _ = damageable
    path = as_bin(folder)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    message = (
        "part/pytorch_model.bin cannot be read as a file of tensors .*: it is truncated, damaged, or no weight file"
    )
    with pytest.raises(ValueError, match=message) as caught:
        load_it()
    assert "weights_only" not in str(caught.value)  # torch's advice to load it unsafely is not passed on


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is some text\n" * 20, b"<!DOCTYPE html><html></html>", bytes(500)]
)
def test_a_bin_file_that_is_something_else(damageable, content):
    folder, load_it, _ = damageable
    as_bin(folder).write_bytes(content)
    with pytest.raises(ValueError, match="part/pytorch_model.bin (cannot be read as a file of tensors|holds)"):
        load_it()


@pytest.mark.parametrize("content", [[torch.zeros(2)], 3, {"a": 1}, {1: torch.zeros(2)}], ids=repr)
def test_a_bin_file_without_named_tensors(damageable, content):
    folder, load_it, _ = damageable
    torch.save(content, as_bin(folder))
    with pytest.raises(ValueError, match="part/pytorch_model.bin holds .*expected a state dict, from names to tensors"):
        load_it()


class Payload:
    """Stands for code in a pickle: it would leave a file if it was ever run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("raw", [False, True], ids=["torch.save", "pickle"])
def test_code_in_a_bin_file_is_refused_and_not_run(damageable, tmp_path, raw):
    folder, load_it, name = damageable
    path, trace = as_bin(folder), tmp_path / "EXECUTED"
    if raw:
        path.write_bytes(pickle.dumps({name: Payload(trace)}, protocol=2))
    else:
        torch.save({name: Payload(trace)}, path)
    message = "holds Python objects other than tensors, which are never loaded, since they could run code"
    with pytest.raises(ValueError, match=message) as caught:
        load_it()
    assert "pytorch_model.bin" in str(caught.value) and "Convert it to safetensors" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_weight_of_a_wrong_shape(damageable, suffix):
    folder, load_it, name = damageable
    path = folder / "model.safetensors"
    tensors = read_weights(path)
    shape = tuple(tensors[name].shape)
    tensors[name] = tensors[name][:, :-1].contiguous()
    if suffix == "bin":
        torch.save(tensors, as_bin(folder))
    else:
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="another shape than the config says") as caught:
        load_it()
    message = str(caught.value)
    assert f"{name.rpartition('layers')[2]} is {(shape[0], shape[1] - 1)}, expected {shape}" in message
    assert "save or download them again" in message


def test_a_weight_that_is_missing(damageable):
    folder, load_it, name = damageable
    tensors = read_weights(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weight\(s\) are missing from .*A file is incomplete") as caught:
        load_it()
    assert name.rpartition("layers")[2] in str(caught.value)


def test_a_tower_whose_file_holds_none_of_its_weights(parts, lm, clip, tmp_path):
    folder = parts.copy(clip, tmp_path / "tower")
    save_file({"text_model.x": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="has no weights of a vision tower: expected names that begin with 'vision_model"
    ):
        load(lm, mm_vision_tower=folder)


@pytest.mark.parametrize(
    "index, error, message",
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, ValueError, "names '../outside.safetensors'; .*plain name"),
        ({"weight_map": {"a": "/etc/passwd"}}, ValueError, "names '/etc/passwd'; .*Nothing outside the folder is read"),
        ({"weight_map": {"a": "sub/a.safetensors"}}, ValueError, "names 'sub/a.safetensors'; expected the plain name"),
        ({"weight_map": {"a": ".."}}, ValueError, "names '..'; expected the plain name"),
        ({"weight_map": {"a": ""}}, ValueError, "names ''; expected the plain name"),
        ({"weight_map": {"a": "gone-00001-of-00002.safetensors"}}, FileNotFoundError, "lacks gone-00001-of-00002.saf"),
        ({"weight_map": {}}, ValueError, "has no weight_map from weights to files"),
        ({"weight_map": ["a"]}, ValueError, "has no weight_map from weights to files"),
        ({}, ValueError, "has no weight_map from weights to files"),
        ([], ValueError, "index.json holds a list; expected a JSON object"),
    ],
    ids=str,
)  # fmt: skip
def test_an_index_of_shards(damageable, tmp_path, index, error, message):
    folder, load_it, name = damageable
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message) as caught:
        load_it()
    assert "model.safetensors.index.json" in str(caught.value)


def test_an_open_clip_file(parts, lm, tmp_path):
    folder = parts.copy(parts.biomedclip(weights="safetensors"), tmp_path / "tower")
    path = folder / "open_clip_model.safetensors"
    tensors, content = read_weights(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="open_clip_model.safetensors cannot be read as safetensors .*truncated"):
        load(lm, mm_vision_tower=folder)
    name = "visual.trunk.blocks.1.mlp.fc1.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight has the shape \(384, 191\), expected \(384, 192\)"):
        load(lm, mm_vision_tower=folder)


# ---------------------------------------------------------------------------------------------------------------------
# Projector files
# ---------------------------------------------------------------------------------------------------------------------


def mlp(**changes) -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (64, 48), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)} | changes
    return {f"model.mm_projector.{name}": torch.ones(shape) for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "weights, fields, faults",
    [
        (mlp(**{"0.weight": (64, 47)}), {}, ["linear_1.weight is (64, 47), expected (64, 48)"]),
        (mlp(**{"2.weight": (63, 64)}), {}, ["linear_2.weight is (63, 64), expected (64, 64)"]),
        (mlp(**{"2.bias": None}), {}, ["missing linear_2.bias (64,)"]),
        (mlp(**{"4.weight": (64, 64), "4.bias": (64,)}), {"num_hidden_layers": 2}, ["unexpected linear_3.bias (64,)"]),
        (mlp(), {"num_hidden_layers": 3}, ["missing linear_3.weight (64, 64)", "missing linear_3.bias (64,)"]),
        (mlp(), {"hidden_size": 32}, ["linear_1.weight is (64, 48), expected (32, 48)"]),
        (mlp(), {"type": "linear"}, ["missing linear.weight (64, 48)", "unexpected 0.weight (64, 48)"]),
        (
            mlp(),
            {"type": "qformer", "qformer_hidden_size": 32, "num_query_tokens": 4},
            ["missing query_tokens (1, 4, 32)", "unexpected 2.bias (64,)"],
        ),
        ({"something.else": torch.ones(3)}, {}, ["missing linear_1.weight (64, 48)", "unexpected something.else (3,)"]),
    ],
)  # fmt: skip
def test_a_projector_file_that_does_not_fit(lm, clip, checkpoint, tmp_path, weights, fields, faults, suffix):
    """Every key and shape that does not fit is named, and the kind and widths that were expected."""
    path = tmp_path / f"projector{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    for settings in ({"model_path": lm, "mm_vision_tower": clip}, {"model_path": checkpoint}):
        with pytest.raises(
            ValueError, match=f"projector{suffix} does not fit a '.*' projector from 48 to 64: "
        ) as caught:
            load(settings, projector_config={"path": path, **fields})
        for fault in faults:
            assert fault in str(caught.value)
        assert "Name the type and the fields of the projector that was saved, or give another file" in str(caught.value)


def test_a_projector_file_that_does_not_fit_is_told_before_any_other_weight_is_opened(without_weights, tmp_path):
    torch.save(mlp(**{"0.weight": (64, 47)}), tmp_path / "projector.bin")
    projector = {"path": tmp_path / "projector.bin"}
    with pytest.raises(ValueError, match="does not fit"):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"], projector_config=projector)
    with pytest.raises(ValueError, match="does not fit"):
        load(without_weights["model"], projector_config=projector)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.99])
def test_a_truncated_projector_file(lm, clip, tmp_path, suffix, kept):
    path = tmp_path / f"projector{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(mlp(), path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(
        ValueError, match=f"projector{suffix} cannot be read as .*truncated.* Save or download it again"
    ):
        load(lm, mm_vision_tower=clip, projector_config={"path": path})


def test_code_in_a_projector_file_is_refused_and_not_run(lm, clip, tmp_path):
    torch.save({"0.weight": Payload(tmp_path / "EXECUTED")}, tmp_path / "projector.bin")
    with pytest.raises(
        ValueError, match="projector.bin holds Python objects other than tensors, which are never loaded"
    ):
        load(lm, mm_vision_tower=clip, projector_config={"path": tmp_path / "projector.bin"})
    assert not (tmp_path / "EXECUTED").exists()


def test_a_projector_file_without_weights(lm, clip, tmp_path):
    torch.save({}, tmp_path / "projector.bin")
    with pytest.raises(
        ValueError, match="projector.bin holds no weights of a projector. Expected what a trainer saves"
    ):
        load(lm, mm_vision_tower=clip, projector_config={"path": tmp_path / "projector.bin"})


@pytest.mark.parametrize("path", ["nowhere.bin", "/nowhere/projector.safetensors", "."])
def test_a_projector_file_that_does_not_exist(without_weights, path):
    with pytest.raises(FileNotFoundError, match="There is no projector file .*Give the path of a .safetensors or .bin"):
        load(without_weights["lm"], mm_vision_tower=without_weights["clip"], projector_config={"path": path})


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and placeholders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, images, message",
    [
        (PROMPT, 2, "The text has 1 <image> placeholder.*, but 2 picture"),
        (PROMPT + "<image><image>", 1, "The text has 3 <image> placeholder.*, but 1 picture"),
        ("no placeholder", 1, "The text has 0 <image> placeholder.*, but 1 picture"),
        (PROMPT, 0, "The text has 1 <image> placeholder.*, but 0 picture"),
        ([PROMPT, PROMPT], [[0], [0, 0]], "Row 1 of the text has 1 <image> placeholder.*, but 2 picture"),
    ],
)  # fmt: skip
def test_numbers_of_pictures_and_placeholders_that_differ(loaded, text, images, message):
    if isinstance(images, int):
        images = [picture(index) for index in range(images)] or None
    else:
        images = [[picture(0) for _ in row] for row in images]
    with pytest.raises(ValueError, match=message):
        loaded.model.processor(images=images, text=text, return_tensors="pt")


@pytest.mark.parametrize("tokens, pictures", [(15, 1), (17, 1), (16, 2), (0, 1)])
def test_numbers_of_features_and_tokens_that_differ(loaded, tokens, pictures):
    ids = torch.tensor([[1] + [loaded.model.config.image_token_id] * tokens + [2]])
    message = (
        f"The prompt has {tokens} image tokens, but the pictures give {16 * pictures} features: {pictures} pictures"
    )
    with pytest.raises(ValueError, match=message) as caught:
        loaded.model(input_ids=ids, pixel_values=torch.zeros(pictures, 3, 32, 32))
    assert "Let the processor prepare text and pictures together" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n and then nothing"], ids=["empty", "text", "cut off"]
)
def test_a_picture_that_cannot_be_decoded(loaded, tmp_path, content):
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Picture 0 .*scan.png"):
        loaded.model.processor(images=str(path), text=PROMPT, return_tensors="pt")


def test_a_truncated_picture(loaded, tmp_path):
    path = tmp_path / "scan.png"
    picture(0).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="Picture 1 .*scan.png"):
        loaded.model.processor(images=[picture(0), path], text=PROMPT + "<image>", return_tensors="pt")


def test_a_picture_that_does_not_exist(loaded):
    with pytest.raises(FileNotFoundError, match="Picture 0: there is no file 'nowhere.png'"):
        loaded.model.processor(images="nowhere.png", text=PROMPT, return_tensors="pt")


def test_something_that_is_no_picture(loaded):
    with pytest.raises(TypeError, match="Picture 0"):
        loaded.model.processor(images=[3.5], text=PROMPT, return_tensors="pt")


def test_ids_and_embeddings(loaded):
    model, ids = loaded.model, torch.ones(1, 3, dtype=torch.long)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="Give exactly one of input_ids and inputs_embeds"):
            model(**inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def test_saving_to_a_file(loaded, tmp_path):
    (tmp_path / "file").write_text("something dear")
    with pytest.raises(NotADirectoryError, match="file is a file; a checkpoint is saved into a folder"):
        loaded.model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "something dear"


def test_a_save_that_fails_leaves_no_half_checkpoint(loaded, tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    loaded.model.processor = Full()
    with pytest.raises(OSError, match="No space left"):
        loaded.model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["working"]


def test_no_error_leaves_a_file_beside_the_parts(parts, lm, clip, checkpoint, caplog):
    before = files_below(lm) | files_below(clip) | files_below(checkpoint)
    caplog.set_level(logging.CRITICAL)
    for settings, _ in SETTINGS:
        for folder in (lm, checkpoint):
            with pytest.raises((ValueError, FileNotFoundError)):
                load(folder, **{"mm_vision_tower": clip, **settings})
    assert files_below(lm) | files_below(clip) | files_below(checkpoint) == before
