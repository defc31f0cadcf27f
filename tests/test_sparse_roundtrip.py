# SPDX-License-Identifier: Apache-2.0
"""What the foundation promises, for sparse models: saved and loaded bit by bit, here and without the package, batches,
caches, devices, compilation, checkpointing, and training that changes what it should and nothing else."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import MAIN_FAMILIES, checkpoint_activations, pictures, run_python
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    StaticCache,
    pipeline,
)

from moellava import MoellavaForCausalLM, MoellavaModel, load_pretrained_model, upcycle
from moellava.parts.moe_block_moellava import SparseMoeBlock


FORMS = {
    "plain": {"num_experts_per_tok": 2},
    "residual": {"num_experts_per_tok": 2, "use_residual": True, "router_bias": True},
    "meta expert": {"num_experts_per_tok": 1, "use_meta_expert": True, "freeze_router": True},
}
PICTURES = pictures(3)
TEXT = ["<image> What is it?", "No picture here, only words.", "Is <image> like <image> or not?"]
ROWS = [PICTURES[:1], [], PICTURES[1:]]


@pytest.fixture(scope="module")
def dense_of(parts):
    models = {}

    def make(family: str = "llama") -> MoellavaForCausalLM:
        if family not in models:
            models[family] = load_pretrained_model(
                parts.language_model(family), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
            ).model
        return models[family]

    return make


@torch.no_grad()
def told_apart(model: MoellavaForCausalLM, seed: int = 0) -> MoellavaForCausalLM:
    """Makes different experts of those that upcycling left alike."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks_of(model):
        for parameter in block.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def sparse_of(dense_of):
    """A function: a sparse model of a family, whose experts differ. A new one at every call."""

    def make(family: str = "llama", form: str = "plain", **fields) -> MoellavaForCausalLM:
        dense = dense_of(family)  # first: the first call of a family draws a projector
        torch.manual_seed(0)
        return told_apart(upcycle(dense, **{"num_experts": 4, "layers": "sparse"} | FORMS[form] | fields))

    return make


@pytest.fixture(scope="module")
def shared(sparse_of) -> MoellavaForCausalLM:
    """A sparse model that no test changes."""
    return sparse_of(layers="dense")


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    shared.save_pretrained(folder)
    return folder


def blocks_of(model) -> list[SparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, SparseMoeBlock)]


def prepared(processor) -> dict:
    return processor(images=ROWS, text=TEXT, padding=True, return_tensors="pt")


def labels_of(inputs: dict) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).double().norm() / expected.double().norm()).item()


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    different = [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)]
    assert different == []


def own_fields(config) -> dict:
    return {name: v for name, v in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")}


# ---------------------------------------------------------------------------------------------------------------------
# Saved and loaded
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_round_trip(sparse_of, tmp_path, family, form):
    """Weights are equal bit by bit, and so is what models say that loaded the same file.

    Between memory and file there may be a last bit: of one row, the CPU's matrix product depends on whether the weight
    lies on a multiple of 16 bytes, which in a file that holds an odd vocabulary's bias it does not.
    """
    layers = ("first_half", "sparse", "dense")[MAIN_FAMILIES.index(family) % 3]
    model = sparse_of(family, form, layers=layers)
    inputs = prepared(model.processor)
    weights = model.state_dict()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        in_memory = model(**inputs, output_router_logits=True)
        expected = MoellavaForCausalLM.from_pretrained(tmp_path)(**inputs, output_router_logits=True)
    assert in_memory.logits.isfinite().all()
    assert relative_error(expected.logits, in_memory.logits) < 1e-6
    config = AutoConfig.from_pretrained(tmp_path)
    assert own_fields(config) == own_fields(model.config)
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == model.processor.to_dict()
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        if auto_class is AutoModel:
            assert type(loaded) is MoellavaModel
            assert_same_weights(loaded.state_dict(), model.model.state_dict())
            continue
        assert type(loaded) is MoellavaForCausalLM
        assert not report["unexpected_keys"]
        assert_same_weights(loaded.state_dict(), weights)
        with torch.no_grad():
            found = loaded(**inputs, output_router_logits=True)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.aux_loss, expected.aux_loss)
        for block in blocks_of(loaded):
            assert block.gate.weight.requires_grad == ("freeze_router" not in FORMS[form])
    again = load_pretrained_model(tmp_path, device="cpu").model
    assert torch.equal(logits_of(again, inputs), expected.logits)


# Every family, every form; loads all checkpoints of a folder by all Auto classes, and saves them again.
ELSEWHERE = """
import json
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

source, target, written = map(Path, {paths!r})
expected_of = torch.load(written / "expected.pt")
rows = [[Image.open(written / f"{{i}}.png") for i in row] for row in [[0], [], [1, 2]]]
trusted = {{"trust_remote_code": True}}
for name, expected in expected_of.items():
    folder = source / name
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    inputs = processor(images=rows, text={text!r}, padding=True, return_tensors="pt")
    base = AutoModel.from_pretrained(folder, **trusted)
    for key, value in base.state_dict().items():
        assert torch.equal(value, expected["weights"]["model." + key]), (name, key)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(folder, **trusted)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert model.config._experts_implementation == "sorted_mm"
        weights = model.state_dict()
        assert weights.keys() == expected["weights"].keys(), name
        for key, value in expected["weights"].items():
            assert weights[key].dtype == value.dtype and torch.equal(weights[key], value), (name, key)
        with torch.no_grad():
            output = model(**inputs, output_router_logits=True)
        assert torch.equal(output.logits, expected["logits"]), name
        assert torch.equal(output.aux_loss, expected["aux_loss"]), name
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected["generated"]), name
    for implementation in ("eager", "grouped_mm", "batched_mm") if name == "llama-plain" else ():
        other = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, **trusted)
        assert other.config._experts_implementation == implementation
        with torch.no_grad():
            assert torch.allclose(other(**inputs).logits, expected["logits"], atol=1e-4), (name, implementation)
    trains = {{key: p.requires_grad for key, p in model.named_parameters() if ".mlp.gate." in key}}
    assert set(trains.values()) == {{expected["trains"]}}, (name, trains)
    model.save_pretrained(target / name)
    processor.save_pretrained(target / name)
print(len(expected_of), "checkpoints")
"""


@pytest.fixture(scope="module")
def journey(sparse_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("journey")
    for index, picture in enumerate(PICTURES):
        picture.save(root / f"{index}.png")
    expected = {}
    for index, family in enumerate(MAIN_FAMILIES):
        form = list(FORMS)[index % 3]
        model, name = sparse_of(family, form), f"{family}-{form.split()[0]}"
        inputs = prepared(model.processor)
        model.save_pretrained(root / "first" / name)
        weights, model = model.state_dict(), MoellavaForCausalLM.from_pretrained(root / "first" / name)
        with torch.no_grad():
            output = model(**inputs, output_router_logits=True)
        expected[name] = {
            "weights": weights,
            "logits": output.logits,
            "aux_loss": output.aux_loss,
            "generated": model.generate(**inputs, max_new_tokens=4, do_sample=False),
            "trains": "freeze_router" not in FORMS[form],
        }
    torch.save(expected, root / "expected.pt")
    return root, list(expected)


def travel(root: Path, source: str, target: str) -> str:
    return run_python(ELSEWHERE.format(paths=[str(root / source), str(root / target), str(root)], text=TEXT))


def test_other_processes_load_and_save_without_the_package(journey):
    root, names = journey
    assert len(names) == 6
    for source, target in (("first", "second"), ("second", "third")):
        assert travel(root, source, target).startswith("6 checkpoints")
        for name in names:
            files = {path.name for path in (root / source / name).iterdir()} - {"README.md"}  # written by the package
            assert files == {path.name for path in (root / target / name).iterdir()}
            assert {"experts_moellava.py", "moe_block_moellava.py", "sparse_layers_moellava.py"} <= files
            for file in {file for file in files if file.endswith(".py")} | {"config.json", "processor_config.json"}:
                one, other = (root / folder / name / file for folder in (source, target))
                assert one.read_bytes() == other.read_bytes(), (name, file)


# Loads two checkpoints whose code differs, and asks the first one before and after.
TWO_CODES = """
{first_line}
import torch
from transformers import AutoModelForCausalLM

ids = torch.arange(1, 30)[None]
with torch.no_grad():
    first, second = (AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True) for name in {names!r})
    after = first(input_ids=ids).logits
    other = second(input_ids=ids).logits
    assert torch.equal(first(input_ids=ids).logits, after)
    expected = {{name: torch.load(name + ".pt") for name in {names!r}}}
    assert torch.equal(after, expected[{names!r}[0]])
    assert torch.equal(other, expected[{names!r}[1]])
print("unchanged")
"""


def test_checkpoints_of_different_code_do_not_touch_each_other(folder, shared, tmp_path):
    """In one process, in either order, with the package's code imported and without."""
    own, changed = (str(tmp_path / name) for name in ("own", "changed"))
    for name in (own, changed):
        shutil.copytree(folder, name)
    path = Path(changed) / "experts_moellava.py"
    code = path.read_text()
    assert code.count("output[place] * weight for place") == 1
    path.write_text(code.replace("output[place] * weight for place", "output[place] * weight * 2 for place"))
    ids = torch.arange(1, 30)[None]
    alone = "import torch\nfrom transformers import AutoModelForCausalLM\n"
    alone += f"model = AutoModelForCausalLM.from_pretrained({changed!r}, trust_remote_code=True)\n"
    alone += f"with torch.no_grad():\n    torch.save(model(torch.arange(1, 30)[None]).logits, {changed + '.pt'!r})"
    run_python(alone)
    with torch.no_grad():
        expected = shared(input_ids=ids).logits
    assert relative_error(torch.load(changed + ".pt"), expected) > 0.01
    torch.save(expected, own + ".pt")
    for names in ([own, changed], [changed, own]):
        assert run_python(TWO_CODES.format(first_line="", names=names)).strip() == "unchanged"
    torch.save(expected, changed + ".pt")  # where the package is imported its own code runs
    script = TWO_CODES.format(first_line="import moellava", names=[own, changed])
    assert run_python(script, block_moellava=False).strip() == "unchanged"


def test_dtypes_and_shards(sparse_of, tmp_path):
    sparse_of("phi", "residual").save_pretrained(tmp_path / "wide")
    model = load_pretrained_model(tmp_path / "wide", dtype="bfloat16", device="cpu").model
    inputs = prepared(model.processor)
    with torch.no_grad():
        output = model(**inputs, output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)  # the router's arithmetic is in fp32
    model.save_pretrained(tmp_path / "narrow", max_shard_size="200KB")
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits_of(loaded, inputs), output.logits)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    assert relative_error(logits_of(wide, inputs), output.logits.float()) < 0.1


def test_the_form_on_disk(folder):
    """Experts are one tensor of each kind, under the names of the tree."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    prefix = "model.language_model.layers.0.mlp."
    own = {name.removeprefix(prefix): tuple(t.shape) for name, t in weights.items() if name.startswith(prefix)}
    assert own == {"gate.weight": (4, 64), "experts.gate_up_proj": (4, 192, 64), "experts.down_proj": (4, 64, 96)}
    fields = json.loads((folder / "config.json").read_text())
    assert fields["moe_config"]["layers"] == [0, 1, 2, 3]
    assert fields["moe_config"]["num_experts"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# Use
# ---------------------------------------------------------------------------------------------------------------------


def test_pipeline(shared, folder):
    asks = pipeline("image-text-to-text", model=str(folder), device="cpu")
    found = asks(images=PICTURES[0], text=TEXT[0], max_new_tokens=6, generate_kwargs={"do_sample": False})
    inputs = shared.processor(images=[PICTURES[0]], text=TEXT[0], return_tensors="pt")
    tokens = shared.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = shared.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert answer
    assert found[0]["generated_text"].endswith(answer)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("form", FORMS)
def test_eight_rows_are_as_each_alone(sparse_of, form, cache):
    model = sparse_of("llama", form)
    images = pictures(8)
    text = ["<image> What is it?", "Words.", "<image> <image> Which is larger, and why?", "A.", "Is <image> red?"]
    text += ["No picture here, only words, and many of them: one two three.", "<image>", "Where? <image>"]
    counts = [prompt.count("<image>") for prompt in text]
    rows = [images[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(8)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    inputs = model.processor(images=rows, text=text, padding=True, return_tensors="pt")
    assert len(set(inputs["attention_mask"].sum(-1).tolist())) > 4
    together = model.generate(**inputs, **options)[:, -6:]
    for row in range(8):
        alone = model.processor(images=rows[row] or None, text=text[row], return_tensors="pt")
        assert torch.equal(model.generate(**alone, **options)[0, -6:], together[row]), text[row]


@torch.no_grad()
def test_three_rows_one_token_no_pictures(shared):
    """The older code took a batch of three for a tuple."""
    ids = torch.tensor([[5], [6], [7]])
    three = shared(input_ids=ids).logits
    assert three.shape[:2] == (3, 1)
    for row in range(3):
        assert relative_error(shared(input_ids=ids[row : row + 1]).logits, three[row : row + 1]) < 1e-5
    blank = torch.zeros(0, 3, 32, 32)
    assert torch.equal(shared(input_ids=ids, pixel_values=blank).logits, three)
    assert shared(input_ids=ids[:1, :1], output_router_logits=True).router_logits[0].shape == (1, 4)


@torch.no_grad()
def test_a_step_with_the_cache_is_the_whole_pass(shared):
    inputs = prepared(shared.processor)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    whole = shared(**inputs, output_router_logits=True)
    size = inputs["input_ids"].shape[1]
    first = {name: value[:, :-2] if value.dim() == 2 else value for name, value in inputs.items()}
    for cache in (None, StaticCache(shared.config.text_config, max_cache_len=size + 3)):
        output = shared(**first, past_key_values=cache, use_cache=True)
        for position in (size - 2, size - 1):
            output = shared(
                input_ids=inputs["input_ids"][:, position : position + 1],
                attention_mask=inputs["attention_mask"][:, : position + 1],
                position_ids=inputs["position_ids"][:, position : position + 1],
                past_key_values=output.past_key_values,
                output_router_logits=True,
            )
            assert relative_error(output.logits[:, 0], whole.logits[:, position]) < 1e-5
            own = whole.router_logits[0].view(3, size, -1)[:, position]
            assert relative_error(output.router_logits[0], own) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(sparse_of, tmp_path, form, bits):
    """Attention, dense MLPs and experts are quantised, routers stay as they are."""
    pytest.importorskip("bitsandbytes")
    model = sparse_of("phi", form)  # widths that bitsandbytes takes on the CPU
    model.save_pretrained(tmp_path)
    loaded = load_pretrained_model(tmp_path, **{f"load_{bits}bit": True}, device="cpu").model
    assert loaded.model.language_model.layers[0].self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
    state = model.state_dict()
    for name, tensor in loaded.named_parameters():
        if ".gate." in name or ".coefficient." in name:
            assert torch.equal(tensor.float(), state[name]), name
        if ".experts." in name and name.endswith(".weight"):
            assert tensor.dtype in (torch.uint8, torch.int8), name
    inputs = prepared(model.processor)
    with torch.no_grad():
        found = loaded(**inputs, output_router_logits=True)
    assert relative_error(found.logits.float(), logits_of(model, inputs)) < 0.5
    assert found.router_logits[0].dtype == torch.float32


def test_lora_on_the_experts(sparse_of):
    peft = pytest.importorskip("peft")
    model = sparse_of()
    inputs = prepared(model.processor)
    names = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=names, r=2))
    adapted.train()
    adapted(**inputs, labels=labels_of(inputs)).loss.backward()
    trained = {name.partition(".mlp.")[2] for name, gradient in gradients_of(adapted).items() if gradient.any()}
    assert trained
    assert all(name.startswith("experts.") and "lora_" in name for name in trained)


@pytest.mark.parametrize("form", FORMS)
def test_disk_offload(sparse_of, tmp_path, form):
    model = sparse_of("phi", form)
    model.save_pretrained(tmp_path / "model")
    devices = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "disk"}
    devices["model.language_model"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert all(parameter.is_meta for block in blocks_of(loaded) for parameter in block.parameters())
    inputs = prepared(model.processor)
    with torch.no_grad():
        expected, found = (each(**inputs, output_router_logits=True) for each in (model, loaded))
    assert relative_error(found.logits, expected.logits) < 1e-6
    assert found.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    tokens = [each.generate(**inputs, max_new_tokens=2, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*tokens)


def test_device_map_auto_does_not_split_a_block(shared, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1GB"})
    inputs = prepared(shared.processor)
    assert torch.equal(logits_of(loaded, inputs), logits_of(shared, inputs))
    assert "LlamaDecoderLayer" in loaded._no_split_modules


# ---------------------------------------------------------------------------------------------------------------------
# Compilation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("plain", {}),
        ("residual", {"eval_capacity_factor": 0.6, "capacity_factor": 0.6}),
        ("meta expert", {"min_capacity": 2, "eval_capacity_factor": 0.1}),
    ],
)
@torch.no_grad()
def test_compiles_as_one_graph(sparse_of, fresh_compiler, form, fields):
    model = sparse_of("llama", form, **fields)
    inputs = prepared(model.processor)
    if form != "plain":  # what is seen has been tested
        inputs = model.processor(text=["No picture here.", "Words."], padding=True, return_tensors="pt")
    labels = labels_of(inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for extra in ({}, {"labels": labels, "output_router_logits": True}):
        expected, found = model(**inputs, **extra), compiled(**inputs, **extra)
        assert relative_error(found.logits, expected.logits) < 1e-5
        for name in ("loss", "aux_loss"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or one.item() == pytest.approx(other.item(), rel=1e-5)
    # What the compiled pass was told does not stay.
    assert model(**inputs).router_logits is None
    assert len(model(**inputs, output_router_logits=True).router_logits) == 2


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_transformers_implementations_compile(sparse_of, fresh_compiler, implementation):
    model = sparse_of()
    inputs = model.processor(text=["No picture here.", "Words."], padding=True, return_tensors="pt")
    expected = logits_of(model, inputs)
    model.set_experts_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert relative_error(compiled(**inputs).logits, expected) < 1e-5


@torch.no_grad()
def test_compiles_as_one_graph_with_a_static_cache(shared, fresh_compiler):
    inputs = prepared(shared.processor)
    size = inputs["input_ids"].shape[1]
    compiled = torch.compile(shared, fullgraph=True, backend="eager", dynamic=False)
    found = []
    for model in (shared, compiled):
        cache = StaticCache(shared.config.text_config, max_cache_len=size + 1)
        model(**inputs, past_key_values=cache, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": torch.tensor([[5], [6], [7]]), "position_ids": torch.full((3, 1), size)}
        found.append(model(**step, attention_mask=mask, past_key_values=cache, output_router_logits=True))
    assert relative_error(found[1].logits, found[0].logits) < 1e-5
    assert relative_error(found[1].router_logits[0], found[0].router_logits[0]) < 1e-5


@pytest.mark.skipif(
    not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"),
    reason="this version of transformers cannot compile its grouped_mm with a backward pass in fp32",
)
def test_compiled_training_has_the_same_gradients(sparse_of, fresh_compiler):
    model = sparse_of(capacity_factor=1.0).train()
    inputs = model.processor(text=["No picture here.", "Words."], padding=True, return_tensors="pt")
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        run(**inputs, labels=labels_of(inputs)).loss.backward()
        found.append(gradients_of(model))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert (found[1][name] - found[0][name]).norm() <= 1e-4 * found[0][name].norm() + 1e-6, name


# ---------------------------------------------------------------------------------------------------------------------
# Gradient checkpointing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("plain", {"router_aux_loss_coef": 0.5}),
        ("residual", {"capacity_factor": 0.7, "router_jitter_noise": 0.1, "sample_second_expert": True}),
        ("meta expert", {"capacity_factor": 0.5}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_gradient_checkpointing(sparse_of, family, form, fields):
    model = sparse_of(family, form, layers="dense", **fields).train()
    inputs = prepared(model.processor)
    results = []
    for enable in (False, True):
        if enable:
            checkpoint_activations(model)
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        results.append((loss.item(), gradients_of(model)))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        assert (results[1][1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    if form != "meta expert":
        assert all(block.gate.weight.grad.abs().max() > 1e-4 for block in blocks_of(model))
    checkpoint_activations(model, enable=False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_gradient_checkpointing_of_two_passes_with_capacity(sparse_of):
    """Each pass is computed anew with its own padding, though the other one came after it."""
    model = sparse_of(layers="dense", capacity_factor=0.6).train()
    inputs = prepared(model.processor)
    rows = [
        {"input_ids": inputs["input_ids"][1:2], "attention_mask": inputs["attention_mask"][1:2]},
        {"input_ids": inputs["input_ids"][1:2].flip(1), "attention_mask": torch.ones_like(inputs["input_ids"][1:2])},
        {"input_ids": inputs["input_ids"][1:2, -3:], "attention_mask": torch.ones(1, 3, dtype=torch.long)},
    ]
    results = []
    for enable in (False, True):
        if enable:
            checkpoint_activations(model, use_reentrant=False)
        model.zero_grad()
        sum(model(**row, labels=row["input_ids"]).loss for row in rows).backward()
        results.append(gradients_of(model))
    for name, gradient in results[0].items():
        assert (results[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_reentrant_checkpointing(sparse_of):
    """It loses the gradient of the load-balancing loss, which is said, and serves where there is no such loss."""
    model = sparse_of().train()
    inputs = prepared(model.processor)
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(ValueError, match="reentrant gradient checkpointing is on. Use gradient_checkpointing_kwargs="):
        model(**inputs, labels=labels_of(inputs))
    with torch.no_grad():  # where nothing is to be trained, nothing is lost
        assert model(**inputs, labels=labels_of(inputs), output_router_logits=True).aux_loss > 0
    model.eval()
    assert model(**inputs, labels=labels_of(inputs)).loss.requires_grad
    quiet = sparse_of(router_aux_loss_coef=0).train()
    quiet(**inputs, labels=labels_of(inputs)).loss.backward()
    expected = gradients_of(quiet)
    quiet.zero_grad()
    checkpoint_activations(quiet, use_reentrant=True)
    quiet.enable_input_require_grads()
    quiet(**inputs, labels=labels_of(inputs)).loss.backward()
    for block in blocks_of(quiet):
        assert block.experts.down_proj.grad.abs().max() > 0
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert (gradients_of(quiet)[name] - expected[name]).norm() <= 1e-5 * expected[name].norm()


def test_part_of_the_model_may_be_frozen(sparse_of):
    """No gradient reaches the first router then, which is no fault."""
    model = sparse_of().train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    inputs = prepared(model.processor)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert set(gradients_of(model)) == {"lm_head.weight"}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sorted_mm", "eager", "grouped_mm", "batched_mm"])
def test_a_step_changes_the_expert_that_was_chosen(sparse_of, implementation):
    model = sparse_of(num_experts_per_tok=1, router_bias=True).train()
    model.set_experts_implementation(implementation)
    for block in blocks_of(model):
        block.gate.bias.data[2] = 100.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    inputs = prepared(model.processor)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        optimizer.step()
    for index in (0, 2):
        for kind in ("gate_up_proj", "down_proj"):
            name = f"model.language_model.layers.{index}.mlp.experts.{kind}"
            now = model.state_dict()[name]
            same = [torch.equal(now[expert], before[name][expert]) for expert in range(4)]
            assert same == [True, True, False, True], name


def test_a_frozen_router_stays(sparse_of, tmp_path):
    model = sparse_of("llama", "meta expert", router_bias=True)
    model.save_pretrained(tmp_path)
    for trained in (model, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        trained.train()
        before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        inputs = prepared(model.processor)
        trained(**inputs, labels=labels_of(inputs)).loss.backward()
        optimizer.step()
        now = trained.state_dict()
        assert all(torch.equal(now[name], before[name]) for name in now if ".mlp.gate." in name)
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert {f"model.language_model.layers.{i}.mlp.meta_expert.up_proj.weight" for i in (0, 2)} <= changed
        assert {f"model.language_model.layers.{i}.mlp.experts.down_proj" for i in (0, 2)} <= changed


def test_noise_is_of_training_alone(sparse_of):
    model = sparse_of(router_jitter_noise=0.2, sample_second_expert=True, layers="dense")
    inputs = prepared(model.processor)
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options))
    quiet = sparse_of(layers="dense")
    assert torch.equal(logits_of(model, inputs), logits_of(quiet, inputs))
    model.train()
    seeded = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seeded.append(logits_of(model, inputs))
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


def test_training_tells_the_experts_apart(dense_of):
    """From identical copies, a few steps lower the loss and make experts of them, and the load stays even."""
    torch.manual_seed(0)
    model = upcycle(dense_of(), num_experts=4, num_experts_per_tok=2, layers="sparse").train()
    inputs = prepared(model.processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for block in blocks_of(model):
        experts = block.experts.down_proj.flatten(1)
        assert torch.pdist(experts).min() > 1e-3


def test_bfloat16_training_step(sparse_of):
    model = sparse_of().to(torch.bfloat16).train()
    inputs = prepared(model.processor)
    output = model(**inputs, labels=labels_of(inputs), output_router_logits=True)
    output.loss.backward()
    gradients = gradients_of(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(block.gate.weight.grad.dtype == torch.bfloat16 for block in blocks_of(model))
    words = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), labels_of(inputs)[:, 1:].flatten(), ignore_index=-100
    )
    assert output.loss.item() == pytest.approx(words.item() + 0.01 * output.aux_loss.item(), rel=1e-3)
