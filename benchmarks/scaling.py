# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/scaling.md: what training models of three sizes takes, by `moellava.plan`.

    python benchmarks/scaling.py            # prints them; five minutes, and no more memory than a small model
    python benchmarks/scaling.py --write    # puts them into the page
    python benchmarks/scaling.py --check    # fails where the page says something else

The models are configs alone, of the sizes that are published; nothing is downloaded and nothing is allocated.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measuring import print_progress
from transformers import CLIPVisionConfig, LlamaConfig, PhiConfig, StableLmConfig, logging

from moellava import MoellavaConfig, plan
from moellava.building.dense_to_sparse import upcycled_config
from moellava.planning import Plan


PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- written by benchmarks/scaling.py -->", "<!-- end -->"

TEXT = {
    "1.6B": StableLmConfig(
        vocab_size=100352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, use_qkv_bias=True,
    ),
    "2.7B": PhiConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, vocab_size=51200),
    "7B": LlamaConfig(max_position_embeddings=4096),
}  # fmt: skip
VISION = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14,
)  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "sparse"}

# Rows of LLaVA-1.5's data for each stage, and the tokens beside those of a picture: in the longest, and on average.
ROWS = {"align": 558_000, "instruct": 665_000, "moe": 665_000}
LONGEST = {"align": 64, "instruct": None, "moe": None}
AVERAGE = {"align": 64, "instruct": 448, "moe": 448}
SHARING = ((1, "replicated"), (8, "replicated"), (8, "zero2"), (8, "zero3"))
HOURS = (("A100", 1), ("A100", 8), ("H100", 8))


class Case(NamedTuple):
    """A line of each table."""

    size: str
    experts: bool
    stage: str

    @property
    def name(self) -> str:
        return f"{self.size}{', 4 experts' if self.experts else ''}"

    def planned(self, text_tokens: int | None, **options) -> Plan:
        config = MoellavaConfig(
            text_config=TEXT[self.size].to_dict(),
            vision_config=VISION.to_dict(),
            projector_config={"type": "mlp"},
            encoder_type="clip",
            image_token_id=TEXT[self.size].vocab_size - 1,
        )
        if self.experts and self.stage != "moe":
            config = upcycled_config(config, MOE)
        moe = MOE if self.stage == "moe" else None
        return plan(config, stage=self.stage, moe=moe, text_tokens=text_tokens, **options)


CASES = [
    Case(size, experts, stage)
    for size in TEXT
    for experts, stage in ((False, "align"), (False, "instruct"), (True, "moe"), (True, "instruct"))
]


def memory_table(cases: list[Case]) -> Iterator[str]:
    """Yields the lines of the table of memory, in GB."""
    yield (
        "| model | stage | rows | parameters | gradients | optimiser | activations | working | 1 device "
        "| 8, replicated | 8, zero2 | 8, zero3 |"
    )
    yield "|---|---|---|" + "---:|" * 9
    for case in cases:
        plans = [case.planned(LONGEST[case.stage], devices=devices, strategy=how) for devices, how in SHARING]
        one = plans[0].memory
        kinds = (one.parameters, one.gradients, one.optimizer, one.activations + one.copies, one.working)
        sizes = [f"{size / 1e9:.1f}" for size in (*kinds, *(each.memory.total for each in plans))]
        rows = f"{plans[0].batch_size} × {plans[0].length}"
        yield f"| {' | '.join([case.name, case.stage, rows, *sizes])} |"


def time_table(cases: list[Case]) -> Iterator[str]:
    """Yields the lines of the table of hours."""
    yield "| model | stage | parameters | trained | data | 1 A100 | 8 A100 | 8 H100 |"
    yield "|---|---|---:|---:|---|---:|---:|---:|"
    for case in cases:
        options = [{"gpu": gpu, "devices": devices, "rows": ROWS[case.stage]} for gpu, devices in HOURS]
        plans = [case.planned(AVERAGE[case.stage], **chosen) for chosen in options]
        counts = [sum(part[kind] for part in plans[0].parts.values()) for kind in ("parameters", "trained")]
        millions = [f"{count / 1e6:,.0f} M" for count in counts]
        data = f"{ROWS[case.stage]:,} × {plans[0].length}"
        hours = [f"{each.hours:.1f}" for each in plans]
        yield f"| {' | '.join([case.name, case.stage, *millions, data, *hours])} |"


def tables(cases: list[Case]) -> str:
    """Returns what stands in the page between the two marks."""
    told = []
    for table in (memory_table, time_table):
        told.append("")
        for line in table(cases):
            print_progress(line)
            told.append(line)
    return "\n".join([*told, ""]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    what.add_argument("--check", action="store_true", help="fail where docs/scaling.md says something else")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    told = "\n" + tables(CASES)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    if arguments.write:
        PAGE.write_text(f"{before}{BEGIN}{told}{END}{after}", encoding="utf-8")
    elif not arguments.check:
        print(told)
    elif told != written:
        sys.exit("docs/scaling.md says something else; python benchmarks/scaling.py --write puts it right.")


if __name__ == "__main__":
    main()
