# SPDX-License-Identifier: Apache-2.0
"""A tester for each combination of language model, tower and projector, and the suite that is run over it."""

from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from skips import skip_known
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaModel


# By these names the suite tells which class has a head, and gives it labels.
MODEL_MAPPING_NAMES["moellava"] = "MoellavaModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["moellava"] = "MoellavaForCausalLM"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["moellava"] = "MoellavaForCausalLM"


def vocab_size_at_the_top() -> AbstractContextManager:
    """Lets mixins that are there for models of text alone read the size of the vocabulary off the config."""
    vocab_size = property(lambda config: config.text_config.vocab_size)
    return patch.object(MoellavaConfig, "vocab_size", vocab_size, create=True)


class MoellavaModelTester:
    """Makes the configs and the inputs of one combination."""

    base_model_class = MoellavaModel
    causal_lm_class = MoellavaForCausalLM

    batch_size = 3
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    image_token_id = 3
    pad_token_id = 0
    image_size = 8

    def __init__(self, parent, tower, projector, sparse):
        self.parent = parent
        self.text_config = {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 40,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        self.vision_config = {
            "model_type": f"{tower}_vision_model",
            "image_size": self.image_size,
            "patch_size": 4,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        self.projector_config = {"type": projector}
        if projector == "qformer":
            self.projector_config |= {
                "num_query_tokens": 4,
                "qformer_hidden_size": 32,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
            }
        self.moe_config = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "dense"} if sparse else None
        self.num_image_tokens = self.get_config().image_seq_length
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length

    def get_config(self):
        return MoellavaConfig(
            text_config=self.text_config,
            vision_config=self.vision_config,
            projector_config=self.projector_config,
            moe_config=self.moe_config,
            image_token_id=self.image_token_id,
            vision_feature_layer=-1,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        input_ids[:, : self.num_image_tokens] = self.image_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": pixel_values,
        }
        return self.get_config(), inputs


class MoellavaModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """transformers' suite over one combination, which a subclass names."""

    all_model_classes = (MoellavaModel, MoellavaForCausalLM)
    _is_composite = True
    # The tower keeps weights that nothing here reads: CLIP's last norm, SigLIP's pooling head.
    test_all_params_have_gradient = False
    model_tester = None
    tower = projector = sparse = None

    def setUp(self):
        skip_known(self)
        self.model_tester = MoellavaModelTester(self, self.tower, self.projector, self.sparse)
        self.config_tester = ConfigTester(
            self,
            config_class=MoellavaConfig,
            has_text_modality=False,
            common_properties=["image_token_id", "vision_feature_layer", "image_seq_length"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        if self.sparse:  # as the error that refuses it otherwise tells to do
            self.model_tester.moe_config["router_aux_loss_coef"] = 0
        super().test_training_gradient_checkpointing_use_reentrant_true()

    def test_training_overfit(self):
        with vocab_size_at_the_top():
            super().test_training_overfit()
