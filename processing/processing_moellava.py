# SPDX-License-Identifier: Apache-2.0
"""The processor: pictures and text in, what `MoellavaForCausalLM.forward` takes out."""

import os
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging

from ..configuration.config_base_moellava import check_choice
from ..configuration.tools_moellava import AUTO_MAP, tools
from .images_moellava import (
    is_float_array,
    is_picture_source,
    load_picture,
    pad_to_square,
    scaled_to_tensor,
    to_rgb,
)
from .open_clip_moellava import OpenClipImageProcessor


logger = logging.get_logger(__name__)

_TOKENIZER_SETTINGS = (
    "clean_up_tokenization_spaces", "legacy", "model_input_names", "padding_side", "split_special_tokens",
    "truncation_side",
)  # fmt: skip


class MoellavaImagesKwargs(ImagesKwargs, total=False):
    """What an image processor takes, and `image_aspect_ratio`: see [`MoellavaProcessor`]."""

    image_aspect_ratio: str | None


class MoellavaProcessorKwargs(ProcessingKwargs, total=False):
    """The keyword arguments of [`MoellavaProcessor`], by what they are for."""

    images_kwargs: MoellavaImagesKwargs

    # transformers before 5.23 reads it, and a TypedDict does not inherit it.
    _defaults = {}


class MoellavaProcessor(ProcessorMixin):
    """Prepares pictures and text for a MoELLaVA model.

    Every `image_token` in the text stands for one picture and is repeated `num_image_tokens` times, once for each
    position that the picture takes in the language model.

    Args:
        image_processor (`BaseImageProcessor`): What resizes and normalises pictures for the vision tower.
        tokenizer (`PreTrainedTokenizerBase`): The language model's tokenizer; knows `image_token`.
        num_image_tokens (`int`): How many tokens one picture becomes: what the projector returns.
        image_aspect_ratio (`str`, *optional*, defaults to `"pad"`):
            `"pad"`: a picture is first centred on a square of the image processor's mean colour (black where it has
            none). `"square"`: the image processor alone decides; CLIP's cuts off what is outside the centre square,
            SigLIP's stretches. Can be given for one call too.
        image_token (`str`, *optional*, defaults to `"<image>"`): What stands for a picture in the text.
        space_after_image (`bool`, *optional*, defaults to `False`):
            Whether a space is put between a picture and the text behind it. LLaVA's code tokenizes that text as one of
            its own, before which LLaMA's tokenizers put a space; those with `legacy=False` do not do so behind a token.
        chat_template (`str` or `dict[str, str]`, *optional*): The template of `apply_chat_template`.

    Raises:
        TypeError: A part is missing or of another type, or there is an argument too many.
        ValueError: `num_image_tokens` is no positive number, `image_aspect_ratio` is unknown, or the tokenizer does
            not know `image_token`.
    """

    valid_processor_kwargs = MoellavaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int | None = None,
        image_aspect_ratio: str = "pad",
        image_token: str = "<image>",
        space_after_image: bool = False,
        chat_template=None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        is_count = isinstance(num_image_tokens, int | np.integer) and not isinstance(num_image_tokens, bool)
        if not is_count or num_image_tokens < 1:
            raise ValueError(
                f"`num_image_tokens` is {num_image_tokens!r}; expected how many tokens the model's projector makes of "
                "one picture, a number of at least 1."
            )
        self.num_image_tokens = int(num_image_tokens)
        self.image_aspect_ratio = check_choice("image_aspect_ratio", image_aspect_ratio)
        self.image_token = image_token
        self.image_token_id = _single_token_id(tokenizer, image_token)
        self.image_token_ids = [self.image_token_id]
        self.space_after_image = space_after_image
        # Written to processor_config.json, so that AutoProcessor finds this class in a checkpoint.
        self.auto_map = dict(AUTO_MAP)

    @property
    def unused_input_names(self) -> list[str]:
        """What tokenizers may return that the model does not take."""
        return ["token_type_ids"]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[MoellavaProcessorKwargs],
    ) -> BatchFeature:
        """Prepares pictures, text or both.

        Args:
            images (*optional*):
                One picture, a list of pictures in the order of their placeholders, or a list with one list of
                pictures for each row of text (`[]` for a row without). A picture is a PIL picture, a path, an http(s)
                URL, base64 text, or a numpy array or torch tensor: (height, width), (height, width, channels) or
                (channels, height, width), of uint8, uint16, bool, or floats from 0 to 1. A 4-D array is a list of
                pictures. With `do_rescale=False` arrays of floats are not rescaled.
            text (`str` or `list[str]`, *optional*): The text, with one `image_token` where each picture goes.
            image_aspect_ratio (`str`, *optional*): `"pad"` or `"square"`, for this call.
            kwargs (*optional*): For the tokenizer and the image processor: see `ProcessorMixin.__call__`.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask`, (rows, tokens), if there is text, and `pixel_values`,
            (pictures, 3, height, width), in the order of the placeholders, if there are pictures. With
            `return_mm_token_type_ids=True` also `mm_token_type_ids`, (rows, tokens): 1 for picture tokens, else 0.

        Raises:
            FileNotFoundError: There is no such picture file.
            TypeError: Something in `images` is no picture.
            ValueError: The numbers of placeholders and of pictures differ, a picture cannot be decoded, truncation
                would cut through the tokens of a picture, or there is nothing to prepare.
        """
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Makes `text` a list, and `images` a list, or a list with one list per row, of pictures; opens files."""
        if isinstance(text, str):
            text = [text]
        elif text is not None:
            text = list(text)
        return _lay_out(images), text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks that every placeholder has its picture: row by row if `images` is nested, else in total.

        Raises:
            ValueError: The numbers differ, or there is neither text nor picture, or there is video or audio.
        """
        if videos is not None or audio is not None:
            raise ValueError(f"{type(self).__name__} takes `images` and `text`; video and audio are not supported.")
        if text is None and not (any(images) if _is_nested(images) else images):
            raise ValueError(f"{type(self).__name__} needs `images`, `text` or both, and got neither.")
        if text is None:
            return
        if not all(isinstance(row, str) for row in text):
            raise ValueError("`text` must be a string or a list of strings.")
        placeholders = [row.count(self.image_token) for row in text]
        nested = _is_nested(images)
        if nested and len(images) != len(text):
            raise ValueError(
                f"`images` has {len(images)} row(s) of pictures, but `text` has {len(text)} row(s). Give one list of "
                "pictures for each row of text, `[]` for a row without pictures."
            )
        rows = zip(placeholders, images, strict=True) if nested else [(sum(placeholders), images or [])]
        for row, (expected, pictures) in enumerate(rows):
            if expected != len(pictures):
                raise ValueError(
                    f"{f'Row {row} of the text' if nested else 'The text'} has {expected} {self.image_token} "
                    f"placeholder(s), but {len(pictures)} picture(s) were given. Every picture needs one "
                    f"{self.image_token} in the text, and the other way round."
                )

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs) -> str:
        """Returns what a placeholder becomes; the same for every picture."""
        return self.image_token * self.num_image_tokens

    def get_text_with_replacements(self, text: list[str], images_replacements: list[str] | None = None, *others):
        """Puts the tokens of every picture in the place of its placeholder; see `ProcessorMixin`."""
        replacements = list(images_replacements or [])
        if self.space_after_image and replacements:
            _, found = super().get_text_with_replacements(list(text), replacements, *others)
            ends = [(row, place["span"][1]) for row, places in zip(text, found, strict=True) for place in places]
            for index, (row, end) in enumerate(ends):
                if end < len(row) and not row.startswith(self.image_token, end):
                    replacements[index] += " "
        return super().get_text_with_replacements(text, replacements, *others)

    def _process_images(self, images, image_aspect_ratio=None, input_data_format=None, **kwargs):
        """Converts, pads and preprocesses pictures; returns the image processor's output and the replacements."""
        aspect_ratio = check_choice("image_aspect_ratio", image_aspect_ratio or self.image_aspect_ratio)

        def option(name):
            value = kwargs.get(name)
            return getattr(self.image_processor, name, None) if value is None else value

        is_scaled = option("do_rescale") is False
        pictures, any_tensor = [], False
        for name, picture in _named(images):
            if is_scaled and is_float_array(picture):
                any_tensor = True
                picture = scaled_to_tensor(picture, name, input_data_format)
                height, width = picture.shape[1:]
                if aspect_ratio == "pad" and height != width and option("do_normalize") is False:
                    raise ValueError(
                        f"{name} is {width}x{height} pixels and, with `do_rescale=False` and `do_normalize=False`, on "
                        "a scale that is not known, so it cannot be padded with the mean colour. Pad it to a square "
                        "first, or pass `image_aspect_ratio='square'`."
                    )
            else:
                picture = (tools().to_rgb or to_rgb)(picture, name, input_data_format)
                width, height = picture.size
            tools().check_picture_shape(width, height, aspect_ratio, name)
            if aspect_ratio == "pad" and height != width:
                picture = pad_to_square(picture, self._padding_color(option("image_mean")))
            pictures.append(picture)
        if not pictures:
            return {}, []
        if any_tensor:
            kwargs["input_data_format"] = "channels_first"
        processed = self.image_processor(pictures, **kwargs)
        return processed, [self.replace_image_token(processed, index) for index in range(len(pictures))]

    def _padding_color(self, image_mean) -> tuple[int, int, int]:
        if image_mean is None:
            logger.warning_once(
                f"{type(self.image_processor).__name__} has no `image_mean`: pictures are padded with black."
            )
            image_mean = 0.0
        means = [image_mean] * 3 if isinstance(image_mean, int | float) else list(image_mean)
        if len(means) != 3:
            raise ValueError(f"`image_mean` is {image_mean!r}; expected a number, or one for each of red, green, blue.")
        # Cut off, not rounded: so were the pictures that LLaVA's models were trained on.
        return tuple(int(255 * mean) for mean in means)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Returns how many tokens and patches pictures of the given (height, width) become; serving engines ask."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Saves the processor and the code that it needs, so that it loads where this package is not installed.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it is not there. What else lies in it is kept.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload the processor afterwards too.
            kwargs (*optional*): The arguments of `push_to_hub`; `repo_id` is the name of the folder by default.

        Returns:
            `list[str]`: The path of `processor_config.json`.
        """
        save_directory = os.fspath(save_directory)
        # transformers writes of these only what the tokenizer was made with, not what was set on it afterwards.
        for name in _TOKENIZER_SETTINGS:
            if hasattr(self.tokenizer, name):
                self.tokenizer.init_kwargs[name] = getattr(self.tokenizer, name)
        with tools().saving(save_directory, self) as folder:
            files = super().save_pretrained(folder)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or os.path.basename(os.path.abspath(save_directory))
            self.push_to_hub(repo_id, **kwargs)
        return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files]

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict, **kwargs):
        upload = super()._upload_modified_files
        return tools().upload(self, upload, working_dir, repo_id, files_timestamps, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `processor_config.json` holds: the fields, the image processor's, and its backend."""
        output = super().to_dict()
        backend = getattr(self.image_processor, "backend_name", getattr(self.image_processor, "backend", None))
        if backend is not None:
            output["image_backend"] = backend
        return output

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        read = tools().read_processor_dict or super().get_processor_dict
        return read(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Loads the image processor and the tokenizer.

        The image processor is of the backend that it was saved with (`"pil"`, `"torchvision"` or `"open_clip"`), unless
        `backend` says otherwise. transformers by itself does not remember it and takes torchvision's wherever it can,
        whose resizing differs from Pillow's in single levels.

        The tokenizer pads on the left, where answers in a batch need it, unless its files or `padding_side` say
        otherwise.
        """
        saved = None if "backend" in kwargs else (processor_dict or {}).get("image_backend")
        is_open_clip = saved == OpenClipImageProcessor.backend_name
        backend = kwargs.pop("backend", None if is_open_clip else saved)
        image_processor = tools().load_image_processor(pretrained_model_name_or_path, backend=backend, **kwargs)
        if is_open_clip:
            image_processor = OpenClipImageProcessor.from_dict(image_processor.to_dict())
        # A config of ours says nothing of the tokenizer, so none is loaded for it.
        tokenizer = tools().load_tokenizer(pretrained_model_name_or_path, config=PreTrainedConfig(), **kwargs)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        return [image_processor, tokenizer]

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Does nothing: `auto_map` holds every auto class already, and the code is written with every save."""


def _single_token_id(tokenizer, token: str) -> int:
    """Returns the id of `token`, after checking that the tokenizer reads two in a row as two of it."""
    ids = tokenizer.encode(token * 2, add_special_tokens=False) if token else []
    if len(ids) != 2 or ids[0] != ids[1] or tokenizer.convert_ids_to_tokens(ids[0]) != token:
        raise ValueError(
            f"The tokenizer has no token {token!r}, which stands for a picture. Add it with "
            f"`tokenizer.add_tokens([AddedToken({token!r}, normalized=False)], special_tokens=True)`, and see that "
            "the model's embeddings have a row for it (`model.resize_token_embeddings`)."
        )
    return ids[0]


def _is_nested(images: list | None) -> bool:
    return bool(images) and isinstance(images[0], list)


def _named(images: list) -> list[tuple[str, Any]]:
    """Returns every picture with what error messages call it."""
    if not _is_nested(images):
        return [(f"Picture {index}", picture) for index, picture in enumerate(images)]
    return [
        (f"Picture {index} of row {row}", picture)
        for row, pictures in enumerate(images)
        for index, picture in enumerate(pictures)
    ]


def _lay_out(images: Any) -> list | None:
    if images is None:
        return None
    images = images if isinstance(images, list | tuple) else [images]
    nested = [isinstance(entry, list | tuple) for entry in images]
    if len(set(nested)) > 1:
        raise ValueError(
            f"`images` mixes pictures and lists: entry {nested.index(not nested[0])} is "
            f"{'a list' if not nested[0] else 'no list'}, unlike entry 0. Give a list of pictures, or a list with one "
            "list for each row of text (`[]` for a row without pictures)."
        )
    if not any(nested):
        return [picture for name, entry in _named(images) for picture in _open(entry, name)]
    rows: list[list] = [[] for _ in images]
    for row, entries in enumerate(images):
        for index, entry in enumerate(entries):
            rows[row] += _open(entry, f"Picture {index} of row {row}")
    return rows


def _open(entry: Any, name: str) -> list:
    """Opens a file, and takes a 4-D array apart."""
    if is_picture_source(entry):
        return [(tools().load_picture or load_picture)(entry, name)]
    if isinstance(entry, np.ndarray | torch.Tensor) and entry.ndim == 4:
        return list(entry)
    return [entry]


__all__ = ["MoellavaImagesKwargs", "MoellavaProcessor", "MoellavaProcessorKwargs"]
