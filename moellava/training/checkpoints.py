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
"""What a run has left in a stage's folder: its last whole checkpoint, and the remains of saves that were cut off."""

import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

# What the Trainer writes last into a checkpoint, and before it deletes an older one: where it is whole, all is.
_TRAINER_STATE = "trainer_state.json"


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Returns the last whole `checkpoint-N` of a run; what a killed run has left half written is removed."""
    folder = Path(folder)
    cut_off = list(folder.glob(".*.saving"))  # of weights
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if not number.isdecimal() or not path.is_dir():
            continue
        if _is_whole(path):
            found.append((int(number), path))
        else:
            cut_off.append(path)
    for path in cut_off:
        logger.warning("%s was not written to its end, and is removed", path)
        shutil.rmtree(path)
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


__all__ = ["last_checkpoint"]
