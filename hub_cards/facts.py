# SPDX-License-Identifier: Apache-2.0
"""What a card says of a checkpoint, gathered from its config, the headers of its weights and the files beside them."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..authoring.registry import is_user_class
from ..inspecting import CheckpointSummary, inspect_checkpoint
from ..parts.parts_moellava import ENCODERS, PROJECTORS
from ..reading.provenance import NEW, training_records
from ..reading.sources import Source
from .licences import UNKNOWN, combined_license, license_name


# What transformers' Trainer leaves: both in its checkpoints, the second one alone beside the model it saves at the end.
TRAINER_STATE, TRAINING_ARGUMENTS = "trainer_state.json", "training_args.bin"
_MEDICAL = re.compile(r"biomed|med-?moe|llava-?med|medical", flags=re.IGNORECASE)
_MED_MOE = re.compile(r"med-?moe", flags=re.IGNORECASE)
_TITLES = {
    "converted_from": "Older checkpoint",
    "vision_tower": "Vision tower",
    "multi_modal_projector": "Projector",
    "language_model": "Language model",
}


@dataclass(frozen=True)
class PartRow:
    """A row of the card's table of parts, in Markdown."""

    title: str
    kind: str
    origin: str
    licence: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name (`str`): The Hub id that the card's code loads, or the name of the checkpoint's folder.
        summary (`CheckpointSummary`): What `inspect_checkpoint` tells.
        origins (`dict`): The config's `parts`.
        moe (`dict`, *optional*): The config's `moe_config`, of the sparse layers that this package makes.
        quantization (`dict`, *optional*): The config's `quantization_config`.
        training (`list[dict]`): `stage`, `steps`, `epochs` and `data` of every stage of its training, as far as they
            are known; empty if nothing says that it was trained.
        says_what_is_untrained (`bool`): Whether the config has a list of the parts that were never trained.
        has_processor (`bool`): Whether the processor is saved beside the model.
    """

    name: str
    summary: CheckpointSummary
    origins: Mapping[str, Any]
    moe: Mapping[str, Any] | None
    quantization: Mapping[str, Any] | None
    training: list[Mapping[str, Any]]
    says_what_is_untrained: bool
    has_processor: bool

    @property
    def title(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def has_head(self) -> bool:
        """Whether it can answer: the base model saved alone has no head, and is not tied to one."""
        return any(part.name == "lm_head" and part.parameters.total for part in self.summary.parts) or (
            self.summary.language_model.tie_word_embeddings
        )

    @property
    def is_converted(self) -> bool:
        return bool(self.origins.get("converted_from"))

    @property
    def is_assembled(self) -> bool:
        return bool(self.origin_of("language_model"))

    @property
    def has_new_projector(self) -> bool:
        return self.origins.get("multi_modal_projector") == NEW

    @property
    def untrained_parts(self) -> list[str]:
        """The parts that have never been trained, in words.

        Checkpoints of earlier versions do not say so: a new projector counts, if nothing says that it was trained.
        """
        parts = self.summary.untrained_parts
        if not self.says_what_is_untrained and self.has_new_projector and not self.training:
            parts = ["multi_modal_projector"]
        return [_TITLES.get(part, part).lower() for part in parts]

    @property
    def is_med_moe(self) -> bool:
        """Whether it comes from Med-MoE, as the names of its origins and its experts tell."""
        return any(_MED_MOE.search(name) for name in self._names) or (
            self.is_converted and bool((self.moe or {}).get("use_meta_expert"))
        )

    @property
    def is_medical(self) -> bool:
        is_known = self.summary.encoder.type == "biomedclip" or self.is_med_moe
        return is_known or any(_MEDICAL.search(name) for name in self._names)

    @property
    def _names(self) -> list[str]:
        """The last words of the origins: folders above them may be called anything."""
        return [os.path.basename(str(self.origin_of(part))) for part in _TITLES if self.origin_of(part)]

    @property
    def own_parts(self) -> list[str]:
        """The parts that are of their author's own code, whether or not it is known here."""
        types = (("encoder", ENCODERS, self.summary.encoder), ("projector", PROJECTORS, self.summary.projector))
        return [
            f"{kind} {code(part.type)}"
            for kind, registry, part in types
            if part.type not in registry or is_user_class(registry[part.type])
        ]

    def origin_of(self, part: str) -> str | None:
        """Returns the Hub id or path that a part came from."""
        if part == "language_model":
            return self.origins.get("language_model") or self.origins.get("model_path")
        return self.origins.get(part)

    @cached_property
    def base_models(self) -> list[str]:
        """The Hub ids of the parts."""
        found = [self.origin_of(part) for part in ("converted_from", "language_model", "vision_tower")]
        return list(dict.fromkeys(name for name in found if is_hub_id(name)))

    @cached_property
    def licenses(self) -> dict[str, dict[str, str]]:
        """What is known of the licence of every part that came from elsewhere, with links that lead there."""
        known = self.origins.get("licenses") or {}
        names = [part for part in ("converted_from", "language_model", "vision_tower") if self.origin_of(part)]
        return {part: _with_full_link(known.get(part) or {}, self.origin_of(part)) for part in names}

    @cached_property
    def license(self) -> dict[str, str]:
        """The `license`, `license_name` and `license_link` of the whole."""
        return combined_license(self.licenses.values())

    def part_rows(self) -> Iterator[PartRow]:
        """Yields the rows of the table of parts."""
        summary = self.summary
        kinds = {
            "vision_tower": f"{code(summary.encoder.model_type)}, encoder {code(summary.encoder.type)}",
            "multi_modal_projector": code(summary.projector.type),
            "language_model": code(summary.language_model.model_type),
        }
        if self.is_converted:
            yield PartRow(_TITLES["converted_from"], "the model itself", *self._origin_and_licence("converted_from"))
        for part, kind in kinds.items():
            yield PartRow(_TITLES[part], kind, *self._origin_and_licence(part))

    def _origin_and_licence(self, part: str) -> tuple[str, str]:
        origin = self.origin_of(part)
        if part == "multi_modal_projector" and origin == NEW:
            return "initialised anew", "none of its own"
        if origin is None:
            return ("the older checkpoint", "as that") if self.is_converted else ("unknown", UNKNOWN)
        if part == "multi_modal_projector":
            return f"the file {code(origin)}", UNKNOWN
        terms = self.licenses[part]
        name = plain(license_name(terms))
        link = terms.get("license_link", "")
        return linked(origin), f"[{name}]({link})" if link.startswith("https://") else name


def read_facts(source: Source, repo_id: str | None = None) -> CardFacts:
    """Reads what a card says of a checkpoint; no weight is read and no code of it is run.

    Args:
        source (`Source`): The checkpoint.
        repo_id (`str`, *optional*): The Hub id that the card is for. Defaults to that of `source`, of a folder to its
            name.

    Raises:
        FileNotFoundError: A path that does not exist, or a checkpoint without weights.
        OSError: A Hub repository that does not exist, cannot be reached or may not be read.
        ValueError: A folder that is no model, a model of another kind, or a damaged file.
    """
    summary = inspect_checkpoint(source.name, **source.hub_options)
    config = source.config_dict()
    name = repo_id or (os.path.basename(os.path.realpath(source.name)) if source.is_local else source.name)
    return CardFacts(
        name=name,
        summary=summary,
        origins=config.get("parts") or {},
        moe=config.get("moe_config"),
        quantization=config.get("quantization_config"),
        training=_training(source, config.get("parts") or {}),
        says_what_is_untrained=config.get("untrained_parts") is not None,
        has_processor=source.find("processor_config.json") is not None,
    )


def _training(source: Source, origins: Mapping[str, Any]) -> list[dict[str, Any]]:
    if records := training_records(origins):
        return records
    state = source.read_json(TRAINER_STATE)
    if state is not None:
        return [{"steps": state.get("global_step"), "epochs": state.get("epoch")}]
    return [] if source.find(TRAINING_ARGUMENTS) is None else [{}]


def is_hub_id(name: str | None) -> bool:
    """Whether a part's origin is the id of a Hub repository: `owner/name`, and no folder here."""
    if name is None or name.count("/") != 1 or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _with_full_link(terms: Mapping[str, str], origin: str) -> dict[str, str]:
    """Returns a part's licence with a link that holds outside its repository; one to a local file is left out."""
    terms = dict(terms)
    link = terms.pop("license_link", None)
    if link and not link.startswith(("https://", "http://")):
        link = f"https://huggingface.co/{origin}/blob/main/{link}" if is_hub_id(origin) else None
    return terms | ({"license_link": link} if link else {})


def linked(origin: str) -> str:
    """Returns a part's origin in Markdown; of a path its end: the rest says nothing to others, and may say too much."""
    if is_hub_id(origin):
        return f"[{origin}](https://huggingface.co/{origin})"
    return f"a local folder, {code(os.path.basename(os.path.normpath(origin)))}"


def plain(text: object) -> str:
    """Returns a text of the config without what Markdown would take for more than text."""
    return re.sub(r"[\s`|<>\[\]\\]+", " ", str(text)).strip()


def code(text: object) -> str:
    """Returns a text of the config as a code span."""
    return f"`{plain(text)}`"


__all__ = ["CardFacts", "PartRow", "code", "is_hub_id", "linked", "plain", "read_facts"]
