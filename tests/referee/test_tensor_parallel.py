# SPDX-License-Identifier: Apache-2.0
"""transformers' common tests of tensor and expert parallelism over ours, in two processes on the CPU."""

import unittest

from model_testers import MoellavaModelTester
from skips import skip_known
from tests.test_expert_parallel_mixin import EP_DISTRIBUTED_TEST_MODEL_TYPES, ExpertParallelTesterMixin
from tests.test_tensor_parallel_mixin import TP_DISTRIBUTED_TEST_MODEL_TYPES, TensorParallelTesterMixin

from moellava import MoellavaForCausalLM, MoellavaModel


# The suite runs these for some families alone, to save time.
TP_DISTRIBUTED_TEST_MODEL_TYPES.add("moellava")
EP_DISTRIBUTED_TEST_MODEL_TYPES.add("moellava")


class MoellavaParallelTest(ExpertParallelTesterMixin, TensorParallelTesterMixin):
    """The suite over one combination, which a subclass names."""

    all_model_classes = (MoellavaModel, MoellavaForCausalLM)
    model_tester = None
    tower = projector = sparse = None

    def setUp(self):
        skip_known(self)
        self.model_tester = MoellavaModelTester(self, self.tower, self.projector, self.sparse)

    def _has_ep_plan(self) -> bool:
        # The suite looks for it in the config of the text model, which is of a dense class here; ours is the block's.
        return self.sparse


class DenseClipMlpParallelTest(MoellavaParallelTest, unittest.TestCase):
    tower, projector, sparse = "clip", "mlp", False


class SparseSiglipQformerParallelTest(MoellavaParallelTest, unittest.TestCase):
    tower, projector, sparse = "siglip", "qformer", True
