# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command, `app.py` puts them together.

Answers, tables and JSON go to standard output, everything else to standard error. What a user can put right ends in one
sentence and exit code 1, a wrong command line in exit code 2, Ctrl-C in 130. PyTorch and transformers are imported
inside the commands, so that `--help` and shell completion answer at once.
"""

from .app import app, main


__all__ = ["app", "main"]
