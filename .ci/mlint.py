# SPDX-License-Identifier: Apache-2.0
"""Runs transformers-mlinter on the files that travel inside a checkpoint.

mlinter tells by a file's name which of its rules apply (`modeling_*.py`, `configuration_*.py`, ...), and looks for a
model's config in the same folder. Ours lie in several folders, under names such as `mlp_projector_moellava.py`: its
command line would pass over most of them and say OK. So they are laid out flat first, as in a checkpoint, each under
the prefix of the folder it comes from, and what is found is reported at its place in this repository.

Usage: python .ci/mlint.py
"""

import sys
import tempfile
from pathlib import Path

import mlinter


ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configuration", "modeling", "parts", "processing")
PREFIXES = ("configuration_", "modeling_", "processing_", "image_processing_", "video_processing_", "tokenization_")

# Rules that cannot fit code outside transformers' own tree, each with the reason. A rule listed here that would find
# nothing is reported too, so that the list does not outlive its reasons. For a single line that is right as it stands,
# write `# trf-ignore: TRF041` and the reason beside it instead.
SWITCHED_OFF = {
    "TRF028": "the licence is one SPDX line here, and not transformers' header",
    "TRF057": (
        "@auto_docstring takes a model's name, config and processor from its place under transformers/models; "
        "elsewhere it writes 'The bare None Model' and leaves the arguments' types empty"
    ),
}


def lay_out(folder: Path) -> dict[Path, Path]:
    """Copies the travelling files into `folder`, flat, under names that mlinter knows; returns copy -> original."""
    originals = {}
    for room in ROOMS:
        for source in sorted((ROOT / room).glob("*.py")):
            if source.name == "__init__.py":
                continue
            copy = folder / (source.name if source.name.startswith(PREFIXES) else f"{room}_{source.name}")
            if copy in originals:
                raise ValueError(
                    f"{source} and {originals[copy]} would both be {copy.name} in a checkpoint. Rename one."
                )
            copy.write_bytes(source.read_bytes())
            originals[copy] = source
    return originals


def main() -> int:
    unknown = sorted(set(SWITCHED_OFF) - set(mlinter.TRF_RULES))
    if unknown:
        print(f"mlinter {mlinter.__version__} knows no {', '.join(unknown)}: take it out of SWITCHED_OFF in {__file__}")
        return 2

    rules = mlinter.DEFAULT_ENABLED_TRF_RULES | set(SWITCHED_OFF)
    found, needed = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        originals = lay_out(Path(folder))
        if not originals:
            print(f"No travelling file in {', '.join(ROOMS)} under {ROOT}.")
            return 2
        for copy, original in originals.items():
            for violation in mlinter.analyze_file(copy, copy.read_text(encoding="utf-8"), enabled_rules=rules):
                if violation.rule_id in SWITCHED_OFF:
                    needed.add(violation.rule_id)
                    continue
                found += 1
                print(f"{original.relative_to(ROOT)}:{violation.line_number}: {violation.message}")

    stale = sorted(set(SWITCHED_OFF) - needed)
    for rule in stale:
        print(f"{rule} is switched off and would find nothing: take it out of SWITCHED_OFF in .ci/mlint.py.")
    off = ", ".join(sorted(needed)) or "none"
    print(f"mlinter: {len(originals)} files, {len(rules) - len(SWITCHED_OFF)} rules, off: {off}, {found} found")
    return 1 if found or stale else 0


if __name__ == "__main__":
    sys.exit(main())
