# SPDX-License-Identifier: Apache-2.0
"""The one reader of rows: the same tokens for training, evaluating and asking, and no field dropped in silence."""

import base64
import json

import datasets
import pytest
import torch
from parts import picture

from moellava import check_data, evaluate, load_pretrained_model
from moellava.chatting import Chat
from moellava.chatting.conversations import IMAGE_TOKEN, RowError, arranged, read_conversation, text_parts
from moellava.chatting.prompting import chat_tokens, user_turn
from moellava.evaluating.questions import asked_turns, read_questions
from moellava.training.encoding import Encoder
from moellava.training.recipe import read_recipe
from moellava.training.rows import Rows
from moellava.training.running import _open, _prepared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module", params=["vicuna", "chatml", "smollm2"])
def loaded(request, parts):
    language_model = {
        "vicuna": lambda: parts.language_model("llama"),
        "chatml": lambda: parts.language_model("qwen2", with_chat_template=True),
        "smollm2": lambda: request.getfixturevalue("smollm2"),
    }[request.param]()
    torch.manual_seed(0)
    return load_pretrained_model(language_model, mm_vision_tower=parts.vision_tower("clip"), device="cpu")


def llava(question, images, answer="A bird."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": turns}


def openai(question, images, answer="A bird."):
    return {
        "images": images,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def inline(question, images, answer="A bird."):
    waiting = iter(images)
    content = []
    for number, piece in enumerate(question.split(IMAGE_TOKEN)):
        content += [{"type": "image_url", "image_url": {"url": next(waiting)}}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def prompt_completion(question, images, answer="A bird."):
    return {
        "images": images,
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


FORMS = [llava, openai, inline, prompt_completion]

# What is written, and what is asked: `<image>` for each image.
QUESTIONS = [
    ("<image>\nWhich?", "<image>Which?"),
    ("<image> Which?", "<image>Which?"),
    ("<image>Which?", "<image>Which?"),
    ("<image>\n\nWhich?", "<image>Which?"),
    ("<image>\r\nWhich?", "<image>Which?"),
    ("  \n<image>\t Which? \n", "<image>Which?"),
    ("Which?\n<image>", "<image>Which?"),
    ("Which?<image>", "<image>Which?"),
    ("Which?\r\n<image>\r\n", "<image>Which?"),
    ("Which?\n\n <image> ", "<image>Which?"),
    ("<image><image>\nWhich?", "<image><image>Which?"),
    ("<image>\n<image>\nWhich?", "<image><image>Which?"),
    ("Which?\n<image>\n<image>", "<image><image>Which?"),
    ("<image> Which? <image>", "<image><image>Which?"),
    ("<image>\n<image> Which?\n<image>", "<image><image><image>Which?"),
    ("First\nor\r\nsecond?\n<image>", "<image>First\nor\r\nsecond?"),
    # within the text they stay, and so do those beside them
    ("Is <image> older?", "Is <image> older?"),
    (" Is <image>\nolder? ", "Is <image>older?"),
    (" Is <image>\r\nolder? ", "Is <image>older?"),
    ("Before: <image> After: <image>", "Before: <image> After: <image>"),
    ("<image>\nBefore: <image>\nWhich?", "<image>Before: <image>Which?"),
]


@pytest.mark.parametrize(("written", "asked"), QUESTIONS)
def test_where_images_stand(folder, written, asked):
    images = [f"{number}.png" for number in range(written.count(IMAGE_TOKEN))]
    expected = [part if part["type"] == "text" else {"type": "image"} for part in text_parts(asked)]
    for form in FORMS:
        row = Rows([form(written, images)], folder)[0]
        assert row.messages[0]["content"] == expected, form
        assert row.pictures == [folder / name for name in images]
        assert row.learnt == {1}
    assert arranged(expected) == expected  # arranged once or twice


@pytest.mark.parametrize(("written", "asked"), QUESTIONS)
def test_training_evaluating_and_asking_have_the_same_tokens(loaded, folder, written, asked):
    """Of one row, whatever its form: as `train`, `evaluate`, `ask`, `chat` and the harness make them."""
    model, images = loaded.model, [f"{number}.png" for number in range(written.count(IMAGE_TOKEN))]
    encoder = Encoder(model.processor)
    learnt = encoder.encode(Rows([llava(written, images)], folder)[0])
    prompt = learnt.input_ids[: learnt.answers[0][0]]
    # LLaVA's text: the image and a line end, then the question
    text = asked.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN}\n")
    assert f"{text}" in model.processor.apply_chat_template(
        [{"role": "user", "content": text_parts(asked)}], tokenize=False
    )

    for form in FORMS:
        row = Rows([form(written, images)], folder)[0]
        assert encoder.encode(row) == learnt and encoder.prompt(row) == prompt
        (question,) = read_questions([form(written, images)], folder).questions
        assert chat_tokens(model.processor, question.turns, add_generation_prompt=True) == prompt
    plain = {"question": written, "image": images, "answer": "A bird."}
    (question,) = read_questions([plain], folder).questions
    assert chat_tokens(model.processor, question.turns, add_generation_prompt=True) == prompt

    opened = [picture(number) for number in range(len(images))]
    seen = []
    chat = Chat(loaded, max_new_tokens=1)
    chat._stream = lambda turns, inputs, limit: seen.append(inputs["input_ids"][0].tolist())
    chat.ask(written, opened)  # which `ask`, `chat` and the page do
    content = [part | ({"image": opened[0]} if part["type"] == "image" else {}) for part in text_parts(written)]
    seen.append(
        chat_tokens(model.processor, asked_turns([{"role": "user", "content": content}]), add_generation_prompt=True)
    )
    assert seen == [prompt, prompt]


def test_later_turns_have_the_same_tokens(loaded, folder):
    values = ("One?\n<image>", "A.", "<image> Two?", "B.", "And <image> three?", "C.", "Four?", "D.")
    turns = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
    row = {"image": ["0.png", "1.png", "2.png"], "conversations": turns, "system": "Be brief."}
    model = loaded.model
    encoded = Encoder(model.processor).encode(Rows([row], folder)[0])
    questions = read_questions([row], folder).questions
    assert [question.text for question in questions] == ["One?", "Two?", "And <image> three?", "Four?"]
    assert [len(question.pictures) for question in questions] == [1, 2, 3, 3]
    for question, (start, _) in zip(questions, encoded.answers, strict=True):
        assert chat_tokens(model.processor, question.turns, add_generation_prompt=True) == encoded.input_ids[:start]
    assert "Be brief." in model.processor.tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Which?\n<image>", "Which?\n<image>"),
        (" Which? <image> ", " Which? <image> "),
        ("<image>\n\nWhich?", "<image>\nWhich?"),  # one line end is the template's
        ("<image>\r\nWhich?", "<image>Which?"),
    ],
)
def test_rows_as_written(loaded, folder, written, kept):
    """By the option, in all places: nothing is moved, no blank is taken away."""
    model = loaded.model
    row = llava(written, "0.png")
    messages = Rows([row], folder, as_written=True)[0].messages
    assert messages[0]["content"] == text_parts(kept)
    prompt = Encoder(model.processor).prompt(Rows([row], folder, as_written=True)[0])
    (question,) = read_questions([row], folder, as_written=True).questions
    assert chat_tokens(model.processor, question.turns, add_generation_prompt=True) == prompt
    asked = user_turn([picture(0)], written, as_written=True)
    assert chat_tokens(model.processor, [asked], add_generation_prompt=True) == prompt
    assert check_data([row], processor=model.processor, image_folder=folder, as_written=True).usable == 1
    if written.startswith(IMAGE_TOKEN):
        return
    assert prompt != Encoder(model.processor).prompt(Rows([row], folder)[0])


def test_the_option_of_recipes_and_calls(loaded, folder, tmp_path):
    """In a recipe, for its data and its eval_data, of `evaluate` and of a chat."""
    processor, row = loaded.model.processor, llava(" Which?\n\n<image> ", "0.png", answer="No")
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    kept, moved = (
        Encoder(processor).encode(Rows([row], folder, as_written=as_written)[0]) for as_written in (True, False)
    )
    assert kept != moved
    for as_written, expected in ((True, kept), (False, moved)):
        recipe = {"model": "m", "output_dir": tmp_path / "out", "stage": "align", "report_to": "none", "use_cpu": True}
        recipe |= {"data": str(tmp_path / "rows.json"), "eval_data": [row], "image_folder": str(folder)}
        (stage,) = read_recipe(recipe | ({"as_written": True} if as_written else {})).stages
        both = _prepared([stage], {stage.name: _open(stage)}, processor, 2048)[stage.name]
        assert [examples[0]["input_ids"].tolist() for examples in both] == [expected.input_ids] * 2

        report = evaluate(loaded, [row], image_folder=folder, as_written=as_written, max_new_tokens=1)
        turns = report.answers[0].question.turns
        assert chat_tokens(processor, turns, add_generation_prompt=True) == expected.input_ids[: expected.answers[0][0]]
        assert report.settings.get("as_written", False) is as_written

        chat, seen = Chat(loaded, max_new_tokens=1, as_written=as_written), []
        chat._stream = lambda turns, inputs, limit, seen=seen: seen.append(inputs["input_ids"][0].tolist())
        chat.ask(" Which?\n\n<image> ", [picture(0)])
        assert seen == [expected.input_ids[: expected.answers[0][0]]]


def test_a_recipe_warns_of_rows_that_are_in_both(loaded, folder, tmp_path, caplog):
    rows = datasets.Dataset.from_list([llava(f"<image>Bird {number}?", "0.png") for number in range(4)])
    rows.save_to_disk(str(tmp_path / "saved"))
    for split, overlap in (("train[:50%]", True), ("train[75%:]", False)):
        caplog.clear()
        recipe = {"model": "m", "output_dir": tmp_path / "out", "stage": "align", "report_to": "none", "use_cpu": True}
        recipe |= {"data": {"path": str(tmp_path / "saved"), "split": "train[:75%]"}, "image_folder": str(folder)}
        (stage,) = read_recipe(recipe | {"eval_data": {"path": str(tmp_path / "saved"), "split": split}}).stages
        train, held_out = _prepared([stage], {stage.name: _open(stage)}, loaded.model.processor, 2048)[stage.name]
        assert (len(train), len(held_out)) == ((3, 2) if overlap else (3, 1))
        assert ("2 of the 2 rows of eval_data are rows of data too: row 0, row 1." in caplog.text) is overlap
        assert ("are rows of data too" in caplog.text) is overlap


def test_two_datasets_of_one_look_are_two(loaded, tmp_path):
    """Which their names do not tell apart, nor their columns, nor how many rows they have."""
    train, held_out = (
        datasets.Dataset.from_list([llava(question, None) for question in questions])
        for questions in (("One?", "Two?"), ("Three?", "Four?"))
    )
    recipe = {"model": "m", "output_dir": tmp_path / "out", "stage": "align", "report_to": "none", "use_cpu": True}
    for wrap in (lambda rows: {"path": rows}, lambda rows: datasets.DatasetDict({"train": rows}), lambda rows: rows):
        (stage,) = read_recipe(recipe | {"data": wrap(train), "eval_data": wrap(held_out)}).stages
        both = _prepared([stage], {stage.name: _open(stage)}, loaded.model.processor, 2048)[stage.name]
        texts = [loaded.tokenizer.decode(examples[0]["input_ids"]) for examples in both]
        assert "One?" in texts[0] and "Three?" in texts[1]


def test_a_question_with_as_many_places_as_pictures():
    with pytest.raises(
        ValueError, match=r"The question has 2 <image> for 1 picture\(s\); expected one for each, or none"
    ):
        user_turn([picture(0)], "<image> or <image>?")
    assert user_turn([1, 2], "Which?")["content"] == [
        {"type": "image", "image": 1}, {"type": "image", "image": 2}, {"type": "text", "text": "Which?"}
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Fields
# ---------------------------------------------------------------------------------------------------------------------

CHAT = [("One?", "First."), ("Two?", "Second."), ("Three?", "Third.")]


def marked(names=("from", "value"), **marks):
    """A conversation of three answers; `marks` are the fields of the second."""
    roles = ("human", "gpt") if names[0] == "from" else ("user", "assistant")
    turns = []
    for question, answer in CHAT:
        turns += [{names[0]: role, names[1]: text} for role, text in zip(roles, (question, answer), strict=True)]
    turns[3] |= marks
    return {"conversations" if names[0] == "from" else "messages": turns}


@pytest.mark.parametrize("names", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize(
    "marks", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}]
)
def test_answers_that_are_not_learnt(loaded, names, marks):
    processor = loaded.model.processor
    encoder, row = Encoder(processor), marked(names, **marks)
    encoded = encoder.encode(Rows([row])[0])
    everything = encoder.encode(Rows([marked(names)])[0])
    assert encoded.input_ids == everything.input_ids
    assert encoded.answers == [everything.answers[0], everything.answers[2]]
    said = processor.tokenizer.decode([token for token in encoded.labels if token != -100])
    assert "First." in said and "Third." in said and "Second." not in said
    # and they are not asked, but stand before what is
    assert [question.expected for question in read_questions([row]).questions] == ["First.", "Third."]
    assert len(read_questions([row]).questions[1].turns) == 5


@pytest.mark.parametrize("marks", [{"loss": True}, {"weight": 1}, {"weight": 1.0}, {"loss": None, "weight": None}])
def test_answers_that_are_marked_as_learnt(marks):
    assert Rows([marked(**marks)])[0].learnt == {1, 3, 5}


def test_the_completion_alone_is_learnt(loaded):
    messages = marked(("role", "content"))["messages"]
    row = {"prompt": messages[:5], "completion": messages[5:], "messages": None}
    encoded = Encoder(loaded.model.processor).encode(Rows([row])[0])
    everything = Encoder(loaded.model.processor).encode(Rows([{"messages": messages}])[0])
    assert encoded.input_ids == everything.input_ids and encoded.answers == everything.answers[2:]
    assert [question.expected for question in read_questions([row]).questions] == ["Third."]


def test_a_system_text_of_the_row(loaded, folder):
    own = {"role": "system", "content": "Be brief."}
    messages = marked(("role", "content"))["messages"]
    expected = Rows([{"messages": [own, *messages]}])[0]
    for row in (
        {"messages": messages, "system": " Be brief.\n"},
        {"messages": [own, *messages], "system": "Be brief."},
        marked() | {"system": "Be brief."},
        {"messages": [own | {"role": "developer"}, *messages]},
    ):
        read = Rows([row])[0]
        assert (read.messages, read.learnt) == (expected.messages, {2, 4, 6})
        assert read_questions([row]).questions[0].turns[0]["content"][0]["text"] == "Be brief."
    for empty in ("", "  ", None):
        assert len(Rows([{"messages": messages, "system": empty}])[0].messages) == 6
    row = {"question": "Which?", "answer": "A bird.", "image": "0.png", "system": "Be brief."}
    (question,) = read_questions([row], folder).questions
    learnt = llava("<image>\nWhich?", "0.png") | {"system": "Be brief."}
    prompt = Encoder(loaded.model.processor).prompt(Rows([learnt], folder)[0])
    assert chat_tokens(loaded.model.processor, question.turns, add_generation_prompt=True) == prompt


def test_images_within_the_content(folder):
    """In the forms of OpenAI, of transformers and of Anthropic, and with the nulls of a dataset."""
    data = base64.b64encode((folder / "0.png").read_bytes()).decode()
    url = f"data:image/png;base64,{data}"
    opened = picture(0)
    forms = [
        ({"type": "image_url", "image_url": {"url": url, "detail": "high"}}, url),
        ({"type": "image_url", "image_url": "0.png"}, folder / "0.png"),
        ({"type": "input_image", "image_url": url}, url),
        ({"type": "image", "image": "0.png"}, folder / "0.png"),
        ({"type": "image", "path": str(folder / "0.png")}, folder / "0.png"),
        ({"type": "image", "url": f"file://{folder / '0.png'}", "text": None}, folder / "0.png"),
        ({"type": "image", "base64": data}, f"data:image/*;base64,{data}"),
        ({"type": "image", "image": opened}, opened),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}, url),
        ({"image": "0.png"}, folder / "0.png"),
    ]
    for part, expected in forms:
        for text in (
            {"type": "text", "text": "Which?", "image": None},
            {"type": "input_text", "text": "Which?"},
            "Which?",
        ):
            content = [text, part]
            row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A bird."}]}
            read = Rows([row], folder)[0]
            assert read.pictures == [expected]
            assert read.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Which?"}]
            assert check_data([row], image_folder=folder).usable == 1
            (question,) = read_questions([row], folder).questions
            assert question.pictures == [expected] and question.text == "Which?"


def test_images_within_and_beside_the_content(folder):
    def row(content, **fields):
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}], **fields}

    own = {"type": "image", "image": "0.png"}
    mixed = row([own, {"type": "image"}, {"type": "text", "text": "<image> Which?"}], images=["1.png", "2.png"])
    assert [path.name for path in Rows([mixed], folder)[0].pictures] == ["0.png", "1.png", "2.png"]
    twice = row([own, "Which?"], images=["0.png"])
    assert [path.name for path in Rows([twice], folder)[0].pictures] == ["0.png"]
    for wrong in (row([own, "Which?"], images=["1.png"]), row([own, {"type": "image"}, "Which?"])):
        with pytest.raises(RowError, match=r"placeholder\(s\) and \d picture\(s\)"):
            Rows([wrong], folder)[0]
    away = row([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "Which?"])
    with pytest.raises(RowError, match="names https://example.org/a.png; download it"):
        Rows([away], folder)[0]
    assert read_conversation(row([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).messages[0] == {
        "role": "user", "content": [{"type": "text", "text": "ab"}]
    }  # fmt: skip


def turn_with(place, **fields):
    row = marked(("role", "content"))
    row["messages"][place] |= fields
    return row


REFUSED = [
    (marked() | {"tools": [{"name": "search"}]}, "has the field 'tools', which is not read"),
    (marked() | {"functions": "[{}]"}, "has the field 'functions'"),
    (marked() | {"video": "a.mp4"}, "has the field 'video'"),
    (marked() | {"audios": ["a.wav"]}, "has the field 'audios'"),
    (marked() | {"rejected": [{"role": "assistant", "content": "No."}]}, "has the field 'rejected'"),
    (marked() | {"chat_template_kwargs": {"enable_thinking": False}}, "has the field 'chat_template_kwargs'"),
    (marked() | {"system_prompt": "Be brief."}, "has the field 'system_prompt', .*; call it system"),
    (marked() | {"system": ["Be brief."]}, "has a list as its system; expected a text"),
    (marked() | {"weight": 0}, "has the weight 0; a row is learnt as a whole"),
    (marked() | {"weight": 0.5}, "has the weight 0.5; a row is learnt as a whole"),
    (marked() | {"train": False}, "has the train False; a row is learnt as a whole"),
    (marked() | {"loss": False}, "has the loss False; a row is learnt as a whole"),
    (marked() | {"messages": marked(("role", "content"))["messages"]}, "has both conversations and messages"),
    (llava("<image>Which?", "0.png") | {"images": ["1.png"]}, "has different images as 'images' and as 'image'"),
    (marked(weight=0.5), "message 3 has the weight 0.5; expected true or false, or 1 or 0"),
    (marked(loss="false"), "message 3 has the loss 'false'"),
    (marked(loss=False, weight=1), "message 3 has .* contradict each other"),
    (marked(loss_scale=2.0), "message 3 has the field 'loss_scale'"),
    (turn_with(3, tool_calls=[{"id": "1"}]), "message 3 has the field 'tool_calls'"),
    (turn_with(3, reasoning_content="Hm."), "message 3 has the field 'reasoning_content'"),
    (turn_with(3, thinking="Hm."), "message 3 has the field 'thinking'"),
    (turn_with(2, images=["a.png"]), "message 2 has the field 'images', .*; put it into the content"),
    (turn_with(2, loss=True), "message 2, of the user, has the loss True; only answers are learnt"),
    (turn_with(2, train=True), "message 2, of the user, has the train True"),
    ({"prompt": "One?", "completion": "First."}, "has a text as its prompt; expected a list of messages"),
    ({"prompt": [], "completion": [{"role": "assistant", "content": "A."}], "label": False}, "has the field 'label'"),
    (marked() | {"system": "Be brief."} | {"conversations": [{"from": "system", "value": "Be long."},
     *marked()["conversations"]]}, "has a system text and a first turn of the system that says something else"),
    ({"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "A.", "weight": 0}]},
     "has no answer that is learnt"),
    ({"messages": [{"role": "tool", "content": "One?"}]}, "message 0 is of 'tool'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_what_would_change_what_is_learnt_is_refused_by_name(row, message):
    with pytest.raises(RowError, match=message):
        Rows([row])[0]
    with pytest.raises(ValueError, match=message):
        read_questions([row])


def test_fields_that_say_nothing_are_no_fault():
    nothing = {"tools": None, "videos": [], "functions": "[]", "system": "", "images": None, "image": None, "weight": 1}
    row = turn_with(3, tool_calls=None, reasoning_content="", audio=None) | nothing
    assert Rows([row])[0].learnt == {1, 3, 5} and len(read_questions([row]).questions) == 3


def test_fields_of_turns_that_are_not_read_are_named(caplog):
    rows = [turn_with(3, markdown="x", name=None), turn_with(3, markdown="y", name="Ann"), turn_with(2, weight=1)]
    report = check_data(rows)
    assert report.usable == 3 and report.to_dict()["unread"] == {"markdown": 2, "name": 1}
    assert "fields that are not read: markdown (2 rows), name (1 rows)" in report.lines()
    json.dumps(report.to_dict())


def test_fields_that_only_sound_like_weights_are_named():
    """A patient's weight, and a loss that somebody has noted."""
    report = check_data([marked() | {"weight": 72.5}, marked() | {"loss": 0.3, "train": True}])
    assert report.usable == 2 and report.to_dict()["unread"] == {"weight": 1, "loss": 1}
    question = {"question": "Is it?", "answer": "yes", "image": None}
    meant_for_training = {"weight": 0.5, "train": False, "loss": 0, "rejected": "no", "sample_weight": 2}
    assert len(read_questions([question | meant_for_training]).questions) == 1
    with pytest.raises(ValueError, match="has the field 'tools', which is not read and would change what is asked"):
        read_questions([question | {"tools": [{"name": "search"}]}])
    done = {"prompt": [{"role": "user", "content": "One?"}], "completion": [{"role": "assistant", "content": "A."}]}
    assert Rows([done | {"label": "pneumonia"}])[0].learnt == {1}


@pytest.mark.parametrize("nothing", [None, "", [], [None], [""], float("nan")])
def test_images_that_are_none(nothing):
    """As tables keep rows of text alone; a question has to say null."""
    row = llava("Which?", nothing)
    assert Rows([row])[0].pictures == [] and read_questions([row]).questions[0].pictures == []
    with pytest.raises(RowError, match="has 1 <image> placeholder"):
        Rows([llava("<image>\nWhich?", nothing)])[0]
    question = {"question": "Is it?", "answer": "yes", "image": nothing}
    if nothing is None or nothing == []:
        assert read_questions([question]).questions[0].pictures == []
    else:
        with pytest.raises(ValueError, match="has an empty 'image'; expected a picture's name, or null"):
            read_questions([question])


def test_what_datasets_fills_in_says_nothing():
    """Rows and turns of several forms in one table have all fields of all of them."""
    turns = [
        {"from": "human", "value": "Which?", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "One."},
    ]
    row = {"conversations": turns, "messages": None, "completion": None, "question": None}
    (said,) = Rows([row])
    assert [message["role"] for message in said.messages] == ["user", "assistant"] and not said.unread
    question = {"question": None, "text": "Is it?", "answer": "yes", "image": None, "messages": None}
    assert read_questions([question]).questions[0].text == "Is it?"


def test_messages_of_the_harness_are_arranged():
    content = [{"type": "text", "text": "Which?\n"}, {"type": "image", "image": 1}]
    (first, second) = asked_turns([{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}])
    assert first == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert second["content"] == [{"type": "image", "image": 1}, {"type": "text", "text": "Which?"}]
