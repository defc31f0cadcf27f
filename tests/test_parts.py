# SPDX-License-Identifier: Apache-2.0
"""The parts that the other tests are built on are real: the stock libraries load every one of them completely."""

import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from parts import (
    BIOMEDBERT_NAME,
    CORPUS,
    HUB_NAMES,
    LANGUAGE_MODELS,
    MAIN_FAMILIES,
    VISION_TOWERS,
    biomedclip_oracle,
    make_biomedclip,
    make_language_model,
    make_tokenizer,
    make_vision_tower,
    picture,
    pictures,
    run_python,
)
from safetensors.torch import load_file


def load(auto_class, folder, **kwargs):
    """The model of a folder in evaluation mode, after checking that the folder holds its weights and no others."""
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


# --- pictures


def test_pictures_are_deterministic_and_differ():
    assert picture(3).tobytes() == picture(3).tobytes()
    assert picture(3).tobytes() != picture(4).tobytes()
    assert len({image.size for image in pictures(4)}) == 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F", "YCbCr"])
def test_pictures_come_in_every_mode(mode):
    image = picture(0, (20, 10), mode)
    assert image.mode == mode
    assert image.size == (20, 10)
    levels = np.asarray(image)
    assert levels.min() < levels.max()


# --- tokenizers


@pytest.mark.parametrize("style", ["llama", "gpt2", "qwen2"])
def test_tokenizer_is_reversible(parts, style):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.tokenizer(style=style))
    assert len(tokenizer) == 512
    assert tokenizer.model_max_length == 2048
    for text in (*CORPUS, "Grüße, 漢字 and ☕: nothing of this is in the corpus."):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("style", "bos"), [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)])
def test_tokenizer_marks_the_beginning_where_asked(parts, style, bos):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.tokenizer(style=style, bos=bos))
    ids = tokenizer("USER: What is this?")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == bos
    assert tokenizer.bos_token_id not in ids[1:]


def test_tokenizer_sizes_and_padding(parts):
    larger = transformers.AutoTokenizer.from_pretrained(parts.tokenizer(vocab_size=600, pad_token="<unk>"))
    assert (len(larger), larger.pad_token_id) == (600, 0)
    assert transformers.AutoTokenizer.from_pretrained(parts.tokenizer(style="gpt2")).pad_token is None
    assert transformers.AutoTokenizer.from_pretrained(parts.tokenizer(pad_token=None)).pad_token is None


@pytest.mark.parametrize(("style", "template"), [("llama", "turns"), ("qwen2", "chatml")])
def test_tokenizer_chat_template(parts, style, template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.tokenizer(style=style, chat_template=template))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many birds?"}], tokenize=False, add_generation_prompt=True
    )
    turns = {
        "turns": "<|user|>\nHow many birds?</s>\n<|assistant|>\n",
        "chatml": "<|im_start|>user\nHow many birds?<|im_end|>\n<|im_start|>assistant\n",
    }
    assert prompt == turns[template]


# --- language models


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_language_model_is_loaded_by_the_stock_library(parts, family):
    folder = parts.language_model(family)
    model = load(transformers.AutoModelForCausalLM, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert config.model_type == family
    assert config.vocab_size == len(tokenizer)
    assert config.num_hidden_layers == (4 if family in MAIN_FAMILIES else 2)
    assert (folder / "generation_config.json").is_file()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)

    inputs = tokenizer("USER: What colour is the door? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    # Every position says something else, so that a shifted row does not pass for the right one.
    assert torch.pdist(logits[0]).min() > 0.1


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_language_model_has_no_constant_weights(parts, family):
    for name, weight in load_file(parts.language_model(family) / "model.safetensors").items():
        assert weight.std() > 0, name


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_tokenizer_beside_a_model_reads_as_alone(parts, family):
    """AutoTokenizer looks at the model's type too, and may choose another class for it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.language_model(family))
    style = {"LlamaTokenizer": "llama", "GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2"}
    saved = json.loads((parts.language_model(family) / "tokenizer_config.json").read_text())["tokenizer_class"]
    alone = transformers.AutoTokenizer.from_pretrained(parts.tokenizer(style=style[saved]))
    for text in CORPUS:
        assert tokenizer(text)["input_ids"] == alone(text)["input_ids"]


def test_language_model_options(parts):
    folder = parts.language_model(
        "phi", padded_rows=10, dtype=torch.bfloat16, tie_word_embeddings=False, with_chat_template=True
    )
    model = load(transformers.AutoModelForCausalLM, folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 10
    assert model.lm_head.bias.abs().max() > 0
    assert tokenizer.chat_template
    tied = load(transformers.AutoModelForCausalLM, parts.language_model("llama", tie_word_embeddings=True))
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight


# --- vision towers

# kind -> shape of the last hidden state for one picture of 32 pixels
SHAPES = {
    "clip_vision": (1, 17, 48),
    "siglip_vision": (1, 16, 40),
    "dinov2": (1, 17, 48),
    "dinov2_registers": (1, 21, 48),
    "dinov3": (1, 21, 48),
    "vit": (1, 17, 48),
    "deit": (1, 18, 48),
    "beit": (1, 17, 48),
    "swin": (1, 16, 40),
    "convnext": (1, 40, 4, 4),
}
WHOLE = {"clip": (1, 17, 48), "siglip": (1, 16, 40), "siglip2_naflex": (1, 16, 40)}


@pytest.mark.parametrize("kind", [*SHAPES, *WHOLE])
def test_vision_tower_is_loaded_by_the_stock_library(parts, kind):
    folder = parts.vision_tower(kind)
    model = load(transformers.AutoModel, folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    if kind in WHOLE:
        model = model.vision_model
    features = []
    for image in pictures(2):
        with torch.no_grad():
            output = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
        assert output.last_hidden_state.shape == (SHAPES | WHOLE)[kind]
        features.append(output.last_hidden_state)
    assert features[0].isfinite().all()
    assert (features[0] - features[1]).abs().max() > 1e-3
    if kind not in ("swin", "convnext"):
        assert len(output.hidden_states) == 5


def test_vision_classifier_is_loaded_by_the_stock_library(parts):
    folder = parts.vision_tower("vit_classifier")
    model = load(transformers.AutoModelForImageClassification, folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert isinstance(processor, transformers.ViTImageProcessor)
    with torch.no_grad():
        assert model(**processor(picture(), return_tensors="pt")).logits.shape == (1, 5)


@pytest.mark.parametrize("kind", VISION_TOWERS)
def test_vision_tower_has_no_constant_weights(parts, kind):
    for name, weight in load_file(parts.vision_tower(kind) / "model.safetensors").items():
        assert weight.numel() == 1 or weight.std() > 0, name


def test_vision_tower_options(parts):
    folder = parts.vision_tower("dinov2", image_size=64, input_size=32, dtype=torch.float16)
    model = load(transformers.AutoModel, folder, dtype="auto")
    assert model.dtype == torch.float16
    assert model.config.image_size == 64
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert processor(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_clip_has_its_processor_in_both_layouts(parts):
    older, newer = parts.vision_tower("clip"), parts.vision_tower("clip", combined_processor=True)
    assert (older / "preprocessor_config.json").is_file()
    assert not (newer / "preprocessor_config.json").exists()
    outputs = []
    for folder in (older, newer):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        assert isinstance(processor, transformers.CLIPProcessor)
        outputs.append(processor(text=["a brown dog"], images=[picture()], return_tensors="pt"))
        model = load(transformers.CLIPModel, folder)
        with torch.no_grad():
            assert model(**outputs[-1]).logits_per_image.shape == (1, 1)
    assert torch.equal(outputs[0]["pixel_values"], outputs[1]["pixel_values"])
    assert torch.equal(outputs[0]["input_ids"], outputs[1]["input_ids"])


# --- BiomedCLIP


def test_biomedclip_looks_as_published(parts):
    folder = parts.biomedclip()
    names = {path.name for path in folder.iterdir()}
    assert {"open_clip_config.json", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"} <= names
    assert not {"config.json", "preprocessor_config.json"} & names
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_model_name"] == BIOMEDBERT_NAME
    weights = load_file(folder / "open_clip_model.safetensors")
    pickled = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    assert weights.keys() == pickled.keys()
    assert all(torch.equal(weights[name], pickled[name]) for name in weights)
    assert weights["visual.trunk.blocks.3.attn.qkv.weight"].shape == (576, 192)
    assert all(weight.numel() == 1 or weight.std() > 0 for weight in weights.values())


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_biomedclip_oracle(parts, weights):
    folder = parts.biomedclip(weights=weights, image_size=48)
    oracle = biomedclip_oracle(folder)
    assert isinstance(oracle.model, open_clip.CustomTextCLIP)
    assert oracle.model.visual.trunk.patch_embed.img_size == (48, 48)
    pixels = torch.stack([oracle.preprocess(image) for image in pictures(2)])
    assert pixels.shape == (2, 3, 48, 48)
    with torch.no_grad():
        features = oracle.model.visual.trunk.forward_features(pixels)
        images = oracle.model.encode_image(pixels)
        texts = oracle.model.encode_text(oracle.tokenizer(["a chest X-ray", "a CT scan"]))
    assert features.shape == (2, 37, 192)
    assert images.shape == texts.shape == (2, 24)
    assert (features[0] - features[1]).abs().max() > 1e-2


def test_biomedclip_is_loaded_by_open_clip_itself(parts, hub):
    """With the text tower's source in reach, open_clip needs no help from the oracle."""
    name = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
    root = hub(name, BIOMEDBERT_NAME)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{root / name}")
    oracle = biomedclip_oracle(root / name)
    pixels = preprocess(picture())[None]
    assert torch.equal(pixels[0], oracle.preprocess(picture()))
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(pixels), oracle.model.encode_image(pixels))


def test_biomedclip_with_a_trunk_that_is_no_plain_vit(parts):
    folder = parts.biomedclip(timm_model_name="test_vit2", image_size=160, weights="safetensors")
    weights = load_file(folder / "open_clip_model.safetensors")
    assert "visual.trunk.cls_token" not in weights
    assert "visual.trunk.reg_token" in weights
    assert biomedclip_oracle(folder).model.visual.trunk.num_reg_tokens == 1


# --- LLaVA


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_llava_is_loaded_by_the_stock_library(parts, tower):
    folder = parts.llava_hf(tower)
    model = load(transformers.AutoModelForImageTextToText, folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert isinstance(model, transformers.LlavaForConditionalGeneration)
    assert isinstance(processor, transformers.LlavaProcessor)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat is shown? ASSISTANT:"
    inputs = processor(text=[prompt] * 2, images=pictures(2), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist() == [16, 16]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


# --- building


def test_builders_are_deterministic(tmp_path):
    for index, build in enumerate(
        (
            lambda folder: make_language_model("mixtral", folder),
            lambda folder: make_vision_tower("beit", folder),
            lambda folder: make_biomedclip(folder, weights="safetensors"),
        )
    ):
        first, second = build(tmp_path / f"{index}a"), build(tmp_path / f"{index}b")
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_builders_leave_the_random_state_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_language_model("llama", tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)


def test_seeds_differ(parts):
    first, second = parts.language_model("llama"), parts.language_model("llama", seed=1)
    name = "model.embed_tokens.weight"
    assert not torch.equal(load_file(first / "model.safetensors")[name], load_file(second / "model.safetensors")[name])


def test_a_folder_is_built_once(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer")
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert make_tokenizer(tmp_path / "tokenizer") == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="already holds another part"):
        make_tokenizer(tmp_path / "tokenizer", style="gpt2")


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: make_language_model("parrot", folder),
        lambda folder: make_language_model("llama", folder, vocab_size=3),
        lambda folder: make_vision_tower("eye", folder),
        lambda folder: make_tokenizer(folder, style="words"),
        lambda folder: make_tokenizer(folder, vocab_size=20000),
        lambda folder: make_biomedclip(folder, weights="gguf"),
    ],
)
def test_builders_refuse_what_they_do_not_know(tmp_path, build):
    with pytest.raises(ValueError):
        build(tmp_path / "part")


def test_hub_names_are_relative_paths(hub):
    root = hub()
    for name in HUB_NAMES:
        assert (root / name).is_dir()
    load(transformers.AutoModelForCausalLM, "TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    assert transformers.AutoConfig.from_pretrained("openai/clip-vit-large-patch14").model_type == "clip"
    assert transformers.AutoConfig.from_pretrained("google/siglip-base-patch16-224").model_type == "siglip"


# --- fresh processes


def test_run_python_blocks_moellava():
    code = """
for name in ("moellava", "moellava.configuration"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        print("blocked", name)
import os
print(os.listdir("."), os.environ["HF_HUB_OFFLINE"], os.environ["COLOUR"])
"""
    lines = run_python(code, env={"COLOUR": "green"}).splitlines()
    assert lines == ["blocked moellava", "blocked moellava.configuration", "[] 1 green"]


def test_run_python_reports_a_failure():
    with pytest.raises(RuntimeError, match="the reason"):
        run_python("raise SystemExit('the reason')")


def test_smollm2_answers_as_published(smollm2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert (model.dtype, text) == (torch.bfloat16, "The capital of France is Paris.")
