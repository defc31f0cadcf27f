# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of ours served by vLLM's backend for models of transformers, against transformers' own answers.

`make test-serving` runs this folder. vLLM lies in an environment of its own, which MOELLAVA_SERVING names; the
package is not there, so that what vLLM runs is the code that travels in the checkpoint.
"""

import base64
import io
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from parts import taken_port
from taught import CHECKPOINTS, QUESTIONS, prompt, shown, write_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor


HERE = Path(__file__).parent
SERVING = os.environ.get("MOELLAVA_SERVING")
MAX_TOKENS = 24

pytestmark = pytest.mark.skipif(SERVING is None, reason="needs an environment with vLLM: make test-serving")

# What of vLLM's has to run, so that a test does not pass by a slower way: its backend, and a module in it.
RUN_BY = {
    "clip-mlp-llama": ("TransformersMultiModalForCausalLM", "MergedColumnParallelLinear"),
    "siglip-qformer-phi": ("TransformersMultiModalForCausalLM", "Attention"),
    # experts as vLLM knows them: its own kernels
    "clip-mlp-llama-sparse": ("TransformersMultiModalMoEForCausalLM", "TransformersMoERunner"),
    "clip-mlp-llama-sparse-shared": ("TransformersMultiModalMoEForCausalLM", "TransformersMoERunner"),
    # experts with biases, which are not announced: our block as it is
    "clip-mlp-phi-sparse": ("TransformersMultiModalForCausalLM", "BiasedPlainExperts"),
}


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """A function that gives the folder of a checkpoint, written at the first call."""
    root, written = tmp_path_factory.mktemp("taught"), {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = write_checkpoint(name, root, parts)
        return written[name]

    return get


@pytest.fixture
def environment(tmp_path):
    """The variables of a process with vLLM: the CPU's, no network, caches of its own."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "2",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_TARGET_DEVICE": "cpu",
    }


def run(script: str, job: dict, folder: Path, environment: dict[str, str]):
    """Runs a script of this folder in the environment with vLLM, and returns the answers that it writes."""
    file, answers = folder / "job.json", folder / "answers.json"
    file.write_text(json.dumps({**job, "max_tokens": MAX_TOKENS, "answers": str(answers)}))
    done = subprocess.run(
        [f"{SERVING}/python", str(HERE / script), str(file)],
        env=environment,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(answers.read_text())


def inputs_of(processor, pictures: list[int], question: str):
    return processor(text=prompt(pictures, question), images=[shown(i) for i in pictures] or None, return_tensors="pt")


def load(folder: Path):
    trusted = {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, **trusted).eval()
    return model, AutoProcessor.from_pretrained(folder, **trusted)


def ties(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether each token has the largest logit of its step, or one that bf16 (8 bits) does not tell from it."""
    best = logits.max(dim=-1).values
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    return best - chosen <= 2 * 2**-8 * best.abs()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_answers_are_those_of_transformers(name, checkpoint, environment, tmp_path):
    folder = checkpoint(name)
    for index in range(4):
        shown(index).save(tmp_path / f"{index}.png")
    questions = [
        {"prompt": prompt(pictures, question), "pictures": [str(tmp_path / f"{index}.png") for index in pictures]}
        for pictures, question, _ in QUESTIONS
    ]
    variables = environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    served = run("offline.py", {"checkpoint": str(folder), "questions": questions}, tmp_path, variables)

    backend, module = RUN_BY[name]
    assert served["backend"] == backend
    assert module in served["modules"]

    model, processor = load(folder)
    for (pictures, question, answer), tokens, logprobs in zip(
        QUESTIONS, served["tokens"], served["logprobs"], strict=True
    ):
        inputs = inputs_of(processor, pictures, question)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            expected = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, length:].tolist()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            logits = model(**inputs).logits[0, length - 1 : -1].float()
        # Every token that vLLM chose is transformers' choice after the tokens before it, but for ties of bf16.
        if tokens != expected:
            assert ties(logits, torch.tensor(tokens)).all(), (question, processor.decode(tokens))
        text = processor.decode(tokens, skip_special_tokens=True)
        assert text.strip() == answer.strip()
        # And it is as sure of them: bf16 rounds logits by their size, so that unlikely tokens differ by more.
        own = torch.log_softmax(logits, dim=-1)
        for step, others in enumerate(logprobs):
            for token, logprob in others.items():
                assert own[step, int(token)].item() == pytest.approx(logprob, abs=0.25, rel=0.1), (question, step)


@contextmanager
def vllm_serve(folder: Path, environment: dict[str, str], log: Path):
    """Runs `vllm serve` on a free port, waits until it answers, and ends it and all its processes."""
    with taken_port() as port:
        pass  # free again, and nobody else's yet
    options = "--trust-remote-code --model-impl transformers --dtype bfloat16 --enforce-eager --max-model-len 256"
    with log.open("w") as output:
        server = subprocess.Popen(
            [f"{SERVING}/vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options.split()],
            env=environment | {"PATH": f"{SERVING}:{os.environ['PATH']}"},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 600
        while not _answers(f"{url}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        if server.poll() is None:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                pass  # what is left of it is ended below
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing is left
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def message(pictures: list[int], question: str) -> list[dict]:
    """A question as the openai client sends it, its pictures as data."""
    content = []
    for index in pictures:
        file = io.BytesIO()
        shown(index).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("name", ["clip-mlp-llama", "clip-mlp-llama-sparse"])
def test_vllm_serve_answers_several_at_once(name, checkpoint, environment, tmp_path):
    folder = checkpoint(name)
    job = {"model": str(folder), "messages": [message(pictures, question) for pictures, question, _ in QUESTIONS]}
    with vllm_serve(folder, environment, tmp_path / "serve.log") as url:
        texts = run("over_http.py", {**job, "url": url}, tmp_path, environment)
    assert [text.strip() for text in texts] == [answer.strip() for _, _, answer in QUESTIONS]
