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
"""transformers' common tests of models over ours: dense and sparse, CLIP and SigLIP, mlp and qformer."""

import unittest

from model_testers import MoellavaModelTest


class DenseClipMlpTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "clip", "mlp", False


class SparseClipMlpTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "clip", "mlp", True


class DenseClipQformerTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "clip", "qformer", False


class SparseClipQformerTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "clip", "qformer", True


class DenseSiglipMlpTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "siglip", "mlp", False


class SparseSiglipMlpTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "siglip", "mlp", True


class DenseSiglipQformerTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "siglip", "qformer", False


class SparseSiglipQformerTest(MoellavaModelTest, unittest.TestCase):
    tower, projector, sparse = "siglip", "qformer", True
