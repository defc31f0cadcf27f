# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: taking turns, fresh processes, the description of the machine, rows and their table.

Every figure is a ratio to a peer or a floor of the same run. What is compared takes turns, in an order that is turned
round every time, the first round warms up, and the median counts.
"""

import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


THREADS = 2


@dataclass
class Row:
    """One ratio: what was measured, as a multiple of its peer; less is better.

    Attributes:
        benchmark, name, peer (`str`): Which benchmark, what was measured, what it is divided by.
        ratio (`float`): Of the medians.
        aim (`float`, *optional*): What the ratio is to be at most.
        value, peer_value (`float`, *optional*): The medians themselves, in `unit`.
        quartiles (`tuple[float, float]`, *optional*): Of the ratios of the single rounds.
        sizes, costs (`list[float]`): Of a growth: what grew, and the medians in `unit`.
        exponent (`float`, *optional*): Of a growth: the slope of a line through its logarithms.
        note (`str`): What else is to be known.
    """

    benchmark: str
    name: str
    peer: str
    ratio: float
    aim: float | None = None
    value: float | None = None
    peer_value: float | None = None
    unit: str = "ms"
    quartiles: tuple[float, float] | None = None
    sizes: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    exponent: float | None = None
    note: str = ""


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns how long a call takes, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternating(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    seconds: float = math.inf,
    least_repeats: int = 3,
    timer: Callable[[Callable[[], Any]], float] = seconds_of,
) -> dict[str, list[float]]:
    """Times calls that take turns.

    Args:
        runs (`Mapping[str, Callable]`): The calls by name.
        repeats (`int`): How many rounds count, beside the first, which warms up.
        seconds (`float`, *optional*): When no further round is begun, once there are `least_repeats`.
        least_repeats (`int`, *optional*, defaults to 3): How many rounds there are in any case.
        timer (`Callable`, *optional*): Runs a call and returns what it took, in seconds.

    Returns:
        `dict[str, list[float]]`: The seconds of every round by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > least_repeats and time.perf_counter() - began > seconds:
            break
        names = list(runs) if repeat % 2 else list(reversed(runs))
        for name in names:
            taken = timer(runs[name])
            if repeat:
                times[name].append(taken)
    return times


def compared(
    benchmark: str,
    name: str,
    peer: str,
    values: Sequence[float],
    peer_values: Sequence[float],
    *,
    per: float = 1.0,
    peer_per: float = 1.0,
    unit: str = "ms",
    **fields: Any,
) -> Row:
    """Returns the row of two series of the same rounds: seconds, or bytes with `unit="MB"`.

    Args:
        per, peer_per (`float`, *optional*): What the values are divided by, such as a number of tokens.
        fields: The other fields of `Row`.
    """
    scale = {"ms": 1e3, "MB": 1e-6}[unit]
    own = [value * scale / per for value in values]
    other = [value * scale / peer_per for value in peer_values]
    rounds = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    quartiles = tuple(statistics.quantiles(rounds, n=4)[::2]) if len(rounds) > 2 else (min(rounds), max(rounds))
    value, peer_value = statistics.median(own), statistics.median(other)
    return Row(
        benchmark,
        name,
        peer,
        value / peer_value,
        value=value,
        peer_value=peer_value,
        unit=unit,
        quartiles=quartiles,
        **fields,
    )


def growth(
    benchmark: str, name: str, what: str, times: Mapping[float, Sequence[float]], *, per: float = 1.0, **fields: Any
) -> Row:
    """Returns the row of a cost that grows with a size: the last over the first, and the exponent of the line between.

    Args:
        what (`str`): What the sizes count.
        times (`Mapping[float, Sequence[float]]`): Seconds by size, from the smallest to the largest.
        per (`float`, *optional*): What the values are divided by, such as a number of tokens.
        fields: The other fields of `Row`.
    """
    sizes = list(times)
    costs = [statistics.median(values) * 1e3 / per for values in times.values()]
    return Row(
        benchmark,
        name,
        f"{sizes[0]} {what}",
        costs[-1] / costs[0],
        value=costs[-1],
        peer_value=costs[0],
        sizes=sizes,
        costs=costs,
        exponent=exponent(sizes, costs),
        **fields,
    )


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the slope of the line that is fitted, by least squares, to the logarithms: 1 where costs are linear."""
    slope, _ = statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs])
    return slope


def in_fresh_process(script: str | os.PathLike, *arguments: object) -> dict[str, Any]:
    """Runs a script of this folder in a process of its own; returns the JSON of the last line that it writes."""
    command = [sys.executable, *map(str, (script, *arguments))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def forget_peak_memory() -> None:
    """Makes `memory("VmHWM")` tell the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def reuse_freed_memory() -> None:
    """Makes the C library keep what is freed, so that large tensors do not come from the kernel again every time.

    Fresh pages are zeroed one by one, at a price that depends on what else the machine has just done: with gradients of
    hundreds of megabytes, that price and not the arithmetic would decide a comparison.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:  # not glibc
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)):
        raise RuntimeError("mallopt has refused to keep freed memory; the figures would depend on the kernel's paging.")


def memory(name: str) -> int:
    """Returns, in bytes, a figure of this process: `VmRSS` (resident now) or `VmHWM` (the peak of that)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def machine(threads: int) -> dict[str, Any]:
    """Describes what the figures were measured on."""
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpu.read_text().splitlines() if ":" in line) if cpu.exists() else {}
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def in_words(machine: Mapping[str, Any]) -> str:
    """Returns `machine`'s description as a line."""
    return (
        f"{machine['cpu']} ({', '.join(machine['instructions'])}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; {machine['threads']} threads; torch {machine['torch']}, "
        f"transformers {machine['transformers']}; load at the start {machine['load_average']}"
    )


def word_tokenizer(num_words: int) -> Any:
    """Returns a tokenizer of `num_words` tokens: `<unk>`, `<s>`, `</s>`, and words from `word3` on."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"word{number}": number for number in range(3, num_words)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def print_progress(what: str) -> None:
    """Tells what is measured next. Plain lines: a thread that turns a spinner would take its share of the cores."""
    print(what, file=sys.stderr, flush=True)


def show(rows: Sequence[Row], title: str) -> None:
    """Prints the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column, justify in (("benchmark", "left"), ("measured", "left"), ("divided by", "left"), ("value", "right")):
        table.add_column(column, justify=justify)
    for column in ("ratio", "quartiles", "aim", "exponent"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        missed = row.aim is not None and row.ratio > row.aim
        table.add_row(
            row.benchmark,
            row.name + (f" ({row.note})" if row.note else ""),
            row.peer,
            "" if row.value is None else f"{row.value:,.1f} {row.unit}",
            f"[red]{row.ratio:.3f}[/red]" if missed else f"{row.ratio:.3f}",
            "" if row.quartiles is None else "{:.2f}-{:.2f}".format(*row.quartiles),
            "" if row.aim is None else f"{row.aim:.3f}",
            "" if row.exponent is None else f"{row.exponent:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def write(rows: Sequence[Row], described: Mapping[str, Any], path: Path) -> None:
    """Writes the rows, and what they were measured on, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**described, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the ratios as bars, with their aims, and the growths as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars, lines = [row for row in rows if not row.sizes], [row for row in rows if row.sizes]
    heights = [0.24 * len(bars) + 1, 3.6 if lines else 0.1]
    figure = pyplot.figure(figsize=(13, sum(heights) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    upper.suptitle(title, fontsize=9)
    axes = upper.subplots()
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(row.benchmark for row in rows))}
    for place, row in enumerate(bars):
        axes.barh(place, row.ratio, color=colours[row.benchmark], height=0.7)
        if row.aim is not None:
            axes.plot([row.aim] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        axes.text(max(row.ratio, row.aim or 0), place, f"  {row.ratio:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="grey", linewidth=0.8)
    labels = [f"{row.benchmark}: {row.name} / {row.peer}" for row in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("ratio (less is better); black: the aim, at most", fontsize=8)
    for axes, row in zip(lower.subplots(1, len(lines), squeeze=False)[0] if lines else [], lines, strict=True):
        axes.loglog(row.sizes, row.costs, "o-", color=colours[row.benchmark])
        axes.set_xticks(row.sizes, [f"{size:g}" for size in row.sizes], fontsize=7)
        axes.set_ylim(min(row.costs) / 1.5, max(row.costs) * 1.5)
        axes.set_yticks(row.costs, [f"{cost:.3g}" for cost in row.costs], fontsize=7)
        axes.minorticks_off()
        axes.set_title(f"{row.name}\nexponent {row.exponent:.2f}", fontsize=8)
        axes.set_ylabel(row.unit, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
