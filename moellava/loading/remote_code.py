# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint by the code that it carries, where a part of its author's own is not registered here."""

import logging
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..authoring.load_request import LoadRequest
from ..authoring.registry import is_user_class
from ..authoring.user_code import CUSTOM_MODULE, registered_in
from ..configuration.tools_moellava import AUTO_MAP
from ..parts.parts_moellava import ENCODERS, PROJECTORS
from ..reading.sources import Source


def unregistered_part(source: Source, fields: dict[str, Any]) -> str | None:
    """Returns the name of a part of the checkpoint that is not registered here, if there is one."""
    custom_code = source.find(f"{CUSTOM_MODULE}.py")
    own_names = registered_in(custom_code.read_text(encoding="utf-8")) if custom_code is not None else []
    projector = fields.get("projector_config")
    projector = projector.get("type") if isinstance(projector, dict) else None
    for name, table, registry in (
        (fields.get("encoder_type"), "ENCODERS", ENCODERS),
        (projector, "PROJECTORS", PROJECTORS),
    ):
        if not isinstance(name, str):
            continue
        # Its author may have taken the place of a part of this package.
        if name not in registry or ((table, name) in own_names and not is_user_class(registry[name])):
            return name
    return None


def load_by_remote_code(source: Source, part: str, request: LoadRequest, options: dict[str, Any]) -> Any:
    """Loads a checkpoint with a part of its author's own by the code that it carries."""
    if not source.trust_remote_code:
        raise ValueError(
            f"{source} has a part {part!r} of its author's own, whose code lies in the checkpoint. Pass "
            "trust_remote_code=True to run it, where you trust its author; or import the file that registers it."
        )
    changes = (request.model_fields, request.projector, request.projector_path, request.vision_tower)
    if any(changes) or request.moe is not None:
        raise ValueError(
            f"{source} is loaded by its own code, because of its part {part!r}, and cannot be changed while loading. "
            f"Import the file that registers {part!r} first, or leave the settings of its parts out."
        )
    model_class: Any = get_class_from_dynamic_module(
        AUTO_MAP["AutoModelForCausalLM"], source.name, **source.hub_options
    )
    processor_class: Any = get_class_from_dynamic_module(AUTO_MAP["AutoProcessor"], source.name, **source.hub_options)
    source.tensors()  # opens every file, since transformers' errors on damaged ones do not say which it is
    model = model_class.from_pretrained(source.name, **source.hub_options, **options)
    # The tokenizer's loader asks the installed package for the config, which does not know the part, and then warns.
    library = logging.getLogger("transformers.configuration_utils")
    library.addFilter(_is_not_about_the_type)
    try:
        model.processor = processor_class.from_pretrained(source.name, **source.hub_options)
    finally:
        library.removeFilter(_is_not_about_the_type)
    return model


def _is_not_about_the_type(record: logging.LogRecord) -> bool:
    return "to instantiate a model of type" not in record.getMessage()


__all__ = ["load_by_remote_code", "unregistered_part"]
