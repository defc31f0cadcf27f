# SPDX-License-Identifier: Apache-2.0
"""A training step without weights: the model's own code runs on tensors that have a shape and no storage.

What a step keeps in memory depends on the family of the language model, on the tower, the projector, on what is frozen
and on what is computed anew. All of that is in the code that trains; here it runs, forward and backward, on PyTorch's
fake tensors, and every storage that would be allocated is counted from its birth to its end, as is every product of
matrices. Nothing is allocated, so that a model of any size is rehearsed on any machine in seconds.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Private, and nothing public does the same: there is no autocast for the meta device, and no attention's kernel. It is
# used in `rehearse` alone.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AttentionInterface
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..configuration import MoellavaConfig
from ..modeling import MoellavaForCausalLM
from ..training.adapters import put_adapters
from ..training.parts import set_trained, trained_parameters
from ..training.recipe import Stage


aten = torch.ops.aten


@dataclass(frozen=True)
class Batch:
    """What one device gets at once.

    Attributes:
        rows (`int`): How many conversations.
        length (`int`): The tokens of each, those of its pictures among them.
        images (`int`): The pictures of each.
    """

    rows: int
    length: int
    images: int


@dataclass(frozen=True)
class Rehearsal:
    """What one forward and backward pass takes on one device that holds the whole model. Sizes are in bytes.

    Attributes:
        parts (`dict`): Of every part, how many parameters it has and how many are trained.
        parameters (`int`): The parameters, and the buffers.
        gradients (`int`): The gradients of what is trained.
        optimizer (`int`): AdamW's two moments, and its count of steps, of what is trained.
        activations (`int`): What the forward pass keeps for the backward pass.
        copies (`int`): What it keeps of weights in the dtype that it computes in.
        working (`int`): What else there is at the highest point of the two passes.
        layer (`int`): The parameters of the largest layer.
        outside_layers (`int`): The parameters that are in no layer: embeddings, head, projector, ...
        flops (`int`): Floating-point operations of the forward and the backward pass, what is computed anew included.
        counting_flops (`int`): Those of the pass that counts what the routers choose, for the load-balancing loss of a
            batch in parts (`exact_router_loss`); 0 where there is none.
    """

    parts: dict[str, dict[str, int]]
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    copies: int
    working: int
    layer: int
    outside_layers: int
    flops: int
    counting_flops: int


class _Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made while it is active, as long as it lives, and the operations.

    Args:
        weights (`list[nn.Parameter]`): The parameters; copies of them in another dtype are counted apart.
    """

    def __init__(self, weights: list[nn.Parameter]):
        super().__init__()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        gradients = {weight.grad.untyped_storage()._cdata for weight in weights if weight.grad is not None}
        self._known = self._weights | gradients
        self.live = self.peak = self.copies = self.flops = 0
        self.kept = self.kept_copies = self.forward_flops = 0

    def end_forward(self) -> None:
        """Notes what is left of the forward pass."""
        self.kept, self.kept_copies, self.forward_flops = self.live, self.copies, self.flops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            # There are no values to look at. What the code asks of one is whether something is as it should be (as
            # many placeholders as features, no padding), and it is.
            return True
        if func is aten._grouped_mm.default:
            result = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        count = _FLOPS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        is_copy = func is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), is_copy)
        return result

    def _note(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.copies += size if is_copy else 0
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size, is_copy)

    def _forget(self, key: int, size: int, is_copy: bool) -> None:
        self._known.discard(key)
        self.live -= size
        self.copies -= size if is_copy else 0


def rehearse(config: MoellavaConfig, stage: Stage, batch: Batch, checkpoints: bool, mixed: bool) -> Rehearsal:
    """Runs a training step without weights.

    Args:
        config (`MoellavaConfig`): The model that is trained: of the stage `moe`, the sparse one.
        stage (`Stage`): What is trained of it, and the dtype of the weights.
        batch (`Batch`): What one device gets at once.
        checkpoints (`bool`): Whether activations are computed anew in the backward pass.
        mixed (`bool`): Whether the passes compute in bfloat16 where the weights are in float32.

    Raises:
        ImportError: Adapters are asked for, and PEFT is not installed.
        ValueError: Nothing would be trained.
    """
    dtype = getattr(torch, stage.dtype or "float32")
    # Families and PEFT know how to be built on the meta device, and not of fake tensors; there are no values to draw.
    with torch.device("meta"), no_init_weights():
        # On accelerators experts run by `grouped_mm`, whose shapes do not depend on which tokens they get.
        model = MoellavaForCausalLM._from_config(config, dtype=dtype, experts_implementation="grouped_mm")
        trained = _with_trained_parts(model, stage).train()
    body = model.model.language_model
    # Families that cannot use sdpa, or have it in classes of their own, run as they do.
    if body._can_set_attn_implementation() and body.config._attn_implementation == "sdpa":
        body.set_attn_implementation(_ATTENTION)
    if checkpoints:
        # Before transformers 5.23, it has the older name alone.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with FakeTensorMode():
        _make_fake(trained)
        ledger, gradients = _pass_through(trained, _inputs(model, batch), mixed)
        layers = _layers(model)
        balanced = config.moe_config is not None and config.moe_config.router_aux_loss_coef > 0
        head_flops = 2 * batch.rows * batch.length * model.lm_head.weight.numel()  # which counting does without
        return Rehearsal(
            parts=trained_parameters(trained),
            parameters=sum(_size(tensor) for tensor in (*trained.parameters(), *trained.buffers())),
            gradients=gradients,
            optimizer=sum(2 * _size(tensor) + 4 for tensor in trained.parameters() if tensor.requires_grad),
            activations=ledger.kept - ledger.kept_copies,
            copies=ledger.kept_copies,
            working=ledger.peak - ledger.kept,
            layer=max(layers),
            outside_layers=sum(tensor.numel() for tensor in model.parameters()) - sum(layers),
            flops=ledger.flops,
            counting_flops=ledger.forward_flops - head_flops if balanced else 0,
        )


def _with_trained_parts(model: MoellavaForCausalLM, stage: Stage) -> nn.Module:
    if stage.lora is None:
        set_trained(model, stage.stage, stage.freeze, stage.unfreeze)
        return model
    routers = stage.lora.router if stage.lora.router is not None else stage.stage == "moe"
    return put_adapters(model, stage.lora, routers, quantised=False)[0]


def _make_fake(model: nn.Module) -> None:
    """Puts fake tensors of the CPU in the places of a model's parameters and buffers; shared ones stay shared."""
    fakes: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            if tensor not in fakes:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            setattr(module, name, fakes[tensor])


def _inputs(model: MoellavaForCausalLM, batch: Batch) -> dict[str, Any]:
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if batch.images:
        side, vision = model.model.encoder.image_size, model.config.vision_config
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.zeros(batch.rows * batch.images, channels, side, side)
    if model.config.moe_config is not None:
        inputs["output_router_logits"] = True  # the Trainer's report on the experts asks for them
    return inputs


def _pass_through(model: nn.Module, inputs: dict[str, Any], mixed: bool) -> tuple[_Ledger, int]:
    """Runs forward and backward; returns what was counted, and the bytes of the gradients."""
    parameters = list(model.parameters())
    for parameter in parameters:
        # As from the second of several accumulated batches on: the gradients are there already.
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with _Ledger(parameters) as ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            outputs = model(**inputs)
        loss = outputs.loss
        if mixed:
            outputs.logits.float()  # accelerate hands out what a pass in mixed precision returns in float32
        del outputs
        ledger.end_forward()
        loss.backward()
    gradients = sum(_size(parameter.grad) for parameter in parameters if parameter.grad is not None)
    return ledger, gradients


def _layers(model: MoellavaForCausalLM) -> list[int]:
    """Returns the parameters of every layer of the language model and of the tower."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(child) for stack in stacks for child in stack.modules() if child is not stack}
    outermost = [stack for stack in stacks if id(stack) not in inner]
    return [sum(tensor.numel() for tensor in layer.parameters()) for stack in outermost for layer in stack]


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Rows of full length have no padding, and their attention has no mask beside its being causal. transformers leaves the
# mask out when it sees that none is needed, which fake tensors do not show.


def _attention_without_mask(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


_ATTENTION = "moellava_rehearsal"
AttentionInterface.register(_ATTENTION, _attention_without_mask)


# What PyTorch does not know of fake tensors, and of operations


def _grouped_product(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    # Real tensors may be in float32, fake ones are refused.
    if right.dim() == 3:  # (tokens, in) with (experts, in, out)
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(offs.shape[0], left.shape[0], right.shape[1])  # a gradient: (in, tokens) with (tokens, out)


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _grouped_flops(left: torch.Tensor, right: torch.Tensor, *args, **kwargs) -> int:
    return 2 * left.numel() * right.shape[-1]


_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten._grouped_mm: _grouped_flops,
}


__all__ = ["Batch", "Rehearsal", "rehearse"]
