# SPDX-License-Identifier: Apache-2.0
"""Answers the held-out pictures in a process of its own, from nothing but the checkpoint.

`running.py` starts it; by hand: `python answer.py CHECKPOINT QUESTIONS.json RESULTS.json`. It needs torch and
transformers, and makes sure that it does without the package that the checkpoint was made with.
"""

import argparse
import importlib.abc
import importlib.util
import json
import sys
import time
from pathlib import Path


BATCH_SIZE = 100


class Blocked(importlib.abc.MetaPathFinder):
    """Makes `import moellava` fail, however it is installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "moellava":
            raise ModuleNotFoundError(f"No module named {fullname!r}: blocked by the demo", name=fullname)
        return None


def block_moellava() -> None:
    """Blocks the package, and checks that it is blocked."""
    if any(name.partition(".")[0] == "moellava" for name in sys.modules):
        raise RuntimeError("moellava is imported already.")
    sys.meta_path.insert(0, Blocked())
    for name in ("moellava", "moellava.modeling", "moellava.configuration.configuration_moellava"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} can be imported, so this would prove nothing.")


def ask(pipe, questions: list[str], pictures: list[str], title: str) -> list[str]:
    """Asks each question about the picture beside it."""
    from tqdm.auto import tqdm

    answers = []
    with tqdm(total=len(questions), desc=f"    {title}", unit=" pictures", dynamic_ncols=True) as bar:
        for start in range(0, len(questions), BATCH_SIZE):
            chunk = range(start, min(start + BATCH_SIZE, len(questions)))
            chats = [user_turn(questions[index], pictures[index]) for index in chunk]
            for [output] in pipe(text=chats, batch_size=BATCH_SIZE, max_new_tokens=12, return_full_text=False):
                answers.append(output["generated_text"].strip())
            bar.update(len(chunk))
    return answers


def user_turn(question: str, picture: str) -> list[dict]:
    """Returns a chat of one question about a picture."""
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def answer_directly(model, processor, question: str, picture: str) -> str:
    """Asks one question without a pipeline."""
    inputs = processor.apply_chat_template(
        user_turn(question, picture),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Answers every question with its picture and with a blank one, and writes the answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the folder that the model was saved to")
    parser.add_argument(
        "questions", type=Path, help="JSON: a list of question, picture and answer; and a blank picture"
    )
    parser.add_argument("results", type=Path, help="where to write the answers, as JSON")
    arguments = parser.parse_args()

    block_moellava()
    began = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    pipe = pipeline("image-text-to-text", model=str(arguments.checkpoint), trust_remote_code=True, device="cpu")
    home = type(model).__module__.partition(".")[0]
    print(f"    import moellava           fails here; {type(model).__name__} is the checkpoint's own code ({home})")

    asked = json.loads(arguments.questions.read_text(encoding="utf-8"))
    folder = arguments.questions.parent
    questions = [item["question"] for item in asked["questions"]]
    pictures = [str(folder / item["picture"]) for item in asked["questions"]]
    truths = [item["answer"] for item in asked["questions"]]
    direct = answer_directly(model, processor, questions[0], pictures[0])
    print(f"    AutoModelForCausalLM      {questions[0]} - {direct}")

    answers = ask(pipe, questions, pictures, "pipeline, held-out pictures")
    if answers[0] != direct:
        raise RuntimeError(f"The pipeline answers {answers[0]!r} where the model alone answers {direct!r}.")
    blank_answers = ask(pipe, questions, [str(folder / asked["blank"])] * len(questions), "pipeline, a blank picture")
    if any(name.partition(".")[0] == "moellava" for name in sys.modules):
        raise RuntimeError("moellava was imported after all.")

    results = {
        "accuracy": sum(a == t for a, t in zip(answers, truths, strict=True)) / len(truths),
        "blank_accuracy": sum(a == t for a, t in zip(blank_answers, truths, strict=True)) / len(truths),
        "seconds": round(time.perf_counter() - began, 1),
        "answers": [
            {**item, "truth": item["answer"], "answer": answer, "blank_answer": blank}
            for item, answer, blank in zip(asked["questions"], answers, blank_answers, strict=True)
        ],
    }
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
