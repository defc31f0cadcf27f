# SPDX-License-Identifier: Apache-2.0
"""From an older checkpoint to a model of ours: its parts read, its weights sorted, its conversation kept.

`read_converted` reads one into a `Converted`, of which `load_legacy` makes the model; `convert` saves it.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..authoring.older_names import last_part
from ..building.build import build
from ..chatting.chat_templates import IMAGE_TOKEN, multimodal_chat_template
from ..checks.configs import check_part
from ..configuration import MoellavaConfig
from ..parts.parts_moellava import encoder_for
from ..reading.language_model import (
    add_image_token,
    dtype_of,
    grow_embeddings,
    prepare_tokenizer,
    read_config,
    read_generation_config,
    read_tokenizer,
)
from ..reading.processor import make_processor
from ..reading.projector_file import fit_projector, legacy_projector_tensors, projector_shapes
from ..reading.provenance import with_provenance
from ..reading.sources import Source, are_same_weights, load_image_processor, read_tensors
from ..reading.vision_tower import VisionPart, read_vision_tower
from ..tree import BODY_PREFIX, PEFT_PREFIX, PROJECTOR_PREFIX, TOWER_PREFIX, part_weights, with_part
from .conversations import conversation_for, prepare_legacy_tokenizer, stop_token_ids
from .legacy_adapters import ADAPTER_FILES, attach_adapter, read_adapter
from .legacy_config import LegacyModel, OlderCheckpointError, is_llava_hf, read_legacy_config
from .legacy_weights import WeightReport, language_tensors, moe_fields_told_by, sort_weights
from .tokenizers import read_legacy_tokenizer


ADAPTER_CONFIG = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"
_OF_PROJECTOR = ".mm_projector."
_PICTURE_MARKS = ("<im_start>", "<im_end>")


@dataclass
class Converted:
    """What a model of ours is made of, read from an older checkpoint.

    Attributes:
        config (`MoellavaConfig`): The model's config.
        tensors (`dict[str, torch.Tensor]`): Its weights, memory-mapped but for those that are stacked.
        tokenizer, image_processor: Those of its processor.
        chat_template (`str`): The conversation that it was trained on.
        generation_config (`GenerationConfig`): How it answers.
        weights (`WeightReport`): What became of the older weights.
        notes (`list[str]`): What else is not taken over as it is, and why.
        space_after_image (`bool`): Whether the tokenizer needs a space behind a picture to say what it said.
    """

    config: MoellavaConfig
    tensors: dict[str, torch.Tensor]
    tokenizer: Any
    image_processor: Any
    chat_template: str
    generation_config: GenerationConfig | None
    weights: WeightReport
    notes: list[str] = field(default_factory=list)
    space_after_image: bool = False


def read_converted(
    source: Source,
    base: Source | None = None,
    vision_tower: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Converted:
    """Reads an older checkpoint.

    Args:
        source (`Source`): The checkpoint; or, with `base`, a folder with a projector or a LoRA adapter.
        base (`Source`, *optional*): The language model that these belong to.
        vision_tower (`str`, *optional*): A folder or Hub id in the place of the vision tower that the config names.
        changes (`Mapping`, *optional*): Fields of `MoellavaConfig` that are to be other than the checkpoint says.

    Raises:
        FileNotFoundError, ValueError: Something is missing, damaged, or of a kind that cannot be converted.
    """
    fields = source.config_dict()
    check_part(f"{source}/config.json", fields)
    changes = dict(changes or {})
    if is_llava_hf(fields):
        converted = _read_llava_hf(source, changes)
        _check_tower_of_llava_hf(converted, source, vision_tower)
        return converted
    if base is None:
        _check_needs_no_base(source)
    older = read_legacy_config(fields, source.name)
    tower = _read_tower(older, source, vision_tower)
    talk = _read_conversation(older, source if base is None or _has_tokenizer(source) else base, source, fields)
    older.text_config.vocab_size = talk.rows

    weights = _open_weights(source, base)
    origin = source.name if base is None else f"{source} with the base {base}"
    language, projector, tower_weights, report = sort_weights(weights, older, origin)
    _check_tower(tower_weights, tower.config, source, vision_tower or older.vision_tower)
    if vision_tower not in (None, older.vision_tower):
        _compare_towers(older, source, vision_tower, tower, tower_weights)
    if older.is_tied is None:
        older.text_config.tie_word_embeddings = "lm_head.weight" not in language
    if older.moe is not None:
        older.moe = moe_fields_told_by(language, older.moe)
    config = _our_config(older, tower, talk, source, vision_tower, changes)
    tensors = language_tensors(language, older.text_config, config.moe_config, source.name)
    tensors |= _projector_and_tower(projector, tower_weights, tower, config, source, report)
    if older.family.drops_head_bias:
        head = tensors["lm_head.weight"]
        tensors["lm_head.bias"] = head.new_zeros(head.shape[0])
        report.added["lm_head.bias"] = "zeros: the older class has no bias in its head"
    if talk.rows > talk.known_rows:
        grow_embeddings(tensors, older.text_config, talk.known_rows, talk.rows)
        older.notes.append(f"{talk.rows - talk.known_rows} row(s) are added to the vocabulary for {IMAGE_TOKEN}")
    return Converted(
        config,
        tensors,
        talk.tokenizer,
        tower.image_processor,
        talk.chat_template,
        talk.generation_config,
        report,
        older.notes,
        _needs_space_after_image(talk.tokenizer),
    )


@dataclass
class _Talk:
    """How a model is talked to: its tokenizer with all that it needs, its conversation, how it answers.

    `known_rows` of the vocabulary have weights in the checkpoint, of `rows` that there are to be.
    """

    tokenizer: Any
    chat_template: str
    generation_config: GenerationConfig
    image_token_id: int
    known_rows: int
    rows: int


def _read_conversation(older: LegacyModel, home: Source, source: Source, fields: Mapping[str, Any]) -> _Talk:
    """Reads the tokenizer, which lies in `home`, and makes it what the older loader made of it."""
    tokenizer = read_legacy_tokenizer(home, older.text_config)
    family = _conversation_family(older, tokenizer)
    # Older transformers took True where the file does not say it.
    legacy = (home.read_json("tokenizer_config.json") or {}).get("legacy", True)
    prepare_legacy_tokenizer(tokenizer, family, legacy=legacy)
    _add_picture_marks(tokenizer, older, fields)
    prepare_tokenizer(tokenizer)
    known_rows = older.text_config.vocab_size
    image_token_id, rows = add_image_token(tokenizer, known_rows)
    rows = max(rows, *(index + 1 for index in tokenizer.get_added_vocab().values()))
    conversation = conversation_for(family)
    template = _template_of_tokenizer(older, tokenizer, family) or conversation.chat_template
    if older.has_picture_marks:
        start, end = _PICTURE_MARKS
        template = template.replace(IMAGE_TOKEN, f"{start}{IMAGE_TOKEN}{end}")
    generation_config = _readable(read_generation_config(source)) or GenerationConfig()
    generation_config.eos_token_id = stop_token_ids(tokenizer, conversation)
    generation_config.pad_token_id = tokenizer.pad_token_id
    generation_config.bos_token_id = tokenizer.bos_token_id
    if rows > known_rows:
        generation_config.suppress_tokens = list(range(known_rows, rows))
    return _Talk(tokenizer, template, generation_config, image_token_id, known_rows, rows)


def _our_config(
    older: LegacyModel,
    tower: VisionPart,
    talk: _Talk,
    source: Source,
    vision_tower: str | None,
    changes: Mapping[str, Any],
) -> MoellavaConfig:
    fields = {
        "encoder_type": tower.encoder_type,
        "vision_feature_layer": older.vision_feature_layer,
        "vision_feature_select_strategy": older.vision_feature_select_strategy,
        "image_aspect_ratio": older.image_aspect_ratio,
        **changes,
    }
    config = MoellavaConfig(
        text_config=older.text_config,
        vision_config=tower.config,
        projector_config=dict(older.projector),
        moe_config=older.moe,
        image_token_id=talk.image_token_id,
        # The older code never scaled pictures; text it scaled with no picture beside it only, which is mended here.
        image_feature_scale=1 / getattr(older.text_config, "embedding_multiplier", 1.0),
        parts=_provenance(source, vision_tower or older.vision_tower),
        **fields,
    )
    older.notes += _drop_one_token(config)
    return config


def _drop_one_token(config: MoellavaConfig) -> list[str]:
    """Makes a config drop exactly one token of every tower where it drops any, as LLaVA's code and transformers' do.

    Returns:
        `list[str]`: What is to be said of it.
    """
    prefix = encoder_for(config).num_prefix_tokens
    if config.vision_feature_select_strategy not in ("default", "patch") or prefix == 1:
        return []
    config.drop_first_patch = True
    note = "the first patch of a picture is dropped"
    if prefix > 1:
        config.vision_feature_select_strategy = "full"
        note = f"{prefix - 1} of {prefix} class and register tokens are kept"
    config.check()
    return [f"{note}, as the code did that the model was trained with: it drops one token of every tower"]


def _projector_and_tower(
    projector: dict[str, torch.Tensor],
    tower_weights: dict[str, torch.Tensor],
    tower: VisionPart,
    config: MoellavaConfig,
    source: Source,
    report: WeightReport,
) -> dict[str, torch.Tensor]:
    """Returns the weights of both under our names; those of a tower that the checkpoint does not hold are its own."""
    projector_config = config.projector_config
    projector = legacy_projector_tensors({"type": projector_config.type, **projector_config.fields}, projector)
    projector = fit_projector(source.name, projector, config, projector_shapes(config))
    if not tower_weights:
        tower_weights = tower.tensors()
        report.added[f"{TOWER_PREFIX}*"] = f"from {config.parts['vision_tower']}"
    return with_part(with_part({}, PROJECTOR_PREFIX, projector), TOWER_PREFIX, tower_weights)


def _provenance(source: Source, vision_tower: str | None = None) -> dict[str, Any]:
    parts = with_provenance(None, "converted_from", source.name, source)
    if vision_tower is None:
        return parts
    tower = Source(vision_tower, source.hub_options)
    return with_provenance(parts, "vision_tower", vision_tower, tower)


def _has_tokenizer(source: Source) -> bool:
    return source.find("tokenizer_config.json") is not None


def _conversation_family(older: LegacyModel, tokenizer: Any) -> str:
    # OpenChat is a Mistral with a stop of its own.
    if older.family.name == "mistral" and "<|end_of_turn|>" in tokenizer.get_vocab():
        return "openchat"
    return older.family.name


def _template_of_tokenizer(older: LegacyModel, tokenizer: Any, family: str) -> str | None:
    """Returns the tokenizer's chat template where the model was trained on it, and notes which prompt is taken.

    A Mistral with a template (LLaVA-Med v1.5) was. MoE-LLaVA trained its others (OpenChat, Qwen, StableLM) on Vicuna's
    form, whatever their tokenizers bring.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own is None:
        return None
    if family == "mistral":
        older.notes.append("the prompt is that of the tokenizer's own chat template, not Vicuna's")
        return multimodal_chat_template(own, IMAGE_TOKEN)
    older.notes.append(
        "the tokenizer has a chat template of its own, which is left out: models of this kind were trained on Vicuna's "
        "form. If this one was not, set processor.chat_template"
    )
    return None


def _readable(generation_config: GenerationConfig | None) -> GenerationConfig | None:
    """Takes out what has no effect without sampling, such as Vicuna's temperature: transformers would not save it."""
    if generation_config is not None and not generation_config.do_sample:
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(generation_config, name, None)
    return generation_config


def _needs_space_after_image(tokenizer: Any) -> bool:
    """Whether the text behind a picture, which the older code tokenizes by itself, would lack the space before it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return getattr(getattr(backend, "pre_tokenizer", None), "prepend_scheme", None) == "first"


def _add_picture_marks(tokenizer: Any, older: LegacyModel, fields: Mapping[str, Any]) -> None:
    """Adds the tokens that the older code adds when it loads a model with marks around its pictures, in its order."""
    if not older.has_picture_marks:
        return
    if fields.get("mm_use_im_patch_token", True):
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    tokenizer.add_tokens(list(_PICTURE_MARKS), special_tokens=True)


def _read_tower(older: LegacyModel, source: Source, given: str | None) -> VisionPart:
    name = given or older.vision_tower
    if name is None:
        raise OlderCheckpointError(
            f"The config.json of {source} names no vision tower (mm_image_tower, mm_vision_tower). Give one as "
            "mm_vision_tower (--vision-tower), a folder or a Hub id."
        )
    try:
        return read_vision_tower(Source(name, source.hub_options))
    except (OSError, ValueError) as error:
        if given is not None:
            raise
        raise OlderCheckpointError(
            f"The config.json of {source} names the vision tower {name!r}, which cannot be had here "
            f"({str(error).partition(chr(10))[0]}). Give it as mm_vision_tower (--vision-tower), a folder or a Hub id, "
            "such as 'openai/clip-vit-large-patch14-336'."
        ) from error


def _check_tower(weights: Mapping[str, torch.Tensor], config: Any, source: Source, name: str | None) -> None:
    """Refuses a vision tower that is another one than that whose weights the checkpoint holds."""
    patches = weights.get("embeddings.patch_embedding.weight")
    if patches is None:
        return
    found, expected = (patches.shape[0], patches.shape[-1]), (config.hidden_size, config.patch_size)
    if found != expected:
        raise OlderCheckpointError(
            f"The files of {source} hold a vision tower {found[0]} wide with patches of {found[1]} pixels, but {name} "
            f"is {expected[0]} wide with patches of {expected[1]}. Give the tower that the model was trained with as "
            "mm_vision_tower (--vision-tower)."
        )


def _check_tower_of_llava_hf(converted: Converted, source: Source, given: str | None) -> None:
    if given is None:
        return
    held = part_weights(converted.tensors, TOWER_PREFIX)
    if not are_same_weights(held, read_vision_tower(Source(given, source.hub_options)).tensors()):
        raise OlderCheckpointError(_another_tower(given, f"that {source} holds"))


def _another_tower(given: str, expected: str) -> str:
    return (
        f"The vision tower {given} is not the one {expected}, with which the projector was trained. Leave "
        "mm_vision_tower (--vision-tower) out; or convert the checkpoint first (`moellava convert`), then load the "
        "result with another tower and a new projector."
    )


def _compare_towers(
    older: LegacyModel, source: Source, given: str, tower: VisionPart, held: Mapping[str, torch.Tensor]
) -> None:
    """Finds out, as far as can be, whether a tower that is given is the one that the projector was trained with.

    Raises:
        OlderCheckpointError: It is another one.
    """
    if held:
        if not are_same_weights(held, tower.tensors()):
            older.notes.append(
                f"its files hold the weights of a vision tower, which are taken; {given} has others, and no more than "
                "its config and its image processor are taken"
            )
        return
    named = older.vision_tower
    if named is None or last_part(named).lower() == last_part(given).lower():
        return  # what is named is most often a path on its trainer's machine, of which only the name says something
    try:
        # What is on this machine can be compared; a download of gigabytes for that would be too much.
        own = read_vision_tower(Source(named, {**source.hub_options, "local_files_only": True})).tensors()
    except (OSError, ValueError):
        older.notes.append(
            f"its config names the vision tower {named}, and {given} takes its place. The projector was trained with "
            "the former; with any other tower, answers about images are wrong"
        )
        return
    if not are_same_weights(own, tower.tensors()):
        raise OlderCheckpointError(_another_tower(given, f"that the config.json of {source} names ({named})"))


def _open_weights(source: Source, base: Source | None) -> dict[str, torch.Tensor]:
    if base is None:
        _check_shards(source)
        return source.tensors()
    is_adapter = source.find(ADAPTER_CONFIG) is not None
    adapter = next((name for name in ADAPTER_FILES if source.find(name) is not None), NON_LORA_FILE)
    if not is_adapter and source.find(adapter) is not None:
        raise OlderCheckpointError(
            f"{source} holds {adapter} of a LoRA adapter, but no {ADAPTER_CONFIG}, which tells what its weights are "
            "multiplied by. Add the one that was saved beside it."
        )
    tensors = base.tensors()
    for name in (NON_LORA_FILE, PROJECTOR_FILE) if is_adapter else (PROJECTOR_FILE,):
        path = source.find(name)
        if path is not None:
            trained = {_trained_name(key): tensor for key, tensor in read_tensors(path)}
            if any(_OF_PROJECTOR in key for key in trained):  # of the base's own nothing is to remain
                tensors = {key: tensor for key, tensor in tensors.items() if _OF_PROJECTOR not in key}
            return tensors | trained
    if is_adapter:
        if not any(_OF_PROJECTOR in key for key in tensors):
            raise FileNotFoundError(
                f"Neither {source} nor the base {base} holds a projector. Expected {NON_LORA_FILE}, which the older "
                "trainer saves beside an adapter."
            )
        return tensors
    raise OlderCheckpointError(
        f"A base is given, but {source} has neither {NON_LORA_FILE}, as it stands beside a LoRA adapter, nor "
        f"{PROJECTOR_FILE}. To load a whole checkpoint, leave the base out."
    )


def _check_needs_no_base(source: Source) -> None:
    for name, kind in ((ADAPTER_CONFIG, "a LoRA adapter"), (PROJECTOR_FILE, "a projector")):
        if source.find(name) is not None and _has_no_weights(source):
            raise OlderCheckpointError(
                f"{source} holds {kind} alone ({name}). Give the language model that it belongs to as model_base "
                "(--base)."
            )


def _has_no_weights(source: Source) -> bool:
    try:
        source.weight_files()
    except FileNotFoundError:
        return True
    return False


def _trained_name(name: str) -> str:
    """The name of a weight that a trainer has saved apart, without what PEFT puts in front."""
    if name.startswith(PEFT_PREFIX):
        return name.removeprefix(PEFT_PREFIX)
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.transformer.")) else name


def _check_shards(source: Source) -> None:
    """Refuses shards beside those that the index lists: they are of another checkpoint, or the index is."""
    if not source.is_local:
        return
    listed = {path.name for path in source.weight_files()}
    kinds = {(name.partition("-")[0].partition(".")[0], Path(name).suffix) for name in listed}
    for prefix, suffix in kinds:
        shard = re.compile(rf"{re.escape(prefix)}-\d+-of-\d+{re.escape(suffix)}")
        strange = sorted(name for name in os.listdir(source.name) if shard.fullmatch(name) and name not in listed)
        if strange:
            raise OlderCheckpointError(
                f"{source} holds {', '.join(strange)}, which its index does not list: files of two checkpoints are "
                "mixed. Remove what does not belong to it, or download it again."
            )


# What transformers' LLaVA calls its parts on disk, beside the names of its modules.
_LLAVA_HF_NAMES = (
    (re.compile(r"^language_model\.model\."), BODY_PREFIX),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), TOWER_PREFIX),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), PROJECTOR_PREFIX),
)


def _read_llava_hf(source: Source, changes: dict[str, Any]) -> Converted:
    """Reads a checkpoint of transformers' `LlavaForConditionalGeneration`, whose tree is ours."""
    llava = read_config(source, "llava")
    tokenizer, image_processor = read_tokenizer(source), load_image_processor(source)
    template = _own_template(source, tokenizer)
    prepare_tokenizer(tokenizer)
    projector = {
        "type": "mlp",
        "hidden_act": llava.projector_hidden_act,
        "bias": llava.multimodal_projector_bias,
    }
    fields = {
        "vision_feature_layer": llava.vision_feature_layer,
        "vision_feature_select_strategy": llava.vision_feature_select_strategy,
        "image_aspect_ratio": "pad" if getattr(image_processor, "do_pad", False) else "square",
        **changes,
    }
    config = MoellavaConfig(
        text_config=llava.text_config,
        vision_config=llava.vision_config,
        projector_config=projector,
        image_token_id=llava.image_token_id,
        parts=_provenance(source),
        **fields,
    )
    notes = _drop_one_token(config)
    _check_shards(source)
    tensors, report = {}, WeightReport()
    unused = tuple(f"{TOWER_PREFIX}{name}" for name in encoder_for(config).unused_weights)
    for name, tensor in source.tensors().items():
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            report.left_out[name] = "computed anew"
            continue
        for pattern, ours in _LLAVA_HF_NAMES:
            name = pattern.sub(ours, name)
        if name.startswith(unused):
            report.left_out[name] = "no part uses it"
            continue
        tensors[name] = tensor
    report.num_used = len(tensors)
    return Converted(
        config, tensors, tokenizer, image_processor, template, read_generation_config(source), report, notes
    )


def _own_template(source: Source, tokenizer: Any) -> str:
    """Returns the chat template of a processor of transformers, wherever its version keeps it."""
    template = source.find("chat_template.jinja")
    if template is not None:
        return multimodal_chat_template(template.read_text(encoding="utf-8"), IMAGE_TOKEN)
    older = source.read_json("chat_template.json") or {}
    return multimodal_chat_template(older.get("chat_template", tokenizer.chat_template), IMAGE_TOKEN)


def load_legacy(
    source: Source,
    base: Source | None = None,
    vision_tower: str | None = None,
    changes: Mapping[str, Any] | None = None,
    merge: bool = True,
    **options: Any,
) -> tuple[Any, Converted]:
    """Reads and builds an older checkpoint, with its processor as `model.processor`.

    Args:
        source, base, vision_tower, changes: As for `read_converted`.
        merge (`bool`): Whether a LoRA adapter is added to the weights; otherwise a `PeftModel` is returned.
        options: Those of `from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: As of `read_converted` and `read_adapter`; or the weights, the base or `merge` do
            not go with the checkpoint.
        ImportError: It is an adapter, and PEFT is not installed.
    """
    adapter = None if base is None or source.find(ADAPTER_CONFIG) is None else read_adapter(source)
    converted = read_converted(source, base, vision_tower, changes)
    if not merge and converted.weights.num_merged:
        raise OlderCheckpointError(
            f"The LoRA weights of {source} lie within the checkpoint and belong to its experts, which are stacked "
            "here: they are always merged. Leave merge=False out."
        )
    options["dtype"] = options.get("dtype") or dtype_of(converted.config.text_config, converted.tensors)
    try:
        model = build(converted.config, converted.tensors, strict=True, **options)
    except ValueError as error:
        if base is None:
            raise
        raise OlderCheckpointError(
            f"With the base {base}, {source} cannot be built: {error} The base has to be the model that it was trained "
            "on, of the sizes that its config.json says."
        ) from error
    if converted.generation_config is not None:
        model.generation_config = converted.generation_config
    model.processor = make_processor(model, converted.image_processor, converted.tokenizer)
    model.processor.chat_template = converted.chat_template
    model.processor.space_after_image = converted.space_after_image
    if adapter is not None:
        model = attach_adapter(model, adapter, merge)
    return model, converted


__all__ = ["Converted", "load_legacy", "read_converted"]
