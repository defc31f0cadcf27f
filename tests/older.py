# SPDX-License-Identifier: Apache-2.0
"""A writer of tiny older checkpoints: MoE-LLaVA, Med-MoE and LLaVA-1.5, in exactly their layout.

It shares nothing with the converter: keys, shapes and config fields are written out here as the older code saved them,
which is why every family spells its own names. The weights are random and large enough that a tensor in the wrong
place, a swapped half or a forgotten bias shows in the logits. The folders also hold what a training run leaves beside
a model, such as `training_args.bin`, a pickle that is no weight file.
"""

import dataclasses
import io
import json
import os
import pickle
import re
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from parts import CORPUS, make_tokenizer, make_vision_tower
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, BatchEncoding


# As a value of a config field or of a field of `moe`: the field is not written at all.
ABSENT = object()

# What `_name_or_path` and, in checkpoints that were trained elsewhere, `mm_image_tower` hold.
TRAINERS_PATH = "/mnt/data/trainer/checkpoints/llava-stage2"
TRAINERS_TOWER = "/mnt/data/trainer/models/clip-vit-large-patch14-336"

SHARDS = ("safetensors", "bin", "sharded_safetensors", "sharded_bin")

HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 64, 4, 4, 16, 96
VOCABULARY = 384

# family -> what its class names are made of.
CLASS_STEMS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "phi": "Phi",
    "stablelm": "Stablelm",
    "qwen": "QWen",
    "qwen1_5": "Qwen1_5",
    "minicpm": "MiniCPM",
}
FAMILIES = tuple(CLASS_STEMS)

# family -> the style of its tokenizer, what the older code adds to it, and the rows of the embedding beyond it.
_TOKENIZERS = {
    "llama": ("llama", {"pad_token": "<unk>"}, 0),
    "mistral": ("llama", {"pad_token": "<unk>", "extra_special_tokens": ["<|end_of_turn|>", "<|pad_0|>"]}, 0),
    "phi": ("gpt2", {"unk_token": "<|extra_0|>", "pad_token": "<|extra_0|>"}, 63),
    "stablelm": ("gpt2", {"unk_token": "<|reg0|>", "pad_token": "<|reg0|>"}, 63),
    "qwen": ("qwen2", {"unk_token": "<|extra_0|>", "pad_token": "<|extra_0|>", "eos_token": "<|endoftext|>"}, 63),
    "qwen1_5": ("qwen2", {"unk_token": "<|extra_0|>", "pad_token": "<|extra_0|>"}, 63),
    "minicpm": ("llama", {"pad_token": "<unk>"}, 0),
}


@dataclasses.dataclass
class Older:
    """A checkpoint that was written, and what is in it."""

    folder: Path
    family: str
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    tokenizer: Any  # tokenises one piece of text as the older code did
    tower_folder: Path
    projector_prefix: str
    tower_prefix: str

    @property
    def vocabulary(self) -> int:
        """How many of the embedding's rows the tokenizer knows."""
        return len(self.tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


class _Weights:
    """Collects named random tensors: the same calls after the same seed make the same ones."""

    def __init__(self, *seed: object):
        self.state: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(zlib.crc32("/".join(map(str, seed)).encode()))

    def _random(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        self.state[f"{name}.weight"] = self._random((rows, columns), 0.2)
        if bias:
            self.state[f"{name}.bias"] = self._random((rows,), 0.2)

    def norm(self, name: str, size: int, *, bias: bool = False) -> None:
        self.state[f"{name}.weight"] = 1 + self._random((size,), 0.2)
        if bias:
            self.state[f"{name}.bias"] = self._random((size,), 0.2)

    def embedding(self, name: str, rows: int, columns: int) -> None:
        self.state[f"{name}.weight"] = self._random((rows, columns), 0.5)


def _write_ffn(weights: _Weights, family: str, name: str) -> None:
    if family == "phi":
        weights.linear(f"{name}.fc1", FFN, HIDDEN, bias=True)
        weights.linear(f"{name}.fc2", HIDDEN, FFN, bias=True)
    elif family == "qwen":
        weights.linear(f"{name}.w1", FFN, HIDDEN)
        weights.linear(f"{name}.w2", FFN, HIDDEN)
        weights.linear(f"{name}.c_proj", HIDDEN, FFN)
    else:
        weights.linear(f"{name}.gate_proj", FFN, HIDDEN)
        weights.linear(f"{name}.up_proj", FFN, HIDDEN)
        weights.linear(f"{name}.down_proj", HIDDEN, FFN)


def _write_moe(weights: _Weights, family: str, name: str, moe: dict[str, Any], experts: int, med_moe: bool) -> None:
    weights.linear(f"{name}.deepspeed_moe.gate.wg", experts, HIDDEN, bias=med_moe)
    for expert in range(experts):
        _write_ffn(weights, family, f"{name}.deepspeed_moe.experts.deepspeed_experts.{expert}")
    if moe.get("use_residual"):
        _write_ffn(weights, family, f"{name}.mlp")
        weights.linear(f"{name}.coefficient", 2, HIDDEN, bias=True)
    if med_moe:
        _write_ffn(weights, family, f"{name}.meta_moe")


def moe_layers(config: dict[str, Any]) -> list[int]:
    """The sparse layers of a config: the explicit list, else what `moe_mode` says."""
    moe = config.get("moe")
    if moe is None:
        return []
    if moe.get("moe_layers_idx") is not None:
        return list(moe["moe_layers_idx"])
    layers = range(config["num_hidden_layers"])
    half = len(layers) // 2
    chosen = {"first_half": layers[:half], "second_half": layers[half:], "sparse": layers[::2], "dense": layers}
    return list(chosen[moe["moe_mode"]])


def _num_experts(moe: dict[str, Any], index: int) -> int:
    experts = moe.get("num_experts", 4)
    if isinstance(experts, int):
        return experts
    return experts[index] if len(experts) > 1 else experts[0]


def _write_language_model(weights: _Weights, family: str, config: dict[str, Any], med_moe: bool) -> None:
    rows, layers = config["vocab_size"], config["num_hidden_layers"]
    sparse = moe_layers(config)

    def ffn(layer: int, name: str) -> None:
        if layer in sparse:
            moe = config["moe"]
            _write_moe(weights, family, name, moe, _num_experts(moe, sparse.index(layer)), med_moe)
        else:
            _write_ffn(weights, family, name)

    if family == "qwen":
        weights.embedding("transformer.wte", rows, HIDDEN)
        for layer in range(layers):
            name = f"transformer.h.{layer}"
            weights.norm(f"{name}.ln_1", HIDDEN)
            weights.norm(f"{name}.ln_2", HIDDEN)
            weights.linear(f"{name}.attn.c_attn", 3 * HIDDEN, HIDDEN, bias=True)
            weights.linear(f"{name}.attn.c_proj", HIDDEN, HIDDEN)
            ffn(layer, f"{name}.mlp")
        weights.norm("transformer.ln_f", HIDDEN)
        weights.linear("lm_head", rows, HIDDEN)
        return

    weights.embedding("model.embed_tokens", rows, HIDDEN)
    narrow = config["num_key_value_heads"] * HEAD_DIM
    layer_norm = family in ("phi", "stablelm")
    qkv_bias = family in ("phi", "qwen1_5") or bool(config.get("use_qkv_bias"))
    for layer in range(layers):
        name = f"model.layers.{layer}"
        weights.norm(f"{name}.input_layernorm", HIDDEN, bias=layer_norm)
        if family != "phi":
            weights.norm(f"{name}.post_attention_layernorm", HIDDEN, bias=layer_norm)
        weights.linear(f"{name}.self_attn.q_proj", HIDDEN, HIDDEN, bias=qkv_bias)
        weights.linear(f"{name}.self_attn.k_proj", narrow, HIDDEN, bias=qkv_bias)
        weights.linear(f"{name}.self_attn.v_proj", narrow, HIDDEN, bias=qkv_bias)
        output = "dense" if family == "phi" else "o_proj"
        weights.linear(f"{name}.self_attn.{output}", HIDDEN, HIDDEN, bias=family == "phi")
        ffn(layer, f"{name}.mlp")
    weights.norm("model.final_layernorm" if family == "phi" else "model.norm", HIDDEN, bias=layer_norm)
    if not config.get("tie_word_embeddings", family == "minicpm"):
        # Without a bias for Phi too: phi-2's own head has one, the older class's has none.
        weights.linear("lm_head", rows, HIDDEN)


def _write_projector(weights: _Weights, name: str, kind: str, tower_width: int) -> None:
    if kind == "linear":
        weights.linear(name, HIDDEN, tower_width, bias=True)
        return
    own = kind.removeprefix("pool_")
    if own.startswith("mlp") and own.endswith("x_gelu"):
        inner = f"{name}.block" if kind != own else name
        weights.linear(f"{inner}.0", HIDDEN, tower_width, bias=True)
        for index in range(1, int(own[3 : -len("x_gelu")])):
            weights.linear(f"{inner}.{2 * index}", HIDDEN, HIDDEN, bias=True)
        return
    if kind.startswith("qformer"):
        layers, queries = map(int, kind.removeprefix("qformer").split("_"))
        for part, width in (("proj_in", tower_width), ("proj_out", HIDDEN)):
            weights.linear(f"{name}.{part}.0", HIDDEN, width, bias=True)
            weights.linear(f"{name}.{part}.2", HIDDEN, HIDDEN, bias=True)
        weights.embedding("query_tokens", queries, HIDDEN)
        weights.state[f"{name}.query_tokens"] = weights.state.pop("query_tokens.weight")[None]
        weights.norm(f"{name}.qformer.layernorm", HIDDEN, bias=True)
        for layer in range(layers):
            inner = f"{name}.qformer.encoder.layer.{layer}"
            for part in ("attention", "crossattention"):
                for one in ("attention.query", "attention.key", "attention.value", "output.dense"):
                    weights.linear(f"{inner}.{part}.{one}", HIDDEN, HIDDEN, bias=True)
                weights.norm(f"{inner}.{part}.output.LayerNorm", HIDDEN, bias=True)
            width = int(2.6875 * HIDDEN)
            weights.linear(f"{inner}.intermediate_query.dense", width, HIDDEN, bias=True)
            weights.linear(f"{inner}.output_query.dense", HIDDEN, width, bias=True)
            weights.norm(f"{inner}.output_query.LayerNorm", HIDDEN, bias=True)
        return
    raise ValueError(f"this writer knows no projector {kind!r}")


def tower_tensors(tower_folder: Path, *, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """The vision half of a tower's folder, with the names that it has there: `vision_model.*`."""
    tensors = load_file(tower_folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    if not tensors:
        raise ValueError(f"{tower_folder} holds no vision_model.*")
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * noise if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Configs and tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def _family_config(family: str) -> dict[str, Any]:
    """The language model's own fields, by the names of its config class at transformers 4.37."""
    common = {
        "vocab_size": None,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    llama = common | {
        "intermediate_size": FFN,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }
    if family == "llama":
        own = {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0}
        return llama | own | {"tie_word_embeddings": False}
    if family == "mistral":
        own = {"num_key_value_heads": 2, "sliding_window": 4096, "rope_theta": 20000.0, "tie_word_embeddings": False}
        return llama | own
    if family == "qwen1_5":
        own = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "lora": {}}
        return llama | own | {"sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False}
    if family == "minicpm":
        # Absent tie_word_embeddings means true. A quarter of the width as base, as in MiniCPM-2B about a ninth.
        own = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": HIDDEN // 4, "lora": {}}
        return llama | own | {"attention_bias": False, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0}
    if family == "phi":
        return common | {
            "intermediate_size": FFN,
            "num_key_value_heads": HEADS,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.0,
            "attention_dropout": 0.0,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": False,
            "tie_word_embeddings": False,
        }
    if family == "stablelm":
        return common | {
            "intermediate_size": FFN,
            "num_key_value_heads": HEADS,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "use_qkv_bias": True,
            "rope_pct": 0.25,
            "rope_theta": 10000,
            "rotary_scaling_factor": 1.0,
            "tie_word_embeddings": False,
        }
    return common | {
        "intermediate_size": 2 * FFN,  # twice the width that the FFN has
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 20000,
        "rotary_pct": 1.0,
        "kv_channels": HEAD_DIM,
        "seq_length": 2048,
        "emb_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
        "scale_attn_weights": True,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": False,
        "use_cache_quantization": False,
        "use_cache_kernel": False,
        "softmax_in_fp32": False,
        "bf16": True,
        "fp16": False,
        "fp32": False,
        "onnx_safe": None,
        "tokenizer_class": "QWenTokenizer",
        "tie_word_embeddings": False,
    }


def _multimodal_config(tower: str, tower_width: int, projector: str) -> dict[str, Any]:
    return {
        "mm_image_tower": tower,
        "mm_video_tower": None,
        "mm_hidden_size": tower_width,
        "image_projector_type": projector,
        "video_projector_type": "linear",
        "video_global_proj": False,
        "video_temproal_proj": False,
        "video_spatial_proj": False,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_projector_lr": None,
        "use_mm_proj": True,
    }


_TRAIN_MODULES = {"phi": ["fc1", "fc2", "wg"], "qwen": ["mlp.w1", "mlp.w2", "mlp.c_proj", "wg"]}


def _moe_config(family: str, given: dict[str, Any], med_moe: bool) -> dict[str, Any]:
    layers = given.get("moe_layers_idx", [0, 2])
    count = len(layers) if isinstance(layers, list) else LAYERS // 2
    moe = {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": [0, 2],
        "ep_size": 1,
        "top_k_experts": 1 if med_moe else 2,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": False,
        "router_aux_loss_coef": 0 if med_moe else 0.01,
        "num_experts": [4] * count,
        "train_modules": _TRAIN_MODULES.get(family, ["gate_proj", "up_proj", "down_proj", "wg"]),
    }
    return _without_absent(moe | given)


def _without_absent(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not ABSENT}


class SentencePieceTokenizer:
    """The older LlamaTokenizer: sentencepiece itself on what stands between special tokens, after a `<s>`.

    A blank comes before the text, and if it is `legacy` also before what follows a special token. The older code
    tokenised what stands before, between and after pictures as texts of their own.
    """

    bos_token, eos_token, unk_token, pad_token = "<s>", "</s>", "<unk>", "<unk>"
    bos_token_id, eos_token_id, unk_token_id, pad_token_id = 1, 2, 0, 0

    def __init__(self, model: bytes, added: list[str], legacy: bool):
        self.with_blank = sentencepiece.SentencePieceProcessor(model_proto=model)
        plain = sentencepiece_model_pb2.ModelProto.FromString(model)
        plain.normalizer_spec.add_dummy_prefix = False
        self.without_blank = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
        self.added = {token: len(self.with_blank) + index for index, token in enumerate(added)}
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2} | self.added
        self.legacy = legacy

    def __len__(self) -> int:
        return len(self.with_blank) + len(self.added)

    def __call__(self, text: str) -> BatchEncoding:
        ids = [self.bos_token_id]
        for index, part in enumerate(re.split(f"({'|'.join(map(re.escape, self.special))})", text)):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                model = self.with_blank if index == 0 or self.legacy else self.without_blank
                ids += model.encode(part)
        return BatchEncoding({"input_ids": ids})


@cache
def _sentencepiece_model() -> bytes:
    """A model with LLaMA's settings: byte fallback, nothing normalised, `<unk>`, `<s>`, `</s>` as ids 0, 1, 2."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        minloglevel=2,
    )
    return written.getvalue()


_LLAMA_SPECIAL = {"bos": "s", "eos": "/s", "unk": "unk"}


def _added_token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_tokenizer(family: str, folder: Path, files: str) -> Any:
    """Writes a tokenizer and returns what tokenises as it did.

    `files` is "fast", for tokenizer.json as transformers writes it now, or "slow", for the files that the older code
    left with `use_fast=False`: `tokenizer.model`, or `vocab.json` and `merges.txt`.
    """
    style, added, _ = _TOKENIZERS[family]
    common = {"clean_up_tokenization_spaces": False, "model_max_length": 2048, "padding_side": "right"}
    if style == "llama" and files == "slow":
        extra = added.get("extra_special_tokens", [])
        # As in vicuna-v1.5's files; the others have the older behaviour, which was the default.
        legacy = family != "llama"
        tokenizer = SentencePieceTokenizer(_sentencepiece_model(), extra, legacy)
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
        special = {f"{name}_token": _added_token(f"<{text}>") for name, text in _LLAMA_SPECIAL.items()}
        numbered = dict(enumerate(("<unk>", "<s>", "</s>"))) | {
            index: token for token, index in tokenizer.added.items()
        }
        if extra:
            _write_json(folder / "added_tokens.json", tokenizer.added)
        decoder = {str(index): _added_token(token) | {"special": True} for index, token in numbered.items()}
        _write_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
        _write_json(
            folder / "tokenizer_config.json",
            common
            | {name: token["content"] for name, token in special.items()}
            | {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": decoder}
            | {"additional_special_tokens": [], "legacy": legacy, "pad_token": "<unk>"}
            | {"sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False},
        )
        return tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(Path(scratch, "tokenizer"), style=style, vocab_size=VOCABULARY, pad_token=None)
        tokenizer = AutoTokenizer.from_pretrained(Path(scratch, "tokenizer"))
    tokenizer.add_special_tokens(added)
    tokenizer.padding_side = "right"
    if files == "fast":
        tokenizer.save_pretrained(folder)
        return tokenizer
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    _write_json(folder / "vocab.json", whole["model"]["vocab"])
    merges = "\n".join(" ".join(merge) for merge in whole["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    own = {token["content"]: token["id"] for token in whole["added_tokens"]}
    _write_json(folder / "added_tokens.json", own)
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = {name: token for name, token in special.items() if token is not None}
    _write_json(folder / "special_tokens_map.json", special)
    decoder = {str(index): _added_token(token) | {"special": True} for token, index in own.items()}
    class_name = {"phi": "CodeGenTokenizer", "stablelm": "GPT2Tokenizer"}.get(family, "Qwen2Tokenizer")
    config = {"add_prefix_space": False, "added_tokens_decoder": decoder, "errors": "replace"}
    _write_json(folder / "tokenizer_config.json", common | special | config | {"tokenizer_class": class_name})
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _in_shards(state: dict[str, torch.Tensor], count: int = 3) -> list[dict[str, torch.Tensor]]:
    """The tensors in order, in parts of about equal number: a layer's experts fall into different files."""
    names = list(state)
    size = -(-len(names) // count)
    return [{name: state[name] for name in names[start : start + size]} for start in range(0, len(names), size)]


def write_weights(folder: Path, state: dict[str, torch.Tensor], shards: str = "safetensors") -> None:
    """Writes weight files as transformers 4.37 named them."""
    if shards not in SHARDS:
        raise ValueError(f"unknown layout of files {shards!r}; known: {', '.join(SHARDS)}")
    stem, suffix = ("model", "safetensors") if shards.endswith("safetensors") else ("pytorch_model", "bin")

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if suffix == "bin":
            torch.save(tensors, path)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})

    if not shards.startswith("sharded"):
        write(folder / f"{stem}.{suffix}", state)
        return
    parts, weight_map = _in_shards(state), {}
    for index, part in enumerate(parts, start=1):
        name = f"{stem}-{index:05}-of-{len(parts):05}.{suffix}"
        write(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_surroundings(folder: Path, config: dict[str, Any], **generation: Any) -> None:
    """The config, and what the trainer leaves beside a model."""
    _write_json(folder / "config.json", config)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    generation = tokens | generation | {"transformers_version": config["transformers_version"]}
    _write_json(folder / "generation_config.json", generation)
    # Arguments of a class that does not exist here: whoever unpickles every .bin of a folder fails on it.
    arguments = pickle.dumps({"learning_rate": 2e-5}) + b"cmoellava.train.train\nTrainingArguments\n."
    (folder / "training_args.bin").write_bytes(arguments)
    (folder / "trainer_state.json").write_text('{"global_step": 1}', encoding="utf-8")


def write_tower(folder: str | os.PathLike, kind: str = "clip") -> Path:
    """A whole CLIP or SigLIP model with its image processor, as `mm_image_tower` names one on the Hub."""
    return make_vision_tower(kind, folder)


def write_older(
    folder: str | os.PathLike,
    family: str,
    *,
    tower_folder: str | os.PathLike,
    moe: dict[str, Any] | None = None,
    med_moe: bool = False,
    projector: str = "mlp2x_gelu",
    with_tower_weights: bool = True,
    tower_noise: float = 0.05,
    image_tower: str | None = None,
    shards: str = "safetensors",
    architectures: str = "train",
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype | None = None,
    duplicate_bin: bool = False,
    tokenizer_files: str = "slow",
    seed: int = 0,
    **config_overrides,
) -> Older:
    """Writes a checkpoint of MoE-LLaVA, or of Med-MoE.

    Args:
        folder: where to write.
        family: one of `FAMILIES`.
        tower_folder: what `write_tower` wrote.
        moe: fields of the config's `moe` that differ from those of the training scripts; `ABSENT` as a value leaves
            one out. None: a dense model, unless `med_moe`.
        med_moe: whether the sparse layers are those of Med-MoE: a biased gate and a meta expert.
        projector: `image_projector_type`: "linear", "mlp<N>x_gelu", "pool_mlp<N>x_gelu" or "qformer<L>_<Q>".
        with_tower_weights: whether the checkpoint holds the tower's weights.
        tower_noise: how far those lie from the tower's folder, so that it shows which of the two was taken.
        image_tower: what `mm_image_tower` says; by default the path of `tower_folder`.
        shards: one of `SHARDS`.
        architectures: "train" or "eval": which of the two classes of a sparse model wrote it.
        dtype: of the weights.
        gate_dtype: of the gates; by default `dtype`.
        duplicate_bin: whether a whole `pytorch_model.bin` lies beside the other files, as MoE runs leave it.
        tokenizer_files: "slow" or "fast": without or with tokenizer.json.
        seed: other weights for another seed.
        config_overrides: further or other fields of config.json; `ABSENT` leaves one out.
    """
    if family not in CLASS_STEMS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    folder, tower_folder = Path(folder), Path(tower_folder)
    folder.mkdir(parents=True)
    tokenizer = _write_tokenizer(family, folder, tokenizer_files)
    sparse = med_moe or moe is not None
    prefix = "transformer" if family == "qwen" else "model"
    tower = tower_tensors(tower_folder, noise=tower_noise)
    tower_width = next(t for name, t in tower.items() if name.endswith("patch_embedding.weight")).shape[0]

    class_name = {"train": "", "eval": "Eval"}[architectures] if sparse else ""
    class_name += f"{'MoELLaVA' if sparse else 'Llava'}{CLASS_STEMS[family]}ForCausalLM"
    config = {"_name_or_path": TRAINERS_PATH, "architectures": [class_name]}
    config |= _family_config(family) | {"vocab_size": len(tokenizer) + _TOKENIZERS[family][2]}
    config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config |= {"pad_token_id": tokenizer.pad_token_id, "model_type": f"{'moe_' if sparse else ''}llava_{family}"}
    config |= _multimodal_config(image_tower or str(tower_folder), tower_width, projector)
    if sparse:
        config["moe"] = _moe_config(family, moe or {}, med_moe)
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.37.0"}
    config = _without_absent(config | config_overrides)

    weights = _Weights(family, sparse, med_moe, projector, seed)
    _write_language_model(weights, family, config, med_moe)
    projector_prefix = f"{prefix}.mm_projector.image_spatial_proj"
    _write_projector(weights, projector_prefix, projector, tower_width)
    tower_prefix = f"{prefix}.image_tower.image_tower."
    if with_tower_weights:
        weights.state |= {tower_prefix + name: tensor for name, tensor in tower.items()}
    state = {
        name: tensor.to(gate_dtype or dtype) if ".gate.wg." in name else tensor.to(dtype)
        for name, tensor in weights.state.items()
    }
    write_weights(folder, state, shards)
    if duplicate_bin:
        write_weights(folder, state, "bin")
    # Of Qwen-1, with the fields of its own chat code and the two that MoE-LLaVA forces.
    generation = {"chat_format": "raw", "max_window_size": 6144, "do_sample": False, "repetition_penalty": 1.0}
    _write_surroundings(folder, config, **(generation if family == "qwen" else {"_from_model_config": True}))
    return Older(folder, family, config, state, tokenizer, tower_folder, projector_prefix, tower_prefix)


def write_llava15(
    folder: str | os.PathLike,
    *,
    tower_folder: str | os.PathLike,
    model_type: str = "llava",
    projector: str = "mlp2x_gelu",
    with_tower_weights: bool = True,
    with_buffers: bool = True,
    shards: str = "sharded_bin",
    seed: int = 0,
    **config_overrides,
) -> Older:
    """Writes a checkpoint of LLaVA-1.5 as its authors publish it.

    Args:
        folder: where to write.
        tower_folder: what `write_tower` wrote; `mm_vision_tower` holds its path.
        model_type: "llava", or "llava_llama" as later versions of their code call it.
        projector: `mm_projector_type`.
        with_tower_weights: whether the checkpoint holds the tower's weights.
        with_buffers: whether it holds what transformers before 4.32 saved beside the weights: `rotary_emb.inv_freq` and
            the tower's `position_ids`.
        shards: one of `SHARDS`.
        seed: other weights for another seed.
        config_overrides: further or other fields of config.json; `ABSENT` leaves one out.
    """
    folder, tower_folder = Path(folder), Path(tower_folder)
    folder.mkdir(parents=True)
    tokenizer = _write_tokenizer("llama", folder, "slow")
    tower = tower_tensors(tower_folder, noise=0.05)
    tower_width = next(t for name, t in tower.items() if name.endswith("patch_embedding.weight")).shape[0]
    config = {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": FFN,
        "max_length": 4096,
        "max_position_embeddings": 4096,
        "mm_hidden_size": tower_width,
        "mm_projector_type": projector,
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower_folder),
        "model_type": model_type,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": len(tokenizer),
    }
    config = _without_absent(config | config_overrides)
    weights = _Weights("llava 1.5", projector, seed)
    _write_language_model(weights, "llama", config, False)
    _write_projector(weights, "model.mm_projector", projector, tower_width)
    tower_prefix = "model.vision_tower.vision_tower."
    if with_tower_weights:
        weights.state |= {tower_prefix + name: tensor for name, tensor in tower.items()}
    if with_buffers:
        inverse = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        for layer in range(LAYERS):
            weights.state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inverse.clone()
        if with_tower_weights:
            positions = tower["vision_model.embeddings.position_embedding.weight"].shape[0]
            weights.state[f"{tower_prefix}vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
    write_weights(folder, weights.state, shards)
    # As published: a temperature without sampling, which later versions of transformers refuse to save.
    _write_surroundings(folder, config, max_length=4096, temperature=0.9, top_p=0.6)
    return Older(folder, "llama", config, weights.state, tokenizer, tower_folder, "model.mm_projector", tower_prefix)
