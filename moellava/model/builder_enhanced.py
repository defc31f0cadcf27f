# SPDX-License-Identifier: Apache-2.0
"""The older builder's import path: `from moellava.model.builder_enhanced import load_pretrained_model`."""

from ..loading import load_pretrained_model


__all__ = ["load_pretrained_model"]
