# SPDX-License-Identifier: Apache-2.0
"""What a run has left in a stage's folder: its last whole checkpoint, and the remains of saves that were cut off."""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
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
    except (FileNotFoundError, ValueError):  # cut off, or whatever a disk that lost its power holds
        return False
    return True


def restore(model: Any, checkpoint: str | os.PathLike) -> None:
    """Puts the weights of a checkpoint into a model, in place: an optimizer goes on with the same parameters.

    A family may hold its weights in another form than it saves them in, such as experts that are stacked:
    `from_pretrained` knows the way back, `load_state_dict` does not.

    Args:
        model (`MoellavaForCausalLM`): The model that has written the checkpoint.
        checkpoint (`str` or `os.PathLike`): Its folder.

    Raises:
        ValueError: The checkpoint lacks weights of the model, or holds others.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    # Of several, none is rounded: each is wide enough for itself.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    saved, found = type(model).from_pretrained(
        checkpoint, config=model.config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    sizes = [name for name, *_ in found["mismatched_keys"]]
    check_restored(checkpoint, [*found["missing_keys"], *sizes], found["unexpected_keys"])
    model.load_state_dict(saved.state_dict())


def check_adapter(model: Any, checkpoint: str | os.PathLike) -> None:
    """Refuses a checkpoint that does not hold every weight of a `PeftModel`'s adapter, or holds others.

    Raises:
        ValueError: Naming the first of them.
    """
    from peft import get_peft_model_state_dict, load_peft_weights  # a PeftModel has imported it

    saved = load_peft_weights(str(checkpoint), device="cpu").keys()
    own = get_peft_model_state_dict(model).keys()
    check_restored(checkpoint, own - saved, saved - own)


def check_restored(checkpoint: str | os.PathLike, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuses a checkpoint that has not given every weight its value, or holds others.

    Raises:
        ValueError: Naming the first of them.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        said = [f"{what} {_first(names)}" for what, names in (("lacks", missing), ("also holds", unexpected)) if names]
        raise ValueError(
            f"{checkpoint} does not hold the weights of this model: it {' and '.join(said)}. Delete this checkpoint to "
            "go on from an earlier one, or train into another output_dir."
        )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


__all__ = ["check_adapter", "check_restored", "last_checkpoint", "restore"]
