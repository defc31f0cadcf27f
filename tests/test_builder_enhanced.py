# SPDX-License-Identifier: Apache-2.0
"""What the older builder's documentation promises, with its own code examples, on parts of the names that it uses.

The examples are the documentation's, word for word but for `device="cuda"`. Where it is wrong, the tests say what is
right: CLIP-L is not 768 wide.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parts import make_hub_named, make_language_model, picture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from moellava.model.builder_enhanced import load_pretrained_model


TINY_LLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
CLIP = "openai/clip-vit-large-patch14"
SIGLIP = "google/siglip-base-patch16-224"
BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"

# What the tiny parts of those names are.
CLIP_WIDTH, TEXT_WIDTH, NATIVE_SIZE, PATCH_SIZE = 48, 64, 32, 8


# The documentation's classes.


@dataclass
class VisionConfig:
    mm_vision_tower: str = "openai/clip-vit-large-patch14"
    image_size: int = 224
    vision_feature_layer: int = -2


@dataclass
class ProjectorConfig:
    type: str = "mlp"
    hidden_size: int = 768
    num_hidden_layers: int = 2


@pytest.fixture
def documented(parts, monkeypatch) -> Path:
    """Enters a folder where every name of the documentation is a path, `path/to/model` among them."""
    root = make_hub_named(parts.root / "documented", TINY_LLAMA, CLIP, SIGLIP, BIOMEDCLIP)
    make_language_model("llama", root / "path/to/model", seed=3)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def writable(documented, tmp_path, monkeypatch) -> Path:
    """The same folder, as one that a test may write into."""
    (tmp_path / "path/to").mkdir(parents=True)
    for name in (TINY_LLAMA, CLIP, "path/to/model"):
        link = tmp_path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(documented / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def projector_of(model) -> torch.nn.Module:
    return model.model.multi_modal_projector


def answer(model, text: str = "USER: <image>\nWhat is shown in this picture? ASSISTANT:") -> torch.Tensor:
    """The tokens that a model says about a picture."""
    inputs = model.processor(images=picture(1), text=text, return_tensors="pt")
    return model.generate(**inputs, min_new_tokens=4, max_new_tokens=4, do_sample=False)[:, inputs.input_ids.shape[1] :]


def assert_tower_of(model, name: str) -> None:
    """The model's vision tower has the weights of the checkpoint of that name."""
    tower = model.model.vision_tower.state_dict()
    saved = {key.removeprefix("vision_model."): value for key, value in load_file(f"{name}/model.safetensors").items()}
    for key, value in tower.items():
        assert torch.equal(value, saved[key]), key


# ---------------------------------------------------------------------------------------------------------------------
# Dictionary-based configuration
# ---------------------------------------------------------------------------------------------------------------------


def test_dictionary_based_configuration(documented):
    config = {
        "model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "mm_hidden_size": 768,
        "encoder_type": "clip",  # Options: "clip", "sigclip", "biomedclip"
        "projector_type": "mlp",  # Options: "mlp", "identity", "qformer", "perceiver"
        "mm_projector_hidden_size": 1024
    }  # fmt: skip

    model, image_processor, tokenizer, context_len = load_pretrained_model(
        config,
        device="cpu"
    )  # fmt: skip

    assert model.config.encoder_type == "clip"
    assert model.config.projector_config.type == "mlp"
    assert projector_of(model).linear_1.weight.shape == (1024, CLIP_WIDTH)
    assert projector_of(model).linear_2.weight.shape == (TEXT_WIDTH, 1024)
    assert_tower_of(model, CLIP)
    assert context_len == 2048
    assert model.config.parts == {"language_model": TINY_LLAMA, "vision_tower": CLIP, "multi_modal_projector": "new"}
    assert answer(model).shape == (1, 4)


def test_the_documented_width_is_taken_from_the_tower_with_a_warning_that_names_both(documented, caplog):
    """The documentation gives `mm_hidden_size: 768` beside a CLIP-L, whose width is 1024 (48, for this tiny one)."""
    with caplog.at_level(logging.WARNING, logger="moellava"):
        model, *_ = load_pretrained_model(
            {"model_name_or_path": TINY_LLAMA, "mm_vision_tower": CLIP, "mm_hidden_size": 768}, device="cpu"
        )
    assert projector_of(model).linear_1.in_features == CLIP_WIDTH
    warnings = [record.getMessage() for record in caplog.records if "mm_hidden_size" in record.getMessage()]
    assert len(warnings) == 1
    assert "768" in warnings[0] and str(CLIP_WIDTH) in warnings[0]

    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="moellava"):
        load_pretrained_model(TINY_LLAMA, mm_vision_tower=CLIP, mm_hidden_size=CLIP_WIDTH, device="cpu")
    assert "mm_hidden_size" not in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Object-based configuration
# ---------------------------------------------------------------------------------------------------------------------


def test_object_based_configuration(documented):
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        custom_vision_config=VisionConfig(),
        projector_config=ProjectorConfig()
    )  # fmt: skip

    assert model.config.encoder_type == "clip"
    assert model.config.vision_feature_layer == -2
    assert model.config.image_size == 224  # the tower was made for 32: its position embeddings are interpolated
    assert model.config.image_seq_length == (224 // PATCH_SIZE) ** 2
    assert projector_of(model).linear_1.weight.shape == (768, CLIP_WIDTH)
    pixel_values = image_processor(picture(0), return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 224, 224)
    assert answer(model).shape == (1, 4)


def test_a_larger_picture_is_seen_through_interpolated_positions(documented):
    model, image_processor, *_ = load_pretrained_model(
        model_path="path/to/model", custom_vision_config=VisionConfig(), device="cpu"
    )
    pixel_values = image_processor(picture(2), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(pixel_values).last_hidden_state
        tower = CLIPVisionModel.from_pretrained(CLIP).eval()
        expected = tower(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
    assert torch.equal(features, expected[:, 1:])


def test_any_object_with_attributes_will_do(documented):
    class Vision:
        mm_vision_tower = CLIP
        vision_feature_layer = -1

    projector = SimpleNamespace(type="linear")
    model, *_ = load_pretrained_model(
        "path/to/model", custom_vision_config=Vision(), projector_config=projector, device="cpu"
    )
    assert model.config.vision_feature_layer == -1
    assert model.config.projector_config.type == "linear"


# ---------------------------------------------------------------------------------------------------------------------
# Available configuration parameters
# ---------------------------------------------------------------------------------------------------------------------


def test_model_name_or_path_and_device(documented):
    model, *_ = load_pretrained_model(model_name_or_path=TINY_LLAMA, device="cpu")
    assert model.device == torch.device("cpu")
    assert model.config.parts["language_model"] == TINY_LLAMA
    assert not model.training


def test_model_base_is_the_base_of_a_lora_adapter(documented, tmp_path):
    peft = pytest.importorskip("peft")
    base, *_ = load_pretrained_model("path/to/model", device="cpu")
    base.save_pretrained(tmp_path / "base")
    lora = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "adapter")
    expected = lora.eval()(input_ids=torch.tensor([[1, 2, 3]])).logits

    model, _, _, context_len = load_pretrained_model(
        model_path=str(tmp_path / "adapter"), model_base=str(tmp_path / "base"), device="cpu"
    )
    actual = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert torch.allclose(actual, expected, atol=1e-5)
    assert not any("lora" in name for name, _ in model.named_parameters())  # merged
    assert context_len == 2048


@pytest.mark.parametrize("option, layer", [("load_8bit", "Linear8bitLt"), ("load_4bit", "Linear4bit")])
def test_quantised(documented, parts, option, layer):
    pytest.importorskip("bitsandbytes")
    # bitsandbytes packs 64 weights of a row together.
    folder = parts.language_model("llama", overrides={"intermediate_size": 128, "num_hidden_layers": 2})
    model, *_ = load_pretrained_model(str(folder), device="cpu", **{option: True})
    layers = model.model.language_model.layers
    assert {type(block.mlp.gate_proj).__name__ for block in layers} == {layer}
    for kept in (model.model.vision_tower, model.model.multi_modal_projector, model.lm_head):
        assert layer not in {type(module).__name__ for module in kept.modules()}
    assert answer(model).shape == (1, 4)


def test_image_size_feature_layer_and_strategy(documented):
    model, *_ = load_pretrained_model(
        "path/to/model", device="cpu", image_size=64, vision_feature_layer=-1, vision_feature_select_strategy="cls"
    )
    assert (model.config.image_size, model.config.vision_feature_layer) == (64, -1)
    assert model.config.image_seq_length == 1
    pixel_values = model.processor.image_processor(picture(0), return_tensors="pt").pixel_values
    assert pixel_values.shape[-2:] == (64, 64)
    with torch.no_grad():
        features = model.get_image_features(pixel_values).last_hidden_state
        tower = CLIPVisionModel.from_pretrained(CLIP).eval()
        expected = tower(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
    assert torch.equal(features, expected[:, :1])


@pytest.mark.parametrize("strategy, tokens", [("default", 16), ("patch", 16), ("cls", 1), ("full", 17)])
def test_selection_strategies(documented, strategy, tokens):
    model, *_ = load_pretrained_model("path/to/model", device="cpu", vision_feature_select_strategy=strategy)
    assert model.config.image_seq_length == tokens
    ids = model.processor(text="<image>", images=picture(0), return_tensors="pt").input_ids
    assert int((ids == model.config.image_token_id).sum()) == tokens


@pytest.mark.parametrize(
    "fields, tokens, shapes",
    [
        (
            {"projector_type": "mlp", "mm_projector_hidden_size": 40, "num_hidden_layers": 3},
            16,
            {"linear_2.weight": (40, 40)},
        ),
        (
            {"projector_type": "qformer", "num_query_tokens": 5, "qformer_hidden_size": 32},
            5,
            {"query_tokens": (1, 5, 32)},
        ),
        ({"projector_type": "perceiver", "num_latents": 6, "latent_dim": 32}, 6, {"latents": (6, 32)}),
    ],
)
def test_projector_parameters(documented, fields, tokens, shapes):
    model, *_ = load_pretrained_model("path/to/model", device="cpu", **fields)
    assert model.config.image_seq_length == tokens
    state = projector_of(model).state_dict()
    for name, shape in shapes.items():
        assert state[name].shape == shape
    assert answer(model).shape == (1, 4)


def test_identity_projector_where_the_widths_match(documented, parts):
    narrow = parts.language_model("llama", overrides={"hidden_size": CLIP_WIDTH, "num_attention_heads": 4})
    model, *_ = load_pretrained_model(str(narrow), device="cpu", projector_type="identity")
    assert list(projector_of(model).parameters()) == []
    assert answer(model).shape == (1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Usage examples
# ---------------------------------------------------------------------------------------------------------------------


def test_basic_usage_with_default_settings(documented):
    # Load a model with default settings (CLIP encoder, MLP projector)
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        device="cpu"
    )  # fmt: skip

    assert model.config.encoder_type == "clip"
    assert model.config.parts["vision_tower"] == CLIP
    assert_tower_of(model, CLIP)
    assert model.config.projector_config.type == "mlp"
    assert model.config.projector_config.num_hidden_layers == 2
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    assert model.config.image_aspect_ratio == "pad"
    assert model.config.image_seq_length == (NATIVE_SIZE // PATCH_SIZE) ** 2


def test_what_is_returned_is_a_named_tuple_of_four_in_the_documented_order(documented):
    loaded = load_pretrained_model(model_path="path/to/model", device="cpu")
    model, image_processor, tokenizer, context_len = loaded
    assert loaded._fields == ("model", "image_processor", "tokenizer", "context_len")
    assert loaded.model is model and loaded[0] is model
    assert loaded.image_processor is image_processor is model.processor.image_processor
    assert loaded.tokenizer is tokenizer is model.processor.tokenizer
    assert isinstance(loaded, tuple) and loaded.context_len == context_len == loaded[3]
    assert callable(image_processor) and tokenizer("a red bus").input_ids


def test_context_len_is_the_number_of_positions(documented, parts):
    folder = parts.language_model("mistral", overrides={"max_position_embeddings": 96})
    assert load_pretrained_model(str(folder), device="cpu").context_len == 96


def test_the_language_model_stays_what_it_was(documented):
    """Text alone gives the logits of the language model itself, to the last bit."""
    model, _, tokenizer, _ = load_pretrained_model(model_path="path/to/model", device="cpu")
    own = AutoModelForCausalLM.from_pretrained("path/to/model").eval()
    text = "USER: How many birds are there? ASSISTANT:"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(ids, AutoTokenizer.from_pretrained("path/to/model")(text, return_tensors="pt").input_ids)
    with torch.no_grad():
        # The row that <image> was given is no word of the language model.
        assert torch.equal(model(input_ids=ids).logits[..., : own.config.vocab_size], own(input_ids=ids).logits)


def test_specifying_a_qformer_projector(documented):
    # Using a QFormer projector with dictionary configuration
    config = {
        "model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "mm_hidden_size": 768,
        "projector_type": "qformer",
        "num_query_tokens": 32,
        "qformer_hidden_size": 768
    }  # fmt: skip

    model, image_processor, tokenizer, context_len = load_pretrained_model(
        config,
        device="cpu"
    )  # fmt: skip

    assert model.config.projector_config.type == "qformer"
    assert model.config.image_seq_length == 32
    assert projector_of(model).query_tokens.shape == (1, 32, 768)
    assert projector_of(model).language_projection.out_features == TEXT_WIDTH
    queries = projector_of(model).query_tokens
    assert 0.015 < queries.std() < 0.025  # drawn, and not what memory happened to hold
    assert answer(model).shape == (1, 4)


# ---------------------------------------------------------------------------------------------------------------------
# A custom projector path
# ---------------------------------------------------------------------------------------------------------------------


def trained_projector() -> dict[str, torch.Tensor]:
    """The weights of a two-layer MLP under the names of an `nn.Sequential`, as LLaVA saves them."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"0.weight": (TEXT_WIDTH, CLIP_WIDTH), "0.bias": (TEXT_WIDTH,)}
    shapes |= {"2.weight": (TEXT_WIDTH, TEXT_WIDTH), "2.bias": (TEXT_WIDTH,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_projector_is(model, weights: dict[str, torch.Tensor]) -> None:
    state = projector_of(model).state_dict()
    renamed = {name.replace("0.", "linear_1.").replace("2.", "linear_2."): value for name, value in weights.items()}
    assert state.keys() == renamed.keys()
    for name, value in renamed.items():
        assert torch.equal(state[name], value), name


def test_using_a_custom_projector_path(writable):
    torch.save(trained_projector(), "path/to/custom_projector.bin")

    # Load a model with a custom projector
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        projector_config={
            "path": "path/to/custom_projector.bin"
        }
    )  # fmt: skip

    assert model.config.projector_config.type == "mlp"
    assert_projector_is(model, trained_projector())
    assert answer(model).shape == (1, 4)


PREFIXES = [
    "",
    "model.mm_projector.",  # LLaVA's trainer
    "mm_projector.",
    "model.mm_projector.image_spatial_proj.",  # MoE-LLaVA's
    "transformer.mm_projector.image_spatial_proj.",  # MoE-LLaVA's with Qwen
    "base_model.model.model.mm_projector.",  # beside a LoRA adapter
    "model.multi_modal_projector.",  # transformers' and ours
    "multi_modal_projector.",
    "module.",  # distributed training
    "module.model.mm_projector.",
    "projector.",
]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_projector_file_with_and_without_prefixes(writable, prefix, suffix):
    weights = {f"{prefix}{name}": value for name, value in trained_projector().items()}
    (save_file if suffix == ".safetensors" else torch.save)(weights, f"custom_projector{suffix}")
    model, *_ = load_pretrained_model(
        "path/to/model", device="cpu", projector_config={"path": f"custom_projector{suffix}"}
    )
    assert_projector_is(model, trained_projector())


def test_a_projector_file_that_holds_more_than_the_projector(writable):
    weights = {f"model.mm_projector.{name}": value for name, value in trained_projector().items()}
    torch.save(weights | {"model.embed_tokens.weight": torch.zeros(4, TEXT_WIDTH)}, "mm_projector.bin")
    model, *_ = load_pretrained_model("path/to/model", device="cpu", projector_config={"path": "mm_projector.bin"})
    assert_projector_is(model, trained_projector())


def test_a_projector_file_of_the_old_torch_format(writable):
    torch.save(trained_projector(), "old.bin", _use_new_zipfile_serialization=False)
    model, *_ = load_pretrained_model("path/to/model", device="cpu", projector_config={"path": Path("old.bin")})
    assert_projector_is(model, trained_projector())


def test_a_file_tells_what_its_projector_is(writable):
    """Widths and the number of layers need not be said; nor does `linear`."""
    three = {"0.weight": (20, CLIP_WIDTH), "2.weight": (20, 20), "4.weight": (TEXT_WIDTH, 20)}
    torch.save({name: torch.ones(shape) for name, shape in three.items()}, "three.bin")
    model, *_ = load_pretrained_model("path/to/model", device="cpu", projector_config={"path": "three.bin"})
    fields = model.config.projector_config.fields
    assert (fields["num_hidden_layers"], fields["hidden_size"], fields["bias"]) == (3, 20, False)

    linear = {"weight": torch.ones(TEXT_WIDTH, CLIP_WIDTH), "bias": torch.zeros(TEXT_WIDTH)}
    torch.save({f"model.mm_projector.{name}": value for name, value in linear.items()}, "linear.bin")
    model, *_ = load_pretrained_model("path/to/model", device="cpu", projector_config={"path": "linear.bin"})
    assert model.config.projector_config.type == "linear"
    assert torch.equal(projector_of(model).linear.weight, linear["weight"])


def test_a_file_and_a_class_whose_defaults_say_otherwise(writable):
    """`hidden_size: int = 768` of a class is what it says by default; the file knows better."""

    @dataclass
    class WithPath(ProjectorConfig):
        path: str | None = None

    torch.save(trained_projector(), "custom_projector.bin")
    model, *_ = load_pretrained_model(
        "path/to/model", device="cpu", projector_config=WithPath(path="custom_projector.bin")
    )
    assert_projector_is(model, trained_projector())


@pytest.mark.parametrize("kind, fields", [
    ("qformer", {"num_query_tokens": 4, "qformer_hidden_size": 32}),
    ("perceiver", {"num_latents": 4, "latent_dim": 32}),
    ("linear", {}),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.multi_modal_projector.", "some.trainer."])
def test_files_of_the_other_projectors(writable, kind, fields, prefix):
    donor, *_ = load_pretrained_model("path/to/model", device="cpu", projector_type=kind, **fields)
    saved = {name: value.clone() for name, value in projector_of(donor).state_dict().items()}
    save_file({f"{prefix}{name}": value for name, value in saved.items()}, "saved.safetensors")
    model, *_ = load_pretrained_model(
        "path/to/model", device="cpu", projector_config={"type": kind, "path": "saved.safetensors", **fields}
    )
    for name, value in projector_of(model).state_dict().items():
        assert torch.equal(value, saved[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Debugging tips
# ---------------------------------------------------------------------------------------------------------------------


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("moellava"))


def test_encoder_debug_logs_what_was_detected_loaded_skipped_and_every_shape(documented, caplog):
    model, *_ = load_pretrained_model("path/to/model", device="cpu", encoder_debug=True)
    log = messages(caplog)
    assert "encoder: 'clip', detected; model_type 'clip_vision_model'" in log
    assert f"encoder: loaded from {CLIP}" in log
    assert "are no vision tower's and are skipped" in log  # CLIP's text half
    assert "layers [3] of 4; 16 features of width 48" in log
    for name, parameter in model.model.vision_tower.named_parameters():
        assert f"encoder: {name} {tuple(parameter.shape)} torch.float32" in log
    assert "projector: " not in log.replace("multi_modal_projector", "")


def test_projector_debug_logs_what_is_new_and_every_shape(documented, caplog):
    config = {"model_path": "path/to/model", "projector_type": "linear", "projector_debug": True}
    model, *_ = load_pretrained_model(config, device="cpu")
    log = messages(caplog)
    assert "projector: 'linear', as asked for" in log
    assert (
        "newly initialised: model.multi_modal_projector.linear.bias, model.multi_modal_projector.linear.weight" in log
    )
    assert f"from 16 features of width {CLIP_WIDTH} to 16 tokens of width {TEXT_WIDTH}" in log
    assert f"projector: linear.weight {(TEXT_WIDTH, CLIP_WIDTH)} torch.float32" in log


def test_projector_debug_names_the_file_that_was_loaded(writable, caplog):
    torch.save(trained_projector(), "custom_projector.bin")
    load_pretrained_model(
        "path/to/model", device="cpu", projector_debug=True, projector_config={"path": "custom_projector.bin"}
    )
    log = messages(caplog)
    assert "loaded from custom_projector.bin" in log
    assert "newly initialised" not in log


def test_debugging_a_checkpoint_names_the_checkpoint(documented, tmp_path, caplog):
    load_pretrained_model("path/to/model", device="cpu").model.save_pretrained(tmp_path / "saved")
    load_pretrained_model(tmp_path / "saved", device="cpu", encoder_debug=True, projector_debug=True)
    log = messages(caplog)
    assert f"encoder: loaded from {tmp_path / 'saved'}" in log
    assert "projector: 'mlp', as the checkpoint has it" in log
    assert "newly initialised" not in log
    caplog.clear()
    load_pretrained_model(tmp_path / "saved", device="cpu", encoder_debug=True, mm_vision_tower=SIGLIP)
    assert f"encoder: loaded from {SIGLIP}" in messages(caplog)


def test_an_explicit_type_is_told_from_a_detected_one(documented, caplog):
    load_pretrained_model("path/to/model", device="cpu", encoder_type="clip", encoder_debug=True)
    assert "encoder: 'clip', as encoder_type says" in messages(caplog)


def test_nothing_is_logged_unasked_and_a_debugged_call_leaves_no_trace(documented, caplog):
    package = logging.getLogger("moellava")
    before = (package.level, list(package.handlers))
    load_pretrained_model("path/to/model", device="cpu", encoder_debug=True, projector_debug=True)
    assert (package.level, list(package.handlers)) == before
    caplog.clear()
    load_pretrained_model("path/to/model", device="cpu")
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("moellava")]
    assert said.startswith("Never trained: multi_modal_projector")  # as it is


def test_debug_output_is_visible_where_no_logging_is_configured(documented, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    load_pretrained_model("path/to/model", device="cpu", encoder_debug=True, projector_debug=True)
    shown = capsys.readouterr()
    assert "encoder: 'clip', detected" in shown.err
    assert "projector: 'mlp'" in shown.err
    assert shown.out == ""


# ---------------------------------------------------------------------------------------------------------------------
# The names and files of the older builder's guides
# ---------------------------------------------------------------------------------------------------------------------


def test_the_guides_vision_config_dictionary(documented):
    model, *_ = load_pretrained_model(
        "path/to/model",
        device="cpu",
        vision_config={"model_name": SIGLIP, "select_layer": -1, "select_feature": "patch", "image_size": 48},
    )
    assert model.config.encoder_type == "siglip"
    assert model.config.vision_feature_layer == -1
    assert model.config.image_seq_length == (48 // PATCH_SIZE) ** 2


def test_the_guides_yaml_layout(documented):
    """`yaml.safe_load` of the guide's file gives this dictionary."""
    model, *_ = load_pretrained_model(
        {
            "model_name_or_path": "path/to/model",
            "image_encoder": {
                "type": "clip",
                "model_name": CLIP,
                "select_layer": -2,
                "select_feature": "cls_patch",
                "use_encoder_framework": True,
            },
            "video_encoder": None,
            "projector": {"image_projector_type": "mlp2x_gelu", "mm_hidden_size": CLIP_WIDTH, "hidden_size": 40},
            "precision": "bf16",
        },
        device="cpu",
    )
    assert model.config.vision_feature_select_strategy == "full"
    assert projector_of(model).linear_1.weight.shape == (40, CLIP_WIDTH)
    assert model.dtype == torch.bfloat16


def test_the_guides_projector_class(documented):
    """Its `dropout` is a field that no projector has: a default of the class is left out, a chosen value refused."""

    @dataclass
    class GuideProjectorConfig:
        type: str = "mlp"
        hidden_size: int = 40
        num_layers: int = 3
        dropout: float = 0.1
        path: str | None = None

    model, *_ = load_pretrained_model("path/to/model", device="cpu", projector_config=GuideProjectorConfig())
    assert sorted(dict(projector_of(model).named_children())) == ["act", "linear_1", "linear_2", "linear_3"]
    with pytest.raises(ValueError, match="'mlp' has no field 'dropout'"):
        load_pretrained_model("path/to/model", device="cpu", projector_config=GuideProjectorConfig(dropout=0.3))


def test_model_name_has_no_effect(documented):
    """The older builder chose classes by it; a model is what its config says."""
    model, *_ = load_pretrained_model("path/to/model", None, "llava-qwen-moe-phi-lora", device="cpu")
    assert model.config.text_config.model_type == "llama"


def test_replaced_settings_do_not_reach_from_pretrained_under_their_own_names(documented):
    """In the older tree `custom_vision_config` and `encoder_type` were passed on, and failed there."""
    vision = dataclasses.replace(VisionConfig(), image_size=NATIVE_SIZE)
    model, *_ = load_pretrained_model(
        "path/to/model", device="cpu", custom_vision_config=vision, encoder_type="clip", image_aspect_ratio="square"
    )
    assert model.config.image_aspect_ratio == "square"


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
