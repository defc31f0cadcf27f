# SPDX-License-Identifier: Apache-2.0
"""transformers' common tests of pipelines over checkpoints of ours."""

import os
import shutil
import unittest
from pathlib import Path

from parts import Parts
from tests.test_pipeline_mixin import PipelineTesterMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from moellava import MoellavaForCausalLM, load_pretrained_model


# By this name the suite loads the processor.
PROCESSOR_MAPPING_NAMES["moellava"] = "AutoProcessor"

QFORMER = {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32, "num_hidden_layers": 1}


class MoellavaPipelineTest(PipelineTesterMixin):
    """The suite over one combination, assembled where the suite looks for it."""

    pipeline_model_mapping = {"image-text-to-text": MoellavaForCausalLM}
    tower = projector_config = moe_config = None

    @classmethod
    def setUpClass(cls):
        root = Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"])
        cls.folder = root / "moellava" / "MoellavaForCausalLM"
        parts = Parts(root / "parts")
        model, *_ = load_pretrained_model(
            parts.language_model("llama", with_chat_template=True),
            mm_vision_tower=parts.vision_tower(cls.tower),
            projector_config=cls.projector_config,
            moe_config=cls.moe_config,
        )
        model.save_pretrained(cls.folder)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)


for _name in dir(PipelineTesterMixin):  # the other tasks are none of this model's
    if _name.startswith("test_pipeline_") and "image_text_to_text" not in _name:
        setattr(MoellavaPipelineTest, _name, None)


class DenseClipMlpPipelineTest(MoellavaPipelineTest, unittest.TestCase):
    tower, projector_config = "clip", {"type": "mlp"}


class SparseSiglipQformerPipelineTest(MoellavaPipelineTest, unittest.TestCase):
    tower, projector_config, moe_config = "siglip", QFORMER, {"num_experts": 4, "layers": "sparse"}
