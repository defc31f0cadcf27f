# SPDX-License-Identifier: Apache-2.0
"""`inspect_checkpoint`: what it tells is what the loaded model is, and it neither loads weights nor runs code."""

import dataclasses
import http.server
import json
import math
import re
import resource
import shutil
import struct
import sys
import threading

import pytest
import torch
from parts import run_python
from safetensors.torch import load_file, save_file

from moellava import MoellavaConfig, MoellavaForCausalLM, inspect_checkpoint, load_pretrained_model


# language model, vision tower, what else load_pretrained_model gets
COMBINATIONS = {
    "llama-clip-mlp": ("llama", "clip", {}),
    "granite-siglip-qformer": (
        "granite",  # its head is the embedding
        "siglip",
        {"projector_type": "qformer", "qformer_hidden_size": 32, "num_query_tokens": 4, "dtype": "bfloat16"},
    ),
    "mixtral-dinov2-perceiver": (
        "mixtral",
        "dinov2_registers",
        {"projector_type": "perceiver", "latent_dim": 32, "num_latents": 4, "vision_feature_layer": [-2, -3]},
    ),
    "phi-swin-linear": ("phi", "swin", {"projector_type": "linear", "vision_feature_layer": -1}),
    "bloom-vit-identity": ("bloom", "vit", {"projector_type": "identity"}),
}


def assembled(parts, family, tower, **options):
    return load_pretrained_model(
        str(parts.language_model(family)), vision_tower=str(parts.vision_tower(tower)), device="cpu", **options
    ).model


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected") / "my-model"
    assembled(parts, "llama", "clip").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_numbers_are_those_of_the_loaded_model(parts, tmp_path, name):
    family, tower, options = COMBINATIONS[name]
    width = json.loads((parts.vision_tower(tower) / "config.json").read_text()).get("hidden_size")
    overrides = {"overrides": {"hidden_size": width}} if options.get("projector_type") == "identity" else {}
    model = load_pretrained_model(
        str(parts.language_model(family, **overrides)),
        vision_tower=str(parts.vision_tower(tower)),
        device="cpu",
        **options,
    ).model
    model.save_pretrained(tmp_path / "model")
    summary = inspect_checkpoint(tmp_path / "model")

    assert summary.parameters.total == model.num_parameters()
    modules = {
        "vision_tower": model.model.vision_tower,
        "multi_modal_projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
    }
    found = {part.name: part for part in summary.parts}
    for part, module in modules.items():
        own = list(module.parameters())
        assert found[part].parameters.total == sum(p.numel() for p in own)
        assert found[part].bytes.memory >= sum(p.numel() * p.element_size() for p in own)  # swin has buffers
    tied = model.config.tie_word_embeddings
    assert found["lm_head"].parameters.total == (0 if tied else sum(p.numel() for p in model.lm_head.parameters()))
    assert ("tied" in found["lm_head"].type) == tied

    assert summary.bytes.disk == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert summary.dtype == str(model.dtype).removeprefix("torch.")
    assert summary.tokens_per_image == model.config.image_seq_length
    assert summary.encoder.type == model.config.encoder_type
    assert summary.encoder.image_size == summary.image_size == model.model.encoder.image_size
    assert summary.encoder.feature_size == model.model.encoder.feature_size
    assert summary.encoder.num_features == model.model.encoder.num_selected_tokens
    assert summary.encoder.num_hidden_layers == model.model.encoder.num_hidden_layers
    assert summary.projector.type == model.config.projector_config.type
    assert summary.projector.fields == model.config.projector_config.fields
    text = model.config.text_config
    assert (summary.language_model.model_type, summary.language_model.vocab_size) == (family, text.vocab_size)
    assert summary.language_model.num_hidden_layers == text.num_hidden_layers
    assert found["language_model"].source == parts.language_model(family, **overrides).name
    assert found["vision_tower"].source == parts.vision_tower(tower).name
    assert summary.own_code == [] and summary.quantization is None
    assert json.loads(json.dumps(summary.to_dict())) == summary.to_dict()


def test_the_shapes_are_those_in_the_file(checkpoint):
    summary = inspect_checkpoint(checkpoint)
    for part in summary.parts:
        assert part.parameters.total == sum(group.count * math.prod(group.shape) for group in part.groups)
    language = {group.name: group for group in next(p for p in summary.parts if p.name == "language_model").groups}
    down = language["layers.*.mlp.down_proj.weight"]
    assert (down.shape, down.dtype, down.count) == ((64, 96), "float32", 4)
    assert language["embed_tokens.weight"].count == 1


def test_a_native_mixture_has_fewer_active_parameters(parts, tmp_path):
    assembled(parts, "mixtral", "clip").save_pretrained(tmp_path)
    summary = inspect_checkpoint(tmp_path)
    assert (summary.sparse.num_experts, summary.sparse.num_experts_per_tok, summary.sparse.layers) == (4, 2, [0, 1])
    an_expert = 3 * 64 * 96
    assert summary.parameters.total - summary.parameters.active == 2 * 2 * an_expert  # two layers, two of four experts


def test_a_dense_model_is_all_active(checkpoint):
    summary = inspect_checkpoint(checkpoint)
    assert summary.sparse is None
    assert summary.parameters.active == summary.parameters.total


def test_shards_and_bin_files_tell_the_same(checkpoint, tmp_path):
    whole = inspect_checkpoint(checkpoint)
    model = MoellavaForCausalLM.from_pretrained(checkpoint)

    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    sharded = inspect_checkpoint(tmp_path / "shards")
    assert sharded.bytes.disk == sum(path.stat().st_size for path in shards)

    shutil.copytree(checkpoint, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    pickled = inspect_checkpoint(tmp_path / "bin")

    for other in (sharded, pickled):
        assert other.parameters == whole.parameters
        assert [part.parameters for part in other.parts] == [part.parameters for part in whole.parts]
        assert [set(part.groups) for part in other.parts] == [set(part.groups) for part in whole.parts]
        assert other.bytes.memory == whole.bytes.memory


@pytest.mark.parametrize(("option", "dtype"), [("load_4bit", "nf4"), ("load_8bit", "int8")])
def test_quantised_weights_count_as_what_they_stand_for(checkpoint, tmp_path, option, dtype):
    pytest.importorskip("bitsandbytes")
    load_pretrained_model(checkpoint, device="cpu", **{option: True}).model.save_pretrained(tmp_path)
    summary, whole = inspect_checkpoint(tmp_path), inspect_checkpoint(checkpoint)
    assert summary.quantization == "bitsandbytes"
    assert [part.parameters for part in summary.parts] == [part.parameters for part in whole.parts]
    language, dense = summary.parts[2], whole.parts[2]
    assert [(group.name, group.shape) for group in language.groups] == [(g.name, g.shape) for g in dense.groups]
    assert {group.dtype for group in language.groups} == {dtype, "float32"}
    assert language.bytes.disk < dense.bytes.disk / 2
    # what load_pretrained_model keeps in full precision
    assert [part.bytes.memory for part in summary.parts[:2]] == [part.bytes.memory for part in whole.parts[:2]]


def test_a_checkpoint_larger_than_memory_is_inspected(tmp_path):
    config = MoellavaConfig()  # LLaVA-1.5 with a LLaMA of 7 billion parameters
    with torch.device("meta"):
        model = MoellavaForCausalLM(config)
    config.dtype = torch.float32
    config.save_pretrained(tmp_path)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(text)) + text)
    with weights.open("r+b") as file:
        file.truncate(8 + len(text) + end)  # a hole: the weights are there and take no room on the disk

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = inspect_checkpoint(tmp_path)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert summary.parameters.total == model.num_parameters() > 6_500_000_000
    assert summary.bytes.memory > 26 * 10**9
    assert summary.tokens_per_image == 576
    assert grown_kib < 500_000


OWN_PARTS = """
import torch
from torch import nn
from moellava import register_encoder, register_projector

@register_projector("gated_by_{name}")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size, flavour: str = "plain", bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size, bias=bias)
        self.gate = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, image_features):
        return self.linear(image_features) * self.gate(image_features).sigmoid()

@register_encoder("patches_by_{name}")
class PatchEncoder(nn.Module):
    def __init__(self, image_size: int = 32, width: int = 24):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, pixel_values):
        return self.patches(pixel_values).flatten(2).transpose(1, 2)
"""

ASSEMBLE_OWN = """
import sys
sys.path.insert(0, {folder!r})
import own_parts_of_a_user
from moellava import load_pretrained_model
for name, options in {models!r}.items():
    load_pretrained_model({language!r}, device="cpu", **options).model.save_pretrained(name)
"""


def test_parts_of_the_authors_own_are_inspected_without_their_code(parts, tmp_path):
    (tmp_path / "own_parts_of_a_user.py").write_text(OWN_PARTS.replace("{name}", "somebody"))
    models = {
        str(tmp_path / "projector"): {
            "vision_tower": str(parts.vision_tower("clip")),
            "projector_config": {"type": "gated_by_somebody", "flavour": "sweet"},
        },
        str(tmp_path / "encoder"): {"encoder_type": "patches_by_somebody"},
    }
    language = str(parts.language_model("llama"))
    run_python(ASSEMBLE_OWN.format(folder=str(tmp_path), models=models, language=language), block_moellava=False)

    # What a config from elsewhere may say, and what must not be acted on.
    path = tmp_path / "projector" / "config.json"
    fields = json.loads(path.read_text())
    for part in ("text_config", "vision_config"):
        fields[part] |= {
            "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
            "trust_remote_code": True,
            "attn_implementation": "evil-org/kernel",
        }
    path.write_text(json.dumps(fields))

    modules = set(sys.modules)
    summary = inspect_checkpoint(tmp_path / "projector")
    assert summary.own_code == ["projector 'gated_by_somebody'"]
    assert summary.projector.fields == {"flavour": "sweet", "bias": True}
    assert (summary.encoder.type, summary.encoder.feature_size, summary.tokens_per_image) == ("clip", 48, 16)
    assert next(part for part in summary.parts if part.name == "multi_modal_projector").parameters.total == 2 * 49 * 64

    summary = inspect_checkpoint(tmp_path / "encoder")
    assert summary.own_code == ["encoder 'patches_by_somebody'"]
    assert (summary.encoder.num_hidden_layers, summary.encoder.feature_size) == (None, None)
    assert (summary.image_size, summary.tokens_per_image) == (32, 16)
    assert summary.parts[0].parameters.total == 24 * (3 * 8 * 8 + 1)
    assert not [name for name in set(sys.modules) - modules if "custom" in name or "transformers_modules" in name]


class _Hub(http.server.BaseHTTPRequestHandler):
    """What of the Hub's protocol it takes to read `config.json` and the headers of weight files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.sent[self.path] = self.server.sent.get(self.path, 0) + len(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match = re.fullmatch(r"/me/my-model/resolve/main/(.+)", self.path)
        path = self.server.folder / match[1] if match else None
        if path is None or not path.is_file():
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        content, headers = path.read_bytes(), {"ETag": '"1"', "X_Repo_Commit": "0" * 40}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            self._answer(206, content[int(asked[1]) : int(asked[2]) + 1], **headers)
        else:
            self._answer(200, content, **headers)

    def do_POST(self):  # paths-info
        self.rfile.read(int(self.headers["Content-Length"]))
        files = sorted(self.server.folder.glob("*.safetensors"))
        entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
        self._answer(200, json.dumps(entries).encode(), Content_Type="application/json")


def test_of_a_checkpoint_on_the_hub_only_headers_are_fetched(parts, tmp_path):
    wide = {"overrides": {"intermediate_size": 4096}}  # so that the headers are a small part of the file
    model = load_pretrained_model(
        str(parts.language_model("llama", **wide)), vision_tower=str(parts.vision_tower("clip")), device="cpu"
    ).model
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder, server.sent = folder, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    code = "import json, moellava; print(json.dumps(moellava.inspect_checkpoint('me/my-model').to_dict()))"
    try:
        told = json.loads(run_python(code, block_moellava=False, env=environment))
    finally:
        server.shutdown()
        server.server_close()
    expected = inspect_checkpoint(folder).to_dict() | {"checkpoint": "me/my-model"}
    for summary in (told, expected):  # the order of the weights in the file is not told
        for part in summary["parts"]:
            part["groups"].sort(key=lambda group: group["name"])
    assert told == expected
    weights = sum(size for path, size in server.sent.items() if path.endswith(".safetensors"))
    assert 0 < weights <= 100_001 < (folder / "model.safetensors").stat().st_size / 10


def damage_config(folder):
    (folder / "config.json").write_text("{")


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def missing_shard(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unknown_text_model(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["model_type"] = "nobodys"
    (folder / "config.json").write_text(json.dumps(fields))


def somebodys_projector(folder):
    """Only its author's code could make a whole config of what is left."""
    fields = json.loads((folder / "config.json").read_text())
    fields["projector_config"] = {"type": "gated_by_somebody"}
    del fields["text_config"], fields["image_seq_length"]
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_config, ValueError, r"config\.json is no valid JSON"),
        (cut_weights, ValueError, r"model\.safetensors cannot be read as safetensors .* cut off or damaged"),
        (no_weights, FileNotFoundError, "has no weights"),
        (no_config, ValueError, r"is no model: it has no config\.json"),
        (missing_shard, FileNotFoundError, "lacks model-00001-of-00002"),
        (unknown_text_model, ValueError, "text_config.model_type is 'nobodys'"),
        (somebodys_projector, ValueError, "config of .* has no text_config, image_seq_length. Save or download"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(checkpoint, tmp_path, damage, error, message):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    damage(folder)
    with pytest.raises(error, match=message):
        inspect_checkpoint(folder)


def test_the_weights_tell_the_dtype_where_the_config_does_not(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    for part in (fields, fields["text_config"], fields["vision_config"]):
        del part["dtype"]
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = load_file(folder / "model.safetensors")
    halved = {name: tensor if name == "lm_head.weight" else tensor.half() for name, tensor in tensors.items()}
    mask = torch.ones(7, dtype=torch.bool)  # a dtype without a number in its name
    save_file(halved | {"model.vision_tower.mask": mask}, folder / "model.safetensors", {"format": "pt"})
    summary = inspect_checkpoint(folder)
    assert summary.dtype == "float16"
    (tower,) = (part for part in summary.parts if part.name == "vision_tower")
    assert [group for group in tower.groups if group.dtype == "bool"][0].shape == (7,)
    assert tower.bytes.disk == 7 + sum(t.nbytes for name, t in halved.items() if "vision_tower" in name)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_checkpoint(tmp_path / "nothing")


def test_a_model_of_another_kind(parts):
    with pytest.raises(ValueError, match="type 'llama', not a checkpoint of this package .* `moellava assemble`"):
        inspect_checkpoint(parts.language_model("llama"))


def test_a_misspelt_option(checkpoint):
    with pytest.raises(TypeError, match="revison"):
        inspect_checkpoint(checkpoint, revison="main")


def test_the_summary_cannot_be_changed(checkpoint):
    with pytest.raises(dataclasses.FrozenInstanceError):
        inspect_checkpoint(checkpoint).tokens_per_image = 1
