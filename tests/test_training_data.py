# SPDX-License-Identifier: Apache-2.0
"""Training data: the forms it comes in, what is learnt of it, and the rows that cannot be used, by name."""

import base64
import json

import datasets
import numpy as np
import pytest
import torch
from parts import picture

from moellava import check_data, load_pretrained_model
from moellava.training.data import Collator, Examples, StreamedExamples, log_overlap, overlapping
from moellava.training.encoding import Encoder
from moellava.training.rows import RowError, Rows, open_data
from moellava.training.trainer import SeededLengthSampler


TURNS = [("How many?", "Three birds."), ("And the colour?", "No: green and blue."), ("Sure?", "Yes.")]


@pytest.fixture(scope="module")
def processor_of(parts):
    """A function: the processor of a small model of a family, whose tokenizer has a chat template or none."""
    made = {}

    def make(family="llama", with_chat_template=False):
        key = family, with_chat_template
        if key not in made:
            made[key] = load_pretrained_model(
                parts.language_model(family, with_chat_template=with_chat_template, overrides={"num_hidden_layers": 1}),
                mm_vision_tower=parts.vision_tower("clip"),
                device="cpu",
            ).model
        return made[key].processor

    make.models = made
    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    content = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    return folder


def llava(turns=TURNS, image="0.png", **fields):
    row = {"conversations": []}
    for number, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if image and not number else question
        row["conversations"] += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return row | ({"image": image} if image else {}) | fields


def messages(turns=TURNS, with_place=True):
    found = []
    for number, (question, answer) in enumerate(turns):
        place = [{"type": "image"}] if with_place and not number else []
        found.append({"role": "user", "content": [*place, {"type": "text", "text": question}]})
        found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What is learnt
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATES = [
    ("llama", False, "</s>"),
    ("llama", True, "</s>"),
    ("qwen2", True, "<|im_end|>"),
    ("phi", False, "<|endoftext|>"),
]


@pytest.mark.parametrize(("family", "with_chat_template", "end"), TEMPLATES)
def test_labels_are_the_answers_with_their_end_tokens(processor_of, folder, family, with_chat_template, end):
    processor = processor_of(family, with_chat_template)
    encoded = Encoder(processor).encode(Rows([llava()], folder)[0])
    said = [processor.tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.answers]
    assert [text.lstrip() for text in said] == [f"{answer}{end}" for _, answer in TURNS]  # and nothing behind the end
    labels = encoded.labels
    assert [token for token in labels if token != -100] == [
        token for start, stop in encoded.answers for token in encoded.input_ids[start:stop]
    ]
    assert len(labels) == len(encoded.input_ids)


@pytest.mark.parametrize(("family", "with_chat_template", "end"), TEMPLATES)
def test_the_shortest_labels(processor_of, folder, family, with_chat_template, end):
    """Of an answer of one letter, its end token is learnt too."""
    processor = processor_of(family, with_chat_template)
    encoded = Encoder(processor).encode(Rows([llava([("Which?", "B"), ("And?", "C")])], folder)[0])
    said = [processor.tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in encoded.answers]
    assert [text.lstrip() for text in said] == [f"B{end}", f"C{end}"]


@pytest.mark.parametrize(("family", "with_chat_template", "end"), TEMPLATES)
def test_tokens_are_those_of_the_processor(processor_of, folder, family, with_chat_template, end):
    """In the conversation, and in each of its prompts: an answer begins where the model is asked to go on."""
    processor = processor_of(family, with_chat_template)
    row = Rows([llava()], folder)[0]
    encoded = Encoder(processor).encode(row)
    with_picture = [{**message, "content": [dict(part) for part in message["content"]]} for message in row.messages]
    with_picture[0]["content"][0]["path"] = str(folder / "0.png")

    def prepared(upto, **kwargs):
        inputs = processor.apply_chat_template(with_picture[:upto], tokenize=True, return_dict=True, **kwargs)
        return list(inputs["input_ids"][0])

    assert encoded.input_ids == prepared(6)
    for number, (start, stop) in enumerate(encoded.answers):
        assert prepared(2 * number + 1, add_generation_prompt=True) == encoded.input_ids[:start]
        assert encoded.input_ids[start:stop] == prepared(2 * number + 2)[start:stop]


@pytest.mark.parametrize(("last", "earlier"), [("", "earlier "), ("earlier ", "")])
def test_a_template_that_rewrites_its_history(processor_of, folder, last, earlier):
    processor = processor_of("qwen2", True)
    template = processor.chat_template
    # As the templates of models that think: the last answer is written otherwise than those before it.
    processor.chat_template = template.replace(
        "{{ message['content'] + '<|im_end|>\n' }}",
        f"{{{{ ('{last}' if loop.last or message['role'] == 'user' else '{earlier}') + message['content'] + "
        "'<|im_end|>\n' }}",
    )
    try:
        encoder = Encoder(processor)
        with pytest.raises(RowError, match="writes message 1 otherwise in the conversation than behind its prompt"):
            encoder.encode(Rows([llava()], folder)[0])
        assert encoder.encode(Rows([llava(TURNS[:1])], folder)[0]).answers  # one turn alone has no history
    finally:
        processor.chat_template = template


@pytest.mark.parametrize("behind_the_prompt", ["!", "<|im_end|>"])
def test_a_template_that_asks_otherwise_than_it_answers(processor_of, folder, behind_the_prompt):
    processor = processor_of("qwen2", True)
    template = processor.chat_template
    processor.chat_template = f"{template}{{% if add_generation_prompt %}}{{{{ '{behind_the_prompt}' }}}}{{% endif %}}"
    try:
        with pytest.raises(RowError, match="writes message 1 otherwise in the conversation than behind its prompt"):
            Encoder(processor).encode(Rows([llava()], folder)[0])
    finally:
        processor.chat_template = template


def test_the_prompt_is_what_stands_before_the_first_answer(processor_of, folder):
    encoder, row = Encoder(processor_of("qwen2", True)), Rows([llava()], folder)[0]
    encoded = encoder.encode(row)
    assert encoder.prompt(row) == encoded.input_ids[: encoded.answers[0][0]]


def test_a_template_without_end_tokens(processor_of, folder, caplog):
    processor = processor_of("qwen2", True)
    template = processor.chat_template
    processor.chat_template = template.replace("<|im_end|>", "").replace("<|im_start|>", "|")
    try:
        encoder = Encoder(processor)
        for _ in range(2):
            encoded = encoder.encode(Rows([llava(TURNS[:1])], folder)[0])
    finally:
        processor.chat_template = template
    assert caplog.text.count("closes answers with no special token: the model will not learn where to end") == 1
    ((start, stop),) = encoded.answers
    assert processor.tokenizer.decode(encoded.input_ids[start:stop]) == "Three birds.\n"


def test_too_long(processor_of, folder):
    processor = processor_of()
    row = Rows([llava()], folder)[0]
    length = len(Encoder(processor).encode(row).input_ids)
    assert len(Encoder(processor, length).encode(row).input_ids) == length
    with pytest.raises(RowError, match=f"has {length} tokens, of which {length - 1} fit") as error:
        Encoder(processor, length - 1).encode(row)
    assert error.value.kind == "too long"


# ---------------------------------------------------------------------------------------------------------------------
# The forms of data
# ---------------------------------------------------------------------------------------------------------------------


def forms(folder, tmp_path):
    """One conversation about one picture, in every form."""
    (tmp_path / "rows.json").write_text(json.dumps([llava()]), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps(llava(image=["0.png"])) + "\n\n", encoding="utf-8")
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    plain = [
        {"role": role, "content": text}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    dataset = datasets.Dataset.from_dict({"messages": [plain], "images": [[picture(0)]]}, features=features)
    paths = datasets.Dataset.from_dict({"messages": [plain], "images": [[str(folder / "0.png")]]}, features=features)
    url = f"data:image/png;base64,{base64.b64encode((folder / '0.png').read_bytes()).decode()}"
    dataset.save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "parquet" / "rows.parquet"))
    return {
        "a file": open_data(tmp_path / "rows.json", folder),
        "lines": open_data(str(tmp_path / "rows.jsonl"), folder),
        "a mapping": open_data({"path": str(tmp_path / "rows.json"), "image_folder": str(folder)}),
        "parts": open_data([{"messages": messages(), "images": [picture(0)]}]),
        "a dataset": open_data(dataset),
        "a dataset of paths": open_data(paths),
        "a picture within the row": open_data([llava(image=url)]),
        "saved": open_data(str(tmp_path / "saved")),
        "parquet": open_data({"path": str(tmp_path / "parquet"), "split": "train"}),
        "streamed": open_data({"path": str(tmp_path / "parquet"), "split": "train", "streaming": True}),
        "one picture": open_data(dataset.map(lambda row: {"image": row["images"][0]}, remove_columns="images")),
    }


def test_all_forms_are_one_conversation(processor_of, folder, tmp_path):
    processor = processor_of()
    batches = {}
    for form, rows in forms(folder, tmp_path).items():
        assert rows.is_streamed is (form == "streamed") and (rows.is_streamed or len(rows) == 1)
        examples = (StreamedExamples if rows.is_streamed else Examples)(rows, Encoder(processor))
        (example,) = examples
        batches[form] = Collator(processor)([example])
        assert examples.report.usable == examples.report.rows == examples.report.pictures == 1
    expected = batches.pop("a file")
    assert expected["pixel_values"].shape[0] == 1 and (expected["labels"] != -100).sum() > 10
    for form, batch in batches.items():
        for name, tensor in expected.items():
            assert torch.equal(batch[name], tensor), (form, name)


def test_batches(processor_of, folder):
    processor = processor_of()
    data = [llava(), llava(image=None), llava(TURNS[:1], image=None) | {"id": "short"}]
    data.append(
        {
            "images": ["0.png", "1.png"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Here <image> and there\n<image>"},
                {"from": "gpt", "value": "Two."},
            ],
        }
    )
    examples = Examples(open_data(data, folder), Encoder(processor))
    assert examples.lengths == [len(example["input_ids"]) for example in examples]
    batch = Collator(processor)(list(examples))
    assert batch["pixel_values"].shape[0] == 3
    assert batch["input_ids"].shape == batch["labels"].shape == (4, max(examples.lengths))
    assert batch["attention_mask"].sum(dim=1).tolist() == examples.lengths
    assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != processor.image_token_id).all()
    assert (batch["input_ids"] == processor.image_token_id).sum() == 3 * processor.num_image_tokens
    assert "pixel_values" not in Collator(processor)([examples[1], examples[2]])
    text = processor.tokenizer.decode(examples[3]["input_ids"])
    image = "<image>" * processor.num_image_tokens
    assert "Be brief." in text and f"Here {image}" in text and text.count(image) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_line_of_jsonl_ends_with_its_line_end_alone(tmp_path, encoding):
    """Not at the other characters that end lines of text, which JSON strings may hold as they are."""
    said = "One\u2028two\u2029three\u0085four."
    rows = [llava([("Which?", said)], image=None), llava(image=None)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.JSONL").write_text("\r\n".join([*lines, "  ", ""]), encoding=encoding, newline="")
    opened = open_data(tmp_path / "rows.JSONL")
    assert len(opened) == 2 and opened[0].messages[1]["content"][0]["text"] == said


def test_the_working_folder_is_data(tmp_path, monkeypatch):
    datasets.Dataset.from_list([llava(image=None)]).to_parquet(str(tmp_path / "rows.parquet"))
    monkeypatch.chdir(tmp_path)
    assert open_data(".")[0].messages == Rows([llava(image=None)])[0].messages


def test_the_misspelt_name_of_llava_med_is_known(folder):
    row = llava()
    row["conversatons"] = row.pop("conversations")
    assert Rows([row], folder)[0].messages == Rows([llava()], folder)[0].messages


def test_urls_are_not_fetched():
    with pytest.raises(RowError, match="names https://example.org/a.png; download it, nothing is fetched"):
        Rows([llava(image="https://example.org/a.png")])[0]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"split": "train"}, ValueError, "data has no path"),
        ({"path": "x.json", "splitt": "train"}, ValueError, "Unknown field 'splitt' in data; did you mean 'split'?"),
        (3, TypeError, "data is a int; expected the path of a .json file"),
        ("missing.json", FileNotFoundError, "There is no file missing.json"),
        ("broken.json", ValueError, r"broken.json is no valid JSON \(.*\)"),
        ("object.json", ValueError, "object.json holds a JSON object; expected a list of rows"),
        ("latin.json", ValueError, "latin.json is no text in UTF-8"),
        ("", ValueError, "data is empty: give the file"),
        ("splits", ValueError, "Unknown split 'train' of splits.* Known: validation"),
    ],
)
def test_data_that_cannot_be_opened(tmp_path, monkeypatch, data, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("[", encoding="utf-8")
    (tmp_path / "object.json").write_text("{}", encoding="utf-8")
    (tmp_path / "latin.json").write_text('["\u00e4"]', encoding="latin-1")
    datasets.DatasetDict({"validation": datasets.Dataset.from_list([{"id": 1}])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(error, match=message):
        open_data(data)


def numbered(count, start=0):
    return [llava([(f"Question {number}?", f"Answer {number}.")], image=None) for number in range(start, start + count)]


def questions_of(rows):
    return [rows[index].messages[0]["content"][0]["text"].split()[1][:-1] for index in range(len(rows))]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Ten rows in every form that has no splits, and folders of two splits and of one."""
    folder = tmp_path_factory.mktemp("several")
    rows = datasets.Dataset.from_list(numbered(10))
    rows.save_to_disk(str(folder / "unnamed"))
    both = datasets.DatasetDict({"train": rows, "test": datasets.Dataset.from_list(numbered(4, 100))})
    both.save_to_disk(str(folder / "both"))
    named = datasets.Dataset.from_list(numbered(4, 100), split=datasets.NamedSplit("test"))
    named.save_to_disk(str(folder / "named"))
    (folder / "rows.json").write_text(json.dumps(numbered(10)), encoding="utf-8")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, numbered(10))), encoding="utf-8")
    return folder, {"list": numbered(10), "dataset": rows, "splits": both}


@pytest.mark.parametrize("name", ["unnamed", "both", "rows.json", "rows.jsonl", "list", "dataset", "splits"])
@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        (None, range(10)),
        ("train", range(10)),
        ("train[:80%]", range(8)),
        ("train[80%:]", range(8, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[-1:]", range(9, 10)),
        ("train[:2]+train[8:]", (0, 1, 8, 9)),
    ],
)
def test_splits_and_their_slices(several, name, split, numbers):
    folder, held = several
    rows = open_data({"path": held.get(name, str(folder / name)), "split": split})
    assert questions_of(rows) == [str(number) for number in numbers]


def test_splits_by_name(several):
    folder, held = several
    for data in (str(folder / "both"), held["splits"]):
        assert questions_of(open_data({"path": data, "split": "test"})) == ["100", "101", "102", "103"]
        assert questions_of(open_data({"path": data, "split": "train[:1]+test[:1]"})) == ["0", "100"]
        assert len(open_data(data)) == 10
    assert (
        len(open_data(str(folder / "named"))) == len(open_data({"path": str(folder / "named"), "split": "test"})) == 4
    )


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("unnamed", {"split": "validation"}, "Unknown split 'validation' of .*unnamed.* Known: train"),
        ("named", {"split": "train"}, "Unknown split 'train' of .*named.* Known: test"),
        ("both", {"split": "tset"}, "Unknown split 'tset' of .*both; did you mean 'test'"),
        ("both", {"split": "train[:80"}, r"split is 'train\[:80' .*; expected a name or a slice"),
        ("rows.json", {"split": "test"}, "Unknown split 'test' of .*rows.json"),
        ("both", {"streaming": True}, "data gives streaming: True with .*both; it goes with what load_dataset reads"),
        ("rows.json", {"name": "english"}, "data gives name: 'english' with .*rows.json"),
        ("list", {"name": "english"}, "data gives name: 'english' with the dataset"),
    ],
)
def test_splits_that_are_not_there(several, name, fields, message):
    folder, held = several
    with pytest.raises(ValueError, match=message):
        open_data({"path": held.get(name, str(folder / name)), **fields})


def test_rows_to_evaluate_on_that_are_trained_on_are_named(processor_of, folder, tmp_path, caplog):
    (tmp_path / "copy.png").write_bytes((folder / "0.png").read_bytes())
    url = f"data:image/png;base64,{base64.b64encode((folder / '0.png').read_bytes()).decode()}"
    encoder = Encoder(processor_of())
    train = Examples(open_data([llava(), llava(image=None), llava(TURNS[:1], image=None)], folder), encoder)
    same = [llava(image=str(tmp_path / "copy.png"), id="a copy"), llava(image=url), llava(image=None)]
    other = [llava(image="1.png"), llava(TURNS[:2]), llava([("How many?", "Two.")], image=None)]
    evaluated = Examples(open_data([other[0], *same, *other[1:]], folder), encoder)
    assert overlapping(evaluated, train) == ["row 1 (id a copy)", "row 2", "row 3"]
    log_overlap(evaluated, train, "eval_data")
    assert "3 of the 6 rows of eval_data are rows of data too: row 1 (id a copy), row 2, row 3. The loss" in caplog.text
    caplog.clear()
    log_overlap(Examples(open_data(other, folder), encoder), train, "eval_data")
    assert not caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Rows that cannot be used
# ---------------------------------------------------------------------------------------------------------------------

BAD = [
    ("missing picture", llava(image="gone.png"), "there is no file .*gone.png"),
    ("unreadable picture", llava(image="cut.png"), "cut.png cannot be decoded"),
    ("placeholders", llava(image=None) | {"image": "0.png"}, r"has 0 <image> placeholder\(s\) and 1 picture\(s\)"),
    ("placeholders", llava(image=["0.png", "1.png"]), r"has 1 <image> placeholder\(s\) and 2 picture\(s\)"),
    ("placeholders", llava([("What?", "<image>")]), "turn 1, an answer, has a picture"),
    ("roles", {"conversations": llava()["conversations"][1:], "image": "0.png"}, "turn 0 is of the assistant"),
    ("roles", {"conversations": llava(image=None)["conversations"][:-1]}, "ends without an answer"),
    ("roles", {"conversations": [{"from": "tool", "value": "x"}]}, "message 0 is of 'tool'; expected one of human"),
    ("roles", {"conversations": [{"from": ["human"], "value": "x"}]}, r"message 0 is of \['human'\]; expected one of"),
    ("empty answer", llava([("What?", " \n")]), "turn 1 of the assistant is empty"),
    ("too long", llava([("What? " * 2000, "That.")]), r"tokens, of which \d+ fit"),
    ("form", {"text": "x"}, "has neither conversations nor messages, but text"),
    ("form", ["x"], "is a list; expected an object"),
    ("form", {"conversations": ["x"]}, "turn 0 has no 'from' and 'value'"),
    ("form", llava([("What?", "Cut \ud83d")], id="\ud83d"), r"message 1 is no text in Unicode: 'Cut \\ud83d'"),
    ("form", {"conversations": 5}, "has a int as its conversations; expected a list of turns"),
    ("form", {"messages": ["x"]}, "message 0 has no role"),
    ("form", {"messages": [{"role": "user", "content": 3}]}, "message 0 has a int as its content"),
    ("form", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor image"),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(processor_of, tmp_path_factory):
    processor_of()
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    processor_of.models["llama", False].save_pretrained(folder)
    return folder


def test_check_names_every_row(checkpoint, folder, tmp_path):
    rows = [llava(id="fine")]
    for number, (_, row, _) in enumerate(BAD):
        rows.append(row | {"id": f"bad-{number}"} if isinstance(row, dict) else row)
    rows.append(llava(image=None))
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    report = check_data(tmp_path / "rows.json", model=checkpoint, image_folder=folder)
    assert [problem.kind for problem in report.problems] == [kind for kind, _, _ in BAD]
    for number, (problem, (_, row, message)) in enumerate(zip(report.problems, BAD, strict=True)):
        named = f" (id bad-{number})" if isinstance(row, dict) else ""
        assert problem.row == f"row {number + 1}{named}"
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(problem.detail)
    assert (report.rows, report.usable, report.pictures) == (len(BAD) + 2, 2, 1)
    assert sum(report.kinds.values()) == len(BAD) and report.kinds["form"] == 8
    assert report.tokens > report.longest > report.answer_tokens > 20

    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["problems"][0] == {
        "row": "row 1 (id bad-0)", "kind": "missing picture", "detail": f"there is no file {folder / 'gone.png'}",
    }  # fmt: skip
    lines = report.lines(most=3)
    assert lines[0] == f"2 of {len(BAD) + 2} rows can be used, with 1 pictures"
    assert "form: 8 row(s)" in lines and lines[-1] == f"... and {len(BAD) - 3} more"
    assert f"row 1 (id bad-0): missing picture: there is no file {folder / 'gone.png'}" in lines


def test_check_without_a_model_or_without_opening(folder):
    bad = [row for _, row, _ in BAD]
    without = check_data(bad, image_folder=folder)
    assert [problem.kind for problem in without.problems] == [kind for kind, _, _ in BAD if kind != "too long"]
    assert without.tokens == 0 and len(without.lines(0)) == 1 + len(without.kinds) + 1
    unopened = check_data(bad, image_folder=folder, check_pictures=False)
    assert [problem.kind for problem in unopened.problems] == [
        kind for kind, _, _ in BAD if kind not in ("too long", "unreadable picture")
    ]


def test_rows_left_out_are_logged(processor_of, folder, caplog):
    encoder = Encoder(processor_of())
    examples = StreamedExamples(open_data(iter([llava(image="gone.png"), llava()]), folder), encoder)
    assert len(list(examples)) == 1 and examples.report.usable == 1
    assert "Left out: row 0: missing picture: there is no file" in caplog.text
    with pytest.raises(ValueError, match="None of the 1 rows can be used: row 0: form: is a str; expected an object"):
        Examples(open_data(["x"]), encoder)
    with pytest.raises(ValueError, match="None of the 0 rows can be used: there are none"):
        list(StreamedExamples(open_data(iter([])), encoder))


def test_a_picture_that_fails_later_names_its_row(processor_of, folder):
    processor = processor_of()
    examples = Examples(open_data([llava(image="cut.png", id=7)], folder), Encoder(processor), check_pictures=False)
    with pytest.raises(ValueError, match=r"row 0 \(id 7\): .*cut.png cannot be decoded .*Take the row out, or mend"):
        Collator(processor)([examples[0]])


def test_a_model_that_is_no_checkpoint(parts):
    with pytest.raises(ValueError, match="is a model of type 'llama', not a checkpoint of this package. Assemble it"):
        check_data([], model=parts.language_model("llama"))


# ---------------------------------------------------------------------------------------------------------------------
# Batches by length
# ---------------------------------------------------------------------------------------------------------------------


def test_sampler_groups_by_length_and_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 1000, 400).tolist()
    sampler = SeededLengthSampler(8, lengths, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(400))
    spread = [np.ptp([lengths[index] for index in first[start : start + 8]]) for start in range(0, 400, 8)]
    assert np.mean(spread) < 150
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    torch.manual_seed(99)
    again = SeededLengthSampler(8, lengths, seed=3)
    assert list(again) == first
    again.set_epoch(1)
    assert list(again) == second
    assert list(SeededLengthSampler(8, lengths, seed=4)) != first


def test_a_file_of_a_table(folder, tmp_path):
    """The file itself, which is not looked for on the Hub."""
    rows = [{"messages": [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "A."}]}
            for number in range(4)]  # fmt: skip
    for row in rows:
        row["images"] = [picture(0)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = open_data({"path": tmp_path / "rows.parquet", "split": "train[1:3]"})
    assert [row.messages[0]["content"][1]["text"] for row in found] == ["1", "2"]
    assert check_data(tmp_path / "rows.parquet").pictures == 4
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.csv ends in '.csv'; expected a .json, .jsonl or .parquet file"):
        open_data(tmp_path / "rows.csv")
