# SPDX-License-Identifier: Apache-2.0
"""What the files of tokenizers and image processors may ask for, over all classes of the installed transformers.

Every class is asked to open the files of a folder of secrets, by every argument that it has. Linux itself says whether
any of them was opened, by Python, C or Rust.
"""

import contextlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from hostile_doors import Guard
from older import _write_tokenizer as write_older_tokenizer
from parts import VISION_TOWERS
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from moellava.checks.processor_files import load_image_processor, load_tokenizer


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "a", "b", "ab")


def classes_of(base: type) -> list[type]:
    """Every class of the library that files can name, dummies of what is not installed left out."""
    words = ("Tokenizer", "ImageProcessor", "Backend")
    found = (getattr(transformers, name) for name in dir(transformers) if any(word in name for word in words))
    classes = {each for each in found if isinstance(each, type) and issubclass(each, base)}
    return sorted(classes, key=lambda each: each.__name__)


TOKENIZERS = classes_of(PreTrainedTokenizerBase)
IMAGE_PROCESSORS = classes_of(ImageProcessingMixin)


def arguments_of(tokenizer_class: type) -> list[str]:
    """What its constructors take, and what it calls its files; special tokens, switches and numbers left out."""
    inits = [each.__init__ for each in tokenizer_class.__mro__ if "__init__" in each.__dict__]
    own = {
        name: each.default
        for init in inits
        for name, each in inspect.signature(init).parameters.items()
        if each.kind is each.POSITIONAL_OR_KEYWORD and name != "self"
    }
    own = {name for name, default in own.items() if not isinstance(default, bool | int | list | tuple)}
    own |= {*tokenizer_class.vocab_files_names, "tokenizer_file", "vocab_file", "merges_file"}
    return sorted(name for name in own if not name.endswith(("_token", "_tokens")))


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def secrets(parts, tmp_path_factory) -> Path:
    """Files that a tokenizer could read, outside of its folder."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "lines.txt").write_text("\n".join((*WORDS, "SECRET")))
    write_json(folder / "words.json", {word: index for index, word in enumerate((*WORDS, "SECRET"))})
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    shutil.copy(parts.language_model("llama") / "tokenizer.json", folder)
    older = tmp_path_factory.mktemp("older")
    write_older_tokenizer("llama", older, "slow")
    shutil.copy(older / "tokenizer.model", folder)
    return folder


@pytest.fixture
def folder(secrets, tmp_path) -> Path:
    """A folder with vocabularies for most classes, and no tokenizer.json, which would stand in for them."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "part" / "merges.txt").write_text("#version: 0.2\na b\n")
    write_json(tmp_path / "part" / "vocab.json", {word: index for index, word in enumerate(WORDS)})
    return tmp_path / "part"


@pytest.fixture(scope="module")
def watched(secrets) -> Guard:
    return Guard([str(secrets)])


@pytest.fixture
def guard(watched, folder) -> Guard:
    """Tells which secrets have been opened, by anything but the tests."""
    watched.opened()
    return watched


def add_models(tokenizer_class: type, folder: Path, secrets: Path) -> None:
    """Adds the files of sentencepiece that a class reads; transformers takes them before any vocab.txt."""
    for name in tokenizer_class.vocab_files_names.values():
        if name.endswith((".model", ".spm")):
            shutil.copy(secrets / "tokenizer.model", folder / name)


def load_and_save(folder: Path, out: Path) -> None:
    """Loads a tokenizer, which may refuse, and saves it."""
    with contextlib.suppress(Exception):
        load_tokenizer(folder, config=PreTrainedConfig()).save_pretrained(out)
    for path in out.rglob("*"):
        assert b"SECRET" not in path.read_bytes()


def opened_by(guard: Guard) -> list[str]:
    return [os.path.basename(path) for path in guard.opened()]


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS, ids=lambda each: each.__name__)
def test_no_tokenizer_opens_what_its_files_name(secrets, guard, folder, tmp_path, tokenizer_class):
    add_models(tokenizer_class, folder, secrets)
    opened_by(guard)
    names = arguments_of(tokenizer_class)
    for kind in ("lines.txt", "words.json"):
        path = str(secrets / kind)
        for name in names:
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class.__name__, name: path})
            load_and_save(folder, tmp_path / "out")
            assert opened_by(guard) == [], name
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": tokenizer_class.__name__, **dict.fromkeys(names, "../../secrets/lines.txt")},
    )
    load_and_save(folder, tmp_path / "out")
    assert opened_by(guard) == []


# The models of a tokenizer.json, each with a path in the place of its entries.
MODELS = (
    {"type": "BPE", "vocab": "@words.json", "merges": "@merges.txt"},
    {"type": "BPE", "vocab": "@lines.txt", "merges": []},
    {"type": "WordLevel", "unk_token": "[UNK]", "vocab": "@words.json"},
    {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
        "vocab": "@lines.txt",
    },
    {"type": "Unigram", "unk_id": 0, "vocab": "@lines.txt"},
    {"vocab": "@lines.txt", "merges": "@merges.txt"},
)  # fmt: skip


def write_tokenizer(folder: Path, secrets: Path, model: dict[str, Any], name: str = "tokenizer.json") -> Path:
    model = json.loads(json.dumps(model).replace("@", f"{secrets}/"))
    parts = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    content = {"version": "1.0", **dict.fromkeys(parts), "added_tokens": [], "model": model}
    return write_json(folder / name, content)


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS, ids=lambda each: each.__name__)
def test_no_tokenizer_opens_what_its_vocabulary_names(secrets, guard, folder, tmp_path, tokenizer_class):
    """The tokenizers library takes a text in the place of entries for the name of a file."""
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class.__name__})
    for name in ("added_tokens.json", "special_tokens_map.json", "vocab.json"):
        for kind in ("lines.txt", "words.json", "merges.txt"):
            path = write_json(folder / name, str(secrets / kind))
            load_and_save(folder, tmp_path / "out")
            assert opened_by(guard) == [], name
        path.unlink()
    for model in MODELS:
        write_tokenizer(folder, secrets, model)
        load_and_save(folder, tmp_path / "out")
        assert opened_by(guard) == [], model


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.4.0.0.json"])
@pytest.mark.parametrize("model", MODELS)
def test_paths_in_the_place_of_a_vocabulary_are_refused(secrets, guard, folder, model, name, trusted):
    fields = {"tokenizer_class": "BertTokenizer", "fast_tokenizer_files": ["tokenizer.4.0.0.json"]}
    write_json(folder / "tokenizer_config.json", fields)
    path = write_tokenizer(folder, secrets, model, name)
    with pytest.raises(ValueError, match=f"{path} has the text '{secrets}/.* of its model, by which a file outside"):
        load_tokenizer(folder, config=PreTrainedConfig(), trust_remote_code=trusted)
    assert opened_by(guard) == []


@pytest.mark.parametrize("tokenizer_class", ["BertTokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_what_the_tokenizers_library_cannot_read_says_so(folder, tokenizer_class):
    """It raises plain exceptions; of a file of a newer version too."""
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    write_tokenizer(folder, folder, {"type": "Newer", "vocab": {}, "merges": []})
    with pytest.raises(ValueError, match=f"tokenizer.json of {folder} cannot be read .*: upgrade that, or save or"):
        load_tokenizer(folder, config=PreTrainedConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab", "@lines.txt"),
        ("vocab", "../lines.txt"),
        ("vocab", "file://@lines.txt"),
        ("merges", "~/merges.txt"),
        ("gguf_file", "@tokenizer.json"),
        ("init_inputs", ["@lines.txt"]),
        ("cache_dir", "@"),
        ("sp_model_kwargs", {"model_file": "@tokenizer.model"}),
        ("mecab_kwargs", {"options": [{"mecab_option": "-r @lines.txt"}]}),
        ("fast_tokenizer_files", ["../tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["tokenizer.4.0.0.json.link"]),
        ("fast_tokenizer_files", 4),
    ],
)
@pytest.mark.parametrize("tokenizer_class", ["FunnelTokenizer", "LlamaTokenizerFast", "GPTSw3Tokenizer"])
def test_fields_that_no_saved_tokenizer_has_are_refused(secrets, guard, folder, tokenizer_class, field, value):
    value = json.loads(json.dumps(value).replace("@", f"{secrets}/"))
    path = write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, field: value})
    with pytest.raises(ValueError, match=f"{path} (has {field!r}|names)"):
        load_tokenizer(folder, config=PreTrainedConfig())
    assert opened_by(guard) == []


@pytest.mark.parametrize("field", ["vocab_file", "tokenizer_file", "vocab", "name_or_path", "is_local"])
def test_special_tokens_are_all_that_their_file_holds(secrets, folder, field):
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    path = write_json(folder / "special_tokens_map.json", {"pad_token": "[PAD]", field: str(secrets / "lines.txt")})
    with pytest.raises(ValueError, match=f"{path} has {field!r}; expected special tokens alone"):
        load_tokenizer(folder, config=PreTrainedConfig())
    write_json(path, {"pad_token": "[MASK]", "extra_special_tokens": ["a"], "image_token": "b"})
    assert load_tokenizer(folder, config=PreTrainedConfig()).pad_token == "[MASK]"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "vocab.txt", "chat_template.jinja", "x/a.jinja"])
def test_links_out_of_the_folder_are_no_part_of_a_tokenizer(secrets, folder, name):
    """A link is kept by git and tar; its text would be saved with the model."""
    (folder / "additional_chat_templates").mkdir()
    path = folder / name.replace("x/", "additional_chat_templates/")
    path.unlink(missing_ok=True)
    path.symlink_to(secrets / "words.json")
    with pytest.raises(ValueError, match=f"{path} is a link to {secrets}/words.json, outside of the folder"):
        load_tokenizer(folder, config=PreTrainedConfig())
    with pytest.raises(ValueError, match="outside of the folder"):
        load_image_processor(folder)


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(folder, tmp_path):
    blobs = tmp_path / "models--me--bert" / "blobs"
    blobs.mkdir(parents=True)
    (folder / "vocab.txt").rename(blobs / "0123")
    (folder / "vocab.txt").symlink_to(blobs / "0123")
    write_json(folder / "settings", {"tokenizer_class": "BertTokenizer"})
    (folder / "tokenizer_config.json").symlink_to("settings")
    (tmp_path / "link").symlink_to(folder)
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    tokenizer = load_tokenizer(tmp_path / "link", config=PreTrainedConfig())
    assert tokenizer.convert_tokens_to_ids("ab") == WORDS.index("ab")


def test_files_of_the_hub_are_checked_too(secrets, guard, folder, tmp_path):
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--evil--part"
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "FunnelTokenizer", "vocab": f"{secrets}/lines.txt"}
    )
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "OneFormerImageProcessor"})
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    with pytest.raises(ValueError, match="has 'vocab'"):
        load_tokenizer("evil/part", config=PreTrainedConfig(), **options)
    with pytest.raises(ValueError, match="which is no image processor"):
        load_image_processor("evil/part", **options)
    assert opened_by(guard) == []


# ---------------------------------------------------------------------------------------------------------------------
# Which classes are built
# ---------------------------------------------------------------------------------------------------------------------

OTHER_CLASSES = (
    "BertJapaneseTokenizer", "M2M100Tokenizer", "MarianTokenizer", "RagTokenizer", "VitsTokenizer", "AutoModel",
    "AutoProcessor", "GPT2LMHeadModel", "GenerationConfig", "OneFormerImageProcessor", "RagRetriever",
    "Wav2Vec2PhonemeCTCTokenizer", "pipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CLASSES)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_other_classes_than_tokenizers_of_language_models_are_not_built(folder, file, name):
    write_json(folder / "config.json", {"model_type": "llama"})
    fields = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    write_json(folder / file, fields | {"tokenizer_class": name})
    with pytest.raises(ValueError, match=f"ask for {name!r}, which is no tokenizer of a language model"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match=f"{name!r}, which is no tokenizer"):
        load_tokenizer(folder, config=PreTrainedConfig(tokenizer_class=name))


def test_a_models_type_does_not_choose_another_class_either(folder):
    write_json(folder / "config.json", {"model_type": "bert-japanese"})
    with pytest.raises(ValueError, match="'BertJapaneseTokenizer', which is no tokenizer of a language model"):
        load_tokenizer(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": ["LlamaTokenizer"]})
    with pytest.raises(ValueError, match="tokenizer_class of .* expected the name of a class"):
        load_tokenizer(folder)


def test_every_language_model_has_a_tokenizer_that_is_built(folder):
    """Those that read a text before they write another are no parts of a model here."""
    refused = set()
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if TOKENIZER_MAPPING_NAMES.get(model_type) is None:
            continue
        write_json(folder / "config.json", {"model_type": model_type})
        try:
            load_tokenizer(folder)
        except Exception as error:
            if "is no tokenizer of a language model" in str(error):
                refused.add(model_type)
    assert refused == {"blenderbot-small", "marian", "plbart", "prophetnet"}


def test_classes_that_the_user_registers_are_built(folder):
    class OwnTokenizer(transformers.BertTokenizer):
        pass

    class OwnConfig(PreTrainedConfig):
        model_type = "own-part-files"

    transformers.AutoConfig.register("own-part-files", OwnConfig, exist_ok=True)
    AutoTokenizer.register(OwnConfig, OwnTokenizer, exist_ok=True)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer"})
    assert type(load_tokenizer(folder, config=OwnConfig())) is OwnTokenizer


# ---------------------------------------------------------------------------------------------------------------------
# What people have goes on loading
# ---------------------------------------------------------------------------------------------------------------------

TEXT = "A scan of the lung: what is shown?"
# As in files of published models: where their authors had theirs.
STALE = {
    "name_or_path": "/fsx/home/author/model",
    "special_tokens_map_file": "/root/.cache/huggingface/hub/models--a--b/special_tokens_map.json",
    "tokenizer_file": "/home/author/.cache/huggingface/tokenizer.json",
    "vocab_file": "/home/author/vocab.txt",
    "merges_file": "/home/author/merges.txt",
    "full_tokenizer_file": None,
    "sp_model_kwargs": {"enable_sampling": True, "alpha": 0.1, "nbest_size": 64},
    "init_inputs": [],
}


def same_tokenizer(folder: Path, **options: Any) -> None:
    ours, theirs = load_tokenizer(folder, **options), AutoTokenizer.from_pretrained(folder, **options)
    assert type(ours) is type(theirs)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.chat_template == theirs.chat_template


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "phi", "qwen2", "stablelm", "gpt_neox", "gemma", "cohere", "opt"]
)
def test_tokenizers_of_language_models_are_read_as_before(parts, tmp_path, family):
    shutil.copytree(parts.language_model(family), tmp_path / "part")
    same_tokenizer(tmp_path / "part")
    edited = json.loads((tmp_path / "part" / "tokenizer_config.json").read_text())
    write_json(tmp_path / "part" / "tokenizer_config.json", edited | STALE)
    same_tokenizer(tmp_path / "part")


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "PreTrainedTokenizer", "LlamaTokenizerFast", "LLaMATokenizer", None]
)
def test_a_tokenizer_is_read_by_whatever_name_it_was_saved(parts, tmp_path, name):
    shutil.copytree(parts.language_model("llama"), tmp_path / "part")
    edited = json.loads((tmp_path / "part" / "tokenizer_config.json").read_text())
    write_json(tmp_path / "part" / "tokenizer_config.json", edited | {"tokenizer_class": name})
    same_tokenizer(tmp_path / "part")
    same_tokenizer(tmp_path / "part", config=PreTrainedConfig())


@pytest.mark.parametrize("family", ["llama", "phi", "stablelm"])
def test_files_of_slow_tokenizers_are_read_as_before(tmp_path, family):
    """Vicuna's tokenizer.model, and vocab.json with merges.txt."""
    folder, config = tmp_path / "older", PreTrainedConfig()
    folder.mkdir()
    write_older_tokenizer(family, folder, "slow")
    same_tokenizer(folder, config=config)
    shutil.copytree(folder, tmp_path / "stale")
    edited = json.loads((folder / "tokenizer_config.json").read_text())
    stale = {key: value for key, value in STALE.items() if key != "sp_model_kwargs"}
    write_json(tmp_path / "stale" / "tokenizer_config.json", edited | stale)
    assert (
        load_tokenizer(tmp_path / "stale", config=config)(TEXT)["input_ids"]
        == load_tokenizer(folder, config=config)(TEXT)["input_ids"]
    )


def test_a_published_language_models_tokenizer_is_read_as_before(smollm2):
    same_tokenizer(smollm2)


@pytest.mark.parametrize("tokenizer_class", TOKENIZERS, ids=lambda each: each.__name__)
def test_what_a_tokenizer_saves_is_read_again(secrets, folder, tmp_path, tokenizer_class):
    """Every class that is built, as it writes itself; and named as older files name it."""
    add_models(tokenizer_class, folder, secrets)
    config = PreTrainedConfig()
    try:
        tokenizer = tokenizer_class.from_pretrained(folder)
        tokenizer.save_pretrained(tmp_path / "saved")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", config=config)
    except Exception:  # whatever it is, the library itself cannot do it
        pytest.skip("cannot be made of the files of this test")
    try:
        ours = load_tokenizer(tmp_path / "saved", config=config)
    except ValueError as error:
        assert "is no tokenizer of a language model" in str(error)
        assert not isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
        return
    assert type(ours) is type(theirs) and ours.get_vocab() == theirs.get_vocab()


# ---------------------------------------------------------------------------------------------------------------------
# Image processors
# ---------------------------------------------------------------------------------------------------------------------

OPENS = {"repo_path": "@", "class_info_file": "words.json", "font_path": "@lines.txt", "tesseract_config": "-l @"}


def write_image_processor(folder: Path, place: str, fields: dict[str, Any]) -> None:
    if place == "processor_config.json":
        write_json(folder / place, {"image_processor": fields, "num_image_tokens": 4})
    else:
        write_json(folder / place, fields)


@pytest.mark.parametrize("name", [each.__name__ for each in IMAGE_PROCESSORS])
def test_no_image_processor_opens_what_its_files_name(secrets, guard, tmp_path, name):
    fields = json.loads(json.dumps({"image_processor_type": name, **OPENS}).replace("@", f"{secrets}/"))
    write_image_processor(tmp_path, "preprocessor_config.json", fields)
    with contextlib.suppress(Exception):
        load_image_processor(tmp_path)
    assert opened_by(guard) == []


@pytest.mark.parametrize("place", ["processor_config.json", "preprocessor_config.json", "config.json"])
@pytest.mark.parametrize(
    "name",
    [
        "OneFormerImageProcessor", "OneFormerImageProcessorFast", "OneFormerImageProcessorPil",
        "OneFormerFeatureExtractor", "LayoutLMv2ImageProcessor", "Pix2StructImageProcessor", "AutoModel",
        "oneformerimageprocessor", "CLIPModel", "evil.Evil",
    ],
)  # fmt: skip
def test_image_processors_that_no_tower_uses_are_not_built(secrets, guard, tmp_path, place, name):
    fields = json.loads(json.dumps({"image_processor_type": name, **OPENS}).replace("@", f"{secrets}/"))
    if place == "config.json":
        write_json(tmp_path / "preprocessor_config.json", {})
        fields |= {"model_type": "clip_vision_model"}
    for changed in (fields, fields | {"image_processor_type": None, "feature_extractor_type": name}):
        write_image_processor(tmp_path, place, changed)
        with pytest.raises(ValueError, match=f"ask for {name!r}, which is no image processor of a vision tower"):
            load_image_processor(tmp_path)
    assert opened_by(guard) == []


def test_a_towers_type_does_not_choose_another_image_processor_either(secrets, tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "oneformer"})
    write_json(tmp_path / "preprocessor_config.json", {"repo_path": str(secrets), "class_info_file": "words.json"})
    with pytest.raises(ValueError, match="ask for 'OneFormerImageProcessor"):
        load_image_processor(tmp_path)


@pytest.mark.parametrize("ending", ["", "Fast", "Pil"])
@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Bit", "ViT", "ConvNext", "Beit", "DeiT", "Blip"])
def test_image_processors_of_towers_are_built_by_all_their_names(tmp_path, name, ending):
    for place in ("processor_config.json", "preprocessor_config.json"):
        folder = tmp_path / place
        folder.mkdir()
        write_image_processor(folder, place, {"image_processor_type": f"{name}ImageProcessor{ending}"})
        assert type(load_image_processor(folder)) is type(AutoImageProcessor.from_pretrained(folder))
    folder = tmp_path / "old"
    folder.mkdir()
    write_image_processor(folder, "preprocessor_config.json", {"feature_extractor_type": f"{name}FeatureExtractor"})
    assert type(load_image_processor(folder)) is type(AutoImageProcessor.from_pretrained(folder))


@pytest.mark.parametrize("tower", VISION_TOWERS)
def test_image_processors_of_real_towers_are_built(parts, tower):
    folder = parts.vision_tower(tower)
    ours, theirs = load_image_processor(folder), AutoImageProcessor.from_pretrained(folder)
    assert type(ours) is type(theirs) and ours.to_dict() == theirs.to_dict()


def test_the_image_processor_of_a_model_that_also_hears_is_built(tmp_path):
    fields = {"feature_extractor_type": "WhisperFeatureExtractor", "image_processor_type": "Qwen2VLImageProcessor"}
    write_image_processor(tmp_path, "preprocessor_config.json", fields)
    assert "Qwen2VLImageProcessor" in type(load_image_processor(tmp_path)).__name__
