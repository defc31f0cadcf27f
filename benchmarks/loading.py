# SPDX-License-Identifier: Apache-2.0
"""Memory and time of loading, assembling and upcycling, against transformers' own LLaVA of the same bytes.

    python benchmarks/loading.py
    python benchmarks/loading.py --repeats 5 --out build/loading.json

Every measurement is a fresh process: the peak of its resident memory (`VmHWM`: anonymous pages and those mapped from
files, each once) over what it held when everything was imported, as a share of the bytes of the model that comes out;
every weight is read once afterwards, so that pages which are only promised count too. Time is that of the call, as a
ratio to transformers loading the LLaVA. Processes take turns, and the median counts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import (
    THREADS,
    Row,
    compared,
    forget_peak_memory,
    in_fresh_process,
    in_words,
    machine,
    memory,
    print_progress,
    show,
    write,
)


CASES = (
    "transformers_llava", "transformers_llava_fp32", "load", "load_fp32", "assemble", "upcycle", "load_sparse", "older",
    "older_bin",
)  # fmt: skip
NUM_EXPERTS = 4
PEER = "transformers_llava"
PEERS = {"load_fp32": "transformers_llava_fp32"}  # where another one does the same
PEAK_AIMS = dict.fromkeys(("load", "load_fp32", "load_sparse"), 1.10) | dict.fromkeys(("assemble", "upcycle"), 1.15)
TIME_AIMS = {"load": 1.10, "load_fp32": 1.10, "assemble": 1.3}


def sizes(tiny: bool = False) -> dict:
    from transformers import CLIPVisionConfig, LlamaConfig

    if tiny:  # only to see that it runs
        width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        return {
            "text": LlamaConfig(vocab_size=8064, **width, **ends),
            "vision": CLIPVisionConfig(image_size=224, patch_size=56, **width, **ends),
        }
    return {
        "text": LlamaConfig(
            vocab_size=8064,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=12,
            num_attention_heads=16,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "vision": CLIPVisionConfig(
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            image_size=224,
            patch_size=14,
            bos_token_id=1,
            eos_token_id=2,
        ),
    }


def make(folder: Path, tiny: bool = False) -> None:
    """Writes the parts, the assembled model, the sparse one, and a LLaVA of the dense one's size."""
    import torch
    from measuring import word_tokenizer
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionModel,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from moellava import load_pretrained_model, upcycle

    configs = sizes(tiny)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    tokenizer = word_tokenizer(8000)
    LlamaForCausalLM(configs["text"]).save_pretrained(folder / "language-model")
    tokenizer.save_pretrained(folder / "language-model")
    CLIPVisionModel(configs["vision"]).save_pretrained(folder / "vision-tower")
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder / "vision-tower")
    llava = LlavaConfig(text_config=configs["text"], vision_config=configs["vision"], image_token_id=8000)
    LlavaForConditionalGeneration(llava).save_pretrained(folder / "llava")
    tokenizer.save_pretrained(folder / "llava")
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224).save_pretrained(folder / "llava")
    model = load_pretrained_model(
        folder / "language-model", mm_vision_tower=folder / "vision-tower", device="cpu"
    ).model
    model.save_pretrained(folder / "dense")
    upcycle(model, num_experts=NUM_EXPERTS, layers="dense").save_pretrained(folder / "sparse")
    write_older(folder, model, tokenizer)
    torch.set_default_dtype(default_dtype)


def write_older(folder: Path, model, tokenizer) -> None:
    """Writes the sparse model as MoE-LLaVA does, in two shards: as safetensors, and as pickles."""
    import torch
    from safetensors.torch import save_file

    projector = {"linear_1": "0", "linear_2": "2"}
    state = {}
    for name, tensor in model.state_dict().items():
        body = name.replace("model.language_model.", "model.")
        if ".mlp." in body and "language_model" in name:
            mlp, _, weight = body.partition(".mlp.")
            for expert in range(NUM_EXPERTS):
                state[f"{mlp}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.{weight}"] = tensor.clone()
            state[f"{mlp}.mlp.deepspeed_moe.gate.wg.weight"] = torch.randn(
                NUM_EXPERTS, model.config.text_config.hidden_size
            )
        elif "multi_modal_projector" in name:
            layer, kind = name.rsplit(".", 2)[1:]
            state[f"model.mm_projector.image_spatial_proj.{projector[layer]}.{kind}"] = tensor.clone()
        elif "vision_tower" not in name:
            state[body] = tensor.clone()
    text = model.config.text_config.to_dict()
    fields = {name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    moe = {"moe_enable": True, "moe_mode": "dense", "num_experts": [NUM_EXPERTS], "top_k_experts": 2}
    fields |= {"num_attention_heads": text["num_attention_heads"], "model_type": "moe_llava_llama", "moe": moe}
    fields |= {
        "mm_image_tower": str(folder / "vision-tower"),
        "image_projector_type": "mlp2x_gelu",
        "rms_norm_eps": 1e-6,
    }
    fields |= {"mm_vision_select_layer": -2, "torch_dtype": "bfloat16", "architectures": ["MoELLaVALlamaForCausalLM"]}
    names = list(state)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    for kind, stem, suffix in (("older", "model", "safetensors"), ("older-bin", "pytorch_model", "bin")):
        home = folder / kind
        home.mkdir()
        tokenizer.save_pretrained(home)
        (home / "config.json").write_text(json.dumps(fields))
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"{stem}-{number:05}-of-00002.{suffix}"
            part = {name: state[name] for name in shard}
            save_file(part, home / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, home / file)
            weight_map |= dict.fromkeys(shard, file)
        (home / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(case: str, folder: Path) -> dict[str, float]:
    """Runs one case in this process."""
    import time

    import torch

    torch.set_num_threads(THREADS)
    import transformers

    from moellava import load_pretrained_model

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

    import moellava.building.assembling  # noqa: F401

    def load_llava(dtype: torch.dtype | str) -> LlavaForConditionalGeneration:
        """Loads what `load_pretrained_model` does: the model, its tokenizer and its image processor."""
        model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=dtype)
        model.processor = (
            AutoTokenizer.from_pretrained(folder / "llava"),
            AutoImageProcessor.from_pretrained(folder / "llava"),
        )
        return model

    dense, parts = str(folder / "dense"), (str(folder / "language-model"), str(folder / "vision-tower"))
    runs = {
        "transformers_llava": lambda: load_llava("auto"),
        "transformers_llava_fp32": lambda: load_llava(torch.float32),
        "load": lambda: load_pretrained_model(dense, device="cpu").model,
        "load_fp32": lambda: load_pretrained_model(dense, device="cpu", dtype="float32").model,
        "assemble": lambda: load_pretrained_model(parts[0], mm_vision_tower=parts[1], device="cpu").model,
        "upcycle": lambda: (
            load_pretrained_model(dense, device="cpu", moe_config={"num_experts": 4, "layers": "dense"}).model
        ),
        "load_sparse": lambda: load_pretrained_model(str(folder / "sparse"), device="cpu").model,
        "older": lambda: load_pretrained_model(str(folder / "older"), device="cpu").model,
        "older_bin": lambda: load_pretrained_model(str(folder / "older-bin"), device="cpu").model,
    }
    forget_peak_memory()
    idle = memory("VmRSS")
    began = time.perf_counter()
    model = runs[case]()
    seconds = time.perf_counter() - began
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    for parameter in model.parameters():
        parameter.view(-1)[:: 4096 // parameter.element_size()].float().sum()  # one value of every page
    return {"peak": (memory("VmHWM") - idle) / size, "seconds": seconds, "bytes": size}


def take_turns(
    cases: Sequence[str],
    repeats: int,
    folder: Path,
    tell: Callable[[str], None] = lambda what: None,
    warms_up: bool = True,
) -> dict[str, list[dict[str, float]]]:
    """Returns what every case measured, in fresh processes, `repeats` times; `tell` is told what comes next."""
    results: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for repeat in range(0 if warms_up else 1, repeats + 1):
        for case in cases:
            tell(f"{case}, {repeat} of {repeats}")
            measured = in_fresh_process(__file__, "--measure", case, "--folder", folder)
            if repeat:  # the first round brings the files into the page cache
                results[case].append(measured)
    return results


def rows(quick: bool = False, tell: Callable[[str], None] = lambda what: None) -> list[Row]:
    """Measures; `tell` is told what comes next."""
    with tempfile.TemporaryDirectory() as temporary:
        tell("writing the models")
        make(Path(temporary), tiny=quick)
        results = take_turns(CASES, 1 if quick else 3, Path(temporary), tell, warms_up=not quick)
    return as_rows(results)


def as_rows(results: dict[str, list[dict[str, float]]]) -> list[Row]:
    """Returns the ratios of what was measured: peaks to the model's bytes, times to transformers'."""
    found = []
    for case, measured in results.items():
        size = measured[0]["bytes"]
        peaks = [one["peak"] * size for one in measured]
        found.append(
            compared(
                "loading",
                f"{case}: peak memory",
                "bytes of the model",
                peaks,
                [size] * len(measured),
                unit="MB",
                aim=PEAK_AIMS.get(case),
            )
        )
        peer = PEERS.get(case, PEER)
        if not case.startswith(PEER) and peer in results:
            seconds, others = ([one["seconds"] for one in results[name]] for name in (case, peer))
            found.append(compared("loading", f"{case}: time", peer, seconds, others, aim=TIME_AIMS.get(case)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append", help="which cases (default: all)")
    parser.add_argument("--folder", type=Path, help="where to keep the models (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        sys.stdout.write(json.dumps(measure(arguments.measure, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "older-bin").exists():
            make(folder)
        cases = arguments.case or CASES
        found = as_rows(take_turns(cases, arguments.repeats, folder, print_progress))
    described = {"machine": machine(THREADS)}
    show(found, in_words(described["machine"]))
    if arguments.out:
        write(found, described, arguments.out)


if __name__ == "__main__":
    main()
