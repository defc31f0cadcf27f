# SPDX-License-Identifier: Apache-2.0
"""Prefill, decoding and generation, against transformers' LLaVA with the same weights and against the model itself.

    python benchmarks/generation.py
    python benchmarks/generation.py --quick      # tiny: only to see that it runs
    python benchmarks/generation.py --part peer --part sparse --out build/bench/generation.json

The language model has 220 million parameters (12 LLaMA layers of width 1024, 32,064 tokens), the tower 86 million (12
CLIP layers of width 768, patches of 14 pixels). Pictures have 224 pixels, which is 256 tokens; for the time to the
first token 336 pixels, 576 tokens. The parts:

- peer: prefill of a picture and 64 tokens, 16 decoding steps, and `generate` of both, in fp32 and bf16. transformers'
  LLaVA is saved, and loaded by each library in its own way; logits are checked to be equal before anything is timed.
- memory: peak of the resident memory over the idle process, of loading and generating, in fresh processes.
- sparse: decoding with every layer sparse, 2 of 4 experts, against the dense parent; beside it the bytes of weights
  that a token goes through, against those of the parent.
- projectors: time to the first token.
- batches: time per new token of 4 and 16 rows, each with its picture, against one row.
- questions: 16 questions about one picture, whose features are computed once, against encoding it each time.
- growth: cost by pictures, prompt tokens, experts; the exponent is the slope of a line through the logarithms.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    THREADS,
    Row,
    alternating,
    compared,
    forget_peak_memory,
    growth,
    in_fresh_process,
    machine,
    memory,
    print_progress,
    show,
    word_tokenizer,
    write,
)
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    logging,
)

from moellava import load_pretrained_model, upcycle
from moellava.configuration import MoellavaConfig
from moellava.modeling import MoellavaForCausalLM
from moellava.parts.moe_block_moellava import SparseMoeBlock


PEER = "transformers' LLaVA"
PREFILL_AIM, DECODE_AIM, MEMORY_AIM = 1.00, 1.02, 1.00
PATCH_SIZE = 14
PROJECTORS = ("mlp", "qformer", "perceiver")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, and how much is measured."""

    vocab_size: int = 32064
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 12
    num_heads: int = 16
    vision_hidden_size: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    image_size: int = 224
    large_image_size: int = 336
    prompt_tokens: int = 64
    new_tokens: int = 16
    batches: tuple[int, ...] = (1, 4, 16)
    batch_new_tokens: int = 16
    questions: int = 16
    question_new_tokens: int = 4
    pictures: tuple[int, ...] = (1, 2, 4, 8)
    prompts: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    experts: tuple[int, ...] = (2, 4, 8, 16)
    growth_layers: int = 4  # of the language model whose experts grow in number
    repeats: int = 9
    few_repeats: int = 3  # of what takes long
    seconds: float = 30  # for a comparison, beyond three repeats
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def num_image_tokens(self, image_size: int) -> int:
        return (image_size // PATCH_SIZE) ** 2


TINY = Sizes(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    vision_hidden_size=32,
    vision_layers=3,
    vision_heads=2,
    image_size=28,
    large_image_size=42,
    prompt_tokens=8,
    new_tokens=3,
    batches=(1, 2),
    batch_new_tokens=2,
    questions=2,
    question_new_tokens=1,
    pictures=(1, 2),
    prompts=(8, 16),
    experts=(2, 4),
    growth_layers=1,
    repeats=1,
    few_repeats=1,
    dtypes=(torch.bfloat16,),
)


def text_config(sizes: Sizes, num_layers: int | None = None) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=num_layers or sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
    )


def vision_config(sizes: Sizes, image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.vision_hidden_size,
        intermediate_size=4 * sizes.vision_hidden_size,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=image_size,
        patch_size=PATCH_SIZE,
        bos_token_id=1,
        eos_token_id=2,
    )


def image_token_id(sizes: Sizes) -> int:
    return sizes.vocab_size - 64


def make_llava(folder: Path, sizes: Sizes) -> None:
    """Writes transformers' LLaVA with random weights, in fp32, and what its processor is made of."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text_config(sizes),
        vision_config=vision_config(sizes, sizes.image_size),
        image_token_id=image_token_id(sizes),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = word_tokenizer(image_token_id(sizes))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": sizes.image_size}, crop_size={"height": sizes.image_size, "width": sizes.image_size}
    ).save_pretrained(folder)


def load_ours(folder: Path, dtype: torch.dtype) -> MoellavaForCausalLM:
    return load_pretrained_model(str(folder), device="cpu", dtype=str(dtype).removeprefix("torch.")).model.eval()


def load_peer(folder: Path, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


LOADERS = {"ours": load_ours, "peer": load_peer}


def make_model(
    sizes: Sizes, dtype: torch.dtype, *, image_size: int, num_layers: int | None = None, **fields: Any
) -> MoellavaForCausalLM:
    """Returns a model of ours with random weights."""
    config = MoellavaConfig(
        text_config=text_config(sizes, num_layers),
        vision_config=vision_config(sizes, image_size),
        image_token_id=image_token_id(sizes),
        **fields,
    )
    torch.manual_seed(0)
    return MoellavaForCausalLM(config).to(dtype).eval()


def make_inputs(
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    num_image_tokens: int,
    image_size: int,
    rows: int = 1,
    pictures: int = 1,
    prompt_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """Returns prompts of `pictures` pictures and words behind them; every row has pictures and words of its own."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, image_token_id(sizes), (rows, prompt_tokens or sizes.prompt_tokens), generator=generator)
    places = torch.full((rows, pictures * num_image_tokens), image_token_id(sizes))
    input_ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), places, words], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if pictures:
        shape = (rows * pictures, 3, image_size, image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator).to(dtype)
    return inputs


def prefill(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return model(**inputs, use_cache=True, logits_to_keep=1)


def generate(model: torch.nn.Module, inputs: dict[str, Any], new_tokens: int) -> torch.Tensor:
    """Returns exactly `new_tokens` new tokens of every row, of shape `(rows, new_tokens)`."""
    tokens = model.generate(
        **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0
    )
    return tokens[:, -new_tokens:]


class Decoding:
    """Decoding steps behind a prefilled prompt; every call begins at the end of the prompt again."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any], new_tokens: int):
        outputs = prefill(model, inputs)
        self.model = model
        self.new_tokens = new_tokens
        self.cache = outputs.past_key_values
        self.first = outputs.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def __call__(self) -> None:
        token = self.first
        for _ in range(self.new_tokens):
            outputs = self.model(input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            token = outputs.logits[:, -1:].argmax(-1)
        self.cache.crop(-self.new_tokens)


@torch.inference_mode()
def check_same_logits(ours: torch.nn.Module, peer: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Checks that two models are one and the same function, without which no comparison of them says anything.

    Raises:
        ValueError: Their logits differ.
    """
    own, other = ours(**inputs).logits, peer(**inputs).logits
    if not torch.equal(own, other):
        difference = (own.float() - other.float()).abs().max().item()
        raise ValueError(
            f"The logits of the two models differ by up to {difference:.3g} (their largest is "
            f"{other.float().abs().max().item():.3g}); expected equal ones. They have not got the same weights, or one "
            "of them computes something else: nothing may be concluded from their times."
        )


def active_bytes(model: MoellavaForCausalLM) -> int:
    """Returns the bytes of weights that a token of text goes through: all but the tower, the projector, the embeddings,
    and the experts that are not chosen."""
    language = model.model.language_model
    counted = {**dict(language.named_parameters()), **dict(model.lm_head.named_parameters(prefix="head"))}
    embeddings = set(language.get_input_embeddings().parameters())
    total = sum(p.numel() * p.element_size() for p in counted.values() if p not in embeddings)
    for block in language.modules():
        if isinstance(block, SparseMoeBlock):
            held = sum(p.numel() * p.element_size() for p in block.experts.parameters())
            total -= held - held * block.top_k // block.num_experts
    return total


def measure_peer(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    found = []
    for dtype in sizes.dtypes:
        name = str(dtype).removeprefix("torch.")
        tell(f"prefill and decoding, {name}")
        ours, peer = load_ours(folder, dtype), load_peer(folder, dtype)
        tokens = sizes.num_image_tokens(sizes.image_size)
        inputs = make_inputs(sizes, dtype, num_image_tokens=tokens, image_size=sizes.image_size)
        check_same_logits(ours, peer, inputs)
        prompt, steps = f"{tokens + sizes.prompt_tokens + 1} tokens", sizes.new_tokens
        models = {"ours": ours, "peer": peer}
        for label, make, per, aim in (
            (f"prefill, {prompt}", partial(partial, prefill), 1, PREFILL_AIM),
            ("decoding, a step", partial(Decoding, new_tokens=steps), steps, DECODE_AIM),
            (f"generate, {prompt} + {steps}", partial(partial, generate, new_tokens=steps), 1, None),
        ):
            times = alternating(
                {who: make(model, inputs) for who, model in models.items()}, sizes.repeats, seconds=sizes.seconds
            )
            label = f"{label}, {name}"
            row = compared("generation", label, PEER, times["ours"], times["peer"], per=per, peer_per=per, aim=aim)
            found.append(row)
    return found


def measure_memory(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    found = []
    folders = {"ours": folder / "ours", "peer": folder}
    load_ours(folder, torch.float32).save_pretrained(folders["ours"])
    for dtype in sizes.dtypes:
        name = str(dtype).removeprefix("torch.")
        tell(f"peak memory, {name}")
        peaks: dict[str, list[float]] = {who: [] for who in folders}
        options = ["--dtype", name, *(["--quick"] if sizes == TINY else [])]
        for _ in range(sizes.few_repeats):
            with ThreadPoolExecutor() as pool:  # both at the same time, which memory takes no notice of
                runs = {
                    who: pool.submit(in_fresh_process, __file__, "--measure", who, "--folder", home, *options)
                    for who, home in folders.items()
                }
            for who, run in runs.items():
                peaks[who].append(run.result()["peak"])
        label = f"peak memory of loading and generating, {name}"
        found.append(
            compared("generation", label, PEER, peaks["ours"], peaks["peer"], unit="MB", aim=MEMORY_AIM),
        )
    return found


def measure_own_memory(who: str, folder: Path, sizes: Sizes, dtype: torch.dtype) -> dict[str, float]:
    """Loads and generates in this process; returns its peak over what it held when everything was imported."""
    import moellava.building.assembling  # noqa: F401

    forget_peak_memory()
    idle = memory("VmRSS")
    model = LOADERS[who](folder, dtype)
    if who == "peer":  # ours has read its processor along with the model
        processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)  # noqa: F841
    tokens = sizes.num_image_tokens(sizes.image_size)
    inputs = make_inputs(sizes, dtype, num_image_tokens=tokens, image_size=sizes.image_size)
    generate(model, inputs, min(sizes.new_tokens, 8))
    return {"peak": memory("VmHWM") - idle}


def measure_sparse(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    tell("decoding, sparse against dense")
    dtype = torch.bfloat16
    dense = load_ours(folder, dtype)
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2, layers="dense")
    tokens = sizes.num_image_tokens(sizes.image_size)
    inputs = make_inputs(sizes, dtype, num_image_tokens=tokens, image_size=sizes.image_size)
    steps = sizes.new_tokens
    times = alternating(
        {m: Decoding(model, inputs, steps) for m, model in (("sparse", sparse), ("dense", dense))},
        sizes.repeats,
        seconds=sizes.seconds,
    )
    share = active_bytes(sparse) / active_bytes(dense)
    return [
        compared(
            "generation",
            "decoding, a step, 2 of 4 experts, bfloat16",
            "the dense parent",
            times["sparse"],
            times["dense"],
            per=steps,
            peer_per=steps,
            note=f"active bytes: {share:.3f} of the parent's",
        )
    ]


def measure_projectors(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    dtype, runs, counts = torch.bfloat16, {}, {}
    for projector in PROJECTORS:
        tell(f"time to the first token, {projector}")
        model = make_model(sizes, dtype, image_size=sizes.large_image_size, projector_config={"type": projector})
        counts[projector] = model.config.image_seq_length
        inputs = make_inputs(sizes, dtype, num_image_tokens=counts[projector], image_size=sizes.large_image_size)
        runs[projector] = partial(generate, model, inputs, 1)
    times = alternating(runs, sizes.repeats, seconds=sizes.seconds)
    return [
        compared(
            "generation",
            f"first token, {projector}, {counts[projector]} tokens, bfloat16",
            f"mlp, {counts['mlp']} tokens",
            times[projector],
            times["mlp"],
        )
        for projector in PROJECTORS[1:]
    ]


def measure_batches(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    dtype = torch.bfloat16
    tell("batches")
    model = load_ours(folder, dtype)
    tokens, new_tokens = sizes.num_image_tokens(sizes.image_size), sizes.batch_new_tokens
    runs = {}
    for rows in sizes.batches:
        inputs = make_inputs(sizes, dtype, num_image_tokens=tokens, image_size=sizes.image_size, rows=rows)
        runs[rows] = partial(generate, model, inputs, new_tokens)
    times = alternating(runs, sizes.few_repeats)
    one, *others = sizes.batches
    found = []
    for rows in others:
        row = compared(
            "generation",
            f"generate, {new_tokens} tokens in {rows} rows, time per token, bfloat16",
            "one row",
            times[rows],
            times[one],
            per=rows * new_tokens,
            peer_per=one * new_tokens,
        )
        row.note = f"{1e3 / row.value:.1f} tokens/s, one row {1e3 / row.peer_value:.1f}"
        found.append(row)
    return found


def measure_questions(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    dtype = torch.bfloat16
    tell("questions about one picture")
    model = load_ours(folder, dtype)
    tokens, new_tokens = sizes.num_image_tokens(sizes.image_size), sizes.question_new_tokens
    questions = make_inputs(sizes, dtype, num_image_tokens=tokens, image_size=sizes.image_size, rows=sizes.questions)
    pixel_values = questions.pop("pixel_values")[:1]
    prompts = [{name: tensor[row : row + 1] for name, tensor in questions.items()} for row in range(sizes.questions)]

    def reused() -> list[torch.Tensor]:
        with torch.inference_mode():
            encoded = {"image": model.get_image_features(pixel_values, return_dict=True)}
        return [generate(model, {**prompt, "mm_encoder_outputs": encoded}, new_tokens) for prompt in prompts]

    def each() -> list[torch.Tensor]:
        return [generate(model, {**prompt, "pixel_values": pixel_values}, new_tokens) for prompt in prompts]

    if not torch.equal(torch.cat(reused()), torch.cat(each())):
        raise ValueError("The answers differ where features are used again; expected the same ones.")
    times = alternating({"reused": reused, "each": each}, sizes.few_repeats)
    label = f"{sizes.questions} questions about a picture that is encoded once, bfloat16"
    return [compared("generation", label, "encoded each time", times["reused"], times["each"])]


def measure_growth(folder: Path, sizes: Sizes, tell: Callable[[str], None]) -> list[Row]:
    dtype = torch.bfloat16
    tell("growth with pictures and prompts")
    model = load_ours(folder, dtype)
    image = {"num_image_tokens": sizes.num_image_tokens(sizes.image_size), "image_size": sizes.image_size}
    found = []
    for what, inputs in (
        ("pictures", {n: make_inputs(sizes, dtype, pictures=n, **image) for n in sizes.pictures}),
        ("prompt tokens", {n: make_inputs(sizes, dtype, pictures=0, prompt_tokens=n, **image) for n in sizes.prompts}),
    ):
        times = alternating({n: partial(prefill, model, given) for n, given in inputs.items()}, sizes.few_repeats)
        found.append(growth("generation", f"prefill, {max(inputs)} {what}", what, times))
    tell("growth with experts")
    layers = sizes.growth_layers
    dense = make_model(sizes, dtype, num_layers=layers, image_size=sizes.image_size)
    steps, prompts, decodings = sizes.new_tokens, {}, {}
    for n in sizes.experts:
        sparse = upcycle(dense, num_experts=n, num_experts_per_tok=2, layers="dense")
        # Text alone: with the picture's features of random weights, all tokens would go to the same experts.
        inputs = make_inputs(sizes, dtype, pictures=0, prompt_tokens=sizes.prompts[0], **image)
        prompts[n], decodings[n] = partial(prefill, sparse, inputs), Decoding(sparse, inputs, steps)
    most = max(sizes.experts)
    times = alternating(prompts, sizes.repeats, seconds=sizes.seconds)
    label = f"prefill of {sizes.prompts[0]} tokens, 2 of {most} experts, {layers} layers"
    found.append(growth("generation", label, "experts", times))
    times = alternating(decodings, sizes.repeats, seconds=sizes.seconds)
    label = f"decoding, a step, 2 of {most} experts, {layers} layers"
    found.append(growth("generation", label, "experts", times, per=steps))
    return found


MEASUREMENTS = {
    "peer": measure_peer,
    "memory": measure_memory,
    "sparse": measure_sparse,
    "projectors": measure_projectors,
    "batches": measure_batches,
    "questions": measure_questions,
    "growth": measure_growth,
}


def rows(
    quick: bool = False,
    tell: Callable[[str], None] = lambda what: None,
    sizes: Sizes | None = None,
    parts: Sequence[str] | None = None,
) -> list[Row]:
    """Measures; `tell` is told what comes next."""
    sizes = sizes or (TINY if quick else Sizes())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_llava(folder, sizes)
        return [row for part in parts or MEASUREMENTS for row in MEASUREMENTS[part](folder, sizes, tell)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--part", choices=list(MEASUREMENTS), action="append", help="which parts (default: all)")
    parser.add_argument("--repeats", type=int, default=Sizes.repeats)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--measure", choices=list(LOADERS), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        sizes, dtype = TINY if arguments.quick else Sizes(), getattr(torch, arguments.dtype)
        sys.stdout.write(json.dumps(measure_own_memory(arguments.measure, arguments.folder, sizes, dtype)))
        return
    described = {"machine": machine(arguments.threads)}
    sizes = TINY if arguments.quick else Sizes(repeats=arguments.repeats)
    found = rows(tell=print_progress, sizes=sizes, parts=arguments.part)
    show(found, "generation")
    if arguments.out:
        write(found, described, arguments.out)


if __name__ == "__main__":
    main()
