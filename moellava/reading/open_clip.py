# SPDX-License-Identifier: Apache-2.0
"""Reads the vision tower of an open_clip checkpoint (BiomedCLIP and the like) as a tower of transformers.

Only the vision side is touched: the weights come straight from the checkpoint's file, so that neither open_clip is
needed nor the source of the text tower. Two kinds of tower are converted, both without loss:

- a plain ViT of timm (`model_cfg.vision_cfg.timm_model_name`) becomes transformers' `ViTModel`. What shapes cannot
  tell (number of heads, activation, epsilon) is looked up in timm, an extra: `pip install moellava[biomedclip]`;
- open_clip's own ViT (`ViT-B-32` and its siblings) becomes `CLIPVisionModel`. No extra is needed.

Everything else is refused with a `ValueError` that names what was found.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.utils import logging

from ..formatting import first_few
from ..processing.open_clip_moellava import OpenClipImageProcessor
from .json_files import read_json_object
from .sources import read_tensors, shards_of


logger = logging.get_logger(__name__)

CONFIG_FILE = "open_clip_config.json"
# In the order in which open_clip itself prefers them; each may also come in shards, described by `<name>.index.json`.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

_VISUAL = "visual."
_TRUNK = "trunk."
_SUPPORTED = (
    "Supported are timm's plain VisionTransformer (class token, learned position embedding, exact GELU, no layer "
    "scale, no register tokens; for example BiomedCLIP's vit_base_patch16_224) and open_clip's own ViT (for example "
    "ViT-B-32)."
)

_TIMM_TOP_KEYS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_TIMM_BLOCK_KEYS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
# They pool or classify what the tower returns, and have no say in its hidden states.
_TIMM_HEADS = ("head.", "attn_pool.")

_NATIVE_TOP_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_NATIVE_BLOCK_KEYS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NATIVE_BLOCK = re.compile(
    r"transformer\.resblocks\.(\d+)\.(?:(ln_1|ln_2|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
    r"|attn\.in_proj_(weight|bias))"
)
_NATIVE_HEAD = "proj"
# Fields of open_clip's CLIPVisionCfg that the conversion reads, or that do not change the hidden states (what begins
# with `timm_` and `attn_pooler_` configures parts that a native ViT without attentional pooling does not have).
_NATIVE_FIELDS = {
    *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"),
    *("pos_embed_type", "patch_dropout", "final_ln_after_pool", "pool_type", "output_tokens"),
}
_NATIVE_UNUSED = ("timm_", "attn_pooler_")
# Fields that change the arithmetic of the tower, with the values under which it still is a plain CLIP ViT.
_NATIVE_PLAIN = {
    "ls_init_value": (None,),
    "attentional_pool": (False, None),
    "no_ln_pre": (False, None),
    "act_kwargs": (None, {}),
    "block_type": (None, "default"),
    "qk_norm": (False, None),
    "scaled_cosine_attn": (False, None),
    "scale_heads": (False, None),
    "scale_attn_inner": (False, None),
    "scale_attn": (False, None),
    "scale_fc": (False, None),
}


@dataclass(frozen=True)
class OpenClipTower:
    """The vision part of an open_clip checkpoint, in transformers' terms.

    Attributes:
        vision_config (`ViTConfig` or `CLIPVisionConfig`):
            The architecture. A `ViTConfig` stands for `ViTModel(config, add_pooling_layer=False)`: `ViTModel` adds a
            pooler by default, for which such a checkpoint has no weights.
        state_dict (`dict[str, torch.Tensor]`):
            Every weight of that model and no other, under its module names, in the dtype of the checkpoint. The
            tensors are views of the memory-mapped file (query, key and value of a layer are views of one tensor).
        image_processor (`OpenClipImageProcessor`):
            Does what `open_clip.image_transform(..., is_train=False)` does, on RGB pictures.
    """

    vision_config: ViTConfig | CLIPVisionConfig
    state_dict: dict[str, torch.Tensor]
    image_processor: OpenClipImageProcessor


def read_open_clip(source: str | os.PathLike | Callable[[str], str | os.PathLike | None]) -> OpenClipTower:
    """Reads the vision tower of an open_clip checkpoint.

    The pixels of the returned image processor equal open_clip's bit for bit, of RGB pictures of any size.

    Args:
        source (`str`, `os.PathLike` or callable):
            The checkpoint's folder, or a function that turns the name of one of its files into a local path, and
            returns `None` for a file that the checkpoint does not have.

    Returns:
        `OpenClipTower`: config, weights and image processor of the tower.

    Raises:
        FileNotFoundError: if the folder, its `open_clip_config.json` or its weights are missing.
        ImportError: if the tower is timm's and timm is not installed.
        ValueError: if a file is damaged or does not fit the config, or the tower is no plain ViT.
    """
    find = _finder(source)
    config_path = find(CONFIG_FILE)
    if config_path is None:
        place = "the checkpoint" if callable(source) else source
        raise FileNotFoundError(
            f"There is no {CONFIG_FILE} in {place}. An open_clip checkpoint has one beside its weights."
        )
    model_cfg, preprocess_cfg = _read_config(config_path)
    vision_cfg = model_cfg["vision_cfg"]

    weights_path, weights = _read_visual_weights(find, str(config_path.parent))
    if vision_cfg.get("timm_model_name"):
        vision_config, state_dict = _convert_timm_vit(vision_cfg, weights, weights_path)
    else:
        vision_config, state_dict = _convert_native_vit(model_cfg, weights, weights_path)
    image_processor = _build_image_processor(preprocess_cfg, vision_config.image_size, config_path)
    return OpenClipTower(vision_config=vision_config, state_dict=state_dict, image_processor=image_processor)


def _finder(source: str | os.PathLike | Callable[[str], str | os.PathLike | None]) -> Callable[[str], Path | None]:
    """Returns a function from a file's name to its path, or `None` where there is no such file."""
    if callable(source):

        def find(name: str) -> Path | None:
            path = source(name)
            return None if path is None else Path(path)

    else:
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected the folder of an open_clip checkpoint.")

        def find(name: str) -> Path | None:
            path = folder / name
            return path if path.is_file() else None

    return find


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `model_cfg` and `preprocess_cfg` of an `open_clip_config.json`."""
    content = read_json_object(path, "Download the checkpoint again.")
    # Like open_clip's get_model_config: a file may also hold the model's config alone.
    model_cfg = content.get("model_cfg", content)
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("vision_cfg"), dict):
        raise ValueError(f"{path} has no model_cfg with a vision_cfg (both JSON objects), so it describes no tower.")
    preprocess_cfg = content.get("preprocess_cfg") or {}
    if not isinstance(preprocess_cfg, dict):
        raise ValueError(f"preprocess_cfg in {path} is a {type(preprocess_cfg).__name__}; expected a JSON object.")
    return model_cfg, preprocess_cfg


# Weights


def _read_visual_weights(find: Callable[[str], Path | None], source_name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Returns the file that was read (of shards, their index) and the weights of `visual.*` without that prefix."""
    for name in WEIGHT_FILES:
        path = find(name)
        if path is not None:
            weights = _read_visual_file(path)
            break
        path = find(f"{name}.index.json")
        if path is not None:
            shards = shards_of(path, source_name, find, wanted=lambda name: _visual_key(name) is not None)
            weights = {name: tensor for shard in shards for name, tensor in _read_visual_file(shard).items()}
            break
    else:
        expected = ", ".join(WEIGHT_FILES)
        raise FileNotFoundError(
            f"There are no open_clip weights in {source_name}. Expected one of {expected} (or the .index.json of one)."
        )
    if not weights:
        raise ValueError(
            f"{path} has no weights named visual.*, so it is not an open_clip checkpoint. Expected what open_clip "
            "saves beside its open_clip_config.json."
        )
    return path, weights


def _visual_key(key: str) -> str | None:
    """Strips what stands before the name of a visual weight; `None` for other weights."""
    key = key.removeprefix("module.")  # left by distributed training, which open_clip accepts too
    return key.removeprefix(_VISUAL) if key.startswith(_VISUAL) else None


def _read_visual_file(path: Path) -> dict[str, torch.Tensor]:
    """Reads the visual weights of one file, memory-mapped."""
    return {name: tensor for key, tensor in read_tensors(path) if (name := _visual_key(key)) is not None}


# Conversion


def _no_plain_vit(what: str, found: str) -> ValueError:
    return ValueError(f"The {what} is no plain ViT: {found}. {_SUPPORTED}")


def _check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises a ValueError unless both have the same names and shapes."""
    missing = expected.keys() - weights.keys()
    surplus = weights.keys() - expected.keys()
    if missing or surplus:
        faults = [f"it lacks {first_few(missing)}"] * bool(missing) + [f"it has {first_few(surplus)}"] * bool(surplus)
        raise ValueError(f"The weights of {what} do not fit its config: {' and '.join(faults)}.")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"The weights of {what} do not fit its config: {name} has the shape {tuple(tensor.shape)}, "
                f"expected {tuple(expected[name].shape)}."
            )


def _square(value: Any, what: str) -> int:
    """Returns the side of a square that is given as one number or as two equal ones."""
    sides = [value] if isinstance(value, int) else list(value) if isinstance(value, (list, tuple)) else []
    if len(sides) not in (1, 2) or len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise ValueError(f"{what} is {value}; only squares are supported (one number of pixels, or two equal ones).")
    return sides[0]


def _grid_side(num_positions: int, what: str) -> int:
    """Returns the side of the square grid of patches with `num_positions` embeddings, the class token's included."""
    side = round(max(num_positions - 1, 0) ** 0.5)
    if side < 1 or side * side + 1 != num_positions:
        raise ValueError(
            f"The {what} has {num_positions} position embeddings; expected those of a square grid of patches and one "
            "for the class token. Other grids are not supported."
        )
    return side


def _timm_keys(depth: int, qkv_bias: bool) -> set[str]:
    """The names of all weights of a plain timm ViT, less its heads."""
    keys = set(_TIMM_TOP_KEYS)
    for layer in range(depth):
        keys |= {f"blocks.{layer}.{part}.{kind}" for part in _TIMM_BLOCK_KEYS for kind in ("weight", "bias")}
        keys |= {f"blocks.{layer}.attn.qkv.{kind}" for kind in ("weight", "bias")[: 1 + qkv_bias]}
    return keys


def _convert_timm_vit(
    vision_cfg: dict[str, Any], weights: dict[str, torch.Tensor], path: Path
) -> tuple[ViTConfig, dict[str, torch.Tensor]]:
    name = vision_cfg["timm_model_name"]
    what = f"vision tower of {path} (timm's {name})"
    weights = {key.removeprefix(_TRUNK): value for key, value in weights.items() if key.startswith(_TRUNK)}
    weights = {key: value for key, value in weights.items() if not key.startswith(_TIMM_HEADS)}

    # The names alone tell most other architectures, without timm.
    depth = 1 + max((int(match[1]) for key in weights if (match := _TIMM_BLOCK.fullmatch(key))), default=-1)
    plain = _timm_keys(depth, qkv_bias="blocks.0.attn.qkv.bias" in weights)
    surplus, missing = weights.keys() - plain, plain - weights.keys()
    if surplus or missing or not depth:
        # Of a weight that every layer has, once is enough.
        surplus = {re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in surplus}
        faults = [f"it has the weights {first_few(surplus)}"] * bool(surplus)
        faults += [f"it lacks the weights {first_few(missing)}"] * bool(missing)
        raise _no_plain_vit(what, " and ".join(faults))

    trunk = _build_timm_trunk(vision_cfg, what)
    _check_timm_trunk(trunk, what)
    expected = {key: value for key, value in trunk.state_dict().items() if not key.startswith(_TIMM_HEADS)}
    # A tower that was trained at another size has its own position embeddings: they are judged by their grid.
    if weights["pos_embed"].dim() == 3:
        expected["pos_embed"] = expected["pos_embed"].new_empty(1, weights["pos_embed"].shape[1], trunk.embed_dim)
    _check_weights(weights, expected, f"{path} (timm's {name})")

    patch_size = _square(list(weights["patch_embed.proj.weight"].shape[2:]), f"The patch size of the {what}")
    config = ViTConfig(
        hidden_size=weights["patch_embed.proj.weight"].shape[0],
        num_channels=weights["patch_embed.proj.weight"].shape[1],
        num_hidden_layers=depth,
        num_attention_heads=trunk.blocks[0].attn.num_heads,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=trunk.norm.eps,
        image_size=_timm_image_size(vision_cfg, trunk, weights["pos_embed"].shape[1], patch_size, what),
        patch_size=patch_size,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
    )

    state_dict = {}
    for key, value in weights.items():
        match = _TIMM_BLOCK.fullmatch(key)
        if match is None:
            state_dict[_TIMM_TOP_KEYS[key]] = value
            continue
        layer, part, kind = match.groups()
        if part == "attn.qkv":
            for projection, third in zip(("q_proj", "k_proj", "v_proj"), value.tensor_split(3), strict=True):
                state_dict[f"layers.{layer}.attention.{projection}.{kind}"] = third
        else:
            state_dict[f"layers.{layer}.{_TIMM_BLOCK_KEYS[part]}.{kind}"] = value
    with torch.device("meta"):
        model = ViTModel(config, add_pooling_layer=False)
    _check_weights(state_dict, model.state_dict(), f"{path} (as transformers' ViTModel)")
    return config, state_dict


def _build_timm_trunk(vision_cfg: dict[str, Any], what: str) -> torch.nn.Module:
    """Builds the architecture as open_clip does, without memory for its weights."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"The {what} is described by timm, which is not installed: `pip install moellava[biomedclip]`. The "
            "assembled model does not need it any more."
        ) from error

    name = vision_cfg["timm_model_name"]
    # Only registered names: timm would take `hf-hub:...` and `local-dir:...` for places to fetch a model from.
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"The {what} has an architecture that the installed timm {timm.__version__} does not know. Check its "
            "name, or upgrade timm."
        )
    options = {}
    pool, projection = vision_cfg.get("timm_pool", "avg"), vision_cfg.get("timm_proj", "linear")
    if projection not in ("linear", "mlp") and pool not in ("abs_attn", "rot_attn"):
        # Only then does open_clip pass the kind of pooling to timm, which decides on where the last norm stands.
        options["global_pool"] = pool
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"The {what} cannot be built by the installed timm {timm.__version__}: {error}") from error


def _check_timm_trunk(trunk: torch.nn.Module, what: str) -> None:
    """Raises a ValueError unless the trunk computes exactly what transformers' ViTModel does."""
    from timm.layers import Attention, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(trunk) is not VisionTransformer:
        raise _no_plain_vit(what, f"its class is {type(trunk).__name__}")
    parts = [("patch_embed", trunk.patch_embed, PatchEmbed)]
    without = [("norm_pre", trunk.norm_pre), ("fc_norm", trunk.fc_norm), ("patch_embed.norm", trunk.patch_embed.norm)]
    norms = [("norm", trunk.norm)]
    for index, block in enumerate(trunk.blocks):
        if type(block) is not Block:
            raise _no_plain_vit(what, f"blocks.{index} is a {type(block).__name__}")
        at = f"blocks.{index}."
        parts += [(at + "attn", block.attn, Attention), (at + "mlp", block.mlp, Mlp)]
        norms += [(at + "norm1", block.norm1), (at + "norm2", block.norm2)]
        without += [(at + "ls1", block.ls1), (at + "ls2", block.ls2)]
        # Some of these came with later versions of timm: absent is as good as switched off.
        for part in ("attn.q_norm", "attn.k_norm", "attn.norm", "attn.gate", "mlp.norm"):
            owner, name = part.split(".")
            without.append((at + part, getattr(getattr(block, owner), name, None)))
    for place, module, plain in parts:
        if type(module) is not plain:
            raise _no_plain_vit(what, f"{place} is a {type(module).__name__}")
    for place, module in without:
        if module is not None and not isinstance(module, torch.nn.Identity):
            raise _no_plain_vit(what, f"it has {place} ({type(module).__name__})")
    for place, module in norms:
        if not isinstance(module, torch.nn.LayerNorm) or module.eps != trunk.norm.eps:
            raise _no_plain_vit(what, f"{place} is {module}, and its norms have to be alike")
    if not trunk.has_class_token or trunk.num_reg_tokens or trunk.no_embed_class:
        raise _no_plain_vit(
            what,
            f"it has class token: {trunk.has_class_token}, register tokens: {trunk.num_reg_tokens}, "
            f"position embedding of the class token: {not trunk.no_embed_class}",
        )
    # By what it computes, since timm has several classes for the same function.
    sample = torch.linspace(-6, 6, 97)
    for index, block in enumerate(trunk.blocks):
        if not torch.allclose(block.mlp.act(sample), torch.nn.functional.gelu(sample), rtol=0, atol=1e-6):
            raise _no_plain_vit(what, f"the activation of blocks.{index} is {block.mlp.act}, not the exact GELU")


def _timm_image_size(
    vision_cfg: dict[str, Any], trunk: torch.nn.Module, num_positions: int, patch_size: int, what: str
) -> int:
    """Returns the side in pixels of the pictures that the tower takes.

    The position embeddings decide: timm does not follow the `image_size` of open_clip's config, which thereby may name
    a size that the tower cannot take.
    """
    side = _grid_side(num_positions, what)
    named = _square(vision_cfg.get("image_size", 224), f"image_size in the vision_cfg of the {what}")
    built = _square(tuple(trunk.patch_embed.img_size), f"The image size of the {what}")
    fitting = [size for size in (built, named) if size // patch_size == side]
    image_size = fitting[0] if fitting else side * patch_size
    if image_size != named:
        logger.warning(
            f"The {what} takes pictures of {image_size} pixels a side, as its position embeddings tell; its config "
            f"says image_size {named}, which is not followed."
        )
    return image_size


def _convert_native_vit(
    model_cfg: dict[str, Any], weights: dict[str, torch.Tensor], path: Path
) -> tuple[CLIPVisionConfig, dict[str, torch.Tensor]]:
    vision_cfg = model_cfg["vision_cfg"]
    what = f"vision tower of {path}"
    if isinstance(vision_cfg.get("layers"), (list, tuple)):
        raise _no_plain_vit(what, f"its layers are {vision_cfg['layers']}, so it is a ResNet")
    for field, value in vision_cfg.items():
        known = field in _NATIVE_FIELDS or field.startswith(_NATIVE_UNUSED)
        if not known and value not in _NATIVE_PLAIN.get(field, ()):
            raise _no_plain_vit(what, f"its vision_cfg says {field}: {value}")
    norm_kwargs = vision_cfg.get("norm_kwargs") or {}
    if norm_kwargs.keys() - {"eps"}:
        raise _no_plain_vit(what, f"its vision_cfg says norm_kwargs: {norm_kwargs}")

    weights = {key: value for key, value in weights.items() if key != _NATIVE_HEAD}
    odd = {key for key in weights if key not in _NATIVE_TOP_KEYS and not _NATIVE_BLOCK.fullmatch(key)}
    if odd:
        raise _no_plain_vit(what, f"it has the weights {first_few(odd)}")
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    if first not in weights or "positional_embedding" not in weights:
        raise ValueError(f"{path} lacks {first} or positional_embedding among its visual.* weights: it is incomplete.")

    # The defaults are those of open_clip's CLIPVisionCfg.
    width, head_width = vision_cfg.get("width", 768), vision_cfg.get("head_width", 64)
    if width % head_width:
        raise ValueError(f"The {what} has the width {width}, which is no multiple of its head_width {head_width}.")
    patch_size = _square(vision_cfg.get("patch_size", 16), f"patch_size in the vision_cfg of {path}")
    image_size = _square(vision_cfg.get("image_size", 224), f"image_size in the vision_cfg of {path}")
    side = _grid_side(weights["positional_embedding"].shape[0], what)
    if image_size // patch_size != side:
        raise ValueError(
            f"The {what} has position embeddings for {side} x {side} patches, but its config says image_size "
            f"{image_size} with patches of {patch_size} pixels. Interpolating them is not supported: save the "
            "checkpoint at the size that it is to be used with."
        )
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=weights[first].shape[0],
        num_hidden_layers=vision_cfg.get("layers", 12),
        num_attention_heads=width // head_width,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=norm_kwargs.get("eps", 1e-5),
        projection_dim=model_cfg.get("embed_dim", 512),
    )

    state_dict = {}
    for key, value in weights.items():
        match = _NATIVE_BLOCK.fullmatch(key)
        if match is None:
            state_dict[_NATIVE_TOP_KEYS[key]] = value
            continue
        layer, part, kind, fused_kind = match.groups()
        if fused_kind:
            for projection, third in zip(("q_proj", "k_proj", "v_proj"), value.tensor_split(3), strict=True):
                state_dict[f"encoder.layers.{layer}.self_attn.{projection}.{fused_kind}"] = third
        else:
            state_dict[f"encoder.layers.{layer}.{_NATIVE_BLOCK_KEYS[part]}.{kind}"] = value
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    _check_weights(state_dict, model.state_dict(), f"{path} (as transformers' CLIPVisionModel)")
    return config, state_dict


# Preprocessing


def _build_image_processor(preprocess_cfg: dict[str, Any], image_size: int, path: Path) -> OpenClipImageProcessor:
    """Builds the equal of open_clip's preprocessing at inference.

    The size is the tower's: open_clip, too, puts that in the place of what `preprocess_cfg` may say.
    """

    def chosen(field: str, default: Any) -> Any:
        value = preprocess_cfg.get(field)
        return default if value is None else value

    mode = chosen("mode", "RGB")
    if mode != "RGB":
        raise ValueError(f"preprocess_cfg in {path} says mode {mode!r}; only 'RGB' is supported.")
    interpolation = chosen("interpolation", "bicubic")
    # open_clip takes "random", which is meant for training, for bicubic.
    resamples = {
        "bicubic": PILImageResampling.BICUBIC,
        "random": PILImageResampling.BICUBIC,
        "bilinear": PILImageResampling.BILINEAR,
    }
    if interpolation not in resamples:
        raise ValueError(
            f"preprocess_cfg in {path} says interpolation {interpolation!r}; supported are {', '.join(resamples)}."
        )
    resize_mode = chosen("resize_mode", "shortest")
    side = {"height": image_size, "width": image_size}
    if resize_mode == "shortest":
        geometry = {"size": {"shortest_edge": image_size}, "do_center_crop": True, "crop_size": side}
    elif resize_mode == "squash":
        geometry = {"size": side, "do_center_crop": False, "crop_size": side}
    else:
        raise ValueError(
            f"preprocess_cfg in {path} says resize_mode {resize_mode!r}; supported are 'shortest' and 'squash'. No "
            "image processor of transformers pads as open_clip's 'longest' does."
        )
    return OpenClipImageProcessor(
        do_resize=True,
        resample=resamples[interpolation],
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=_per_channel(chosen("mean", OPENAI_CLIP_MEAN), "mean", path),
        image_std=_per_channel(chosen("std", OPENAI_CLIP_STD), "std", path),
        do_convert_rgb=True,
        **geometry,
    )


def _per_channel(value: Any, field: str, path: Path) -> list[float]:
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3 or not all(isinstance(number, (int, float)) for number in values):
        raise ValueError(f"preprocess_cfg in {path} says {field} {value}; expected one number or one per RGB channel.")
    return [float(number) for number in values]
