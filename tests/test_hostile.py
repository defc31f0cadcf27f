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
"""Checkpoints, weights, pictures and data made by an attacker, opened through every door that a user has.

Without `trust_remote_code=True` each has to be refused in clear words, or to do no harm; and whatever becomes of it, no
file outside of the checkpoint is opened, no connection made, no process started, no code run that lies in it. The doors
are opened by `hostile_doors.py`, whose audit hook sees that.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moellava import load_pretrained_model


HERE = Path(__file__).resolve().parent
EVIL_CODE = 'import pathlib\npathlib.Path(__file__).with_name("EXECUTED").touch()\nraise RuntimeError("executed")\n'
# How a checkpoint is loaded; the others look into it, or do something with it.
LOADERS = ("load_pretrained_model", "MoellavaForCausalLM", "AutoModelForImageTextToText")


# ---------------------------------------------------------------------------------------------------------------------
# What an attacker changes of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def edit(name: str, **changes: Any):
    """Changes fields of a JSON file of the checkpoint; `part__field` is a field of a part."""

    def change(folder: Path) -> None:
        path = folder / name
        fields = json.loads(path.read_text()) if path.is_file() else {}
        for key, value in changes.items():
            inner, *outer = reversed(key.split("__"))
            target = fields
            for step in reversed(outer):
                target = target[step]
            target[inner] = str(folder.parent / value[1:]) if isinstance(value, str) and value[:1] == "@" else value
        path.write_text(json.dumps(fields))

    return change


def config(**changes: Any):
    return edit("config.json", **changes)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def raw_config(part: str, text: str):
    """Puts text into config.json that json.dumps would not write."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        fields[part] = "@@"
        path.write_text(json.dumps(fields).replace('"@@"', text))

    return change
