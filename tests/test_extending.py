# SPDX-License-Identifier: Apache-2.0
"""Encoders and projectors of a user's own: what docs/extending.md says, from files outside of the package.

The checkpoints of the test that loads them elsewhere are made once, in files that users would write, and loaded
together in one process without the package.
"""

import importlib
import json
import linecache
import logging
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from parts import picture, run_python
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    ResNetConfig,
    ResNetModel,
)

from moellava import MoellavaConfig, MoellavaForCausalLM, load_pretrained_model, register_encoder, register_projector
from moellava.authoring.user_code import registered_in, user_sources
from moellava.configuration import MoellavaEncoderConfig
from moellava.parts.parts_moellava import ENCODERS, PROJECTORS
from moellava.saving.export import travelling_files


DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
TABLES = {"ENCODERS": ENCODERS, "PROJECTORS": PROJECTORS}


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch):
    """Every test has the registries to itself."""
    for registry in (ENCODERS, PROJECTORS):
        registry.names()  # the built-in parts are there
        for entries in ("_classes", "_answers"):
            monkeypatch.setattr(registry, entries, dict(getattr(registry, entries)))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function: `user("name.py", source)` writes a file into a folder outside of the package, and imports it."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)

    def write(name: str, source: str, is_imported: bool = True) -> ModuleType | None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        linecache.checkcache()
        if not is_imported:
            return None
        return importlib.import_module(".".join(Path(name).with_suffix("").parts).removesuffix(".__init__"))

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


GATED = """\
import torch.nn as nn

from moellava import register_projector


@register_projector("gated")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)
        self.gate = nn.Linear(vision_hidden_size, text_hidden_size)
        self.act = nn.Sigmoid()

    def forward(self, x):
        return self.linear(x) * self.act(self.gate(x))
"""

DINO = """\
# encoders/dino.py
import torch
from transformers import AutoImageProcessor, AutoModel
from moellava import register_encoder

@register_encoder("dino")
class DINOEncoder:
    def __init__(self, model_name_or_path, config=None):
        self.model_name_or_path = model_name_or_path
        self.config = config
        self.is_loaded = False
        
    def load_model(self):
        self.model = AutoModel.from_pretrained(self.model_name_or_path)
        self.image_processor = AutoImageProcessor.from_pretrained(self.model_name_or_path)
        self.is_loaded = True
        
    def to(self, **kwargs):
        if self.model is not None:
            self.model = self.model.to(**kwargs)
        return self
        
    def forward(self, images):
        if not self.is_loaded:
            self.load_model()
            
        outputs = self.model(images, output_hidden_states=True)
        # Extract the appropriate features based on config
        features = outputs.hidden_states[-2][:, 1:]
        return features
"""  # noqa: W293  as in the older document

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assemble(parts, tower: str | None = "clip", **settings):
    """A model of the tiny LLaMA, and of the tiny tower unless an encoder starts from nothing."""
    if tower is not None:
        settings["mm_vision_tower"] = str(parts.vision_tower(tower))
    return load_pretrained_model(str(parts.language_model()), device="cpu", **settings).model


@torch.no_grad()
def projected(model) -> torch.Tensor:
    return torch.cat(model.eval().get_image_features(PIXELS, return_dict=True).pooler_output)


def small_config(**settings) -> MoellavaConfig:
    """A config of a tiny LLaMA and a tiny CLIP tower, 16 tokens of width 32 to width 24."""
    tower = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "hidden_size": 32}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return MoellavaConfig(**{"text_config": text, "vision_config": tower, "image_token_id": 49, **settings})


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------


def test_every_block_of_the_document_runs(parts, tmp_path):
    blocks = re.findall(r"(?:<!-- ([^\n]*) -->\n)?```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    root = tmp_path / "work"
    hub = parts.hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "openai/clip-vit-large-patch14", "facebook/dinov2-base")
    for owner in ("TinyLlama", "openai", "facebook"):
        shutil.copytree(hub / owner, root / owner)
    files = [match for _, text in blocks if (match := re.match(r"# (\w+\.py)\n", text))]
    assert {match[1] for match in files} == {
        "gated_projector.py", "pooled_projector.py", "patch_encoder.py", "mean_encoder.py", "dino.py",
    }  # fmt: skip
    (tmp_path / "files").mkdir()
    for match in files:
        (tmp_path / "files" / match[1]).write_text(match.string, encoding="utf-8")
    scripts = [(comment, text) for comment, text in blocks if re.match(r"# \w+\.py\n", text) is None]
    assert [comment for comment, _ in scripts].count("") == 5

    def together(wanted: str) -> str:
        return "\n".join(text for comment, text in scripts if comment == wanted)

    printed = run_python(together(""), block_moellava=False, cwd=root, env={"PYTHONPATH": str(tmp_path / "files")})
    assert "8 2" in printed
    # Everything else is loaded where the files are not.
    elsewhere = 'import pathlib\nfor folder in sorted(pathlib.Path().glob("my-*")):\n'
    elsewhere += "    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)\n"
    elsewhere += "    print(folder, model.config.encoder_type, model.config.projector_config.type)\n"
    # What says that the package is not there is taken back for the block that has the package and not the file.
    without_file = '\nimport sys\ndel sys.modules["moellava"]\n' + together("without the file")
    without_file += "\nprint(type(model.model.multi_modal_projector).__module__)"
    printed = run_python(together("without moellava") + elsewhere + without_file, cwd=root).splitlines()
    assert printed[:-1] == [
        "my-dino-model dino_mean mlp", "my-gated-model clip gated", "my-older-model dino mlp",
        "my-patch-model patches mlp",
    ]  # fmt: skip
    assert printed[-1].endswith(".custom_gated_projector")


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere: without the files, and without the package
# ---------------------------------------------------------------------------------------------------------------------

# A projector in a package, with helpers; an encoder in another file of the same name. Every form of import.
KIT_PROJECTOR = '''\
"""A projector.

    from .elsewhere import not_an_import
"""
from __future__ import annotations

import argparse, moellava, math
from typing import TYPE_CHECKING

import torch
from torch import nn
from moellava.model.builder_enhanced import (  # a tool, used by main() alone
    load_pretrained_model,
)
from moellava import (
    register_projector as part,  # renamed
    MoellavaConfig,
)
from moellava.parts.mlp_projector_moellava import MlpProjector
import moellava.parts.mlp_projector_moellava as built_in

from . import helpers
from .helpers import (
    doubled,
    TWO as two,
)
from .deeper.more import halved; from .deeper import more
try:
    from . import compiled
except ImportError:
    compiled = None
try:
    from .helpers import tripled
except ImportError:
    from helpers import tripled
try:
    import no_such_distribution
except ImportError:
    no_such_distribution = None

if TYPE_CHECKING:
    import no_such_types


@part("kit")
class Part(MlpProjector):
    def __init__(self, vision_hidden_size: int, text_hidden_size: int, factor: float = 2.0, kernel=(1, 1)):
        super().__init__(vision_hidden_size, text_hidden_size)
        assert built_in.MlpProjector is MlpProjector and issubclass(MoellavaConfig, object) and isinstance(kernel, list)
        self.factor = factor

    def forward(self, x: no_such_types.Features):
        from .helpers import doubled as late

        assert late(1) == two == helpers.TWO and compiled is None and tripled(1) == 3 and more.halved is halved
        return doubled(halved(super().forward(x))) * self.factor


@moellava.register_projector("unused")
class Unused(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size): ...


def main():
    load_pretrained_model(argparse.ArgumentParser().parse_args().model)


if __name__ == "__main__":
    import no_such_plots

    main()
'''

KIT_HELPERS = '''\
"""Imports its importer, as files do."""
from . import projector  # noqa

TWO = 2


def doubled(x):
    return x * TWO


def tripled(x):
    return x * 3
'''

# An encoder that is hard on the meta device: values in the constructor and in forward, what no state dict holds.
PATCHES = """\
import torch
from torch import nn
import moellava as m


@m.register_encoder("patches")
class Part(nn.Module):
    num_prefix_tokens = 1

    def __init__(self, image_size=32, patch_size=8, hidden_size=24):
        super().__init__()
        steps = [step.item() for step in torch.arange(3) / 2]
        self.embed = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size)
        self.norm = nn.BatchNorm2d(hidden_size)
        self.first = nn.Parameter(torch.full((1, 1, hidden_size), steps[1]))
        self.register_buffer("ramp", torch.linspace(0.5, 1, hidden_size), persistent=False)
        self.register_buffer("steps", torch.tensor(steps))
        self.offset = torch.tensor(0.25)

    def forward(self, pixel_values):
        features = self.norm(self.embed(pixel_values)).flatten(2).transpose(1, 2)
        features = torch.cat([self.first.expand(len(features), -1, -1), features], dim=1)
        if features.isnan().any():
            raise FloatingPointError
        return features * self.ramp + self.offset * self.steps.sum()
"""

MEAN = """\
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from moellava import register_encoder


@register_encoder("mean")
class MeanEncoder(nn.Module):
    def __init__(self, backbone, num_layers=2):
        super().__init__()
        self.num_layers = num_layers
        self.backbone = AutoModel.from_config(AutoConfig.for_model(**backbone))

    @property
    def num_prefix_tokens(self):
        return 1 + getattr(self.backbone.config, "num_register_tokens", 0)

    def forward(self, pixel_values):
        hidden_states = self.backbone(pixel_values, output_hidden_states=True).hidden_states
        return torch.stack(hidden_states[-self.num_layers:]).mean(dim=0)

    @classmethod
    def read_source(cls, name, **hub_options):
        backbone = AutoModel.from_pretrained(name, **hub_options)
        return {"backbone": backbone.config}, {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
"""


def test_checkpoints_load_without_files_and_without_the_package(parts, user, tmp_path):
    user("kit/__init__.py", "", is_imported=False)
    user("kit/deeper/__init__.py", "", is_imported=False)
    user("kit/deeper/more.py", "from ..helpers import TWO\n\n\ndef halved(x):\n    return x / TWO\n", is_imported=False)
    user("kit/helpers.py", KIT_HELPERS, is_imported=False)
    user("kit/projector.py", KIT_PROJECTOR)
    user("projector.py", PATCHES)
    user("gated.py", GATED)
    user("dino.py", DINO)
    user("mean.py", MEAN)
    kit = {"type": "kit", "factor": 3.0}
    models = {
        "gated": assemble(parts, projector_type="gated"),
        "both": assemble(
            parts, None, encoder_type="patches", custom_vision_config={"hidden_size": 40}, projector_config=kit
        ),
        "dino": assemble(parts, "dinov2", encoder_type="dino", projector_type="gated", dtype="bfloat16"),
        "mean": assemble(parts, "dinov2_registers", encoder_type="mean", projector_type="linear"),
    }
    assert models["both"].config.projector_config.kernel == [1, 1]
    for name, model in models.items():
        model.model.vision_tower.train()(PIXELS.to(model.dtype))  # moves the running means of batch norms
        torch.save(
            {"state": model.state_dict(), "features": projected(model), "pixels": PIXELS}, tmp_path / f"{name}.pt"
        )
        model.save_pretrained(tmp_path / name)
        # Either order of saving keeps the user's code.
        model.processor.save_pretrained(tmp_path / name)
    code = sorted(path.name for path in (tmp_path / "both").glob("custom_*.py"))
    assert code == [
        "custom_helpers.py", "custom_kit.py", "custom_more.py", "custom_projector.py", "custom_projector_2.py",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "user")
    picture(0).save(tmp_path / "scan.png")

    loads = """
import torch
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor
root = Path({root!r})
for path in sorted(root.glob("*.pt")):
    kept = torch.load(path)
    folder = path.with_suffix({suffix!r})
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    state = model.state_dict()
    assert state.keys() == kept["state"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept["state"].items())
    with torch.no_grad():
        features = torch.cat(model.get_image_features(kept["pixels"], return_dict=True).pooler_output)
    assert torch.equal(features, kept["features"]), path
    inputs = processor(images=root / "scan.png", text="<image> what?", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    processor.save_pretrained(path.with_suffix(".again"))
    model.save_pretrained(path.with_suffix(".again"))
    processor.save_pretrained(path.with_suffix(".again"))
    print(path.stem)
"""
    names = "both\ndino\ngated\nmean\n"
    # One of them from the Hub's cache, where every file is fetched for itself.
    commit, cached = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--me--both"
    shutil.copytree(tmp_path / "both", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    from_hub = (
        'AutoModelForImageTextToText.from_pretrained("me/both", trust_remote_code=True).save_pretrained("saved")\n'
    )
    from_hub += 'print(len(list(Path("saved").glob("custom_*.py"))))\n'
    code = loads.format(root=str(tmp_path), suffix="") + from_hub
    assert run_python(code, env={"HF_HUB_CACHE": str(tmp_path / "hub")}) == names + "5\n"
    for name in models:
        first, second = ({path.name for path in (tmp_path / f"{name}{end}").iterdir()} for end in ("", ".again"))
        assert first - {"README.md"} == second  # the card is the package's to write
        for path in (tmp_path / name).glob("*.py"):
            assert path.read_bytes() == (tmp_path / f"{name}.again" / path.name).read_bytes()

    # As long as the package is installed, but not imported, the checkpoint's own code runs. Then it is imported.
    again = loads.format(root=str(tmp_path), suffix=".again").replace('.with_suffix(".again"))', '.with_suffix(".b"))')
    again += """
from moellava import load_pretrained_model
from transformers import AutoConfig


def fails(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except ValueError as error:
        print(error)


for name in ("mean", "gated"):
    fails(load_pretrained_model, root / name, device="cpu")
    fails(AutoConfig.from_pretrained, root / name, trust_remote_code=True)
    model = load_pretrained_model(root / name, device="cpu", trust_remote_code=True, encoder_debug=True).model
    kept = torch.load(root / f"{name}.pt")
    with torch.no_grad():
        features = torch.cat(model.get_image_features(kept["pixels"], return_dict=True).pooler_output)
    assert torch.equal(features, kept["features"])
    model.save_pretrained(root / f"{name}.b")
fails(load_pretrained_model, root / "gated", device="cpu", trust_remote_code=True, image_size=64)
"""
    printed = run_python(again, block_moellava=False)
    assert printed.startswith(names)
    printed = printed.removeprefix(names).splitlines()
    assert len(printed) == 5
    assert "has a part 'mean' of its author's own" in printed[0] and "trust_remote_code=True" in printed[0]
    assert printed[1].startswith("Unknown encoder 'mean'") and "trust_remote_code=True" in printed[1]
    assert "has a part 'gated' of its author's own" in printed[2]
    assert printed[3].startswith("Unknown projector 'gated'") and "importing the file" in printed[3]
    assert "cannot be changed while loading" in printed[4]


def test_a_checkpoint_loads_with_the_file_imported_and_can_be_changed(parts, user, tmp_path):
    user("gated.py", GATED)
    user("patches.py", PATCHES)
    model = assemble(parts, projector_type="gated")
    model.save_pretrained(tmp_path / "model")
    loaded = load_pretrained_model(str(tmp_path / "model"), device="cpu").model
    assert type(loaded.model.multi_modal_projector).__module__ == "gated"
    assert torch.equal(projected(loaded), projected(model))
    # Another tower: an encoder of the user's own, with new weights.
    changed = load_pretrained_model(
        str(tmp_path / "model"), device="cpu", encoder_type="patches", custom_vision_config={"hidden_size": 32}
    ).model
    assert changed.config.encoder_type == "patches" and changed.config.vision_config.hidden_size == 32
    assert projected(changed).isfinite().all()
    changed.save_pretrained(tmp_path / "changed")
    assert registered_in((tmp_path / "changed" / "moellava_custom.py").read_text()) == [
        ("ENCODERS", "patches"),
        ("PROJECTORS", "gated"),
    ]
    # Other fields of that encoder are another tower again, the same ones are not.
    settings = {"device": "cpu", "encoder_type": "patches"}
    same = load_pretrained_model(str(tmp_path / "changed"), custom_vision_config={"hidden_size": 32}, **settings).model
    assert torch.equal(projected(same), projected(changed))
    wider = load_pretrained_model(str(tmp_path / "changed"), custom_vision_config={"hidden_size": 48}, **settings)
    assert wider.model.model.vision_tower.first.shape[-1] == 48


def test_a_part_in_the_place_of_a_built_in_one_is_not_confused_with_it(parts, user, tmp_path):
    built_in = PROJECTORS["linear"]
    user("own.py", GATED.replace('"gated"', '"linear", exist_ok=True'))
    assemble(parts, projector_type="linear").save_pretrained(tmp_path / "model")
    PROJECTORS._classes["linear"] = built_in
    with pytest.raises(ValueError, match="'linear' of its author's own"):
        load_pretrained_model(str(tmp_path / "model"), device="cpu")
    loaded = load_pretrained_model(str(tmp_path / "model"), device="cpu", trust_remote_code=True).model
    assert hasattr(loaded.model.multi_modal_projector, "gate")


# ---------------------------------------------------------------------------------------------------------------------
# What cannot travel
# ---------------------------------------------------------------------------------------------------------------------


def sources_of(*parts_of_model: type) -> dict[str, str]:
    entered = {(table, name): registry[name] for table, registry in TABLES.items() for name in registry.names()}
    return user_sources({place: cls for place, cls in entered.items() if cls in parts_of_model}, travelling_files())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from helpers import x\n", r"line 1 .*`helpers` is provided by no installed .*`from .helpers import"),
        ("import no_such_file_here\n" * 0 + "import helpers.more\n", "`helpers.more` is provided by no installed"),
        (
            "try:\n    import helpers\nexcept ImportError:\n    helpers = None\n",
            "`helpers` is provided by no installed",
        ),
        ('TEXT = """\nfrom .x import y\n"""\n', r"line 2: 'from .x import' stands in a string"),
        ("from moellava import *\n", "import the names that you need from moellava"),
    ],
)
def test_files_that_would_not_work_elsewhere_are_refused(user, source, message):
    user("helpers/__init__.py", "x = 1\n")
    user("helpers/more.py", "")
    module = user("mine.py", source + GATED)
    with pytest.raises(ValueError, match=message):
        sources_of(module.GatedProjector)


def test_a_missing_relative_file_is_refused(user):
    user("kit/__init__.py", "")
    module = user("kit/mine.py", "def late():\n    from .gone import x\n\n\n" + GATED)
    with pytest.raises(ValueError, match="line 2 cannot travel in a checkpoint: there is no Python file .*gone.py"):
        sources_of(module.GatedProjector)


def test_classes_without_a_file_of_their_own_are_refused(parts, tmp_path, caplog):
    namespace = {"__name__": "notebook"}
    exec(compile(GATED, "<ipython-input-1>", "exec"), namespace)
    with caplog.at_level(logging.WARNING, logger="moellava"):
        model = assemble(parts, projector_type="gated")
    assert "The model can be used, but not saved. GatedProjector cannot travel" in caplog.text
    with pytest.raises(ValueError, match="GatedProjector .* is defined in no Python file, as in a notebook"):
        model.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())

    @register_projector("inner", exist_ok=True)
    class Inner(namespace["GatedProjector"]):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ValueError, match=r"is defined in test_classes_.*<locals>, not at the top level of a file"):
        sources_of(Inner)


def test_a_failed_save_leaves_the_earlier_checkpoint(parts, user, tmp_path):
    module = user("mine.py", GATED)
    model = assemble(parts, projector_type="gated")
    model.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    Path(module.__file__).write_text("import helpers_of_mine\n" + GATED)
    (tmp_path / "user" / "helpers_of_mine.py").touch()
    with pytest.raises(ValueError, match="helpers_of_mine"):
        model.save_pretrained(tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    (tmp_path / "config").mkdir()
    with pytest.raises(ValueError, match="helpers_of_mine"):
        model.config.save_pretrained(tmp_path / "config")
    assert not any((tmp_path / "config").glob("*.py"))


def test_a_class_of_the_script_itself_is_refused(parts, tmp_path):
    (tmp_path / "train.py").write_text(GATED, encoding="utf-8")
    runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
    model = assemble(parts, projector_type="gated")
    with pytest.raises(ValueError, match="GatedProjector .* is defined in the script train.py.* file of its own"):
        model.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_the_file_is_found_by_the_class_and_not_by_its_module(user, monkeypatch):
    module = user("mine.py", GATED)
    with monkeypatch.context() as patch:  # put back before `user` takes the module out
        patch.delitem(sys.modules, "mine")
        assert "class GatedProjector" in sources_of(module.GatedProjector)["custom_mine.py"]
        patch.setitem(sys.modules, "mine", sys.modules[__name__])
        assert "class GatedProjector" in sources_of(module.GatedProjector)["custom_mine.py"]


def test_an_own_part_is_registered_even_without_a_decorator(user):
    module = user("mine.py", GATED.replace('@register_projector("gated")\n', ""))
    register_projector("by_call")(module.GatedProjector)
    sources = sources_of(module.GatedProjector)
    assert registered_in(sources["moellava_custom.py"]) == [("PROJECTORS", "by_call")]
    assert sorted(sources) == ["custom_mine.py", "moellava_api.py", "moellava_custom.py"]


# ---------------------------------------------------------------------------------------------------------------------
# Names and classes
# ---------------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size, num_layers=1):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("name", ["", "Gated", "gated-2", "gated.2", "gäted", "a b", 3, None])
def test_names_are_lower_case_words(name):
    with pytest.raises(ValueError, match="cannot name a projector: a name is made of lower-case letters"):
        register_projector(name)
    with pytest.raises(ValueError, match="cannot name an encoder: a name is made of"):
        register_encoder(name)


def test_registering_twice_is_an_error_unless_asked():
    def define():
        class Same(Plain):
            pass

        return Same

    first = register_projector("same_2")(define())
    assert PROJECTORS["same_2"] is first
    for another in (define(), first, Plain):
        with pytest.raises(ValueError, match="'same_2' is registered already, by .*Same. .*exist_ok=True"):
            register_projector("same_2")(another)
    assert PROJECTORS["same_2"] is first
    assert register_projector("same_2", exist_ok=True)(Plain) is Plain is PROJECTORS["same_2"]
    with pytest.raises(ValueError, match="'mlp' is registered already"):
        register_projector("mlp")(Plain)
    with pytest.raises(ValueError, match="'clip' is registered already"):
        register_encoder("clip")(nn.Identity)


def test_running_a_file_again_is_no_error(user, tmp_path):
    module = user("gated.py", GATED)
    first = PROJECTORS["gated"]
    importlib.reload(module)
    assert PROJECTORS["gated"] is module.GatedProjector is not first
    del sys.modules["gated"]
    assert importlib.import_module("gated").GatedProjector is PROJECTORS["gated"]
    # by another way to the same file
    spec = importlib.util.spec_from_file_location("gated_by_path", tmp_path / "user" / "gated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PROJECTORS["gated"] is module.GatedProjector
    # a notebook's cell
    namespace = {"__name__": "__main__"}
    for _ in range(2):
        exec(compile(GATED.replace('"gated"', '"cell"'), "<ipython-input-1>", "exec"), namespace)
    # another file
    with pytest.raises(ValueError, match="'gated' is registered already, by gated_by_path.GatedProjector"):
        user("other.py", GATED)


def test_unknown_names_list_the_known_ones(user):
    user("gated.py", GATED)
    with pytest.raises(ValueError, match="Unknown projector 'gatd'; did you mean 'gated'.*Known: gated, identity,"):
        PROJECTORS["gatd"]
    with pytest.raises(ValueError, match="Unknown projector 'GATED'; did you mean 'gated'"):
        PROJECTORS["GATED"]
    with pytest.raises(ValueError, match="Unknown encoder 'dino'.*Known: auto, biomedclip, clip, dinov2, siglip, vit"):
        ENCODERS["dino"]


def test_classes_that_cannot_be_the_part_are_refused():
    with pytest.raises(TypeError, match="decorates a class, got function"):
        register_projector("a_function")(lambda: None)
    with pytest.raises(TypeError, match="NoModule is no torch.nn.Module"):

        @register_projector("no_module")
        class NoModule:
            def __init__(self, vision_hidden_size, text_hidden_size): ...

    with pytest.raises(TypeError, match="NoEncoder is no torch.nn.Module. .*load_model"):

        @register_encoder("no_encoder")
        class NoEncoder:
            def forward(self, images): ...

    with pytest.raises(TypeError, match=r"its constructor takes \(width, text_hidden_size\), without vision_hidden_"):

        @register_projector("other_arguments")
        class OtherArguments(nn.Module):
            def __init__(self, width, text_hidden_size): ...

    for field in ("dtype", "type", "path", "num_labels"):
        namespace = {"nn": nn}
        exec(
            f"class P(nn.Module):\n    def __init__(self, vision_hidden_size, text_hidden_size, {field}=1): ...",
            namespace,
        )
        with pytest.raises(ValueError, match=f"has a field '{field}', a name that means something else in a config"):
            register_projector("reserved")(namespace["P"])
    assert not {"no_module", "no_encoder", "other_arguments", "reserved"} & {*PROJECTORS.names(), *ENCODERS.names()}


def test_arguments_may_stand_in_any_order():
    @register_projector("any_order")
    class AnyOrder(nn.Module):
        def __init__(self, *, bias=True, text_hidden_size, vision_hidden_size):
            super().__init__()
            self.linear = nn.Linear(vision_hidden_size, text_hidden_size, bias)

        def forward(self, x):
            return self.linear(x)

    model = MoellavaForCausalLM(small_config(projector_config={"type": "any_order", "bias": False}))
    assert model.model.multi_modal_projector.linear.weight.shape == (24, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Fields, shapes and values
# ---------------------------------------------------------------------------------------------------------------------


def test_fields_keep_their_own_names_and_plain_values():
    register_projector("plain")(Plain)
    config = small_config(projector_config={"type": "plain", "num_layers": 3})
    assert config.projector_config.fields == {"num_layers": 3}
    assert MoellavaConfig.from_dict(json.loads(config.to_json_string())).projector_config.fields == {"num_layers": 3}
    with pytest.raises(ValueError, match="'plain' has no field 'num_layer'; did you mean 'num_layers'"):
        small_config(projector_config={"type": "plain", "num_layer": 3})
    with pytest.raises(
        ValueError, match="The field 'num_layers' of the projector 'plain' is a type, which config.json"
    ):
        small_config(projector_config={"type": "plain", "num_layers": nn.GELU})
    backbone = Dinov2Config(hidden_size=32, _name_or_path="/home/me", auto_map={"AutoModel": "x.Y"})
    given = MoellavaEncoderConfig(backbone=backbone, kernel=(2, 2)).fields
    assert given["kernel"] == [2, 2] and given["backbone"]["hidden_size"] == 32
    assert not {"_name_or_path", "auto_map", "trust_remote_code"} & given["backbone"].keys()
    assert "/home/me" not in MoellavaEncoderConfig(backbone=backbone).to_json_string()


class Pooled(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size, stride=4, width=None):
        super().__init__()
        self.pool = nn.AvgPool1d(stride)
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size if width is None else width)

    def forward(self, x):
        return self.linear(self.pool(x.transpose(1, 2)).transpose(1, 2))


def test_the_number_of_tokens_is_measured():
    register_projector("pooled")(Pooled)
    assert small_config(projector_config={"type": "pooled"}).image_seq_length == 4
    assert small_config(projector_config={"type": "pooled", "stride": 8}).image_seq_length == 2

    class Counted(Pooled):
        @classmethod
        def num_output_tokens(cls, num_tokens, stride=4):  # takes some of the fields
            return num_tokens // stride

    register_projector("counted")(Counted)
    assert small_config(projector_config={"type": "counted", "stride": 2}).image_seq_length == 8

    class Miscounted(Pooled):
        @staticmethod
        def num_output_tokens(num_tokens, **fields):
            return num_tokens

    register_projector("miscounted")(Miscounted)
    with pytest.raises(ValueError, match="says 16 tokens for 16 image features, but forward returns 4"):
        small_config(projector_config={"type": "miscounted"})
    with pytest.raises(
        ValueError, match=r"Pooled makes \(2, 4, 7\) of .* expected a tensor of shape \(2, tokens, 24\)"
    ):
        small_config(projector_config={"type": "pooled", "width": 7})
    with pytest.raises(ValueError, match=r"Pooled cannot be run on image features of shape \(2, 16, 32\): "):
        small_config(projector_config={"type": "pooled", "stride": 17})


class Valued(nn.Module):
    """Values of every kind, and of no standard layer's initialisation."""

    def __init__(self, vision_hidden_size, text_hidden_size):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)
        nn.init.constant_(self.linear.weight, 0.5)
        self.scale = nn.Parameter(torch.full((text_hidden_size,), 3.0))
        self.queries = nn.Parameter(torch.zeros(text_hidden_size))
        self.register_buffer("table", torch.arange(text_hidden_size) + 0.5, persistent=False)
        self.register_buffer("counter", torch.tensor(7))
        self.shift = torch.tensor([2.0])

    def initialize_parameters(self):
        self.queries.data.fill_(9.0)  # without regard to what was loaded

    def forward(self, x):
        return self.linear(x) * self.scale + self.queries + self.table + self.shift


def values(projector: nn.Module) -> list[float]:
    names = ("scale", "queries", "table", "counter", "shift")
    return [projector.linear.weight.mean().item(), *(getattr(projector, name).max().item() for name in names)]


def test_new_weights_are_what_the_constructor_makes_them(parts, tmp_path, monkeypatch):
    register_projector("valued")(Valued)
    width = parts_width = assemble(parts, projector_type="valued", dtype="bfloat16").model.multi_modal_projector
    expected = [0.5, 3.0, 9.0, width.table.shape[0] - 0.5, 7, 2.0]
    assert values(parts_width) == expected and width.scale.dtype == torch.bfloat16
    model = MoellavaForCausalLM(small_config(projector_config={"type": "valued"}))
    expected[3] = 23.5
    assert values(model.model.multi_modal_projector) == expected
    # What was loaded stays; what is in no file is made again.
    with torch.no_grad():
        model.model.multi_modal_projector.queries.fill_(1.5)
        model.model.multi_modal_projector.counter.fill_(8)
    monkeypatch.setattr("moellava.saving.checkpoint.export_code", lambda *args, **kwargs: [])
    model.save_pretrained(tmp_path)
    loaded = MoellavaForCausalLM.from_pretrained(tmp_path)
    assert values(loaded.model.multi_modal_projector) == [0.5, 3.0, 1.5, 23.5, 8, 2.0]
    # The random numbers of a user's program do not depend on how often a part is measured.
    torch.manual_seed(0)
    small_config(projector_config={"type": "valued"})
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------------------------------------------------------------
# Encoders
# ---------------------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three layers, with a class token before the patches, or before a register the class token."""

    num_prefix_tokens = 2

    def __init__(self, image_size=32, hidden_size=8):
        super().__init__()
        self.embed = nn.Conv2d(3, hidden_size, 8, stride=8)

    def forward(self, pixel_values):
        features = self.embed(pixel_values).flatten(2).transpose(1, 2)
        first = torch.stack([features.mean(dim=1), features.amax(dim=1)], dim=1)
        features = torch.cat([first, features], dim=1)
        return [features, features * 10, features * 100]


def test_layers_and_tokens_are_chosen_as_of_any_tower():
    register_encoder("layers")(Layers)

    def selected(**settings) -> torch.Tensor:
        config = small_config(encoder_type="layers", vision_config=MoellavaEncoderConfig(), **settings)
        model = MoellavaForCausalLM(config)
        nn.init.constant_(model.model.vision_tower.embed.weight, 0.01)
        features = model.model.encoder.encode(model.model.vision_tower, PIXELS).last_hidden_state
        assert features.shape[1:] == (model.model.encoder.num_selected_tokens, model.model.encoder.feature_size)
        assert config.image_seq_length == features.shape[1]
        with torch.no_grad():
            return features / features[:, :1, :1]

    assert selected().shape == (2, 16, 8)
    assert selected(vision_feature_select_strategy="cls").shape == (2, 1, 8)
    full = selected(vision_feature_select_strategy="full", vision_feature_layer=[0, -1])
    assert full.shape == (2, 18, 16) and torch.allclose(full[..., 8:], full[..., :8] * 100)
    with pytest.raises(ValueError, match="vision_feature_layer -4 is out of range: the layers tower has 2 layers"):
        selected(vision_feature_layer=-4)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: x.mean(dim=(2, 3)), r"makes features of shape \(2, 3\) of pictures of shape \(2, 3, 32, 32\)"),
        (lambda self, x: x[:1].flatten(2), r"makes features of shape \(1, 3, 1024\)"),
        (lambda self, x: {"features": x}, "it returns a NoneType"),
        (lambda self, x: self.missing(x), "AttributeError: .*missing"),
    ],
)
def test_encoders_that_return_no_features_are_refused(forward, message):
    namespace = {"forward": forward, "__init__": lambda self, image_size=32: nn.Module.__init__(self)}
    register_encoder("wrong")(type("Wrong", (nn.Module,), namespace))
    with pytest.raises(ValueError, match=f"The encoder 'wrong' .*{message}"):
        small_config(encoder_type="wrong", vision_config=MoellavaEncoderConfig())


def test_an_encoder_and_its_pictures_agree_on_their_size(parts, user):
    user("patches.py", PATCHES)
    model = assemble(parts, None, encoder_type="patches", image_size=48)
    assert model.model.encoder.fields["image_size"] == 48 == model.config.vision_config.image_size
    assert model.config.image_seq_length == 36
    inputs = model.processor(images=picture(1), text="<image>", return_tensors="pt")
    assert (
        inputs["pixel_values"].shape == (1, 3, 48, 48)
        and (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    )

    @register_encoder("sized_by_its_processor")
    class Sized(Layers):
        def __init__(self, hidden_size=8):
            super().__init__(hidden_size=hidden_size)

        @staticmethod
        def image_processor(hidden_size):
            side = {"height": 40, "width": 40}
            return CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.1] * 3)

    model = assemble(parts, None, encoder_type="sized_by_its_processor")
    assert model.model.encoder.image_size == 40 and list(model.processor.image_processor.image_mean) == [0.1] * 3

    @register_encoder("without_a_size")
    class WithoutSize(Sized):
        image_processor = None

    with pytest.raises(ValueError, match="'without_a_size' does not tell the size of its pictures"):
        assemble(parts, None, encoder_type="without_a_size")
    model = assemble(parts, None, encoder_type="without_a_size", image_size=24)
    assert model.config.image_seq_length == 9


def test_weights_of_an_own_encoder_come_from_its_folder(parts, user, tmp_path):
    part = user("patches.py", PATCHES).Part
    weights = part(hidden_size=16).state_dict()
    (tmp_path / "weights").mkdir()
    save_file(weights, tmp_path / "weights" / "model.safetensors")
    settings = {"encoder_type": "patches", "mm_vision_tower": str(tmp_path / "weights")}
    model = assemble(parts, None, custom_vision_config={"hidden_size": 16}, **settings)
    state = model.model.vision_tower.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match="have another shape than the config says"):
        assemble(parts, None, custom_vision_config={"hidden_size": 24}, **settings)
    del weights["first"]
    save_file(weights, tmp_path / "weights" / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing from the parts' files: model.vision_tower.first\b"):
        assemble(parts, None, custom_vision_config={"hidden_size": 16}, **settings)
    with pytest.raises(ValueError, match="'patches' has no field 'hidden_sise'; did you mean 'hidden_size'"):
        assemble(parts, None, encoder_type="patches", custom_vision_config={"hidden_sise": 16})


def test_an_encoder_around_a_backbone_computes_what_the_backbone_does(parts, user):
    user("mean.py", MEAN)
    folder = str(parts.vision_tower("dinov2_registers"))
    vision = {"type": "mean", "mm_vision_tower": folder, "num_layers": 3}
    model = assemble(parts, None, custom_vision_config=vision)
    with torch.no_grad():
        hidden_states = AutoModel.from_pretrained(folder)(PIXELS, output_hidden_states=True).hidden_states
        features = model.model.encoder.encode(model.model.vision_tower, PIXELS).last_hidden_state
    prefix = 1 + AutoConfig.from_pretrained(folder).num_register_tokens
    assert torch.equal(features, torch.stack(hidden_states[-3:]).mean(dim=0)[:, prefix:])
    assert folder not in model.config.vision_config.to_json_string()


def test_read_source_has_to_return_fields_and_weights(parts):
    @register_encoder("misread")
    class Misread(Layers):
        @classmethod
        def read_source(cls, name, **hub_options):
            return {"hidden_size": 8}

    with pytest.raises(TypeError, match="Misread.read_source returned dict; expected a tuple of two dictionaries"):
        assemble(parts, encoder_type="misread")


def test_image_processor_has_to_return_one(parts):
    @register_encoder("unprocessed")
    class Unprocessed(Layers):
        @staticmethod
        def image_processor():
            return {"size": 32}

    with pytest.raises(TypeError, match="Unprocessed.image_processor returned dict; expected an image processor"):
        assemble(parts, None, encoder_type="unprocessed")


# ---------------------------------------------------------------------------------------------------------------------
# The older builder's form
# ---------------------------------------------------------------------------------------------------------------------


def test_the_older_example_computes_what_its_backbone_does(parts, user):
    user("dino.py", DINO)
    folder = parts.vision_tower("dinov2")
    model = assemble(parts, "dinov2", encoder_type="dino")
    backbone = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = backbone(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = model.model.encoder.encode(model.model.vision_tower, PIXELS).last_hidden_state
    assert torch.equal(features, expected)
    tower = model.model.vision_tower
    assert isinstance(tower.model, Dinov2Model) and tower.model_name_or_path == "" and tower.is_loaded
    assert {f"model.{name}" for name in backbone.state_dict()} == tower.state_dict().keys()
    assert model.to(torch.bfloat16).model.vision_tower.model.dtype == torch.bfloat16
    assert str(folder) not in model.config.vision_config.to_json_string()
    with pytest.raises(ValueError, match="'dino' loads its model from a path: give it as mm_vision_tower"):
        assemble(parts, None, encoder_type="dino")
    with pytest.raises(ValueError, match="vision_config lacks backbones and image_size of the encoder 'dino'"):
        small_config(encoder_type="dino", vision_config=MoellavaEncoderConfig())


def test_an_older_class_chooses_by_its_config(parts, user):
    source = DINO.replace("hidden_states[-2][:, 1:]", "hidden_states[self.config.mm_vision_select_layer]")
    source = source.replace(
        "        return features\n",
        '        chosen = {"cls": slice(1), "patch": slice(1, None)}[self.config.mm_vision_select_feature]\n'
        "        return features[:, chosen] * self.factor\n",
    )
    source = source.replace("config=None):", "config=None, factor=1.0):\n        self.factor = factor")
    source = source.replace(
        "        self.is_loaded = True\n", "        self.is_loaded = True\n        self.factor = self.factor + 1\n"
    )
    user("dino.py", source)
    backbone = AutoModel.from_pretrained(parts.vision_tower("dinov2"))
    with torch.no_grad():
        hidden_states = backbone(PIXELS, output_hidden_states=True).hidden_states
    for strategy, chosen in (("cls", slice(1)), ("patch", slice(1, None))):
        model = assemble(
            parts, "dinov2", encoder_type="dino", vision_feature_layer=-3, vision_feature_select_strategy=strategy,
            custom_vision_config={"factor": 2.0},
        )  # fmt: skip
        with torch.no_grad():
            features = model.model.encoder.encode(model.model.vision_tower, PIXELS).last_hidden_state
        assert torch.equal(features, hidden_states[-3][:, chosen] * 3)  # load_model counted the factor up


def test_an_older_class_may_be_a_module(parts, user):
    source = DINO.replace("class DINOEncoder:", "class DINOEncoder(torch.nn.Module):")
    source = source.replace(
        "config=None):", "config=None):\n        super().__init__()\n        self.norm = torch.nn.Softplus()"
    )
    source = source.replace("def to(self, **kwargs)", "def eval(self)").replace(
        "        if self.model is not None:\n            self.model = self.model.to(**kwargs)\n", ""
    )
    source = source.replace("return features", "return self.norm(features)")
    source += "\n    def load(self):\n        pass\n"
    user("dino.py", source)
    model = assemble(parts, "dinov2", encoder_type="dino")
    assert (projected(model).isfinite()).all() and model.model.vision_tower.model is not None


def without_image_processor(source: str) -> str:
    return "".join(line for line in source.splitlines(keepends=True) if "self.image_processor" not in line)


def test_an_older_class_without_an_image_processor_has_that_of_its_source(parts, user):
    user("dino.py", without_image_processor(DINO))
    model = assemble(parts, "dinov2", encoder_type="dino")
    own = AutoImageProcessor.from_pretrained(parts.vision_tower("dinov2"))
    assert model.processor.image_processor.image_mean == own.image_mean
    assert model.config.vision_config.image_size == 32


def test_an_older_class_whose_pictures_have_no_size(parts, user, tmp_path):
    """A ResNet takes pictures of any size, and says none."""
    user("dino.py", without_image_processor(DINO))
    backbone = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))
    backbone.save_pretrained(tmp_path / "resnet")
    settings = {"encoder_type": "dino", "mm_vision_tower": str(tmp_path / "resnet")}
    with pytest.raises(ValueError, match="'dino' does not tell the size of its pictures: give image_size"):
        assemble(parts, None, **settings)
    assert assemble(parts, None, image_size=64, **settings).config.vision_config.image_size == 64


def test_an_older_class_that_cannot_be_run(parts, user):
    user("dino.py", DINO.replace("hidden_states[-2]", "hidden_states[-99]"))
    message = r"DINOEncoder.forward cannot be run on pictures of shape \(1, 3, 32, 32\): IndexError: "
    with pytest.raises(ValueError, match=message):
        assemble(parts, "dinov2", encoder_type="dino")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("self.mean = torch.tensor(0.5)", "AttributeError: .*'mean'.* a config cannot hold: mean. Set what forward"),
        (
            "self.model = torch.nn.Conv2d(3, 8, 8)",
            r"DINOEncoder.model to a torch.nn.modules.conv.Conv2d, which is no model",
        ),
        ("self.scale = torch.nn.Linear(48, 48)", "DINOEncoder.scale to a torch.nn.modules.linear.Linear, which is no"),
    ],
)
def test_an_older_class_that_cannot_be_made_again_is_refused(parts, user, line, message):
    source = DINO.replace("        self.is_loaded = True\n", f"        {line}\n        self.is_loaded = True\n")
    if "mean" in line:
        source = source.replace("return features", "return features - self.mean")
    user("dino.py", source)
    with pytest.raises(ValueError, match=message):
        assemble(parts, "dinov2", encoder_type="dino")
