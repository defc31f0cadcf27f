# SPDX-License-Identifier: Apache-2.0
"""What a user writes: parts of their own, the fields of a configuration, and the older names for them."""

# First: with it transformers loads its table of configs, and then `moellava.installed`, which imports this room.
from .. import configuration
