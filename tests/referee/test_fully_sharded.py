# SPDX-License-Identifier: Apache-2.0
"""transformers' common tests of fully sharded data parallelism over ours, in two processes on the CPU."""

import unittest

from model_testers import MoellavaModelTester, vocab_size_at_the_top
from skips import skip_known
from tests.test_fsdp_mixin import FSDP_DISTRIBUTED_TEST_MODEL_TYPES, FSDPTesterMixin


# The suite runs these for some families alone, to save time.
FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add("moellava")


class MoellavaFullyShardedTest(FSDPTesterMixin):
    """The suite over one combination, which a subclass names."""

    model_tester = None
    tower = projector = sparse = None

    def setUp(self):
        skip_known(self)
        self.model_tester = MoellavaModelTester(self, self.tower, self.projector, self.sparse)
        if self.sparse:
            # A balancing loss of half a batch is not half of the whole one's, with which the suite compares.
            self.model_tester.moe_config["router_aux_loss_coef"] = 0

    def _get_tiny_config(self):
        # The suite's own sets sizes of a language model on the config, which has them in a part.
        config = self.model_tester.get_config()
        return type(config), config.to_diff_dict()

    def _run_fsdp2_distributed_test(self, test_name, test_impl, *test_args, **options):
        super()._run_fsdp2_distributed_test(test_name, run_in_rank, test_impl, *test_args, **options)


def run_in_rank(rank, config_class, config_dict, test_impl, *test_args, **test_kwargs):
    """Runs a test of the suite in one of its processes."""
    with vocab_size_at_the_top():
        test_impl(rank, config_class, config_dict, *test_args, **test_kwargs)


class DenseClipMlpFullyShardedTest(MoellavaFullyShardedTest, unittest.TestCase):
    tower, projector, sparse = "clip", "mlp", False


class SparseSiglipQformerFullyShardedTest(MoellavaFullyShardedTest, unittest.TestCase):
    tower, projector, sparse = "siglip", "qformer", True
