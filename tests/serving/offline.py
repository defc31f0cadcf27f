# SPDX-License-Identifier: Apache-2.0

"""Answers questions with vLLM, in a process that has vLLM and not this package: reads a job and writes the answers.

Run as `python offline.py JOB.json`. The job holds `checkpoint`, `questions` (a prompt, and the files of its pictures)
and `answers`, the file that gets the tokens of every answer and the log-probabilities of the best ones at each step.
"""

import json
import sys
from pathlib import Path


sys.modules["moellava"] = None  # "import moellava" raises

from PIL import Image  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def main(job: dict) -> None:
    llm = LLM(
        job["checkpoint"],
        model_impl="transformers",
        trust_remote_code=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        limit_mm_per_prompt={"image": 2},
    )
    prompts = []
    for question in job["questions"]:
        prompts.append({"prompt": question["prompt"]})
        if question["pictures"]:
            prompts[-1]["multi_modal_data"] = {"image": [Image.open(name) for name in question["pictures"]]}
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], logprobs=5)
    answers = [output.outputs[0] for output in llm.generate(prompts, sampling)]
    model = llm.apply_model(lambda model: (type(model).__name__, [type(m).__name__ for m in model.modules()]))[0]
    result = {
        "backend": model[0],
        "modules": sorted(set(model[1])),
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [{token: value.logprob for token, value in step.items()} for step in answer.logprobs] for answer in answers
        ],
    }
    Path(job["answers"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
