# SPDX-License-Identifier: Apache-2.0
"""A small model through `load_pretrained_model`: assembled, saved, loaded again, asked, and loaded with changes."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from parts import picture, pictures
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, SiglipVisionModel, pipeline

from moellava import load_pretrained_model


PROMPT = "USER: <image>\nWhat is shown in this picture? ASSISTANT:"
QFORMER = {"type": "qformer", "qformer_hidden_size": 32, "num_query_tokens": 4}
NEW_PROJECTOR = "a new one is initialised"


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory) -> Path:
    """A model assembled of a LLaMA and a CLIP tower, saved."""
    folder = tmp_path_factory.mktemp("small") / "model"
    model, *_ = load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(checkpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's weights."""
    return load_file(checkpoint / "model.safetensors")


def load(folder, **changes):
    return load_pretrained_model(folder, device="cpu", **changes).model


def logits(model, count: int = 1) -> torch.Tensor:
    images = pictures(count)
    inputs = model.processor(images=images, text=PROMPT.replace("<image>", "<image>" * count), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def assert_weights(model, expected: dict[str, torch.Tensor], *, without: str | None = None) -> None:
    """The model's weights are the expected ones to the last bit, but for those whose name begins with `without`."""
    state = model.state_dict()
    names = {name for name in expected if without is None or not name.startswith(without)}
    assert names == {name for name in state if without is None or not name.startswith(without)}
    for name in names:
        assert torch.equal(state[name], expected[name]), name


def described(model) -> dict:
    """The model's config, but for the place that transformers loaded it from."""
    return {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}


def features(model, image) -> torch.Tensor:
    """The selected features of a picture, of shape (tokens, width)."""
    pixel_values = model.processor.image_processor(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model.get_image_features(pixel_values).last_hidden_state[0]


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_as_it_was(parts, tmp_path):
    first, image_processor, tokenizer, context_len = load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    )
    first.save_pretrained(tmp_path / "model")
    loaded = load_pretrained_model(tmp_path / "model", device="cpu")

    assert_weights(loaded.model, first.state_dict())
    assert torch.equal(logits(loaded.model), logits(first))
    assert described(loaded.model) == described(first)
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.image_processor.to_dict() == image_processor.to_dict()
    assert loaded.context_len == context_len
    assert loaded.model.generation_config.to_dict() == first.generation_config.to_dict()
    assert not loaded.model.training


def test_the_auto_classes_load_the_same(checkpoint):
    ours = load(checkpoint)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model = auto_class.from_pretrained(checkpoint)
        model.processor = ours.processor
        assert torch.equal(logits(model), logits(ours))


def test_asked_through_the_pipeline(checkpoint):
    model, _, tokenizer, _ = load_pretrained_model(checkpoint, device="cpu")
    ask = pipeline("image-text-to-text", model=model, processor=model.processor)
    message = [{"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What?"}]}]
    answer = ask(text=message, max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]

    inputs = model.processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_picture_changes_what_is_said_and_a_second_one_too(checkpoint):
    model = load(checkpoint)
    one = model.processor(images=picture(1), text=PROMPT, return_tensors="pt")
    other = model.processor(images=picture(2), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        assert not torch.allclose(model(**one).logits[:, -1], model(**other).logits[:, -1])
    assert logits(model, count=2).shape[1] == logits(model).shape[1] + model.config.image_seq_length


def test_the_image_token_takes_a_free_row_of_a_padded_vocabulary(parts):
    padded = load(parts.language_model("phi", padded_rows=64), mm_vision_tower=parts.vision_tower("clip"))
    rows = padded.get_input_embeddings().weight.shape[0]
    original = AutoModelForCausalLM.from_pretrained(parts.language_model("phi", padded_rows=64))
    assert rows == original.get_input_embeddings().weight.shape[0] == padded.config.text_config.vocab_size
    assert torch.equal(padded.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert padded.config.image_token_id < rows

    exact = load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"))
    assert exact.config.image_token_id == exact.get_input_embeddings().weight.shape[0] - 1 == 512
    assert exact.generation_config.suppress_tokens == [512]  # it is never said


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16"])
def test_dtype(checkpoint, parts, dtype):
    assert load(checkpoint, dtype=dtype).dtype == torch.bfloat16
    assembled = load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), torch_dtype=dtype)
    assert {parameter.dtype for parameter in assembled.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(assembled)).all()


def test_the_dtype_is_the_language_models_by_default(parts):
    half = parts.language_model("llama", dtype=torch.bfloat16)
    for dtype in (None, "auto"):
        model = load(half, mm_vision_tower=parts.vision_tower("clip"), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_devices(checkpoint, tmp_path):
    assert load_pretrained_model(checkpoint, device=torch.device("cpu")).model.device.type == "cpu"
    assert load_pretrained_model(checkpoint, device_map="cpu").model.device.type == "cpu"
    assert load_pretrained_model(checkpoint, device_map={"": "cpu"}).model.device.type == "cpu"
    assert load_pretrained_model(checkpoint, device_map="auto").model.device.type in ("cpu", "cuda", "mps", "xpu")
    best = load_pretrained_model(checkpoint).model.device.type
    assert best == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")


def test_saving_over_a_checkpoint_that_fails_leaves_it_as_it_was(checkpoint, parts, tmp_path):
    folder = parts.copy(checkpoint, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = load(folder)

    class Full:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    model.processor = Full()
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint, loaded with changes
# ---------------------------------------------------------------------------------------------------------------------


def test_another_layer(checkpoint, saved, parts, caplog):
    model = load(checkpoint, vision_feature_layer=-1)
    assert_weights(model, saved)
    tower = CLIPVisionModel.from_pretrained(parts.vision_tower("clip")).eval()
    pixel_values = model.processor.image_processor(picture(3), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tower(pixel_values, output_hidden_states=True).hidden_states[-1][0, 1:]
    assert torch.equal(features(model, picture(3)), expected)
    assert NEW_PROJECTOR not in caplog.text


def test_several_layers_need_a_wider_projector_which_is_new_and_said_to_be(checkpoint, saved, parts, caplog):
    model = load(checkpoint, vision_feature_layer=[-1, -2])
    assert NEW_PROJECTOR in caplog.text
    assert model.model.multi_modal_projector.linear_1.in_features == 2 * 48
    assert_weights(model, saved, without="model.multi_modal_projector.")
    one, two = load(checkpoint, vision_feature_layer=-1), load(checkpoint)
    expected = torch.cat([features(one, picture(3)), features(two, picture(3))], dim=-1)
    assert torch.equal(features(model, picture(3)), expected)


@pytest.mark.parametrize("strategy, tokens", [("patch", 16), ("cls", 1), ("full", 17)])
def test_another_strategy(checkpoint, saved, strategy, tokens):
    model = load(checkpoint, vision_feature_select_strategy=strategy)
    assert_weights(model, saved)
    assert model.config.image_seq_length == model.processor.num_image_tokens == tokens
    full = features(load(checkpoint, vision_feature_select_strategy="full"), picture(3))
    rows = {"patch": slice(1, None), "cls": slice(0, 1), "full": slice(None)}[strategy]
    assert torch.equal(features(model, picture(3)), full[rows])
    assert logits(model).shape[1] == logits(load(checkpoint)).shape[1] - 16 + tokens


def test_another_image_size(checkpoint, saved):
    model = load(checkpoint, image_size=64)
    assert_weights(model, saved)
    assert model.processor.num_image_tokens == (64 // 8) ** 2
    assert model.processor.image_processor(picture(0), return_tensors="pt").pixel_values.shape[-2:] == (64, 64)
    assert torch.isfinite(logits(model)).all()


def test_another_aspect_ratio(checkpoint):
    padded, cropped = load(checkpoint), load(checkpoint, image_aspect_ratio="square")
    assert (padded.processor.image_aspect_ratio, cropped.processor.image_aspect_ratio) == ("pad", "square")
    wide = picture(0, (96, 32))
    one = padded.processor(images=wide, text=PROMPT, return_tensors="pt").pixel_values
    other = cropped.processor(images=wide, text=PROMPT, return_tensors="pt").pixel_values
    assert not torch.equal(one, other)
    assert torch.equal(other, cropped.processor.image_processor(wide, return_tensors="pt").pixel_values)


def test_what_changed_is_kept_by_the_next_save(checkpoint, tmp_path):
    model = load(checkpoint, image_size=48, vision_feature_layer=-1, image_aspect_ratio="square")
    model.save_pretrained(tmp_path / "changed")
    again = load(tmp_path / "changed")
    assert described(again) == described(model)
    assert again.processor.image_aspect_ratio == "square"
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("projector", [{"type": "linear"}, QFORMER, {"hidden_size": 40}, {"type": "mlp3x_gelu"}])
def test_another_projector_is_new_and_said_to_be(checkpoint, saved, projector, caplog):
    model = load(checkpoint, projector_config=projector)
    assert NEW_PROJECTOR in caplog.text and str(checkpoint) in caplog.text
    assert_weights(model, saved, without="model.multi_modal_projector.")
    assert torch.isfinite(logits(model)).all()
    assert model.generation_config.suppress_tokens == [512]


def test_the_projector_that_is_there_already_is_kept(checkpoint, saved, caplog):
    for asked in ({"projector_type": "mlp"}, {"projector_type": "mlp2x_gelu"}, {"mm_projector_num_layers": 2}):
        assert_weights(load(checkpoint, **asked), saved)
    assert NEW_PROJECTOR not in caplog.text


def test_a_projector_file_for_a_checkpoint(checkpoint, saved, tmp_path, caplog):
    prefix = "model.multi_modal_projector."
    other = {name.removeprefix(prefix): value + 1 for name, value in saved.items() if name.startswith(prefix)}
    save_file(other, tmp_path / "projector.safetensors")
    model = load(checkpoint, projector_config={"path": tmp_path / "projector.safetensors"})
    assert_weights(model, saved | {f"{prefix}{name}": value for name, value in other.items()})
    assert NEW_PROJECTOR not in caplog.text


def test_a_projector_file_of_the_checkpoints_own_kind_needs_no_fields(checkpoint, tmp_path):
    """What the file does not tell comes from the checkpoint's own config."""
    model = load(checkpoint, projector_config=QFORMER)
    model.save_pretrained(tmp_path / "qformer")
    other = {name: value + 1 for name, value in model.model.multi_modal_projector.state_dict().items()}
    save_file(other, tmp_path / "projector.safetensors")
    again = load(tmp_path / "qformer", projector_config={"path": str(tmp_path / "projector.safetensors")})
    for name, value in again.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, other[name]), name


def test_another_tower(checkpoint, saved, parts, caplog):
    tower = parts.vision_tower("siglip")
    model = load(checkpoint, mm_vision_tower=str(tower))
    assert model.config.encoder_type == "siglip"
    assert model.config.parts["vision_tower"] == tower.name
    assert NEW_PROJECTOR in caplog.text  # SigLIP's width is another
    assert_weights(
        model,
        saved,
        without=("model.vision_tower.", "model.multi_modal_projector."),
    )
    own = SiglipVisionModel.from_pretrained(tower).eval()
    pixel_values = model.processor.image_processor(picture(3), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = own(pixel_values, output_hidden_states=True).hidden_states[-2][0]
    assert torch.equal(features(model, picture(3)), expected)
    assert torch.isfinite(logits(model)).all()


def test_another_tower_of_the_same_width_has_a_new_projector(checkpoint, saved, parts, caplog):
    model = load(checkpoint, mm_vision_tower=parts.vision_tower("clip", seed=1))
    assert NEW_PROJECTOR in caplog.text and "was trained with another vision tower" in caplog.text
    for part in ("vision_tower.embeddings.class_embedding", "multi_modal_projector.linear_1.weight"):
        assert not torch.equal(model.state_dict()[f"model.{part}"], saved[f"model.{part}"])
    others = {name: value for name, value in saved.items() if ".vision_tower." not in name}
    assert_weights(model, model.state_dict() | others, without="model.multi_modal_projector.")


def test_another_tower_with_the_projector_kept_by_its_file(checkpoint, saved, parts, caplog):
    kept = {"path": checkpoint / "model.safetensors"}
    model = load(checkpoint, mm_vision_tower=parts.vision_tower("clip", seed=1), projector_config=kept)
    assert_weights(model, saved | {n: v for n, v in model.state_dict().items() if ".vision_tower." in n})
    assert NEW_PROJECTOR not in caplog.text


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_same_tower_under_another_path_keeps_the_projector(checkpoint, parts, tmp_path, caplog, dtype):
    load(checkpoint, dtype=dtype).save_pretrained(tmp_path / "model")
    shutil.copytree(parts.vision_tower("clip"), tmp_path / "moved")
    for tower in (tmp_path / "moved", parts.vision_tower("clip")):
        model = load(tmp_path / "model", mm_vision_tower=tower)
        assert_weights(model, load_file(tmp_path / "model" / "model.safetensors"))
    assert NEW_PROJECTOR not in caplog.text


def test_the_tower_that_is_there_already_is_not_read_again(parts, tmp_path, caplog):
    load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip")).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    # A name of the Hub stands for one tower, that of a folder does not.
    config["parts"]["vision_tower"] = "nobody/tower"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "model", mm_vision_tower="nobody/tower")
    assert_weights(model, load_file(tmp_path / "model" / "model.safetensors"))
    assert NEW_PROJECTOR not in caplog.text


def test_a_wrong_width_is_told_of_a_checkpoint_too(checkpoint, caplog):
    with caplog.at_level(logging.WARNING, logger="moellava"):
        load(checkpoint, mm_hidden_size=768)
    assert "mm_hidden_size is given as 768" in caplog.text and "48" in caplog.text


def test_where_the_parts_came_from_is_remembered_and_never_read(checkpoint, parts, tmp_path):
    folder = parts.copy(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["parts"] == {
        "language_model": parts.language_model("llama").name, "vision_tower": parts.vision_tower("clip").name,
        "multi_modal_projector": "new",
    }  # fmt: skip
    config["parts"] = {"language_model": "/nowhere", "vision_tower": "https://nowhere.invalid/tower"}
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder)), logits(load(checkpoint)))
