"""The embedded sampler: what it draws, what it says about it, and how it takes a published version.

Weights come from the committed checkpoints (two layers, hidden size 32, 64 tokens), whose logits
are far from flat.
"""

import gc
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from scipy import stats
from scipy.special import softmax
from small_models import forward, golden_model, small_mesh

from oapl_jax.config import LearnerConfig
from oapl_jax.errors import RunError, UserError
from oapl_jax.learner import packing, train_step
from oapl_jax.model import hf
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.rollout import decoding
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.rollout.token_sampling import mask_top_k_top_p
from oapl_jax.structs import Group, Prompt
from oapl_jax.tracking.metrics import CompileClock
from oapl_jax.weights import publisher
from oapl_jax.weights.checkpoint import Weights

NAME = "qwen3_tied"
VOCAB = 64
STOPS = tuple(range(0, VOCAB, 8))
VERSION = 7


def new_sampler(name=NAME, **settings):
    config, params = golden_model(name)
    defaults = dict(dtype="float32", stop_ids=(), seed=0, max_sequences=16, prompt_multiple=4)
    defaults |= dict(max_prompt_tokens=9, tokens_per_round=3)
    mesh = settings.pop("mesh", small_mesh())
    sampler = LocalSampler(config, mesh, **{**defaults, **settings})
    sampler.set_params(VERSION, params)
    return sampler


def sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=8):
    return Sampling(temperature, top_p, top_k, max_response_tokens)


def make_prompt(draw, length, seed=None):
    rng = np.random.default_rng(draw if seed is None else seed)
    return Prompt(f"p{draw}", draw, rng.integers(0, VOCAB, length).astype(np.int32), "", "", "")


def prompts_of(*lengths):
    """Most tests take the default lengths, 4 samples and 8 tokens: one program serves them all."""
    lengths = lengths or (3, 9, 1, 6)
    return [make_prompt(draw, length) for draw, length in enumerate(lengths)]


def generate(sampler, prompts, n, sampling):
    """The rollouts of each prompt; the sampler yields them in the order of the prompts."""
    sampled = list(sampler.generate(iter(prompts), n=n, sampling=sampling))
    assert [s.prompt for s in sampled] == prompts
    assert all(s.server == "local" and s.seconds > 0 and s.attempts == () for s in sampled)
    return [s.rollouts for s in sampled]


def tokens_of(groups):
    return [[r.tokens.tolist() for r in rollouts] for rollouts in groups]


plain_forward = jax.jit(forward, static_argnums=0)


def plain_logits(sequences, width=24):
    padded = np.zeros((len(sequences), width), np.int32)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return np.asarray(plain_forward(*golden_model(NAME), padded), np.float64)


@pytest.mark.parametrize(
    ("name", "temperature", "top_p", "top_k", "mesh"),
    [
        ("qwen3_tied", 0.7, 1.0, 0, {}),
        ("llama_bias", 1.0, 0.8, 12, {}),
        ("qwen3_tied", 0.7, 1.0, 0, dict(data=2, fsdp=2, tensor=2)),
    ],
)
def test_log_probs_are_those_of_the_learners_packed_rows(name, temperature, top_p, top_k, mesh):
    """Over the whole vocabulary, whatever top-k and top-p leave to draw from."""
    sampler = new_sampler(name, stop_ids=STOPS, mesh=small_mesh(**mesh))
    prompts = prompts_of()
    sampled = generate(sampler, prompts, n=4, sampling=sampling(temperature, top_p, top_k))
    groups = [
        Group(prompt, tuple(rollouts), np.zeros(4, np.float32))
        for prompt, rollouts in zip(prompts, sampled, strict=True)
    ]
    layout = LearnerConfig(micro_batches=2, row_length=32, rows_multiple=1, logp_chunk=8)
    settings = dict(aggregation="sequence", max_prompt_tokens=24, max_response_tokens=8)
    batch = packing.build_batch(groups, bind("sft", {}), layout, step=VERSION, **settings)
    assert np.sum(batch.segments.max(axis=-1) > 1) > 2  # rows are shared
    assert not np.any(batch.lag)

    config, params = golden_model(name)
    model = Transformer(config, jnp.float32, "none")
    step = train_step.make_logp_step(model, small_mesh(), temperature=temperature, logp_chunk=8)
    assert batch.mask.sum() == sum(len(r.tokens) for g in groups for r in g.rollouts)
    np.testing.assert_allclose(step(params, batch), batch.behavior_logp, atol=1e-4, rtol=0)


def test_greedy_takes_the_best_token_of_the_plain_forward_pass():
    prompts = prompts_of()
    sampled = generate(new_sampler(), prompts, n=1, sampling=sampling(0.0))
    whole = [[*p.tokens, *rollouts[0].tokens] for p, rollouts in zip(prompts, sampled, strict=True)]
    scores = plain_logits(whole)
    for row, (prompt, (rollout,)) in enumerate(zip(prompts, sampled, strict=True)):
        assert (rollout.policy_version, rollout.finish_reason) == (VERSION, "length")
        assert (rollout.tokens.dtype, rollout.behavior_logp.dtype) == (np.int32, np.float32)
        start = len(prompt.tokens) - 1
        here = scores[row, start : start + 8]
        assert rollout.tokens.tolist() == here.argmax(-1).tolist()
        at_one = np.log([softmax(s).max() for s in here])
        np.testing.assert_allclose(rollout.behavior_logp, at_one, atol=1e-4)


def count_first_tokens(draws, **settings):
    """Counts of the first two tokens of many rollouts of one prompt, [V, V]."""
    prompts = [make_prompt(draw, 5, seed=1) for draw in range(draws)]
    sampler = new_sampler(max_sequences=64 * draws)
    sampled = generate(sampler, prompts, n=64, sampling=sampling(max_response_tokens=2, **settings))
    counts = np.zeros((VOCAB, VOCAB), int)
    for rollout in (r for rollouts in sampled for r in rollouts):
        counts[rollout.tokens[0], rollout.tokens[1]] += 1
    return prompts[0].tokens, counts


def chi_square(counts, probs):
    """p-value; tokens expected less than five times are one."""
    expected = probs * counts.sum()
    rare = expected < 5
    join = lambda x: np.append(x[~rare], x[rare].sum()) if rare.any() else x
    return stats.chisquare(join(counts), join(expected)).pvalue


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_tokens_follow_the_softmax_at_the_temperature(temperature):
    prompt, counts = count_first_tokens(128, temperature=temperature)
    scores = plain_logits([prompt])[0, len(prompt) - 1]
    first = counts.sum(axis=1)
    assert chi_square(first, softmax(scores / temperature)) > 0.01
    assert chi_square(first, softmax(scores / (1.2 * temperature))) < 1e-4

    common = int(first.argmax())  # the second token must not depend on how the first was drawn
    after = plain_logits([[*prompt, common]])[0, len(prompt)]
    assert first[common] > 500
    assert chi_square(counts[common], softmax(after / temperature)) > 0.01


def test_draws_cover_exactly_the_tokens_that_top_k_and_top_p_leave():
    prompt, counts = count_first_tokens(128, top_k=6, top_p=0.9)
    probs = softmax(plain_logits([prompt])[0, len(prompt) - 1])
    kept = reference(np.log(probs)[None], 0.9, 6)[0]
    assert 1 < kept.sum() < 6
    np.testing.assert_array_equal(counts.sum(axis=1) > 0, kept)
    assert chi_square(counts.sum(axis=1)[kept], probs[kept] / probs[kept].sum()) > 0.01


def reference(logp, top_p, top_k):
    """bool[N, V], token by token: a token stays if fewer than k are better, and if those better
    than it that are left hold less than top_p of what is left."""
    probs = np.exp(np.asarray(logp, np.float64))
    kept = np.ones(probs.shape, bool)
    for row, keep in zip(probs, kept, strict=True):
        if top_k:
            keep &= [np.sum(row > p) < top_k for p in row]
        if top_p is not None:
            left = np.where(keep, row, 0)
            keep &= [np.sum(left[left > p]) / left.sum() < top_p for p in row]
    return kept


def log(*probs):
    return np.log(np.array([probs]) / np.sum(probs))


RANDOM = np.random.default_rng(0).normal(size=(32, 40)) * 2
RANDOM -= np.log(np.exp(RANDOM).sum(axis=1, keepdims=True))
CASES = [
    RANDOM,
    np.repeat(RANDOM, 2, axis=1) - np.log(2),  # ties everywhere
    log(4, 3, 3, 3, 2, 1),  # ties at the border
    log(*[1] * 10),
    log(1, *[1e-30] * 9),
    log(*range(1, 11)),
    log(0.25, 0.75),
]


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.33, 0.9, 0.99999])
def test_masks_keep_what_an_independent_count_keeps(top_p, top_k):
    width = max(case.shape[1] for case in CASES)
    fill = lambda case: np.pad(case, ((0, 0), (0, width - case.shape[1])), constant_values=-np.inf)
    logp = np.concatenate([fill(case) for case in CASES]).astype(np.float32)
    found = np.asarray(mask_top_k_top_p(jnp.asarray(logp), top_p, top_k), np.float64)
    kept = np.isfinite(found)
    np.testing.assert_array_equal(kept, reference(logp, top_p, top_k) & np.isfinite(logp))
    assert kept[np.arange(len(logp)), logp.argmax(axis=1)].all()
    for row, keep, before in zip(found, kept, logp.astype(np.float64), strict=True):
        moved = row[keep] - before[keep]  # what is kept keeps its proportions
        np.testing.assert_allclose(moved, moved[0], atol=1e-5)


def test_a_stop_token_ends_a_response_and_belongs_to_it():
    prompts = prompts_of(*[3, 9, 1, 6] * 4)
    free = generate(new_sampler(), prompts, n=4, sampling=sampling())
    ended = generate(new_sampler(stop_ids=STOPS), prompts, n=4, sampling=sampling())
    seen = set()
    for whole, cut in zip(itertools.chain(*free), itertools.chain(*ended), strict=True):
        first = next((i for i, token in enumerate(whole.tokens) if token in STOPS), None)
        length = 8 if first is None else first + 1
        assert cut.tokens.tolist() == whole.tokens[:length].tolist()
        np.testing.assert_allclose(cut.behavior_logp, whole.behavior_logp[:length], rtol=2e-6)
        assert cut.finish_reason == ("length" if first is None else "stop")
        assert whole.finish_reason == "length"
        seen.add((cut.finish_reason, length))
    assert seen >= {("length", 8), ("stop", 8), ("stop", 1), ("stop", 4)}


def spy_on(monkeypatch, program):
    """Arguments and results of each call of one of the sampler's programs."""
    calls = []
    called = getattr(decoding, program)

    def spy(*arguments, **options):
        result = called(*arguments, **options)
        of_decode = jax.device_get(result[1:]) if program == "decode" else None
        calls.append((arguments, options, of_decode))
        return result

    monkeypatch.setattr(f"oapl_jax.rollout.local_sampler.{program}", spy)
    return calls


def test_a_round_ends_with_the_last_response(monkeypatch):
    """What the loop never wrote is still zero; a log-prob that it wrote is below."""
    decoded = spy_on(monkeypatch, "decode")
    long = sampling(max_response_tokens=4096)  # would take half a minute
    sampler = new_sampler(stop_ids=STOPS, tokens_per_round=4096)
    ((*rollouts,),) = generate(sampler, prompts_of(4), n=3, sampling=long)
    lengths = [len(rollout.tokens) for rollout in rollouts]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop"}
    assert min(lengths) < max(lengths) < 200
    ((_, _, (_, out_logp)),) = decoded
    np.testing.assert_array_equal(np.flatnonzero(out_logp.any(axis=0)), np.arange(max(lengths)))


def test_a_response_that_ends_frees_its_slot_for_the_next_one(monkeypatch):
    """With 8 slots and 64 responses, of which the longest has 40 tokens, as with one batch of 8
    after another: fewer tokens are decoded, and no slot is empty for longer than a round."""
    decoded = spy_on(monkeypatch, "decode")
    sampler = new_sampler(stop_ids=STOPS, max_sequences=8, tokens_per_round=4)
    prompts = prompts_of(*[3, 9, 1, 6] * 4)
    sampled = generate(sampler, prompts, n=4, sampling=sampling(max_response_tokens=40))
    lengths = np.array([len(r.tokens) for rollouts in sampled for r in rollouts])
    steps = sum(int((logp != 0).any(axis=0).sum()) for _, _, (_, logp) in decoded)
    batches = lengths.reshape(-1, 8).max(axis=1).sum()
    assert lengths.max() > 2 * lengths.mean()
    assert lengths.sum() / 8 <= steps < 0.75 * batches


@pytest.fixture(scope="module")
def expected():
    prompts = prompts_of(*[3, 9, 1, 6] * 4)
    sampler = new_sampler(stop_ids=STOPS, max_sequences=64)
    return prompts, generate(sampler, prompts, n=4, sampling=sampling())


@pytest.mark.parametrize(
    ("slots", "mesh", "settings"),
    [
        (1, {}, {}),
        (7, {}, dict(tokens_per_round=1)),
        (64, {}, dict(prompt_multiple=16, tokens_per_round=8)),
        (1, dict(data=8), {}),
        (7, dict(data=2, fsdp=2, tensor=2), {}),
        (64, dict(data=4, tensor=2), dict(max_prompt_tokens=16)),
    ],
)
def test_a_rollout_is_the_same_in_any_slot_and_on_any_mesh(expected, slots, mesh, settings):
    prompts, rollouts = expected
    mesh = small_mesh(**mesh)
    sampler = new_sampler(stop_ids=STOPS, max_sequences=slots, mesh=mesh, **settings)
    found = generate(sampler, prompts, n=4, sampling=sampling())
    assert tokens_of(found) == tokens_of(rollouts)
    for mine, theirs in zip(itertools.chain(*found), itertools.chain(*rollouts), strict=True):
        np.testing.assert_allclose(mine.behavior_logp, theirs.behavior_logp, atol=1e-5)
        assert mine.finish_reason == theirs.finish_reason
    # Beside others, and fewer of them:
    fewer = generate(sampler, [prompts[2], prompts[0]], n=2, sampling=sampling())
    assert tokens_of(fewer) == [tokens_of(rollouts)[i][:2] for i in (2, 0)]


def test_weights_and_cache_lie_where_the_mesh_has_them(monkeypatch):
    decoded = spy_on(monkeypatch, "decode")
    devices = jax.devices()[4:]
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=devices)
    sampler = new_sampler(dtype="bfloat16", mesh=mesh)
    generate(sampler, prompts_of(), n=4, sampling=sampling())
    (params, slots, *_), _, _ = decoded[0]
    assert {d for x in jax.tree.leaves((params, slots)) for d in x.sharding.device_set} == {
        *devices
    }
    query, (norm,) = params["layers"]["q"]["kernel"], params["final_norm"].values()
    assert (query.dtype, norm.dtype, slots.cache.key.dtype) == ("bfloat16", "float32", "bfloat16")
    part = lambda x: [a / b for a, b in zip(x.shape, x.sharding.shard_shape(x.shape), strict=True)]
    assert part(query) == [1, 2, 2]
    assert part(slots.cache.key) == [1, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("mesh", "setting"), [(dict(tensor=4), "rollout.mesh.tensor=4"), (dict(fsdp=3), "fsdp=3")]
)
def test_a_mesh_that_can_not_divide_the_model_is_refused(mesh, setting):
    with pytest.raises(UserError, match=re.escape(setting)):
        new_sampler(mesh=small_mesh(**mesh))


def test_stream_indices_samples_and_seeds_have_random_numbers_of_their_own():
    tokens = make_prompt(0, 9).tokens
    prompts = [Prompt("p", draw, tokens, "", "", "") for draw in range(4)]
    one = tokens_of(generate(new_sampler(), prompts, n=4, sampling=sampling()))
    other = tokens_of(generate(new_sampler(seed=1), prompts, n=4, sampling=sampling()))
    responses = [tuple(r) for groups in (one, other) for rollouts in groups for r in rollouts]
    assert len(set(responses)) == len(responses) == 32


@pytest.mark.parametrize(("prompts", "rows"), [(1, 4), (3, 16), (5, 32), (9, 35), (20, 35)])
def test_no_more_rows_are_decoded_than_a_power_of_two_needs(monkeypatch, prompts, rows):
    """Of a sequence of prompts; an iterator gets all slots."""
    decoded = spy_on(monkeypatch, "decode")
    sampler, short = new_sampler(max_sequences=35), sampling(max_response_tokens=1)
    sampled = list(sampler.generate(prompts_of(*[3] * prompts), n=4, sampling=short))
    assert [len(of_prompt.rollouts) for of_prompt in sampled] == [4] * prompts
    assert {len(tokens) for _, _, (tokens, _) in decoded} == {rows}


def publish(directory, version, name=NAME, scale=1.0):
    config, params = golden_model(name)
    weights = Weights(epath.Path(directory) / "weights", deadline=60.0)
    probe = {"tokens": [[1, 2]], "logp": [[-1.0]], "dtype": "float32"}
    weights.save(version, jax.tree.map(lambda x: x * scale, params), probe)
    weights.close()
    options = dict(tokenizer=mock.Mock(), dtype="float32", config_hash="")
    options |= dict(version=version, directory=epath.Path(directory))
    return publisher.publish(weights.path(version), config, **options)


def greedy(sampler):
    found = generate(sampler, prompts_of(), n=1, sampling=sampling(0.0))
    return [(r.tokens.tolist(), r.behavior_logp.tolist(), r.policy_version) for (r,) in found]


def test_refresh_takes_the_weights_of_a_published_version(tmp_path):
    sampler = new_sampler()
    held = greedy(sampler)
    sampler.refresh(20, publish(tmp_path, 20, scale=0.5))
    changed = greedy(sampler)
    assert (sampler.version, {version for _, _, version in changed}) == (20, {20})
    assert [c[0] for c in changed] != [h[0] for h in held]
    sampler.refresh(21, publish(tmp_path, 21))
    again = greedy(sampler)
    assert [a[:2] for a in again] == [h[:2] for h in held]  # to the last bit


def test_a_refresh_frees_the_version_before_unless_responses_go_on(tmp_path, monkeypatch):
    paths = {version: publish(tmp_path, version) for version in (20, 21)}
    sampler, load, seen = new_sampler(max_sequences=4), hf.load_params, []
    sampler.drop_params()

    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def spy(*arguments, **settings):
        seen.append(live())
        return load(*arguments, **settings)

    monkeypatch.setattr(hf, "load_params", spy)
    empty = live()
    sampler.refresh(20, paths[20])
    held = live()
    sampler.refresh(21, paths[21])
    assert held > empty
    assert (seen, live()) == ([empty, empty], held)
    stream = sampler.generate(prompts_of(), n=4, sampling=sampling())
    next(stream)
    before = live()
    sampler.refresh(20, paths[20])
    assert seen[2] == before > held


class Refreshing(list):
    """Prompts that refresh the sampler before the third."""

    def __init__(self, prompts, refresh):
        super().__init__(prompts)
        self._refresh = refresh

    def __iter__(self):
        for number, prompt in enumerate(super().__iter__()):
            if number == 2:
                self._refresh()
            yield prompt


def test_a_round_ends_early_for_responses_of_its_version_alone(tmp_path, monkeypatch):
    decoded = spy_on(monkeypatch, "decode")
    sampler, path = new_sampler(max_sequences=8), publish(tmp_path, 20, scale=0.5)
    prompts = Refreshing(prompts_of(*[3] * 5), lambda: sampler.refresh(20, path))
    found = [s.rollouts for s in sampler.generate(prompts, n=4, sampling=sampling())]
    assert [r.policy_version for r, *_ in found] == [VERSION] * 2 + [20] * 3
    first = decoded[0][0][0]  # parameters
    until = lambda of_first: {
        int(given[2]) for given, *_ in decoded if (given[0] is first) == of_first
    }
    assert until(True) == {0}  # the third prompt waits for all slots
    assert until(False) == {7, 0}


def test_the_cache_has_room_for_the_longest_prompt_whatever_a_call_has(monkeypatch):
    """So that decoding is compiled once."""
    decoded = spy_on(monkeypatch, "decode")
    sampler = new_sampler(max_prompt_tokens=12)
    for length in (1, 6, 12):
        list(sampler.generate(prompts_of(length), n=4, sampling=sampling()))
    assert {given[1].cache.key.shape[3] for given, *_ in decoded} == {12 + 8}


def test_endless_prompts_are_taken_as_there_is_room_and_may_refresh(tmp_path):
    """A group is of one version, the one that is held when its prompt has been taken."""
    sampler, taken = new_sampler(max_sequences=8), []
    path = publish(tmp_path, 20, scale=0.5)

    def prompts():
        for draw in itertools.count():
            if draw == 3:
                sampler.refresh(20, path)
            taken.append(draw)
            yield make_prompt(draw, 3)

    stream = sampler.generate(prompts(), n=4, sampling=sampling())
    versions = []
    for done, sampled in enumerate(itertools.islice(stream, 6), 1):
        assert len(taken) <= done + 2  # two in slots, and one that waits
        assert sampled.prompt.stream_index == done - 1
        versions += {r.policy_version for r in sampled.rollouts}
    assert (versions, sampler.versions()) == ([VERSION] * 3 + [20] * 3, {20})


def test_close_ends_generate():
    sampler = new_sampler(max_sequences=4)
    endless = (make_prompt(draw, 3) for draw in itertools.count())
    found = []
    for sampled in sampler.generate(endless, n=4, sampling=sampling()):
        found.append(sampled.prompt.stream_index)
        if len(found) == 3:
            sampler.close()
    assert found == [0, 1, 2]
    with pytest.raises(RunError, match="closed"):
        sampler.generate(prompts_of(), n=4, sampling=sampling())


def test_a_failure_of_the_prompts_is_raised():
    def prompts():
        yield make_prompt(0, 3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(new_sampler().generate(prompts(), n=4, sampling=sampling()))


# tests/weights has the damages.
@pytest.mark.parametrize(("name", "complete"), [(NAME, False), ("llama_bias", True)])
def test_a_version_that_can_not_serve_is_refused_and_the_old_one_serves_on(
    tmp_path, name, complete
):
    sampler = new_sampler()
    held = greedy(sampler)
    path = publish(tmp_path, 20, name=name, scale=0.5)
    if not complete:
        (path / publisher.COMMITTED).unlink()
    with pytest.raises(UserError, match=re.escape(str(path))):
        sampler.refresh(20, path)
    assert (sampler.version, greedy(sampler)) == (VERSION, held)


@pytest.mark.parametrize("mesh", [{}, dict(data=2, fsdp=2, tensor=2)])
def test_nothing_is_compiled_after_the_first_round(mesh):
    """Whatever lengths, temperatures, seeds and weights follow."""
    settings = dict(mesh=small_mesh(**mesh), stop_ids=STOPS, prompt_multiple=16)
    sampler, clock = new_sampler(**settings), CompileClock()
    draw = np.random.default_rng(0).integers(1, 10, (3, 24))
    generate(sampler, prompts_of(*draw[0]), n=2, sampling=sampling())
    compiled = clock.programs
    assert 0 < compiled < 40
    generate(sampler, prompts_of(*draw[1]), n=2, sampling=sampling(temperature=0.5))
    again = new_sampler(seed=1, **settings)
    generate(again, prompts_of(*draw[2]), n=2, sampling=sampling(temperature=1.5))
    assert clock.programs == compiled


def test_prompts_are_computed_at_the_width_of_their_bucket(monkeypatch):
    prefilled = spy_on(monkeypatch, "prefill")
    sampler = new_sampler(prompt_multiple=2, max_prompt_tokens=11)
    generate(sampler, prompts_of(1, 2, 3, 4, 5, 8, 9, 11), n=2, sampling=sampling())
    shapes = {tokens.shape[1]: int(np.sum(segments)) for (_, tokens, segments), _, _ in prefilled}
    assert shapes == {2: 1 + 2, 4: 3 + 4, 8: 5 + 8, 12: 9 + 11}
