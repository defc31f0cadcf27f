# SPDX-License-Identifier: Apache-2.0
"""What the installed package adds to a model's own code: see `configuration/tools_moellava.py`.

`registration.py` puts it in its place as soon as transformers has loaded `AutoConfig`. Most of what it calls is
imported late, so that this stays cheap.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from .authoring.older_names import (
    canonical_encoder_type,
    canonical_projector,
    canonical_strategy,
    given_type,
    public_name,
    take_other_names,
)
from .authoring.part_fields import checked_part_fields, plain_value
from .configuration.tools_moellava import Tools, use_tools


class InstalledTools(Tools):
    """The tools of the installed package."""

    def take_other_names(self, config: Any, given: dict[str, Any]) -> dict[str, Any]:
        return take_other_names(config, given)

    def canonical_projector(self, fields: dict[str, Any], kind: str) -> dict[str, Any]:
        is_by_other_name = kind == "mlp" and given_type(fields) is not None
        return canonical_projector(fields if is_by_other_name else {**fields, "type": kind})

    def checked_part_fields(self, table: Any, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        return checked_part_fields(table, name, fields)

    def canonical_moe(self, moe: Any, fields: dict[str, Any]) -> dict[str, Any]:
        from .checks.moe import canonical_fields

        return canonical_fields(moe, fields)

    def check_moe(self, moe: Any) -> None:
        from .checks.moe import check_moe

        check_moe(moe)

    def resolved_layers(self, layers: str | list[int], num_hidden_layers: int) -> list[int]:
        from .checks.moe import resolved_layers

        return resolved_layers(layers, num_hidden_layers)

    def canonical_value(self, name: str, value: Any) -> Any:
        if name == "encoder_type":
            return canonical_encoder_type(value)
        if name == "vision_feature_select_strategy":
            return canonical_strategy(value)
        if name == "parts":
            return None if value is None else {part: public_name(origin) for part, origin in value.items()}
        return plain_value(value, name)

    def config_from_dict(self, from_dict: Callable, cls: type, fields: dict[str, Any], given: dict[str, Any]) -> Any:
        from .checks.configs import config_from_dict

        return config_from_dict(from_dict, cls, fields, given)

    def check_config(self, config: Any) -> None:
        from .checks.configs import check_config

        check_config(config)

    def check_ties(self, config: Any, again: Any) -> None:
        from .checks.configs import check_ties

        check_ties(config, again)

    def measuring(self, config: Any) -> AbstractContextManager:
        from .checks.encoders import measuring

        return measuring(config)

    def check_encoder(self, encoder: Any) -> None:
        from .checks.encoders import check_encoder

        check_encoder(encoder)

    def check_head(self, text_config: Any, head: Any) -> None:
        from .checks.configs import check_head

        check_head(text_config, head)

    def reading_part(self, key: str, model_type: Any) -> AbstractContextManager:
        from .checks.configs import reading_part

        return reading_part(key, model_type)

    def check_part(self, key: str, fields: dict[str, Any]) -> None:
        from .checks.configs import check_part

        check_part(key, fields)

    def check_part_config(self, key: str, config: Any) -> None:
        from .checks.configs import check_part_config

        check_part_config(key, config)

    # A model's parts

    def building_part(self, key: str, part: Any) -> AbstractContextManager:
        from .checks.configs import building_part

        return building_part(key, part)

    def measured_output_tokens(self, projector: Any, num_tokens: int) -> int:
        from .authoring.measuring import measured_output_tokens

        return measured_output_tokens(projector, num_tokens)

    def check_adapters(self, model: Any, adapters: Any) -> None:
        from .building.bare_experts import warn_of_experts_without_adapters

        warn_of_experts_without_adapters(model, adapters)

    # Reading files

    def check_files(self, name: Any, options: dict[str, Any]) -> None:
        from .checks.weight_files import check_adapter, check_indices, find_adapter_config

        check_indices(os.path.join(name, options.get("subfolder") or ""))
        adapter_config = find_adapter_config(name, options)
        if adapter_config is not None:
            check_adapter(adapter_config)

    def check_size(self, model: Any, state_dict: dict | None, files: list[str] | None) -> None:
        from .checks.weight_files import check_size

        if state_dict:  # assembled, with a projector of the size that the caller has asked for
            check_size(model, sum(tensor.nbytes for tensor in state_dict.values()), new_part="multi_modal_projector")
        elif files is not None:
            check_size(model, sum(os.path.getsize(file) for file in files))

    def load_tokenizer(self, name: Any, **options: Any) -> Any:
        from .checks.processor_files import load_tokenizer

        return load_tokenizer(name, **options)

    def load_image_processor(self, name: Any, **options: Any) -> Any:
        from .checks.processor_files import load_image_processor

        return load_image_processor(name, **options)

    def read_processor_dict(self, name: Any, **options: Any) -> Any:
        from .checks.processor_files import read_processor_dict

        return read_processor_dict(name, **options)

    def load_picture(self, source: Any, name: str) -> Any:
        from .checks.pictures import load_picture

        return load_picture(source, name)

    def to_rgb(self, image: Any, name: str, input_data_format: Any = None) -> Any:
        from .checks.pictures import to_rgb

        return to_rgb(image, name, input_data_format)

    def check_picture_shape(self, width: int, height: int, aspect_ratio: str, name: str) -> None:
        from .checks.pictures import check_shape

        check_shape(width, height, aspect_ratio, name)

    # Writing files

    @contextmanager
    def saving(self, folder: str | os.PathLike, saved: Any, is_main_process: bool = True) -> Iterator[Path]:
        from .saving.checkpoint import saving

        with saving(folder, saved, is_main_process) as staging:
            yield staging

    def upload(self, saved: Any, upload: Callable, folder: Any, repo_id: str, timestamps: Any, **options: Any) -> Any:
        from .saving.checkpoint import upload as upload_checkpoint

        return upload_checkpoint(saved, folder, repo_id, **options)


use_tools(InstalledTools())

__all__ = ["InstalledTools"]
