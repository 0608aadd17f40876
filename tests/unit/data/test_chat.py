"""Token ids compared with what the tokenizer's own chat template renders."""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.data.chat import (
    closing_ids,
    completion_ids,
    conversation_ids,
    end_of_turn_ids,
    fix_date,
    printed_date,
    prompt_ids,
    prompt_text,
    with_system_prompt,
)
from align.errors import InputError
from align.records import Message, as_dicts
from align.training.models import set_separate_pad_token
from tests.tiny import END, START, build_tokenizer

TOKENIZER = build_tokenizer()
PROMPT = (Message("user", "Where is the cat?"), Message("assistant", "On the mat."), Message("user", "And the dog?"))


def whole_ids(conversation, **options):
    return TOKENIZER.apply_chat_template(as_dicts(conversation), tokenize=True, return_dict=False, **options)


def test_prompt_ids_equal_the_templates():
    assert prompt_ids(TOKENIZER, PROMPT) == whole_ids(PROMPT, add_generation_prompt=True)


def test_prompt_completion_and_closing_ids_make_up_the_templates_conversation():
    prompt, completion = conversation_ids(TOKENIZER, PROMPT, "In the garden.")
    whole = whole_ids((*PROMPT, Message("assistant", "In the garden.")))
    assert prompt + completion + list(closing_ids(TOKENIZER)) == whole
    assert completion[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(completion[:-1]) == "In the garden."


def test_completion_ids_agree_with_conversation_ids():
    assert conversation_ids(TOKENIZER, PROMPT, "In the garden.")[1] == completion_ids(TOKENIZER, "In the garden.")


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60).map(str.strip))
@settings(max_examples=60, deadline=None)
def test_any_text_without_outer_white_space_gets_the_templates_ids(text):
    prompt, completion = conversation_ids(TOKENIZER, PROMPT, text)
    whole = whole_ids((*PROMPT, Message("assistant", text)))
    assert prompt + completion + list(closing_ids(TOKENIZER)) == whole


def test_a_turn_ends_with_the_eos_token_and_closes_with_a_newline():
    assert end_of_turn_ids(TOKENIZER) == (TOKENIZER.eos_token_id,)
    assert TOKENIZER.decode(list(closing_ids(TOKENIZER))) == "\n"


def test_the_system_prompt_comes_first_unless_the_conversation_has_one():
    own = (Message("system", "Be kind."), *PROMPT)
    assert with_system_prompt(PROMPT, "Be brief.") == (Message("system", "Be brief."), *PROMPT)
    assert with_system_prompt(own, "Be brief.") == own
    assert with_system_prompt(PROMPT, None) == PROMPT
    text = TOKENIZER.decode(prompt_ids(TOKENIZER, PROMPT, "Be brief."))
    assert text.startswith(f"{START}system\nBe brief.{END}\n{START}user\n")


def test_the_prefill_starts_the_assistants_turn():
    text = TOKENIZER.decode(prompt_ids(TOKENIZER, PROMPT, prefill="The letter is ("))
    assert text.endswith(f"{START}assistant\nThe letter is (")


def with_template(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>' }}{% endif %}"
    )
    with pytest.raises(InputError, match="does not start with the prompt"):
        conversation_ids(tokenizer, PROMPT, "In the garden.")


def test_a_template_without_a_token_that_ends_the_turn_is_refused():
    tokenizer = with_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(InputError, match="eos_token"):
        completion_ids(tokenizer, "In the garden.")


def test_the_error_names_the_roles_that_the_template_refuses():
    tokenizer = with_template("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match=r"user, assistant, user.*no system role"):
        prompt_ids(tokenizer, PROMPT)


def test_a_template_that_trims_gives_the_trimmed_completion():
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert conversation_ids(tokenizer, PROMPT, "  In the garden. ")[1] == completion_ids(tokenizer, "In the garden.")


def with_unnamed_end(names):
    """A tokenizer whose turns end with a token that is special in its file, and that it does not name (Gemma, Phi)."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine.train_from_iterator([], trainers.BpeTrainer(special_tokens=names, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=names[0], pad_token=names[0])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    return tokenizer


def test_a_turn_may_end_with_a_special_token_that_the_tokenizer_does_not_name():
    tokenizer = with_unnamed_end(["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert end_of_turn_ids(tokenizer) == (end,)
    assert closing_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("more", "expected"), [(["<|user|>", "<|spare|>"], "<|spare|>"), (["<|my_pad|>"], "<|my_pad|>")]
)
def test_padding_takes_a_special_token_that_ends_no_turn(more, expected):
    tokenizer = set_separate_pad_token(with_unnamed_end(["<|endoftext|>", "<|end|>", "<|assistant|>", *more]))
    assert tokenizer.pad_token == expected


def test_a_template_prints_the_fixed_date_and_otherwise_todays():
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + TOKENIZER.chat_template)
    try:
        fix_date(date(2001, 2, 3))
        assert prompt_text(tokenizer, PROMPT).startswith("03 Feb 2001")
        assert (printed_date(tokenizer), printed_date(TOKENIZER)) == ("2001-02-03", "")
    finally:
        fix_date(None)
    assert prompt_text(tokenizer, PROMPT).startswith(date.today().strftime("%d %b %Y"))
    assert printed_date(tokenizer) == ""
