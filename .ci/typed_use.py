# SPDX-License-Identifier: Apache-2.0
"""What a user writes, as mypy has to see it (`typecheck.py`); never run.

A line that is wrong on purpose says which error mypy has to find there. Where it finds none, it calls the comment
unused, which fails `make lint`.
"""

from pathlib import Path
from typing import assert_type

import moellava
from moellava import (
    LoadedModel,
    MoellavaConfig,
    MoellavaMoeConfig,
    load_pretrained_model,
    register_encoder,
    register_projector,
)


def right() -> None:
    loaded = load_pretrained_model(Path("folder"), device="cpu", projector_type="mlp")
    assert_type(loaded, LoadedModel)
    assert_type(loaded.context_len, int)
    load_pretrained_model({"model_path": "folder"}, load_4bit=True)

    config = MoellavaConfig(image_token_id=5, vision_feature_layer=[-2, -5])
    assert_type(config.image_aspect_ratio, str)
    assert_type(MoellavaConfig.from_dict(config.to_dict()), MoellavaConfig)
    MoellavaMoeConfig(num_experts=8, layers="dense")

    @register_projector("gated")
    class Gated: ...

    register_encoder("own", exist_ok=True)(Gated)
    assert_type(moellava.__version__, str)


def wrong(loaded: LoadedModel, config: MoellavaConfig) -> None:
    from moellava import load_pretrained_modal  # type: ignore[attr-defined]
    from moellava.configuration import MoelavaConfig  # type: ignore[attr-defined]
    from moellava.loading import load_model  # type: ignore[attr-defined]

    print(load_pretrained_modal, MoelavaConfig, load_model)
    print(moellava.load)  # type: ignore[attr-defined]
    print(loaded.context_length)  # type: ignore[attr-defined]
    load_pretrained_model("folder", load_4bit="yes")  # type: ignore[arg-type]
    load_pretrained_model("folder", device=0.5)  # type: ignore[arg-type]
    config.image_token_id = "five"  # type: ignore[assignment]
    MoellavaConfig(vision_feature_layer="last")  # type: ignore[arg-type]
    MoellavaConfig.from_dict("config.json")  # type: ignore[arg-type]
    MoellavaMoeConfig(num_experts_per_tok="two")  # type: ignore[arg-type]
    register_projector(5)  # type: ignore[arg-type]
    register_projector("gated", exists_ok=True)  # type: ignore[call-arg]
