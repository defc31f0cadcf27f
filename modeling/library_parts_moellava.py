# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Building the parts that are models of transformers: a vision tower, the body of a language model."""

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def build_library_part(key: str, config: PreTrainedConfig, **arguments: object) -> PreTrainedModel:
    """Builds the model that a part's config describes, with its initial weights.

    Args:
        key (`str`): What `MoellavaConfig` calls the config, for the error message.
        config (`PreTrainedConfig`): The part's config.
        arguments (*optional*): For the model's class.

    Raises:
        ValueError: The config passes its own checks, but no model can be built of it.
    """
    try:
        return AutoModel.from_config(config, **arguments)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"{key} does not describe a {config.model_type!r} model ({type(error).__name__}: {error}). Expected the "
            f"fields of transformers' {type(config).__name__}."
        ) from error


__all__ = ["build_library_part"]
