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
"""The command line: one file per command, `app.py` puts them together.

Answers, tables and JSON go to standard output, everything else to standard error. What a user can put right ends in one
sentence and exit code 1, a wrong command line in exit code 2, Ctrl-C in 130. PyTorch and transformers are imported
inside the commands, so that `--help` and shell completion answer at once.
"""

from .app import app, main


__all__ = ["app", "main"]
