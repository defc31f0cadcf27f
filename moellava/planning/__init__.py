# SPDX-License-Identifier: Apache-2.0
"""What training a model would take, in memory and time, told by its config."""

from .planner import GPUS, PlanRequest, plan
from .plans import Memory, Plan


__all__ = ["GPUS", "Memory", "Plan", "PlanRequest", "plan"]
