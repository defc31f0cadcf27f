# SPDX-License-Identifier: Apache-2.0
"""What every model computes: the model, and the language model's head."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from ..configuration.configuration_moellava import MoellavaConfig
from .modeling_moellava import MoellavaForCausalLM, MoellavaModel, MoellavaPreTrainedModel


AutoModel.register(MoellavaConfig, MoellavaModel, exist_ok=True)
AutoModelForCausalLM.register(MoellavaConfig, MoellavaForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(MoellavaConfig, MoellavaForCausalLM, exist_ok=True)
AutoModelForMultimodalLM.register(MoellavaConfig, MoellavaForCausalLM, exist_ok=True)

__all__ = ["MoellavaForCausalLM", "MoellavaModel", "MoellavaPreTrainedModel"]
