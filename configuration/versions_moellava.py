# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What depends on the version of transformers: every comparison of versions of the travelling code stands here."""

from packaging.version import Version
from transformers import __version__


TRANSFORMERS = Version(__version__)

# `output_hidden_states=[3, 7]` keeps these hidden states at their own places; before, they were counted otherwise.
SELECTS_HIDDEN_STATES = Version("5.23") <= TRANSFORMERS

# The name of the cache of keys and values, as argument of a language model and in its output.
CACHE = "cache" if Version("5.24") <= TRANSFORMERS else "past_key_values"

__all__ = ["CACHE", "SELECTS_HIDDEN_STATES", "TRANSFORMERS"]
