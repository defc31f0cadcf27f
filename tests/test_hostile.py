# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, weights, pictures and data made by an attacker, opened through every door that a user has.

Without `trust_remote_code=True` each has to be refused in clear words, or to do no harm; and whatever becomes of it, no
file outside of the checkpoint is opened, no connection made, no process started, no code run that lies in it. The doors
are opened by `hostile_doors.py`, whose audit hook sees that.
"""

import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from older import write_older, write_tower
from parts import picture
from PIL import Image
from safetensors.torch import load_file, save_file

from moellava import load_pretrained_model, upcycle
from moellava.checks.pictures import check_shape, load_picture
from moellava.evaluating import questions
from moellava.training import rows


HERE = Path(__file__).resolve().parent
EVIL_CODE = 'import pathlib\npathlib.Path(__file__).with_name("EXECUTED").touch()\nraise RuntimeError("executed")\n'


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
            target[inner] = value
        # `@` stands for the folder above.
        path.write_text(json.dumps(fields).replace('"@', f'"{folder.parent}/'))

    return change


def config(**changes: Any):
    return edit("config.json", **changes)


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


def link(name: str, target: str):
    """Puts a link in the place of a file; of its target `@` stands for the folder above."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.replace("@", f"{folder.parent}/"))

    return change


def vocabulary_elsewhere(folder: Path) -> None:
    """A tokenizer whose vocabulary is the lines of a file."""
    (folder / "tokenizer.json").unlink()
    edit("tokenizer_config.json", tokenizer_class="FunnelTokenizer", vocab="@outside/config.json")(folder)


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


def each(entries: dict[str, Any], only: str = "", **changes: Any) -> dict[str, Any]:
    """Changes every tensor's entry, or those with a word in their names."""
    return {
        name: entry | changes if name != "__metadata__" and only in name else entry for name, entry in entries.items()
    }


def twice(entries: dict[str, Any]) -> str:
    """The first tensor's name twice, the second time with another place."""
    name = next(name for name in entries if name != "__metadata__")
    return json.dumps(entries)[:-1] + f', "{name}": {json.dumps(entries[name] | {"dtype": "I8"})}}}'


class Payload:
    """Code in a pickle: it would leave a file where it was run."""

    def __reduce__(self):
        return (os.mkdir, ("EXECUTED",))


def pickled(name: str = "pytorch_model.bin", instead_of: str = "model.safetensors"):
    """Puts a pickle that would run code into the place of weights."""

    def change(folder: Path) -> None:
        (folder / instead_of).unlink(missing_ok=True)
        torch.save({"model.weight": Payload()}, folder / name)

    return change


def expanded(folder: Path) -> None:
    """A file of tensors of which one is as large as can be, and holds one number."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"lm_head.weight": torch.zeros(1).expand(2**20, 2**20)}, folder / "pytorch_model.bin")


def adapter_weights(folder: Path) -> None:
    """An adapter of one layer, as it should be."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {"lora_A": torch.zeros(2, 64), "lora_B": torch.zeros(64, 2)}
    save_file({f"{layer}.{half}.weight": each for half, each in pair.items()}, folder / "adapter_model.safetensors")


FOREIGN = {
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText"), "evil.Evil"),
    "trust_remote_code": True,
    "_name_or_path": "@outside",
    "_attn_implementation_internal": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_experts_implementation_internal": "evil/kernel",
}
ELSEWHERE = {"auto_map": {"AutoConfig": "evil/repo--evil.Evil", "AutoProcessor": "evil/repo--evil.Evil"}}
EVIL = write("evil.py", EVIL_CODE)
OTHER_BASE = {
    "base_model_name_or_path": "@outside",
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
}

ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **OTHER_BASE}
ONEFORMER = {
    "image_processor__image_processor_type": "OneFormerImageProcessorFast",
    "image_processor__repo_path": "@outside",
    "image_processor__class_info_file": "config.json",
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
    "adapter of another kind beside it": edit("adapter_config.json", peft_type="SHADOW", shadow_model="@outside"),
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
    "image processor of another kind": edit(
        "processor_config.json", image_processor__image_processor_type="LlamaModel"
    ),
    "preprocessor_config": both(
        EVIL,
        edit(
            "preprocessor_config.json", image_processor_type="evil.Evil", auto_map={"AutoImageProcessor": "evil.Evil"}
        ),
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
        tokenizer_file="@outside/tokenizer.json",
        vocab_file="@outside/tokenizer.json",
        name_or_path="@outside",
        special_tokens_map_file="/etc/passwd",
        added_tokens_file="/etc/passwd",
        chat_template_file="/etc/passwd",
    ),
    "tokenizer file of another version elsewhere": edit(
        "tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.4.0.0.json"]
    ),
    "tokenizer's vocabulary elsewhere": vocabulary_elsewhere,
    "tokenizer's vocabulary elsewhere by its special tokens": edit(
        "special_tokens_map.json", vocab_file="@outside/tokenizer.json", tokenizer_file="@outside/tokenizer.json"
    ),
    "tokenizer's model elsewhere": edit(
        "tokenizer_config.json",
        tokenizer_class="GPTSw3Tokenizer",
        sp_model_kwargs={"model_file": "@outside/tokenizer.json"},
    ),
    "tokenizer class of a model": edit("tokenizer_config.json", tokenizer_class="AutoModel"),
    "tokenizer that is a link": link("tokenizer.json", "@outside/tokenizer.json"),
    "template that is a link": link("chat_template.jinja", "../outside/config.json"),
    "image processor that reads elsewhere": edit("processor_config.json", **ONEFORMER),
    "image processor that asks the Hub": edit(
        "processor_config.json", **ONEFORMER | {"image_processor__repo_path": "evil/repo"}
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
    "pickle with code": pickled(),
    "pickle of an expanded tensor": expanded,
    "header of 2^63": header(lambda entries: struct.pack("<Q", 2**63) + b"{}"),
    "header beyond the file": header(lambda entries: struct.pack("<Q", 10**6) + b"{}"),
    "header is no JSON": header(lambda entries: "{" * 1000),
    "header is nested": header(lambda entries: '{"a":' * 100000 + "1" + "}" * 100000),
    "offsets beyond the file": header(lambda entries: first(entries, data_offsets=[0, 10**12])),
    "offsets backwards": header(lambda entries: first(entries, data_offsets=[64, 0])),
    "offsets that overlap": header(lambda entries: each(entries, data_offsets=[0, 4 * 64])),
    "another dtype": header(lambda entries: first(entries, dtype="F64")),
    "unknown dtype": header(lambda entries: first(entries, dtype="EVIL")),
    "another shape": header(lambda entries: first(entries, shape=[2**40, 2**40])),
    "negative shape": header(lambda entries: first(entries, shape=[-1, -64])),
    "a name twice": header(twice),
    "weights are empty": write("model.safetensors", b""),
    "weights of other types": header(lambda entries: each(entries, only="embed", dtype="I32")),
    # chat templates
    "template that reaches Python": write("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template with an import": write("chat_template.jinja", "{{ cycler.__init__.__globals__.os.system('true') }}"),
    "template that includes": write("chat_template.jinja", "{% include '/etc/passwd' %}"),
    "template of a large range": write("chat_template.jinja", "{% for i in range(10**9) %}x{% endfor %}"),
}


# What loads as if it was not there; everything else is refused.
HARMLESS = {
    "auto_map", "auto_map of another repository", "auto_map of the text", "auto_map of the tower",
    "auto_map of the projector", "parts elsewhere", "older name of the tower", "weights of the text elsewhere",
    "quantised by an unknown method", "quantised by kernels of the Hub", "quantised text", "architectures",
    "custom_generate", "processor class", "processor's auto_map", "image processor's auto_map", "preprocessor_config",
    "tokenizer's auto_map", "tokenizer class", "tokenizer file elsewhere",
    "Infinity for rope", "huge pictures", "generation config of wrong types", "weights of other types",
    "template that reaches Python", "template with an import", "template that includes", "template of a large range",
}  # fmt: skip
# What is said of the rest, where it is not enough that something is.
SAID = {
    "dotted projector": "has a part 'os.system' of its author's own",
    "projector of its own": "Pass trust_remote_code=True to run it, where you trust its author",
    "text of an unknown type": "code that a part brings with it is not run",
    "tower with a backbone": "vision_config.backbone names 'evil/repo', from where a backbone would be fetched",
    "tower of timm's hub": "vision_config.backbone names 'hf-hub:evil/repo'",
    "weights elsewhere": "must reference a file inside the model directory",
    "audio tokenizer elsewhere": "asks for an audio tokenizer, 'CLIPVisionModel', from elsewhere",
    "audio tokenizer of the Hub": "asks for an audio tokenizer, 'DacModel', from elsewhere",
    "huge hidden_size": "The config describes a model of .* weights, but the weight files have",
    "huge vocab_size": "The config describes a model of .* weights, but the weight files have",
    "huge number of experts": "moe_config.num_experts is 1000000000; expected at most 100000",
    "huge num_hidden_layers": "text_config.num_hidden_layers is 1000000000; expected at most 10000",
    "huge layers of the tower": "vision_config.num_hidden_layers is 1000000000",
    "huge number of projector layers": "projector_config.num_hidden_layers is 1000000000",
    "tokenizer file of another version elsewhere": "names '../outside/tokenizer.4.0.0.json'; expected the plain name",
    "tokenizer's vocabulary elsewhere": "has 'vocab', .*by which files outside of the folder would be opened",
    "tokenizer's vocabulary elsewhere by its special tokens": "has 'vocab_file'; expected special tokens alone",
    "tokenizer's model elsewhere": "has 'sp_model_kwargs', .*by which files outside of the folder would be opened",
    "tokenizer class of a model": "ask for 'AutoModel', which is no tokenizer of a language model",
    "tokenizer that is a link": "tokenizer.json is a link to .*outside of the folder",
    "template that is a link": "chat_template.jinja is a link to .*outside of the folder",
    "image processor that reads elsewhere": "'OneFormerImageProcessorFast', which is no image processor of a vision",
    "image processor that asks the Hub": "'OneFormerImageProcessorFast', which is no image processor of a vision",
    "huge number of image tokens": "makes 1000000000 tokens of a picture, its model 16",
    "negative image_size": "vision_config.image_size is -32; expected at least 1",
    "dtype by name": "dtype is 'os.system', which is no dtype of PyTorch",
    "activation by name": "does not describe a 'llama' model .*os.system",
    "deeply nested": "config.json is no valid JSON .*recursion",
    "deeply nested part": "text_config is nested more than 200 levels deep",
    "shard above": "names '../outside/model.safetensors'; expected the plain name of a file beside it",
    "pickle with code": "holds Python objects other than tensors",
    "header of 2^63": "header too large",
}

# How a checkpoint is loaded, and looked into; beside these, transformers' own ways for what a case is about.
DOORS = ("load_pretrained_model", "inspect_checkpoint")
OF_A_PROCESSOR = ("processor", "tokenizer", "template", "image tokens", "pictures")
COMMANDS = {
    "inspect": ["inspect", "PATH"],
    "ask": ["ask", "PATH", "PATH/picture.png", "What?", "--max-new-tokens", "1"],
    "upcycle": ["upcycle", "PATH", "out", "--num-experts", "2", "--top-k", "1"],
    "convert": ["convert", "PATH", "out"],
    "card": ["card", "PATH"],
    "push": ["push", "PATH", "me/hostile"],
}
COMMANDED = ("deeply nested", "shard above", "tower with a backbone")
# What transformers' own classes may raise, which read the files before they ask anything of this package.
OF_THE_LIBRARY = {"AttributeError", "KeyError", "RecursionError", "RuntimeError", "SafetensorError", "UnpicklingError"}
ERRORS = {"ValueError", "TypeError", "OSError", "ImportError", "CommandFailed"}
# SECURITY.md names it: AutoProcessor reads the processor's files before it knows that the processor is ours.
LEFT_TO_THE_LIBRARY = {
    (name, "AutoProcessor")
    for name in ("audio tokenizer elsewhere", "audio tokenizer of the Hub", "template that is a link")
}
FIRST_ABOUT_SIZES, FIRST_ABOUT_WEIGHTS = "huge hidden_size", "shard above"


def doors_of(name: str) -> list[tuple[str, dict]]:
    names = list(CASES)
    chosen = [*DOORS]
    if any(word in name for word in OF_A_PROCESSOR):
        chosen += ["MoellavaProcessor", "AutoProcessor"]
    elif names.index(FIRST_ABOUT_SIZES) <= names.index(name) < names.index(FIRST_ABOUT_WEIGHTS):
        chosen += ["MoellavaForCausalLM"]
    else:
        chosen += ["AutoConfig", "AutoModelForImageTextToText"]
    doors = [(door, {}) for door in chosen if (name, door) not in LEFT_TO_THE_LIBRARY]
    if name in COMMANDED:
        doors += [("moellava", {"arguments": arguments}) for arguments in COMMANDS.values()]
    if "template" in name:
        doors.append(("chat_template", {}))
    return doors


class Doors:
    """A process of `hostile_doors.py`. It may ask the Hub, so that it shows whether it would."""

    def __init__(self, root: Path, checkpoints: dict[str, Path], blocks_moellava: bool = False):
        self.root = root
        for name in ("scratch", "hub"):
            (root / name).mkdir()
        settings = {
            "scratch": str(root / "scratch"),
            "guarded": [str(checkpoints["outside"])],
            "blocks_moellava": blocks_moellava,
            "warm_up": str(checkpoints["dense"]),
        }
        (root / "settings.json").write_text(json.dumps(settings))
        environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(root / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.errors = (root / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "hostile_doors.py"), str(root / "settings.json")],
            env=os.environ | environment, cwd=root, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors,
        )  # fmt: skip

    def open(self, jobs: list[dict]) -> dict[str, dict]:
        """Returns what became of every job, by its name."""
        print(json.dumps(jobs), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        self.errors.seek(0)
        assert answer, self.errors.read()[-4000:]
        assert not list(self.root.rglob("EXECUTED"))
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture(scope="module")
def doors(checkpoints, tmp_path_factory):
    doors = Doors(tmp_path_factory.mktemp("doors"), checkpoints)
    yield doors
    doors.close()


@pytest.fixture(scope="module")
def checkpoints(parts, tmp_path_factory) -> dict[str, Path]:
    """A dense and a sparse checkpoint, and what lies beside them: files that must not be opened."""
    root = tmp_path_factory.mktemp("hostile")
    model = load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    ).model
    model.save_pretrained(root / "dense")
    upcycle(model, num_experts=2, num_experts_per_tok=1, layers=[0]).save_pretrained(root / "sparse")
    shutil.copytree(root / "dense", root / "outside")
    shutil.copy(root / "outside" / "tokenizer.json", root / "outside" / "tokenizer.4.0.0.json")
    torch.save({"lm_head.weight": torch.zeros(2)}, root / "outside" / "pytorch_model.bin")
    return {name: root / name for name in ("dense", "sparse", "outside")}


@pytest.fixture(scope="module")
def outcomes(doors, checkpoints, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """What became of every case at every door: `outcomes[case][door]`."""
    root, jobs = tmp_path_factory.mktemp("cases"), []
    (root / "outside").symlink_to(checkpoints["outside"])
    for number, (name, change) in enumerate(CASES.items()):
        for kind in ("dense", "sparse") if name in SPARSE else ("dense",):
            folder = root / f"{kind}{number}"
            shutil.copytree(checkpoints[kind], folder)
            picture().save(folder / "picture.png")
            change(folder)
            for door, more in doors_of(name):
                label = " ".join([kind, door, *more.get("arguments", [])[:1]])
                jobs.append({"name": f"{name}|{label}", "door": door, "path": str(folder), **more})
    results = doors.open(jobs)
    assert not list(root.rglob("EXECUTED"))
    sorted_by_case: dict[str, dict[str, dict]] = {}
    for name, result in results.items():
        case, _, label = name.partition("|")
        sorted_by_case.setdefault(case, {})[label] = result
    return sorted_by_case


SPARSE = {"auto_map", "huge number of experts", "huge hidden_size", "shard above", "pickle with code"}


def check_harmless(result: dict) -> None:
    """Nothing was opened, asked, run or imported, and little memory taken."""
    for trace in ("opened", "denied", "ran", "imported"):
        assert result.get(trace) == [], (trace, result)
    assert result["grew"] < 400, result


@pytest.mark.parametrize("name", CASES)
def test_hostile_checkpoint(outcomes, name):
    for label, result in outcomes[name].items():
        door = label.split()[1]
        check_harmless(result)
        if door == "chat_template":  # of these, below
            continue
        is_ours = door in ("load_pretrained_model", "inspect_checkpoint", "moellava")
        allowed = ERRORS if is_ours else ERRORS | OF_THE_LIBRARY
        if result["error"] is not None:
            assert not allowed.isdisjoint(result["kinds"]), (label, result["trace"])
            assert result["text"].strip(), label
        if door == "load_pretrained_model":
            assert (result["error"] is None) == (name in HARMLESS), (label, result)
            if name in SAID:
                assert re.search(SAID[name], result["text"], flags=re.DOTALL), (label, result["text"])
        if door == "moellava" and result["error"] is not None:
            assert "Traceback" not in result["text"] and "Error: " in result["text"], result


def test_templates_that_reach_for_python_are_refused_when_they_are_used(outcomes):
    for name in ("template that reaches Python", "template with an import", "template that includes"):
        result = outcomes[name]["dense chat_template"]
        assert result["error"] in ("SecurityError", "TypeError", "UndefinedError"), result
    assert outcomes["template of a large range"]["dense chat_template"]["error"] == "OverflowError"


def test_where_the_package_is_not_installed_nothing_is_imported(checkpoints, tmp_path):
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "pipeline")
    doors = Doors(tmp_path, checkpoints, blocks_moellava=True)
    results = doors.open([{"name": name, "door": name, "path": str(checkpoints["dense"])} for name in names])
    doors.close()
    for name, result in results.items():
        check_harmless(result)
        assert result["error"] == "ValueError" and "trust_remote_code=True" in result["text"], (name, result)


# ---------------------------------------------------------------------------------------------------------------------
# Parts, adapters, older checkpoints, and checkpoints in the Hub's cache
# ---------------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PICKLED = "holds Python objects other than tensors"
OF_ANOTHER_KIND = "of an adapter of the type '.*'; only LORA is loaded"
IMAGE_PROCESSOR_CODE = edit("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
PROMPT = {"prompt_tuning_init": "TEXT", "tokenizer_kwargs": {"trust_remote_code": True}, "num_virtual_tokens": 1}

# What is taken, what is changed of it, and what is said: None where it loads.
FORMATS = {
    "older: pickle": ("older", pickled(), PICKLED),
    "older: pickle of a projector": ("projector", pickled("mm_projector.bin"), PICKLED),
    "older: pickle beside an adapter": (
        "projector",
        both(edit("adapter_config.json", **ADAPTER), adapter_weights, pickled("non_lora_trainables.bin")),
        PICKLED,
    ),
    "older: pickle of an adapter": (
        "projector",
        both(edit("adapter_config.json", **ADAPTER), pickled("adapter_model.bin")),
        PICKLED,
    ),
    "older: shard above": ("older", sharded("../outside/model.safetensors"), "expected the plain name of a file"),
    "older: kernels": ("older", both(EVIL, config(**FOREIGN)), None),
    "older: code of its tower": ("older", config(mm_image_tower="@evil-tower"), None),
    "older: code of its tokenizer": (
        "older",
        both(EVIL, edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})),
        None,
    ),
    "older: tower of the system": ("older", config(mm_image_tower="/etc"), "tower '/etc', which cannot be had here"),
    "older: tower of the Hub": ("older", config(mm_image_tower="evil/repo"), "'evil/repo', which cannot be had here"),
    "adapter of another base": ("adapter", edit("adapter_config.json", **OTHER_BASE), None),
    "adapter that imports": (
        "adapter",
        edit("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil.core"),
        "names the module 'evil.core' in megatron_config",
    ),
    "adapter with a model": (
        "adapter",
        edit("adapter_config.json", peft_type="SHADOW", shadow_model="@outside"),
        OF_ANOTHER_KIND,
    ),
    "adapter with a tokenizer's code": (
        "adapter",
        edit("adapter_config.json", peft_type="PROMPT_TUNING", tokenizer_name_or_path="@outside", **PROMPT),
        OF_ANOTHER_KIND,
    ),
    "adapter with other adapters": (
        "adapter",
        edit("adapter_config.json", peft_type="XLORA", adapters={"0": "@outside"}),
        OF_ANOTHER_KIND,
    ),
    "pickle of an adapter": ("adapter", pickled("adapter_model.bin", "adapter_model.safetensors"), PICKLED),
    "nested adapter": ("adapter", write("adapter_config.json", "[" * 100000 + "]" * 100000), "is no valid JSON"),
    "tower: code": ("tower", both(EVIL, config(**FOREIGN), IMAGE_PROCESSOR_CODE), None),
    "tower: kernels": ("tower", config(**{f"vision_config__{key}": value for key, value in FOREIGN.items()}), None),
    "tower: with a backbone": (
        "tower",
        config(model_type="dpt", backbone="evil/repo", use_pretrained_backbone=True, vision_config=None),
        "backbone names 'evil/repo', from where a backbone would be fetched",
    ),
    "tower: of timm's hub": (
        "tower",
        write("config.json", '{"model_type": "timm_wrapper", "architecture": "hf-hub:evil/repo", "pretrained": true}'),
        "architecture names 'hf-hub:evil/repo', from where a backbone would be fetched",
    ),
    "tower: pickle": ("tower", pickled(), PICKLED),
    "tower: shard above": ("tower", sharded("../outside/model.safetensors"), "expected the plain name"),
    "tower: huge": ("tower", config(vision_config__hidden_size=HUGE), "describes a model of .* weights, but"),
    "tower: huge number of layers": ("tower", config(vision_config__num_hidden_layers=HUGE), "layers is 1000000000"),
    "language model: code": (
        "language model",
        both(EVIL, config(**FOREIGN), edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})),
        None,
    ),
    "older: vocabulary elsewhere": (
        "older",
        both(vocabulary_elsewhere, write("vocab.json", "{}")),
        "has 'vocab', .*outside of the folder",
    ),
    "tower: image processor that asks the Hub": (
        "tower",
        edit("preprocessor_config.json", image_processor_type="OneFormerImageProcessor", repo_path="evil/repo"),
        "'OneFormerImageProcessor', which is no image processor of a vision tower",
    ),
    "language model: vocabulary elsewhere": (
        "language model",
        vocabulary_elsewhere,
        "has 'vocab', .*outside of the folder",
    ),
    "language model: tokenizer of another model": (
        "language model",
        both(config(tokenizer_class="RagTokenizer"), edit("tokenizer_config.json", tokenizer_class=None)),
        "ask for 'RagTokenizer', which is no tokenizer of a language model",
    ),
    "language model: pickle": ("language model", pickled(), PICKLED),
    "language model: shard above": ("language model", sharded("../outside/model.safetensors"), "the plain name"),
    "language model: huge": ("language model", config(vocab_size=HUGE), "describes a model of .* weights, but"),
    "language model: huge number of layers": ("language model", config(num_hidden_layers=HUGE), "1000000000"),
    "cached": ("cached", both(), None),
    "cached shard elsewhere": (
        "cached",
        sharded("../../../../../outside/model.safetensors"),
        "expected the plain name",
    ),
    "cached absolute shard": ("cached", sharded("@../../../../outside/model.safetensors"), "expected the plain name"),
}


@pytest.fixture(scope="module")
def formats(parts, checkpoints, tmp_path_factory) -> dict[str, Path]:
    """A language model, a tower, an older checkpoint with that, a projector of one, and a LoRA adapter of ours."""
    root = tmp_path_factory.mktemp("formats")
    shutil.copytree(parts.language_model("llama"), root / "language model")
    tower = write_tower(root / "tower")
    shutil.copytree(tower, root / "evil-tower")
    both(EVIL, config(**FOREIGN), IMAGE_PROCESSOR_CODE)(root / "evil-tower")
    older = write_older(
        root / "older", "llama", tower_folder=tower, with_tower_weights=False, tokenizer_files="fast"
    ).folder
    (root / "projector").mkdir()
    shutil.copy(older / "config.json", root / "projector")
    model = load_pretrained_model(checkpoints["dense"], device="cpu").model
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    peft.get_peft_model(model, lora).save_pretrained(root / "adapter")
    return {path.name: path for path in root.iterdir()}


def cached(root: Path, name: str, checkpoint: Path, change) -> Path:
    """Lays a checkpoint out as the Hub's cache does, its files links into `blobs`; returns the snapshot."""
    repository = root / "hub" / "hub" / f"models--evil--{name}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(checkpoint, snapshot)
    change(snapshot)
    (repository / "blobs").mkdir()
    for number, path in enumerate([path for path in snapshot.iterdir() if path.is_file()]):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.fixture(scope="module")
def opened_formats(doors, checkpoints, formats, tmp_path_factory) -> dict[str, dict]:
    root, jobs = tmp_path_factory.mktemp("opened"), []
    for name in ("outside", "evil-tower"):
        (root / name).symlink_to(checkpoints.get(name) or formats[name])
    (doors.root / "outside").symlink_to(checkpoints["outside"])
    bases = {"projector": formats["older"], "adapter": checkpoints["dense"]}
    for number, (name, (kind, change, _)) in enumerate(FORMATS.items()):
        job = {"name": name, "door": "load_pretrained_model", "also": [str(formats["tower"])]}
        if kind == "cached":
            snapshot = cached(doors.root, str(number), checkpoints["dense"], change)
            jobs += [
                job | {"path": f"evil/{number}", "revision": COMMIT, "local_files_only": True},
                job | {"name": f"{name}|folder", "path": str(snapshot), "also": [str(snapshot.parents[1])]},
                {"name": f"{name}|pushed", "door": "checkpoint_files", "path": str(snapshot.parents[1])}
                | {"folder": str(snapshot)},
            ]
            continue
        folder = root / str(number)
        shutil.copytree(formats[kind], folder)
        change(folder)
        job |= {"path": str(folder)}
        if kind == "tower":
            job |= {"path": str(formats["language model"]), "mm_vision_tower": str(folder)}
            job["also"] += [str(folder)]
        if kind == "language model":
            job |= {"mm_vision_tower": str(formats["tower"])}
        if kind in bases:
            job |= {"model_base": str(bases[kind])}
            job["also"] += [str(bases[kind])]
        if name == "older: code of its tower":
            job["also"] += [str(formats["evil-tower"])]
        if name == "older: tower of the system":
            job["also"] += ["/etc"]
        if name == "older: tower of the Hub":  # which would be asked otherwise: an older checkpoint names its tower
            job |= {"local_files_only": True}
        jobs.append(job)
    results = doors.open(jobs)
    assert not list(root.rglob("EXECUTED")) and not list(formats["evil-tower"].rglob("EXECUTED"))
    return results


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_part_adapter_or_older_checkpoint(opened_formats, name):
    expected = FORMATS[name][2]
    for label in (name, f"{name}|folder", f"{name}|pushed") if FORMATS[name][0] == "cached" else (name,):
        result = opened_formats[label]
        check_harmless(result)
        if expected is None:
            assert result["error"] is None, (label, result)
        else:
            assert not ERRORS.isdisjoint(result["kinds"]) and re.search(expected, result["text"]), (label, result)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, data and what is pushed
# ---------------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of one bit a pixel that says its size and holds whatever data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packed = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + packed


def encoded(image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


FRAMES = [Image.new("L", (8, 8), level % 256) for level in range(3000)]
PICTURES = {
    "zip bomb": (lambda: png(60000, 60000, zlib.compress(bytes(60000 * 7501 // 100))), "decompression bomb"),
    "2^31 pixels wide": (lambda: png(2**31 - 1, 1, zlib.compress(b"")), "cannot be decoded"),
    "long": (lambda: encoded(Image.new("1", (1, 100000))), "1x100000 pixels, more than 200 times as long as wide"),
    "wide": (lambda: encoded(Image.new("1", (100000, 1))), "100000x1 pixels, more than 200 times as long as wide"),
    "a large square": (lambda: encoded(Image.new("1", (20000, 200))), "padded to a square it would have 400,000,000"),
    "truncated": (lambda: encoded(picture())[:200], "cannot be decoded"),
    "polyglot": (lambda: b"PK\x03\x04" + encoded(picture()), "no known format"),
    "svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "no known format",
    ),
    "program in PostScript": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
        "no known format",
    ),
    "orientation of 2^16": (lambda: encoded(picture(), "JPEG", exif=exif()), None),
    "thousands of frames": (lambda: encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES), None),
}


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = 65535, "x" * 60000
    return tags


@pytest.fixture(scope="module")
def opened_pictures(doors, checkpoints, tmp_path_factory):
    root, jobs = tmp_path_factory.mktemp("pictures"), []
    for number, (name, (make, _)) in enumerate(PICTURES.items()):
        path = root / f"{number}.png"
        path.write_bytes(make())
        for aspect in ("pad", "square"):
            jobs.append({
                "name": f"{name}|{aspect}", "door": "prepare_picture", "path": str(checkpoints["dense"]),
                "also": [str(path)], "picture": str(path), "aspect": aspect,
            })  # fmt: skip
    rows = [
        {"image": "/etc/passwd", "conversations": TALK},
        {"image": "http://169.254.169.254/latest", "conversations": TALK},
    ]
    for number, row in enumerate(rows):
        path = root / f"rows{number}.json"
        path.write_text(json.dumps([row]))
        jobs.append({"name": f"row {number}", "door": "open_data", "path": str(path), "also": ["/etc/passwd"]})
    linked = root / "linked"
    shutil.copytree(checkpoints["dense"], linked)
    (linked / "LICENSE").symlink_to("/etc/passwd")
    jobs.append({"name": "linked", "door": "checkpoint_files", "path": str(linked), "also": ["/etc/passwd"]})
    return doors.open(jobs)


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("name", PICTURES)
def test_hostile_picture(opened_pictures, name, aspect):
    result, expected = opened_pictures[f"{name}|{aspect}"], PICTURES[name][1]
    check_harmless(result)
    if expected is None or (name == "a large square" and aspect == "square"):
        assert result["error"] is None, result
    else:
        assert result["error"] == "ValueError" and expected in result["text"], result


def test_large_scans_are_opened_where_pillow_opens_them(monkeypatch):
    """Slides and panoramas; of what is too large, the error says by what it is allowed."""
    check_shape(12000, 3000, "pad")
    check_shape(20000, 15000, "square")
    with pytest.raises(ValueError, match="20000x15000 .* Scale it down .* raise PIL.Image.MAX_IMAGE_PIXELS"):
        check_shape(20000, 15000, "pad")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * 10**8)
    check_shape(20000, 15000, "pad")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb .* set PIL.Image.MAX_IMAGE_PIXELS to half of its pixels"):
        load_picture(base64.b64encode(encoded(picture())).decode())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 36)
    assert load_picture(base64.b64encode(encoded(picture())).decode()).size == (48, 36)


@pytest.mark.parametrize("open_picture", [rows.open_picture, questions.open_picture])
def test_pictures_of_rows_and_questions_are_known_to_fit_before_they_are_used(monkeypatch, open_picture):
    """One row that cannot be padded is left out; it does not end the run."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_picture(picture(), "square").size == (48, 36)
    with pytest.raises(ValueError, match="padded to a square it would have 2,304; expected at most 2,000"):
        open_picture(picture(), "pad")


YAML_CODE = '!!python/object/apply:os.mkdir ["EXECUTED"]'
# Whether a row's picture is opened as one; the door that is opened, and what is said.
DATA = {
    "picture by an absolute path": ("open_data", {"image": "@picture.png"}, None),
    "picture above": ("open_data", {"image": "../picture.png"}, None),
    "picture that is none": ("open_data", {"image": "/etc/passwd"}, "/etc/passwd cannot be decoded"),
    "picture by an address": ("open_data", {"image": "http://169.254.169.254/latest"}, "nothing is fetched"),
    "picture that is long": ("open_data", {"image": "../long.png"}, "1x100000 pixels, more than 200 times as long"),
    "nested rows": ("open_data", "[" * 100000 + "]" * 100000, "is no valid JSON"),
    "nested questions": ("read_questions", "[" * 100000 + "]" * 100000, "is no valid JSON"),
    "a number of many digits": ("open_data", "[" + "9" * 100000 + "]", "is no valid JSON"),
}


@pytest.fixture(scope="module")
def opened_data(doors, checkpoints, tmp_path_factory) -> dict[str, dict]:
    root, jobs = tmp_path_factory.mktemp("data"), []
    picture().save(root / "picture.png")
    Image.new("1", (1, 100000)).save(root / "long.png")
    for number, (name, (door, row, _)) in enumerate(DATA.items()):
        path = root / str(number) / "rows.json"
        text = row if isinstance(row, str) else json.dumps([row | {"conversations": TALK}])
        write("rows.json", text.replace("@", f"{root}/"))(path.parent)
        also = ["/etc/passwd", str(root / "picture.png"), str(root / "long.png")]
        jobs.append({"name": name, "door": door, "path": str(path), "also": also})

    def changed(name: str, change) -> str:
        shutil.copytree(checkpoints["dense"], root / name)
        change(root / name)
        return str(root / name)

    with_code = changed("yaml", write("README.md", f"---\nlicense: {YAML_CODE}\n---\nMine.\n"))
    write("recipe.yaml", f"model: {YAML_CODE}\n")(Path(with_code))
    pickled("router.bin", instead_of="nothing")(Path(changed("router", both())))
    linked = changed("linked", lambda folder: (folder / "LICENSE").symlink_to("/etc/passwd"))
    jobs += [
        {"name": "licence", "door": "licence", "path": with_code},
        {"name": "card", "door": "moellava", "path": with_code}
        | {"arguments": ["card", "PATH", "--out", "PATH/README.md"]},
        {"name": "recipe", "door": "moellava", "path": with_code, "arguments": ["train", "PATH/recipe.yaml"]},
        {"name": "router", "door": "upcycle", "path": str(root / "router")}
        | {"router_path": str(root / "router" / "router.bin")},
        {"name": "linked", "door": "checkpoint_files", "path": linked, "also": ["/etc/passwd"]},
    ]
    results = doors.open(jobs)
    assert not list(root.rglob("EXECUTED"))
    return results


@pytest.mark.parametrize("name", DATA)
def test_rows_name_pictures_and_nothing_else(opened_data, name):
    """A row may name any file of this machine, as a picture; what is none is not shown, and nothing is fetched."""
    result, expected = opened_data[name], DATA[name][2]
    check_harmless(result)
    if expected is None:
        assert result["value"] == "[(48, 36)]", result
    else:
        assert "ValueError" in result["kinds"] and expected in result["text"] and "root:" not in result["text"], result


def test_yaml_makes_no_objects(opened_data):
    """Neither that at the head of a model card, nor a recipe."""
    check_harmless(opened_data["licence"])
    assert opened_data["licence"]["value"] == "{}"
    for name, said in (("card", "README.md is no valid YAML"), ("recipe", "recipe.yaml")):
        check_harmless(opened_data[name])
        assert opened_data[name]["error"] == "CommandFailed" and said in opened_data[name]["text"], opened_data[name]


def test_a_routers_file_runs_no_code(opened_data):
    check_harmless(opened_data["router"])
    assert opened_data["router"]["error"] == "ValueError" and PICKLED in opened_data["router"]["text"]


def test_a_link_out_of_the_folder_is_not_pushed(opened_data):
    result = opened_data["linked"]
    check_harmless(result)
    assert result["error"] == "ValueError" and "is a link to /etc/passwd, outside of the checkpoint" in result["text"]
