# SPDX-License-Identifier: Apache-2.0
"""`examples/quickstart.ipynb` runs from top to bottom, on small parts that have the names which it uses."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
NAMES = ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "openai/clip-vit-large-patch14")


@pytest.fixture(scope="module")
def executed(parts, tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook after a run in a folder in which the names of its parts are folders."""
    folder = tmp_path_factory.mktemp("notebook")
    hub = parts.hub(*NAMES)
    for name in NAMES:
        owner = name.partition("/")[0]
        (folder / owner).symlink_to(hub / owner)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
            patched.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook: nbformat.NotebookNode) -> str:
    """What the cells have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert cell.outputs == [] and cell.execution_count is None, cell.source
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_training_lowers_the_loss(executed):
    line = next(line for line in printed(executed).splitlines() if line.startswith("loss: "))
    first, last = (
        float(word) for word in line.replace(",", " ").split() if word.replace(".", "").isdigit() and "." in word
    )
    assert last < first


def test_the_checkpoint_is_loaded_without_the_package(executed):
    text = printed(executed)
    assert "moellava imported: False" in text
    lines = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("after training:", "elsewhere:")))
    assert lines["elsewhere"].strip() == lines["after training"].strip()


def test_the_parts_are_counted(executed):
    text = printed(executed)
    assert "tokens per picture: 16" in text
    rows = [
        line for line in text.splitlines() if line.startswith(("vision_tower", "multi_modal", "language_", "lm_head"))
    ]
    counts = [int(line.split()[-1].replace(",", "")) for line in rows]
    together = next(line for line in text.splitlines() if line.startswith("together"))
    assert len(counts) == 4 and sum(counts) == int(together.split()[-1].replace(",", ""))


def test_the_mixture_computes_what_the_dense_model_does(executed):
    line = next(line for line in printed(executed).splitlines() if line.startswith("largest difference"))
    assert float(line.split()[-1]) < 1e-3


def test_pictures_are_shown(executed):
    shown = [
        output for cell in executed.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 2  # the scan, and the routing
