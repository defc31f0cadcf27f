# SPDX-License-Identifier: Apache-2.0
"""What is read of parts and checkpoints: sources, configs, weights under the names of the tree, processors."""
