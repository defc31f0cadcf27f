# SPDX-License-Identifier: Apache-2.0
"""The processor on real tokenizers and image processors, and the chat templates."""

import base64
import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessor,
)
from transformers.utils.chat_template_utils import render_jinja_template

from moellava.chatting.chat_templates import VICUNA_CHAT_TEMPLATE, VICUNA_SYSTEM_TEXT, multimodal_chat_template
from moellava.processing.processing_moellava import MoellavaProcessor
from moellava.saving import checkpoint


SIZE = 28
TOKENS = 4


def make_tokenizer(adds_bos=False, image_token="<image>", **kwargs):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["A chat between a curious user and an assistant.", "USER: What is in the picture? ASSISTANT: A cat."]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 5, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)
    if image_token is not None:
        tokenizer.add_tokens([AddedToken(image_token, normalized=False)], special_tokens=True)
    return tokenizer


def make_clip(**kwargs):
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, **kwargs)


def make_siglip(**kwargs):
    return SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, **kwargs)


def make_processor(image_processor=None, tokenizer=None, **kwargs):
    kwargs = {"num_image_tokens": TOKENS, "chat_template": VICUNA_CHAT_TEMPLATE, **kwargs}
    return MoellavaProcessor(image_processor or make_clip(), tokenizer or make_tokenizer(), **kwargs)


@pytest.fixture
def processor():
    return make_processor()


def picture(seed=0, size=(40, 20)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def squared(image, color):
    """LLaVA's padding, by numpy."""
    values = np.asarray(image)
    height, width, _ = values.shape
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = color
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = values
    return Image.fromarray(square)


def expected_pixels(processor, *images, color=(122, 116, 104)):
    return processor.image_processor([squared(image, color) for image in images], return_tensors="pt")["pixel_values"]


# --- Construction ---


def test_attributes(processor):
    tokenizer = processor.tokenizer
    assert processor.num_image_tokens == TOKENS
    assert processor.image_aspect_ratio == "pad"
    assert processor.image_token == "<image>"
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert processor.image_token_ids == [processor.image_token_id]
    assert processor.model_input_names == ["pixel_values", *tokenizer.model_input_names]
    assert processor.auto_map["AutoProcessor"].endswith(".MoellavaProcessor")


def test_tokenizer_without_the_image_token_is_an_error():
    with pytest.raises(ValueError, match=r"no token '<image>'.*`tokenizer.add_tokens\(\[AddedToken\('<image>'"):
        make_processor(tokenizer=make_tokenizer(image_token=None))
    # With an unknown token, every text has an id.
    tokenizer = make_tokenizer(image_token=None, unk_token="<unk>")
    with pytest.raises(ValueError, match="no token '<image>'"):
        make_processor(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no token ''"):
        make_processor(image_token="")


def test_another_image_token():
    processor = make_processor(tokenizer=make_tokenizer(image_token="<|pic|>"), image_token="<|pic|>")
    ids = processor(images=picture(), text="<|pic|>")["input_ids"]
    assert ids == [[processor.tokenizer.convert_tokens_to_ids("<|pic|>")] * TOKENS]


@pytest.mark.parametrize("number", [None, 0, -3, 2.0, "4", True])
def test_bad_number_of_image_tokens(number):
    with pytest.raises(ValueError, match="`num_image_tokens` is .*; expected how many tokens"):
        make_processor(num_image_tokens=number)


def test_bad_aspect_ratio():
    with pytest.raises(ValueError, match="Unknown image_aspect_ratio 'anyres'. Known: pad, square."):
        make_processor(image_aspect_ratio="anyres")


def test_missing_parts_and_unknown_arguments():
    with pytest.raises(TypeError, match="image_processor"):
        MoellavaProcessor(None, make_tokenizer(), num_image_tokens=4)
    with pytest.raises(TypeError, match="tokenizer"):
        MoellavaProcessor(make_clip(), None, num_image_tokens=4)
    with pytest.raises(TypeError, match="patch_size"):
        make_processor(patch_size=14)


# --- Text and pictures ---


def test_each_placeholder_becomes_the_number_of_image_tokens(processor):
    text = "<image>\nWhat is it?"
    output = processor(images=picture(), text=text, return_tensors="pt")
    image_id = processor.image_token_id
    rest = processor.tokenizer("\nWhat is it?", add_special_tokens=False)["input_ids"]
    assert output["input_ids"].tolist() == [[image_id] * TOKENS + rest]
    assert output["attention_mask"].tolist() == [[1] * (TOKENS + len(rest))]
    assert set(output) == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize("images", [None, []])
def test_text_only(processor, images):
    output = processor(images=images, text="What is it?")
    assert output["input_ids"] == [processor.tokenizer("What is it?")["input_ids"]]
    assert "pixel_values" not in output
    assert len(processor(text=["What", "is it?"])["input_ids"]) == 2


def test_pictures_only(processor):
    output = processor(images=[picture(0), picture(1)], return_tensors="pt")
    assert set(output) == {"pixel_values"}
    assert torch.equal(output["pixel_values"], expected_pixels(processor, picture(0), picture(1)))
    nested = processor(images=[[picture(0)], [picture(1)]], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], output["pixel_values"])


@pytest.mark.parametrize("images", [None, [], [[], []]])
def test_nothing_is_an_error(processor, images):
    with pytest.raises(ValueError, match="needs `images`, `text` or both"):
        processor(images=images)


def test_return_tensors(processor):
    call = {"images": picture(), "text": "<image>"}
    assert isinstance(processor(**call)["input_ids"], list)
    assert isinstance(processor(**call, return_tensors="np")["input_ids"], np.ndarray)
    output = processor(**call, return_tensors="pt")
    assert output["input_ids"].dtype == torch.int64
    assert output["pixel_values"].shape == (1, 3, SIZE, SIZE)


def test_batch_of_different_rows(processor):
    text = ["<image>\nWhat?", "No picture here, but more text.", "<image> and <image>"]
    images = [[picture(0)], [], [picture(1, (20, 40)), picture(2)]]
    output = processor(images=images, text=text, padding=True, return_tensors="pt", return_mm_token_type_ids=True)
    ids, mask = output["input_ids"], output["attention_mask"]
    image_mask = ids == processor.image_token_id
    assert image_mask.sum(1).tolist() == [TOKENS, 0, 2 * TOKENS]
    assert torch.equal(output["mm_token_type_ids"], image_mask.long())
    assert torch.equal(output["pixel_values"], expected_pixels(processor, picture(0), picture(1, (20, 40)), picture(2)))
    # Padded on the tokenizer's side, and each row is what it is alone.
    for row in range(3):
        alone = processor(images=images[row], text=text[row])["input_ids"][0]
        assert ids[row][mask[row].bool()].tolist() == alone
        assert mask[row].tolist() == sorted(mask[row].tolist())


def test_flat_and_nested_pictures_give_the_same(processor):
    text = ["<image>", "none", "<image><image>"]
    images = [picture(seed) for seed in range(3)]
    flat = processor(images=images, text=text, padding=True, return_tensors="pt")
    nested = processor(images=((images[0],), (), tuple(images[1:])), text=text, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[key], nested[key]) for key in flat)


def test_padding_is_off_by_default_and_the_tokenizer_is_left_alone():
    for side in ("left", "right"):
        processor = make_processor(tokenizer=make_tokenizer(padding_side=side))
        ids = processor(text=["What", "What is in the picture?"])["input_ids"]
        assert len(ids[0]) != len(ids[1])
        padded = processor(text=["What", "What is in the picture?"], padding=True)["attention_mask"][0]
        assert padded[0 if side == "left" else -1] == 0
        assert processor.tokenizer.padding_side == side


def test_special_tokens_are_the_tokenizers_choice():
    processor = make_processor(tokenizer=make_tokenizer(adds_bos=True))
    bos = processor.tokenizer.bos_token_id
    assert processor(images=picture(), text="<image>")["input_ids"] == [[bos] + [processor.image_token_id] * TOKENS]
    assert processor(text="What", add_special_tokens=False)["input_ids"][0][0] != bos


def test_token_type_ids_are_dropped():
    names = ["input_ids", "token_type_ids", "attention_mask"]
    processor = make_processor(tokenizer=make_tokenizer(model_input_names=names))
    assert "token_type_ids" in processor.tokenizer("What")
    assert "token_type_ids" not in processor(text="What")
    assert "token_type_ids" not in processor.model_input_names


def test_caller_arguments_are_not_changed(processor):
    text, image = ["<image> what"], picture()
    images = [[image]]
    before = np.asarray(image).copy()
    processor(images=images, text=text)
    assert text == ["<image> what"] and images[0][0] is image
    assert (np.asarray(image) == before).all()


def test_video_and_audio_are_refused(processor):
    with pytest.raises(ValueError, match="video and audio are not supported"):
        processor(text="What", videos=[np.zeros((2, 8, 8, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match="video and audio are not supported"):
        processor(text="What", audio=[np.zeros(100)])


def test_text_that_is_no_text(processor):
    with pytest.raises(ValueError, match="`text` must be a string or a list of strings"):
        processor(text=[["What", "is"]])


def test_decoding(processor):
    ids = processor(images=picture(), text="<image>\nWhat is it?")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["\nWhat is it?"]
    assert processor.decode(ids[0]) == "<image>" * TOKENS + "\nWhat is it?"
    assert processor.post_process_image_text_to_text(torch.tensor(ids)) == ["\nWhat is it?"]


def test_serving_engines_can_ask_for_counts(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [4000, 3]], image_aspect_ratio="square")
    assert counts["num_image_tokens"] == [TOKENS, TOKENS]
    assert counts["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None
    assert processor.replace_image_token({}, image_idx=3) == "<image>" * TOKENS


# --- Counts that do not fit ---


def test_counts_in_total(processor):
    with pytest.raises(ValueError, match=r"The text has 2 <image> placeholder\(s\), but 1 picture\(s\) were given"):
        processor(images=picture(), text="<image> <image>")
    with pytest.raises(ValueError, match=r"has 1 <image> placeholder\(s\), but 3 picture\(s\)"):
        processor(images=[picture()] * 3, text=["<image>", "none"])
    with pytest.raises(ValueError, match=r"has 0 <image> placeholder\(s\), but 1 picture\(s\)"):
        processor(images=picture(), text="none")
    for images in (None, []):
        with pytest.raises(ValueError, match=r"has 1 <image> placeholder\(s\), but 0 picture\(s\)"):
            processor(images=images, text="<image>")


def test_counts_row_by_row(processor):
    # The total fits, the rows do not.
    with pytest.raises(ValueError, match=r"Row 1 of the text has 2 <image> .*, but 1 picture\(s\)"):
        processor(images=[[picture()], [picture()], [picture()]], text=["<image>", "<image><image>", "none"])
    with pytest.raises(ValueError, match=r"Row 0 of the text has 1 <image> .*, but 0 picture\(s\)"):
        processor(images=[[]], text="<image>")
    with pytest.raises(ValueError, match=r"`images` has 2 row\(s\) of pictures, but `text` has 1 row\(s\)"):
        processor(images=[[picture()], [picture()]], text="<image><image>")


def test_truncation_through_a_picture_is_an_error(processor):
    text = "<image>" + "\nWhat is in the picture?" * 5
    with pytest.raises(ValueError, match=r"Mismatch in `image` token count.*ids=\[3\] and text=\[4\].*truncation"):
        processor(images=picture(), text=text, truncation=True, max_length=3)
    kept = processor(images=picture(), text=text, truncation=True, max_length=TOKENS + 2)["input_ids"][0]
    assert len(kept) == TOKENS + 2 and kept.count(processor.image_token_id) == TOKENS


# --- What counts as a picture ---


def test_every_kind_of_picture(processor, tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    image.save(path)
    values = np.asarray(image)
    text = base64.b64encode(path.read_bytes()).decode()
    expected = expected_pixels(processor, image)
    sources = [
        image,
        path,
        str(path),
        text,
        f"data:image/png;base64,{text}",
        values,
        values.transpose(2, 0, 1),
        (values / 255).astype(np.float32),
        torch.tensor(values).permute(2, 0, 1),
        torch.tensor(values / 255).permute(2, 0, 1),
        values.astype(np.uint16) * 257,
    ]
    for source in sources:
        for images in (source, [source], [[source]]):
            output = processor(images=images, text="<image>", return_tensors="pt")
            assert torch.equal(output["pixel_values"], expected)


def test_all_kinds_in_one_batch(processor, tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    grey = np.asarray(image)[:, :, 0]
    images = [image, tmp_path / "a.png", grey, torch.tensor(grey), Image.fromarray(grey).convert("LA")]
    output = processor(images=images, text="<image>" * 5, return_tensors="pt")
    grey_image = Image.fromarray(grey).convert("RGB")
    assert torch.equal(
        output["pixel_values"], expected_pixels(processor, image, image, grey_image, grey_image, grey_image)
    )


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_4d_array_is_a_list_of_pictures(processor, make):
    values = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    expected = expected_pixels(processor, *(picture(seed) for seed in range(3)))
    for images in (make(values), [make(values)], [[make(values)]]):
        output = processor(images=images, text="<image><image><image>", return_tensors="pt")
        assert torch.equal(output["pixel_values"], expected)


def test_16_bit_pictures_are_not_clipped(processor):
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    grey = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) * 255 / (SIZE * SIZE - 1)).round().astype(np.uint8)
    output = processor(images=Image.fromarray(values), return_tensors="pt")["pixel_values"]
    expected = processor.image_processor(Image.fromarray(grey).convert("RGB"), return_tensors="pt")["pixel_values"]
    # One step of 255, normalised.
    assert (output - expected).abs().max() <= 1.01 / 255 / min(processor.image_processor.image_std)


def test_input_data_format_settles_ambiguous_arrays(processor):
    values = np.random.default_rng(0).integers(0, 256, (3, 20, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="Picture 0 of row 0 has shape .*input_data_format"):
        processor(images=[[values]], text="<image>")
    last = processor(images=values, return_tensors="pt", input_data_format="channels_last")
    assert torch.equal(last["pixel_values"], expected_pixels(processor, Image.fromarray(values)))
    first = processor(images=values, return_tensors="pt", images_kwargs={"input_data_format": "channels_first"})
    image = Image.fromarray(values.transpose(1, 2, 0).copy())
    assert torch.equal(first["pixel_values"], expected_pixels(processor, image))


def test_unusable_pictures_are_named_with_their_place(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="Picture 1 of row 2: there is no file 'gone.png'"):
        processor(images=[[], [], [picture(), "gone.png"]], text=["a", "b", "<image><image>"])
    broken = tmp_path / "broken.jpg"
    picture().save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"Picture 2 \('.*broken.jpg'\) cannot be decoded: OSError"):
        processor(images=[picture(), picture(), broken], text="<image><image><image>")
    with pytest.raises(TypeError, match="Picture 1 is of type NoneType; expected a PIL picture"):
        processor(images=[picture(), None], text="<image><image>")
    with pytest.raises(ValueError, match="Picture 0 holds floats from -3 to 3"):
        processor(images=np.array([[-3.0, 3.0]]), text="<image>")


def test_mixed_nesting_is_an_error(processor):
    with pytest.raises(ValueError, match="`images` mixes pictures and lists: entry 1 is a list, unlike entry 0"):
        processor(images=[picture(), []], text=["<image>", "none"])
    with pytest.raises(ValueError, match="entry 2 is no list, unlike entry 0"):
        processor(images=[[], [picture()], picture()], text=["a", "<image>", "<image>"])


# --- Aspect ratio ---


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (31, 20), (30, 30)])
@pytest.mark.parametrize("make, color", [(make_clip, (122, 116, 104)), (make_siglip, (127, 127, 127))])
def test_aspect_ratios(make, color, size):
    image = picture(3, size)
    padded = make_processor(make())
    expected = expected_pixels(padded, image, color=color)
    plain = padded.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(padded(images=image, return_tensors="pt")["pixel_values"], expected)
    square = make_processor(make(), image_aspect_ratio="square")
    assert torch.equal(square(images=image, return_tensors="pt")["pixel_values"], plain)
    if size[0] != size[1]:
        assert not torch.equal(expected, plain)


def test_aspect_ratio_for_one_call(processor):
    image = picture()
    plain = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    conversation = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    outputs = [
        processor(images=image, return_tensors="pt", image_aspect_ratio="square"),
        processor(images=image, return_tensors="pt", images_kwargs={"image_aspect_ratio": "square"}),
        processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"image_aspect_ratio": "square"},
        ),
    ]
    assert all(torch.equal(output["pixel_values"], plain) for output in outputs)
    again = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(again, expected_pixels(processor, image)), "the next call is as configured"
    square = make_processor(image_aspect_ratio="square")
    padded = square(images=image, return_tensors="pt", image_aspect_ratio="pad")["pixel_values"]
    assert torch.equal(padded, again)
    with pytest.raises(ValueError, match="Unknown image_aspect_ratio 'stretch'. Known: pad, square."):
        processor(images=image, image_aspect_ratio="stretch")


def test_padding_colour_follows_the_mean_of_the_call(processor):
    image = picture()
    output = processor(images=image, return_tensors="pt", image_mean=[0.1, 0.2, 0.999])
    padded = squared(image, (25, 51, 254))
    expected = processor.image_processor(padded, return_tensors="pt", image_mean=[0.1, 0.2, 0.999])
    assert torch.equal(output["pixel_values"], expected["pixel_values"])


class MeanlessImageProcessor(CLIPImageProcessor):
    image_mean = None
    do_normalize = False


def test_image_processor_without_a_mean_pads_with_black():
    image_processor = MeanlessImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_normalize=False
    )
    processor = make_processor(image_processor)
    output = processor(images=picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(output, expected_pixels(processor, picture(), color=(0, 0, 0)))


def test_image_processor_of_the_pil_backend(tmp_path):
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = make_processor(image_processor)
    output = processor(images=[picture(), np.asarray(picture())], text="<image><image>", return_tensors="pt")
    assert torch.equal(output["pixel_values"], expected_pixels(processor, picture(), picture()))
    scaled = np.asarray(picture()).astype(np.float32) / 255
    scaled = processor(images=scaled, return_tensors="pt", do_rescale=False)["pixel_values"]
    assert (scaled - output["pixel_values"][:1]).abs().max() < 0.03


# --- Values that are scaled already ---


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_scaled_floats_are_not_rescaled(processor, as_tensor, aspect_ratio):
    # Smooth, and far from 0 and 255: where resizing overshoots, 8-bit values are cut and floats not.
    image = Image.fromarray(np.linspace(60, 190, 40 * 20 * 3).astype(np.uint8).reshape(20, 40, 3))
    values = np.asarray(image).astype(np.float32) / 255
    scaled = torch.tensor(values).permute(2, 0, 1) if as_tensor else values
    output = processor(images=scaled, return_tensors="pt", do_rescale=False, image_aspect_ratio=aspect_ratio)
    expected = processor(images=image, return_tensors="pt", image_aspect_ratio=aspect_ratio)
    # The image processor rounds 8-bit values after resizing, and not floats.
    assert (output["pixel_values"] - expected["pixel_values"]).abs().max() < 0.03


def test_scaled_and_normalised_values_go_through_unchanged(processor):
    values = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    call = {"do_rescale": False, "do_normalize": False, "do_resize": False, "return_tensors": "pt"}
    assert torch.equal(processor(images=values, **call)["pixel_values"][0], values)
    with pytest.raises(ValueError, match=r"Picture 0 is 28x14 pixels.*scale that is not known.*='square'"):
        processor(images=values[:, :14], **call)


def test_image_processor_configured_not_to_rescale():
    processor = make_processor(make_siglip(do_rescale=False))
    values = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    output = processor(images=values, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(output, (values - 0.5) / 0.5)


# --- Chat ---


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
# Renames messages, uses a macro that reads them, keys besides role and content, and names of its own.
TOOLS = """{%- macro how_many() -%}{{ messages | length }} {{ messages[0].role }}{%- endmacro -%}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- set ns = namespace(tool_calls=0, last='') %}
[{{ how_many() }}] {{ system_message }}
{% for message in messages %}
  {% if message.tool_calls is defined and message.tool_calls %}
    {% set ns.tool_calls = ns.tool_calls + 1 %}
<call>{{ message.tool_calls | tojson }}</call>
  {% elif message.content is string %}
<{{ message.role }}{% if 'name' in message %} {{ message['name'] }}{% endif %}>{{ message.content }}
  {% else %}
<{{ message.role }} says nothing>
  {% endif %}
  {% set ns.last = message.role %}
{% endfor %}
{{ ns.tool_calls }} {{ ns.last }} {{ tools | length if tools else 'no tools' }}
{%- if add_generation_prompt %} go{% endif %}

"""
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'A: ' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)
LEADING = {
    "newlines": "\n\n" + CHATML,
    "newline and indented block": "\n   {% if true %}\n   x\n   {% endif %}\n" + ZEPHYR,
    "indented block": "   {% if true %}\n y {% endif %}" + CHATML,
    "indented text": "   text {{ messages[0]['content'] }}",
    "stripping tag": "  \n {%- if true %} z{% endif %}" + LLAMA_2,
    "expression": "{{ bos_token }}\n" + ZEPHYR,
    "stripping expression": "\n  {{- bos_token }}\n" + ZEPHYR,
    "comment": "{# a comment #}\n\n  {# another #}  \n" + ZEPHYR,
    "crlf": "\r\n" + ZEPHYR.replace("\n", "\r\n"),
    "raw": "{% raw %}{{ no }}{% endraw %}\n" + CHATML,
    "plain text": "Hello {{ messages[0]['content'] }}\n",
    "empty": "",
    "newline alone": "\n",
    "space alone": "  ",
}
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA_2,
    "zephyr": ZEPHYR,
    "tools": TOOLS,
    "generation": GENERATION,
    **LEADING,
}

SYSTEM = {"role": "system", "content": "  Be <b>brief</b>. "}
TURNS = [
    {"role": "user", "content": " What is {{ this }}?\n"},
    {"role": "assistant", "content": "A cat.\n\n"},
    {"role": "user", "content": "[1, 2] and ünï ' \" \\n", "name": "Zoë"},
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]}
CONVERSATIONS = {
    "one turn": TURNS[:1],
    "three turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "empty texts": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
}


def render(template, conversation, add_generation_prompt=False, **kwargs):
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", **kwargs}
    return render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=add_generation_prompt, **kwargs
    )[0][0]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_renders_as_with_the_tokenizers_own_template(template, conversation, add_generation_prompt):
    own, conversation = TEMPLATES[template], CONVERSATIONS[conversation]
    wrapped = multimodal_chat_template(own)
    expected = render(own, conversation, add_generation_prompt)
    assert render(wrapped, conversation, add_generation_prompt) == expected
    # Contents of one text part are the same too.
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in conversation]
    assert render(wrapped, parts, add_generation_prompt) == expected


def test_other_keys_of_messages_and_missing_contents_are_kept():
    conversation = [*TURNS, CALL, {"role": "tool", "content": "7", "name": "f"}, {"role": "assistant"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    expected = render(TOOLS, conversation, tools=tools)
    assert "says nothing" in expected and "<tool f>7" in expected and '"arguments": {"a": [1]}' in expected
    assert render(multimodal_chat_template(TOOLS), conversation, tools=tools) == expected
    # A list in one message does not cost another key either.
    conversation[2] = {**conversation[2], "content": [{"type": "text", "text": conversation[2]["content"]}]}
    assert render(multimodal_chat_template(TOOLS), conversation, tools=tools) == expected


@pytest.mark.parametrize("template", ["chatml", "llama2", "zephyr", "tools", "generation"])
def test_pictures_are_rendered_in_place(template):
    template = TEMPLATES[template]
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "path": "a.png"},
                {"type": "text", "text": "Before "},
                {"type": "text", "text": "and after: "},
                {"type": "image"},
                "same?",
            ],
        },
        {"role": "assistant", "content": ({"type": "text", "text": "Yes."},)},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"text": "And this?"}]},
    ]
    as_text = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nBefore and after: <image>\nsame?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "<image>\nAnd this?"},
    ]
    assert render(multimodal_chat_template(template), conversation) == render(template, as_text)


def test_unknown_parts_are_an_error():
    conversation = [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]
    with pytest.raises(jinja2.TemplateError, match='part of type "video"; expected "text" or "image"'):
        render(multimodal_chat_template(CHATML), conversation)


@pytest.mark.parametrize("image_token", ["<img>", "<it's>", 'a"b', "back\\slash", "ünï"])
def test_other_image_tokens_in_templates(image_token):
    template = multimodal_chat_template(CHATML, image_token)
    assert f"user\n{image_token}\nx<|im_end|>" in render(
        template, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    )


# Templates that know parts: with the same token for pictures, with another one, and for lists alone.
PARTS_BODY = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
)
PARTS_ONLY = "{% for message in messages %}{{ message['role'] + ': ' }}" + PARTS_BODY + "{% endfor %}"
PARTS_OR_TEXT = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}" + PARTS_BODY + "{% endif %}{% endfor %}"
)


def test_template_that_writes_the_image_token_is_kept():
    for template in (PARTS_ONLY, PARTS_OR_TEXT):
        native = template.replace("IMAGE", "<image>")
        assert multimodal_chat_template(native) == native


def test_template_that_writes_another_image_token():
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert render(multimodal_chat_template(PARTS_OR_TEXT), question) == "user: <image>\nWhat?"
    with pytest.raises(ValueError, match="writes no '<image>' for a picture, and it leaves out .* plain text"):
        multimodal_chat_template(PARTS_ONLY)


def test_several_templates_and_wrapping_twice():
    wrapped = multimodal_chat_template({"default": CHATML, "rag": ZEPHYR})
    assert wrapped == {"default": multimodal_chat_template(CHATML), "rag": multimodal_chat_template(ZEPHYR)}
    assert multimodal_chat_template(wrapped) == wrapped
    assert multimodal_chat_template(None) == VICUNA_CHAT_TEMPLATE
    with pytest.raises(TypeError, match="`tokenizer_template` is of type int"):
        multimodal_chat_template(3)


def test_vicuna_form():
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    assert VICUNA_SYSTEM_TEXT == system
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    first = f"{system} USER: <image>\nWhat is it?"
    assert render(VICUNA_CHAT_TEMPLATE, [question], True) == f"{first} ASSISTANT:"
    assert render(VICUNA_CHAT_TEMPLATE, [question]) == first
    dialogue = [question, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    expected = f"{first} ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert render(VICUNA_CHAT_TEMPLATE, dialogue, True) == expected
    assert render(VICUNA_CHAT_TEMPLATE, dialogue[:2]) == f"{first} ASSISTANT: A cat.</s>"
    other_eos = render(VICUNA_CHAT_TEMPLATE, dialogue, True, eos_token="<|endoftext|>")
    assert other_eos == expected.replace("</s>", "<|endoftext|>")
    own = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *dialogue]
    assert render(VICUNA_CHAT_TEMPLATE, own, True) == expected.replace(system, "Be brief.")
    none = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]
    assert render(VICUNA_CHAT_TEMPLATE, none, True) == "USER: Hi ASSISTANT:"
    assert render(VICUNA_CHAT_TEMPLATE, [], True) == f"{system} ASSISTANT:"


def test_vicuna_errors():
    with pytest.raises(jinja2.TemplateError, match="Only the first message can be a system message"):
        render(VICUNA_CHAT_TEMPLATE, [TURNS[0], SYSTEM])
    with pytest.raises(jinja2.TemplateError, match='has the role "tool"; expected "system", "user" or "assistant"'):
        render(VICUNA_CHAT_TEMPLATE, [{"role": "tool", "content": "x"}])
    with pytest.raises(jinja2.TemplateError, match="the tokenizer has none"):
        render(VICUNA_CHAT_TEMPLATE, TURNS, eos_token=None)


def chat(*parts, answer=None):
    conversation = [{"role": "user", "content": list(parts)}]
    if answer is not None:
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return conversation


def test_chat_with_pictures_from_everywhere(processor, tmp_path):
    path = tmp_path / "a.png"
    picture().save(path)
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    expected = processor(
        images=picture(), text=f"{VICUNA_SYSTEM_TEXT} USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
    )
    for part in (
        {"type": "image", "image": picture()},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "url": str(path)},
        {"type": "image", "base64": url},
        {"type": "image", "image": np.asarray(picture())},
        {"type": "image_url", "image_url": {"url": url}},
    ):
        conversation = chat(part, {"type": "text", "text": "What?"})
        output = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert set(output) == {"input_ids", "attention_mask", "pixel_values"}
        assert all(torch.equal(output[key], expected[key]) for key in expected)


def test_batched_chat(processor):
    conversations = [
        chat({"type": "image", "image": picture(0)}, {"type": "text", "text": "What?"}),
        [{"role": "user", "content": "Only text, and rather more of it"}],
        [
            *chat({"type": "image", "image": picture(1)}, answer="A cat."),
            *chat({"type": "text", "text": "And"}, {"type": "image", "image": picture(2)}),
        ],
    ]
    output = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    assert torch.equal(output["pixel_values"], expected_pixels(processor, *(picture(seed) for seed in range(3))))
    assert (output["input_ids"] == processor.image_token_id).sum(1).tolist() == [TOKENS, 0, 2 * TOKENS]
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"][0]
        assert output["input_ids"][row][output["attention_mask"][row].bool()].tolist() == alone
    text_only = processor.apply_chat_template(
        [conversations[1]], tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    assert set(text_only) == {"input_ids", "attention_mask"}


def test_chat_without_tokenizing_is_text(processor):
    conversation = chat({"type": "image"}, {"type": "text", "text": "What?"})
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == f"{VICUNA_SYSTEM_TEXT} USER: <image>\nWhat? ASSISTANT:"
    assert processor.apply_chat_template([conversation] * 2, add_generation_prompt=True) == [text] * 2


def test_bos_is_not_doubled():
    """A template that writes bos_token, on a tokenizer that adds it too."""
    tokenizer = make_tokenizer(adds_bos=True)
    processor = make_processor(tokenizer=tokenizer, chat_template=multimodal_chat_template(LLAMA_2))
    conversation = chat({"type": "image", "image": picture()}, {"type": "text", "text": "What?"})
    ids = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    # Vicuna's form does not write it, so the tokenizer's counts.
    processor = make_processor(tokenizer=tokenizer)
    ids = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [VICUNA_CHAT_TEMPLATE, multimodal_chat_template(GENERATION)])
def test_assistant_tokens_mask(template):
    processor = make_processor(chat_template=template)
    conversation = [
        *chat({"type": "image", "image": picture()}, {"type": "text", "text": "What?"}, answer="A cat."),
        *chat({"type": "text", "text": "Sure?"}, {"type": "image", "image": picture()}, answer="Yes."),
    ]
    output = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    ids, mask = output["input_ids"][0], output["assistant_masks"][0].bool()
    # The space before an answer belongs to its first token.
    assert processor.decode(ids[mask]).replace(" ", "") == "Acat.</s>Yes.</s>"


def test_continue_final_message(processor):
    conversation = chat({"type": "image", "image": picture()}, answer="A cat on")
    text = processor.apply_chat_template(conversation, continue_final_message=True)
    assert text.endswith("USER: <image>\n ASSISTANT: A cat on")


def test_placeholder_written_by_the_user_is_counted(processor):
    conversation = chat({"type": "image", "image": picture()}, {"type": "text", "text": "What is <image>?"})
    with pytest.raises(ValueError, match=r"Row 0 of the text has 2 <image> placeholder\(s\), but 1 picture\(s\)"):
        processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters,
    reason="this transformers cannot sanitize",
)
def test_sanitized_placeholder_stays_text(processor):
    conversation = chat({"type": "image", "image": picture()}, {"type": "text", "text": "What is <image>?"})
    output = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
    )
    assert (output["input_ids"] == processor.image_token_id).sum() == TOKENS
    assert processor.decode(output["input_ids"][0], skip_special_tokens=True).endswith("What is <image>?")


# --- Saving ---


def test_round_trip(tmp_path):
    templates = {"default": VICUNA_CHAT_TEMPLATE, "short": multimodal_chat_template(CHATML)}
    for template in (VICUNA_CHAT_TEMPLATE, templates, None):
        processor = make_processor(
            make_siglip(), num_image_tokens=np.int64(9), image_aspect_ratio="square", chat_template=template
        )
        folder = tmp_path / str(type(template).__name__) / "deeper"
        files = processor.save_pretrained(folder)
        assert files == [str(folder / "processor_config.json")] and Path(files[0]).is_file()
        again = MoellavaProcessor.from_pretrained(folder)
        assert (again.num_image_tokens, again.image_aspect_ratio, again.image_token) == (9, "square", "<image>")
        assert again.chat_template == template
        assert again.image_token_id == processor.image_token_id
        assert again.to_dict() == processor.to_dict()
        call = {"images": picture(), "text": "<image> what", "return_tensors": "pt"}
        expected = processor(**call)
        assert all(torch.equal(value, expected[key]) for key, value in again(**call).items())


def test_arguments_can_be_given_when_loading(tmp_path):
    make_processor().save_pretrained(tmp_path)
    again = MoellavaProcessor.from_pretrained(tmp_path, num_image_tokens=5, image_aspect_ratio="square")
    assert (again.num_image_tokens, again.image_aspect_ratio) == (5, "square")


def test_saved_folder_names_its_code_and_keeps_what_was_there(tmp_path, processor):
    (tmp_path / "notes.txt").write_text("mine")
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["auto_map"] == processor.auto_map
    assert config["processor_class"] == "MoellavaProcessor"
    file, _, name = config["auto_map"]["AutoProcessor"].partition(".")
    assert name == "MoellavaProcessor" and name in (tmp_path / f"{file}.py").read_text()
    for module in ("processing_moellava.py", "images_moellava.py"):
        source = (tmp_path / module).read_text()
        assert "from .." not in source
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(tmp_path.parent.glob("*.saving")) == []


def test_interrupted_save_leaves_the_earlier_checkpoint(tmp_path, processor, monkeypatch):
    folder = tmp_path / "model"
    processor.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "export_code", fail)
    with pytest.raises(OSError, match="disk full"):
        make_processor(num_image_tokens=77).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_auto_class_registration_does_not_bring_back_transformers_copier(tmp_path, processor):
    MoellavaProcessor.register_for_auto_class()
    MoellavaProcessor.register_for_auto_class("AutoProcessor")
    assert MoellavaProcessor._auto_class is None
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["auto_map"] == processor.auto_map


def test_push_comes_after_the_save(tmp_path, processor, monkeypatch):
    pushed = []

    def push(self, repo_id, **kwargs):
        pushed.append((repo_id, kwargs, (tmp_path / "model" / "processor_config.json").is_file()))

    monkeypatch.setattr(ProcessorMixin, "push_to_hub", push)
    processor.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/mine", private=True)
    processor.save_pretrained(str(tmp_path / "model") + "/", push_to_hub=True)
    assert pushed == [("me/mine", {"private": True}, True), ("model", {}, True)]


LOAD_ELSEWHERE = """
import sys
sys.modules["moellava"] = None  # as if it were not installed
from transformers import AutoProcessor
first, second = sys.argv[1:]
processor = AutoProcessor.from_pretrained(first, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
processor.save_pretrained(second)
again = AutoProcessor.from_pretrained(second, trust_remote_code=True)
assert again.to_dict() == processor.to_dict()
from PIL import Image
output = again(images=Image.new("RGB", (9, 4)), text="<image> what", return_tensors="pt")
print(output["input_ids"].tolist(), list(output["pixel_values"].shape))
"""


def test_loads_and_saves_where_the_package_is_not_installed(tmp_path, processor):
    first, second = tmp_path / "first", tmp_path / "second"
    processor.save_pretrained(first)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(first), str(second)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    expected = processor(images=Image.new("RGB", (9, 4)), text="<image> what", return_tensors="pt")
    assert done.stdout.split("\n")[-2] == f"{expected['input_ids'].tolist()} [1, 3, {SIZE}, {SIZE}]"
    code = {path.name: path.read_text() for path in first.glob("*.py")}
    assert code == {path.name: path.read_text() for path in second.glob("*.py")}


def test_picture_file_objects_are_refused_clearly(processor):
    with pytest.raises(TypeError, match="Picture 0 is of type BytesIO; expected a PIL picture"):
        processor(images=io.BytesIO(b"..."))
