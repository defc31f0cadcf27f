# SPDX-License-Identifier: Apache-2.0
"""Projector files from elsewhere: their keys, under any prefix, as those of a projector of ours."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from ..configuration import MoellavaConfig
from ..parts.parts_moellava import PROJECTORS, encoder_for, projector_for
from .sources import read_tensors


# What may stand before the projector's own keys: our tree, LLaVA's, MoE-LLaVA's, and what trainers put in front.
_PREFIX = re.compile(
    r"^(?:.+\.)?(?:multi_modal_projector|mm_projector)\.(?:image_spatial_proj\.)?|^image_spatial_proj\.|^module\."
)
_SEQUENTIAL_KEY = re.compile(r"(?:(.+)\.)?(\d+)\.(weight|bias)")
_LINEAR_KEY = re.compile(r"linear_(\d+)\.(weight|bias)")
_POOL_KEY = re.compile(r"block\.(\d+)\.(?:weight|bias)")
_QFORMER_LAYER_KEY = re.compile(r"qformer\.encoder\.layer\.(\d+)\..+")
_BLOCK_KEY = re.compile(r"(block_in|block_out)\.(\d+)\.(.+)")
# The inner layer of a feed-forward part, in a block of a Q-Former and of a vision transformer.
_INTERMEDIATE_KEY = re.compile(
    r"(?:qformer\.encoder\.layer\.\d+\.intermediate_query\.dense|block_(?:in|out)\.\d+\.mlp\.fc1)\.weight"
)

_LINEAR_LAYER = r"(?:weight|bias)"
_TWO_LINEAR_LAYERS = rf"(?:proj_in|proj_out)\.[02]\.{_LINEAR_LAYER}"
_ATTENTION = rf"(?:attention\.(?:query|key|value)|output\.(?:dense|LayerNorm))\.{_LINEAR_LAYER}"
_CONV_BLOCK = rf"conv\.[01]\.{_LINEAR_LAYER}"
_VIT_BLOCK = rf"(?:norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2)\.{_LINEAR_LAYER}|attn\.qkv\.weight"
# The older projectors that are built as they were, and every key that one may have.
_LEGACY_KEYS: dict[str, re.Pattern] = {
    "older_qformer": re.compile(
        rf"{_TWO_LINEAR_LAYERS}|query_tokens|qformer\.layernorm\.{_LINEAR_LAYER}"
        rf"|qformer\.encoder\.layer\.\d+\.(?:(?:attention|crossattention)\.{_ATTENTION}"
        rf"|(?:intermediate_query\.dense|output_query\.(?:dense|LayerNorm))\.{_LINEAR_LAYER})"
    ),
    "pool_mlp": re.compile(rf"block\.\d*[02468]\.{_LINEAR_LAYER}"),
    "simple": re.compile(
        rf"{_TWO_LINEAR_LAYERS}|down2\.{_LINEAR_LAYER}"
        rf"|(?:block_in|block_out)\.(?:\d*[02468]\.{_CONV_BLOCK}|\d*[13579]\.(?:{_VIT_BLOCK}))"
    ),
}


def read_projector(path: str | os.PathLike, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads a projector file.

    Args:
        path (`str` or `os.PathLike`): A safetensors file, or a `.bin` or `.pt` of tensors.
        fields (`dict`): What the user says of the projector, its type under our name. Of an MLP and of MoE-LLaVA's
            projectors, the file tells what the user does not say, as far as it can: how often the blocks of a
            `simple` projector run it tells only where it names them once for each time.

    Returns:
        `tuple[dict, dict]`: The projector's fields, and its weights under our names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds no projector, is a pickle of more than tensors, or has keys that a
            projector of this type does not have.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no projector file {path}. Give the path of a .safetensors or .bin file.")
    tensors = dict(read_tensors(path))
    is_pool = any("image_spatial_proj.block." in name for name in tensors)  # elsewhere `block` may be anybody's MLP
    prefixed = {name: _PREFIX.sub("", name) for name in tensors}
    if any(short != name for name, short in prefixed.items()):
        # A file of a trainer may hold more than the projector, such as embedding rows.
        tensors = {short: tensors[name] for name, short in prefixed.items() if short != name}
    if not tensors:
        raise ValueError(
            f"{path} holds no weights of a projector. Expected what a trainer saves as mm_projector.bin, or the state "
            "dict of a projector."
        )
    short = {name.removeprefix("linear."): tensor for name, tensor in tensors.items()}
    if set(short) <= {"weight", "bias"} and fields.get("type") in (None, "linear"):
        tensors = {f"linear.{name}": tensor for name, tensor in short.items()}
        return {"bias": "bias" in short, **fields, "type": "linear"}, tensors
    kind = fields.get("type") or ("pool_mlp" if is_pool else _legacy_type(tensors, path))
    if kind in _LEGACY_KEYS:
        fields = {**_legacy_fields(kind, tensors), **fields, "type": kind}
        try:
            return fields, legacy_projector_tensors(fields, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if fields.get("type", "mlp") == "mlp":
        tensors = _as_mlp(tensors)
        fields = {**_mlp_fields(tensors), **fields}
    return fields, tensors


def legacy_projector_tensors(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the weights of a projector of MoE-LLaVA or LLaVA to those of ours.

    Args:
        fields (`dict`): The projector's type, under our name, and those of its fields that differ from the defaults.
        tensors (`dict[str, torch.Tensor]`): Its weights, without what stands before them in the checkpoint
            (`model.mm_projector.image_spatial_proj.`).

    Returns:
        `dict[str, torch.Tensor]`: The same weights under our names. Of blocks that share their weights, which older
        files may name once for each time that they run, one copy. That none is missing is not checked.

    Raises:
        ValueError: There are keys that this projector does not have, copies of a shared weight that differ, or the
            type is none that older checkpoints have.
    """
    kind = fields["type"]
    if kind == "identity":
        renamed: dict[str, str | None] = dict.fromkeys(tensors)
    elif kind == "linear":
        renamed = {name: f"linear.{name}" if name in ("weight", "bias") else None for name in tensors}
    elif kind == "mlp":
        own = {
            f"{2 * place}.{leaf}": f"linear_{place + 1}.{leaf}"
            for place in range(_field("mlp", "num_hidden_layers", fields))
            for leaf in ("weight", "bias")
        }
        renamed = {name: own.get(name) for name in tensors}
    elif kind in _LEGACY_KEYS:
        renamed = {name: _legacy_name(kind, fields, name) for name in tensors}
    else:
        raise ValueError(
            f"No older checkpoint has a projector of the type {kind!r}. Expected one of: "
            f"{', '.join(sorted({'identity', 'linear', 'mlp', *_LEGACY_KEYS}))}."
        )
    unknown = sorted(name for name, own_name in renamed.items() if own_name is None)
    if unknown:
        said = ", ".join(f"{name}={value}" for name, value in fields.items() if name != "type")
        raise ValueError(
            f"The projector {kind!r}{f' with {said}' if said else ''} has no {', '.join(unknown)}. The projector's "
            "type and fields and its weights do not belong together."
        )
    kept: dict[str, str] = {}
    for name, own_name in renamed.items():
        first = kept.setdefault(own_name, name)
        if first is not name and not torch.equal(tensors[first], tensors[name]):
            raise ValueError(
                f"{first} and {name} differ, but the repeated blocks of the projector {kind!r} are one block that runs "
                "several times, with one set of weights. The file is damaged, or it was written by other code."
            )
    return {own_name: tensors[name] for own_name, name in kept.items()}


def _field(kind: str, name: str, fields: dict[str, Any]) -> Any:
    """A field's value; its default where nothing is said of it."""
    value = fields.get(name)
    return PROJECTORS.fields(kind)[name] if value is None else value


def _legacy_name(kind: str, fields: dict[str, Any], name: str) -> str | None:
    """Returns what a weight of an older projector is called in ours, or `None` where there is none such."""
    if _LEGACY_KEYS[kind].fullmatch(name) is None:
        return None
    if kind == "older_qformer":
        match = _QFORMER_LAYER_KEY.fullmatch(name)
        return name if match is None or int(match[1]) < _field(kind, "num_hidden_layers", fields) else None
    if kind == "pool_mlp":
        place = int(_POOL_KEY.fullmatch(name)[1]) // 2
        return name if place < _field(kind, "num_hidden_layers", fields) else None
    if name.startswith("down2."):
        return name if _field(kind, "num_blocks_out", fields) > 0 else None
    match = _BLOCK_KEY.fullmatch(name)
    if match is None:
        return name
    blocks, place, leaf = match[1], int(match[2]), match[3]
    # A convolution and a transformer block take turns, and each of the two is one block that runs several times.
    runs = _field(kind, f"num_blocks_{blocks.removeprefix('block_')}", fields)
    return f"{blocks}.{place % 2}.{leaf}" if place < 2 * runs else None


def _legacy_type(tensors: dict[str, torch.Tensor], path: Path) -> str | None:
    """Returns which older projector a file holds, or `None` where it is none that its keys tell."""
    if "query_tokens" in tensors and "proj_in.0.weight" in tensors:
        return "older_qformer"
    if "proj_in.0.weight" in tensors and "proj_out.0.weight" in tensors:
        raise ValueError(
            f"{path} holds a projector of MoE-LLaVA's kind simple_in<a>_out<b>, whose file does not say how often its "
            "blocks run. Give the type, such as type='simple_in1_out1'."
        )
    return None


def _legacy_fields(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the weights of an older projector tell of it."""
    if kind == "pool_mlp":
        places = [int(match[1]) for match in map(_POOL_KEY.fullmatch, tensors) if match]
        return {"num_hidden_layers": max(places) // 2 + 1} if places else {}
    fields: dict[str, Any] = {}
    inner = next((tensor for name, tensor in tensors.items() if _INTERMEDIATE_KEY.fullmatch(name)), None)
    if inner is not None and inner.ndim == 2:
        fields["narrow"] = inner.shape[0] == 4 * inner.shape[1]
    if kind == "older_qformer":
        layers = [int(match[1]) for match in map(_QFORMER_LAYER_KEY.fullmatch, tensors) if match]
        queries = tensors.get("query_tokens")
        if layers:
            fields["num_hidden_layers"] = max(layers) + 1
        if queries is not None and queries.ndim == 3:
            fields["num_query_tokens"] = queries.shape[1]
        return fields
    matches = [match for match in map(_BLOCK_KEY.fullmatch, tensors) if match]
    for blocks in ("in", "out"):
        places = [int(match[2]) for match in matches if match[1] == f"block_{blocks}"]
        fields[f"num_blocks_{blocks}"] = max(places) // 2 + 1 if places else 0
    first = tensors.get("proj_in.0.weight")
    if inner is None and first is not None and first.ndim == 2:
        fields["narrow"] = first.shape[0] == first.shape[1]
    return fields


def _as_mlp(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the layers of an `nn.Sequential` (`0`, `2`, ...), under any one prefix, to `linear_1`, `linear_2`, ..."""
    matches = {name: _SEQUENTIAL_KEY.fullmatch(name) for name in tensors}
    if not all(matches.values()) or len({match.group(1) for match in matches.values()}) > 1:
        return tensors
    places = sorted({int(match.group(2)) for match in matches.values()})
    return {
        f"linear_{places.index(int(match.group(2))) + 1}.{match.group(3)}": tensors[name]
        for name, match in matches.items()
    }


def _mlp_fields(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the weights of an MLP tell of it; nothing where they are not those of one."""
    matches = [_LINEAR_KEY.fullmatch(name) for name in tensors]
    first = tensors.get("linear_1.weight")
    if not all(matches) or first is None:
        return {"type": "mlp"}
    return {
        "type": "mlp",
        "num_hidden_layers": max(int(match.group(1)) for match in matches),
        "hidden_size": first.shape[0],
        "bias": "linear_1.bias" in tensors,
    }


def projector_shapes(config: MoellavaConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every weight of a config's projector.

    Raises:
        ValueError: There is no such projector, as an identity between unequal widths.
    """
    with torch.device("meta"):
        projector = projector_for(config, encoder_for(config).feature_size).build()
    return {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}


def fit_projector(
    origin: str | os.PathLike,
    tensors: dict[str, torch.Tensor],
    config: MoellavaConfig,
    expected: dict[str, tuple[int, ...]],
) -> dict[str, torch.Tensor]:
    """Returns a projector's weights under the names that the projector has; a prefix common to all is taken off.

    Args:
        origin (`str` or `os.PathLike`): Where the weights come from, for error messages.
        tensors (`dict[str, torch.Tensor]`): The weights.
        config (`MoellavaConfig`): What the projector is to be.
        expected (`dict[str, tuple]`): Its `projector_shapes`.

    Raises:
        ValueError: They do not fit; the message lists every key and shape that does not.
    """
    common = os.path.commonprefix(list(tensors))
    for prefix in [common[: place + 1] for place, character in enumerate(common) if character == "."]:
        if set(tensors) == {f"{prefix}{name}" for name in expected}:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            break
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [f"missing {name} {shape}" for name, shape in expected.items() if name not in given]
    faults += [f"unexpected {name} {shape}" for name, shape in given.items() if name not in expected]
    faults += [
        f"{name} is {given[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if faults:
        raise ValueError(
            f"{origin} does not fit a {config.projector_config.type!r} projector from "
            f"{encoder_for(config).feature_size} to {config.text_embedding_size}: {'; '.join(faults)}. Name the "
            "type and the fields of the projector that was saved, or give another file."
        )
    return tensors


__all__ = ["fit_projector", "legacy_projector_tensors", "projector_shapes", "read_projector"]
