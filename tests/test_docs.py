# SPDX-License-Identifier: Apache-2.0
"""README and docs say what is so: every code block is run, every link leads somewhere, every table and message is real.

A block runs in the order of its document, all of them in one namespace and one working folder, in which parts of the
names that the document uses lie. A comment on the line before a block says otherwise:

- `<!-- not run: reason -->`, for the blocks that `NOT_RUN` lists;
- `<!-- without moellava -->`: in a process of its own, in which the package cannot be imported.
"""

import ast
import copy
import importlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from older import write_older, write_tower
from parts import HUB_NAMES, LANGUAGE_MODELS, picture, run_python
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from moellava import (
    MoellavaConfig,
    MoellavaForCausalLM,
    MoellavaMoeConfig,
    MoellavaProjectorConfig,
    check_data,
    evaluate,
    load_pretrained_model,
    plan,
    register_projector,
    train,
    upcycle,
)
from moellava.authoring.load_request import _HUB_OPTIONS, _MODEL_OPTIONS, _OPTION_NAMES, _OPTIONS, _PARTS
from moellava.authoring.older_names import (
    _MOE_FIELDS_WITHOUT_EFFECT,
    FIELD_NAMES,
    MOE_FIELD_NAMES,
    PROJECTOR_FIELD_NAMES,
    VISION_FIELD_NAMES,
)
from moellava.building.dense_to_sparse import _CHANGEABLE
from moellava.building.lora import put_adapter
from moellava.chatting.prompting import user_turn
from moellava.checks.pictures import to_rgb
from moellava.demo.running import run_demo
from moellava.hub.card_pictures import without_metadata
from moellava.hub.pushing import checkpoint_files
from moellava.parts.part_table_moellava import OPTIONAL, PartTable
from moellava.parts.parts_moellava import ENCODERS, PROJECTORS
from moellava.reading.sources import Source
from moellava.reading.vision_tower import DEFAULT_VISION_TOWER
from moellava.training.rows import open_data


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
OTHERS = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
# The blocks of docs/extending.md make files and run processes: tests/test_extending.py runs them.
RUN_HERE = [name for name in DOCUMENTS if name != "docs/extending.md"]
LANGUAGES = {"bash", "python", "text"}

# Every block that is not run, with its reason.
NOT_RUN = {
    ("README.md", "make demo"): "both set up an environment of several GB; .ci/run runs make test",
    ("README.md", "pip install ."): "changes the environment that the tests run in",
    ("README.md", 'model.push_to_hub("me/my-model")'): "needs the Hub",
    (
        "docs/parallel.md",
        "accelerate launch --config_file examples/recipes/ddp.yaml --num_processes 2 -m moellava train recipe.yaml",
    ): "starts two processes; tests/test_parallel.py does",
    (
        "docs/parallel.md",
        "from transformers import AutoModelForImageTextToText",
    ): "needs torchrun; tests/test_parallel.py does the same",
    ("docs/hub.md", 'model.push_to_hub("me/my-model", private=True)'): "needs the Hub",
    ("docs/hub.md", "moellava push my-model me/my-model --private"): "needs the Hub",
    ("docs/hub.md", "from moellava import push"): "needs the Hub",
    ("docs/hub.md", "from transformers import AutoModelForImageTextToText, AutoProcessor"): "needs the Hub",
    ("docs/hub.md", "from moellava import load_pretrained_model"): "needs the Hub",
    ("docs/troubleshooting.md", "import numpy as np"): "needs a picture of 12 bits",
    ("docs/older-checkpoints.md", "# MoE-LLaVA and Med-MoE, dense and sparse; LLaVA-1.5 in its original form"): (
        "needs the Hub"
    ),
    ("docs/command-line.md", "moellava chat my-model --picture before.png --picture after.png"): (
        "waits for questions; tests/cli/test_cli_chat.py types them"
    ),
    ("docs/command-line.md", "moellava chat my-model --picture scan.png --json < questions.txt > answers.jsonl"): (
        "a shell's redirections; tests/cli/test_cli_chat.py pipes the same"
    ),
    ("docs/command-line.md", "moellava --install-completion"): "changes the shell's start-up files",
    ("docs/serving.md", "uvicorn server:app --host 127.0.0.1 --port 8000"): "serves until it is interrupted",
    ("docs/serving.md", "vllm serve my-model --trust-remote-code --model-impl transformers --dtype bfloat16 \\"): (
        "serves until it is interrupted; make test-serving runs the same"
    ),
    ("docs/serving.md", "# ask_vllm.py"): "needs a server; make test-serving asks one in the same way",
    ("docs/serving.md", "from vllm import LLM, SamplingParams"): "needs vLLM; make test-serving runs the same",
    ("docs/serving.md", "vllm serve my-sparse-model --trust-remote-code --model-impl transformers \\"): (
        "needs several GPUs"
    ),
    (
        "docs/older-checkpoints.md",
        'hf download JsST/Med-MoE --include "stage3/llavaphi-2.7b-medmoe/*" --local-dir med-moe',
    ): "needs the Hub",
    ("docs/performance.md", "make bench"): "takes a quarter of an hour on a quiet machine",
    ("docs/performance.md", "python benchmarks/loading.py --repeats 3"): (
        "makes models of several GB, and takes minutes"
    ),
    ("docs/performance.md", "python benchmarks/moe.py --tokens 1 --tokens 16 --tokens 128 --seconds 6"): (
        "takes twenty minutes on a quiet machine"
    ),
    ("docs/performance.md", "python benchmarks/quantized.py"): (
        "needs the checkpoints of the demo, and takes two minutes"
    ),
    ("docs/quickstart.md", "pip install ."): "changes the environment that the tests run in",
    ("docs/quickstart.md", 'model.push_to_hub("me/my-model")'): "needs the Hub",
    ("docs/web.md", "pip install '.[web]'"): "changes the environment that the tests run in",
    ("docs/web.md", "moellava web my-model"): "serves until it is interrupted",
    ("docs/web.md", "from moellava.web import launch"): "serves until it is interrupted",
    ("docs/web.md", "moellava web my-model my-sparse-model"): "serves until it is interrupted",
}


# What documents speak of by name and do not write themselves, beside the parts and the pictures.
LESSON = {
    "image": "scan.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat does the scan show?"},
        {"from": "gpt", "value": "A red bus stands beside two blue cars."},
    ],
}
DATA_FILES = {
    "lessons.json": [LESSON] * 2,
    "questions.json": [LESSON] * 2,
    "recipe.yaml": {
        "model": "my-model", "data": "lessons.json", "output_dir": "trained", "stage": "align", "max_steps": 1,
        "use_cpu": True,
    },
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block: its document, the number of its first line, its language, the comment before it, its text."""

    document: str
    line: int
    language: str
    comment: str
    text: str


def blocks_of(document: str) -> list[Block]:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    found, opened = [], None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        assert line.startswith("```"), f"{document}:{number + 1}: a fence starts at the line's beginning"
        if opened is None:
            opened = number
            continue
        assert line == "```", f"{document}:{number + 1}: the block of line {opened + 1} is not closed"
        before = re.fullmatch(r"<!-- (.*) -->", lines[opened - 1])
        text = "\n".join(lines[opened + 1 : number])
        found.append(Block(document, opened + 2, lines[opened][3:], before[1] if before else "", text))
        opened = None
    assert opened is None, f"{document}: the block of line {opened} is not closed"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def command_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the script `moellava` in this process."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="moellava")
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        script.load()()
        sys.exit(0)
    assert end.value.code in (None, 0), f"{shlex.join(arguments)} ended with status {end.value.code}"


def run_block(block: Block, namespace: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.comment == "without moellava":
        run_python(block.text, cwd=Path.cwd())
    elif block.language == "python":
        # Blank lines before it give tracebacks and warnings the document's line numbers.
        code = compile("\n" * (block.line - 1) + block.text, block.document, "exec")
        exec(code, namespace)
    else:
        for command in block.text.replace("\\\n", " ").splitlines():
            arguments = shlex.split(command, comments=True)
            if arguments:
                assert arguments[0] == "moellava", f"{block.document}:{block.line}: cannot be run here: {command}"
                command_line(arguments, monkeypatch)


@pytest.mark.parametrize("document", RUN_HERE)
def test_blocks(document, parts, tmp_path, monkeypatch):
    text = (ROOT / document).read_text(encoding="utf-8")
    names = [name for name in HUB_NAMES if name in text]
    if names:
        hub = parts.hub(*names)
        for owner in {name.partition("/")[0] for name in names}:
            (tmp_path / owner).symlink_to(hub / owner)
    for seed, name in enumerate(("scan.png", "before.png", "after.png")):
        picture(seed, (48 + 8 * seed, 40)).save(tmp_path / name)
    for name, content in DATA_FILES.items():
        (tmp_path / name).write_text(json.dumps(content))  # which is YAML too
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "test_docs"}  # pytest.ini's filters of warnings look at the name
    for block in blocks_of(document):
        if block.language != "text" and not block.comment.startswith("not run"):
            run_block(block, namespace, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_run_or_says_why_not(document):
    for block in blocks_of(document):
        place = f"{document}:{block.line}"
        assert block.language in LANGUAGES, f"{place}: unknown language {block.language!r}"
        known = block.comment in ("", "without moellava") or block.comment.startswith("not run: ")
        assert known or document not in RUN_HERE, f"{place}: unknown comment {block.comment!r}"


def test_blocks_that_are_not_run():
    found = {
        (document, block.text.splitlines()[0]): block.comment.removeprefix("not run: ")
        for document in RUN_HERE
        for block in blocks_of(document)
        if block.comment.startswith("not run")
    }
    assert found == NOT_RUN


def test_there_are_blocks():
    for document in ("README.md", "docs/quickstart.md", "docs/configuration.md"):
        languages = {block.language for block in blocks_of(document)}
        assert "python" in languages, document


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in [*DOCUMENTS, *OTHERS]:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{document}: make {target}"


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    text = without_blocks(path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS])
def test_links_lead_somewhere(document):
    path = ROOT / document
    text = without_blocks(path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        assert target.exists(), f"{document}: {link} leads nowhere"
        assert not anchor or anchor in anchors_of(target), f"{document}: {link}: there is no such heading"


@pytest.mark.parametrize("document", [*DOCUMENTS, *OTHERS])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    rooms = "benchmarks|configuration|docs|examples|hub_cards|modeling|moellava|parts|processing|tests"
    for name in re.findall(rf"`((?:{rooms})/[\w/]+\.\w+)`", text):
        assert (ROOT / name).is_file(), f"{document} names {name}"


# ---------------------------------------------------------------------------------------------------------------------
# README's and the configuration's tables
# ---------------------------------------------------------------------------------------------------------------------


def section_of(document: str, heading: str) -> str:
    """The text under a heading, down to the next one of its rank or above."""
    text = without_blocks((ROOT / document).read_text(encoding="utf-8"))
    start = re.search(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert start, f"{document} has no heading {heading!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, flags=re.MULTILINE)
    return rest[: end.start()] if end else rest


def table_of(document: str, heading: str, first: str) -> dict[str, list[str]]:
    """The cells of the table under a heading whose first column is called `first`, by those of that column."""
    lines = section_of(document, heading).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line[1:-1].split("|"))
        assert name not in rows, f"{document}: two rows {name}"
        rows[name] = cells
    return rows


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def values(cell: str) -> object:
    """The value that a cell holds."""
    (code,) = codes(cell)
    return ast.literal_eval(code)


def built_in(registry: PartTable) -> list[str]:
    """The names that the package itself registers, whatever other tests of this process have registered."""
    return [name for name in registry.names() if registry[name].__module__.startswith("moellava.")]


CONFIGURATION = "docs/configuration.md"


def documented_names() -> dict[str, tuple[str, str]]:
    """What the configuration's tables say of the flat fields, as `FIELD_NAMES` does."""
    names = {}
    for heading, section in (("What to load", "source"), ("Vision", "model")):
        for cell, (older, *_) in table_of(CONFIGURATION, heading, "field").items():
            (field,) = codes(cell)
            names |= dict.fromkeys([field, *codes(older)], (section, field))
    for cell, (flat, *_) in table_of(CONFIGURATION, "Projector", "field").items():
        (field,) = codes(cell)
        names |= dict.fromkeys(codes(flat), ("projector", field))
    return names


def test_flat_fields():
    assert documented_names() | {"mm_hidden_size": ("check", "mm_hidden_size")} == FIELD_NAMES
    assert "`mm_hidden_size`" in section_of(CONFIGURATION, "Vision")


def test_fields_of_the_parts():
    short = {
        name: field
        for cell, (of,) in table_of(CONFIGURATION, "Vision", "in `custom_vision_config`").items()
        for name in codes(cell)
        for field in codes(of)
    }
    documented = {name: place for name, place in documented_names().items() if place[0] == "model"}
    documented |= {name: place for name, place in documented_names().items() if place[1] == "vision_tower"}
    documented |= {name: (documented[field][0], field) for name, field in short.items()}
    unused = {name: place for name, place in VISION_FIELD_NAMES.items() if place[0] == "check"}
    assert documented | unused == VISION_FIELD_NAMES
    assert {f"`{name}`" for name in unused} <= set(re.findall("`[^`]+`", section_of(CONFIGURATION, "Vision")))

    documented = {name: place[1] for name, place in documented_names().items() if place[0] == "projector"}
    for cell, (of,) in table_of(CONFIGURATION, "Projector", "in `projector_config`").items():
        documented |= dict.fromkeys(codes(cell), *codes(of))
    assert documented == PROJECTOR_FIELD_NAMES

    parts = {}
    for cell, (older, _) in table_of(CONFIGURATION, "Where a setting may be given", "field").items():
        parts |= dict.fromkeys([*codes(cell), *codes(older)], ("part", *codes(cell)))
    assert parts | {"video_encoder": ("video", "video_encoder")} == _PARTS


def test_defaults_of_the_flat_fields():
    for cell, (_, default, _) in table_of(CONFIGURATION, "Vision", "field").items():
        (field,) = codes(cell)
        assert values(default) == MoellavaConfig.__dataclass_fields__[field].default, field
    table = table_of(CONFIGURATION, "What to load", "field")
    assert values(table["`vision_tower`"][1]) == DEFAULT_VISION_TOWER
    assert values(table["`model_base`"][1]) is None
    assert values(table_of(CONFIGURATION, "Projector", "field")["`type`"][1]) == MoellavaProjectorConfig.type


def test_fields_of_the_projectors():
    headings = re.findall(r"^### (\w+)$", section_of(CONFIGURATION, "Projector"), flags=re.MULTILINE)
    assert sorted(headings) == built_in(PROJECTORS)
    for name in headings:
        fields = PROJECTORS.fields(name)
        rows = table_of(CONFIGURATION, name, "field") if fields else {}
        assert {codes(cell)[0]: values(default) for cell, (default, _) in rows.items()} == fields
    assert not PROJECTORS.fields("identity") and "No fields" in section_of(CONFIGURATION, "identity")


def test_fields_of_the_sparse_layers():
    rows = table_of(CONFIGURATION, "Sparse layers", "field")
    names, defaults, changeable = {}, {}, set()
    for cell, (older, default, _) in rows.items():
        (field,) = codes(cell)
        names |= dict.fromkeys([field, *codes(older)], field)
        defaults[field] = values(default)
        changeable |= {field} if cell.endswith("*") else set()
    assert names == MOE_FIELD_NAMES
    assert defaults == {name: MoellavaMoeConfig.__dataclass_fields__[name].default for name in defaults}
    assert changeable == _CHANGEABLE
    without_effect = re.search(
        r"((?:`\w+`(?:, | and )?)+) of older configs", section_of(CONFIGURATION, "Sparse layers")
    )
    assert sorted(codes(without_effect[1])) == sorted(_MOE_FIELDS_WITHOUT_EFFECT)


def test_options():
    names, defaults = {}, {}
    for cell, (older, default, _) in table_of(CONFIGURATION, "How to load", "field").items():
        (field,) = codes(cell)
        names |= dict.fromkeys(codes(older), field)
        defaults[field] = values(default)
    assert (names, defaults) == (_OPTION_NAMES, _OPTIONS)
    text = section_of(CONFIGURATION, "How to load")
    for opening, options in (("Passed on to the Hub's client", _HUB_OPTIONS), ("Passed on to `from_", _MODEL_OPTIONS)):
        (paragraph,) = (part for part in text.split("\n\n") if part.startswith(opening))
        assert [code for code in codes(paragraph) if code != "from_pretrained"] == list(options)


def test_fields_of_the_config():
    rows = table_of(CONFIGURATION, "MoellavaConfig", "field")
    documented = {codes(cell)[0]: values(default) for cell, (default, _) in rows.items()}
    declared = MoellavaConfig.default_field_names()
    own = {name: MoellavaConfig.__dataclass_fields__[name].default for name in declared}
    own = {name: default for name, default in own.items() if name not in ("model_type", "sub_configs")}
    assert documented == own


def test_table_of_parts():
    def first_cells(first: str) -> list[str]:
        return [code for cell in table_of("README.md", "Parts", first) for code in codes(cell)]

    for first, registry in (("encoder", ENCODERS), ("projector", PROJECTORS)):
        assert sorted(first_cells(first)) == built_in(registry)
    families = [
        code for _, (types, _) in table_of("README.md", "Parts", "language model").items() for code in codes(types)
    ]
    assert set(families) == {*LANGUAGE_MODELS, "minicpm"}
    for first in ("encoder", "projector", "language model"):
        for name, cells in table_of("README.md", "Parts", first).items():
            files = re.findall(r"tests/\w+\.py", cells[-1])
            assert files or name.startswith("other"), f"README.md does not say what tests {name}"


# ---------------------------------------------------------------------------------------------------------------------
# The messages of docs/troubleshooting.md
# ---------------------------------------------------------------------------------------------------------------------

LANGUAGE_MODEL, CLIP, SIGLIP = (
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "openai/clip-vit-large-patch14",
    "google/siglip-base-patch16-224",
)
BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


class VisionConfig:
    """Given as a class, where an instance is expected."""

    image_size = 32


def messages() -> list[str]:
    """What the document says is printed; `…` stands for anything."""
    return [
        " ".join(message.split())
        for block in blocks_of("docs/troubleshooting.md")
        if block.language == "text"
        for message in block.text.split("\n\n")
    ]


def is_message(printed: str, documented: str) -> bool:
    pattern = ".+".join(re.escape(part) for part in documented.split("…"))
    return re.fullmatch(pattern, " ".join(printed.split())) is not None


def load(**fields) -> MoellavaForCausalLM:
    return load_pretrained_model(**{"model_path": LANGUAGE_MODEL, "device": "cpu"} | fields).model


def picture_of_a_card(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """One in a format that this Pillow reads and does not write."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "AVIF")
    monkeypatch.delitem(Image.SAVE, "AVIF")
    return without_metadata(content.getvalue(), "scan.avif")


def made_sparse_without_its_code(model: MoellavaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> MoellavaConfig:
    """As where a dense checkpoint runs by the code that it carries."""
    monkeypatch.delitem(OPTIONAL, "sparse")
    return MoellavaConfig.from_dict(model.config.to_dict() | {"moe_config": {"num_experts": 2}})


def changed_weights(folder: str, change: Callable[[dict[str, torch.Tensor], str], None]) -> str:
    """A copy of the language model, of whose weights one is changed."""
    shutil.copytree(LANGUAGE_MODEL, folder)
    weights = load_file(f"{folder}/model.safetensors")
    change(weights, next(name for name in weights if name.endswith("q_proj.weight")))
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return folder


def truncated(folder: str) -> str:
    shutil.copytree(LANGUAGE_MODEL, folder)
    with open(f"{folder}/model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(file.name) - 1000)
    return folder


def misshapen(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name][1:].contiguous()


def no_model() -> str:
    Path("no-model").mkdir()
    Path("no-model", "notes.txt").write_text("Nothing here.")
    return "no-model"


def with_text(model: MoellavaForCausalLM, **changes) -> MoellavaConfig:
    fields = model.config.to_dict()
    return MoellavaConfig.from_dict(fields | {"text_config": fields["text_config"] | changes})


def projector_without_bias() -> str:
    weights = {"linear_1.weight": torch.zeros(64, 40), "linear_1.bias": torch.zeros(64)}
    save_file(weights | {"linear_2.weight": torch.zeros(64, 64)}, "projector.safetensors")
    return "projector.safetensors"


def pickled() -> str:
    torch.save({"weight": picture(0)}, "pickled.bin")
    return "pickled.bin"


def sharded_elsewhere() -> str:
    shutil.copytree(LANGUAGE_MODEL, "sharded")
    Path("sharded/model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    return "sharded"


def with_config(model: MoellavaForCausalLM, folder: str, **changes) -> str:
    """A checkpoint whose config says something else."""
    model.save_pretrained(folder)
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def of_tower(kind: str, **fields) -> MoellavaConfig:
    """A config whose vision tower is a small one of some kind."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"image_size": 32, "patch_size": 8}
    return MoellavaConfig(vision_config={"model_type": kind, **small, **fields})


def with_fields(model: MoellavaForCausalLM, **fields) -> None:
    """Saves a model after fields of its config have been set."""
    model = copy.deepcopy(model)
    for name, value in fields.items():
        setattr(model.config, name, value)
    model.save_pretrained("my-changed-model")


def oversized(model: MoellavaForCausalLM) -> str:
    text_config = model.config.text_config.to_dict() | {"vocab_size": 10**9}
    return with_config(model, "my-oversized-model", text_config=text_config)


def adapter_of_another_kind() -> str:
    Path("my-adapter").mkdir()
    Path("my-adapter/adapter_config.json").write_text('{"peft_type": "IA3"}')
    return "my-adapter"


def adapter_of_the_language_model(**changes) -> str:
    """An adapter, with fields of its config changed, or else with weights of layers that the model has not."""
    language = AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL)
    peft.get_peft_model(language, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("my-lora")
    path = Path("my-lora/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if not changes:
        weights = load_file("my-lora/adapter_model.safetensors")
        moved = {name.replace(".0.", ".70."): tensor for name, tensor in weights.items()}
        save_file(moved, "my-lora/adapter_model.safetensors")
    return "my-lora"


def another_tower_for_an_older_model() -> dict[str, str]:
    tower = write_tower("their-tower")
    write_older("my-older-model", "llama", tower_folder=tower, with_tower_weights=False)
    shutil.copytree(tower, "my-tower")
    weights = load_file("my-tower/model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, "my-tower/model.safetensors")
    return {"model_path": "my-older-model", "vision_tower": "my-tower"}


def linked(model: MoellavaForCausalLM, link: bool = True) -> Source:
    model.save_pretrained("my-linked-model")
    if link:
        Path("my-linked-model/LICENSE").symlink_to("/etc/hostname")
    return Source("my-linked-model")


def hidden_weights(model: MoellavaForCausalLM) -> Source:
    folder = Path("my-hidden-model")
    model.save_pretrained(folder)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / ".model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, ".model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Source(folder)


def edited_part(source: str, name: str, **changes) -> str:
    """A copy of a part, with fields of a JSON file changed."""
    shutil.copytree(source, "my-part")
    path = Path("my-part", name)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return "my-part"


def linked_template() -> str:
    folder = edited_part(LANGUAGE_MODEL, "tokenizer_config.json")
    Path(folder, "chat_template.jinja").unlink(missing_ok=True)
    Path(folder, "chat_template.jinja").symlink_to("/etc/hostname")
    return folder


GATED = """
import torch.nn as nn
from moellava import register_projector

@register_projector("gated")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, x):
        return self.linear(x)
"""


def of_an_unknown_part(monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint with a projector that is registered no more."""
    Path("docs_gated_projector.py").write_text(GATED)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "docs_gated_projector", raising=False)
    importlib.import_module("docs_gated_projector")
    load(projector_type="gated").save_pretrained("my-gated-model")
    monkeypatch.delitem(PROJECTORS._classes, "gated")
    return "my-gated-model"


def local_part() -> None:
    @register_projector("local")
    class LocalProjector(PROJECTORS["linear"]):
        pass

    load(projector_type="local").save_pretrained("my-local-model")


def broken_picture() -> str:
    picture(0).save("broken.png")
    Path("broken.png").write_bytes(Path("broken.png").read_bytes()[:200])
    return "broken.png"


def postscript(name: str) -> str:
    Path(name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    return name


def large(name: str) -> str:
    if name.endswith(".png"):
        Image.new("RGB", (1, 1)).save(name)
        content = bytearray(Path(name).read_bytes())
        content[16:24] = (12000).to_bytes(4, "big") * 2  # what its head says
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        Path(name).write_bytes(content)
    else:
        with open(name, "wb") as file:
            file.truncate(512 * 1024**2 + 1)
    return name


def large_scan(model: MoellavaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(0).save("scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    model.processor(text="<image>", images="scan.png")


def load_without(module: str, monkeypatch: pytest.MonkeyPatch, **fields) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    load(**fields)


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load(device="cuda")


def cut_prompt(model: MoellavaForCausalLM) -> None:
    inputs = model.processor(text="<image>", images=picture(0), return_tensors="pt")
    model(input_ids=inputs["input_ids"][:, :-1], pixel_values=inputs["pixel_values"])


NO_TOKENS = DynamicCache()
ROWS = [{"id": "a", "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "One."}]}]
BROKEN_ROWS = [ROWS[0] | {"image": "a.png"}]


def training(model: MoellavaForCausalLM | None = None, **changes) -> None:
    """Trains a saved model, or what is no model if none is given, for a step."""
    if model is not None:
        model.save_pretrained("my-model")
    recipe = {"model": "my-model", "data": ROWS, "output_dir": "out", "stage": "align", "max_steps": 1}
    recipe |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 1, "learning_rate": 1e-3}
    train({key: value for key, value in (recipe | changes).items() if value is not ...})


def with_tool_calls() -> dict[str, Any]:
    turns = ROWS[0]["conversations"]
    return {"conversations": [*turns, turns[0], turns[1] | {"tool_calls": [{"name": "search"}]}]}


def rows_of_a_file(**options) -> None:
    Path("rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    open_data({"path": "rows.json", **options})


def rows_of_another_file() -> None:
    Path("rows.csv").write_text("question,answer\n", encoding="utf-8")
    open_data({"path": "rows.csv"})


def evaluating(model: MoellavaForCausalLM, questions: list[dict[str, Any]]) -> None:
    model.save_pretrained("my-model")
    evaluate("my-model", questions, device="cpu")


def training_beside(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    training(resume=True)


def demo_beside(folder: str) -> None:
    Path(folder).mkdir(parents=True)
    run_demo(Path(folder).parent)


def training_again(
    model: MoellavaForCausalLM, first: dict[str, Any], then: dict[str, Any], between: Callable[[], None] | None = None
) -> None:
    """Trains, and once more into the same folder, as if the first run had been stopped at its end."""
    training(model, **first)
    Path("out/align/stage.json").unlink()
    if between is not None:
        between()
    training(**first | then)


def without_a_weight() -> None:
    """Takes a weight of the projector out of the run's checkpoint."""
    file = "out/align/checkpoint-1/model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, file, metadata={"format": "pt"})


# Each gets a model and a monkeypatch, and raises an error that the document has; in its order.
ERRORS: dict[str, Callable] = {
    "encoder": lambda model, _: load(encoder_type="clp"),
    "projector": lambda model, _: load(projector_type="qfomer"),
    "code of another part": lambda model, monkeypatch: made_sparse_without_its_code(model, monkeypatch),
    "strategy": lambda model, _: load(vision_feature_select_strategy="patches"),
    "field": lambda model, _: load(vision_feature_layr=-1),
    "field of a projector": lambda model, _: load(projector_config={"type": "qformer", "num_queries": 8}),
    "field of the sparse layers": lambda model, _: load(moe_config={"num_expert": 4}),
    "two names": lambda model, _: load(mm_vision_tower=CLIP, vision_tower=SIGLIP),
    "a list": lambda model, _: load_pretrained_model([LANGUAGE_MODEL]),
    "a class": lambda model, _: load(custom_vision_config=VisionConfig),
    "a string": lambda model, _: load(projector_config="mlp"),
    "identity": lambda model, _: load(projector_type="identity"),
    "class token": lambda model, _: load(vision_tower=SIGLIP, vision_feature_select_strategy="cls"),
    "layer": lambda model, _: load(vision_feature_layer=-9),
    "encoder of another tower": lambda model, _: load(vision_tower=SIGLIP, encoder_type="clip"),
    "picture size": lambda model, _: load(image_size=30),
    "not square": lambda model, _: of_tower("vit", image_size=[32, 64]),
    "chance": lambda model, _: of_tower("vit_mae"),
    "joined pictures": lambda model, _: of_tower("pixtral", head_dim=16),
    "tokens behind the patches": lambda model, _: of_tower("yolos", image_size=[32, 32]),
    "computed": lambda model, _: MoellavaConfig.from_dict(model.config.to_dict(), image_seq_length=7),
    "part from elsewhere": lambda model, _: MoellavaConfig.from_dict(model.config.to_dict(), mm_vision_tower=SIGLIP),
    "one field in two places": lambda model, _: with_fields(model, tie_word_embeddings=True),
    "another processor": lambda model, _: with_fields(model, vision_feature_select_strategy="cls"),
    "no language model": lambda model, _: load(model_path=CLIP),
    "no vision tower": lambda model, _: load(vision_tower=LANGUAGE_MODEL),
    "projector file": lambda model, _: load(projector_config={"path": projector_without_bias()}),
    "adapter of other layers": lambda model, _: load(
        model_path=adapter_of_the_language_model(), model_base=LANGUAGE_MODEL
    ),
    "config of an adapter": lambda model, _: load(
        model_path=adapter_of_the_language_model(target_modules=["nothing"]), model_base=LANGUAGE_MODEL
    ),
    "adapter onto offloaded weights": lambda model, _: put_adapter(
        copy.deepcopy(model).to("meta"), Source(adapter_of_the_language_model(use_dora=True)), {}
    ),
    "another tower for an older model": lambda model, _: load(**another_tower_for_an_older_model()),
    "sparse already": lambda model, _: upcycle(upcycle(model)),
    "sparse layers": lambda model, _: load(moe_config={"layers": [70]}),
    "experts per token": lambda model, _: load(moe_config={"num_experts": 2, "num_experts_per_tok": 3}),
    "heads": lambda model, _: with_text(model, num_attention_heads=-1),
    "heads of keys": lambda model, _: with_text(model, num_attention_heads=2, num_key_value_heads=7),
    "no such path": lambda model, _: load(model_path="./no-such-model"),
    "no such repository": lambda model, _: load(model_path="no-such/model"),
    "no such projector": lambda model, _: load(projector_config={"path": "no-such-projector.bin"}),
    "no model": lambda model, _: load(model_path=no_model()),
    "truncated": lambda model, _: load(model_path=truncated("truncated")),
    "misshapen": lambda model, _: load(model_path=changed_weights("misshapen", misshapen)),
    "missing": lambda model, _: load(model_path=changed_weights("missing", dict.pop)),
    "pickle": lambda model, _: load(projector_config={"path": pickled()}),
    "shard elsewhere": lambda model, _: load(model_path=sharded_elsewhere()),
    "oversized": lambda model, _: load(model_path=oversized(model)),
    "adapter of another kind": lambda model, _: load(model_path=adapter_of_another_kind(), model_base=LANGUAGE_MODEL),
    "link": lambda model, _: checkpoint_files(linked(model)),
    "pattern of more files": lambda model, _: checkpoint_files(linked(model, link=False), [".env"]),
    "picture of a card": lambda model, monkeypatch: picture_of_a_card(monkeypatch),
    "weights with a dot": lambda model, _: checkpoint_files(hidden_weights(model)),
    "path of a tokenizer": lambda model, _: load(
        model_path=edited_part(LANGUAGE_MODEL, "tokenizer_config.json", vocab="/etc/hostname")
    ),
    "path in the place of a vocabulary": lambda model, _: load(
        model_path=edited_part(LANGUAGE_MODEL, "tokenizer.json", model={"type": "WordPiece", "vocab": "/etc/hostname"})
    ),
    "path among special tokens": lambda model, _: load(
        model_path=edited_part(LANGUAGE_MODEL, "special_tokens_map.json", vocab_file="/etc/hostname")
    ),
    "link of a tokenizer": lambda model, _: load(model_path=linked_template()),
    "class of a tokenizer": lambda model, _: load(
        model_path=edited_part(LANGUAGE_MODEL, "tokenizer_config.json", tokenizer_class="RagTokenizer")
    ),
    "class of an image processor": lambda model, _: load(
        vision_tower=edited_part(CLIP, "preprocessor_config.json", image_processor_type="OneFormerImageProcessor")
    ),
    "length of a tokenizer": lambda model, _: load(
        model_path=edited_part(LANGUAGE_MODEL, "tokenizer_config.json", model_max_length="abc")
    ),
    "tokenizer of a newer library": lambda model, _: load(
        model_path=edited_part(LANGUAGE_MODEL, "tokenizer.json", model={"type": "Newer"})
    ),
    "extra": lambda model, monkeypatch: load_without("timm", monkeypatch, vision_tower=BIOMEDCLIP),
    "extra for adapters": lambda model, monkeypatch: load_without("peft", monkeypatch, model_base=LANGUAGE_MODEL),
    "extra for 4 bits": lambda model, monkeypatch: load_without("bitsandbytes", monkeypatch, load_4bit=True),
    "4 and 8 bits": lambda model, _: load(load_4bit=True, load_8bit=True),
    "cuda": lambda model, monkeypatch: without_cuda(monkeypatch),
    "device and device_map": lambda model, _: load(device_map="auto"),
    "not to be quantised": lambda model, _: load(
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["*.q_proj"])
    ),
    "part of its author's own": lambda model, monkeypatch: load(model_path=of_an_unknown_part(monkeypatch)),
    "local class": lambda model, _: local_part(),
    "placeholders": lambda model, _: model.processor(text="<image> or <image>", images=[picture(0)]),
    "placeholders of a row": lambda model, _: model.processor(text=["<image>", ""], images=[[picture(0)]] * 2),
    "cut prompt": lambda model, _: cut_prompt(model),
    "broken picture": lambda model, _: model.processor(text="<image>", images=broken_picture()),
    "unreadable picture": lambda model, _: to_rgb("/proc/self/mem"),
    "no picture's format": lambda model, _: model.processor(text="<image>", images=postscript("notes.png")),
    "another format": lambda model, _: model.processor(text="<image>", images=Image.open(postscript("drawing.eps"))),
    "no such picture": lambda model, _: model.processor(text="<image>", images="no-such-picture.png"),
    "no picture": lambda model, _: model.processor(text="<image>", images={}),
    "scan": lambda model, monkeypatch: large_scan(model, monkeypatch),
    "long picture": lambda model, _: model.processor(text="<image>", images=Image.new("1", (14000, 10))),
    "large square": lambda model, _: model.processor(text="<image>", images=Image.new("1", (14000, 100))),
    "decoded bytes": lambda model, _: model.processor(text="<image>", images=large("large.png")),
    "bytes of a file": lambda model, _: model.processor(text="<image>", images=large("large.tif")),
    "range": lambda model, _: model.processor(text="<image>", images=np.linspace(0.0, 255.0, 64).reshape(8, 8)),
    "both names of a cache": lambda model, _: model(torch.tensor([[1]]), past_key_values=NO_TOKENS, cache=NO_TOKENS),
    "other features": lambda model, _: model.get_image_features(torch.zeros(1, 3, 32, 32), vision_feature_layer=-1),
    "other size": lambda model, _: model.get_image_features(torch.zeros(1, 3, 64, 64)),
    "key of a recipe": lambda model, _: training(lerning_rate=1),
    "adapter apart": lambda model, _: training(
        stage=..., stages=[{"stage": "instruct", "lora": {"merge": False}}, {"stage": "moe"}]
    ),
    "streamed": lambda model, _: training(data=iter(ROWS), max_steps=...),
    "training that pushes": lambda model, _: training(push_to_hub=True),
    "earlier run": lambda model, _: training_again(model, {}, {}),
    "other recipe": lambda model, _: training_again(model, {}, {"resume": True, "learning_rate": 1e-2}),
    "weights alone": lambda model, _: training_again(model, {"save_only_model": True}, {"resume": True}),
    "other weights": lambda model, _: training_again(model, {}, {"resume": True}, without_a_weight),
    "no run": lambda model, _: training_beside("out/align/checkpoint-1000"),
    "folders of a user": lambda model, _: demo_beside("demo/checkpoint"),
    "no row": lambda model, _: training(model, data=BROKEN_ROWS),
    "broken row": lambda model, _: training(model, data=ROWS + BROKEN_ROWS, unusable_rows="error"),
    "no question": lambda model, _: evaluating(model, [{"question": "Which?"}]),
    "refused field": lambda model, _: training(model, data=[with_tool_calls()]),
    "no such choice": lambda model, _: evaluating(
        model, [{"question": "Which?", "image": None, "choices": ["left", "right"], "answer": 2}]
    ),
    "places of a question": lambda model, _: user_turn([picture(0)], "<image> or <image>?"),
    "table of another kind": lambda model, _: rows_of_another_file(),
    "split of a file": lambda model, _: rows_of_a_file(split="validation"),
    "streamed file": lambda model, _: rows_of_a_file(streaming=True),
    "planned memory": lambda model, _: plan(model.config, memory="80 gigs"),
    "planned rows": lambda model, _: plan(model.config, images=4, max_length=32),
    "planned sparse model": lambda model, _: plan(upcycle(model).config, stage="moe", moe={"num_experts": 2}),
    "planned quantised model": lambda model, _: plan(
        with_config(model, "my-quantised-model", quantization_config={"quant_method": "bitsandbytes"})
    ),
    "planned part of its author's own": lambda model, monkeypatch: plan(of_an_unknown_part(monkeypatch)),
    "data for no checkpoint": lambda model, _: check_data(ROWS, model=LANGUAGE_MODEL),
    "evaluated language model": lambda model, _: evaluate(LANGUAGE_MODEL, []),
    "planned language model": lambda model, _: plan(LANGUAGE_MODEL),
}


@pytest.fixture(scope="module")
def model(parts) -> MoellavaForCausalLM:
    hub = parts.hub(LANGUAGE_MODEL, CLIP)
    return load_pretrained_model(hub / LANGUAGE_MODEL, vision_tower=hub / CLIP, device="cpu").model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_documented(case, model, parts, tmp_path, monkeypatch):
    hub = parts.hub(LANGUAGE_MODEL, CLIP, SIGLIP, *([BIOMEDCLIP] if case == "extra" else []))
    for owner in hub.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    monkeypatch.chdir(tmp_path)
    # Without what other tests of this process have registered.
    for registry in (ENCODERS, PROJECTORS):
        monkeypatch.setattr(registry, "_classes", {name: registry[name] for name in built_in(registry)})
    with pytest.raises((FileExistsError, FileNotFoundError, ImportError, TypeError, ValueError)) as caught:
        ERRORS[case](model, monkeypatch)
    # A subclass of no public name is what it is a subclass of, to the reader.
    kind = next(cls for cls in type(caught.value).__mro__ if not cls.__name__.startswith("_"))
    printed = f"{kind.__name__}: {caught.value}"
    documented = messages()[list(ERRORS).index(case)]
    assert is_message(printed, documented), f"printed:    {printed}\ndocumented: {documented}"
    assert not list(tmp_path.glob("*.saving"))


def test_every_documented_message_is_produced():
    assert len(messages()) == len(ERRORS)
