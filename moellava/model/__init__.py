# SPDX-License-Identifier: Apache-2.0
"""The import path that users of the older builder know."""
