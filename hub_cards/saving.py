# SPDX-License-Identifier: Apache-2.0
"""The card of every save and push."""

import logging
from pathlib import Path

from huggingface_hub import constants

from .cards import render_card
from .writing import complete_card, read_card, save_card


logger = logging.getLogger(__name__)


def write_card_of_save(folder: Path, target: Path, repo_id: str | None = None) -> None:
    """Writes the card of a checkpoint that is being saved.

    What an earlier card says was measured is left out: it was measured with other weights. Where no card can be written
    the reason is logged and the save goes on: weights that took days must not be lost for the text beside them.

    Args:
        folder (`Path`): Where the checkpoint's files lie for now.
        target (`Path`): The folder that they come to, whose `README.md` may be the user's own.
        repo_id (`str`, *optional*): The Hub id that they are pushed to.
    """
    try:
        earlier = read_card(target / constants.REPOCARD_NAME)
        card = render_card(folder, repo_id=repo_id or target.resolve().name, evaluation=[])
        save_card(folder / constants.REPOCARD_NAME, complete_card(earlier, card))
    except Exception as error:  # whatever it is, the weights are worth more
        logger.warning("%s is saved without a new model card: %s: %s", repo_id or target, type(error).__name__, error)


__all__ = ["write_card_of_save"]
