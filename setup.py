# SPDX-License-Identifier: Apache-2.0
"""Installs the folders of this repository as one package, `moellava`.

The folders whose files travel inside a checkpoint (`configuration/`, `modeling/`, `parts/`, `processing/`) lie beside
the tools (`moellava/`), and become its sub-packages here. Tool settings are in `pyproject.toml`, exact versions in
`constraints.txt`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "moellava" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]

# Installed name -> folder. `moellava` itself may hold sub-packages of its own, which `find_packages` adds.
ROOMS = {
    "moellava.configuration": "configuration",
    "moellava.modeling": "modeling",
    "moellava.parts": "parts",
    "moellava.processing": "processing",
    "moellava.hub_cards": "hub_cards",
}

INSTALL_REQUIRES = [
    "torch>=2.6,<3",
    "torchvision>=0.21,<1",
    # 5.19 is the oldest version that `make test-versions` runs.
    "transformers>=5.19,<6",
    "accelerate>=1.1",
    "huggingface_hub>=1.31,<3",
    "safetensors>=0.8",
    "jinja2>=3.1",
    "numpy>=1.26",
    "pillow>=10",
    "pyyaml>=6",
    "rich>=13.8",
    "typer>=0.15",
]

EXTRAS = {
    # BiomedCLIP and other open_clip checkpoints, while assembling; the assembled model needs neither.
    "biomedclip": ["open_clip_torch>=3,<4", "timm>=1.0.17"],
    # Language models whose folder holds a tokenizer.model and no tokenizer.json.
    "sentencepiece": ["protobuf", "sentencepiece"],
    "quantized": ["bitsandbytes>=0.50"],
    "peft": ["peft>=0.18"],
    # Language models in GGUF files.
    "gguf": ["gguf>=0.17"],
    "train": ["datasets>=4", "pyyaml>=6", "tensorboard>=2.18"],
    # The page to try a checkpoint on. Gradio 6 wants Pillow below 13.
    "web": ["gradio>=6,<7"],
    "demo": ["matplotlib>=3.8", "scikit-learn>=1.4"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    # trl, nbclient, ipykernel and playwright: for the tests of training, of the notebook and of the page.
    "test": [
        *("pytest>=8", "pytest-cov>=6", "pytest-random-order>=1.1", "pytest-xdist>=3.6", "hypothesis>=6.100"),
        *("ipykernel>=6", "nbclient>=0.10", "playwright>=1.45", "trl>=1"),
    ],
    "lint": ["codespell>=2.4", "mypy>=2.4", "ruff>=0.17", "transformers-mlinter>=0.1.5"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})


setup(
    name="moellava",
    version=VERSION,
    description="Vision-language models assembled from parts, with sparse mixture-of-experts layers, for transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    author="The MoELLaVA authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["moellava", "moellava.*"]), *ROOMS],
    package_dir={"moellava": "moellava", **ROOMS},
    include_package_data=False,
    package_data={"moellava": ["py.typed"], "moellava.hub_cards": ["templates/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["moellava = moellava.cli:main"],
        # lmms-eval looks here for models that it does not know itself.
        "lmms_eval.models": ["moellava = moellava.evaluating.harness:manifest"],
    },
    zip_safe=False,
)
