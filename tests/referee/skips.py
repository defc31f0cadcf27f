# SPDX-License-Identifier: Apache-2.0
"""Every test of transformers' suite that is not run over our classes, and why; what else is skipped, it skips."""

import re
import unittest


# (the class's name, the test's name, as regular expressions) -> the reason
SKIPS = {
    ("Dense.*", "test_eager_matches_batched_and_grouped_inference.*"): (
        "a dense model has no experts; the test asks the class, which is the same for dense and sparse models"
    ),
    (".*ProcessorTest", "test_subprocessor_defaults_1_images"): (
        "the suite hands all that the processor takes to the image processor, which does not know image_aspect_ratio; "
        "test_pictures_are_the_image_processors is in its place"
    ),
    (".*FullyShardedTest", "test_fsdp2_plan_vs_ddp.*"): (
        "its batches have no pictures: the tower gets no gradient, and transformers' load_optimizer_distributed cannot "
        "load an optimizer that holds nothing of some parameters; tests/test_parallel.py compares in its place"
    ),
    (".*ProcessorTest", "test_init_arguments_not_in_processor_kwargs"): (
        "image_aspect_ratio is a setting of the checkpoint that a call may change, a case that the test itself says it "
        "is too strict for"
    ),
}


def skip_known(test: unittest.TestCase) -> None:
    """Skips a test that the table names."""
    for (case, name), reason in SKIPS.items():
        if re.fullmatch(case, type(test).__name__) and re.fullmatch(name, test._testMethodName):
            test.skipTest(reason)
