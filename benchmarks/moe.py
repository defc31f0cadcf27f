# SPDX-License-Identifier: Apache-2.0
"""The experts' implementations against a floor, on this machine.

    python benchmarks/moe.py                 # every size; takes long on two cores
    python benchmarks/moe.py --quick         # the sizes of a decoding step and of a short prompt
    python benchmarks/moe.py --out build/moe.json

The floor is what no implementation can save: each touched expert's dense MLP, run once on its own tokens, which were
sorted beforehand. Every row is a ratio to the floor of the same run; implementations and floor take turns, and the
median over the repeats counts. `batched_mm` copies an expert's weights for every choice of a token, and is left out
for more than one token. The time of a size is bounded (`--seconds`), but for three repeats. Memory that was freed is
used again: zeroing fresh pages is no part of what is compared.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import measuring
import torch
from measuring import THREADS, alternating, reuse_freed_memory, seconds_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers.activations import ACT2FN

from moellava.parts.experts_moellava import BiasedPlainExperts, GatedExperts


WIDTHS = {
    "phi-2": (BiasedPlainExperts, 2560, 10240, "gelu_new"),
    "stablelm-1.6b": (GatedExperts, 2048, 5632, "silu"),
}
TINY_WIDTHS = {"tiny": (GatedExperts, 32, 64, "silu")}  # only to see that it runs
CHOICES = [(1, 4), (2, 4), (2, 8)]  # experts per token, experts
TOKENS = [1, 16, 128, 640, 4096]
IMPLEMENTATIONS = ["sorted_mm", "eager", "grouped_mm", "batched_mm"]
BATCHED_MM_LIMIT = 1
FLOOR_AIM, BEST_AIM = 1.15, 1.05


@dataclass
class Row:
    """One measured size: milliseconds of the floor, and every implementation's ratio to it."""

    widths: str
    dtype: str
    num_experts_per_tok: int
    num_experts: int
    tokens: int
    backward: bool
    floor_ms: float
    ratios: dict[str, float]


def make_experts(widths: str, num_experts: int, dtype: torch.dtype) -> nn.Module:
    experts_class, hidden_size, intermediate_size, activation = (WIDTHS | TINY_WIDTHS)[widths]
    config = SimpleNamespace(text_config=SimpleNamespace(initializer_range=0.02), _experts_implementation="eager")
    experts = experts_class(config, num_experts, hidden_size, intermediate_size, ACT2FN[activation])
    experts.initialize_parameters()
    return experts.to(dtype)


def make_floor(
    experts: nn.Module, tokens: torch.Tensor, index: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Returns the run of every touched expert on its own tokens, sorted beforehand, and the experts' own weights."""
    needs_grad = next(experts.parameters()).requires_grad
    weights = [
        tuple(None if weight is None else weight.detach().clone().requires_grad_(needs_grad) for weight in expert)
        for expert in experts.expert_weights()
    ]
    shares = [(weights[e], tokens[(index == e).any(dim=-1)]) for e in index.unique().tolist()]

    def run() -> torch.Tensor:
        return torch.cat([experts.run_expert(weight, share) for weight, share in shares])

    leaves = [weight for expert in weights for weight in expert if weight is not None]
    return run, leaves


def timed(run: Callable[[], torch.Tensor], backward: bool, leaves: list[torch.Tensor]) -> float:
    for leaf in leaves:
        leaf.grad = None

    def passes() -> None:
        with torch.set_grad_enabled(backward):
            output = run()
            if backward:
                output.sum().backward()

    return seconds_of(passes)


def measure(
    widths: str,
    dtype: torch.dtype,
    k: int,
    num_experts: int,
    tokens: int,
    backward: bool,
    repeats: int,
    seconds: float,
) -> Row:
    torch.manual_seed(0)
    experts = make_experts(widths, num_experts, dtype)
    experts.requires_grad_(backward)
    hidden_states = torch.randn(tokens, experts.hidden_size, dtype=dtype)
    scores = torch.rand(tokens, num_experts)
    weights, index = scores.softmax(-1).topk(k, dim=-1)
    weights = weights.to(dtype)

    floor, leaves = make_floor(experts, hidden_states, index)
    leaves += experts.parameters()
    runs = {"floor": floor}
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or tokens <= BATCHED_MM_LIMIT:
            runs[name] = lambda name=name: _run(experts, name, hidden_states, index, weights)
    times = alternating(runs, repeats, seconds=seconds, timer=lambda run: timed(run, backward, leaves))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Row(
        widths=widths,
        dtype=str(dtype).removeprefix("torch."),
        num_experts_per_tok=k,
        num_experts=num_experts,
        tokens=tokens,
        backward=backward,
        floor_ms=round(medians["floor"] * 1000, 3),
        ratios={name: round(medians[name] / medians["floor"], 3) for name in runs if name != "floor"},
    )


def _run(experts, name, hidden_states, index, weights) -> torch.Tensor:
    experts.config._experts_implementation = name
    return experts(hidden_states, index, weights)


def show(rows: list[Row]) -> None:
    machine = measuring.in_words(measuring.machine(torch.get_num_threads()))
    table = Table(title=f"ratio to the floor; {machine}")
    for column in ("widths", "dtype", "k of E", "tokens", "pass", "floor ms", *IMPLEMENTATIONS):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in IMPLEMENTATIONS]
        table.add_row(
            row.widths,
            row.dtype,
            f"{row.num_experts_per_tok} of {row.num_experts}",
            str(row.tokens),
            "forward+backward" if row.backward else "forward",
            f"{row.floor_ms:.1f}",
            *ratios,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def rows(quick: bool = False, tell: Callable[[str], None] = lambda what: None) -> list[measuring.Row]:
    """Measures the sizes that `make bench` shows: StableLM's widths, 2 of 4 experts; `tell` is told what comes next."""
    reuse_freed_memory()
    widths, repeats, numbers = ("tiny", 1, [1, 16]) if quick else ("stablelm-1.6b", 9, [1, 16, 128])
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, backward in [*((number, False) for number in numbers), (numbers[-1], True)]:
            name = str(dtype).removeprefix("torch.")
            label = f"{tokens} tokens, forward{' and backward' if backward else ''}, 2 of 4 experts, {name}"
            tell(label)
            row = measure(widths, dtype, 2, 4, tokens, backward, repeats=repeats, seconds=6)
            ratio = row.ratios["sorted_mm"]
            value = ratio * row.floor_ms
            found.append(
                measuring.Row("moe", label, "the floor", ratio, aim=FLOOR_AIM, value=value, peer_value=row.floor_ms)
            )
            best = min((name for name in row.ratios if name != "sorted_mm"), key=row.ratios.get)
            peer_value = row.ratios[best] * row.floor_ms
            found.append(
                measuring.Row("moe", label, best, value / peer_value, aim=BEST_AIM, value=value, peer_value=peer_value)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 128 tokens, 2 of 4 experts")
    parser.add_argument("--widths", choices=list(WIDTHS), action="append", help="which widths (default: all)")
    parser.add_argument("--tokens", type=int, action="append", help="which numbers of tokens (default: all)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="for a size, beyond three repeats")
    parser.add_argument("--choices", nargs="+", help="such as 2/4: experts per token / experts (default: all)")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reuse_freed_memory()
    choices = [(2, 4)] if arguments.quick else CHOICES
    if arguments.choices:
        choices = [tuple(map(int, choice.split("/"))) for choice in arguments.choices]
    sizes = [
        (widths, dtype, k, num_experts, tokens, backward)
        for widths in arguments.widths or WIDTHS
        for dtype in (torch.bfloat16, torch.float32)
        for k, num_experts in choices
        for tokens in arguments.tokens or ([1, 16, 128] if arguments.quick else TOKENS)
        for backward in (False, True)
    ]
    measured = []
    with Progress(transient=True) as progress:
        for size in progress.track(sizes):
            measured.append(measure(*size, repeats=arguments.repeats, seconds=arguments.seconds))
    show(measured)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([asdict(row) for row in measured], indent=1))


if __name__ == "__main__":
    main()
