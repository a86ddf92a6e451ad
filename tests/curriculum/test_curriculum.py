"""Curricula: the choice, pass rates, the curator's mathematics and network, exact resumption."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from small_models import assert_same, small_mesh

from configs import arithmetic
from oapl_jax.config import Config, CuratorConfig, DifficultyWindowConfig, PassRatesConfig
from oapl_jax.curriculum import CURRICULA, Curriculum
from oapl_jax.curriculum.curator import Curator, make_step, pad_prompts, surrogate, utility
from oapl_jax.curriculum.pass_rates import PassRates, learnability, window
from oapl_jax.curriculum.stream import choose, log_softmax, nucleus_size
from oapl_jax.data.prompts import PromptStream, PromptTemplate
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.train_step import init_params, init_state, new_state, state_shardings
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.model.transformer import Transformer
from oapl_jax.rollout.buffer import Buffer, GroupStore
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.weights.checkpoint import Checkpoints

CONFIG = Config.from_dict(arithmetic.get_config().to_dict())
SECTION = CONFIG.curriculum
ONE, EIGHT = (1, 1, 1, 1), (2, 2, 1, 2)  # data, fsdp, context, tensor
CANDIDATES, PICKS, ALL = 12, 4, set(range(1000))
pytestmark = pytest.mark.usefixtures("kept_programs")
SMALL = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, head_dim=8)


def test_a_nucleus_is_the_largest_set_within_its_mass():
    log_p = np.log([0.05, 0.5, 0.3, 0.15])
    masses = {0.4: 1, 0.5: 1, 0.79: 1, 0.81: 2, 0.94: 2, 0.96: 3}  # one even if it has more mass
    assert {top_p: nucleus_size(log_p, top_p) for top_p in masses} == masses


def test_samples_without_replacement_from_the_remaining_mass():
    """Compares with the exact probabilities of successive samples."""
    p, rng = np.array([0.5, 0.3, 0.15, 0.05]), np.random.default_rng(0)
    exact = {
        (i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        for i, j in itertools.combinations(range(4), 2)
    }
    found, tries = dict.fromkeys(exact, 0), 20000
    for _ in range(tries):
        chosen, by_p = choose(np.log(p), 2, top_p=0.96, rng=rng)
        assert by_p == 2
        found[tuple(chosen)] += 1
    for pair, probability in exact.items():
        sigma = np.sqrt(probability * (1 - probability) / tries)
        assert abs(found[pair] / tries - probability) < 4 * sigma, pair
    # With replacement, the best would be missing in (1 - 0.5)^2 of all pairs.
    assert sum(n for pair, n in found.items() if 0 not in pair) / tries < 0.2


def test_samples_beyond_the_nucleus_are_uniform():
    p, rng, tries = np.array([0.9, 0.06, 0.02, 0.01, 0.01]), np.random.default_rng(1), 8000
    counts = np.zeros(5)
    for _ in range(tries):
        chosen, by_p = choose(np.log(p), 3, top_p=0.92, rng=rng)
        assert (by_p, len(chosen)) == (1, 3)
        assert list(chosen) == sorted(set(chosen))
        counts[chosen] += 1
    # One by p, and two of the other four uniformly.
    share = p + (1 - p) * 0.5
    np.testing.assert_allclose(counts / tries, share, atol=4 * 0.5 / np.sqrt(tries))
    # All candidates can be chosen.
    chosen, by_p = choose(np.log([0.7, 0.2, 0.1]), 3, top_p=0.9, rng=np.random.default_rng(0))
    assert (list(chosen), by_p) == ([0, 1, 2], 2)


def group_of(name, rewards, stream_index=0):
    """A group with one token a response."""
    prompt = Prompt(name, stream_index, np.array([3, 4], np.int32), name, "", "chain_sum")
    one = Rollout(np.array([5], np.int32), np.array([-1.0], np.float32), 0, "stop")
    return Group(prompt, (one,) * len(rewards), np.array(rewards, np.float32))


def pass_rates():
    return PassRates(learnability, PassRatesConfig(decay=0.5, prior_rate=0.5, prior_count=2.0))


def test_pass_rates_decay_and_begin_at_the_prior():
    rates, again = pass_rates(), pass_rates()
    unseen, seen = group_of("a", [0]).prompt, group_of("b", [0]).prompt
    rates.ended(group_of("b", [1, 0, 0, 0]))
    rates.ended(group_of("b", [1, 1, 1, 0]))
    # n = 4 / 2 + 4, s = 1 / 2 + 3, with two responses of rate 1/2 before
    expected = [0.5, (3.5 + 1) / (6 + 2)]
    np.testing.assert_allclose(rates.rates([unseen, seen]), expected)
    np.testing.assert_allclose(np.exp(rates.logits([unseen, seen])), [0.25, 0.5625 * 0.4375])
    again.restore(json.loads(json.dumps(rates.state(set()))), None, None)
    np.testing.assert_array_equal(again.rates([unseen, seen]), expected)


def test_weights_of_window_and_learnability():
    config = DifficultyWindowConfig(low=0.2, high=0.8, outside=0.02)
    weights = np.exp(window(np.array([0.1, 0.2, 0.5, 0.8, 0.9]), config))
    np.testing.assert_allclose(weights, [0.02, 1, 1, 1, 0.02])
    # The variance of a reward that is 0 or 1.
    np.testing.assert_allclose(np.exp(learnability(np.array([0.5, 0.9]))), [0.25, 0.09])


@pytest.mark.parametrize("rewards", [[-1, 0], [0, 2]])
def test_rejects_rewards_that_are_no_pass_rates(rewards):
    with pytest.raises(UserError, match=r"prompt hard .* curriculum\.name"):
        pass_rates().ended(group_of("hard", rewards))


def test_utility_is_the_improvement_on_old_rollouts():
    """Compares with the definition in float64; the padding of the rows is not read."""
    rng = np.random.default_rng(3)
    lengths, reward = [1, 4, 2, 3], np.array([1, 0, 0, 1], np.float32)
    logp, behavior = rng.normal(size=(2, 4, 6)).astype(np.float32)
    logp[np.arange(6) >= np.array(lengths)[:, None]] = np.nan
    rollouts = tuple(
        Rollout(np.zeros(n, np.int32), row[:n], 0, "stop")
        for row, n in zip(behavior, lengths, strict=True)
    )
    group = Group(group_of("x", [0]).prompt, rollouts, reward)
    a = (reward - 0.5) / (np.std(reward, ddof=1, dtype=np.float64) + 1e-6)
    s = np.exp(np.nanmean(logp.astype(np.float64) - behavior, axis=1))
    assert utility(group, logp) == pytest.approx(np.mean(s * a), rel=1e-6)
    same = dataclasses.replace(group, reward=np.ones(4, np.float32))
    assert utility(same, logp) == 0


SETTINGS = dict(count=3, temperature=0.7, clip=0.2)


def loss_of(logits, log_p, u):
    return surrogate(*map(jnp.array, (logits, log_p, u)), **SETTINGS)[0]


def test_surrogate_equals_its_definition():
    rng, clipped = np.random.default_rng(0), []
    for _ in range(20):
        logits, old = rng.normal(size=(2, 6)) * 0.5
        u = np.where(rng.random(6) < 0.5, rng.normal(size=6), 0)
        found, metrics = surrogate(*map(jnp.array, (logits, log_softmax(old), u)), **SETTINGS)
        rho = np.exp(log_softmax(logits / 0.7) - log_softmax(old))
        expected = -np.minimum(rho * u, np.clip(rho, 0.8, 1.2) * u).sum() / 3
        assert float(found) == pytest.approx(expected, rel=2e-5, abs=1e-6)
        clipped.append(float(metrics["clip_fraction"]))
    assert 0 < np.nanmean(clipped) < 1  # both branches occur


def test_probabilities_of_an_unchanged_curator_have_one_normalizer():
    """Every ratio is 1, whatever constant the logits carry; candidates not sampled are lowered."""
    logits = np.random.default_rng(1).normal(size=8)
    log_p, u = log_softmax(logits / 0.7), np.array([1, -2, 0, 0, 0, 3, 0, 0.5])
    for shift in (0.0, 5.0):
        of = map(jnp.array, (logits + shift, log_p, u))
        loss, metrics = surrogate(*of, **SETTINGS)
        assert float(loss) == pytest.approx(-u.sum() / 3, rel=1e-5)
        assert float(metrics["clip_fraction"]) == 0
    found = jax.grad(loss_of)(jnp.array(logits), log_p, u)
    expected = (np.exp(log_p) * u.sum() - u) / (3 * 0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.all(found[np.array([2, 3, 4, 6])] > 0)  # descent lowers them


def test_clipped_prompts_and_missing_ones_have_no_gradient():
    logits, u = np.array([2.0, 0.0, 0.0, 9.0]), np.array([1.0, 0.0, 0.0, 0.0])
    log_p = np.array([*np.log([1 / 3] * 3), -np.inf])  # the fourth is no candidate
    value, gradient = jax.value_and_grad(loss_of)(jnp.array(logits), log_p, u)
    assert float(value) == pytest.approx(-1.2 / 3, rel=1e-5)
    np.testing.assert_array_equal(gradient, np.zeros(4))
    near = jax.grad(loss_of)(jnp.array([0.01, 0.0, 0.0, 9.0]), log_p, u)
    assert near[0] < 0
    assert near[3] == 0


@pytest.mark.parametrize("u", [[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
def test_the_loss_is_finite_when_a_probability_explodes(u):
    """A nearly impossible prompt is now certain: exp of the log-ratio overflows float32."""
    value, gradient = jax.value_and_grad(loss_of)(jnp.array([0.0, 1.0]), [0.0, -95.0], u)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer("0123456789+-=,", tmp_path_factory.mktemp("tokenizer"))


def prompts_of(tokenizer, size=40):
    records = [Record(f"id{i}", user(f"{i}+1="), "", "chain_sum", {}) for i in range(size)]
    template = PromptTemplate(tokenizer, task="chain_sum", max_prompt_tokens=6, instruction="")
    return PromptStream(records, template, seed=5, host=0, hosts=1)


POLICY = ModelConfig.from_hf({**CONFIG.model.architecture, "vocab_size": 16}, source="tests")


def curator_config(**changes) -> CuratorConfig:
    changes = {**dict(dormant=1, warmup=1, rows=4, passes=2), **changes}
    architecture = {**SECTION.curator.architecture, **SMALL}
    return dataclasses.replace(SECTION.curator, architecture=architecture, **changes)


def scorer_of(name, *, mesh=None, policy=POLICY, max_prompt_tokens=6, **curator):
    sections = dict(rates=SECTION.rates, window=SECTION.window, curator=curator_config(**curator))
    sizes = dict(max_prompt_tokens=max_prompt_tokens, num_steps=10)
    return CURRICULA[name](**sections, **sizes, policy=policy, mesh=mesh or small_mesh(), seed=3)


def curriculum_of(name, tokenizer, **curator):
    settings = dict(candidates=CANDIDATES, picks=PICKS, top_p=0.9, seed=5)
    return Curriculum(prompts_of(tokenizer), scorer_of(name, **curator), **settings)


def taken(stream, count):
    return [next(stream) for _ in range(count)]


def answered(prompt, rewards=(1, 0)):
    return dataclasses.replace(group_of(prompt.id, rewards), prompt=prompt)


def train_on(scorer, prompts, gain):
    """A gradient step on these prompts that adds `gain(prompt)` nats a token to right responses."""
    groups = [answered(prompt) for prompt in prompts]
    logp = np.concatenate([[[-1.0 + gain(p)], [-1.0]] for p in prompts]).astype(np.float32)
    for group in groups:
        scorer.ended(group)
    scorer.trained(groups, logp if scorer.rescores else None)


def indices(prompts):
    return [prompt.stream_index for prompt in prompts]


def test_uniform_is_the_stream_itself(tokenizer):
    curriculum, stream = curriculum_of("uniform", tokenizer), prompts_of(tokenizer)
    found, expected = taken(curriculum, 50), taken(stream, 50)
    assert [(p.id, p.stream_index) for p in found] == [(p.id, p.stream_index) for p in expected]
    assert curriculum.state()["stream"] == stream.state()
    assert curriculum.metrics() == {}


def test_chosen_prompts_keep_their_stream_indices(tokenizer):
    curriculum = curriculum_of("learnability", tokenizer)
    for round_ in range(5):
        chosen = taken(curriculum, PICKS)
        assert {index // CANDIDATES for index in indices(chosen)} == {round_}
        assert indices(chosen) == sorted(set(indices(chosen)))
        for prompt in chosen:
            assert curriculum.at(prompt.stream_index).id == prompt.id


def test_prompts_that_are_always_solved_are_sampled_less(tokenizer):
    for name in ("window", "learnability"):
        curriculum = curriculum_of(name, tokenizer)
        hard = lambda prompt: int(prompt.id[2:]) < 20
        counts = []
        for _ in range(60):
            chosen = taken(curriculum, PICKS)
            for prompt in chosen:
                rewards = [1, 0] if hard(prompt) else [1, 1]
                curriculum.scorer.ended(answered(prompt, rewards * 8))
            counts.append(np.mean([hard(prompt) for prompt in chosen]))
        assert 0.3 < np.mean(counts[:5]) < 0.75
        assert np.mean(counts[-20:]) > 0.8, name


@pytest.mark.parametrize("name", CURRICULA)
def test_resumes_bit_for_bit(tokenizer, name):
    """Saves within a round, with groups in flight; the original continues too."""
    curriculum = curriculum_of(name, tokenizer)
    useful = lambda prompt: 0.1 * (prompt.stream_index % 3 == 0)
    for _ in range(3):
        train_on(curriculum.scorer, taken(curriculum, PICKS), useful)
    in_flight = taken(curriculum, PICKS + 2)
    alive = set(indices(in_flight))
    saved = json.dumps([curriculum.state(), curriculum.scorer.state(alive)])
    arrays = jax.device_get(curriculum.scorer.arrays())

    again = curriculum_of(name, tokenizer)
    stream, scorer = json.loads(saved)
    again.restore(stream)
    again.scorer.restore(scorer, lambda abstract: jax.device_put(arrays), again.at)
    assert json.dumps([again.state(), again.scorer.state(alive)]) == saved
    for both in (curriculum, again):
        train_on(both.scorer, in_flight[1:], useful)
        both.scorer.ended(answered(in_flight[0], [1, 1]))
    for _ in range(3):
        chosen = [taken(both, PICKS) for both in (curriculum, again)]
        assert indices(chosen[0]) == indices(chosen[1])
        for both in (curriculum, again):
            train_on(both.scorer, chosen[0], useful)
    assert again.state() == curriculum.state()
    assert again.scorer.state(set()) == curriculum.scorer.state(set())
    assert again.metrics() == curriculum.metrics()
    assert_same(again.scorer.arrays(), curriculum.scorer.arrays())


def test_a_checkpoint_awaits_chosen_prompts_that_were_not_sampled_yet(tokenizer, tmp_path):
    """Of four chosen prompts one is in the buffer, one in flight, one failed, one not reserved."""
    curriculum = curriculum_of("actor_curator", tokenizer)
    train_on(curriculum.scorer, taken(curriculum, PICKS), lambda prompt: 0.1)  # it is awake
    ledger = Ledger(epath.Path(tmp_path / "ledger.jsonl"))
    buffer = Buffer(CONFIG.buffer, seed=0, on_end=ledger.end)
    store = GroupStore(curriculum, buffer, ledger, None, group_size=2, on_group=lambda group: None)
    held, in_flight, failed = (store.reserve() for _ in range(3))
    group = answered(held)
    store.commit(Sampled(held, group.rollouts, "", 0.0), group.reward)
    store.commit(Sampled(failed, (), "", 0.0), np.empty(0, np.float32))
    saved = store.snapshot(lambda: None)
    [(_, _, _, awaited)] = saved["scorer"]["rounds"]
    to_come = taken(curriculum, PICKS - 3)
    assert {index for index, _ in awaited} == {*indices([held, in_flight, *to_come])}


def parameters(curriculum):
    return jax.device_get(curriculum.scorer.arrays()["params"])


def moved(before, curriculum):
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, parameters(curriculum))
    return any(jax.tree.leaves(differ))


def test_the_learning_rate_decays_over_all_passes(tokenizer):
    """With 10 steps of the learner and 3 passes, the rate is 0 from the 30th step on."""
    optim = dataclasses.replace(FAST, final_fraction=0.0)
    curriculum = curriculum_of("actor_curator", tokenizer, dormant=0, passes=3, optim=optim)
    moves = []
    for _ in range(12):
        before = parameters(curriculum)
        train_on(curriculum.scorer, taken(curriculum, PICKS), lambda p: 0.1 * (p.stream_index % 2))
        moves.append(moved(before, curriculum))
    assert moves == [True] * 10 + [False] * 2


def test_phases_dormant_warmup_and_choosing(tokenizer):
    curriculum, stream = curriculum_of("actor_curator", tokenizer), prompts_of(tokenizer)
    useful = lambda prompt: 0.1 * (prompt.stream_index % 2)
    start = parameters(curriculum)

    assert not curriculum.scorer.awake
    sleeping = taken(curriculum, PICKS)
    assert indices(sleeping) == indices(taken(stream, PICKS))
    train_on(curriculum.scorer, sleeping, useful)
    assert not moved(start, curriculum)

    assert curriculum.scorer.awake
    warming = taken(curriculum, PICKS)
    assert curriculum.metrics()["curriculum/effective_share"] == pytest.approx(1)
    assert max(indices(warming)) >= PICKS
    train_on(curriculum.scorer, warming, useful)
    assert moved(start, curriculum)
    assert curriculum.metrics()["curriculum/steps"] == 2  # passes

    choosing = taken(curriculum, PICKS)
    assert curriculum.metrics()["curriculum/effective_share"] < 1
    train_on(curriculum.scorer, choosing, useful)
    assert curriculum.metrics()["curriculum/steps"] == 4


def test_only_sampled_groups_with_a_utility_move_the_curator(tokenizer):
    curriculum = curriculum_of("actor_curator", tokenizer)
    nothing, useful = (lambda prompt: 0.0), (lambda prompt: 0.1)
    train_on(curriculum.scorer, taken(curriculum, PICKS), nothing)
    start, waiting = parameters(curriculum), lambda: curriculum.scorer.state(ALL)["rounds"]
    chosen = taken(curriculum, PICKS)
    assert len(waiting()[0][0]) == CANDIDATES
    assert [index for index, _ in waiting()[0][3]] == indices(chosen)
    # A group with equal rewards is not awaited, and trains nothing.
    curriculum.scorer.ended(answered(chosen[0], [0, 0]))
    assert [index for index, _ in waiting()[0][3]] == indices(chosen[1:])
    train_on(curriculum.scorer, chosen[1:2], nothing)  # without utility
    assert not moved(start, curriculum)
    recorded = dataclasses.replace(chosen[2], stream_index=-1)
    train_on(curriculum.scorer, [recorded], useful)  # recorded
    assert not moved(start, curriculum)
    train_on(curriculum.scorer, chosen[2:3], useful)
    assert moved(start, curriculum)
    after = parameters(curriculum)
    train_on(curriculum.scorer, chosen[2:3], useful)  # replayed
    assert not moved(after, curriculum)
    # The last group was lost: it is not awaited once it is not alive.
    assert len(waiting()) == 1
    assert curriculum.scorer.state(set())["rounds"] == []


def test_a_curator_learns_which_prompts_are_useful(tokenizer):
    """A quarter is useful: prompts whose first digit is 1."""
    curriculum = curriculum_of("actor_curator", tokenizer, optim=FAST)
    first = lambda prompt: prompt.text.startswith("1")
    others = taken(prompts_of(tokenizer), 200)
    useful = np.array([first(prompt) for prompt in others])

    def probability_of_useful():
        # Exact, where the chosen prompts are a small sample.
        return np.exp(log_softmax(curriculum.scorer.logits(others)))[useful].sum()

    assert probability_of_useful() < 0.4
    for _ in range(40):
        train_on(curriculum.scorer, taken(curriculum, PICKS), lambda prompt: 0.05 * first(prompt))
    assert probability_of_useful() > 0.75


FAST = dataclasses.replace(SECTION.curator.optim, learning_rate=1e-2)
SIZES = ModelConfig.from_hf({**curator_config().architecture, "vocab_size": 16}, source="tests")
MODEL = Curator(SIZES, jnp.float32, "none")
OPTIMIZER = make_optimizer(**vars(FAST), num_steps=10)


def state_and_step(mesh):
    step = make_step(MODEL, OPTIMIZER, mesh, rows=8, temperature=1.0, clip=0.2)
    return init_state(MODEL, OPTIMIZER, mesh, 3), step


def a_round(tokenizer):
    prompts = taken(prompts_of(tokenizer), 8)
    tokens, segments = pad_prompts(prompts, width=6, rows=8)
    u = np.array([0.3, 0, 0, -0.1, 0, 0, 0.2, 0], np.float32)
    return tokens, segments, log_softmax(np.arange(8) / 5).astype(np.float32), u, 4


def three_steps(sizes, a_round):
    """State and metrics after three steps on a mesh; shardings do not change."""
    (state, step), metrics = state_and_step(mesh := small_mesh(*sizes)), {}
    kernel, (_, fsdp, _, tensor) = state.params["layers"]["q"]["kernel"], sizes
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16 // fsdp, 16 // tensor)
    for _ in range(3):
        state, metrics = step(state, *a_round)
    placed = state_shardings(MODEL, OPTIMIZER, mesh)
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, placed)
    assert all(jax.tree.leaves(same))
    return jax.device_get((state, metrics))


def test_eight_devices_give_the_curator_of_one(tokenizer):
    one = three_steps(ONE, a_round(tokenizer))
    assert np.abs(one[0].params["score"]).max() > 1e-3
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
    for sizes in (EIGHT, (1, 2, 2, 2)):
        jax.tree.map(close, three_steps(sizes, a_round(tokenizer)), one)


def test_a_curator_is_restored_on_another_mesh(tokenizer, tmp_path):
    first, second = (scorer_of("actor_curator", mesh=small_mesh(*s)) for s in (EIGHT, ONE))
    prompts = taken(prompts_of(tokenizer), 8)
    for _ in range(3):
        first.picked(prompts, log_softmax(np.zeros(8)), np.arange(4))
        train_on(first, prompts[:4], lambda prompt: 0.1 * prompt.stream_index)
    policy = Transformer(POLICY, jnp.float32, "none")
    state = new_state(jax.jit(functools.partial(init_params, policy))(jax.random.key(0)), OPTIMIZER)
    checkpoints = Checkpoints(epath.Path(tmp_path), deadline=60.0, keep=1)
    checkpoints.save(1, state, {}, b"", probe={}, curriculum=first.arrays())
    checkpoints.wait()
    saved = json.loads(json.dumps(first.state(ALL)))
    second.restore(saved, functools.partial(checkpoints.restore_curriculum, 1), None)
    assert_same(second.arrays(), first.arrays())
    assert second.arrays()["params"]["score"].sharding.mesh.size == 1
    np.testing.assert_allclose(second.logits(prompts), first.logits(prompts), atol=1e-5)
    assert np.ptp(first.logits(prompts)) > 1e-3
    checkpoints.close()


def test_non_finite_steps_change_nothing_and_are_counted(tokenizer):
    state, step = state_and_step(small_mesh())
    *prompts, u, count = a_round(tokenizer)
    after, metrics = step(state, *prompts, np.full_like(u, np.nan), count)
    assert int(metrics["skipped"]) == 1
    assert_same((after.params, after.opt_state), (state.params, state.opt_state))
    after, metrics = step(after, *prompts, u, count)
    assert int(metrics["skipped"]) == 1
    assert not np.array_equal(after.params["score"], state.params["score"])


def test_a_score_does_not_depend_on_the_other_prompts(tokenizer):
    curriculum = curriculum_of("actor_curator", tokenizer, dormant=0, warmup=0, optim=FAST)
    for _ in range(4):
        train_on(curriculum.scorer, taken(curriculum, PICKS), lambda p: 0.1 * (p.stream_index % 2))
    prompts = taken(prompts_of(tokenizer), 9)  # 3-digit and 2-digit numbers, so other lengths
    together = curriculum.scorer.logits(prompts)
    assert np.ptp(together) > 1e-2
    alone = [curriculum.scorer.logits([prompt])[0] for prompt in prompts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_curator_starts_from_a_checkpoint(tmp_path):
    """Its decoder has the checkpoint's parameters, its head zeros."""
    policy = dataclasses.replace(POLICY, tie_embeddings=False)
    make = functools.partial(init_params, Transformer(policy, jnp.float32, "none"))
    params = jax.jit(make)(jax.random.key(7))
    hf.save_params(params, policy, tmp_path, dtype="float32", max_shard_bytes=1 << 30)
    found = scorer_of("actor_curator", path=str(tmp_path)).arrays()["params"]
    expected = {k: v for k, v in params.items() if k != "head"}
    assert_same(found, {**expected, "score": jnp.zeros(POLICY.hidden_size)})


@pytest.mark.parametrize(
    "changes",
    [dict(policy=dataclasses.replace(POLICY, vocab_size=20)), dict(max_prompt_tokens=999)],
)
def test_rejects_a_curator_that_does_not_fit_the_policy(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps(POLICY.to_hf(dtype="float32")))
    with pytest.raises(UserError, match=r"curriculum\.curator\.path"):
        scorer_of("actor_curator", path=str(tmp_path), **changes)


MISTAKES = {
    "curriculum": dict(name="hard_first", candidates=31, top_p=0.0),
    "curriculum.rates": dict(decay=1.5, prior_rate=1.0, prior_count=0.0),
    "curriculum.window": dict(low=0.9, high=1.5, outside=0.0),
    "curriculum.curator": dict(temperature=0.0, clip=0.0, dormant=-1, warmup=-1, passes=0),
    "rollout": dict(source="dataset"),  # nothing is sampled
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [(f"{path}.{name}", x) for path, changes in MISTAKES.items() for name, x in changes.items()],
)
def test_rejects_settings_of_a_curriculum(setting, value):
    config = arithmetic.get_config()
    config.curriculum.name = "actor_curator"
    Config.from_dict(config.to_dict())
    config.rollout.dataset = "somewhere" if setting == "rollout.source" else ""
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        Config.from_dict(config.to_dict())
