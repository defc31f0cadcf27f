# SPDX-License-Identifier: Apache-2.0
"""Which errors are the user's to put right, and the sentence that each ends in."""

import os
from typing import Any


# By name, so that the libraries need not be imported to tell that an error is none of theirs.
_OTHERS_OF_THE_USER = {
    "httpx.HTTPError",
    "httpx2.HTTPError",
    "huggingface_hub.errors.StrictDataclassError",  # the Hub's checks of a config's fields
    "torch.OutOfMemoryError",
}


def is_the_users(error: BaseException) -> bool:
    """Whether an error tells what is wrong with the input or the surroundings, and not of a fault in the program."""
    if isinstance(error, BrokenPipeError):
        return False  # the reader of our output is gone, which Typer handles
    if isinstance(error, ValueError | TypeError | OSError | ImportError | MemoryError):
        return True
    return not _OTHERS_OF_THE_USER.isdisjoint(_names(error))


def sentence(error: BaseException) -> str:
    """Returns what an error says as one line of text."""
    told = _told_by_the_hub(error)
    if told is not None:
        return told
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}."
    return " ".join(str(error).split()) or f"{type(error).__name__}, without a message; --debug shows where."


def _names(error: BaseException) -> set[str]:
    return {f"{cls.__module__}.{cls.__name__}" for cls in type(error).__mro__}


def _told_by_the_hub(error: BaseException) -> str | None:
    """Returns what to do about an answer of the Hub, or about none; `None` for other errors.

    huggingface_hub's own messages are several lines with numbers of requests, and transformers' are about models in
    general. What this package says itself about an answer of the Hub is left as it is.
    """
    if not _raised_in(error, "huggingface_hub", "transformers", "httpx", "httpx2", "httpcore", "httpcore2"):
        return None
    cause = error
    while cause is not None and _names(cause).isdisjoint(
        {"httpx.HTTPError", "httpx2.HTTPError", "huggingface_hub.errors.OfflineModeIsEnabled"}
    ):
        cause = cause.__cause__
    if cause is None:
        return None
    name, response = type(cause).__name__, getattr(cause, "response", None)
    if name == "OfflineModeIsEnabled":
        return "The Hub is not asked, since HF_HUB_OFFLINE is set: unset it."
    if response is None:
        return (
            f"The Hub cannot be reached ({' '.join(str(cause).split()) or name}). Check the connection; what was "
            "downloaded before is found with --local-files-only."
        )
    return f"{_advice(name, response.status_code)} (The Hub's answer: {response.status_code} for {_address(response)}.)"


def _advice(name: str, status: int) -> str:
    if name == "GatedRepoError":
        return "Access to this repository has to be asked for: do so on its page, then log in with `hf auth login`."
    if name == "RevisionNotFoundError":
        return "The repository has no such branch, tag or commit: check --revision."
    if name == "RepositoryNotFoundError" or status == 401:
        return (
            "There is no such repository on the Hub, or it is private: check its name, and log in with `hf auth login` "
            "or give --token where it is private."
        )
    if status == 403:
        return "Your token does not allow this: give one that does with --token, or log in anew with `hf auth login`."
    if status == 404:
        return "The Hub has no such file: check the names of the repository and of the revision."
    if status == 429:
        return "The Hub has had too many requests from here: wait for some minutes, or log in, which allows more."
    if status >= 500:
        return "The Hub has trouble of its own: try again later."
    return "The Hub refuses the request."


def _address(response: Any) -> str:
    return str(response.url).partition("?")[0]  # a query may hold a signature


def _raised_in(error: BaseException, *packages: str) -> bool:
    """Whether an error was raised in the code of some packages."""
    traceback, module = error.__traceback__, ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return module.partition(".")[0] in packages


__all__ = ["is_the_users", "sentence"]
