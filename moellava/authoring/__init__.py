# SPDX-License-Identifier: Apache-2.0
"""What a user writes: parts of their own, the fields of a configuration, and the older names for them."""
