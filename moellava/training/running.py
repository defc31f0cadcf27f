# SPDX-License-Identifier: Apache-2.0
"""`train`: takes a model through the stages of a recipe."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from ..authoring.load_request import read_request
from ..configuration import MoellavaConfig
from ..loading import load_pretrained_model
from ..loading.lora import merge_adapter
from ..modeling import MoellavaForCausalLM
from ..reading.json_files import write_json_object
from ..reading.language_model import context_length
from ..reading.provenance import folder_name, with_training, without_places
from ..reading.sources import Source
from .adapters import put_adapters
from .checkpoints import last_checkpoint
from .data import Collator, Examples, StreamedExamples, log_overlap, log_problems, processor_and_context
from .encoding import Encoder
from .frozen import frozen_as_loaded, frozen_dtypes
from .parts import may_be_unused, set_trained, trained_parameters
from .recipe import Recipe, Stage, merges, read_recipe
from .records import check_records, write_record
from .rows import Rows, open_data
from .trainer import MoellavaTrainer


logger = logging.getLogger(__name__)

# In a stage's folder: what it has made, written when it is complete; and its checks of the data.
_STAGE_REPORT = "stage.json"
_DATA_REPORT = "data.json"
_MODEL = "model"
_ADAPTER = "adapter"


@dataclass
class StageReport:
    """What a stage has done.

    Attributes:
        stage (`str`): Which one.
        folder (`str`): Where its checkpoints, its logs and what it made are.
        checkpoint (`str`): What it made: a checkpoint, or an adapter that was left apart.
        steps (`int`): How many steps the optimizer took.
        seconds (`float`): How long the training took, this time.
        log (`list[dict]`): Everything that was logged, step by step.
        trained (`dict`): Of every part, how many parameters it has and how many were trained.
        data (`dict`): The report on the training data, and the rows that were left out.
        adapters (`dict`): Of every part, how many layers LoRA was put on, and of how many.
    """

    stage: str
    folder: str
    checkpoint: str
    steps: int
    seconds: float
    log: list[dict[str, Any]]
    trained: dict[str, dict[str, int]]
    data: dict[str, Any]
    adapters: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """The logged training losses."""
        return [entry["loss"] for entry in self.log if "loss" in entry]


@dataclass
class TrainingReport:
    """What a run has done.

    Attributes:
        stages (`list[StageReport]`): The stages, those that an earlier run has completed among them.
    """

    stages: list[StageReport]

    @property
    def checkpoint(self) -> Path:
        """What the last stage made."""
        return Path(self.stages[-1].checkpoint)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {"checkpoint": str(self.checkpoint), "stages": [dataclasses.asdict(stage) for stage in self.stages]}


def train(recipe: Mapping[str, Any] | str | os.PathLike, **overrides) -> TrainingReport:
    """Takes a model through the stages of a recipe.

    Args:
        recipe (`Mapping`, `str` or `os.PathLike`): The recipe, or a YAML file with it. Its keys are `model`,
            `output_dir`, `stage` or `stages`, those of a stage (`data`, `freeze`, `lora`, ...) and the arguments of
            `TrainingArguments`: see `docs/training.md`.
        overrides: Keys of the recipe, which win over what it says.

    Returns:
        [`TrainingReport`]: Where the model is, and what every stage did.

    Raises:
        FileNotFoundError: The recipe, the model or the data is not there.
        ImportError: An extra is not installed.
        TypeError: The recipe is something else.
        ValueError: An unknown key or value, data of which no row can be used, or a folder that holds another run or
            one of another recipe. No weights have been read by then.

    Example:

    ```python
    >>> from moellava import train

    >>> report = train({"model": "my-model", "data": "train.json", "output_dir": "out", "stage": "align"})
    >>> report.checkpoint
    ```"""
    plan = read_recipe(recipe, **overrides)
    with _logging_once():
        return _train(plan)


def _train(plan: Recipe) -> TrainingReport:
    if plan.resume:
        with PartialState().main_process_first():  # which clears away what a killed run has left
            check_records(plan)
    else:
        _refuse_other_runs(plan)
    pending = [stage for stage in plan.stages if not (plan.resume and _done(plan, stage).is_file())]
    PartialState().wait_for_everyone()  # all have looked before one of them writes
    opened = {stage.name: _open(stage) for stage in pending}
    source, data = plan.model, None
    # What each stage makes carries the code of the model's own parts too.
    trusts = isinstance(source, Mapping) and source.get("trust_remote_code")
    trusted = {"trust_remote_code": True} if trusts else {}
    if pending and _is_own(source):
        data = _prepared(pending, opened, *processor_and_context(source))
    reports: list[StageReport] = []
    for stage in plan.stages:
        if stage.name not in opened:
            reports.append(_read_report(plan.output_dir / stage.name))
            logger.info("stage %s is complete already: %s", stage.name, reports[-1].checkpoint)
        else:
            model = _load(stage, source, stage.training_arguments(plan.output_dir))
            if data is None:  # parts, or an older checkpoint, which have no processor before they are loaded
                data = _prepared(pending, opened, model.processor, context_length(model.config.text_config))
            if PartialState().is_main_process:
                write_record(plan, stage, plan.output_dir / stage.name)
            reports.append(_run(stage, model, *data.pop(stage.name), plan.output_dir / stage.name, plan.resume))
            del model
        source = {"model_path": reports[-1].checkpoint, **trusted} if trusted else reports[-1].checkpoint
    return TrainingReport(reports)


@contextlib.contextmanager
def _logging_once() -> Iterator[None]:
    """Of several processes, which all do the same, lets only the main one say what it does."""
    package = logging.getLogger(__package__.partition(".")[0])
    level = package.level
    if not PartialState().is_main_process:
        package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def _done(plan: Recipe, stage: Stage) -> Path:
    return plan.output_dir / stage.name / _STAGE_REPORT


def _read_report(folder: Path) -> StageReport:
    """Reads what a stage has written, whose places are told from its folder on."""
    fields = json.loads((folder / _STAGE_REPORT).read_text(encoding="utf-8"))
    return StageReport(**fields | {"folder": str(folder), "checkpoint": str(folder / fields["checkpoint"])})


def _write_data_report(stage: Stage, examples: Any, folder: Path) -> None:
    write_json_object(folder / _DATA_REPORT, without_places(examples.report.to_dict(), _places(stage)))


def _places(stage: Stage) -> list[Any]:
    data = [given for given in (stage.data, stage.eval_data) if isinstance(given, str | os.PathLike)]
    return [stage.image_folder, *(os.path.dirname(path) for path in data)]


def _is_own(source: Any) -> bool:
    """Whether a model is a checkpoint of this package."""
    return not isinstance(source, Mapping) and Source(source).config_dict()["model_type"] == MoellavaConfig.model_type


def _open(stage: Stage) -> tuple[Rows, Rows | None]:
    """Opens the data of a stage, and checks what its length has to do with the arguments."""
    rows = open_data(stage.data, stage.image_folder, stage.as_written)
    if rows.is_streamed and stage.arguments.get("max_steps", -1) < 1:
        raise ValueError(
            f"The data of the stage {stage.stage!r} is streamed, so that nobody knows how long an epoch is: give "
            "max_steps."
        )
    if rows.is_streamed and stage.arguments.get("dataloader_num_workers", 0):
        raise ValueError(
            f"The data of the stage {stage.stage!r} is streamed, and each of several workers would read all of it: "
            "leave dataloader_num_workers out."
        )
    if stage.eval_data is None:
        return rows, None
    return rows, open_data(stage.eval_data, stage.image_folder, stage.as_written)


def _prepared(
    stages: list[Stage], opened: dict[str, tuple[Rows, Rows | None]], processor: Any, context: int
) -> dict[str, tuple[Any, Any]]:
    """Checks and encodes the data of all stages, so that none of it is found wanting after days; each data once."""
    made: dict[tuple, Any] = {}
    data: dict[str, tuple[Any, Any]] = {}
    for stage in stages:
        encoder = Encoder(processor, min(stage.max_length, context))
        both = []
        for given, rows in zip((stage.data, stage.eval_data), opened[stage.name], strict=True):
            key = (_identity(given), str(stage.image_folder))
            key += (encoder.max_length, stage.as_written, stage.check_pictures, stage.unusable_rows)
            if key not in made:
                made[key] = None if rows is None else _examples(rows, encoder, stage)
            both.append(made[key])
        data[stage.name] = tuple(both)
        if all(isinstance(examples, Examples) for examples in both):
            log_overlap(*reversed(both), "eval_data")
    return data


def _identity(given: Any) -> Any:
    """Returns what is equal for the same data: a given path is equal in all stages, a given dataset the same object."""
    if isinstance(given, Mapping) and not hasattr(given, "column_names"):
        return tuple((name, _identity(value)) for name, value in given.items())
    return repr(given) if given is None or isinstance(given, str | int | os.PathLike) else id(given)


def _refuse_other_runs(plan: Recipe) -> None:
    for stage in plan.stages:
        folder = plan.output_dir / stage.name
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds an earlier run. Give resume: true to go on with it, or another output_dir."
            )


def _run(stage: Stage, model: Any, train_data: Any, eval_data: Any, folder: Path, resume: bool) -> StageReport:
    arguments = stage.training_arguments(folder)
    writes = PartialState().is_main_process
    folder.mkdir(parents=True, exist_ok=True)
    if writes and isinstance(train_data, Examples):
        _write_data_report(stage, train_data, folder)
    base = model
    model, reach = _with_trained_parts(stage, base)
    trained = trained_parameters(model)
    _warn_of_untrained_parts(stage, base, trained)
    if arguments.ddp_find_unused_parameters is None:
        arguments.ddp_find_unused_parameters = may_be_unused(model)
    callbacks = []
    if stage.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(stage.early_stopping_patience))
    trainer = MoellavaTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(base.processor),
        processing_class=base.processor,
        learning_rates=stage.learning_rates,
        exact_router_loss=stage.exact_router_loss,
        callbacks=callbacks,
    )
    with PartialState().main_process_first():  # which clears away what is of no use
        checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is not None:
        logger.info("stage %s goes on from %s", stage.name, checkpoint)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.model.eval()
    data = [folder_name(stage.data)] if isinstance(stage.data, str | os.PathLike) else []
    base.config.parts = with_training(  # told before the save, which writes the card
        base.config.parts,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch, 2),
        data=data,
        stage=stage.name,
    )
    if isinstance(train_data, StreamedExamples):
        if writes:
            _write_data_report(stage, train_data, folder)
        log_problems(train_data.report, f"the stage {stage.name}")
    report = StageReport(
        stage=stage.stage,
        folder=str(folder),
        checkpoint=str(_save(trainer, stage, folder)),
        steps=trainer.state.global_step,
        seconds=round(result.metrics["train_runtime"], 1),
        log=trainer.state.log_history,
        trained=trained,
        data=without_places(train_data.report.to_dict(), _places(stage)),
        adapters={part: dataclasses.asdict(found) for part, found in reach.items()},
    )
    if writes:
        fields = dataclasses.asdict(report) | {"folder": ".", "checkpoint": Path(report.checkpoint).name}
        write_json_object(folder / _STAGE_REPORT, fields)
    PartialState().wait_for_everyone()  # the next stage reads what this one has made
    return report


def _warn_of_untrained_parts(stage: Stage, model: Any, trained: dict[str, Any]) -> None:
    untrained = [part for part in model.config.untrained_parts or () if not trained.get(part, {}).get("trained")]
    if untrained:
        logger.warning(
            "Never trained, and not trained by the stage %s either: %s. The weights are random, so answers about "
            "images stay meaningless.", stage.name, " and ".join(untrained),
        )  # fmt: skip


def _with_trained_parts(stage: Stage, model: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the model with the adapters of the stage, and what these reach; or with what is trained switched on."""
    reach: dict[str, Any] = {}
    if stage.lora is not None:
        routers = stage.lora.router if stage.lora.router is not None else stage.stage == "moe"
        model, reach = put_adapters(model, stage.lora, routers, stage.load_4bit or stage.load_8bit)
    else:
        set_trained(model, stage.stage, stage.freeze, stage.unfreeze)
    for part, counts in trained_parameters(model).items():
        logger.info("%s: %s of %s parameters are trained", part, f"{counts['trained']:,}", f"{counts['parameters']:,}")
    return model, reach


def _load(stage: Stage, source: Any, arguments: TrainingArguments) -> Any:
    set_seed(arguments.seed)  # a new projector and new routers are drawn alike each time
    quantised = stage.load_4bit or stage.load_8bit
    # The Trainer puts a model where it belongs, but for a quantised one.
    options: dict[str, Any] = {"device": arguments.device if quantised else "cpu"}
    if stage.distributed_config is not None:
        options = {"distributed_config": dict(stage.distributed_config)}
    options["dtype"] = stage.dtype or (None if quantised else "float32")
    options |= {name: True for name in ("load_4bit", "load_8bit") if getattr(stage, name)}
    if stage.image_aspect_ratio is not None:
        options["image_aspect_ratio"] = stage.image_aspect_ratio
    if stage.stage == "moe" and (stage.moe is not None or not _is_sparse(source)):
        options["moe_config"] = stage.moe or {}
    library = logging.getLogger(MoellavaForCausalLM.__module__)
    library.addFilter(_is_not_about_untrained_parts)  # `_run` says which stay so
    try:
        return load_pretrained_model(source, **options).model
    finally:
        library.removeFilter(_is_not_about_untrained_parts)


def _is_not_about_untrained_parts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Never trained")


def _is_sparse(source: Any) -> bool:
    request = read_request(source, {})
    fields = Source(request.model_path, request.hub_options).config_dict()
    is_own = fields["model_type"] == MoellavaConfig.model_type
    return request.moe is not None or (is_own and fields.get("moe_config") is not None)


def _examples(rows: Any, encoder: Encoder, stage: Stage) -> Examples | StreamedExamples:
    if rows.is_streamed:
        return StreamedExamples(rows, encoder)
    examples = Examples(rows, encoder, stage.check_pictures)
    log_problems(examples.report, f"the stage {stage.name}")
    if examples.report.problems and stage.unusable_rows == "error":
        raise ValueError(
            f"{len(examples.report.problems)} of the {examples.report.rows} rows cannot be used, and unusable_rows is "
            f"'error'. The first: {examples.report.problems[0]}."
        )
    return examples


def _save(trainer: MoellavaTrainer, stage: Stage, folder: Path) -> Path:
    """Saves what a stage has made: a checkpoint with its code and its processor, or an adapter left apart."""
    if stage.lora is None:
        trainer.save_model(str(folder / _MODEL))
        return folder / _MODEL
    trainer.save_model(str(folder / _ADAPTER))
    if not merges(stage):
        return folder / _ADAPTER
    if not PartialState().is_main_process:
        return folder / _MODEL
    processor = trainer.model.processor
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    # The base's dtypes, of which the sum has no sign any more; a dtype that was asked for is kept.
    dtypes = {} if stage.dtype else frozen_dtypes(adapted)
    merged = merge_adapter(adapted)
    merged.processor = processor
    # What is quantised is stored in a way of its own.
    weights = None if getattr(merged, "hf_quantizer", None) else frozen_as_loaded(merged, merged.state_dict(), dtypes)
    merged.save_pretrained(folder / _MODEL, state_dict=weights)
    return folder / _MODEL


__all__ = ["StageReport", "TrainingReport", "train"]
