# SPDX-License-Identifier: Apache-2.0
"""What a model computes: encoders, projectors, the language model's head, and the models made of them."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from ..configuration import MoellavaConfig
from ..configuration.checkpoint_moellava import SAVE_HOOKS
from ..hub_cards import write_card_of_save
from ..stored_dtypes import write_stored_dtype
from .modeling_moellava import MoellavaForCausalLM, MoellavaModel, MoellavaPreTrainedModel


AutoModel.register(MoellavaConfig, MoellavaModel, exist_ok=True)
AutoModelForCausalLM.register(MoellavaConfig, MoellavaForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(MoellavaConfig, MoellavaForCausalLM, exist_ok=True)
AutoModelForMultimodalLM.register(MoellavaConfig, MoellavaForCausalLM, exist_ok=True)
SAVE_HOOKS.extend((write_stored_dtype, write_card_of_save))  # in this order: the card names the dtype

__all__ = ["MoellavaForCausalLM", "MoellavaModel", "MoellavaPreTrainedModel"]
