# SPDX-License-Identifier: Apache-2.0
"""The repository as a whole: how a clone can be used, what is said in one place, and what is said in two."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moellava
from moellava import MoellavaConfig
from moellava.saving.export import code_of


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("test_biomedclip_encoder.py", "test_builder_enhanced.py", "test_projectors.py", "test_sigclip_encoder.py")
SEES_MODELS = """
import moellava, transformers
from moellava import MoellavaConfig, hub_cards, load_pretrained_model
config = transformers.AutoConfig.for_model("moellava")
print(moellava.__file__, type(config) is MoellavaConfig, hub_cards.__name__)
"""


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Runs Python as on a machine where the package is not installed: its dependencies are on the path, it is not."""
    site = next(path for path in sys.path if (Path(path) / "transformers").is_dir())
    # `-S` leaves out the site's .pth files, and with them the editable installation.
    env = os.environ | env | {"PYTHONPATH": os.pathsep.join(filter(None, [env.get("PYTHONPATH"), site]))}
    return subprocess.run([sys.executable, "-S", *command], cwd=cwd, env=env, capture_output=True, text=True)


def test_a_clone_on_the_path_is_the_package(tmp_path):
    done = run("-c", SEES_MODELS, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ROOT / 'moellava' / '__init__.py'} True moellava.hub_cards\n"


def test_the_root_of_a_clone_is_the_package():
    done = run("-c", SEES_MODELS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    done = run("-m", "moellava", "--version", cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"moellava {moellava.__version__}\n"), done.stderr


def test_tests_that_run_as_scripts(tmp_path):
    """They run their tests and end with the status of pytest, whose status without any test is 5."""
    for name in SCRIPTS:
        script = (ROOT / "tests" / name).read_text()
        assert script.endswith('if __name__ == "__main__":\n    raise SystemExit(pytest.main([__file__]))\n'), name
    options = f"-k no_such_test -c {os.devnull}"
    done = run(str(ROOT / "tests" / name), cwd=tmp_path, PYTHONPATH=str(ROOT), PYTEST_ADDOPTS=options)
    assert done.returncode == 5 and " deselected" in done.stdout, done.stdout + done.stderr


def test_what_is_public():
    assert dir(moellava) == sorted(moellava.__all__)
    source = (ROOT / "moellava" / "__init__.py").read_text()
    checked = source.partition("if TYPE_CHECKING:")[2].partition("_HOMES")[0]
    names = set(re.findall(r"\b[A-Za-z_]+\b", re.sub(r"from \.[\w.]+ import", "", checked)))
    assert names == set(moellava._HOMES) == set(moellava.__all__) - {"__version__"}
    assert (ROOT / "moellava" / "py.typed").is_file()


def test_a_type_checker_tells_a_wrong_name():
    """It reads `__all__` only word for word, and takes a module with `__getattr__` to have every name."""
    module = ast.parse((ROOT / "moellava" / "__init__.py").read_text())
    bound = {target.id: node.value for node in module.body if isinstance(node, ast.Assign) for target in node.targets}
    assert ast.literal_eval(bound["__all__"]) == moellava.__all__
    assert "__getattr__" not in [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    with pytest.raises(ImportError, match="cannot import name 'load_pretrained_modal' from 'moellava'"):
        from moellava import load_pretrained_modal  # noqa: F401


def test_the_version_has_one_place():
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == moellava.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == moellava.__version__


def test_hooks_before_a_commit_have_the_pinned_versions():
    pinned = dict(re.findall(r"^(ruff|codespell)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {re.search("ruff|codespell", repo["repo"])[0]: repo["rev"].removeprefix("v") for repo in repos}
    assert revisions == pinned


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_are_yaml(path):
    content = yaml.safe_load(path.read_text())
    for job in content.get("jobs", {}).values():
        for step in job["steps"]:
            command = step.get("run", "").split()
            assert "uses" in step or command
            if command[:1] == ["make"]:
                assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            elif command and command[0].startswith("."):
                assert (ROOT / command[0]).is_file()


# The circles and the suitcase

ROOMS = re.search(r"^ROOMS = (\{.*?\})", (ROOT / "setup.py").read_text(), re.DOTALL | re.MULTILINE)[1]
FOLDERS = {"moellava": "moellava", **ast.literal_eval(ROOMS)}


def modules() -> dict[str, Path]:
    """The files of the package by the names that they have when it is installed, as setup.py maps the folders."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, late imports included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names}
    return (found & known.keys()) - {name}


def test_no_circle_of_imports():
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert sum(map(len, graph.values())) > 300  # the files were found and read
    while graph:  # a file that imports none of the rest is in no circle
        ends = {name for name, targets in graph.items() if not targets & graph.keys()}
        if not ends:
            break
        graph = {name: targets for name, targets in graph.items() if name not in ends}
    inside = {name: sorted(targets & graph.keys()) for name, targets in graph.items()}
    assert not graph, "These import one another in a circle, or import from one:\n" + "\n".join(
        f"{name} -> {', '.join(targets)}" for name, targets in sorted(inside.items())
    )


def test_the_ground_stands_on_no_room_above_it():
    known = modules()
    for name, path in known.items():
        room = name.split(".")[1] if name.count(".") else ""
        allowed = {
            "configuration": {"configuration", "parts"},
            "parts": {"configuration", "parts"},
            "modeling": {"configuration", "parts", "modeling"},
            "processing": {"configuration", "processing"},
        }.get(room)
        reached = {target.split(".")[1] for target in imports(name, path, known) if target.count(".")}
        assert allowed is None or reached <= allowed, f"{name} imports from {sorted(reached - allowed)}"


TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3}
SUITCASES = {
    "dense CLIP, mlp, LLaMA": ({"model_type": "clip_vision_model"}, {"model_type": "llama"}, {}, 2500),
    "sparse SigLIP, Q-Former, Qwen2": (
        {"model_type": "siglip_vision_model"},
        {"model_type": "qwen2", "num_key_value_heads": 2},
        {"projector_config": {"type": "qformer"}, "moe_config": {"num_experts": 2}},
        3700,
    ),
}


def lines(config: MoellavaConfig) -> int:
    return sum(source.count("\n") for source in code_of(config).values())


@pytest.mark.parametrize("name", SUITCASES)
def test_the_lines_of_a_suitcase(name):
    vision, text, fields, most = SUITCASES[name]
    config = MoellavaConfig(vision_config=VISION | vision, text_config=TEXT | text, image_token_id=99, **fields)
    assert 1000 < lines(config) <= most


def test_a_projector_of_ones_own_brings_its_file_and_little_more(tmp_path, monkeypatch):
    source = (
        "from torch import nn\nfrom moellava import register_projector\n\n\n@register_projector('of_the_house')\n"
        "class OfTheHouse(nn.Module):\n    def __init__(self, vision_hidden_size, text_hidden_size):\n"
        "        super().__init__()\n        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)\n\n"
        "    def forward(self, image_features):\n        return self.linear(image_features)\n"
    )
    (tmp_path / "of_the_house.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_the_house")
    vision, text = VISION | {"model_type": "clip_vision_model"}, TEXT | {"model_type": "llama"}
    own, usual = (
        lines(
            MoellavaConfig(vision_config=vision, text_config=text, image_token_id=99, projector_config={"type": kind})
        )
        for kind in ("of_the_house", "mlp")
    )
    assert own <= usual + source.count("\n") + 60
