# SPDX-License-Identifier: Apache-2.0
"""The small checkpoints that every later version has to load (`tests/fixtures/checkpoints/VERSION`), and their writer.

`python tests/kept_checkpoints.py` (`make fixture`) writes those of the version that is checked out, once: a folder that
is there is never written again. `test_kept_checkpoints.py` loads all that there are.

Beside every checkpoint lies NAME.safetensors: what its inputs were and what it said in float32, on the transformers
that its config names. The pictures and the texts that the inputs were made of are common to the checkpoints of a
version (`questions.json`, `0.png`, ...), since what writes pictures for tests may change as well.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from parts import make_language_model, make_vision_tower, pictures
from safetensors.torch import save_file

import moellava
from moellava import MoellavaForCausalLM, MoellavaProcessor, load_pretrained_model, upcycle


CHECKPOINTS = Path(__file__).resolve().parent / "fixtures" / "checkpoints"
QUESTIONS = {
    "rows": [[0], [], [1, 2]],
    "text": ["<image> What is it?", "No picture here, only words.", "Is <image> like <image> or not?"],
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
# Of every row the last positions alone are kept, which have seen all others: the file is a tenth as large.
LAST = 8
NEW_TOKENS = 6


def clip_mlp_llama() -> MoellavaForCausalLM:
    make_language_model("llama", "llama", overrides=SMALL, with_chat_template=True)
    make_vision_tower("clip_vision", "clip")
    return load_pretrained_model("llama", mm_vision_tower="clip", device="cpu", dtype=torch.bfloat16).model


@torch.no_grad()
def siglip_qformer_qwen2_sparse() -> MoellavaForCausalLM:
    """All layers sparse, with every part that a sparse block can have, and experts that differ."""
    make_language_model("qwen2", "qwen2", overrides=SMALL)
    make_vision_tower("siglip_vision", "siglip")
    projector = {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32, "num_hidden_layers": 2}
    dense = load_pretrained_model(
        "qwen2", mm_vision_tower="siglip", projector_config=projector, device="cpu", dtype=torch.bfloat16
    ).model
    model = upcycle(
        dense,
        num_experts=4,
        num_experts_per_tok=2,
        layers="dense",
        eval_capacity_factor=1.0,
        router_bias=True,
        use_residual=True,
        use_meta_expert=True,
    )
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


WRITERS: dict[str, Callable[[], MoellavaForCausalLM]] = {
    "clip-mlp-llama": clip_mlp_llama,
    "siglip-qformer-qwen2-sparse": siglip_qformer_qwen2_sparse,
}


@torch.no_grad()
def said(model: MoellavaForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits of the last positions, the tokens of a greedy answer and, of a sparse model, the balancing loss."""
    sparse = model.config.moe_config is not None
    output = model(**inputs, **({"output_router_logits": True} if sparse else {}))
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    found = {"logits": output.logits[:, -LAST:].contiguous(), "tokens": tokens[:, -NEW_TOKENS:].contiguous()}
    return found | ({"aux_loss": output.aux_loss.reshape(1)} if sparse else {})


def write(folder: Path) -> None:
    """Writes the checkpoints into a new folder, which is there when all of it is.

    Raises:
        FileExistsError: if the folder is there: what a version has written is kept as it was.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there, and what a version has written is not written again.")
    images = pictures(3)
    rows = [[images[index] for index in row] for row in QUESTIONS["rows"]]
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        # Where the parts lie is written down in a checkpoint: here, under names that are no paths of this machine.
        written = Path("written")
        written.mkdir()
        for index, image in enumerate(images):
            image.save(written / f"{index}.png")
        (written / "questions.json").write_text(json.dumps(QUESTIONS, indent=2) + "\n", encoding="utf-8")
        for name, writer in WRITERS.items():
            torch.manual_seed(0)
            writer().save_pretrained(written / name)
            model = MoellavaForCausalLM.from_pretrained(written / name, dtype=torch.float32)
            processor = MoellavaProcessor.from_pretrained(written / name)
            inputs = processor(images=rows, text=QUESTIONS["text"], padding=True, return_tensors="pt")
            save_file({**inputs, **said(model, inputs)}, written / f"{name}.safetensors")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(written, folder)


if __name__ == "__main__":
    target = CHECKPOINTS / moellava.__version__
    try:
        write(target)
    except FileExistsError as error:
        sys.exit(f"{error} Nothing was changed.")
    print(target)
