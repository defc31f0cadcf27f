# SPDX-License-Identifier: Apache-2.0
"""A vision encoder that a user has written: an `nn.Module` under `@register_encoder`.

What it gives is measured, by running it once. See `docs/extending.md`.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .measured_encoder_moellava import DrawnNumbers, MeasuredEncoder, as_tokens
from .part_table_moellava import ENCODERS
from .user_parts_moellava import RUN_ERRORS, build_part, initialize_part


class UserEncoder(MeasuredEncoder):
    """Answers for an `nn.Module` that a user has written.

    Args:
        config (`MoellavaConfig`): The model's config; its `vision_config` holds the module's fields.
        encoder_type (`str`): The name that the module is registered under.
        module_class (`type`): Its class.
    """

    is_by_user = True

    def __init__(self, config, encoder_type: str, module_class: type):
        self.encoder_type = encoder_type
        self.module_class = module_class
        if config.vision_config.model_type != "moellava_encoder":
            raise ValueError(
                f"encoder_type is {encoder_type!r}, an encoder of your own, but vision_config.model_type is "
                f"{config.vision_config.model_type!r}; expected 'moellava_encoder' and the fields of "
                f"{module_class.__name__}."
            )
        self.fields = self.read_fields(config)
        super().__init__(config)

    def read_fields(self, config) -> dict[str, Any]:
        """Returns what the module is made from."""
        given = config.vision_config.fields
        if "image_size" not in ENCODERS.fields(self.encoder_type):
            given = {name: value for name, value in given.items() if name != "image_size"}  # told, but no field of it
        return ENCODERS.complete_fields(self.encoder_type, given)

    @staticmethod
    def make(module_class: type, fields: dict[str, Any]) -> nn.Module:
        """Makes the module on the default device."""
        return module_class(**fields)

    def make_tower(self) -> nn.Module:
        """Makes the module, as its constructor leaves it."""
        return self.make(self.module_class, self.fields)

    def build(self) -> nn.Module:
        return build_part(self.make_tower)

    def initialize(self, tower: nn.Module) -> None:
        initialize_part(tower, self.make_tower)

    @property
    def tower_name(self) -> str:
        return self.encoder_type

    @functools.cached_property
    def num_prefix_tokens(self) -> int:
        count = getattr(self.module_class, "num_prefix_tokens", 0)
        if not isinstance(count, int):  # a property, which the module's fields decide
            with torch.device("meta"):
                count = self.build().num_prefix_tokens
        return count

    @property
    def has_class_token(self) -> bool:
        return self.num_prefix_tokens > 0

    @property
    def native_image_size(self) -> int:
        sizes = (self.fields.get("image_size"), getattr(self.vision_config, "image_size", None), self._image_size)
        size = next((size for size in sizes if size is not None), None)
        if not isinstance(size, int):
            raise ValueError(f"The encoder {self.encoder_type!r} needs its picture size in pixels: give image_size.")
        return size

    def check_image_size(self) -> None:
        """Raises a ValueError where the module gives nothing."""
        if not self._measured_shapes:  # the module itself decides what it takes, by running
            raise ValueError(f"The encoder {self.encoder_type!r} returns no features.")

    @property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        return _measured_shapes(
            type(self), self.encoder_type, self.module_class, json.dumps(self.fields, sort_keys=True), self.image_size
        )

    def _run(self, tower: nn.Module, pixel_values: torch.Tensor, **asked: bool | list[int]) -> BaseModelOutput:
        # Its forward takes pictures and nothing else, so that what is asked for besides features is not there.
        return BaseModelOutput(hidden_states=as_hidden_states(tower(pixel_values)))


@functools.lru_cache(maxsize=32)
def _measured_shapes(
    encoder_class: type[UserEncoder], encoder_type: str, module_class: type, fields: str, image_size: int
) -> list[tuple[int, int, int]]:
    """Returns the shapes `(2, tokens, width)` of the features of every layer that a module offers."""
    given = (2, 3, image_size, image_size)
    try:
        output = run_part(lambda: encoder_class.make(module_class, json.loads(fields)), given)
        hidden_states = as_hidden_states(output)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The encoder {encoder_type!r} cannot be run on pictures of shape {given}: {error}. Its forward takes "
            "pixel_values (batch, 3, height, width) and returns features (batch, tokens, width), or a list of them, "
            "one per layer."
        ) from error
    shapes = [tuple(hidden_state.shape) for hidden_state in hidden_states]
    wrong = [shape for shape in shapes if len(shape) not in (3, 4) or shape[0] != 2]
    if wrong:
        raise ValueError(
            f"The encoder {encoder_type!r} makes features of shape {wrong[0]} of pictures of shape {given}; expected "
            "(2, tokens, width), or a map (2, width, rows, columns)."
        )
    return [tuple(as_tokens(hidden_state).shape) for hidden_state in hidden_states]


def run_part(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Any:
    """Runs a module on an input of some shape, for the shapes of what it returns.

    On the meta device, which costs nothing; where the module looks at values, for real, on zeros.

    Raises:
        RuntimeError: It could not be run; the cause is the error that it raised itself.
        ValueError: It draws random numbers, though it is in eval mode.
    """
    errors = []
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
                part = build_part(make).eval()
                with DrawnNumbers() as drawn:
                    output = part(torch.zeros(shape))
        except RUN_ERRORS as error:
            errors.append(error)
        else:
            drawn.check(type(part).__name__)
            return output
    raise RuntimeError(f"{type(errors[-1]).__name__}: {errors[-1]}") from errors[-1]


def as_hidden_states(output: Any) -> tuple[torch.Tensor, ...]:
    """Returns the features of every layer, of what a module returns: one tensor, several, or an output of transformers.

    Raises:
        TypeError: It returns something else.
    """
    if isinstance(output, dict):  # an output of transformers is one
        layers = output.get("hidden_states")
        output = output.get("last_hidden_state") if layers is None else layers
    if isinstance(output, torch.Tensor):
        output = (output,)
    if not isinstance(output, list | tuple) or not all(isinstance(entry, torch.Tensor) for entry in output):
        raise TypeError(f"it returns a {type(output).__name__}")
    # One set of features stands for both of the layers that are asked for by default, -1 and -2.
    return tuple(output) * 2 if len(output) == 1 else tuple(output)
