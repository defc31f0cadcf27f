# SPDX-License-Identifier: Apache-2.0
"""What the package logs while a command works, on standard error."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def logging_shown(verbose: bool, hide_load_report: bool = False) -> Iterator[None]:
    """Shows the package's warnings, or all it logs, on standard error.

    transformers reports weights that are newly initialised as a table of warnings. While assembling, those are the new
    projector's and no others (`build` raises for others), which the command says itself.
    """
    package, models = logging.getLogger("moellava"), logging.getLogger("transformers.modeling_utils")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if verbose else "%(levelname)s: %(message)s"))
    level = package.level

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    package.addHandler(handler)
    if verbose:
        package.setLevel(logging.INFO)
    if hide_load_report and not verbose:
        models.addFilter(is_no_report)
    try:
        yield
    finally:
        models.removeFilter(is_no_report)
        package.setLevel(level)
        package.removeHandler(handler)


def debug_options(verbose: bool) -> dict[str, bool]:
    """Returns the keyword arguments by which `load_pretrained_model` logs what it finds."""
    return {"encoder_debug": True, "projector_debug": True} if verbose else {}


__all__ = ["debug_options", "logging_shown"]
