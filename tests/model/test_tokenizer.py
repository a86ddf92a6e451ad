"""Tokenizers: exact round trips, the files that other programs load, and disagreements by name."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.policy import Policy
from oapl_jax.model.tokenizer import (
    check_tokenizer,
    load_tokenizer,
    make_character_tokenizer,
)

CHARACTERS = "0123456789+-*/()=<>,.:!?' \n\tabntxé→"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(directory):
    return make_character_tokenizer(CHARACTERS, directory)


def model(**changes) -> ModelConfig:
    config = {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
    }
    return ModelConfig.from_hf(config | changes, source="test")


@pytest.mark.parametrize(
    "text",
    [CHARACTERS, *CHARACTERS, "", "  ", " 1 , 2 .", "n 't !", "\n\n 1\t", "3,1,2<", "a" * 300],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ids_are_specials_then_characters_in_order(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.encode(CHARACTERS) == list(range(2, 2 + len(CHARACTERS)))
    assert len(tokenizer) == 2 + len(CHARACTERS)


def test_repeated_characters_count_once(tmp_path):
    characters = "".join(task.characters for task in TASKS.values())
    tokenizer = make_character_tokenizer(characters, tmp_path)
    assert len(tokenizer) == 2 + len(set(characters))
    assert tokenizer.decode(tokenizer.encode(characters)) == characters


def test_the_template_concatenates_contents(tokenizer):
    chat = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "1+2=3"
    ids = tokenizer.apply_chat_template(
        chat[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert ids == tokenizer.encode("1+2=")


def test_an_unknown_character_raises_instead_of_vanishing(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("1z2")


def test_other_programs_load_the_same(tokenizer, directory):
    text = "3 * (4+5) =\n27"
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = kind.from_pretrained(str(directory), local_files_only=True)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.eos_token_id == 1


def test_a_missing_tokenizer_is_named(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"no tokenizer in {place}"):
            load_tokenizer(place)


@pytest.mark.parametrize(
    ("attribute", "name"), [("chat_template", "chat_template"), ("eos_token", "eos_token_id")]
)
def test_an_unusable_tokenizer_is_named(tmp_path, attribute, name):
    tokenizer = make_character_tokenizer("01", tmp_path / "whole")
    setattr(tokenizer, attribute, None)
    tokenizer.save_pretrained(str(tmp_path / "less"))
    with pytest.raises(UserError, match=f"has no {name}"):
        load_tokenizer(tmp_path / "less")


def test_agreement(tokenizer):
    check_tokenizer(tokenizer, model(), source="model")
    check_tokenizer(tokenizer, model(vocab_size=len(tokenizer)), source="model")
    check_tokenizer(tokenizer, model(eos_token_id=[7, 1]), source="model")


def test_too_few_embeddings(tokenizer):
    size = len(tokenizer)
    with pytest.raises(UserError, match=f"has {size} tokens but vocab_size of here is {size - 1}"):
        check_tokenizer(tokenizer, model(vocab_size=size - 1), source="here")


@pytest.mark.parametrize("eos", [None, 2, [2, 3]])
def test_another_end_token(tokenizer, eos):
    with pytest.raises(UserError, match=r"token 1 \(<eos>\) but eos_token_id of here is"):
        check_tokenizer(tokenizer, model(eos_token_id=eos), source="here")


def test_stop_ids(tokenizer):
    assert Policy(model(eos_token_id=[9, 1]), tokenizer, None).stop_ids == (1, 9)
    assert Policy(model(eos_token_id=5), tokenizer, None).stop_ids == (1, 5)
