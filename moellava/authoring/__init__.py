# SPDX-License-Identifier: Apache-2.0
"""What a user writes: the request that `load_pretrained_model` is given."""
