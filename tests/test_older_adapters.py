# SPDX-License-Identifier: Apache-2.0
"""What belongs to an older checkpoint's language model: LoRA adapters, and projectors alone.

The adapters are made by PEFT, on the family's own class where transformers has it, and what PEFT itself answers with
them is compared with what `load_pretrained_model` and `moellava convert` make of the same folders.
"""

import json
import shutil
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from older import Older, write_older, write_tower, write_weights
from older_reference import IMAGE, Reference, expand2square
from parts import picture, run_python
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForCausalLM
from typer.testing import CliRunner

from moellava import convert, load_pretrained_model
from moellava.cli import app
from moellava.converting import OlderCheckpointError


# PEFT asks transformers' own classes, on which it is called here, by the older of two names.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 1e-5

CLASSES = {"llama": "Llama", "mistral": "Mistral", "phi": "Phi", "qwen1_5": "Qwen2"}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mistral": ["q_proj", "v_proj", "down_proj"],
    "phi": ["q_proj", "v_proj", "dense", "fc1", "fc2"],
    "qwen1_5": ["k_proj", "o_proj", "up_proj"],
    "qwen": ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"],
}
TEXT = [17, 203, 45, 301, 88, 12, 150, 333, 61, 274, 19]
WITH_PICTURE = [21, 210, 34, IMAGE, 77, 145, 302, 18, 99, 250, 41, 360]


# ---------------------------------------------------------------------------------------------------------------------
# What the tests share
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    """A LoRA folder, its base, and what PEFT makes of the two."""

    folder: Path
    base: Path
    older: Older
    merged: dict[str, torch.Tensor]  # the base's weights with the adapter added by PEFT, and the projector
    model: torch.nn.Module | None  # PEFT's own, unmerged

    def reference(self) -> Reference:
        older = self.older
        return Reference(self.merged, older.config, older.tower_folder, older.projector_prefix, older.tower_prefix)


def random_lora_(model: torch.nn.Module) -> None:
    """Makes B, which begins as zeros, so large that an adapter at the wrong place or scale shows."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def tree_of(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model that is nothing but the linear layers of a state dict, for a class that transformers does not have."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or tensor.ndim != 2 or "wte" in path:
            continue
        parent, parts = root, path.split(".")
        for part in parts[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=f"{path}.bias" in state)
        layer.weight.data = tensor.clone()
        parent.add_module(parts[-1], layer)
    return root


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_adapter(
    root: Path, family: str, *, projector: str = "mlp2x_gelu", tokenizer: bool = False, **lora
) -> Adapter:
    """Writes a base as transformers has it, and beside it what a LoRA run of the older trainer leaves."""
    tower = write_tower(root / "tower")
    older = write_older(
        root / "dense",
        family,
        tower_folder=tower,
        projector=projector,
        with_tower_weights=False,
        tokenizer_files="fast",
    )
    state = {name: tensor for name, tensor in older.state.items() if "mm_projector" not in name}
    own = {name: value for name, value in older.config.items() if name not in ("model_type", "architectures")}
    base, folder = root / "base", root / "lora"
    base.mkdir()
    if family in CLASSES:
        config = getattr(transformers, f"{CLASSES[family]}Config")(**own)
        model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval()
        bias = {"lm_head.bias": torch.randn(config.vocab_size)} if family == "phi" else {}
        model.load_state_dict(state | bias)
        model.save_pretrained(base)
        if bias:
            model.lm_head.bias.data.zero_()  # the older class was trained without the bias that its base has
    else:
        write_weights(base, state)
        write_json(base / "config.json", own | {"model_type": family})
        model = tree_of(state)
    for path in older.folder.iterdir():
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            shutil.copy(path, base)

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.05, "target_modules": TARGETS[family]} | lora
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=None, **options)).eval()
    random_lora_(adapted)
    adapted.save_pretrained(folder)
    trained = {f"base_model.model.{name}": t for name, t in older.state.items() if "mm_projector" in name}
    torch.save(trained, folder / "non_lora_trainables.bin")
    write_json(folder / "config.json", older.config)
    if tokenizer:
        for path in base.iterdir():
            if "token" in path.name:
                shutil.copy(path, folder)

    merged = dict(older.state)
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            merged[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    merged = {name: tensor.detach().clone() for name, tensor in merged.items()}
    assert sum(not torch.equal(merged[name], tensor) for name, tensor in older.state.items()) >= 8
    return Adapter(folder, base, older, merged, adapted if family in CLASSES else None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def make(family: str, **fields) -> Adapter:
        key = repr((family, sorted(fields.items())))
        if key not in made:
            made[key] = write_adapter(Path(tempfile.mkdtemp(dir=root)), family, **fields)
        return made[key]

    return make


def load(adapter: Adapter, folder: Path | None = None, **options):
    base = options.pop("base", adapter.base)
    return load_pretrained_model(str(folder or adapter.folder), model_base=str(base), device="cpu", **options)[0]


@pytest.fixture
def copy(tmp_path):
    """Copies an adapter's folder, with fields of one of its JSON files changed."""

    def make(adapter: Adapter, file: str = "adapter_config.json", **changed) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(adapter.folder, folder)
        write_json(folder / file, read_json(folder / file) | changed)
        return folder

    return make


@torch.no_grad()
def logits_of(model, row: list[int], pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    token, count = model.config.image_token_id, model.processor.num_image_tokens
    row = [entry for one in row for entry in ([token] * count if one == IMAGE else [one])]
    inputs = {} if pixel_values is None else {"pixel_values": pixel_values}
    return model(input_ids=torch.tensor([row]), **inputs).logits[0]


def pixels_of(older: Older) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(older.tower_folder, backend="pil")
    return processor([expand2square(picture(1), processor.image_mean)], return_tensors="pt")["pixel_values"]


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    size = min(found.shape[-1], expected.shape[-1])
    found, expected = found[:, :size].double(), expected[:, :size].double()
    assert found.shape == expected.shape
    assert expected.std() > 0.1
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


def assert_as_peft_says(adapter: Adapter, model) -> None:
    """About text, what PEFT's own model says; about a picture too, what the float64 reference says with its weights."""
    if adapter.model is not None:
        with torch.no_grad():
            assert_near(logits_of(model, TEXT), adapter.model(torch.tensor([TEXT])).logits[0])
    reference, pixels = adapter.reference(), pixels_of(adapter.older)
    assert_near(logits_of(model, TEXT), reference.logits(TEXT))
    assert_near(logits_of(model, WITH_PICTURE, pixels), reference.logits(WITH_PICTURE, pixels), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TARGETS)
def test_merged_is_unmerged_is_pefts_own(adapters, family):
    adapter = adapters(family)
    merged, unmerged = load(adapter), load(adapter, merge=False)
    assert isinstance(unmerged, peft.PeftModel) and not isinstance(merged, peft.PeftModel)
    assert not any("lora_" in name for name in merged.state_dict())
    assert not merged.training and not unmerged.training
    assert_as_peft_says(adapter, merged)
    assert_as_peft_says(adapter, unmerged)
    assert_near(logits_of(unmerged, TEXT), logits_of(merged, TEXT))


@pytest.mark.parametrize("lora", [{"use_rslora": True}, {"r": 3, "lora_alpha": 7}, {"layers_to_transform": [1, 3]}])
@pytest.mark.parametrize("family", ["phi", "qwen"])
def test_options_that_peft_computes(adapters, family, lora):
    if "layers_to_transform" in lora:
        lora = lora | {"layers_pattern": "h" if family == "qwen" else "layers"}
    adapter = adapters(family, **lora)
    assert_as_peft_says(adapter, load(adapter))


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_the_older_naming(adapters, tmp_path, family, infix):
    """As PEFT 0.4 wrote it: a .bin, with or without the adapter's name in the keys, and few options."""
    adapter, folder = adapters(family), tmp_path / "lora"
    shutil.copytree(adapter.folder, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.replace("_A.weight", f"_A{infix}.weight"): tensor for name, tensor in tensors.items()}
    tensors = {name.replace("_B.weight", f"_B{infix}.weight"): tensor for name, tensor in tensors.items()}
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    config = read_json(folder / "adapter_config.json")
    names = ("bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform")
    names += ("lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "target_modules")
    older = {name: config[name] for name in names}
    older |= {"auto_mapping": None, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "revision": None}
    write_json(folder / "adapter_config.json", older | {"task_type": "CAUSAL_LM"})
    assert_as_peft_says(adapter, load(adapter, folder))
    assert_as_peft_says(adapter, load(adapter, folder, merge=False))


def test_llava15(adapters, tmp_path):
    """LLaVA-1.5's projector lies one level higher, and its config has other names."""
    adapter, folder = adapters("llama"), tmp_path / "lora"
    shutil.copytree(adapter.folder, folder)
    trained = torch.load(folder / "non_lora_trainables.bin")
    torch.save(
        {name.replace("image_spatial_proj.", ""): t for name, t in trained.items()}, folder / "non_lora_trainables.bin"
    )
    fields = {name: value for name, value in adapter.older.config.items() if not name.startswith(("image_", "video_"))}
    fields |= {"image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu"}
    fields["mm_vision_tower"] = fields.pop("mm_image_tower")
    write_json(folder / "config.json", fields | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]})
    assert_as_peft_says(adapter, load(adapter, folder))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_onto_an_older_dense_checkpoint(adapters, tmp_path, kind):
    """The projector that was trained with the adapter takes the place of the base's own, of whatever kind that was."""
    adapter = adapters("phi")
    base = write_older(tmp_path / "base", "phi", tower_folder=adapter.older.tower_folder, projector=kind)
    language = {name: tensor for name, tensor in adapter.older.state.items() if "mm_projector" not in name}
    write_weights(base.folder, base.state | language)
    model = load(adapter, base=base.folder)
    if adapter.model is not None:
        with torch.no_grad():
            assert_near(logits_of(model, TEXT), adapter.model(torch.tensor([TEXT])).logits[0])
    reference = Reference(
        base.state | adapter.merged, adapter.older.config, base.tower_folder, base.projector_prefix, base.tower_prefix
    )
    pixels = pixels_of(adapter.older)
    assert_near(logits_of(model, WITH_PICTURE, pixels), reference.logits(WITH_PICTURE, pixels), 1e-4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mm_projector.image_spatial_proj.2", "multi_modal_projector.linear_2"),
        (
            "image_tower.image_tower.vision_model.encoder.layers.1.self_attn.q_proj",
            "vision_tower.encoder.layers.1.self_attn.q_proj",
        ),
    ],
)
def test_an_adapter_of_the_projector_or_the_tower(adapters, copy, name, layer):
    """The older trainer's search for linear layers found theirs too."""
    adapter = adapters("llama")
    plain, folder = load(adapter).state_dict(), copy(adapter)
    path, layer = folder / "adapter_model.safetensors", f"model.{layer}.weight"
    rows, columns = plain[layer].shape
    a, b = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1
    own = {f"base_model.model.model.{name}.lora_{kind}.weight": t for kind, t in (("A", a), ("B", b))}
    save_file(load_file(path) | own, path)
    found = load(adapter, folder).state_dict()
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == {layer}
    torch.testing.assert_close(found[layer], plain[layer] + 3 * b @ a)


def test_onto_a_base_that_has_the_projector(adapters, copy, tmp_path):
    """An adapter that was trained on an older checkpoint whose projector stayed as it was."""
    adapter = adapters("phi")
    base = write_older(tmp_path / "base", "phi", tower_folder=adapter.older.tower_folder)
    write_weights(base.folder, base.state | adapter.older.state)
    folder = copy(adapter)
    (folder / "non_lora_trainables.bin").unlink()
    model = load(adapter, folder, base=base.folder)
    reference = Reference(
        base.state | adapter.merged, adapter.older.config, base.tower_folder, base.projector_prefix, base.tower_prefix
    )
    pixels = pixels_of(adapter.older)
    assert_near(logits_of(model, WITH_PICTURE, pixels), reference.logits(WITH_PICTURE, pixels), 1e-4)


def test_weights_trained_in_full_beside_the_adapter(adapters, tmp_path):
    """Whatever was trained without LoRA takes the place of the base's, the head and the embedding included."""
    adapter, folder = adapters("llama"), tmp_path / "lora"
    shutil.copytree(adapter.folder, folder)
    trained = torch.load(folder / "non_lora_trainables.bin")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    own = {name: torch.randn_like(adapter.older.state[name]) for name in names}
    torch.save(trained | {f"base_model.model.{name}": t for name, t in own.items()}, folder / "non_lora_trainables.bin")
    state = load(adapter, folder).state_dict()
    rows = own["lm_head.weight"].shape[0]
    assert torch.equal(state["lm_head.weight"][:rows], own["lm_head.weight"])
    assert torch.equal(state["model.language_model.embed_tokens.weight"][:rows], own["model.embed_tokens.weight"])


def test_an_unmerged_adapter_generates_trains_and_merges(adapters):
    adapter = adapters("phi")
    model, merged = load(adapter, merge=False), load(adapter)
    inputs = model.processor(text="<image>\nWhat is shown?", images=picture(1), return_tensors="pt")
    expected = merged.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained and "vision" not in name)
    text = logits_of(model, TEXT)
    after = model.merge_and_unload()
    after.processor = merged.processor
    assert_near(logits_of(after, TEXT), text)


def test_the_folder_may_have_its_own_tokenizer(adapters):
    adapter = adapters("llama", tokenizer=True)
    model, _, tokenizer, _ = load_pretrained_model(str(adapter.folder), model_base=str(adapter.base), device="cpu")
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert_as_peft_says(adapter, model)


def test_converted_in_python_and_loaded_by_transformers_alone(adapters, tmp_path):
    adapter = adapters("phi")
    report = convert(adapter.folder, tmp_path / "out", base=adapter.base)
    assert report.left_out == {"lm_head.bias": "the older class has no bias in its head"}
    model = load(adapter)
    torch.save({"expected": logits_of(model, TEXT)}, tmp_path / "expected.pt")
    script = f"""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
        with torch.no_grad():
            found = model(torch.tensor([{TEXT}])).logits[0]
        expected = torch.load({str(tmp_path / "expected.pt")!r})["expected"]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert type(model).__name__ == "MoellavaForCausalLM", type(model)
    """
    run_python(textwrap.dedent(script))


def test_converted_on_the_command_line(adapters, tmp_path):
    adapter = adapters("qwen")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["convert", str(adapter.folder), str(out), "--base", str(adapter.base)])
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        assert_near(model(torch.tensor([TEXT])).logits[0], adapter.reference().logits(TEXT))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA weights within a checkpoint
# ---------------------------------------------------------------------------------------------------------------------

LORA = {"lora_enable": True, "only_lora_ffn": True, "lora_r": 4, "lora_alpha": 10, "lora_dropout": 0.05}


def with_lora(tmp_path: Path, family: str, everywhere: bool = False, **config) -> tuple[Older, Reference]:
    """A sparse checkpoint with LoRA weights beside those of its FFNs, and the float64 reference of the merged one."""
    tower = write_tower(tmp_path / "tower")
    older = write_older(tmp_path / "moe", family, tower_folder=tower, moe={}, **config)
    generator = torch.Generator().manual_seed(11)
    names = [name for name in older.state if ".mlp." in name and ".gate.wg." not in name and name.endswith("weight")]
    if everywhere:
        names += [
            name for name in older.state if "attn" in name and name.endswith("proj.weight") and "tower" not in name
        ]
        names += [name for name in older.state if name.endswith("c_attn.weight")]
        names += [f"{older.projector_prefix}.0.weight"]
    state, merged = dict(older.state), {name: tensor.double() for name, tensor in older.state.items()}
    for name in names:
        rows, columns = state[name].shape
        a, b = torch.randn(4, columns, generator=generator) * 0.1, torch.randn(rows, 4, generator=generator) * 0.1
        layer = name.removesuffix(".weight")
        state |= {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
        merged[name] = merged[name] + 2.5 * b.double() @ a.double()
    write_weights(older.folder, state)
    assert any("deepspeed_experts.1." in name for name in names)
    return older, Reference(merged, older.config, tower, older.projector_prefix, older.tower_prefix)


@pytest.mark.parametrize(
    ("family", "everywhere"), [("qwen1_5", False), ("minicpm", False), ("qwen1_5", True), ("qwen", True), ("phi", True)]
)
def test_lora_within_a_sparse_checkpoint(tmp_path, family, everywhere):
    older, reference = with_lora(tmp_path, family, everywhere, lora=LORA)
    model = load_pretrained_model(str(older.folder), device="cpu")[0]
    pixels = pixels_of(older)
    size = older.vocabulary
    assert_near(logits_of(model, TEXT)[:, :size], reference.logits(TEXT)[:, :size], 1e-4)
    found, expected = logits_of(model, WITH_PICTURE, pixels), reference.logits(WITH_PICTURE, pixels)
    assert_near(found[:, :size], expected[:, :size], 1e-4)


def test_a_merged_sparse_checkpoint_says_so_in_its_config(tmp_path):
    older = write_older(
        tmp_path / "moe", "qwen1_5", tower_folder=write_tower(tmp_path / "tower"), moe={}, lora={}, lora_merge=LORA
    )
    model = load_pretrained_model(str(older.folder), device="cpu")[0]
    reference = Reference(
        older.state, older.config, older.tower_folder, older.projector_prefix, older.tower_prefix
    ).logits(TEXT)
    assert_near(logits_of(model, TEXT)[:, : older.vocabulary], reference[:, : older.vocabulary], 1e-4)


def test_lora_within_a_checkpoint_cannot_stay_apart(tmp_path):
    older, _ = with_lora(tmp_path, "qwen1_5", lora=LORA)
    with pytest.raises(OlderCheckpointError, match="always merged. Leave merge=False out"):
        load_pretrained_model(str(older.folder), device="cpu", merge=False)


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4}])
def test_lora_within_a_checkpoint_needs_its_scale(tmp_path, lora):
    older, _ = with_lora(tmp_path, "qwen1_5", lora=lora)
    with pytest.raises(OlderCheckpointError, match="no lora_alpha and lora_r"):
        load_pretrained_model(str(older.folder), device="cpu")


def test_lora_within_a_checkpoint_that_is_not_whole(tmp_path):
    older, _ = with_lora(tmp_path, "qwen1_5", lora=LORA)
    path = older.folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, path)
    with pytest.raises(OlderCheckpointError, match="is not whole"):
        load_pretrained_model(str(older.folder), device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Projectors alone
# ---------------------------------------------------------------------------------------------------------------------


def write_projector_alone(adapter: Adapter, folder: Path, rename=lambda name: name) -> Path:
    """What the first stage leaves: the projector and a config."""
    folder.mkdir()
    trained = {rename(name): t for name, t in adapter.older.state.items() if "mm_projector" in name}
    torch.save(trained, folder / "mm_projector.bin")
    write_json(folder / "config.json", adapter.older.config)
    return folder


@pytest.mark.parametrize(
    ("family", "kind"), [("phi", "mlp2x_gelu"), ("llama", "linear"), ("mistral", "qformer2_4"), ("qwen", "mlp2x_gelu")]
)
def test_a_projector_alone(adapters, tmp_path, family, kind):
    adapter = adapters(family, projector=kind)
    older, folder = adapter.older, write_projector_alone(adapter, tmp_path / "stage 1")
    model = load(adapter, folder)
    reference = Reference(older.state, older.config, older.tower_folder, older.projector_prefix, older.tower_prefix)
    pixels = pixels_of(older)
    assert_near(logits_of(model, WITH_PICTURE, pixels), reference.logits(WITH_PICTURE, pixels), 1e-4)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("mm_projector", "mm_adapter"), "belong to no part"),
        (lambda name: name.partition("image_spatial_proj.")[2], "belong to no part"),
        (lambda name: name.replace("image_spatial_proj.2", "image_spatial_proj.4"), "has no 4.bias"),
        (lambda name: name.replace(".weight", ".gain"), "gain"),
    ],
)
def test_strange_keys_of_a_projector(adapters, tmp_path, rename, message):
    adapter = adapters("phi")
    folder = write_projector_alone(adapter, tmp_path / "stage 1", rename)
    with pytest.raises(ValueError, match=message):
        load(adapter, folder)


def test_a_projector_alone_needs_its_base(adapters, tmp_path):
    folder = write_projector_alone(adapters("phi"), tmp_path / "stage 1")
    with pytest.raises(OlderCheckpointError, match="model_base"):
        load_pretrained_model(str(folder), device="cpu")


@pytest.mark.parametrize("more", [100, -100])
def test_a_projector_with_a_base_of_another_vocabulary(adapters, tmp_path, more):
    """Where `<image>` takes a new row, the others have to be as many as the config says."""
    adapter = adapters("phi")
    folder = write_projector_alone(adapter, tmp_path / "stage 1")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = len(adapter.older.tokenizer)  # none is free
    write_json(folder / "config.json", config | {"vocab_size": rows})
    base = shutil.copytree(adapter.base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if "embed_tokens" in name or "lm_head" in name]:
        tensors[name] = tensors[name][:1].repeat(rows + more, *[1] * (tensors[name].ndim - 1))
    write_weights(base, tensors)
    with pytest.raises(ValueError, match=f"has {rows + more} rows, but by the config's .* the vocabulary has {rows}"):
        load(adapter, folder, base=base)


def test_a_projector_that_lacks_a_weight(adapters, tmp_path):
    adapter = adapters("phi")
    folder = write_projector_alone(adapter, tmp_path / "stage 1")
    trained = torch.load(folder / "mm_projector.bin")
    trained.pop(next(iter(trained)))
    torch.save(trained, folder / "mm_projector.bin")
    with pytest.raises(ValueError, match="missing linear_1.weight"):
        load(adapter, folder)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is said
# ---------------------------------------------------------------------------------------------------------------------


def test_an_adapter_without_its_base(adapters):
    with pytest.raises(OlderCheckpointError, match="model_base"):
        load_pretrained_model(str(adapters("phi").folder), device="cpu")


def test_an_adapter_needs_peft_and_says_so_before_the_base_is_read(adapters, tmp_path, monkeypatch):
    adapter = adapters("phi")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"A LoRA adapter needs PEFT.* `pip install moellava\[peft\]`"):
        load(adapter, base=tmp_path)


@pytest.mark.parametrize("content", ['{"r": 4}', "no JSON", "[]", '{"peft_type": "NEW"}'])
def test_an_adapter_config_that_cannot_be_read(adapters, copy, content):
    adapter = adapters("phi")
    folder = copy(adapter)
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(OlderCheckpointError, match=r"adapter_config.json of .* cannot be read by PEFT"):
        load(adapter, folder)


def test_an_adapter_without_a_weight(adapters, copy):
    adapter = adapters("phi")
    folder = copy(adapter)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(OlderCheckpointError, match="adapter_model.safetensors holds no weights"):
        load(adapter, folder)


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("adapter_model.safetensors", FileNotFoundError, "adapter_model.safetensors or adapter_model.bin"),
        ("adapter_config.json", OlderCheckpointError, "no adapter_config.json"),
        ("non_lora_trainables.bin", FileNotFoundError, "Expected non_lora_trainables.bin"),
    ],
)
def test_files_that_are_missing(adapters, copy, tmp_path, missing, error, message):
    adapter = adapters("phi")
    folder = copy(adapter)
    (folder / missing).unlink()
    with pytest.raises(error, match=message):
        load(adapter, folder)
    with pytest.raises(error, match=message):
        convert(folder, tmp_path / "out", base=adapter.base)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_neither_adapter_nor_projector(adapters, copy):
    adapter = adapters("phi")
    folder = copy(adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
        (folder / name).unlink()
    with pytest.raises(OlderCheckpointError, match="has neither non_lora_trainables.bin.*nor mm_projector.bin"):
        load(adapter, folder)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 8}, "do not fit the model"),
        ({"r": "four"}, "says r='four'; expected a number"),
        ({"lora_alpha": None}, "says lora_alpha=None; expected a number"),
    ],
)
def test_options_that_cannot_be_taken_over(adapters, copy, option, message):
    adapter = adapters("phi")
    with pytest.raises(OlderCheckpointError, match=message):
        load(adapter, copy(adapter, **option))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: name.replace("layers.3", "layers.9"), "does not have: model.layers.9"),
        (lambda name: name.replace("fc1", "up_proj"), "does not have: .*up_proj"),
        (
            lambda name: name.replace("model.layers.0.mlp.fc1", "model.mm_projector.image_spatial_proj.4"),
            "does not have: model.mm_projector.image_spatial_proj.4",
        ),
        (lambda name: name.replace("lora_A", "lora_E"), "is no weight of a LoRA layer"),
        (lambda name: name.replace("layers.0.mlp.fc1.lora_A", "layers.0.mlp.fc9.lora_A"), "alone"),
    ],
)
def test_names_that_the_model_does_not_have(adapters, copy, change, message):
    adapter = adapters("phi")
    folder = copy(adapter)
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(OlderCheckpointError, match=message):
        load(adapter, folder)


def test_a_base_of_another_size_or_family(adapters, tmp_path):
    adapter = adapters("phi")
    own = {name: value for name, value in adapter.older.config.items() if name not in ("model_type", "architectures")}
    for name, fields in (
        ("wide", {"hidden_size": 128}),
        ("short", {"num_hidden_layers": 3}),
        ("vocabulary", {"vocab_size": 300, "pad_token_id": None}),
    ):
        base = tmp_path / name
        shutil.copytree(adapter.base, base)
        transformers.PhiForCausalLM(transformers.PhiConfig(**own | fields)).save_pretrained(base)
        with pytest.raises(ValueError, match=r"base") as error:
            load(adapter, base=base)
        assert str(base) in str(error.value)
    with pytest.raises(OlderCheckpointError, match="base"):
        load(adapter, base=adapters("qwen").base)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(adapter, base=tmp_path / "nowhere")
