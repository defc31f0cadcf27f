# SPDX-License-Identifier: Apache-2.0
"""Recipes: what is trained, on what, and how, checked as a whole before any weight is read."""

import copy
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from ..authoring.older_names import canonical_moe
from ..configuration.config_base_moellava import known_names
from .parts import PARTS, TRAINED


_ARGUMENTS = {field.name for field in fields(TrainingArguments)}
# Those of them that are numbers: the Trainer finds out about others in the middle of its work.
_NUMBERS = {field.name for field in fields(TrainingArguments) if type(field.default) in (int, float)}
# Checkpointing has another name before transformers 5.23.
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _ARGUMENTS else "gradient_checkpointing"
# What the older recipes and earlier versions of transformers call an argument.
_OLDER_NAMES = {
    "gradient_checkpointing": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": f"{_CHECKPOINTING}_kwargs",
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": f"{_CHECKPOINTING}_kwargs",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share
}
# Set by the run itself.
_OWN_ARGUMENTS = {"output_dir", "remove_unused_columns", "resume_from_checkpoint", "label_names", "do_train"}

PUSHES_ALL = (
    "A trainer's push_to_hub sends its whole output folder, whatever lies there. Leave it out, and push what was "
    "trained afterwards: `moellava push CHECKPOINT REPO`, or model.push_to_hub(REPO)."
)

# The older recipes' values. Whatever the stage:
_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    _CHECKPOINTING: True,
    f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1000,
    "save_total_limit": 2,
    "report_to": "tensorboard",
    # Each process makes batches of its own from streamed rows: the library would cut up a large one by rows, pictures
    # among them, of which a row may have several or none.
    "accelerator_config": {"dispatch_batches": False},
}
# and by stage:
_INSTRUCT = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "group_by_length",
}
_STAGE_DEFAULTS = {
    "align": {"learning_rate": 1e-3, "per_device_train_batch_size": 32},
    "instruct": _INSTRUCT,
    "moe": _INSTRUCT,
}
_MAX_LENGTH = 2048

# YAML takes 2e-5, without a point, for a text.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass
class LoraRecipe:
    """What a LoRA adapter is put on, and how large it is; the defaults are LLaVA's.

    Attributes:
        r (`int`): The rank.
        alpha (`float`): The scale, divided by `r`.
        dropout (`float`): In front of the adapters; 0 with experts, whose stacked tensors take none.
        attention, mlp, experts, projector, vision_tower (`bool`): Where adapters go: the attention and the dense MLPs
            of the language model, the experts, the projector, the vision tower.
        router (`bool`, *optional*): Whether the routers are trained in full; `None`: in the stage `moe`, where they
            are new.
        merge (`bool`, *optional*): Whether the adapters are merged into the model at the end of the stage; `None`:
            unless it is quantised.
    """

    r: int = 128
    alpha: float = 256
    dropout: float = 0.0
    attention: bool = True
    mlp: bool = True
    experts: bool = True
    projector: bool = True
    vision_tower: bool = False
    router: bool | None = None
    merge: bool | None = None

    def __post_init__(self):
        for name in ("alpha", "dropout"):
            _check_type(f"lora's {name}", getattr(self, name), int | float, "a number")
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"lora's r is {self.r!r}; expected a rank of at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora's dropout is {self.dropout!r}; expected a share from 0 to below 1.")
        if not any((self.attention, self.mlp, self.experts, self.projector, self.vision_tower)):
            raise ValueError(
                "lora is put on nothing: switch on one of attention, mlp, experts, projector, vision_tower."
            )


@dataclass
class Stage:
    """One stage of a recipe.

    Attributes:
        stage (`str`): `"align"` trains the projector alone, `"instruct"` all but the vision tower, `"moe"` the experts,
            the routers and the projector, of a dense model after upcycling it.
        data: The training data, in any form that `open_data` takes.
        eval_data (*optional*): The same, to evaluate on.
        image_folder (`str`, *optional*): Where relative paths of pictures begin; by default beside the data's file.
        max_length (`int`): Rows of more tokens are not used.
        as_written (`bool`): Whether questions stay as they are in the rows, their images where they stand; by default
            images at either end come first, as LLaVA trains.
        check_pictures (`bool`): Whether every picture is opened before training.
        unusable_rows (`str`): `"skip"`: they are named, counted and left out; `"error"`: there may be none.
        freeze, unfreeze (`list[str]`): Parts that the stage does not train, or does, other than by default.
        learning_rates (`dict[str, float]`): Learning rates of parts; the others have `learning_rate`.
        lora (`LoraRecipe`, *optional*): Train adapters instead of the weights.
        moe (`dict`, *optional*): Fields of the mixture that a dense model becomes (`num_experts`, ...), and
            `router_path`, a file that `train_router` has written.
        load_4bit, load_8bit (`bool`): Quantise what is loaded; with `lora` only.
        dtype (`str`, *optional*): What the weights are held in; float32 by default, and as the checkpoint has it when
            quantised.
        image_aspect_ratio (`str`, *optional*): `"pad"` or `"square"`; by default as the checkpoint has it.
        exact_router_loss (`bool`): Whether the load-balancing loss of a batch in parts is that of the whole, at the
            price of one more forward pass; otherwise every part is balanced by itself.
        early_stopping_patience (`int`, *optional*): Stop after so many evaluations without a better loss, and keep the
            best.
        distributed_config (`dict`, *optional*): Fields of transformers' `DistributedConfig`, by which the processes
            divide the model among them (`fsdp_size`, `tp_size`, `ep_size`, ...).
        arguments (`dict`): Arguments of `TrainingArguments`.
        name (`str`): The folder's name, of the recipe's `output_dir`.
    """

    stage: str
    data: Any = None
    eval_data: Any = None
    image_folder: str | None = None
    max_length: int = _MAX_LENGTH
    as_written: bool = False
    check_pictures: bool = True
    unusable_rows: str = "skip"
    freeze: list[str] = field(default_factory=list)
    unfreeze: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    lora: LoraRecipe | None = None
    moe: dict[str, Any] | None = None
    load_4bit: bool = False
    load_8bit: bool = False
    dtype: str | None = None
    image_aspect_ratio: str | None = None
    exact_router_loss: bool = True
    early_stopping_patience: int | None = None
    distributed_config: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self):
        if self.stage not in TRAINED:
            raise ValueError(f"Unknown stage {self.stage!r}{known_names(self.stage, TRAINED)}")
        self.freeze, self.unfreeze = (
            [names] if isinstance(names, str) else list(names or ()) for names in (self.freeze, self.unfreeze)
        )
        self._check_types()
        named = {"freeze": self.freeze, "unfreeze": self.unfreeze, "learning_rates": self.learning_rates}
        for owner, names in named.items():
            for name in names:
                if name not in PARTS:
                    raise ValueError(f"Unknown part {name!r} in {owner}{known_names(name, PARTS)}")
        if both := sorted(set(self.freeze) & set(self.unfreeze)):
            raise ValueError(f"{both} are in freeze and in unfreeze. Leave them in one of the two.")
        if self.lora is not None and not isinstance(self.lora, LoraRecipe):
            given = {} if self.lora is True else self.lora
            if not isinstance(given, Mapping):
                raise TypeError(f"lora is {self.lora!r}; expected its fields, such as {{r: 16, alpha: 32}}, or true.")
            known = [f.name for f in fields(LoraRecipe)]
            for name in given:
                if name not in known:
                    raise ValueError(f"Unknown field {name!r} in lora{known_names(name, known)}")
            self.lora = LoraRecipe(**given)
        if self.lora is not None and (self.freeze or self.unfreeze):
            raise ValueError(
                "freeze and unfreeze have no effect on adapters. Say in lora what they are put on, or leave it out."
            )
        if (self.load_4bit or self.load_8bit) and self.lora is None:
            raise ValueError(
                "Quantised weights cannot be trained: give lora too, or leave load_4bit and load_8bit out."
            )
        if self.unusable_rows not in ("skip", "error"):
            raise ValueError(f"unusable_rows is {self.unusable_rows!r}; expected 'skip' or 'error'.")
        if self.moe is not None:
            if self.stage != "moe":
                raise ValueError(f"moe is given in the stage {self.stage!r}; expected it in the stage 'moe'.")
            router = {name: value for name, value in self.moe.items() if name == "router_path"}
            self.moe = canonical_moe({name: value for name, value in self.moe.items() if name not in router}) | router
        if self.data is None:
            raise ValueError(f"The stage {self.stage!r} has no data: give the file or the dataset with its rows.")
        if self.early_stopping_patience is not None and self.eval_data is None:
            raise ValueError("early_stopping_patience needs eval_data: the loss that has to get better is that of it.")

    def _check_types(self) -> None:
        for name in ("as_written", "check_pictures", "exact_router_loss", "load_4bit", "load_8bit"):
            _check_type(name, getattr(self, name), bool, "true or false")
        _check_type("max_length", self.max_length, int, "a number of tokens")
        if self.early_stopping_patience is not None:
            _check_type("early_stopping_patience", self.early_stopping_patience, int, "a number of evaluations")
        _check_type("learning_rates", self.learning_rates, Mapping, "parts with their rates, such as {experts: 1e-4}")
        for part, rate in self.learning_rates.items():
            _check_type(f"The learning rate of {part}", rate, int | float, "a number")
        for name, value in self.arguments.items():
            if name in _NUMBERS:
                _check_type(name, value, int | float, "a number")
        if self.arguments.get("push_to_hub"):
            raise ValueError(PUSHES_ALL)

    def training_arguments(self, folder: Path) -> TrainingArguments:
        """Returns the arguments of the `Trainer`: the stage's, over the defaults.

        Raises:
            ImportError: They ask for a logger that is not installed.
            ValueError: A value is wrong.
        """
        defaults = _DEFAULTS | _STAGE_DEFAULTS[self.stage]
        if self.eval_data is not None:
            defaults |= {"eval_strategy": "epoch"}
        if self.distributed_config is not None:
            defaults |= {"save_strategy": "no"}  # the Trainer cannot resume what was divided while loading
        if self.early_stopping_patience is not None:
            defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
            defaults |= {"save_strategy": self.arguments.get("eval_strategy", "epoch")}  # each evaluated model is one
        use_cpu = self.arguments.get("use_cpu", False)
        if torch.cuda.is_available() and not use_cpu and not self.arguments.get("fp16"):
            defaults["bf16"] = torch.cuda.is_bf16_supported()
        asked = defaults | self.arguments
        loggers = asked["report_to"]
        if "tensorboard" in ([loggers] if isinstance(loggers, str) else loggers) and not _has_tensorboard():
            raise ImportError(
                "Logging to TensorBoard needs tensorboard: pip install 'moellava[train]', or set report_to: none."
            )
        return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **asked)


def _check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


def _has_tensorboard() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("tensorboard", "tensorboardX"))


@dataclass
class Recipe:
    """A recipe: a model, and the stages that it goes through.

    Attributes:
        model: A checkpoint, or what `load_pretrained_model` takes as a mapping: a language model, a vision tower, ...
        output_dir (`Path`): Where each stage gets a folder.
        stages (`list[Stage]`): In their order; each starts from what the last has made.
        resume (`bool`): Whether to go on where an earlier run of the recipe was stopped.
        allow_changes (`bool`): Whether it may go on with another recipe than it was begun with.
    """

    model: Any
    output_dir: Path
    stages: list[Stage]
    resume: bool = False
    allow_changes: bool = False

    def __post_init__(self):
        unmerged = [stage.name for stage in self.stages if stage.lora is not None and not merges(stage)]
        if unmerged and unmerged[-1] == self.stages[-1].name:
            unmerged.pop()
        if unmerged:
            raise ValueError(
                f"The stage {unmerged[0]!r} leaves its adapter apart, so that no stage can follow it. Make it the last "
                "one; or, where the model is not quantised, leave out merge: false."
            )
        for stage in self.stages:
            stage.training_arguments(self.output_dir / stage.name)
        existing = next(path for path in (self.output_dir, *self.output_dir.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file, and output_dir is {self.output_dir}. Give a folder.")


def merges(stage: Stage) -> bool:
    """Whether a stage's adapters become part of the model at its end.

    Raises:
        ValueError: They are to, though the model is quantised.
    """
    quantised = stage.load_4bit or stage.load_8bit
    if quantised and stage.lora.merge:
        raise ValueError(
            "lora's merge is true, but the model is quantised, and merging would round the adapter away. Leave it out, "
            "and load the adapter by load_pretrained_model(ADAPTER, model_base=MODEL, merge=False, load_4bit=True)."
        )
    return stage.lora.merge if stage.lora.merge is not None else not quantised


_RECIPE_KEYS = ("model", "output_dir", "stages", "resume", "allow_changes")
_STAGE_KEYS = tuple(f.name for f in fields(Stage) if f.name not in ("arguments", "name"))
_KNOWN = {*_RECIPE_KEYS, *_STAGE_KEYS, *(_ARGUMENTS - _OWN_ARGUMENTS), *_OLDER_NAMES, "group_by_length"}


def read_recipe(recipe: Mapping[str, Any] | str | os.PathLike, **overrides) -> Recipe:
    """Reads and checks a recipe.

    Args:
        recipe (`Mapping`, `str` or `os.PathLike`): The recipe, or a YAML file with it.
        overrides: Keys of the recipe, which win over it and over what its stages say themselves.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: A logger that it asks for is not installed.
        TypeError: It is something else.
        ValueError: An unknown key or value, or a key that is missing; the message says which.
    """
    origin = "the recipe"
    if isinstance(recipe, str | os.PathLike):
        origin = str(recipe)
        recipe = _read_yaml(Path(recipe).expanduser())
    if not isinstance(recipe, Mapping):
        raise TypeError(f"{origin} is a {type(recipe).__name__}; expected keys with values, such as model and data.")
    given = _checked_keys(recipe, origin, _KNOWN)
    overrides = _checked_keys(overrides, "the arguments", _KNOWN - {"stages", "stage"})
    for key in ("model", "output_dir"):
        if overrides.get(key, given.get(key)) is None:
            raise ValueError(f"{origin} has no {key}: {_PURPOSE[key]}.")
    if ("stages" in given) == ("stage" in given):
        raise ValueError(
            f"{origin} has {'both stages and stage' if 'stages' in given else 'neither stage nor stages'}; expected "
            f"one of them: a stage ({', '.join(TRAINED)}), or a list of them with what each has of its own."
        )
    own = given.get("stages", [{"stage": given.get("stage")}])
    if not isinstance(own, list) or not own:
        raise ValueError(f"stages is {own!r}; expected a list, such as [{{stage: align}}, {{stage: instruct}}].")
    shared = {key: value for key, value in given.items() if key not in (*_RECIPE_KEYS, "stage")}
    changed = {key: value for key, value in overrides.items() if key not in _RECIPE_KEYS}
    stages: list[Stage] = []
    for number, entry in enumerate(own):
        if not isinstance(entry, Mapping) or "stage" not in entry:
            raise ValueError(f"Stage {number} is {entry!r}; expected a mapping with the key stage.")
        entry = _checked_keys(entry, f"stage {number}", _KNOWN - set(_RECIPE_KEYS))
        # A mixture that all stages share is meant for the one that makes it.
        common = {key: value for key, value in shared.items() if key != "moe" or entry["stage"] == "moe"}
        stages.append(_stage(common | entry | changed, [stage.name for stage in stages]))
    return Recipe(
        model=overrides.get("model", given.get("model")),
        output_dir=Path(overrides.get("output_dir", given.get("output_dir"))).expanduser(),
        stages=stages,
        **{key: bool(overrides.get(key, given.get(key, False))) for key in ("resume", "allow_changes")},
    )


_PURPOSE = {
    "model": "give the checkpoint that training starts from, or the parts of a new one",
    "output_dir": "give the folder that checkpoints are written to",
}


def _stage(values: dict[str, Any], names: list[str]) -> Stage:
    # Not of the data, which may be a dataset.
    own = {key: values[key] for key in _STAGE_KEYS if key in values}
    arguments = {key: copy.deepcopy(value) for key, value in values.items() if key not in own}
    if arguments.pop("group_by_length", False):
        arguments["train_sampling_strategy"] = "group_by_length"
    elif values.get("group_by_length") is False:
        arguments["train_sampling_strategy"] = "random"
    own["name"] = own["stage"]
    while own["name"] in names:
        stem, _, number = own["name"].partition("-")
        own["name"] = f"{stem}-{int(number or 1) + 1}"
    return Stage(**own, arguments=arguments)


def _checked_keys(given: Mapping[str, Any], origin: str, known: set[str]) -> dict[str, Any]:
    """Returns what is given under today's names, numbers as numbers."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"Unknown key {name!r} in {origin}{known_names(name, known)}")
        today = _OLDER_NAMES.get(name, name)
        if today in found:
            raise ValueError(f"{origin} gives {today} twice, once by an older name. Give one of them.")
        found[today] = _numbers(value)
    return found


def _numbers(value: Any) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if type(value) is dict:
        return {key: _numbers(entry) for key, entry in value.items()}
    return value


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}. Give the path of a YAML file.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML ({error}).") from error


__all__ = ["LoraRecipe", "Recipe", "Stage", "merges", "read_recipe"]
