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
"""Which errors are the user's to put right, and the sentence that each ends in."""

import os


def is_the_users(error: Exception) -> bool:
    """Whether an error tells what is wrong with the input or the surroundings, and not of a fault in the program."""
    if isinstance(error, BrokenPipeError):
        return False  # the reader of our output is gone, which Typer handles
    if isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
        return True
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}
    # The Hub's checks of a config's fields have a base class of their own.
    return not names.isdisjoint({"huggingface_hub.errors.StrictDataclassError", "torch.OutOfMemoryError"})


def sentence(error: Exception) -> str:
    """Returns what an error says as one line of text."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}."
    return " ".join(str(error).split()) or f"{type(error).__name__}, without a message; --debug shows where."


__all__ = ["is_the_users", "sentence"]
