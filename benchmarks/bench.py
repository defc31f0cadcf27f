# SPDX-License-Identifier: Apache-2.0
"""All benchmarks, one after the other: a table, `bench.json` and `bench.png`. Run by `make bench`.

    python benchmarks/bench.py                     # a quarter of an hour on two quiet cores
    python benchmarks/bench.py --quick             # tiny: only to see that it runs
    python benchmarks/bench.py --only generation --out build/bench

Every row is a ratio to a peer or a floor of the same run; what is beyond its aim is red. Each benchmark can be run by
itself too, with options of its own.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import generation
import loading
import moe
import torch
import training
import vision
from measuring import THREADS, draw, in_words, machine, print_progress, show, write
from transformers import logging


# moe comes last: it changes how this process gets its memory.
BENCHMARKS = {
    "vision": vision.rows,
    "generation": generation.rows,
    "loading": loading.rows,
    "training": training.rows,
    "moe": moe.rows,
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="which benchmarks (default: all)")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="the folder for table and picture")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    described = machine(arguments.threads)
    began, rows = time.perf_counter(), []
    for name in arguments.only or BENCHMARKS:
        rows += BENCHMARKS[name](arguments.quick, lambda what, name=name: print_progress(f"{name}: {what}"))
    seconds = round(time.perf_counter() - began)
    title = in_words(described) + ("\ntiny sizes: the figures say nothing" if arguments.quick else "")
    show(rows, title)
    command = shlex.join(["python", "benchmarks/bench.py", *argv])
    described = {"command": command, "quick": arguments.quick, "seconds": seconds, "machine": described}
    write(rows, described, arguments.out / "bench.json")
    draw(rows, title, arguments.out / "bench.png")
    print_progress(f"{seconds} s; {arguments.out / 'bench.json'}, {arguments.out / 'bench.png'}")


if __name__ == "__main__":
    main()
