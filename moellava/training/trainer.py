# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` with learning rates by part, batches grouped by length, and the routers in its logs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..authoring.older_names import public_name
from ..reading.json_files import read_json_object
from .checkpoints import check_adapter, check_restored, restore
from .frozen import frozen_as_loaded
from .parts import PartNames, by_part
from .recipe import PUSHES_ALL


class SeededLengthSampler(LengthGroupedSampler):
    """Groups rows of about one length, in an order that the seed and the epoch tell alone.

    transformers' own draws from the state of the global generator, which a resumed run does not have at the beginning
    of the epoch that it goes on with.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next order is for."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class RouterStatistics:
    """Gathers router losses and expert loads of training steps until they are logged.

    Args:
        num_choices (`int`): How many experts a token goes to.
        layers (`list[int]`): The indices of the sparse layers.
    """

    def __init__(self, num_choices: int, layers: list[int]):
        self.num_choices = num_choices
        self.layers = layers
        self._clear()

    def _clear(self) -> None:
        self._loss, self._weight = 0.0, 0
        self._counts: list[Any] = [0] * len(self.layers)

    @torch.no_grad()
    def add(self, outputs: Any, attention_mask: torch.Tensor | None) -> None:
        """Takes the outputs of one forward pass, which hold `router_logits` and `aux_loss`."""
        kept = _kept(outputs["router_logits"][0], attention_mask)
        for position, logits in enumerate(outputs["router_logits"]):  # (tokens, experts)
            choices = logits.detach().topk(self.num_choices, dim=-1).indices[kept.to(logits.device)]
            counts = torch.bincount(choices.flatten(), minlength=logits.shape[-1])
            self._counts[position] = self._counts[position] + counts
        tokens = int(kept.sum())
        self._loss = self._loss + outputs["aux_loss"].detach().float() * tokens
        self._weight += tokens

    def pop(self, total: Callable[[torch.Tensor], torch.Tensor] = lambda own: own) -> dict[str, float]:
        """Returns what is to be logged, and begins anew.

        Args:
            total (callable, *optional*): Adds up a tensor over the processes, each of which has seen its own batches.

        Returns:
            `dict[str, float]`: The router loss, unweighted, and each expert's share of all choices of its layer.
        """
        if not self._weight:
            return {}
        loss, weight = total(torch.stack([self._loss, torch.full_like(self._loss, self._weight)])).tolist()
        logs = {"router_loss": loss / weight}
        for layer, counts in zip(self.layers, total(torch.stack(self._counts)), strict=True):
            shares = (counts.double() / counts.sum()).tolist()
            logs |= {f"expert_load/layer_{layer}/expert_{expert}": share for expert, share in enumerate(shares)}
        self._clear()
        return logs


class FirstChoices:
    """Counts, layer by layer, for how many tokens of a whole batch each expert is the first choice.

    The load-balancing loss is the product of two means over the batch: of the experts' shares of the first choices, and
    of their probabilities. Only the second has a gradient, and it is a sum over tokens. So with the shares of the whole
    batch the losses of its parts add up to the loss of the whole, and so do their gradients.
    """

    def __init__(self):
        self.counts: list[torch.Tensor] = []
        self.tokens: torch.Tensor | int = 0

    @torch.no_grad()
    def add(self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None) -> None:
        """Takes the router logits, `(tokens, experts)` of every layer, of a part of the batch."""
        kept = _kept(router_logits[0], attention_mask)
        counts = [
            torch.bincount(logits.argmax(dim=-1)[kept.to(logits.device)], minlength=logits.shape[-1])
            for logits in router_logits
        ]
        self.counts = [mine + new for mine, new in zip(self.counts, counts, strict=True)] if self.counts else counts
        self.tokens = self.tokens + kept.sum()

    def loss(self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Returns what a part of the batch has of the load-balancing loss of the whole."""
        kept = _kept(router_logits[0], attention_mask)
        total = router_logits[0].new_zeros((), dtype=torch.float)
        for logits, counts in zip(router_logits, self.counts, strict=True):
            probabilities = torch.softmax(logits[kept.to(logits.device)], dim=-1, dtype=torch.float).sum(dim=0)
            shares = counts.to(probabilities) / self.tokens
            layer = logits.shape[-1] * (probabilities * shares).sum() / self.tokens
            total = total + layer.to(total.device)
        return total


def _kept(logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Tells which tokens are no padding, `(tokens,)`."""
    if attention_mask is None:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return attention_mask.flatten().bool()


def _share(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """The share of the learnt tokens of a whole batch that a part of it has."""
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


def _without_place_of_base(adapter: Path) -> None:
    """Leaves of the base's path, which PEFT writes into an adapter's config and card, the last part."""
    config = adapter / "adapter_config.json"
    base = read_json_object(config).get("base_model_name_or_path") if config.is_file() else None
    name = public_name(base)
    for path in (config, adapter / "README.md"):
        if name != base and path.is_file():
            path.write_text(path.read_text(encoding="utf-8").replace(base, name), encoding="utf-8")


def _family_balances(config: Any) -> bool:
    """Whether the language model is sparse by itself, and its family has a load-balancing loss that counts."""
    text = config.text_config
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    is_asked = hasattr(text, "output_router_logits") and (getattr(text, "router_aux_loss_coef", None) or 0) > 0
    return config.moe_config is None and bool(experts) and is_asked


class MoellavaTrainer(Trainer):
    """The library's trainer; the arguments beside those of `Trainer` are:

    Args:
        learning_rates (`Mapping[str, float]`, *optional*): Learning rates of parts, by their names in recipes.
        exact_router_loss (`bool`, *optional*, defaults to `True`): Whether the load-balancing loss of a batch that is
            computed in parts is that of the whole. Every part then goes through the model once more beforehand, without
            gradients. Otherwise each part is balanced by itself.
    """

    def __init__(
        self, *args, learning_rates: Mapping[str, float] | None = None, exact_router_loss: bool = True, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.learning_rates = dict(learning_rates or {})
        config = self.model.config
        # Written by the library, it would be saved in every checkpoint; what counts is the language model's own field.
        vars(config).pop("use_cache", None)
        self._routers = None
        if config.moe_config is not None:
            self._routers = RouterStatistics(config.moe_config.num_experts_per_tok, list(config.moe_config.layers))
        self._balances = self._routers is not None or _family_balances(config)
        own_loss = self.compute_loss_func is not None  # the caller's, of which the router loss need not be a part
        self._exact_router_loss = (
            exact_router_loss
            and not own_loss
            and self._routers is not None
            and config.moe_config.router_aux_loss_coef > 0
        )
        if self.label_smoother is not None and not own_loss:
            self.compute_loss_func = self._smoothed_loss
        self._first_choices: FirstChoices | None = None
        self._uncounted: list[dict[str, torch.Tensor]] = []

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Refuses: the library would send the whole output folder, with the reports on the data.

        Raises:
            ValueError: Always.
        """
        raise ValueError(PUSHES_ALL)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Splits the groups that the library makes, by weight decay, into those of each learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.learning_rates:
            rates = {
                id(parameter): by_part(self.learning_rates, part, self.args.learning_rate)
                for part, _, parameter in PartNames(self.model if model is None else model)
            }
            groups: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                for rate in sorted({rates[id(parameter)] for parameter in group["params"]}):
                    params = [parameter for parameter in group["params"] if rates[id(parameter)] == rate]
                    groups.append({**group, "params": params, "lr": rate})
            optimizer.param_groups[:] = groups
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        # Of all processes together, so that the order is that of one process with the same batch.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthSampler(batch_size, dataset.lengths, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(eval_dataset, "lengths"):
            return super()._get_eval_sampler(eval_dataset)
        return SeededLengthSampler(self.args.eval_batch_size, eval_dataset.lengths, self.args.seed)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As the library does; keeps the parts of a batch until the routers' choices in it are counted."""
        parts, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._first_choices = None
        in_parts = len(parts) > 1 or self.accelerator.num_processes > 1
        self._uncounted = parts if self._exact_router_loss and in_parts and num_items_in_batch is not None else []
        return parts, num_items_in_batch

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        """As the library does; before the first part of a batch, counts what the routers choose in all of them."""
        if self._uncounted:  # only here has a resumed run the state of the generators again
            self._first_choices, self._uncounted = self._count_first_choices(model, self._uncounted), []
        return super().training_step(model, *args, **kwargs)

    @torch.no_grad()
    def _count_first_choices(self, model: nn.Module, parts: list[dict[str, torch.Tensor]]) -> FirstChoices:
        found = FirstChoices()
        model.train()
        device = self.args.device
        # With the noise that the parts are going to have: nothing else draws between them.
        with (
            torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
            self.compute_loss_context_manager(),
        ):
            for part in parts:
                inputs = {name: value for name, value in self._prepare_inputs(part).items() if name != "labels"}
                outputs = model(**inputs, output_router_logits=True, logits_to_keep=1)
                found.add(outputs["router_logits"], inputs.get("attention_mask"))
        found.counts = [self.accelerator.reduce(counts) for counts in found.counts]
        found.tokens = self.accelerator.reduce(found.tokens)
        return found

    def compute_loss(self, model, inputs, return_outputs: bool = False, **kwargs):
        """As the library does, with the load-balancing loss, which families with routers of their own add on request
        alone; notes what the routers of our sparse layers did in training."""
        is_smoothed = self.compute_loss_func == self._smoothed_loss
        if not self._balances or not (model.training or is_smoothed):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not model.training:  # asked for the loss alone: an evaluation gathers whatever it gets
            outputs = type(outputs)(
                **{key: outputs[key] for key in outputs if key not in ("router_logits", "aux_loss")}
            )
            return (loss, outputs) if return_outputs else loss
        if self._first_choices is not None:
            loss = loss + self._rest_of_router_loss(outputs, labels, mask, **kwargs)
        if self._routers is not None:
            self._routers.add(outputs, mask)
        return (loss, outputs) if return_outputs else loss

    def _smoothed_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The next-token loss with smoothed labels, and the router loss beside it.

        The library takes the labels away from the model, whose own loss has the router loss in it, and shifts them only
        for the classes of a list of its own.
        """
        loss = self.label_smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
        if outputs.get("aux_loss") is None:
            return loss
        config = self.model.config
        weight = (config.text_config if config.moe_config is None else config.moe_config).router_aux_loss_coef
        if num_items_in_batch is not None:
            weight = weight * _share(labels, num_items_in_batch)
        return loss + weight * outputs["aux_loss"].to(loss.device)

    def _rest_of_router_loss(
        self, outputs: Any, labels: torch.Tensor, mask: torch.Tensor | None, num_items_in_batch: torch.Tensor | int
    ) -> torch.Tensor:
        """Returns what is missing from the loss of a part of a batch, for the whole to have its own router loss; notes
        that in `outputs`."""
        part = self._first_choices.loss(outputs["router_logits"], mask)
        has = _share(labels, num_items_in_batch) * outputs["aux_loss"]
        # Averaged over all tokens by `RouterStatistics`, this is the loss of the whole.
        outputs["aux_loss"] = (
            part.detach() * self._first_choices.tokens / _kept(outputs["router_logits"][0], mask).sum()
        )
        # Gradients are averaged over the processes, whose shares of the loss add up.
        processes = self.accelerator.num_processes
        rest = part * processes - has * (processes if self.args.average_tokens_across_devices else 1)
        return self.model.config.moe_config.router_aux_loss_coef * rest

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As the library does, with frozen parts in the dtype that they were loaded from."""
        model = self.accelerator.unwrap_model(self.model)
        # What is quantised, sharded or an adapter, the library stores in ways of its own.
        special = getattr(model, "hf_quantizer", None) or getattr(model.config, "distributed_config", None)
        if isinstance(model, PreTrainedModel) and not special:
            state_dict = frozen_as_loaded(model, model.state_dict() if state_dict is None else state_dict)
        super()._save(output_dir, state_dict=state_dict)
        if not isinstance(model, PreTrainedModel):
            _without_place_of_base(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self._restore(resume_from_checkpoint, load)

    def _load_best_model(self) -> None:
        self._restore(self.state.best_model_checkpoint, super()._load_best_model)

    def _restore(self, checkpoint: str, load: Callable[[], None]) -> None:
        """Puts a checkpoint's weights into the model, or fails: a weight that keeps another value ruins a run."""
        self._restored = checkpoint
        # Divided models have loaders of the library's own, which write and read weights in the form that is held.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            load()
        elif isinstance(self.model, PreTrainedModel):
            restore(self.model, checkpoint)
        else:
            check_adapter(self.model, checkpoint)
            load()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        check_restored(self._restored, missing, load_result.unexpected_keys)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As the library does, with the router loss and the experts' loads beside the loss."""
        if self._routers is not None and "loss" in logs:
            logs = {**logs, **self._routers.pop(self.accelerator.reduce)}
        super().log(logs, *args, **kwargs)


__all__ = ["FirstChoices", "MoellavaTrainer", "RouterStatistics", "SeededLengthSampler"]
