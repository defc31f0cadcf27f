# SPDX-License-Identifier: Apache-2.0
"""Assemble, save, load: every encoder with every projector and every language model, here and where moellava is not.

The axes come from the registries and from `parts.LANGUAGE_MODELS`, so that a part that is added is tested without a
line here; a new encoder needs a tower of its name in `parts.VISION_TOWERS`, or an entry in `TOWERS`.
"""

import ast
import functools
import itertools
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from parts import LANGUAGE_MODELS, MAIN_FAMILIES, VISION_TOWERS, Parts, pictures, run_python
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPTextConfig,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaModel, MoellavaProcessor, load_pretrained_model
from moellava.configuration.tools_moellava import AUTO_MAP
from moellava.parts.part_table_moellava import PartTable
from moellava.parts.parts_moellava import ENCODERS, PROJECTORS, encoder_for
from moellava.reading.sources import Source
from moellava.reading.vision_tower import read_vision_tower
from moellava.saving.export import code_of, travelling_files


def built_in(registry: PartTable) -> list[str]:
    """The names that the package itself registers, whatever other tests of this process have registered."""
    return [name for name in registry.names() if registry[name].__module__.startswith("moellava.")]


ENCODER_NAMES = built_in(ENCODERS)
PROJECTOR_NAMES = built_in(PROJECTORS)
FAMILIES = list(LANGUAGE_MODELS)

# The kinds of towers that an encoder is loaded from; where an encoder is not named, the tower of its name.
TOWERS = {
    "auto": ("deit", "beit", "swin", "convnext", "dinov3"),
    "clip": ("clip", "clip_vision"),
    "dinov2": ("dinov2", "dinov2_registers"),
    "siglip": ("siglip", "siglip_vision", "siglip2_naflex"),
    "vit": ("vit", "vit_classifier"),
}
# Wherever a projector has these fields, they are small.
SMALL = {"num_query_tokens": 4, "qformer_hidden_size": 32, "num_latents": 4, "latent_dim": 32}
AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)

PICTURES = pictures(3)
TEXT = ["<image> What is it?", "No picture here, only words.", "Is <image> like <image> or not?"]
ROWS = [PICTURES[:1], [], PICTURES[1:]]


def pairwise_cover(*axes: list) -> list[tuple]:
    """Chooses combinations of one value of each axis, so that every two values of different axes meet in one of them.

    Greedy: each time the combination with the most pairs that have not met yet, the first of them in order.
    """
    columns = list(itertools.combinations(range(len(axes)), 2))
    pairs = {
        combination: {(i, j, combination[i], combination[j]) for i, j in columns}
        for combination in itertools.product(*axes)
    }
    open_pairs = set().union(*pairs.values())
    chosen = []
    while open_pairs:
        best = max(pairs, key=lambda combination: len(pairs[combination] & open_pairs))
        chosen.append(best)
        open_pairs -= pairs.pop(best)
    return chosen


MATRIX = list(itertools.product(ENCODER_NAMES, PROJECTOR_NAMES, FAMILIES))
COVER = pairwise_cover(ENCODER_NAMES, PROJECTOR_NAMES, FAMILIES)


def kinds_of(encoder: str) -> tuple[str, ...]:
    return TOWERS.get(encoder, (encoder,))


def kind_of(encoder: str, projector: str, family: str) -> str:
    """The kind of tower of a combination: an encoder's kinds take turns."""
    kinds = kinds_of(encoder)
    return kinds[(PROJECTOR_NAMES.index(projector) + FAMILIES.index(family)) % len(kinds)]


def tower_folder(parts: Parts, kind: str) -> Path:
    return parts.biomedclip() if kind == "biomedclip" else parts.vision_tower(kind)


@functools.cache
def feature_size(folder: Path) -> int:
    """The width of the features that a projector gets of a tower."""
    part = read_vision_tower(Source(folder))
    return encoder_for(MoellavaConfig(vision_config=part.config, encoder_type=part.encoder_type)).feature_size


def language_folder(parts: Parts, family: str, width: int | None = None) -> Path:
    """A language model of a family, of another width where one is asked for."""
    if width is None:
        return parts.language_model(family)
    fields = AutoConfig.from_pretrained(parts.language_model(family)).to_dict()
    heads = {name for name in ("num_attention_heads", "num_key_value_heads", "n_head") if name in fields}
    overrides = {"hidden_size": width} | dict.fromkeys(sorted(heads), width // 4)
    if "word_embed_proj_dim" in fields:
        overrides["word_embed_proj_dim"] = width
    rope = fields.get("rope_parameters")
    if rope is not None and "partial_rotary_factor" in rope:
        overrides["rope_parameters"] = {**rope, "partial_rotary_factor": 0.5}
    return parts.language_model(family, overrides=overrides)


def assembled(parts: Parts, encoder: str, projector: str, family: str, **fields) -> MoellavaForCausalLM:
    """A model of one combination; fields go to `load_pretrained_model`."""
    tower = tower_folder(parts, kind_of(encoder, projector, family))
    width = feature_size(tower) if projector == "identity" else None
    small = {name: value for name, value in SMALL.items() if name in PROJECTORS.fields(projector)}
    model = load_pretrained_model(
        language_folder(parts, family, width),
        mm_vision_tower=tower,
        encoder_type=encoder,
        projector_config={"type": projector, **small},
        device="cpu",
        **fields,
    ).model
    return aligned(model)


def prepared(processor) -> dict:
    return processor(images=ROWS, text=TEXT, padding=True, return_tensors="pt")


def aligned(model):
    """The model with every parameter in memory of its own.

    Where a file's tensors begin at no multiple of 64 bytes, so do those that are mapped from it, and the products of a
    matrix and a vector differ in their last bit. Values that are compared bit by bit are computed in equal memory.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)
    ]
    assert different == []


def fields_of(config) -> dict:
    """A config's fields, without the name that it was loaded by and the version that wrote it."""
    return {
        name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Every encoder x every projector x every language model
# ---------------------------------------------------------------------------------------------------------------------


def check_round_trip(parts: Parts, folder: Path, encoder: str, projector: str, family: str):
    model = assembled(parts, encoder, projector, family)
    assert model.config.encoder_type == encoder
    assert model.config.projector_config.type == projector
    inputs = prepared(model.processor)
    expected, weights = logits_of(model, inputs), model.state_dict()
    assert expected.isfinite().all()
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    assert not torch.equal(logits_of(model, blank), expected)
    model.save_pretrained(folder)

    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MoellavaConfig
    assert fields_of(config) == fields_of(model.config)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is MoellavaProcessor
    assert processor.to_dict() == model.processor.to_dict()
    again = prepared(processor)
    assert again.keys() == inputs.keys()
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)
    for auto_class in AUTO_CLASSES:
        loaded, report = auto_class.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        aligned(loaded)
        if auto_class is AutoModel:
            assert type(loaded) is MoellavaModel
            assert all(name.startswith("lm_head.") for name in report["unexpected_keys"])
            assert_same_weights(loaded.state_dict(), model.model.state_dict())
            with torch.no_grad():
                states = loaded(**inputs).last_hidden_state
                assert torch.equal(states, model.model(**inputs).last_hidden_state)
        else:
            assert type(loaded) is MoellavaForCausalLM
            assert not report["unexpected_keys"]
            assert_same_weights(loaded.state_dict(), weights)
            assert torch.equal(logits_of(loaded, inputs), expected)


@pytest.mark.parametrize(("encoder", "projector", "family"), COVER)
def test_round_trip(parts, tmp_path, encoder, projector, family):
    check_round_trip(parts, tmp_path / "model", encoder, projector, family)


@pytest.mark.matrix
@pytest.mark.parametrize(("encoder", "projector", "family"), MATRIX)
def test_round_trip_of_the_whole_matrix(parts, tmp_path, encoder, projector, family):
    check_round_trip(parts, tmp_path / "model", encoder, projector, family)


def test_the_cover_holds_every_pair():
    for first, second in itertools.combinations(range(3), 2):
        axes = (ENCODER_NAMES, PROJECTOR_NAMES, FAMILIES)
        met = {(combination[first], combination[second]) for combination in COVER}
        assert met == set(itertools.product(axes[first], axes[second]))
    assert len(set(COVER)) == len(COVER) < len(MATRIX) / 3
    assert pairwise_cover(ENCODER_NAMES, PROJECTOR_NAMES, FAMILIES) == COVER


def test_a_pairwise_cover_is_small():
    # The least number is that of the two longest axes: 3 x 3 and 4 x 3.
    assert len(pairwise_cover([1, 2, 3], [1, 2, 3])) == 9
    assert len(pairwise_cover([1, 2], [1, 2, 3], [1, 2, 3, 4])) == 12
    assert pairwise_cover([1, 2], ["a"]) == [(1, "a"), (2, "a")]


def test_the_axes_are_whole():
    assert {"auto", "biomedclip", "clip", "dinov2", "siglip", "vit"} <= set(ENCODER_NAMES)
    assert {"identity", "linear", "mlp", "perceiver", "qformer"} <= set(PROJECTOR_NAMES)
    assert {*MAIN_FAMILIES, "qwen3", "gemma", "mixtral", "qwen2_moe"} <= set(FAMILIES)
    used = {kind_of(*combination) for combination in COVER}
    assert used == {kind for encoder in ENCODER_NAMES for kind in kinds_of(encoder)}
    assert used == {*VISION_TOWERS, "biomedclip"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_survive(parts, tmp_path, dtype):
    model = assembled(parts, "clip", "mlp", "llama", dtype=dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert_same_weights(loaded.state_dict(), model.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# In a process without the package, and in the next one after that
# ---------------------------------------------------------------------------------------------------------------------


def elsewhere() -> list[tuple[str, str, str]]:
    """Every encoder, projector and main family at least once, and a mixture whose names differ on disk."""
    count = max(len(ENCODER_NAMES), len(PROJECTOR_NAMES), len(MAIN_FAMILIES))
    taken = [
        (ENCODER_NAMES[i % len(ENCODER_NAMES)], PROJECTOR_NAMES[i % len(PROJECTOR_NAMES)], MAIN_FAMILIES[i % 6])
        for i in range(count)
    ]
    return [*taken, ("clip", "mlp", "mixtral")]


# Loads the checkpoints of a folder by all Auto classes, compares with what the first process wrote, and saves them.
ELSEWHERE = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

source, target, written = (Path(name) for name in json.loads(sys.stdin.read()))
expected_of = torch.load(written / "expected.pt")
rows = [[Image.open(written / f"{i}.png") for i in row] for row in expected_of.pop("rows")]
text = expected_of.pop("text")
trusted = {"trust_remote_code": True}
for name, expected in expected_of.items():
    folder = source / name
    config = AutoConfig.from_pretrained(folder, **trusted)
    assert config.__class__.__module__.startswith("transformers_modules."), config.__class__
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    assert type(processor).__module__.startswith("transformers_modules.")
    inputs = processor(images=rows, text=text, padding=True, return_tensors="pt")
    assert inputs.keys() == expected["inputs"].keys()
    for key, value in expected["inputs"].items():
        assert torch.equal(inputs[key], value), (name, key)
    base = AutoModel.from_pretrained(folder, **trusted)
    assert type(base).__name__ == "MoellavaModel"
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(folder, **trusted)
        assert type(model).__module__.startswith("transformers_modules.")
        # One entry file: what AutoConfig gives is what the model's class asks for.
        assert type(config) is model.config_class is type(base).config_class is type(model.config)
        assert type(config) is type(AutoConfig.from_pretrained(folder, **trusted))
        weights = model.state_dict()
        assert weights.keys() == expected["weights"].keys(), name
        for key, value in expected["weights"].items():
            assert weights[key].dtype == value.dtype and torch.equal(weights[key], value), (name, key)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # see `aligned`
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected["logits"]), name
    for key, value in base.state_dict().items():
        assert torch.equal(value, expected["weights"]["model." + key]), (name, key)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, expected["generated"]), name
    for cls in (type(config), type(model), type(base), type(processor)):
        cls.register_for_auto_class()
        assert cls._auto_class is None
    # The processor was loaded apart from the model, and is saved into its folder.
    model.save_pretrained(target / name)
    processor.save_pretrained(target / name)
print(len(expected_of), "checkpoints", transformers.__version__)
"""


@pytest.fixture(scope="module")
def journey(parts, tmp_path_factory):
    """Checkpoints that this process saved, that a second one without the package saved again, and a third once more."""
    root = tmp_path_factory.mktemp("journey")
    expected = {"rows": [[0], [], [1, 2]], "text": TEXT}
    for index, picture in enumerate(PICTURES):
        picture.save(root / f"{index}.png")
    for combination in elsewhere():
        name = "-".join(combination)
        model = assembled(parts, *combination)
        inputs = prepared(model.processor)
        expected[name] = {
            "inputs": dict(inputs),
            "weights": model.state_dict(),
            "logits": logits_of(model, inputs),
            "generated": model.generate(**inputs, max_new_tokens=4, do_sample=False),
        }
        model.save_pretrained(root / "first" / name)
    torch.save(expected, root / "expected.pt")
    return root, [name for name in expected if name not in ("rows", "text")]


def travel(root: Path, source: str, target: str) -> str:
    arguments = json.dumps([str(root / source), str(root / target), str(root)])
    return run_python(f"import io, sys\nsys.stdin = io.StringIO({arguments!r})\n{ELSEWHERE}")


def test_other_processes_load_and_save_without_the_package(journey):
    root, names = journey
    assert travel(root, "first", "second").startswith(f"{len(names)} checkpoints")
    assert travel(root, "second", "third").startswith(f"{len(names)} checkpoints")
    for name in names:
        first, second, third = (contents(root / which / name) for which in ("first", "second", "third"))
        # The card is the package's to write.
        assert first.keys() - {"README.md"} == second.keys() == third.keys()
        code = [file for file in first if file.endswith(".py")]
        assert {"moellava_entry.py", "modeling_moellava.py", "configuration_moellava.py"} <= set(code)
        for file in (*code, "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
            assert first[file] == second[file] == third[file], (name, file)


def test_every_part_goes_elsewhere():
    encoders, projectors, families = zip(*elsewhere(), strict=True)
    assert set(encoders) == set(ENCODER_NAMES)
    assert set(projectors) == set(PROJECTOR_NAMES)
    assert set(families) >= set(MAIN_FAMILIES)


def test_with_the_package_no_trust_is_asked_for(journey):
    """The installed classes are registered, so that nothing asks whether a checkpoint's code may run."""
    root, names = journey
    output = run_python(
        f"""
import moellava
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor, AutoTokenizer
folder = {str(root / "first" / names[0])!r}
classes = [
    type(auto_class.from_pretrained(folder))
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor)
]
for name in ("Config", "Model", "ForCausalLM", "ForCausalLM", "Processor"):
    assert classes.pop(0) is getattr(moellava, "Moellava" + name), name
print(type(AutoTokenizer.from_pretrained(folder)).__name__, type(AutoImageProcessor.from_pretrained(folder)).__name__)
""",
        block_moellava=False,
    )
    assert len(output.split()) == 2
    assert "Processor" in output


# ---------------------------------------------------------------------------------------------------------------------
# What travels, and what an import costs
# ---------------------------------------------------------------------------------------------------------------------

TRAVELLING_IMPORTS = {"huggingface_hub", "numpy", "packaging", "PIL", "safetensors", "torch", "transformers"}


def test_travelling_files_import_only_what_transformers_brings():
    files = travelling_files()
    assert {"configuration_moellava.py", "modeling_moellava.py", "processing_moellava.py"} <= set(files)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module]
            elif isinstance(node, ast.ImportFrom):
                # `from .x import y` and `from ..room.x import y`; `from . import x` would stay behind.
                assert node.module is not None, (name, ast.unparse(node))
                assert f"{node.module.rpartition('.')[2]}.py" in files, (name, ast.unparse(node))
                continue
            else:
                continue
            for module in imported:
                top = module.partition(".")[0]
                is_known = top in TRAVELLING_IMPORTS or top in sys.stdlib_module_names
                # Within a `try`, where transformers does not take it for a requirement.
                assert is_known or (name, top) == ("quantised_moellava.py", "bitsandbytes"), (name, module)
                assert top != "moellava"


def test_a_saved_checkpoint_holds_the_code_of_its_config(parts, tmp_path):
    model = assembled(parts, "clip", "mlp", "llama")
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("**/*.py")} == code_of(model.config)
    for name in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / name).read_text())["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        module, _, cls = reference.partition(".")
        assert cls in (tmp_path / f"{module}.py").read_text()


def test_importing_the_package_is_cheap():
    output = run_python(
        """
import sys
import moellava
heavy = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
assert "load_pretrained_model" in dir(moellava)
print(moellava.__version__)
""",
        block_moellava=False,
    )
    assert output.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Saving over, into, and beside what is there
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(parts):
    """A small model of its own, to be changed."""
    return assembled(parts, "clip", "mlp", "llama")


@torch.no_grad()
def changed(model: MoellavaForCausalLM) -> MoellavaForCausalLM:
    """The same model with other weights."""
    for parameter in model.parameters():
        parameter.add_(1.0)
    return model


def assert_loads_as(folder: Path, weights: dict[str, torch.Tensor], **options):
    assert_same_weights(AutoModelForCausalLM.from_pretrained(folder, **options).state_dict(), weights)
    assert type(AutoProcessor.from_pretrained(folder)) is MoellavaProcessor


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_loads_as(tmp_path / "model", model.state_dict())


def test_foreign_files_stay_and_stale_weights_go(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="200KB")
    shards = {path.name for path in folder.glob("*.safetensors*")}
    foreign = {
        "NOTES.md": "# mine\n",
        "notes/today.txt": "kept\n",
        "optimizer.pt": "not of ours",
        ".gitattributes": "*.safetensors filter=lfs\n",
        "tower.safetensors": "of somebody else",
    }
    for name, content in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "link").symlink_to("NOTES.md")
    inode = folder.stat().st_mode

    changed(model).save_pretrained(folder)
    after = contents(folder)
    assert {name: after[name].decode() for name in foreign} == foreign
    assert (folder / "link").is_symlink()
    assert after["link"] == after["NOTES.md"]
    assert shards & set(after) == set()
    assert [path.name for path in folder.glob("model*.safetensors*")] == ["model.safetensors"]
    assert folder.stat().st_mode == inode
    assert_loads_as(folder, model.state_dict())

    model.save_pretrained(folder, max_shard_size="200KB")
    assert shards <= set(contents(folder))
    assert not (folder / "model.safetensors").exists()
    assert_loads_as(folder, model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_variants_lie_side_by_side(model, tmp_path):
    folder = tmp_path / "model"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    model.save_pretrained(folder, variant="small-1", max_shard_size="200KB")
    changed(model).save_pretrained(folder, variant="small-1")
    assert {path.name for path in folder.glob("model*.safetensors*")} == {
        "model.safetensors", "model.small-1.safetensors"
    }  # fmt: skip
    assert_loads_as(folder, weights)
    assert_loads_as(folder, model.state_dict(), variant="small-1")

    model.save_pretrained(folder, max_shard_size="200KB")
    assert not (folder / "model.safetensors").exists()
    assert_loads_as(folder, model.state_dict())
    assert_loads_as(folder, model.state_dict(), variant="small-1")


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason="this transformers adds adapters by a later PEFT alone",
)
def test_an_adapter_saved_beside_its_base_leaves_the_base(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    weights = contents(folder)["model.safetensors"]
    tuned = MoellavaForCausalLM.from_pretrained(folder)
    tuned.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
    assert contents(folder)["model.safetensors"] == weights


def test_saving_into_the_folder_that_the_weights_are_mapped_from(model, tmp_path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = prepared(model.processor)
    expected = logits_of(model, inputs)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for _ in range(2):
        loaded = load_pretrained_model(folder, device="cpu").model
        loaded.save_pretrained(folder)
        assert_same_weights(loaded.state_dict(), weights)
        assert torch.equal(logits_of(aligned(loaded), inputs), expected)
        assert_loads_as(folder, weights)


def test_relative_paths_links_and_trailing_slashes(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    model.save_pretrained("link/")
    assert (tmp_path / "link").is_symlink()
    assert_loads_as(tmp_path / "real", model.state_dict())
    model.save_pretrained(Path("new/and/deep"))
    assert_loads_as(tmp_path / "new/and/deep", model.state_dict())
    monkeypatch.chdir(tmp_path / "real")
    changed(model).save_pretrained(".")
    assert_loads_as(tmp_path / "real", model.state_dict())


def test_a_file_is_no_folder_to_save_into(model, tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError, match="model is a file; a checkpoint is saved into a folder"):
        model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "a file"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("at", ["weights", "processor", "code"])
def test_an_interrupted_save_leaves_the_earlier_checkpoint(model, tmp_path, monkeypatch, at):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    before = contents(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed(model)

    def full(*args, **kwargs):
        raise OSError("disk full")

    if at == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    elif at == "processor":
        monkeypatch.setattr(type(model.processor.tokenizer), "save_pretrained", full)
    else:
        monkeypatch.setattr("moellava.saving.checkpoint.export_code", full)
    for target in (folder, tmp_path / "other"):
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(target)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_loads_as(folder, weights)


# Kills itself at the n-th file-system event of a save, for growing n, until a save comes to its end.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from moellava import load_pretrained_model

folder = Path({folder!r})
model = load_pretrained_model(folder, device="cpu").model
model.requires_grad_(False)
for parameter in model.parameters():
    parameter.add_(1.0)
model.save_pretrained(Path({whole!r}))

def contents(folder):
    return {{str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}}

def counts(event, arguments):
    if event == "open":  # for writing
        return isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event in ("os.rename", "os.mkdir", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.chmod")

before, whole = contents(folder), contents(Path({whole!r}))
after = before | whole

def killed_at(last):
    "Whether the folder holds the new checkpoint after a save that is killed, and whether that save had ended."
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("original"), folder)
    child = os.fork()
    if child == 0:
        seen = 0
        def watch(event, arguments):
            nonlocal seen
            if counts(event, arguments):
                seen += 1
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        model.save_pretrained(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or status == 0, status
    now = contents(folder)
    assert now in (before, after), (last, sorted(now.keys() ^ before.keys()), sorted(now.keys() ^ after.keys()))
    return now == after, status == 0

shutil.copytree(folder, folder.with_name("original"))
last, is_new, ended = 1, *killed_at(1)
assert not is_new
first_old = last
while not ended:
    is_new, ended = killed_at(last + 10)
    if not is_new:
        first_old = last + 10
    last += 10
assert is_new
# Between these two lies the step that moves the new checkpoint into place: tried at every event.
for number in range(first_old + 1, first_old + 10):
    killed_at(number)
assert killed_at(10**6) == (True, True)
print(last)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and the exchange of two folders")
def test_a_killed_save_leaves_the_earlier_checkpoint_or_the_new_one(model, tmp_path):
    """At whatever moment the process dies, the folder is one of the two as a whole."""
    folder = tmp_path / "at" / "model"
    model.save_pretrained(folder)
    (folder / "notes").write_text("mine")
    output = run_python(
        KILLED.format(folder=str(folder), whole=str(tmp_path / "whole" / "model")), block_moellava=False
    )
    assert int(output) > 30
    changed(model)
    assert_loads_as(folder, model.state_dict())
    assert (folder / "notes").read_text() == "mine"


def test_the_processor_alone_into_a_models_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.processor.image_aspect_ratio = "square"
    model.processor.save_pretrained(tmp_path)
    after = contents(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {"processor_config.json"}
    assert after.keys() == before.keys()
    assert AutoProcessor.from_pretrained(tmp_path).image_aspect_ratio == "square"
    assert_loads_as(tmp_path, model.state_dict())


def test_the_config_alone(model, tmp_path):
    model.config.save_pretrained(tmp_path / "config")
    config = AutoConfig.from_pretrained(tmp_path / "config")
    assert fields_of(config) == fields_of(model.config)
    assert code_of(model.config).keys() <= {path.name for path in (tmp_path / "config").iterdir()}
    # A model that is saved without a processor becomes whole by the processor's own save.
    processor, model.processor = model.processor, None
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "processor_config.json").exists()
    processor.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    assert_loads_as(tmp_path / "model", model.state_dict())


def test_a_config_survives_json_and_dictionaries(model, tmp_path):
    config = model.config
    assert fields_of(MoellavaConfig.from_dict(config.to_dict())) == fields_of(config)
    assert fields_of(MoellavaConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))) == fields_of(config)
    for _ in range(2):
        config.save_pretrained(tmp_path)
        config = MoellavaConfig.from_pretrained(tmp_path)
    assert fields_of(config) == fields_of(model.config)


def test_registering_for_auto_classes_changes_nothing(model, tmp_path):
    # The card names the folder.
    before, after = tmp_path / "before" / "model", tmp_path / "after" / "model"
    model.save_pretrained(before)
    for cls in (MoellavaConfig, MoellavaModel, MoellavaForCausalLM, MoellavaProcessor):
        cls.register_for_auto_class()
        assert cls._auto_class is None
    MoellavaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(after)
    assert contents(before) == contents(after)


def test_the_base_model_saves_and_loads_by_itself(model, tmp_path):
    base = model.model
    base.save_pretrained(tmp_path)
    assert_same_weights(AutoModel.from_pretrained(tmp_path).state_dict(), base.state_dict())


def test_nothing_in_a_checkpoint_names_a_place_to_load_from(parts, model, tmp_path):
    """`parts` has the names of the folders that the parts came from, for the model card; no file has their place."""
    source = parts.language_model("llama").parent
    model.save_pretrained(tmp_path)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".py", ".jinja")}
    assert [name for name, text in texts.items() if str(source) in text] == []


def test_other_auto_classes_take_what_they_need(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert tokenizer.padding_side == "left"
    # A foreign config is none of ours.
    CLIPTextConfig().save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "foreign")
    shutil.rmtree(tmp_path / "foreign")
