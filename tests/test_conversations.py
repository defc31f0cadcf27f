# SPDX-License-Identifier: Apache-2.0
"""Tests of `moellava.converting.conversations`: prompts byte for byte, ids piece by piece, stops.

The prompts come from a renderer of its own here, written from the older formats; the ids from a tokenisation of the
pieces between the pictures, each on its own, as the older code does it.
"""

import itertools

import pytest
from parts import picture
from transformers import AutoTokenizer, CLIPImageProcessorPil

from moellava.chatting.chat_templates import VICUNA_CHAT_TEMPLATE, VICUNA_SYSTEM_TEXT, multimodal_chat_template
from moellava.converting.conversations import (
    FAMILIES,
    Conversation,
    conversation_for,
    prepare_legacy_tokenizer,
    stop_token_ids,
)
from moellava.processing.processing_moellava import MoellavaProcessor


USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
TWO_ROLES, SINGLE_ROLES = ("USER", "ASSISTANT"), ("Human", "Assistant")
MPT_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")

# Name -> style, roles, sep, sep2, system text, what a picture is.
OLDER = {
    **{
        name: ("TWO", TWO_ROLES, " ", sep2, USER_SYSTEM, "<image>\n")
        for name, sep2 in {
            "llama": "</s>",
            "v1": "</s>",
            "vicuna_v1": "</s>",
            "mistral": "</s>",
            "minicpm": "</s>",
            "openchat": "<|end_of_turn|>",
            "phi": "<|endoftext|>",
            "qwen": "<|endoftext|>",
            "qwen1_5": "<|endoftext|>",
            "stablelm": "<|endoftext|>",
        }.items()
    },
    "llava_v1": ("TWO", TWO_ROLES, " ", "</s>", HUMAN_SYSTEM, "<image>\n"),
    "v1_mmtag": ("TWO", TWO_ROLES, " ", "</s>", MMTAG_SYSTEM, "<Image><image></Image>\n"),
    "llava_v0": ("SINGLE", SINGLE_ROLES, "###", None, HUMAN_SYSTEM, "<image>\n"),
    "v0_mmtag": ("SINGLE", SINGLE_ROLES, "###", None, MMTAG_SYSTEM, "<Image><image></Image>\n"),
    "llava_llama_2": ("LLAMA_2", TWO_ROLES, "<s>", "</s>", VISION_SYSTEM, "<image>\n"),
    "mistral_instruct": ("LLAMA_2", TWO_ROLES, "", "</s>", "", "<image>\n"),
    "mpt": ("MPT", MPT_ROLES, "<|im_end|>", None, MPT_SYSTEM, "<image>\n"),
    "plain": ("PLAIN", ("", ""), "\n", None, "", "<image>"),
    "v0_plain": ("PLAIN", ("", ""), "\n", None, "", "<image>"),
}


def older_prompt(name: str, turns: list[tuple[str | None, str | None]], system: str | None = None) -> str:
    """The prompt of (question, answer) pairs; an answer of `None` is the open turn."""
    style, roles, sep, sep2, default, _ = OLDER[name]
    system = default if system is None else system
    messages = [(roles[i % 2], text) for i, text in enumerate(text for turn in turns for text in turn)]
    if style == "TWO":
        prompt = system + sep
        for i, (role, text) in enumerate(messages):
            prompt += f"{role}:" if text is None else f"{role}: {text}{(sep, sep2)[i % 2]}"
    elif style == "SINGLE":
        prompt = system + sep
        for role, text in messages:
            prompt += f"{role}:" if text is None else f"{role}: {text}{sep}"
    elif style == "MPT":
        prompt = f"<|im_start|>system\n{system}{sep}"
        for role, text in messages:
            prompt += role if text is None else role + text + sep
    elif style == "LLAMA_2":
        prompt = ""
        for i, (_, text) in enumerate(messages):
            if i == 0 and system:
                text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
            if text is not None:
                prompt += f" {text} {sep2}" if i % 2 else f"{sep}[INST] {text} [/INST]"
        prompt = prompt.removeprefix(sep)
    else:  # PLAIN: the picture and what it shows, closed by a newline
        prompt = system + "".join(f"{question}{'' if answer is None else answer + sep}" for question, answer in turns)
    return prompt


def conversation(turns: list[tuple[int, str, str | None]], system: str | None = None) -> list[dict]:
    """Messages made of parts, of (how many pictures, question, answer)."""
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for pictures, question, answer in turns:
        parts = [{"type": "image", "image": picture(number)} for number in range(pictures)]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


QUESTIONS = ("What is shown in this picture?", "And 'why', {{ so }}?\nSay.")
ANSWERS = ("A red bus.", "Two cars \\ {% a %}.")
TURNS = {
    "one": [(1, QUESTIONS[0], None)],
    "one without picture": [(0, QUESTIONS[0], None)],
    "two": [(1, QUESTIONS[0], ANSWERS[0]), (0, QUESTIONS[1], None)],
    "two without picture": [(0, QUESTIONS[1], ANSWERS[1]), (0, QUESTIONS[0], None)],
    "two answered": [(1, QUESTIONS[0], ANSWERS[0]), (1, QUESTIONS[1], ANSWERS[1])],
    "two pictures": [(2, QUESTIONS[0], None)],
}
SYSTEMS = (None, "You describe what you see.")


def rendered(tokenizer, template: str, messages: list[dict], **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)


@pytest.fixture(scope="module")
def tokenizer(parts):
    return AutoTokenizer.from_pretrained(parts.tokenizer())


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def older_conversation(name: str) -> Conversation:
    return conversation_for(name) if name in FAMILIES else conversation_for("llama", version=name)


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", OLDER)
def test_prompts_are_those_of_training(name, turns, tokenizer):
    template = older_conversation(name).chat_template
    image = OLDER[name][-1]
    older = [(image * count + question, answer) for count, question, answer in TURNS[turns]]
    is_open = older[-1][1] is None
    for system in SYSTEMS:
        messages = conversation(TURNS[turns], system)
        prompt = rendered(tokenizer, template, messages, add_generation_prompt=is_open)
        assert prompt == older_prompt(name, older, system)
        # Contents that are text render alike.
        flat = iter(older_text for turn in older for older_text in turn)
        texts = [{**message, "content": system if message["role"] == "system" else next(flat)} for message in messages]
        assert rendered(tokenizer, template, texts, add_generation_prompt=is_open) == prompt


def test_a_prompt_spelt_out(tokenizer):
    turns = [(1, "What is it?", "A bus."), (0, "Which colour?", None)]
    phi = rendered(tokenizer, conversation_for("phi").chat_template, conversation(turns), add_generation_prompt=True)
    assert phi == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A bus."
        "<|endoftext|>USER: Which colour? ASSISTANT:"
    )
    assert USER_SYSTEM == VICUNA_SYSTEM_TEXT


def test_every_family_has_its_own_conversation():
    stops = {family: conversation_for(family).stop for family in FAMILIES}
    assert stops == {
        "llama": "</s>",
        "mistral": "</s>",
        "openchat": "<|end_of_turn|>",
        "phi": "<|endoftext|>",
        "qwen": "<|endoftext|>",
        "qwen1_5": "<|endoftext|>",
        "stablelm": "<|endoftext|>",
        "minicpm": "</s>",
    }
    assert conversation_for("phi", version="v1") == conversation_for("llama")


def test_the_tokenizers_end_does_not_change_the_stop(tokenizer):
    messages = conversation([(0, "What?", "This.")])
    for family in FAMILIES:
        chosen = conversation_for(family)
        prompt = rendered(tokenizer, chosen.chat_template, messages)
        assert prompt.endswith(f"ASSISTANT: This.{chosen.stop}")


def test_the_vicuna_form_closes_answers_with_the_tokenizers_end_still(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style="gpt2"))
    messages = conversation([(1, "What?", "This.")])
    vicuna = rendered(tokenizer, VICUNA_CHAT_TEMPLATE, messages)
    assert vicuna == f"{USER_SYSTEM} USER: <image>\nWhat? ASSISTANT: This.<|endoftext|>"
    tokenizer.eos_token = None
    with pytest.raises(Exception, match="closes every answer with the eos_token"):
        rendered(tokenizer, VICUNA_CHAT_TEMPLATE, messages)


@pytest.mark.parametrize("name", OLDER)
def test_templates_are_complete_already(name):
    template = older_conversation(name).chat_template
    assert multimodal_chat_template(template) == template


@pytest.mark.parametrize("name", OLDER)
def test_answers_are_marked_for_training(name, tokenizer):
    chosen = older_conversation(name)
    encoded = tokenizer.apply_chat_template(
        conversation([(0, "What is it?", "A bus."), (0, "Which colour?", "Red.")]),
        chat_template=chosen.chat_template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    marked = [
        tokenizer.decode([token for token, _ in group])
        for is_marked, group in itertools.groupby(
            zip(encoded["input_ids"], encoded["assistant_masks"], strict=True), key=lambda pair: bool(pair[1])
        )
        if is_marked
    ]
    assert len(marked) == 2
    for text, answer in zip(marked, ("A bus.", "Red."), strict=True):
        assert answer in text and text.endswith(chosen.stop)
        assert not any(word in text for word in ("What", "colour", "ASSISTANT", "Assistant"))


@pytest.mark.parametrize("name", OLDER)
def test_roles_that_no_template_knows_are_refused(name, tokenizer):
    template = older_conversation(name).chat_template
    user = {"role": "user", "content": "What is it?"}
    with pytest.raises(Exception, match='has the role "tool"'):
        rendered(tokenizer, template, [user, {"role": "tool", "content": "x"}])
    with pytest.raises(Exception, match="Only the first message can be a system message"):
        rendered(tokenizer, template, [user, {"role": "system", "content": "x"}])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no family of older models 'gemma'; expected one of 'llama'"):
        conversation_for("gemma")
    with pytest.raises(ValueError, match="no older conversation 'phi2'; expected one of .*'phi'"):
        conversation_for("phi", version="phi2")
    for name in ("default", "v0", "simple", "llama_2"):
        with pytest.raises(ValueError, match=f"'{name}' is left out here"):
            conversation_for("llama", version=name)


# ---------------------------------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------------------------------

NUM_IMAGE_TOKENS = 3
STYLES = {"llama": "llama", "mistral": "llama", "openchat": "llama", "minicpm": "llama", "phi": "gpt2"}
STYLES |= {"stablelm": "gpt2", "qwen": "qwen2", "qwen1_5": "qwen2"}


BEGIN_OF_TEXT = ("llama", "mistral", "openchat", "minicpm")


def older_tokenizer(parts, family: str, legacy: bool | None = None):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style=STYLES[family]))
    prepare_legacy_tokenizer(tokenizer, family, legacy=legacy)
    if family == "openchat":
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|end_of_turn|>"]})
    return tokenizer


def older_ids(tokenizer, prompt: str, image_token_id: int) -> list[int]:
    """Each piece between pictures on its own; the beginning's token once, in front."""
    pieces = [tokenizer(piece).input_ids for piece in prompt.split("<image>")]
    begins = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [image_token_id] * NUM_IMAGE_TOKENS + piece[int(begins) :]
    return ids


def processor_of(tokenizer, template: str | None = None) -> MoellavaProcessor:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return MoellavaProcessor(image_processor, tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, chat_template=template)


def ids_of(
    parts, family: str, turns: list, legacy: bool, space_after_image: bool = False
) -> tuple[list[int], list[int]]:
    """The ids of the processor, and those of the pieces."""
    template = conversation_for(family).chat_template
    messages = conversation(turns)
    is_open = turns[-1][-1] is None
    processor = processor_of(older_tokenizer(parts, family, legacy))
    processor.space_after_image = space_after_image
    inputs = processor.apply_chat_template(
        messages,
        chat_template=template,
        add_generation_prompt=is_open,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokenizer = older_tokenizer(parts, family, legacy)
    prompt = rendered(tokenizer, template, messages, add_generation_prompt=is_open)
    return inputs["input_ids"][0].tolist(), older_ids(tokenizer, prompt, processor.image_token_id)


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_pieces(family, turns, parts):
    ids, expected = ids_of(parts, family, TURNS[turns], legacy=True)
    assert ids == expected
    begin = older_tokenizer(parts, family).bos_token_id
    assert (ids[0] == begin) == (family in BEGIN_OF_TEXT)
    # Elsewhere it is also the end of a text, if it is anything.
    assert family not in BEGIN_OF_TEXT or ids.count(begin) == 1


@pytest.mark.parametrize("turns", [turns for turns in TURNS if "without picture" in turns])
def test_ids_without_pictures_are_those_of_the_text(turns, parts):
    ids, expected = ids_of(parts, "llama", TURNS[turns], legacy=False)
    assert ids == expected


# The older code tokenizes the text behind a picture as a text of its own, with a space before it; a LLaMA tokenizer
# with legacy=False puts none behind a special token, so the processor does.
@pytest.mark.parametrize("turns", [turns for turns in TURNS if "without picture" not in turns])
def test_ids_behind_pictures_of_a_tokenizer_that_is_not_legacy(turns, parts):
    ids, expected = ids_of(parts, "llama", TURNS[turns], legacy=False, space_after_image=True)
    assert ids == expected


@pytest.mark.parametrize("legacy", [True, False])
def test_the_space_before_a_text_is_kept_when_it_is_saved(legacy, parts, tmp_path):
    text = "USER: What? ASSISTANT: This.</s>USER: Which one?"
    loaded = AutoTokenizer.from_pretrained(parts.tokenizer(), legacy=legacy)
    prepared = older_tokenizer(parts, "llama", legacy)
    ids = prepared(text).input_ids
    assert ids == loaded(text).input_ids
    # Behind </s> the text begins anew, with a space or without.
    pieces = [prepared(piece, add_special_tokens=False).input_ids for piece in text.split("</s>")]
    assert (ids == [prepared.bos_token_id, *pieces[0], prepared.eos_token_id, *pieces[1]]) == legacy
    prepared.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids
    processor_of(prepared).save_pretrained(tmp_path / "processor")
    assert AutoTokenizer.from_pretrained(tmp_path / "processor")(text).input_ids == ids


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_the_unknown_token(family, parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style=STYLES[family]))
    size = len(tokenizer)
    end = tokenizer.eos_token
    added = prepare_legacy_tokenizer(tokenizer, family)
    assert tokenizer.pad_token == tokenizer.unk_token
    assert tokenizer.eos_token == end
    assert added == (["<|extra_0|>"] if family in ("phi", "qwen", "qwen1_5") else [])
    assert len(tokenizer) == size + len(added)
    assert tokenizer.unk_token == (added[0] if added else "<unk>" if STYLES[family] == "llama" else "<|endoftext|>")
    # A tokenizer that is as the older code saves it stays as it is.
    assert prepare_legacy_tokenizer(tokenizer, family, vocab_size=len(tokenizer)) == []
    assert len(tokenizer) == size + len(added)


def test_stablelm_pads_with_its_first_register(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style="gpt2"))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reg0|>"]})
    assert prepare_legacy_tokenizer(tokenizer, "stablelm") == []
    assert tokenizer.pad_token == tokenizer.unk_token == "<|reg0|>"


def test_qwen_ends_at_the_end_of_text(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style="qwen2"))
    tokenizer.eos_token = "<|im_end|>"
    assert prepare_legacy_tokenizer(tokenizer, "qwen") == ["<|extra_0|>"]
    assert tokenizer.eos_token == "<|endoftext|>"


def test_a_token_without_a_row_is_refused(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style="gpt2"))
    before = (len(tokenizer), dict(tokenizer.special_tokens_map))
    with pytest.raises(ValueError, match=f"which makes {len(tokenizer) + 1} tokens, but the embedding has"):
        prepare_legacy_tokenizer(tokenizer, "phi", vocab_size=len(tokenizer))
    assert (len(tokenizer), dict(tokenizer.special_tokens_map)) == before
    assert prepare_legacy_tokenizer(tokenizer, "phi", vocab_size=len(tokenizer) + 1) == ["<|extra_0|>"]


def test_a_tokenizer_that_cannot_pad_is_refused(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer(style="gpt2"))
    tokenizer.unk_token = tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no unknown, pad or end token"):
        prepare_legacy_tokenizer(tokenizer, "stablelm")
    with pytest.raises(ValueError, match="no family of older models 'gemma'"):
        prepare_legacy_tokenizer(tokenizer, "gemma")


# ---------------------------------------------------------------------------------------------------------------------
# Stops
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stop_at_the_stop(family, parts):
    tokenizer = older_tokenizer(parts, family)
    ids = stop_token_ids(tokenizer, conversation_for(family))
    expected = [tokenizer.eos_token]
    if family == "openchat":
        expected.append("<|end_of_turn|>")
    assert [tokenizer.convert_ids_to_tokens(index) for index in ids] == expected


def test_a_stop_that_is_no_token_is_not_among_the_tokens(parts):
    llama = AutoTokenizer.from_pretrained(parts.tokenizer())
    plain = AutoTokenizer.from_pretrained(parts.tokenizer(style="gpt2"))
    end = [llama.eos_token_id]
    # Written as several tokens, or as one with a space before it, which nothing behind an answer is.
    assert stop_token_ids(llama, conversation_for("llama", version="llava_v0")) == end
    assert stop_token_ids(llama, Conversation("own", "", "a")) == end
    assert stop_token_ids(llama, conversation_for("phi")) == end
    newline = plain.encode("\n")
    assert len(newline) == 1
    assert stop_token_ids(plain, conversation_for("llama", version="plain")) == [plain.eos_token_id, *newline]
    llama.eos_token = None
    assert stop_token_ids(llama, conversation_for("phi")) == []
