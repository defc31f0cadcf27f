# SPDX-License-Identifier: Apache-2.0
"""The features of pictures, against transformers' LLaVA with the same tower and the same weights.

    python benchmarks/vision.py
    python benchmarks/vision.py --quick      # tiny: only to see that it runs
    python benchmarks/vision.py --image-size 336 --out build/bench/vision.json

The tower is of the size of CLIP ViT-L/14 (24 layers of width 1024, 303 million parameters), for pictures of 224 pixels;
the projector is LLaVA's, to width 2048. Features are checked to be equal before they are timed.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import THREADS, Row, alternating, compared, machine, print_progress, show, write
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moellava.configuration import MoellavaConfig
from moellava.modeling import MoellavaForCausalLM


PEER = "transformers' LLaVA"
MARGIN = 1.02


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tower, and how much is measured."""

    num_layers: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    image_size: int = 224
    text_hidden_size: int = 2048
    batch: int = 8
    repeats: int = 9
    batch_repeats: int = 5
    seconds: float = 30  # for a comparison, beyond three repeats


TINY = Sizes(
    num_layers=4, hidden_size=32, num_heads=2, image_size=28, text_hidden_size=32, batch=2, repeats=1, batch_repeats=1
)


def llava_config(sizes: Sizes) -> LlavaConfig:
    text_config = LlamaConfig(  # not run: only its width counts
        vocab_size=64,
        hidden_size=sizes.text_hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=4 * sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.image_size,
        patch_size=14,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(text_config=text_config, vision_config=vision_config, image_token_id=3)


@torch.no_grad()
def ours_like(peer: LlavaForConditionalGeneration, layer: int) -> MoellavaForCausalLM:
    """Returns our model of a feature layer, with the very weights of `peer`."""
    config = MoellavaConfig(
        text_config=copy.deepcopy(peer.config.text_config),
        vision_config=copy.deepcopy(peer.config.vision_config),
        projector_config={"type": "mlp"},
        image_token_id=peer.config.image_token_id,
        vision_feature_layer=layer,
    )
    with torch.device("meta"):
        model = MoellavaForCausalLM(config)
    weights = peer.state_dict()
    model.load_state_dict(weights, assign=True, strict=True)
    buffers = dict(peer.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # computed, not saved: positions and rotations
            owner, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(owner), own_name, buffers[name])
    return model.eval()


def features(model: torch.nn.Module, pixel_values: torch.Tensor, **options: int) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack(tuple(model.get_image_features(pixel_values, return_dict=True, **options).pooler_output))


def rows(quick: bool = False, tell: Callable[[str], None] = lambda what: None, sizes: Sizes | None = None) -> list[Row]:
    """Measures; `tell` is told what comes next."""
    sizes = sizes or (TINY if quick else Sizes())
    torch.manual_seed(0)
    peer = LlavaForConditionalGeneration(llava_config(sizes)).eval()
    pictures = torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        peer, pictures = peer.to(dtype), pictures.to(dtype)
        name = str(dtype).removeprefix("torch.")
        for layer in (-2, sizes.num_layers // 2):
            tell(f"features of layer {layer}, {name}")
            ours = ours_like(peer, layer)
            picture = pictures[:1]
            torch.testing.assert_close(
                features(ours, picture), features(peer, picture, vision_feature_layer=layer), rtol=0, atol=0
            )
            times = alternating(
                {
                    "ours": lambda ours=ours, picture=picture: features(ours, picture),
                    "peer": lambda peer=peer, picture=picture, layer=layer: features(
                        peer, picture, vision_feature_layer=layer
                    ),
                },
                sizes.repeats,
                seconds=sizes.seconds,
            )
            needed = layer % (sizes.num_layers + 1)
            label = f"one picture, layer {layer} of {sizes.num_layers}, {name}"
            aim = needed / sizes.num_layers * MARGIN
            found.append(compared("vision", label, PEER, times["ours"], times["peer"], aim=aim))
    tell(f"features of {sizes.batch} pictures")
    ours = ours_like(peer, -2)
    times = alternating(
        {
            "batch": lambda: features(ours, pictures),
            "single": lambda: [features(ours, picture[None]) for picture in pictures],
        },
        sizes.batch_repeats,
        seconds=sizes.seconds,
    )
    label = f"{sizes.batch} pictures in a batch, layer -2, {name}"
    found.append(compared("vision", label, "one by one", times["batch"], times["single"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--num-layers", type=int, default=Sizes.num_layers)
    parser.add_argument("--image-size", type=int, default=Sizes.image_size)
    parser.add_argument("--repeats", type=int, default=Sizes.repeats)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = Sizes(num_layers=arguments.num_layers, image_size=arguments.image_size, repeats=arguments.repeats)
    described = {"machine": machine(arguments.threads)}
    found = rows(arguments.quick, print_progress, sizes=None if arguments.quick else sizes)
    show(found, "vision")
    if arguments.out:
        write(found, described, arguments.out)


if __name__ == "__main__":
    main()
