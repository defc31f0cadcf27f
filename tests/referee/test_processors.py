# SPDX-License-Identifier: Apache-2.0
"""transformers' common tests of processors over ours, with CLIP's and SigLIP's image processors."""

import shutil
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import torch
from older_reference import expand2square
from parts import Parts
from skips import skip_known
from tests.test_processing_common import ProcessorTesterMixin

from moellava import MoellavaProcessor, load_pretrained_model


class MoellavaProcessorTest(ProcessorTesterMixin):
    """transformers' suite over the processor of a checkpoint that is assembled for it."""

    processor_class = MoellavaProcessor
    tower = image_aspect_ratio = None

    @classmethod
    def setUpClass(cls):
        cls.root = Path(tempfile.mkdtemp())
        parts = Parts(cls.root)
        model, *_ = load_pretrained_model(
            parts.language_model("llama", tokenizer={"chat_template": "llava"}),
            mm_vision_tower=parts.vision_tower(cls.tower),
        )
        cls.fields = {
            "num_image_tokens": model.processor.num_image_tokens,
            "image_aspect_ratio": cls.image_aspect_ratio,
        }
        cls.model_id = str(cls.root / "processor")
        model.processor.save_pretrained(cls.model_id)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.root)

    def setUp(self):
        skip_known(self)

    @classmethod
    def prepare_processor_dict(cls):
        return cls.fields

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        # That it is refused, with an error of the same type: the words are ours, which name the row.
        with patch.object(self, "assertRaisesRegex", lambda error, _: self.assertRaises(error)):
            super().test_if_input_has_mismatching_tokens_and_mm_data()

    def test_tokenizer_decode_defaults(self):
        # The suite makes a processor without `num_image_tokens`, which ours does not do without.
        processor = self.get_processor()
        ids = [[1, 4, 5, 8, 1, 0, 8], [3, 4, 3, 1, 1, 8, 9]]
        assert processor.batch_decode(ids) == processor.tokenizer.batch_decode(ids)

    def test_pictures_are_the_image_processors(self):
        processor, pictures = self.get_processor(), self.prepare_images_inputs(2)
        given = pictures
        if self.image_aspect_ratio == "pad":
            given = [expand2square(picture, processor.image_processor.image_mean) for picture in pictures]
        expected = processor.image_processor(given, return_tensors="pt")["pixel_values"]
        assert torch.equal(processor(images=pictures, return_tensors="pt")["pixel_values"], expected)

    def test_pictures_have_their_tokens(self):
        processor = self.get_processor()
        inputs = processor(
            images=self.prepare_images_inputs(2), text=self.prepare_text_inputs(2, "image"), padding=True
        )
        tokens = [row.count(processor.image_token_id) for row in inputs["input_ids"]]
        assert tokens == [processor.num_image_tokens] * 2


class ClipPadProcessorTest(MoellavaProcessorTest, unittest.TestCase):
    tower, image_aspect_ratio = "clip", "pad"


class ClipSquareProcessorTest(MoellavaProcessorTest, unittest.TestCase):
    tower, image_aspect_ratio = "clip", "square"


class SiglipPadProcessorTest(MoellavaProcessorTest, unittest.TestCase):
    tower, image_aspect_ratio = "siglip", "pad"


class SiglipSquareProcessorTest(MoellavaProcessorTest, unittest.TestCase):
    tower, image_aspect_ratio = "siglip", "square"
