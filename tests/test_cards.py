# SPDX-License-Identifier: Apache-2.0
"""Model cards: what they say, that every block of code in them runs, and that a user's own README stays what it is."""

import importlib.util
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import test_extending
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from older import write_older, write_tower
from parts import picture, run_python

from moellava import load_pretrained_model
from moellava.hub_cards import render_card, write_card
from moellava.hub_cards.cards import MARKER
from moellava.hub_cards.licences import combined_license
from moellava.parts.parts_moellava import PROJECTORS
from moellava.reading.provenance import with_training


NAME = "me/my-model"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "second_half"}
NEEDS_TRAINING = "The projector needs training"
RESULTS = [
    {
        "dataset": "VQA-RAD",
        "dataset_id": "flaviagiammarino/vqa-rad",
        "split": "test",
        "metric": "accuracy",
        "value": 0.5,
        "low": np.float64(0.25),
        "high": 0.75,
        "n": 12,
    },
    {"dataset": "mine", "metric": "f1", "value": np.float32(0.25)},
]


class Shelf:
    """Checkpoints of every kind, each made once; tests that change one work on a copy."""

    def __init__(self, root: Path, parts):
        self.root, self.parts = root, parts

    def folder(self, kind: str) -> Path:
        """The checkpoint `me/my-model` in a folder of its own, with pictures beside `me`."""
        place = self.root / kind
        if not place.exists():
            getattr(self, kind)().save_pretrained(place / NAME)
            picture(0).save(place / "picture.png")
            picture(1).save(place / "other.png")
        return place / NAME

    def copy(self, kind: str, to: Path) -> Path:
        return Path(shutil.copytree(self.folder(kind), to))

    def assemble(self, tower: Path | None = None, **options):
        # Widths of 64 and 128: those of published models are multiples of 64 too, which 4 bits ask for.
        language_model = self.parts.language_model("llama", overrides={"intermediate_size": 128})
        tower = tower or self.parts.vision_tower("clip")
        return load_pretrained_model(language_model, mm_vision_tower=tower, device="cpu", **options).model

    def dense(self):
        return self.assemble()

    def sparse(self):
        return self.assemble(moe_config=MOE)

    def quantised(self):
        return self.assemble(load_4bit=True)

    def medical(self):
        return self.assemble(self.parts.biomedclip(text_source=self.parts.biomedbert()), projector_type="qformer")

    def converted(self):
        tower = write_tower(self.root / "tower", "clip")
        older = write_older(self.root / "Med-MoE", "phi", tower_folder=tower, med_moe=True)
        return load_pretrained_model(older.folder, device="cpu").model

    def own(self):
        file = self.root / "gated_projector_of_cards.py"
        file.write_text(test_extending.GATED.replace('"gated"', '"gated_of_cards"'), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return self.assemble(projector_type="gated_of_cards")


@pytest.fixture(scope="module")
def shelf(parts, tmp_path_factory):
    """The checkpoints; the projector of one's own that they need is known to these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        PROJECTORS.names()  # the built-in ones are there
        patch.setattr(PROJECTORS, "_classes", dict(PROJECTORS._classes))
        yield Shelf(tmp_path_factory.mktemp("shelf"), parts)


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def blocks_of(card: ModelCard) -> dict[str, list[str]]:
    """The blocks of code by their language; there are no others than those that the tests know."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} == {"python", "bibtex"}
    assert card.text.count("```") == 2 * len(found)
    return {kind: [text for language, text in found if language == kind] for kind in ("python", "bibtex")}


def keys_cited(card: ModelCard) -> set[str]:
    (bibliography,) = blocks_of(card)["bibtex"]
    assert bibliography.count("{") == bibliography.count("}")
    return set(re.findall(r"^@\w+\{(\w+),$", bibliography, flags=re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------------------
# What cards say
# ---------------------------------------------------------------------------------------------------------------------

KINDS = {
    "dense": ([NEEDS_TRAINING, "initialised anew", "float32"], ["## Experts", "medical"], {"radford2021clip"}),
    "sparse": (
        ["## Experts", "| sparse layers | 2, 3 (of 4", "of which a token passes through", "copies of its dense MLP"],
        ["medical"],
        {"radford2021clip", "lin2024moellava", "komatsuzaki2023upcycling"},
    ),
    "quantised": (["4 bits (bitsandbytes, ", "stored in 4 bits"], ["load_in_4bit"], {"dettmers2023qlora"}),
    "medical": (["Not a medical device", "no medical device"], [], {"zhang2023biomedclip", "li2023blip2"}),
    "converted": (
        ["Converted by MoELLaVA from a local folder, `Med-MoE`", "Not a medical device", "| yes |"],
        [NEEDS_TRAINING, "initialised anew", "copies of its dense MLP"],
        {"jiang2024medmoe", "lin2024moellava"},
    ),
    "own": (["that of the projector `gated_of_cards` is its author's"], [], {"radford2021clip"}),
}  # fmt: skip
TAGS = {
    "sparse": {"moe"},
    "quantised": {"bitsandbytes", "4-bit"},
    "medical": {"medical"},
    "converted": {"moe", "medical"},
}
# Run after the blocks of the dense card: without the package a save writes no card, and keeps one that is there.
SAVED_WITHOUT_THE_PACKAGE = """
model = AutoModelForImageTextToText.from_pretrained("me/my-model", trust_remote_code=True)
model.save_pretrained("copy")
model.save_pretrained("me/my-model")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_of_every_card_runs_without_the_package(shelf, kind, tmp_path):
    folder = shelf.copy(kind, tmp_path / NAME)
    for name in ("picture.png", "other.png"):
        shutil.copy(shelf.folder(kind).parent.parent / name, tmp_path)
    write_card(folder, repo_id=NAME)
    blocks = blocks_of(card_of(folder))["python"]
    assert len(blocks) == 4
    # As many tokens as it takes to see that the code runs.
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", "\n".join(blocks))
    code += SAVED_WITHOUT_THE_PACKAGE if kind == "dense" else ""
    before = (folder / "README.md").read_bytes()
    printed = run_python(code, cwd=tmp_path).splitlines()
    assert len(printed) >= (5 if kind == "quantised" else 4)
    if kind == "quantised":
        packed, whole = (float(line.removesuffix(" MiB")) for line in printed[-2:])
        assert packed < whole
    if kind == "dense":
        assert (folder / "README.md").read_bytes() == before
        assert not (tmp_path / "copy" / "README.md").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_card_says(shelf, kind, tmp_path):
    folder = shelf.folder(kind)
    card = card_of(folder)
    said, unsaid, cited = KINDS[kind]
    for text in said:
        assert text in card.text
    for text in unsaid:
        assert text not in card.text
    assert cited | {"liu2023llava"} <= keys_cited(card)
    assert ("jiang2024medmoe" in keys_cited(card)) is (kind == "converted")
    metadata = metadata_load(folder / "README.md")
    assert metadata == card.data.to_dict() == yaml.safe_load(card.data.to_yaml())
    assert set(metadata.pop("tags")) == {"moellava", "vision-language", "custom_code"} | TAGS.get(kind, set())
    # Made from folders: no Hub id, and no licence that is known. Nothing of the paths gets into the card.
    assert metadata == {"library_name": "transformers", "license": "unknown", "pipeline_tag": "image-text-to-text"}
    assert str(shelf.root.parent) not in str(card)
    assert "| unknown |" in card.text
    config = json.loads((folder / "config.json").read_text())
    assert f"| tokens per picture | {config['image_seq_length']} |" in card.text
    assert "\n# my-model\n" in card.text and 'model="my-model"' in card.text
    assert MARKER in card.text


def test_training_is_told_of(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("untrained_parts") == ["multi_modal_projector"]  # as earlier versions saved it
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder)
    assert NEEDS_TRAINING in card_of(folder).text
    (folder / "training_args.bin").write_bytes(b"")
    write_card(folder)
    assert "- Trained with transformers' `Trainer`.\n" in card_of(folder).text
    (folder / "trainer_state.json").write_text('{"global_step": 1200, "epoch": 1.5}')
    write_card(folder)
    card = card_of(folder)
    assert "- Trained with transformers' `Trainer`: 1,200 steps, 1.5 epochs.\n" in card.text
    assert NEEDS_TRAINING not in card.text and "initialised anew" in card.text
    config = json.loads((folder / "config.json").read_text())
    config["parts"] = with_training(config["parts"], steps=7, data=["me/pictures"])
    (folder / "config.json").write_text(json.dumps(config))
    write_card(folder)
    assert "`Trainer`: 7 steps, on [me/pictures](https://huggingface.co/" in card_of(folder).text


def test_a_model_that_cannot_answer_has_no_code(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    (folder / "processor_config.json").unlink()
    text = render_card(folder).text
    assert "holds no processor" in text and "```python" not in text
    load_pretrained_model(shelf.folder("dense"), device="cpu").model.model.save_pretrained(tmp_path / "body")
    text = card_of(tmp_path / "body").text
    assert "without the head" in text and "```python" not in text


def test_text_of_the_config_is_text_in_the_card(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["parts"] = {"language_model": "no/such/[x](y)|<b>`\n# heading", "vision_tower": "..//", "licenses": {}}
    (folder / "config.json").write_text(json.dumps(config))
    text = render_card(folder, repo_id='me/"""\n# heading').text
    assert "<b>" not in text and not re.search(r"^# heading", text, flags=re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the Hub, and their licences
# ---------------------------------------------------------------------------------------------------------------------


def put_in_cache(cache: Path, name: str, folder: Path, readme: str | None) -> None:
    """Lays a repository out as the Hub's client keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = Path(shutil.copytree(folder, repository / "snapshots" / ("0" * 40)))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    if readme is not None:
        (snapshot / "README.md").write_text(readme, encoding="utf-8")


def test_parts_of_the_hub_are_linked_and_their_licences_passed_on(parts, tmp_path):
    cache = tmp_path / "cache"
    terms = "---\nlicense: other\nlicense_name: tiny-llama\nlicense_link: LICENSE\n---\n# Tiny\n"
    put_in_cache(cache, "acme/tiny", parts.language_model("llama"), terms)
    put_in_cache(cache, "acme/tower", parts.vision_tower("clip"), "---\nlicense: mit\n---\n")
    put_in_cache(cache, "acme/silent", parts.vision_tower("siglip"), None)
    model = load_pretrained_model("acme/tiny", mm_vision_tower="acme/tower", cache_dir=cache, device="cpu").model
    model.save_pretrained(tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert card.data.base_model == ["acme/tiny", "acme/tower"]
    assert (card.data.license, card.data.license_name) == ("other", "mit-and-tiny-llama")
    assert card.data.license_link == "https://huggingface.co/acme/tiny/blob/main/LICENSE"
    for origin, licence in (
        ("[acme/tiny](https://huggingface.co/acme/tiny)", f"[tiny-llama]({card.data.license_link})"),
        ("[acme/tower](https://huggingface.co/acme/tower)", "mit"),
    ):
        assert f"| {origin} | {licence} |" in card.text

    # Another tower takes its licence with it; the new one's is not known, and the restrictive one still is.
    other = load_pretrained_model(
        tmp_path / "model", mm_vision_tower="acme/silent", cache_dir=cache, device="cpu", projector_type="linear"
    ).model
    assert other.config.parts["licenses"].keys() == {"language_model"}
    other.save_pretrained(tmp_path / "other")
    card = card_of(tmp_path / "other")
    assert card.data.license_name == "tiny-llama" and card.data.base_model == ["acme/tiny", "acme/silent"]
    assert "| [acme/silent](https://huggingface.co/acme/silent) | unknown |" in card.text


def test_a_broken_card_of_a_part_tells_nothing(parts, tmp_path):
    for content in (b"---\nlicense: [\n---\n", b"---\n- mit\n---\n", b"\xff\xfe", b"license: mit\n"):
        folder = parts.copy(parts.language_model("llama"), tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / "README.md").write_bytes(content)
        model = load_pretrained_model(folder, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
        assert "licenses" not in model.config.parts


MIT, APACHE, LLAMA, UNLISTED = (
    {"license": "mit"}, {"license": "apache-2.0"}, {"license": "llama3"},
    {"license": "other", "license_name": "acme", "license_link": "https://acme.example/terms"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("of_parts", "whole"),
    [
        ([], {"license": "unknown"}),
        ([None, {}], {"license": "unknown"}),
        ([MIT, None], {"license": "unknown"}),
        ([MIT, MIT], MIT),
        ([LLAMA, LLAMA], LLAMA),
        ([UNLISTED, UNLISTED], UNLISTED),
        ([MIT, APACHE], {"license": "other", "license_name": "apache-2.0-and-mit"}),
        ([LLAMA, None], {"license": "other", "license_name": "llama3"}),
        ([LLAMA, MIT], {"license": "other", "license_name": "llama3-and-mit"}),
        ([MIT, UNLISTED], UNLISTED | {"license_name": "acme-and-mit"}),
    ],
)
def test_the_licence_of_the_whole(of_parts, whole):
    assert combined_license(of_parts) == whole


# ---------------------------------------------------------------------------------------------------------------------
# A README of the user's own
# ---------------------------------------------------------------------------------------------------------------------

OWN = {
    "with metadata": "---\n# my own order\ntags: [mine]  # a comment\nlicense: mit\n---\n# Mine\n\n\n  text\n",
    "without metadata": "# Mine\n---\ntext",
    "with the line ends of Windows": "---\r\nlicense: mit\r\n---\r\n# Mine\r\n",
    "with a byte order mark": "\ufeff---\nlicense: mit\n---\n# Mine\n",
    "empty": "",
}


@pytest.mark.parametrize("name", OWN)
def test_a_users_own_readme_is_completed_and_keeps_its_bytes(shelf, name, tmp_path):
    folder = shelf.copy("sparse", tmp_path / "model")
    own = OWN[name].encode("utf-8")
    (folder / "README.md").write_bytes(own)
    model = load_pretrained_model(folder, device="cpu").model
    model.save_pretrained(folder)
    completed = (folder / "README.md").read_bytes()
    head, body = own[: own.index(b"mit") + 3] if b"mit" in own else b"", own[own.rfind(b"# Mine") :] if own else b""
    assert completed.startswith(head) and completed.endswith(body)
    assert b"\r\n" not in completed or completed.count(b"\n") == completed.count(b"\r\n")
    card = card_of(folder)
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert card.data.license == ("mit" if head else "unknown")
    assert ("mine" in card.data.tags) is (name == "with metadata") and ("moe" in card.data.tags) is (b"tags" not in own)
    write_card(folder, repo_id=NAME)
    assert (folder / "README.md").read_bytes() == completed


def test_a_card_of_ours_is_written_anew_until_its_line_is_deleted(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    path = folder / "README.md"
    written = path.read_text(encoding="utf-8")
    path.write_text(written.replace("\n## Parts\n", "\n## Changed\n"), encoding="utf-8")
    model = load_pretrained_model(folder, device="cpu").model
    model.save_pretrained(folder)
    assert "## Parts" in path.read_text(encoding="utf-8")
    taken_over = path.read_text(encoding="utf-8").replace(MARKER, "").replace("\n## Parts\n", "\n## Changed\n")
    path.write_text(taken_over, encoding="utf-8")
    model.save_pretrained(folder)
    assert path.read_text(encoding="utf-8") == taken_over


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\nlicense: [\n---\ntext", "no valid YAML"),
        (b"---\n- a\n---\ntext", "is a list; expected lines"),
        (b"---\n{license: mit}\n---\ntext", "no list of 'key: value' lines"),
        (b"\xff\xfetext", "no UTF-8"),
    ],
)
def test_a_readme_that_cannot_be_completed_stays_and_the_save_goes_on(shelf, content, message, tmp_path, caplog):
    folder = shelf.copy("dense", tmp_path / "model")
    (folder / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_card(folder)
    weights = (folder / "model.safetensors").stat().st_ino
    model = load_pretrained_model(folder, device="cpu").model
    with caplog.at_level(logging.WARNING, logger="moellava"):
        model.save_pretrained(folder)
    assert message in caplog.text and "is saved without a new model card" in caplog.text
    assert (folder / "README.md").read_bytes() == content
    assert (folder / "model.safetensors").stat().st_ino != weights
    assert not list(tmp_path.glob(".*")) and not list(folder.glob(".README*"))


def test_a_readme_on_the_hub_counts_where_the_folder_has_none_of_the_users(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    ours = (folder / "README.md").read_text(encoding="utf-8")
    write_card(folder, on_hub=ours.replace("## Parts", "## Changed"))
    assert "## Parts" in card_of(folder).text
    write_card(folder, on_hub="# On the Hub")
    assert card_of(folder).text == "# On the Hub"
    (folder / "README.md").write_text("# Here", encoding="utf-8")
    write_card(folder, on_hub="# On the Hub")
    assert card_of(folder).text == "# Here"


def test_tags_that_a_push_was_given_stay_and_those_of_another_model_go(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    tags = card_of(folder).data.tags
    ours = (folder / "README.md").read_text(encoding="utf-8")
    write_card(folder, on_hub=ours.replace("tags:\n", "tags:\n- mine\n- moe\n- 4-bit\n- gptq\n", 1))
    assert card_of(folder).data.tags == [*tags, "mine"]


def test_a_card_needs_a_checkpoint(parts, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        write_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a checkpoint of this package"):
        write_card(parts.language_model("llama"))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluation_is_shown_until_the_weights_change(shelf, tmp_path):
    folder = shelf.copy("dense", tmp_path / "model")
    assert "no evaluation" in card_of(folder).text
    write_card(folder, evaluation=RESULTS)
    card = card_of(folder)
    assert "| VQA-RAD | test | accuracy | 0.5 | 0.25 to 0.75 | 12 |" in card.text
    assert "| mine |  | f1 | 0.25 |  |  |" in card.text
    assert "no evaluation" not in card.text
    first, second = card.data.eval_results
    assert (first.dataset_type, first.dataset_name, first.dataset_split, first.metric_value) == (
        "flaviagiammarino/vqa-rad", "VQA-RAD", "test", 0.5,
    )  # fmt: skip
    assert (second.dataset_type, second.metric_type) == ("mine", "f1")
    assert render_card(folder).data.to_dict()["model-index"] == card.data.to_dict()["model-index"]
    written = (folder / "README.md").read_text()
    write_card(folder)
    assert (folder / "README.md").read_text() == written
    write_card(folder, evaluation=[])
    assert "## Evaluation" not in card_of(folder).text
    write_card(folder, evaluation=RESULTS)
    load_pretrained_model(folder, device="cpu").model.save_pretrained(folder)
    assert card_of(folder).data.eval_results is None


@pytest.mark.parametrize(
    ("evaluation", "error", "message"),
    [
        ({"dataset": "d"}, TypeError, "evaluation is a dict; expected a list"),
        (["accuracy"], TypeError, "evaluation holds a str"),
        ([{"dataset": "d", "value": 1}], ValueError, "has no metric"),
        ([{"dataset": "d", "metric": "m", "value": "91 %"}], TypeError, "'91 %'; expected a number"),
        (
            [{"dataset": "d", "metric": "m", "value": 1, "low": "0"}],
            TypeError,
            "The low of an entry of evaluation is '0'",
        ),
        ([{"dataset": "d", "metric": "m", "value": 1, "splt": "test"}], ValueError, "has 'splt'"),
    ],
)
def test_what_evaluation_has_to_be(shelf, evaluation, error, message):
    with pytest.raises(error, match=message):
        render_card(shelf.folder("dense"), evaluation=evaluation)
