# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to the Hub: which files are published, and pushing them."""

from .pushing import PushReport, push


__all__ = ["PushReport", "push"]
