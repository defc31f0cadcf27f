# SPDX-License-Identifier: Apache-2.0
"""The repository as a whole: how a clone can be used, what is said in one place, and what is said in two."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moellava


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
