# SPDX-License-Identifier: Apache-2.0
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
