# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and image processors whose files come from somebody else.

transformers builds the class that a file names and hands it every field, and some classes open what these name: a
vocabulary at any path, data of another repository. Here only classes that models need are built, and nothing outside of
the folder or repository is opened.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import cached_file, resolve_revision


# Tokenizers of language models that are not built on the `tokenizers` library.
_OTHER_TOKENIZERS = (
    "BertGenerationTokenizer", "BioGptTokenizer", "ByT5Tokenizer", "CTRLTokenizer", "CpmAntTokenizer",
    "GPTNeoXJapaneseTokenizer", "GPTSw3Tokenizer", "MistralCommonBackend", "PythonBackend", "RoCBertTokenizer",
    "SentencePieceBackend", "XLMTokenizer",
)  # fmt: skip
# Image processors of vision towers; each of them also with "Fast" or "Pil" behind its name.
_IMAGE_PROCESSORS = tuple(
    f"{name}ImageProcessor"
    for name in (
        "Aria", "Beit", "Bit", "Blip", "BridgeTower", "CHMv2", "CLIP", "Chameleon", "ChineseCLIP", "Cohere2Vision",
        "ConvNext", "DINOv3ViT", "DPT", "DeepseekVL", "DeepseekVLHybrid", "DeiT", "DepthPro", "Donut", "EfficientNet",
        "Flava", "GLPN", "Gemma3", "Gemma4", "GotOcr2", "Idefics2", "Idefics3", "Janus", "Levit", "Lfm2Vl", "Llama4",
        "Llava", "LlavaNext", "LlavaOnevision", "Mllama", "MobileNetV1", "MobileNetV2", "MobileViT", "Nougat", "Ovis2",
        "OwlViT", "Owlv2", "PerceptionLM", "Phi4Multimodal", "Pixtral", "PoolFormer", "Pvt", "Qwen2VL", "Sam", "Sam2",
        "Sam3", "Segformer", "Siglip", "Siglip2", "SmolVLM", "Swin2SR", "TextNet", "TimmWrapper", "Tipsv2", "ViT",
        "VideoMAE", "Vilt", "VitPose", "Yolos",
    )
)  # fmt: skip
# By these transformers would open files or look for them. Some tokenizers save what a vocabulary holds, none a path.
_NEVER_SAVED = ("cache_dir", "gguf_file", "init_inputs")
_NEVER_PATHS = ("merges", "vocab")
# The endings of files whose text may end up in what is saved.
_TEXTS = (".bpe", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class RefusedFileError(ValueError):
    """A file asks for what it may not: a class that models do not need, or a file outside of its folder."""


def load_tokenizer(name: str | os.PathLike, config: PreTrainedConfig | None = None, **options: Any) -> Any:
    """Loads a tokenizer; arguments as for `AutoTokenizer.from_pretrained`.

    Raises:
        RefusedFileError: Its files ask for a class that is no tokenizer of a language model, without
            `trust_remote_code`, or name a file outside of the folder or repository.
        ValueError: A file is damaged.
    """
    options = _at_one_revision(name, options)
    check_links(name, options.get("subfolder"))
    path, fields = _read(name, "tokenizer_config.json", options)
    versions = fields.get("fast_tokenizer_files") or []
    versions = versions if isinstance(versions, list) else [versions]
    for file in versions:
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".json"):
            raise RefusedFileError(
                f"{path} names {file!r}; expected the plain name of a JSON file beside it. Nothing outside the folder "
                "is read."
            )
    for key, value in fields.items():
        is_path = isinstance(value, str) and key in _NEVER_PATHS
        if is_path or (value and key in _NEVER_SAVED) or (key.endswith("_kwargs") and _has_text(value)):
            raise RefusedFileError(
                f"{path} has {key!r}, {value!r}, by which files outside of the folder would be opened. Take the field "
                "out; a tokenizer is read from the files beside it."
            )
    limit = fields.get("model_max_length")
    if limit is not None and not (type(limit) in (int, float) and limit >= 1):  # used as it is, when texts are long
        raise ValueError(f"{path} has model_max_length {limit!r}; expected a number of tokens, or take the field out.")
    path, special_tokens = _read(name, "special_tokens_map.json", options)
    for key in special_tokens:
        # transformers takes any field of this file before what it has found in the folder.
        if not key.endswith(("_token", "_tokens")):
            raise RefusedFileError(f"{path} has {key!r}; expected special tokens alone, such as 'bos_token'.")
    for file in ("tokenizer.json", *versions):
        path, saved = _read(name, file, options)
        model = saved.get("model")
        for key in _NEVER_PATHS if isinstance(model, dict) else ():
            # transformers builds some classes of these two, and the tokenizers library reads a text as a file's name.
            if isinstance(model.get(key), str):
                raise RefusedFileError(
                    f"{path} has the text {model[key]!r} as {key!r} of its model, by which a file outside of the "
                    "folder would be opened; expected the entries themselves. Save or download it again."
                )
    if not options.get("trust_remote_code"):
        if config is None:
            _, model = _read(name, "config.json", options)
        else:
            model = {key: getattr(config, key, None) for key in ("model_type", "tokenizer_class")}
        registered = TOKENIZER_MAPPING_NAMES.get(str(model.get("model_type")))
        _check_tokenizer_classes(name, (fields.get("tokenizer_class"), model.get("tokenizer_class"), registered))
    # Old files tell where their author's vocabulary was. The one in the folder is taken.
    elsewhere = {key: None for key, value in fields.items() if key.endswith(("_file", "_spm")) and value is not None}
    try:
        return AutoTokenizer.from_pretrained(name, config=config, **(elsewhere | options))
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library has no errors of its own
            raise
        raise ValueError(
            f"The tokenizer.json of {name} cannot be read ({error}). It is damaged, or of a newer tokenizers library "
            "than the one installed: upgrade that, or save or download the file again."
        ) from error


def load_image_processor(name: str | os.PathLike, **options: Any) -> Any:
    """Loads an image processor; arguments as for `AutoImageProcessor.from_pretrained`.

    Raises:
        RefusedFileError: Its files ask for a class that is no image processor of a vision tower, without
            `trust_remote_code`.
    """
    options = _at_one_revision(name, options)
    check_links(name, options.get("subfolder"))
    if not options.get("trust_remote_code"):
        _check_image_processor_class(name, options)
    return AutoImageProcessor.from_pretrained(name, **options)


def read_processor_dict(name: str | os.PathLike, **options: Any) -> Any:
    """Reads what the files say of a processor; arguments as for `ProcessorMixin.get_processor_dict`.

    Raises:
        ValueError: They ask for an audio tokenizer, are links to elsewhere, or are nested too deeply to be read.
    """
    check_links(name, options.get("subfolder"))
    try:
        return _ProcessorFiles.get_processor_dict(name, **options)
    except RecursionError as error:
        raise ValueError(
            f"A file of the processor of {name} is nested too deeply to be read. Save or download it again."
        ) from error


class _ProcessorFiles(ProcessorMixin):
    """Reads the files of a processor. While it does so, transformers would load an audio tokenizer, by a class that
    they name and from a folder or repository that they name: nothing is opened because of what a file says."""

    @staticmethod
    def get_possibly_dynamic_module(module_name: str):
        raise ValueError(
            f"A file of the processor asks for an audio tokenizer, {module_name!r}, from elsewhere. A MoELLaVA model "
            "has none: take 'audio_tokenizer' out of processor_config.json, and audio_tokenizer_config.json away."
        )


def check_links(folder: str | os.PathLike, subfolder: str | None = None) -> None:
    """Checks that the texts of a processor lie in its folder; a link may lead into the Hub's cache.

    Raises:
        RefusedFileError: One is a link to a file elsewhere, whose text would be saved and pushed with the model.
    """
    home = Path(folder).resolve()
    place = Path(folder, subfolder or "")
    for path in sorted((*place.glob("*"), *place.glob("additional_chat_templates/*"))):
        if not path.name.endswith(_TEXTS) or path.name.endswith(".index.json"):
            continue
        target = path.resolve()
        is_cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not target.is_relative_to(home) and not is_cached:
            raise RefusedFileError(
                f"{path} is a link to {target}, outside of the folder, and would be saved and pushed as part of the "
                "model. Put the file itself in its place, if it belongs to the model."
            )


def _at_one_revision(name: str | os.PathLike, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with the revision's commit, so that what is loaded is what was checked."""
    asked = {key: options[key] for key in ("token", "local_files_only", "cache_dir") if key in options}
    return {**options, "revision": resolve_revision(name, options.get("revision"), **asked)}


def _read(name: str | os.PathLike, filename: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns where a JSON file lies and what it holds; nothing where there is none."""
    hub_options = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    path = cached_file(
        name,
        filename,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_options,
    )
    if path is None:
        return filename, {}
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Save or download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}; expected an object. Save or download it again.")
    return path, fields


def _has_text(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def _check_tokenizer_classes(source: str | os.PathLike, names: Iterable[Any]) -> None:
    for name in filter(None, names):
        if not isinstance(name, str):
            raise RefusedFileError(f"tokenizer_class of {source} is {name!r}; expected the name of a class.")
        found = tokenizer_class_from_name(name)
        # Of a name that it does not know transformers makes a `TokenizersBackend`; of what is not installed, an error.
        if found is None or getattr(found, "is_dummy", False):
            continue
        is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
        is_known = is_tokenizer and (
            issubclass(found, TokenizersBackend)
            or found.__name__ in _OTHER_TOKENIZERS
            or not found.__module__.startswith("transformers.")  # registered by the user
        )
        if not is_known:
            raise RefusedFileError(
                f"The files of {source} ask for {name!r}, which is no tokenizer of a language model. Expected one "
                "such as 'LlamaTokenizer', 'Qwen2Tokenizer' or 'PreTrainedTokenizerFast' as tokenizer_class."
            )


def _check_image_processor_class(source: str | os.PathLike, options: Mapping[str, Any]) -> None:
    _, processor = _read(source, "processor_config.json", options)
    _, model = _read(source, "config.json", options)
    fields = processor.get("image_processor")
    if not isinstance(fields, dict):
        _, fields = _read(source, "preprocessor_config.json", options)
    named = [each.get("image_processor_type") or each.get("feature_extractor_type") for each in (fields, model)]
    named = [name for name in named if name]
    if not named:
        named = [name for name in IMAGE_PROCESSOR_MAPPING_NAMES.get(str(model.get("model_type")), {}).values() if name]
    by_the_user = [each for classes in IMAGE_PROCESSOR_MAPPING._extra_content.values() for each in classes.values()]
    registered = [each.__name__ for each in by_the_user if each is not None]
    for name in named:
        base = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        if base not in _IMAGE_PROCESSORS and name not in registered:
            raise RefusedFileError(
                f"The files of {source} ask for {name!r}, which is no image processor of a vision tower. Expected one "
                "such as 'CLIPImageProcessor', 'SiglipImageProcessor' or 'ViTImageProcessor' as image_processor_type."
            )


__all__ = ["RefusedFileError", "check_links", "load_image_processor", "load_tokenizer", "read_processor_dict"]
