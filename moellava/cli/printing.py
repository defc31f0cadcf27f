# SPDX-License-Identifier: Apache-2.0
"""What commands print: JSON, the parts and weights of a checkpoint, numbers of parameters and bytes in words."""

import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from ..formatting import encodable, number_text, size_text


if TYPE_CHECKING:
    from rich.table import Table

    from ..inspecting import CheckpointSummary
    from ..inspecting.quantization import QuantizationCoverage
    from ..planning import Plan


def print_json(content: Any) -> None:
    """Prints something as indented JSON."""
    typer.echo(encodable(json.dumps(_finite(content), ensure_ascii=False, indent=2)))


def _finite(content: Any) -> Any:
    """Puts null in the place of what JSON has no number for, such as the loss of a training that diverged."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def describe_assembled(summary: "CheckpointSummary") -> None:
    """Tells on standard error what has been assembled."""
    typer.echo(
        f"{summary.checkpoint}: {summary.encoder.type} encoder, {summary.projector.type} projector, "
        f"{summary.language_model.model_type} language model; {summary.tokens_per_image} tokens per picture, "
        f"{number_text(summary.parameters.total)} parameters, {size_text(summary.bytes.disk)}.",
        err=True,
    )


def print_summary(summary: "CheckpointSummary") -> None:
    """Prints what a checkpoint is made of, as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width: nothing is to be wrapped there.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(summary.checkpoint, style="bold"))

    overview = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    overview.add_column(style="cyan", no_wrap=True)
    overview.add_column(overflow="fold")
    for label, text in _overview(summary):
        overview.add_row(label, Text(text))
    console.print(overview)

    is_sparse = summary.parameters.active != summary.parameters.total
    parts = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    parts.add_column("Part", overflow="fold")
    for header in ("Parameters", *(["Active"] if is_sparse else []), "On disk", "In memory"):
        parts.add_column(header, justify="right", no_wrap=True)
    for name, of in [*((part.name, part) for part in summary.parts), ("total", summary)]:
        active = [f"{of.parameters.active:,}"] if is_sparse else []
        cells = [name, f"{of.parameters.total:,}", *active, size_text(of.bytes.disk), size_text(of.bytes.memory)]
        parts.add_row(*map(Text, cells), style="bold" if of is summary else None)
    console.print()
    console.print(parts)

    if summary.coverage is not None:
        console.print()
        console.print(_coverage_table(summary.coverage))

    weights = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    weights.add_column("Weights", overflow="fold")
    weights.add_column("Count", justify="right", no_wrap=True)
    weights.add_column("Shape", no_wrap=True)
    weights.add_column("Dtype", no_wrap=True)
    for part in summary.parts:
        weights.add_row(Text(part.name, style="bold"))
        for group in part.groups:
            shape = " × ".join(map(str, group.shape)) or "scalar"
            weights.add_row(Text(f"  {group.name}"), str(group.count), shape, group.dtype)
        if not part.groups:
            weights.add_row(Text(f"  {'tied to the embedding' if 'tied' in part.type else 'none'}", style="dim"))
    console.print()
    console.print(weights)


def _coverage_table(coverage: "QuantizationCoverage") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    table.add_column("Quantised", overflow="fold")
    for header in ("Modules", "Parameters", "In memory", "Of bf16"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Left in full precision", overflow="fold")
    for name, of in [*((part.name, part) for part in coverage.parts), ("total", coverage)]:
        modules, left = "", ""
        if of is not coverage:
            modules = f"{of.quantized_modules} of {of.modules}"
            left = "; ".join(f"{count} {reason}" for reason, count in of.left.items())
        share = f"{of.bytes / of.bytes_bf16:.3f}" if of.bytes_bf16 else ""
        cells = [name, modules, f"{of.quantized_parameters:,}", size_text(of.bytes), share, left]
        table.add_row(*map(Text, cells), style="bold" if of is coverage else None)
    return table


def print_plan(plan: "Plan") -> None:
    """Prints what a stage of training takes, as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    total = sum(part["parameters"] for part in plan.parts.values())
    trained = sum(part["trained"] for part in plan.parts.values())
    console.print(Text(f"{plan.checkpoint}, stage {plan.stage}", style="bold"))
    console.print(
        f"{number_text(total)} parameters, {number_text(trained)} trained; {plan.batch_size} rows of {plan.length} "
        f"tokens a device, {plan.accumulation} of these a step; devices: {plan.devices}, {plan.strategy}"
    )
    table = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    table.add_column("Memory of one device")
    table.add_column("", justify="right")
    for name, size in [*vars(plan.memory).items(), ("total", plan.memory.total)]:
        table.add_row(name, size_text(size), style="bold" if name == "total" else None)
    console.print(table)
    hours = "" if plan.hours is None else f"; {plan.hours:.1f} hours for all rows"
    console.print(f"{plan.flops:.3g} operations and about {plan.seconds_per_step:.2f} seconds a step{hours}")
    if plan.fits is not None:
        console.print(
            f"{'Fits' if plan.fits else 'Does not fit'} in {size_text(plan.available)} with a tenth left free"
        )
    for change in plan.advice:
        console.print(f"  {change}")


def _overview(summary: "CheckpointSummary") -> Iterator[tuple[str, str]]:
    encoder, projector, language = summary.encoder, summary.projector, summary.language_model
    origins = {part.name: part.source for part in summary.parts if part.source}

    tower = [encoder.model_type]
    if encoder.num_hidden_layers is not None:
        tower.append(f"{encoder.num_hidden_layers} layers")
    if encoder.hidden_size is not None:
        tower.append(f"{encoder.hidden_size} wide")
    layers = encoder.vision_feature_layer
    layers = f"layer {layers}" if isinstance(layers, int) else f"layers {', '.join(map(str, layers))}"
    strategies = {"cls": "class token", "full": "all tokens", "default": "patch tokens", "patch": "patch tokens"}
    strategy = encoder.vision_feature_select_strategy
    tower.append(f"{strategies.get(strategy, strategy)} of {layers}")
    yield "Encoder", f"{encoder.type}: {', '.join(tower)}"
    if "vision_tower" in origins:
        yield "", f"from {origins['vision_tower']}"

    fields = ", ".join(f"{name}={value}" for name, value in projector.fields.items() if value is not None)
    incoming = "" if encoder.num_features is None else f"{encoder.num_features} × {encoder.feature_size} → "
    outgoing = f"{summary.tokens_per_image} × {language.hidden_size or '?'}"
    yield "Projector", f"{projector.type}: {incoming}{outgoing}{f' ({fields})' if fields else ''}"

    yield (
        "Language model",
        (
            f"{language.model_type}: {language.num_hidden_layers} layers, {language.hidden_size} wide, vocabulary "
            f"{language.vocab_size}, context {language.context_length}"
        ),
    )
    if "language_model" in origins:
        yield "", f"from {origins['language_model']}"
    if summary.sparse is not None:
        sparse = summary.sparse
        yield (
            "Experts",
            (
                f"{sparse.num_experts} in each of the layers {', '.join(map(str, sparse.layers))}; "
                f"{sparse.num_experts_per_tok} per token"
            ),
        )
    size = "" if summary.image_size is None else f"{summary.image_size} × {summary.image_size} pixels, "
    shape = "padded to a square" if summary.image_aspect_ratio == "pad" else "as the image processor resizes it"
    yield "Picture", f"{size}{shape}; {summary.tokens_per_image} tokens"

    parameters = f"{number_text(summary.parameters.total)} parameters"
    if summary.parameters.active != summary.parameters.total:
        parameters += f" ({number_text(summary.parameters.active)} active)"
    dtype = summary.dtype if summary.quantization is None else f"{summary.dtype}, quantised ({summary.quantization})"
    sizes = f"{size_text(summary.bytes.disk)} on disk, {size_text(summary.bytes.memory)} in memory"
    yield "Weights", f"{parameters}, {dtype}; {sizes}"
    if summary.untrained_parts:
        parts = " and ".join(summary.untrained_parts)
        yield "Untrained", f"{parts}: the weights are random, so answers about images are meaningless"
    if summary.own_code:
        yield "Own code", f"{', '.join(summary.own_code)}: loading it runs code and needs --trust-remote-code"


__all__ = ["describe_assembled", "print_json", "print_plan", "print_summary"]
