"""Tokenizers: exact round trips, files that other programs load, checks against the model."""

import contextlib

import pytest
from small_models import small_config
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oapl_jax.errors import UserError
from oapl_jax.model.policy import Policy
from oapl_jax.model.tokenizer import check_tokenizer, load_tokenizer, make_character_tokenizer

CHARACTERS = "0123456789+-*/()=<>,.:!?' \n\tabntxé→"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Repeated characters count once."""
    return make_character_tokenizer(2 * CHARACTERS, tmp_path_factory.mktemp("tokenizer"))


def model(**changes):
    return small_config(**{"vocab_size": 64, "eos_token_id": 1, **changes})


@pytest.mark.parametrize(
    "text", [CHARACTERS, "", "  ", " 1 , 2 .", "n 't !", "\n\n 1\t", "3,1,2<", "a" * 300]
)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ids_are_specials_then_characters_in_order_and_others_raise(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.encode(CHARACTERS) == list(range(2, 2 + len(CHARACTERS)))
    assert len(tokenizer) == 2 + len(CHARACTERS)
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("1z2")


def test_other_programs_load_the_same_with_its_template(tokenizer):
    chat = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "1+2=3"
    text = "3 * (4+5) =\n27"
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = kind.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.eos_token_id == 1


def test_a_missing_or_incomplete_tokenizer_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(place)):
            load_tokenizer(place)
    for attribute in ("chat_template", "eos_token"):
        tokenizer = make_character_tokenizer("01", tmp_path / "whole")
        setattr(tokenizer, attribute, None)
        tokenizer.save_pretrained(str(tmp_path / "less"))
        with pytest.raises(UserError, match=f"less has no {attribute}"):
            load_tokenizer(tmp_path / "less")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (dict(vocab_size=2 + len(CHARACTERS)), None),
        (dict(eos_token_id=[7, 1]), None),
        (dict(vocab_size=1 + len(CHARACTERS)), "vocab_size of here"),
        *((dict(eos_token_id=eos), "eos_token_id of here") for eos in (None, 2, [2, 3])),
    ],
)
def test_tokenizer_and_model_must_agree(tokenizer, changes, error):
    with pytest.raises(UserError, match=error) if error else contextlib.nullcontext():
        check_tokenizer(tokenizer, model(**changes), source="here")


def test_stop_ids_are_those_of_model_and_tokenizer(tokenizer):
    assert Policy(model(eos_token_id=[9, 1]), tokenizer, None).stop_ids == (1, 9)
    assert Policy(model(eos_token_id=5), tokenizer, None).stop_ids == (1, 5)
