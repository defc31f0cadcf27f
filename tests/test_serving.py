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
"""What `docs/guides/serve.md` says of servers that others have written. Its own service is run by `test_docs.py`."""

import pytest
from transformers.cli.serving.model_manager import ModelManager

from moellava import load_pretrained_model


def test_transformers_serve_looks_for_the_class_among_its_own(parts, tmp_path):
    # When this fails, transformers serves checkpoints that carry their code, and the guide has to say so.
    folder = tmp_path / "my-model"
    load_pretrained_model(
        parts.language_model(), vision_tower=parts.vision_tower(), device="cpu"
    ).model.save_pretrained(folder)
    with pytest.raises(AttributeError, match="module transformers has no attribute MoellavaForCausalLM"):
        ModelManager(device="cpu", trust_remote_code=True, force_model=str(folder))
