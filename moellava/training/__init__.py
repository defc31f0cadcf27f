# SPDX-License-Identifier: Apache-2.0
"""Training: recipes of stages over `transformers.Trainer`, data that is checked first, and adapters by PEFT."""

from .data import DataReport, Problem, check_data
from .recipe import LoraRecipe, Recipe, Stage, read_recipe
from .routers import RouterReport, train_router
from .running import StageReport, TrainingReport, train


__all__ = [
    "DataReport",
    "LoraRecipe",
    "Problem",
    "Recipe",
    "RouterReport",
    "Stage",
    "StageReport",
    "TrainingReport",
    "check_data",
    "read_recipe",
    "train",
    "train_router",
]
