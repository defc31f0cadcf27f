# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
