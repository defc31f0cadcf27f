# SPDX-License-Identifier: Apache-2.0
"""What depends on the version of transformers: every comparison of versions of the travelling code stands here."""

from packaging.version import Version
from transformers import __version__


TRANSFORMERS = Version(__version__)

# `output_hidden_states=[3, 7]` keeps these hidden states at their own places; before, they were counted otherwise.
SELECTS_HIDDEN_STATES = Version("5.23") <= TRANSFORMERS

# The name of the cache of keys and values, as argument of a language model and in its output.
CACHE = "cache" if Version("5.24") <= TRANSFORMERS else "past_key_values"
