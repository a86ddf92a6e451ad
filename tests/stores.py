"""Buffers and prompt streams for the tests of rollout/, and a wait for another thread."""

import time

from oapl_jax.config import BufferConfig
from oapl_jax.curriculum import Curriculum, PromptScorer
from oapl_jax.data.prompts import PromptStream, PromptTemplate
from oapl_jax.data.records import Record, user
from oapl_jax.rollout.buffer import Buffer, GroupStore
from oapl_jax.rollout.ledger import Ledger


def buffer_config(**changes) -> BufferConfig:
    values = dict(
        mode="clear_on_sync",
        max_age=100,
        max_reuse=1,
        capacity=16,
        zero_variance="keep",
        zero_variance_weight=0.1,
    )
    return BufferConfig(**values | changes)


def wait_until(condition, what="the condition", patience=30.0, *, every=0.005):
    until = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < until, f"{what} does not happen"
        time.sleep(every)


def uniform(stream) -> Curriculum:
    """The whole stream, in its order."""
    return Curriculum(stream, PromptScorer(), candidates=1, picks=1, top_p=0.5, seed=0)


def store_of_sums(
    tokenizer, ledger, *, group_size=1, on_end=None, on_group=lambda group: None, **buffer
) -> GroupStore:
    """A store whose prompts are seven sums; `ledger` is the path of its ledger."""
    records = [
        Record(f"id{i}", user(f"{i}+1="), str(i + 1), "chain_sum", {}) for i in range(10, 17)
    ]
    settings = dict(task="chain_sum", max_prompt_tokens=5, instruction="")
    template = PromptTemplate(tokenizer, **settings)
    stream = PromptStream(records, template, seed=0, host=0, hosts=1)
    ledger = Ledger(ledger)
    held = Buffer(buffer_config(**buffer), seed=0, on_end=on_end or ledger.end)
    return GroupStore(uniform(stream), held, ledger, None, group_size=group_size, on_group=on_group)
