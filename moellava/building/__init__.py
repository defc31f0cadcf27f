# SPDX-License-Identifier: Apache-2.0
"""From configs and named weights to a model: assembling parts, making a dense model sparse, building."""
