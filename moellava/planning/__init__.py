# SPDX-License-Identifier: Apache-2.0
"""What training a model would take, in memory and time, told by its config."""

from .planner import GPUS, Memory, Plan, plan


__all__ = ["GPUS", "Memory", "Plan", "plan"]
