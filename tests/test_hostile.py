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
"""Checkpoints, weights, pictures and data made by an attacker, opened through every door that a user has.

Without `trust_remote_code=True` each has to be refused in clear words, or to do no harm; and whatever becomes of it, no
file outside of the checkpoint is opened, no connection made, no process started, no code run that lies in it. The doors
are opened by `hostile_doors.py`, whose audit hook sees that.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava import load_pretrained_model


HERE = Path(__file__).resolve().parent
EVIL_CODE = 'import pathlib\npathlib.Path(__file__).with_name("EXECUTED").touch()\nraise RuntimeError("executed")\n'
# How a checkpoint is loaded; the others look into it, or do something with it.
LOADERS = ("load_pretrained_model", "MoellavaForCausalLM", "AutoModelForImageTextToText")


# ---------------------------------------------------------------------------------------------------------------------
# What an attacker changes of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def edit(name: str, **changes: Any):
    """Changes fields of a JSON file of the checkpoint; `part__field` is a field of a part."""

    def change(folder: Path) -> None:
        path = folder / name
        fields = json.loads(path.read_text()) if path.is_file() else {}
        for key, value in changes.items():
            inner, *outer = reversed(key.split("__"))
            target = fields
            for step in reversed(outer):
                target = target[step]
            target[inner] = str(folder.parent / value[1:]) if isinstance(value, str) and value[:1] == "@" else value
        path.write_text(json.dumps(fields))

    return change


def config(**changes: Any):
    return edit("config.json", **changes)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def raw_config(part: str, text: str):
    """Puts text into config.json that json.dumps would not write."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        fields[part] = "@@"
        path.write_text(json.dumps(fields).replace('"@@"', text))

    return change


def write(name: str, content: str | bytes):
    """Puts a file into the checkpoint."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def both(*changes):
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def sharded(shard: str, suffix: str = "safetensors"):
    """Names a shard in an index that takes the place of the weights; `@` stands for the folder above."""

    def change(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        name = str(folder.parent / shard[1:]) if shard[0] == "@" else shard
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))

    return change


def index_of(weight_map: Any):
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def header(rewrite):
    """Changes the header of model.safetensors: `rewrite` gets its entries and returns entries, text, or the file."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        new = rewrite(entries)
        if isinstance(new, bytes):
            path.write_bytes(new)
            return
        text = (new if isinstance(new, str) else json.dumps(new)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return change


def first(entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Changes the first tensor's entry."""
    name = next(name for name in entries if name != "__metadata__")
    return entries | {name: entries[name] | changes}


def twice(entries: dict[str, Any]) -> str:
    """The first tensor's name twice, the second time with another place."""
    name = next(name for name in entries if name != "__metadata__")
    return json.dumps(entries)[:-1] + f', "{name}": {json.dumps(entries[name] | {"dtype": "I8"})}}}'


class Payload:
    """Code in a pickle: it would leave a file where it was run."""

    def __reduce__(self):
        return (os.mkdir, ("EXECUTED",))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.weight": Payload()}, folder / "pytorch_model.bin")


def linked(name: str):
    """Puts a symbolic link in the place of a file: it leads to the same file of another folder."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder.parent / "outside" / name)

    return change


FOREIGN = {
    "auto_map": {key: "evil.Evil" for key in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")},
    "trust_remote_code": True,
    "_name_or_path": "@outside",
    "_attn_implementation_internal": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_experts_implementation_internal": "evil/kernel",
}
ELSEWHERE = {"auto_map": {"AutoConfig": "evil/repo--evil.Evil", "AutoProcessor": "evil/repo--evil.Evil"}}
EVIL = write("evil.py", EVIL_CODE)
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "@outside",
    "r": 2,
    "target_modules": ["q_proj"],
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
}
HUGE = 10**9

CASES = {
    # names of other repositories and of code
    "auto_map": both(EVIL, config(**FOREIGN)),
    "auto_map of another repository": config(**ELSEWHERE),
    "auto_map of the text": both(EVIL, config(**{f"text_config__{key}": value for key, value in FOREIGN.items()})),
    "auto_map of the tower": both(EVIL, config(**{f"vision_config__{key}": value for key, value in FOREIGN.items()})),
    "auto_map of the projector": both(EVIL, config(**{f"projector_config__{k}": v for k, v in FOREIGN.items()})),
    "parts elsewhere": config(parts={"language_model": "@outside", "vision_tower": "/etc/passwd"}),
    "older name of the tower": config(mm_vision_tower="@outside"),
    "dotted projector": config(projector_config__type="os.system"),
    "dotted encoder": config(encoder_type="evil.Encoder"),
    "path as projector": config(projector_config__type="../evil"),
    "projector of its own": both(
        config(projector_config__type="evil"),
        write("moellava_custom.py", f'{EVIL_CODE}PROJECTORS.register("evil")(Evil)\n'),
    ),
    "text of an unknown type": both(EVIL, config(text_config__model_type="evil")),
    "text of our own type": config(text_config__model_type="moellava"),
    "tower of timm's hub": config(
        vision_config={"model_type": "timm_backbone", "backbone": "hf-hub:evil/repo", "use_pretrained_backbone": True},
        encoder_type="auto",
    ),
    "tower with a backbone": config(
        vision_config={"model_type": "dpt", "backbone": "evil/repo", "use_pretrained_backbone": True},
        encoder_type="auto",
    ),
    "weights elsewhere": config(transformers_weights="../outside/model.safetensors"),
    "absolute weights elsewhere": config(transformers_weights="@outside/model.safetensors"),
    "weights of the text elsewhere": config(text_config__transformers_weights="../outside/model.safetensors"),
    "quantised by an unknown method": config(quantization_config={"quant_method": "evil.Quantizer"}),
    "quantised by kernels of the Hub": config(quantization_config={"quant_method": "mxfp4"}),
    "quantised with a path": config(quantization_config={"quant_method": "gptq", "bits": 4, "tokenizer": "@outside"}),
    "quantization_config is a list": config(quantization_config=[1]),
    "quantised text": config(text_config__quantization_config={"quant_method": "mxfp4"}),
    "architectures": config(architectures=["os.system"]),
    "adapter beside it": edit("adapter_config.json", **ADAPTER),
    "custom_generate": both(
        edit("generation_config.json", custom_generate="evil/repo", trust_remote_code=True),
        write("custom_generate/generate.py", EVIL_CODE),
    ),
    "processor class": both(EVIL, edit("processor_config.json", processor_class="evil.Evil", **ELSEWHERE)),
    "processor's auto_map": both(EVIL, edit("processor_config.json", auto_map={"AutoProcessor": "evil.Evil"})),
    "image processor's auto_map": both(
        EVIL, edit("processor_config.json", image_processor__auto_map={"AutoImageProcessor": "evil.Evil"})
    ),
    "dotted image processor": edit("processor_config.json", image_processor__image_processor_type="os.system"),
    "image processor of another kind": edit("processor_config.json", image_processor__image_processor_type="LlamaModel"),
    "preprocessor_config": both(
        EVIL,
        edit("preprocessor_config.json", image_processor_type="evil.Evil", auto_map={"AutoImageProcessor": "evil.Evil"}),
    ),
    "audio tokenizer elsewhere": edit(
        "processor_config.json",
        audio_tokenizer={"audio_tokenizer_class": "CLIPVisionModel", "audio_tokenizer_name_or_path": "@outside/tower"},
    ),
    "audio tokenizer of the Hub": write(
        "audio_tokenizer_config.json",
        '{"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/repo"}',
    ),
    "tokenizer's auto_map": both(
        EVIL, edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    ),
    "tokenizer class": edit("tokenizer_config.json", tokenizer_class="os.system"),
    "tokenizer file elsewhere": edit(
        "tokenizer_config.json",
        tokenizer_file="@outside/tokenizer.json", vocab_file="@outside/tokenizer.json", name_or_path="@outside",
        special_tokens_map_file="/etc/passwd", added_tokens_file="/etc/passwd", chat_template_file="/etc/passwd",
    ),
    "tokenizer file of another version elsewhere": edit(
        "tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.4.0.0.json"]
    ),
    # sizes and values
    "huge hidden_size": config(text_config__hidden_size=HUGE),
    "huge vocab_size": config(text_config__vocab_size=HUGE),
    "huge intermediate_size": config(text_config__intermediate_size=HUGE),
    "huge num_hidden_layers": config(text_config__num_hidden_layers=HUGE),
    "huge tower": config(vision_config__hidden_size=HUGE),
    "huge layers of the tower": config(vision_config__num_hidden_layers=HUGE),
    "huge image_size": config(vision_config__image_size=HUGE),
    "huge image_size of ours": config(image_size=14 * 10**5),
    "huge projector": config(projector_config__hidden_size=HUGE),
    "huge number of projector layers": config(projector_config__num_hidden_layers=HUGE),
    "huge number of queries": config(projector_config={"type": "qformer", "num_query_tokens": HUGE}),
    "huge number of experts": config(moe_config={"num_experts": HUGE, "num_experts_per_tok": 1, "layers": [0]}),
    "huge list of layers": config(moe_config={"num_experts": 2, "layers": list(range(100000))}),
    "negative hidden_size": config(text_config__hidden_size=-64),
    "negative vocab_size": config(text_config__vocab_size=-1),
    "negative image_size": config(vision_config__image_size=-32),
    "negative layers": config(text_config__num_hidden_layers=-1),
    "zero heads": config(text_config__num_attention_heads=0),
    "zero patch_size": config(vision_config__patch_size=0),
    "bool for a size": config(text_config__hidden_size=True),
    "text for a size": config(text_config__hidden_size="64"),
    "list for a size": config(vision_config__hidden_size=[48]),
    "bool for experts": config(moe_config={"num_experts": True, "num_experts_per_tok": 1, "layers": [0]}),
    "NaN for a scale": config(image_feature_scale=float("nan")),
    "NaN for a size": config(text_config__hidden_size=float("nan")),
    "Infinity for a size": config(vision_config__image_size=float("inf")),
    "Infinity for rope": config(text_config__rope_parameters={"rope_theta": float("inf"), "rope_type": "default"}),
    "rope of an unknown type": config(text_config__rope_parameters={"rope_theta": 1.0, "rope_type": "evil.rope"}),
    "activation by name": config(text_config__hidden_act="os.system"),
    "dtype by name": config(dtype="os.system"),
    "dtype that is none": config(dtype="nn"),
    "deeply nested": raw_config("parts", '{"a":' * 10000 + "1" + "}" * 10000),
    "deeply nested part": raw_config("text_config", '{"a":' * 500 + "1" + "}" * 500),
    "deeply nested list": raw_config("vision_feature_layer", "[" * 100000 + "]" * 100000),
    "a number of many digits": raw_config("image_token_id", "9" * 100000),
    "config is a list": write("config.json", "[]"),
    "config is binary": write("config.json", b"\xff\xfe\x00{"),
    "config without parts": write("config.json", '{"model_type": "moellava"}'),
    "sections of other types": config(text_config=3, vision_config="x", projector_config=[], moe_config=1),
    "image token outside": config(image_token_id=-5),
    "nested processor": write("processor_config.json", "[" * 100000 + "]" * 100000),
    "huge number of image tokens": edit("processor_config.json", num_image_tokens=HUGE),
    "huge pictures": edit("processor_config.json", image_processor__size={"height": 10**6, "width": 10**6}),
    "nested tokenizer": write("tokenizer.json", "[" * 100000 + "]" * 100000),
    "nested generation config": write("generation_config.json", "[" * 100000 + "]" * 100000),
    "generation config of wrong types": edit("generation_config.json", eos_token_id={"a": 1}, max_length="many"),
    # weights
    "shard above": sharded("../outside/model.safetensors"),
    "absolute shard": sharded("@outside/model.safetensors"),
    "shard is /etc/passwd": sharded("/etc/passwd"),
    "shard of pickles above": sharded("../outside/pytorch_model.bin", "bin"),
    "shard is a folder": sharded("."),
    "index is a list": index_of([1]),
    "index of other types": index_of({"lm_head.weight": {"a": 1}}),
    "index is nested": both(index_of({}), write("model.safetensors.index.json", "[" * 100000 + "]" * 100000)),
    "pickle with code": pickled,
    "header of 2^63": header(lambda entries: struct.pack("<Q", 2**63) + b"{}"),
    "header beyond the file": header(lambda entries: struct.pack("<Q", 10**6) + b"{}"),
    "header is no JSON": header(lambda entries: "{" * 1000),
    "header is nested": header(lambda entries: '{"a":' * 100000 + "1" + "}" * 100000),
    "offsets beyond the file": header(lambda entries: first(entries, data_offsets=[0, 10**12])),
    "offsets backwards": header(lambda entries: first(entries, data_offsets=[64, 0])),
    "offsets that overlap": header(lambda entries: {name: entry | {"data_offsets": [0, 4 * 64]} for name, entry in entries.items() if name != "__metadata__"}),
    "another dtype": header(lambda entries: first(entries, dtype="F64")),
    "unknown dtype": header(lambda entries: first(entries, dtype="EVIL")),
    "another shape": header(lambda entries: first(entries, shape=[2**40, 2**40])),
    "negative shape": header(lambda entries: first(entries, shape=[-1, -64])),
    "a name twice": header(twice),
    "weights are empty": write("model.safetensors", b""),
    "weights of other types": header(lambda entries: {name: (entry if name == "__metadata__" or "embed" not in name else entry | {"dtype": "I32"}) for name, entry in entries.items()}),
    # chat templates
    "template that reaches Python": write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template with an import": write("chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('true') }}"),
    "template that includes": write("chat_template.jinja", "{% include '/etc/passwd' %}"),
    "template of a large range": write("chat_template.jinja", "{% for i in range(10**9) %}x{% endfor %}"),
}
