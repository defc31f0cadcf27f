# SPDX-License-Identifier: Apache-2.0
"""Vision towers of open_clip checkpoints: equality with open_clip's own tower and pixels, and what is refused.

The checkpoints are written by open_clip, which is also what the results are compared with.
"""

import json
import logging
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from huggingface_hub import save_torch_state_dict
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from parts import biomedclip_oracle, perturb_, picture
from safetensors.torch import load_file, save_file
from timm.layers import GluMlp
from timm.models import build_model_with_cfg
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from moellava.reading.open_clip import CONFIG_FILE, OpenClipTower, read_open_clip


SAFETENSORS = "open_clip_model.safetensors"
BIN = "open_clip_pytorch_model.bin"


def build_tower(tower: OpenClipTower) -> nn.Module:
    """The model that a tower stands for, loaded as the assembler loads it; fails on missing or surplus weights."""
    kind, options = (
        (ViTModel, {"add_pooling_layer": False})
        if isinstance(tower.vision_config, ViTConfig)
        else (CLIPVisionModel, {})
    )
    model, info = kind.from_pretrained(
        None, config=tower.vision_config, state_dict=tower.state_dict, output_loading_info=True, **options
    )
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def edit_config(folder: Path, **sections: dict) -> Path:
    """Updates sections of the config; `vision_cfg` is the one inside `model_cfg`."""
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    for name, values in sections.items():
        (config["model_cfg"] if name == "vision_cfg" else config)[name].update(values)
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def copied(parts, tmp_path):
    """A copy of a BiomedCLIP of safetensors, to be changed."""
    return parts.copy(parts.biomedclip(weights="safetensors"), tmp_path / "copy")


def edit_weights(folder: Path, edit) -> Path:
    """Rewrites the safetensors file after `edit(state_dict)`."""
    weights = load_file(folder / SAFETENSORS)
    edit(weights)
    (folder / SAFETENSORS).unlink()  # tensors that were read from it earlier stay what they are
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / SAFETENSORS)
    return folder


def register_timm_variant(name: str, **fields) -> str:
    """Registers timm's test_vit with other fields: a plain ViT of 2 layers and 64 channels, but for those fields."""
    if name not in timm.list_models():

        def entry_point(pretrained: bool = False, **kwargs):
            return timm.create_model("test_vit", pretrained=False, **({"img_size": 32} | fields | kwargs))

        entry_point.__name__ = name
        timm.models.register_model(entry_point)
    return name


def trunk_states(trunk: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What goes into the first block of a timm trunk, what comes out of each block, and the normed last of these."""
    states = []
    hooks = [trunk.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, args, output: states.append(output)) for block in trunk.blocks]
    with torch.no_grad():
        states.append(trunk.forward_features(pixels))
    for hook in hooks:
        hook.remove()
    return states


def tower_states(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(pixel_values=pixels, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state]


def assert_all_close(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float):
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, i=index: f"state {i}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# BiomedCLIP: a ViT of timm
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_every_hidden_state_equals_open_clips_trunk(parts, weights):
    folder = parts.biomedclip(weights=weights)
    tower = read_open_clip(folder)
    trunk = biomedclip_oracle(folder).model.visual.trunk
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    expected = trunk_states(trunk, pixels)
    assert len(expected) == 1 + 4 + 1
    assert_all_close(tower_states(build_tower(tower), pixels), expected, atol=1e-5)
    # The states tell layers apart, so that the comparison above means something.
    assert min((a - b).abs().max().item() for a, b in zip(expected, expected[1:], strict=False)) > 0.5


def test_a_trunk_of_timm_as_it_comes(parts):
    """test_vit is a registered architecture: 160 pixels, other width, depth and heads than the tiny default."""
    folder = parts.biomedclip(timm_model_name="test_vit", image_size=160)
    tower = read_open_clip(folder)
    trunk = biomedclip_oracle(folder).model.visual.trunk
    pixels = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    assert_all_close(tower_states(build_tower(tower), pixels), trunk_states(trunk, pixels), atol=1e-5)
    assert tower.vision_config.num_attention_heads == trunk.blocks[0].attn.num_heads == 2


def test_without_a_bias_of_query_key_and_value(parts):
    folder = parts.biomedclip(timm_model_name=register_timm_variant("test_vit_no_qkv_bias", qkv_bias=False))
    tower = read_open_clip(folder)
    assert tower.vision_config.qkv_bias is False
    trunk = biomedclip_oracle(folder).model.visual.trunk
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert_all_close(tower_states(build_tower(tower), pixels), trunk_states(trunk, pixels), atol=1e-5)


def test_config_and_weights(parts):
    tower = read_open_clip(parts.biomedclip())
    config = tower.vision_config
    assert type(config) is ViTConfig
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "patch_size",
        "image_size",
    )
    assert [getattr(config, field) for field in fields] == [192, 4, 3, 384, 8, 32]
    assert (config.hidden_act, config.layer_norm_eps, config.qkv_bias) == ("gelu", 1e-6, True)
    expected = ViTModel(config, add_pooling_layer=False).state_dict()
    assert {k: v.shape for k, v in tower.state_dict.items()} == {k: v.shape for k, v in expected.items()}


def test_open_clip_is_not_needed(parts, monkeypatch):
    folder = parts.biomedclip()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert read_open_clip(folder).vision_config.hidden_size == 192


def test_safetensors_are_preferred_and_both_files_give_the_same(parts, copied):
    found = read_open_clip(parts.biomedclip(weights="bin")).state_dict
    expected = read_open_clip(copied).state_dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (copied / BIN).write_bytes(b"not read")
    assert read_open_clip(copied).state_dict.keys() == expected.keys()


@pytest.mark.parametrize("pattern", ["open_clip_model{suffix}.safetensors", "open_clip_pytorch_model{suffix}.bin"])
def test_shards(parts, copied, pattern):
    expected = read_open_clip(copied).state_dict
    weights = load_file(copied / SAFETENSORS)
    (copied / SAFETENSORS).unlink()
    save_torch_state_dict(
        weights,
        copied,
        filename_pattern=pattern,
        max_shard_size="1MB",
        safe_serialization=pattern.endswith("safetensors"),
    )
    assert len(list(copied.glob("open_clip*-of-*"))) > 2
    found = read_open_clip(copied).state_dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_function_that_finds_files(parts):
    folder = parts.biomedclip(weights="bin")
    asked = []

    def resolve(name: str):
        asked.append(name)
        return str(folder / name) if (folder / name).exists() else None

    assert read_open_clip(resolve).vision_config == read_open_clip(folder).vision_config
    # A resolver may cost a request per name: nothing is asked for after the weights are found.
    assert asked[0] == CONFIG_FILE
    assert asked[-1] == BIN
    with pytest.raises(FileNotFoundError, match=CONFIG_FILE):
        read_open_clip(lambda name: None)


@pytest.mark.parametrize("layout", ["module_prefix", "state_dict", "old_zipless"])
def test_layouts_of_bin_files_that_open_clip_takes(parts, tmp_path, layout):
    folder = parts.copy(parts.biomedclip(weights="bin"), tmp_path / "copy")
    expected = read_open_clip(folder).state_dict
    weights = torch.load(folder / BIN, weights_only=True)
    (folder / BIN).unlink()
    content, options = weights, {}
    if layout == "module_prefix":
        content = {f"module.{name}": tensor for name, tensor in weights.items()}
    elif layout == "state_dict":
        content = {"state_dict": weights, "epoch": 3}
    else:
        options = {"_use_new_zipfile_serialization": False}
    torch.save(content, folder / BIN, **options)
    found = read_open_clip(folder).state_dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_dtype_is_the_checkpoints(copied):
    def halve(weights):
        weights.update({name: tensor.half() for name, tensor in weights.items() if tensor.is_floating_point()})

    assert {tensor.dtype for tensor in read_open_clip(copied).state_dict.values()} == {torch.float32}
    tower = read_open_clip(edit_weights(copied, halve))
    assert {tensor.dtype for tensor in tower.state_dict.values()} == {torch.float16}


def test_a_saved_tower_loads_again(parts, tmp_path):
    """The converted weights are views that share memory; saving has to take them for separate ones."""
    model = build_tower(read_open_clip(parts.biomedclip()))
    model.save_pretrained(tmp_path)
    again = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_the_trunk_decides_on_the_image_size_not_the_config(parts, caplog):
    folder = parts.biomedclip(timm_model_name="test_vit", image_size=48)
    with caplog.at_level(logging.WARNING, logger="moellava.reading.open_clip"):
        tower = read_open_clip(folder)
    assert tower.vision_config.image_size == 160
    assert tower.image_processor.crop_size == {"height": 160, "width": 160}
    assert "takes pictures of 160 pixels a side" in caplog.text
    assert "its config says image_size 48, which is not followed" in caplog.text
    build_tower(tower)(torch.zeros(1, 3, 160, 160))


def test_no_warning_where_config_and_trunk_agree(parts, caplog):
    folder = parts.biomedclip()
    with caplog.at_level(logging.WARNING, logger="moellava.reading.open_clip"):
        read_open_clip(folder)
    assert not [record for record in caplog.records if record.name == "moellava.reading.open_clip"]


def test_a_trunk_that_was_resized(parts, tmp_path):
    """A checkpoint trained with force_image_size: timm's name says 32 pixels, config and weights say 64."""
    folder = parts.copy(parts.biomedclip(weights="safetensors"), tmp_path / "copy")
    visual = biomedclip_oracle(folder).model.visual
    visual.set_input_size(64)
    edit_weights(folder, lambda weights: weights.update({f"visual.{k}": v for k, v in visual.state_dict().items()}))
    tower = read_open_clip(edit_config(folder, vision_cfg={"image_size": 64}))
    assert tower.vision_config.image_size == 64
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    assert_all_close(tower_states(build_tower(tower), pixels), trunk_states(visual.trunk, pixels), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip's own ViT
# ---------------------------------------------------------------------------------------------------------------------

NATIVE_VISION = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 16}
NATIVE_TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def make_native(folder: Path, tokenizer_from: Path, quick_gelu: bool = False, **vision) -> open_clip.CLIP:
    """Writes a CLIP with one of open_clip's built-in vision towers, and returns it."""
    config = {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": NATIVE_VISION | vision,
        "text_cfg": NATIVE_TEXT,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perturb_(open_clip.CLIP(**config)).eval()
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)})
    save_for_hf(model, HFTokenizer(str(tokenizer_from)), config, str(folder), safe_serialization=True)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quick_gelu": True},
        {"norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 3.0},
        {"pool_type": "avg", "pos_embed_type": "sin_cos_2d", "patch_dropout": 0.5},
    ],
    ids=["gelu", "quick_gelu", "epsilon", "without_effect"],
)
def test_a_native_vit_equals_open_clips(parts, tmp_path, options):
    model = make_native(tmp_path, parts.biomedbert(), **options)
    tower = read_open_clip(tmp_path)
    assert type(tower.vision_config) is CLIPVisionConfig
    assert tower.vision_config.hidden_act == ("quick_gelu" if options.get("quick_gelu") else "gelu")
    assert list(tower.image_processor.image_mean) == [0.5, 0.4, 0.3]
    converted = build_tower(tower)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        embedded = model.visual._embeds(pixels)
        last, states = model.visual.transformer.forward_intermediates(embedded)
        expected = [embedded, *states, last]
        found = tower_states(converted, pixels)
        assert_all_close(found, expected, atol=2e-5)
        assert len(found) == 5
        if options.get("pool_type", "tok") == "tok":
            features = converted(pixels).pooler_output @ model.visual.proj
            torch.testing.assert_close(features, model.encode_image(pixels), rtol=0, atol=2e-5)


def test_a_native_vit_needs_no_extra(parts, tmp_path, monkeypatch):
    make_native(tmp_path, parts.biomedbert())
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert read_open_clip(tmp_path).vision_config.num_attention_heads == 4


@pytest.mark.parametrize(
    "options, found",
    [
        ({"ls_init_value": 0.1}, "ls_init_value: 0.1"),
        ({"no_ln_pre": True}, "no_ln_pre: True"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "attentional_pool: True"),
        ({"qk_norm": True}, "qk_norm: True"),
        ({"scale_fc": True}, "scale_fc: True"),
        ({"block_type": "custom"}, "block_type: custom"),
        ({"act_kwargs": {"approximate": "tanh"}}, "act_kwargs"),
        ({"norm_kwargs": {"bias": False}}, "norm_kwargs: {'bias': False}"),
        ({"layers": (1, 1, 1, 1), "width": 32, "head_width": 32}, "it is a ResNet"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_native_towers_that_are_no_plain_vit(parts, tmp_path, options, found):
    make_native(tmp_path, parts.biomedbert(), **options)
    with pytest.raises(ValueError, match=f"no plain ViT: .*{found}.*Supported are") as caught:
        read_open_clip(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_field_that_open_clip_may_add_is_not_passed_over(parts, tmp_path):
    make_native(tmp_path, parts.biomedbert())
    edit_config(tmp_path, vision_cfg={"rotary": True})
    with pytest.raises(ValueError, match="no plain ViT: its vision_cfg says rotary: True"):
        read_open_clip(tmp_path)


@pytest.mark.parametrize(
    "edit, error",
    [
        (
            lambda weights: weights.update({"visual.adapter.weight": torch.zeros(2)}),
            "no plain ViT: it has the weights adapter.weight",
        ),
        (lambda weights: weights.pop("visual.positional_embedding"), "lacks .* positional_embedding .*incomplete"),
        (lambda weights: weights.pop("visual.transformer.resblocks.0.mlp.c_fc.weight"), "lacks .*c_fc.* incomplete"),
        (lambda weights: weights.pop("visual.ln_pre.bias"), "do not fit its config: it lacks .*pre_layrnorm.bias"),
    ],
)
def test_weights_of_a_native_vit_that_are_not_whole(parts, tmp_path, edit, error):
    make_native(tmp_path, parts.biomedbert())
    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match=error):
        read_open_clip(tmp_path)


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"image_size": 64}, "position embeddings for 4 x 4 patches, but its config says image_size 64"),
        ({"image_size": [32, 64]}, r"image_size in the vision_cfg of .* is \[32, 64\]; only squares"),
        ({"layers": 4}, "do not fit its config: it lacks encoder.layers.3"),
        ({"layers": 2}, "do not fit its config: it has encoder.layers.2"),
        ({"width": 128}, r"do not fit its config: .* has the shape .*64.*, expected .*128"),
        ({"head_width": 48}, "no multiple of its head_width 48"),
    ],
)
def test_a_native_config_that_does_not_fit_its_weights(parts, tmp_path, edit, message):
    make_native(tmp_path, parts.biomedbert())
    edit_config(tmp_path, vision_cfg=edit)
    with pytest.raises(ValueError, match=message):
        read_open_clip(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, found",
    [
        ("test_resnet", "it has the weights .* and it lacks the weights"),
        ("test_convnext", "it has the weights .* and it lacks the weights"),
        ("test_vit2", r"it has the weights blocks\.\*\.ls1\.gamma.*reg_token and it lacks the weights cls_token"),
    ],
)
def test_trunks_of_other_architectures_are_refused_even_without_timm(parts, monkeypatch, name, found):
    folder = parts.biomedclip(timm_model_name=name, weights="safetensors")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=rf"timm's {name}\) is no plain ViT: {found}.*Supported are"):
        read_open_clip(folder)


@pytest.mark.parametrize(
    "name, fields, found",
    [
        ("test_vit_layer_scale", {"init_values": 0.1}, "ls1.gamma"),
        ("test_vit_registers", {"reg_tokens": 2}, "reg_token"),
        ("test_vit_pre_norm", {"pre_norm": True}, "norm_pre"),
        ("test_vit_qk_norm", {"qk_norm": True}, "q_norm"),
        ("test_vit_mlp_norm", {"scale_mlp_norm": True}, "mlp.norm"),
        # The names of the weights do not tell these.
        ("test_vit_tanh_gelu", {"act_layer": "gelu_tanh"}, "activation of blocks.0 is .*, not the exact GELU"),
        ("test_vit_quick_gelu", {"act_layer": "quick_gelu"}, "activation of blocks.0 is .*, not the exact GELU"),
        ("test_vit_no_embed", {"no_embed_class": True}, "position embedding of the class token: False"),
        ("test_vit_rms", {"norm_layer": "rmsnorm"}, "lacks the weights .*norm1.bias"),
        ("test_vit_res_post", {"block_fn": ResPostBlock}, "blocks.0 is a ResPostBlock"),
        ("test_vit_glu", {"mlp_layer": GluMlp}, "blocks.0.mlp is a GluMlp"),
        ("test_vit_group_norm", {"norm_layer": "groupnorm1"}, "norm is GroupNorm1.*, and its norms have to be alike"),
    ],
)
def test_vits_that_are_not_plain(parts, name, fields, found):
    folder = parts.biomedclip(timm_model_name=register_timm_variant(name, **fields), weights="safetensors")
    with pytest.raises(ValueError, match=rf"timm's {name}\) is no plain ViT: .*{found}"):
        read_open_clip(folder)


def test_a_vit_of_a_class_of_its_own(parts):
    """Its weights have the names of a plain one, and its forward may be any."""

    class OwnViT(VisionTransformer):
        pass

    def test_vit_own_class(pretrained: bool = False, **kwargs):
        fields = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
        return build_model_with_cfg(OwnViT, "test_vit_own_class", pretrained, **fields, **kwargs)

    timm.models.register_model(test_vit_own_class)
    folder = parts.biomedclip(timm_model_name="test_vit_own_class", weights="safetensors")
    with pytest.raises(ValueError, match=r"timm's test_vit_own_class\) is no plain ViT: its class is OwnViT"):
        read_open_clip(folder)


def test_a_trunk_that_timm_cannot_build(copied):
    edit_config(copied, vision_cfg={"timm_pool": "middle", "timm_proj": "none"})
    with pytest.raises(ValueError, match=f"cannot be built by the installed timm {timm.__version__}"):
        read_open_clip(copied)


def test_a_trunk_whose_last_norm_stands_after_pooling(parts, copied):
    edit_config(copied, vision_cfg={"timm_pool": "avg", "timm_proj": "none"})
    with pytest.raises(ValueError, match="no plain ViT: it has fc_norm"):
        read_open_clip(copied)


def test_pictures_that_are_not_square(parts):
    name = register_timm_variant("test_vit_wide", img_size=(32, 128))
    folder = parts.biomedclip(timm_model_name=name, weights="safetensors")
    # 2 x 8 patches are as many as 4 x 4.
    with pytest.raises(ValueError, match=r"image size of .* is \(32, 128\); only squares"):
        read_open_clip(folder)


def test_the_missing_extra(parts, monkeypatch):
    folder = parts.biomedclip()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm, which is not installed: `pip install moellava\[biomedclip\]`"):
        read_open_clip(folder)


@pytest.mark.parametrize("name", ["vit_of_tomorrow", "hf-hub:timm/vit_base_patch16_224", "local-dir:/tmp", ["a"]])
def test_only_architectures_that_timm_knows_by_name(copied, name):
    """timm would fetch a config from the place that such a name stands for."""
    edit_config(copied, vision_cfg={"timm_model_name": name})
    with pytest.raises(
        ValueError, match=f"has an architecture that the installed timm {timm.__version__} does not know"
    ):
        read_open_clip(copied)


def test_another_architecture_than_the_weights(copied):
    edit_config(copied, vision_cfg={"timm_model_name": "vit_tiny_patch16_224"})
    with pytest.raises(ValueError, match="do not fit its config: it lacks blocks.10.attn.proj.bias"):
        read_open_clip(copied)


def test_weights_of_wrong_shapes(copied):
    name = "visual.trunk.blocks.2.mlp.fc1.weight"
    edit_weights(copied, lambda weights: weights.update({name: weights[name][:100]}))
    expected = r"blocks\.2\.mlp\.fc1\.weight has the shape \(100, 192\), expected \(384, 192\)"
    with pytest.raises(ValueError, match=expected):
        read_open_clip(copied)


def test_position_embeddings_of_no_square_grid(copied):
    name = "visual.trunk.pos_embed"
    edit_weights(copied, lambda weights: weights.update({name: weights[name][:, :15]}))
    with pytest.raises(ValueError, match="has 15 position embeddings; expected those of a square grid"):
        read_open_clip(copied)


def test_a_missing_weight(copied):
    edit_weights(copied, lambda weights: weights.pop("visual.trunk.blocks.1.attn.proj.bias"))
    with pytest.raises(ValueError, match="it lacks the weights blocks.1.attn.proj.bias"):
        read_open_clip(copied)


def test_a_missing_folder_config_and_weights(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_open_clip(tmp_path / "nowhere")
    (copied / SAFETENSORS).rename(copied / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=f"no open_clip weights in .*Expected one of {SAFETENSORS}"):
        read_open_clip(copied)
    (copied / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {CONFIG_FILE} in"):
        read_open_clip(copied)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"model_cfg": {"vision', "is no valid JSON"),
        ("[1, 2]", "holds a list; expected a JSON object"),
        ('{"model_cfg": "ViT-B-32"}', "has no model_cfg with a vision_cfg"),
        ('{"preprocess_cfg": {}}', "has no model_cfg with a vision_cfg"),
        ('{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": [0.5]}', "preprocess_cfg in .* is a list"),
    ],
)
def test_a_damaged_config(copied, content, message):
    (copied / CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_open_clip(copied)


@pytest.mark.parametrize("kept", [0, 4, 1000, 0.5, 0.99])
@pytest.mark.parametrize("name", [SAFETENSORS, BIN])
def test_a_truncated_file(parts, tmp_path, name, kept):
    folder = parts.copy(parts.biomedclip(weights="bin" if name == BIN else "safetensors"), tmp_path / "copy")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match=f"{name} cannot be read as .*truncated"):
        read_open_clip(folder)


class Payload:
    """Stands for code in a pickle: it would tell of itself if it was ever called."""

    called = False

    def __reduce__(self):
        return (setattr, (Payload, "called", True))


def test_code_in_a_bin_file_is_not_run(parts, tmp_path):
    folder = parts.copy(parts.biomedclip(weights="bin"), tmp_path / "copy")
    torch.save({"visual.trunk.cls_token": Payload()}, folder / BIN)
    with pytest.raises(ValueError, match="holds Python objects other than tensors, which are never loaded"):
        read_open_clip(folder)
    assert not Payload.called


def test_weights_that_are_not_open_clips(copied):
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(4)}, copied / SAFETENSORS)
    with pytest.raises(ValueError, match=r"has no weights named visual\.\*, so it is not an open_clip checkpoint"):
        read_open_clip(copied)


@pytest.mark.parametrize(
    "weight_map, error, message",
    [
        (
            {"visual.trunk.cls_token": "../elsewhere.safetensors"},
            ValueError,
            "expected the plain name of a file beside it",
        ),
        ({"visual.trunk.cls_token": "gone.safetensors"}, FileNotFoundError, "lacks gone.safetensors, which its"),
        (["a"], ValueError, "has no weight_map"),
    ],
)
def test_a_faulty_index_of_shards(copied, weight_map, error, message):
    (copied / SAFETENSORS).unlink()
    (copied / f"{SAFETENSORS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        read_open_clip(copied)


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing
# ---------------------------------------------------------------------------------------------------------------------

# The last four are half a pixel off centre when they are cropped.
SIZES = [(32, 32), (48, 36), (30, 44), (97, 33), (20, 16), (33, 300), (31, 32), (64, 64), (1, 1), (5, 200)]
SIZES += [(35, 32), (32, 39), (111, 64), (50, 93)]
NUMBERS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def open_clip_pixels(folder: Path, image) -> torch.Tensor:
    config = json.loads((folder / CONFIG_FILE).read_text())
    known = {key: value for key, value in config["preprocess_cfg"].items() if value is not None}
    return image_transform_v2(PreprocessCfg(**known, size=(32, 32)), is_train=False)(image)


def pixels_of(processor, image) -> torch.Tensor:
    return processor(image, return_tensors="pt").pixel_values[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "preprocess_cfg",
    [
        {},
        {"resize_mode": "shortest", "interpolation": "bilinear"} | NUMBERS,
        {"resize_mode": "squash", "interpolation": "bicubic"} | NUMBERS,
        {"resize_mode": "squash", "interpolation": "bilinear"},
        {"resize_mode": None, "interpolation": "random"},
    ],
    ids=lambda value: f"{value.get('resize_mode')}-{value.get('interpolation')}",
)
def test_pixels_equal_open_clips(copied, preprocess_cfg, size):
    edit_config(copied, preprocess_cfg=preprocess_cfg)
    processor = read_open_clip(copied).image_processor
    image = picture(seed=size[0], size=size)
    found = pixels_of(processor, image)
    assert found.shape == (3, 32, 32)
    assert torch.equal(found, open_clip_pixels(copied, image))


def test_equal_to_what_open_clip_returns_with_the_model(parts):
    folder = parts.biomedclip()
    preprocess = biomedclip_oracle(folder).preprocess
    image = picture(seed=5, size=(48, 36))
    assert torch.equal(pixels_of(read_open_clip(folder).image_processor, image), preprocess(image))


def test_the_processor_is_kept_by_any_transformers(copied, tmp_path):
    processor = read_open_clip(edit_config(copied, preprocess_cfg=NUMBERS)).image_processor
    processor.save_pretrained(tmp_path)
    stock = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    again = type(processor).from_dict(stock.to_dict())
    image = picture(seed=6, size=(30, 44))
    assert torch.equal(pixels_of(again, image), pixels_of(processor, image))
    assert torch.allclose(pixels_of(stock, image), pixels_of(processor, image), atol=1e-6)


def test_one_mean_for_all_channels(copied):
    processor = read_open_clip(edit_config(copied, preprocess_cfg={"mean": 0.5, "std": 0.25})).image_processor
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]
    assert list(processor.image_std) == [0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    "preprocess_cfg, message",
    [
        ({"resize_mode": "longest"}, "says resize_mode 'longest'; supported are 'shortest' and 'squash'"),
        ({"interpolation": "nearest"}, "says interpolation 'nearest'; supported are bicubic"),
        ({"mode": "L"}, "says mode 'L'; only 'RGB'"),
        ({"mean": [0.5, 0.5]}, "says mean .*; expected one number or one per RGB channel"),
        ({"std": "big"}, "says std big; expected one number"),
    ],
)
def test_preprocessing_that_is_refused(copied, preprocess_cfg, message):
    edit_config(copied, preprocess_cfg=preprocess_cfg)
    with pytest.raises(ValueError, match=message):
        read_open_clip(copied)
