# SPDX-License-Identifier: Apache-2.0
"""`load_pretrained_model`: one call from a configuration to a model that is ready to use."""

from .load import LoadedModel, load_pretrained_model


__all__ = ["LoadedModel", "load_pretrained_model"]
