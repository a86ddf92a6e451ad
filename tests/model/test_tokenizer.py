"""Tokenizers: exact round trips, files that other programs load, checks against the model."""

import contextlib
import copy
import datetime
import json

import pytest
from etils import epath
from small_models import small_config
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oapl_jax.errors import UserError
from oapl_jax.model.policy import Policy, open_policy
from oapl_jax.model.tokenizer import (
    CONTENTS_ONLY,
    check_tokenizer,
    load_tokenizer,
    make_character_tokenizer,
    render_chat,
    template_time,
)

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


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_cut_tokenizer_is_named(tmp_path, file, left):
    make_character_tokenizer("01", tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(left * len(content))])
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_a_character_tokenizer_is_the_same_beside_any_model(tmp_path, model_type):
    make_character_tokenizer("abc 12", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(tmp_path)
    assert (len(tokenizer), tokenizer.eos_token_id) == (8, 1)
    assert tokenizer.decode(tokenizer.encode("a1 b")) == "a1 b"


# Chat templates


def save_with_template(directory, template):
    tokenizer = make_character_tokenizer("0123456789-", directory / "other")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(directory / "own"))
    return directory / "own"


GEMMA = (  # the roles of its family
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ message['content'] }}{% endfor %}"
)
DATED = "{{ strftime_now('%Y-%m-%d') }}" + CONTENTS_ONLY


@pytest.mark.parametrize(
    "template",
    [
        *("{{ raise_exception('never') }}", "{% if %}", "{{ none.of.these }}", "{{ 1 / 0 }}"),
        *("always the same", "", "{{ strftime_now('%Y') }}", "{{ messages[0]['role'] }}"),
        "{{ strftime_now('%H:%M:%S.%f') }}",  # differs from one moment to the next
        {"tool_use": CONTENTS_ONLY, "rag": CONTENTS_ONLY},
    ],
)
def test_a_template_without_a_prompt_for_a_users_message_is_refused(tmp_path, template):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(save_with_template(tmp_path, template))


@pytest.mark.parametrize(
    "template", [CONTENTS_ONLY, GEMMA, DATED, {"default": CONTENTS_ONLY, "tool_use": "x"}]
)
def test_a_template_with_a_prompt_for_a_users_message_is_loaded(tmp_path, template):
    tokenizer = load_tokenizer(save_with_template(tmp_path, template))
    prompt = render_chat(tokenizer, [{"role": "user", "content": "12"}], tokenize=False)
    assert prompt.endswith("12")


def test_the_date_of_a_template_is_that_of_the_first_start(tmp_path):
    source = save_with_template(tmp_path / "model", DATED)
    (source / "config.json").write_text(json.dumps(model(eos_token_id=1).to_hf(dtype="float32")))
    start = lambda: open_policy(
        epath.Path(tmp_path / "run"), path=str(source), architecture={}, characters=""
    )
    chat = [{"role": "user", "content": "7"}]
    first = start()
    assert abs(first.now - datetime.datetime.now()) < datetime.timedelta(minutes=9)
    (recorded,) = (tmp_path / "run").iterdir()
    recorded.write_text(json.dumps({"time": "2024-07-26T23:59:59"}))  # an older start
    again = start()
    assert again.now == datetime.datetime(2024, 7, 26, 23, 59, 59)
    tokens = render_chat(again.tokenizer, chat, tokenize=True, now=again.now)
    assert again.tokenizer.decode(tokens) == "2024-07-267"
    for damaged in ("", "{}", '{"time": "soon"}', '{"time": 7}'):
        recorded.write_text(damaged)
        with pytest.raises(UserError, match=recorded.name):
            start()


@pytest.mark.parametrize(
    "written", ["%d %b %Y", "%A, %B %-d", "%H:%M:%S", "%y%j", "%c | %x | %X", "100%", "", "%%"]
)
def test_a_fixed_time_is_written_as_by_python(tokenizer, written):
    now = datetime.datetime(2026, 3, 9, 4, 5, 6)
    with_time = copy.copy(tokenizer)
    given = (
        f"{{% set f = {written!r} %}}{{% if strftime_now is defined %}}{{{{ strftime_now(f) }}}}"
    )
    with_time.chat_template = given + "{% endif %}"
    said = render_chat(with_time, [{"role": "user", "content": ""}], tokenize=False, now=now)
    assert said == (now.strftime(written) if "%%" not in written else "%%")


@pytest.mark.parametrize(
    "beginning", ["", "\n", "\n\n", " ", "  {% if true %}", "\n  {% if true %}", "{{ '' }}\n"]
)
def test_a_fixed_time_changes_nothing_else(tokenizer, beginning):
    dated = copy.copy(tokenizer)
    dated.chat_template = beginning + "{% if true %}\n1{% endif %}{{ strftime_now('%%') }}"
    dated.chat_template += "{% endif %}" * beginning.count("{% if")
    chat, now = [{"role": "user", "content": ""}], datetime.datetime(2026, 3, 9)
    said = [render_chat(dated, chat, tokenize=False, now=time) for time in (None, now)]
    assert said[0].replace("%", "%%") == said[1]


def test_a_template_without_a_date_records_none(tokenizer, tmp_path):
    assert template_time(tokenizer, epath.Path(tmp_path / "time.json")) is None
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("of_model", "of_generation", "stop_ids"),
    [(1, [1, 5], (1, 5)), (5, [1, 7], (1, 5, 7)), ([1, 5], None, (1, 5)), (None, 1, (1,))],
)
def test_a_policy_stops_at_the_ids_of_all_three_files(
    tokenizer, tmp_path, of_model, of_generation, stop_ids
):
    source = tmp_path / "model"
    tokenizer.save_pretrained(str(source))
    content = {**model().to_hf(dtype="float32"), "eos_token_id": of_model}
    (source / "config.json").write_text(json.dumps(content))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": of_generation}))
    run = epath.Path(tmp_path / "run")
    opened = open_policy(run, path=str(source), architecture={}, characters="")
    assert opened.stop_ids == stop_ids
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    if of_model in (None, 5):
        with pytest.raises(UserError, match="eos_token_id"):
            open_policy(run, path=str(source), architecture={}, characters="")


def test_stop_ids_are_those_of_model_and_tokenizer(tokenizer):
    assert Policy(model(eos_token_id=[9, 1]), tokenizer, None).stop_ids == (1, 9)
    assert Policy(model(eos_token_id=5), tokenizer, None).stop_ids == (1, 5)
