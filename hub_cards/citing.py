# SPDX-License-Identifier: Apache-2.0
"""Which works a card cites: those whose parts or methods the model is made with."""

import re
from pathlib import Path

from ..reading.provenance import UPCYCLED
from .facts import CardFacts


_BIBLIOGRAPHY = Path(__file__).parent / "templates" / "citations.bib"

_OF_TOWER = {
    "clip": ["radford2021clip"],
    "clip_vision_model": ["radford2021clip"],
    "siglip": ["zhai2023siglip"],
    "siglip_vision_model": ["zhai2023siglip"],
    "siglip2": ["tschannen2025siglip2"],
    "siglip2_vision_model": ["tschannen2025siglip2"],
    "dinov2": ["oquab2023dinov2"],
    "dinov2_with_registers": ["oquab2023dinov2", "darcet2023registers"],
    "vit": ["dosovitskiy2021vit"],
}
_OF_PROJECTOR = {
    "mlp": ["liu2024improved"],
    "qformer": ["li2023blip2"],
    "older_qformer": ["li2023blip2"],
    "perceiver": ["jaegle2021perceiver", "laurencon2024idefics2"],
}


def citations(facts: CardFacts) -> list[str]:
    """Returns the BibTeX entries of a card, in their order."""
    summary = facts.summary
    keys = ["liu2023llava"]
    # The biomedical towers are ViTs by their config; what they are known as is the encoder's name.
    is_biomedclip = summary.encoder.type == "biomedclip"
    keys += ["zhang2023biomedclip"] if is_biomedclip else _OF_TOWER.get(summary.encoder.model_type, [])
    keys += _OF_PROJECTOR.get(summary.projector.type, [])
    if facts.moe is not None:
        keys += ["lin2024moellava"]
    if facts.origins.get("experts") == UPCYCLED:
        keys += ["komatsuzaki2023upcycling"]
    keys += ["jiang2024medmoe"] if facts.is_med_moe else []
    if summary.coverage is not None and (summary.coverage.method, summary.coverage.bits) == ("bitsandbytes", 4):
        keys += ["dettmers2023qlora"]
    entries = _entries()
    return [entries[key] for key in keys]


def _entries() -> dict[str, str]:
    found = re.split(r"\n\n(?=@)", _BIBLIOGRAPHY.read_text(encoding="utf-8").strip())
    return {re.match(r"@\w+\{(\w+),", entry)[1]: entry for entry in found}


__all__ = ["citations"]
