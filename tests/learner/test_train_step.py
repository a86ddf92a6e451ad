"""The learner's step against a plain one: whole log_softmax, one sequence a row, AdamW in numpy."""

import functools
import os
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import OPTIM, assert_same, forward, small_config, small_mesh

from oapl_jax.config import LearnerConfig
from oapl_jax.learner import train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.packing import build_batch, to_mesh
from oapl_jax.model.sharding import parameter_shardings
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import Objective, bind
from oapl_jax.structs import Group, Prompt, Rollout

EOS = 2
TEMPERATURE = 0.7
BETA1, BETA2 = 0.5, 0.1
OAPL = bind("oapl", dict(beta1=BETA1, beta2=BETA2))
ONE = (1, 1, 1, 1)
SIZES = dict(attention_bias=True, vocab_size=64, intermediate_size=48, rope_theta=100.0)
CONFIG = small_config("qwen3", **SIZES)
MODEL, OPTIMIZER = Transformer(CONFIG, jnp.float32, "none"), make_optimizer(**OPTIM)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


@functools.cache
def parameters():
    """Numpy parameters with every leaf at work: norms off 1 and biases off 0."""
    shapes = jax.eval_shape(functools.partial(train_step.init_params, MODEL), jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + rng.normal(0, 0.2, leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


# Prompts of 9 or more tokens and responses of 1 to 8: two sequences never fit a row of 19, and
# three or four fit one of 64.
LENGTHS = np.array([[8, 3, 5, 1], [2, 7, 4, 6], [8, 1, 2, 8], [3, 5, 1, 4]])
REWARD = np.array([[1, 0, 0, 1], [0, 0, 1, 0], [0.5, -1, 1, 0], [1, 1, 1, 1]], np.float32)
LONGEST = 8


@functools.cache
def groups():
    """Four groups of four ragged responses that end in EOS, from a policy near the learner's."""
    rng = np.random.default_rng(1)
    out = []
    for draw, lengths in enumerate(LENGTHS):
        tokens = rng.integers(3, 64, 9 + draw % 3).astype(np.int32)
        prompt = Prompt(id=str(draw), stream_index=draw, tokens=tokens, text="", answer="", task="")
        rollouts = []
        for n in lengths:
            response = np.append(rng.integers(3, 64, n - 1), EOS).astype(np.int32)
            logp = plain_logp(prompt.tokens, response, TEMPERATURE)[0]
            noise = rng.normal(0, 0.3, n)
            rollouts.append(Rollout(response, (logp + noise).astype(np.float32), 5, "stop"))
        out.append(Group(prompt, tuple(rollouts), REWARD[draw]))
    return out


def sequences():
    return [(g.prompt.tokens, r) for g in groups() for r in g.rollouts]


@jax.jit
def whole_log_softmax(params, tokens, temperature):
    """One sequence a row. Causal: what pads the end of a row is seen by no response token."""
    return jax.nn.log_softmax(forward(CONFIG, params, tokens) / temperature)


def plain_logp(prompt, response, temperature):
    """(log-probability, entropy) of each response token, for one sequence alone, in float64."""
    length = len(prompt) + len(response)
    tokens = np.zeros((1, 19), np.int32)
    tokens[0, :length] = [*prompt, *response]
    table = np.asarray(whole_log_softmax(parameters(), tokens, temperature), np.float64)[0]
    table = table[len(prompt) - 1 : length - 1]  # the state before a token predicts it
    return table[np.arange(len(response)), response], -np.sum(np.exp(table) * table, axis=-1)


@functools.cache
def plain_logps(temperature=TEMPERATURE):
    """`plain_logp` of every response, two arrays [S, C] that are 0 behind its end."""
    found = np.zeros((2, 16, LONGEST))
    for i, (prompt, rollout) in enumerate(sequences()):
        found[:, i, : len(rollout.tokens)] = plain_logp(prompt, rollout.tokens, temperature)
    return found


def oapl_advantages():
    rewards = REWARD.astype(np.float64)
    baseline = BETA1 * np.log(np.mean(np.exp(rewards / BETA1), axis=-1, keepdims=True))
    return (rewards - baseline).reshape(-1)


def batch_of(*, micro_batches=2, row_length=24, rows_multiple=8, aggregation="sequence", step=9):
    """Two micro-batches of eight rows, the second one not full: one shape for most tests, and work
    for eight devices."""
    layout = dict(micro_batches=micro_batches, row_length=row_length, rows_multiple=rows_multiple)
    lengths = dict(max_prompt_tokens=11, max_response_tokens=LONGEST, constant_length=10)
    layout = LearnerConfig(**layout, logp_chunk=5)
    return build_batch(groups(), OAPL, layout, aggregation=aggregation, step=step, **lengths)


@functools.cache
def compiled(sizes=ONE, objective=OAPL, kl_weight=0.0, ess_power=0.0, to_reference=False):
    """A learner on a mesh: `start()` gives its first state, `step` and `logp` are its programs."""
    mesh = small_mesh(*sizes)
    scoring: dict[str, Any] = dict(temperature=TEMPERATURE, logp_chunk=5)  # of 24 tokens of a row
    choices = dict(kl_weight=kl_weight, ess_power=ess_power, to_reference=to_reference)
    choices["return_logp"] = True
    shardings = train_step.batch_shardings(mesh)
    first = train_step.init_state(MODEL, OPTIMIZER, mesh, parameters())
    return types.SimpleNamespace(
        start=lambda: jax.tree.map(jnp.copy, first),
        step=train_step.make_train_step(MODEL, objective, OPTIMIZER, mesh, **scoring, **choices),
        logp=train_step.make_logp_step(MODEL, mesh, **scoring),
        put=lambda batch: to_mesh(batch, shardings),
        mesh=mesh,
    )


def one_step(batch, **choices):
    """(state, scalar metrics) on the host after a step from the first state."""
    run = compiled(**choices)
    state, metrics = jax.device_get(run.step(run.start(), run.put(batch)))
    del metrics["responses"]
    return state, metrics


@functools.cache
def expected_step():
    """After one step on one device: what other layouts of the same batch must equal."""
    return one_step(batch_of())


def assert_same_step(found, expected, atol=1e-6):
    """Parameters, moments, loss and every metric agree."""
    (state, metrics), (expected_state, expected_metrics) = found, expected
    jax.tree.map(functools.partial(close, atol=atol, rtol=1e-7), state, expected_state)
    assert metrics.keys() == expected_metrics.keys()
    for key in metrics.keys() - {"padding"}:  # it is of the layout
        equal = functools.partial(close, rtol=1e-4, atol=1e-5, err_msg=key)
        jax.tree.map(equal, metrics[key], expected_metrics[key])


@jax.jit
@jax.value_and_grad
def plain_gradient(params, tokens, response, behavior_logp, advantages, weights):
    """`response` is 1 where the token is part of a response; one sequence a row."""
    table = whole_log_softmax(params, tokens, TEMPERATURE)
    logp = jnp.take_along_axis(table[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    log_ratio = jnp.sum((logp - behavior_logp[:, 1:]) * response[:, 1:], axis=-1)
    return jnp.sum(weights * (BETA2 * log_ratio - advantages) ** 2)


def plain_loss_and_gradient(params, weights):
    tokens = np.zeros((16, 19), np.int32)
    response, behavior = np.zeros((2, 16, 19), np.float32)
    for i, (prompt, rollout) in enumerate(sequences()):
        start, end = len(prompt), len(prompt) + len(rollout.tokens)
        tokens[i, :start], tokens[i, start:end] = prompt, rollout.tokens
        response[i, start:end], behavior[i, start:end] = 1, rollout.behavior_logp
    given = tokens, response, behavior, oapl_advantages(), weights
    loss, gradient = plain_gradient(params, *given)
    return float(loss), jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)


def adamw(params, gradients):
    """Parameters after steps with these gradients, in float64, from the formulas."""
    o = types.SimpleNamespace(**OPTIM)
    mean = variance = jax.tree.map(lambda x: np.zeros(x.shape), params)
    for t, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
        clipped = jax.tree.map(lambda g, n=norm: g * min(1, o.max_grad_norm / n), gradient)
        mean = jax.tree.map(lambda m, g: o.b1 * m + (1 - o.b1) * g, mean, clipped)
        variance = jax.tree.map(lambda v, g: o.b2 * v + (1 - o.b2) * g**2, variance, clipped)
        cosine = (1 + np.cos(np.pi * (t - 1) / o.num_steps)) / 2
        rate = o.learning_rate * (o.final_fraction + (1 - o.final_fraction) * cosine)

        def update(p, m, v, t=t, rate=rate):
            step = (m / (1 - o.b1**t)) / (np.sqrt(v / (1 - o.b2**t)) + o.eps)
            return p - rate * (step + o.weight_decay * p)

        params = jax.tree.map(update, params, mean, variance)
    return params


def test_golden_steps():
    """Loss, gradient norm and parameters of two steps equal those of the plain computation."""
    weights = np.full(16, 1 / 16)
    run, params = compiled(), parameters()
    state, gradients = run.start(), []
    for step in range(2):
        loss, gradient = plain_loss_and_gradient(params, weights)
        gradients.append(gradient)
        params = adamw(parameters(), gradients)
        state, metrics = run.step(state, run.put(batch_of(step=step)))
        close(metrics["loss"], loss)
        close(metrics["grad_norm"], optax.tree.norm(gradient))
        assert metrics["grad_norm"] > OPTIM["max_grad_norm"]  # the clip is at work
        assert state.step == step + 1
        jax.tree.map(functools.partial(close, atol=1e-6, rtol=0), state.params, params)
        params = jax.tree.map(np.float32, params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, parameters())
    assert min(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.parametrize("aggregation", ["token", "sequence_token", "constant"])
def test_the_gradient_is_that_of_the_aggregated_loss(aggregation):
    lengths = LENGTHS.reshape(-1)
    weights = {
        "token": np.full(16, 1 / lengths.sum()),
        "sequence_token": 1 / (16 * lengths),
        "constant": np.full(16, 1 / (16 * 10)),
    }[aggregation]
    loss, gradient = plain_loss_and_gradient(parameters(), weights)
    _, metrics = one_step(batch_of(aggregation=aggregation))
    close(metrics["loss"], loss)
    close(metrics["grad_norm"], optax.tree.norm(gradient))


def test_metrics_equal_those_computed_sequence_by_sequence():
    batch, reward, advantages = batch_of(), REWARD.reshape(-1), oapl_advantages()
    logp, entropy = plain_logps()
    gap, mean = logp - batch.behavior_logp, lambda x: np.mean(x.sum(-1) / batch.mask.sum(-1))
    log_ratio, target = gap.sum(-1), advantages / BETA2
    residual = BETA2 * log_ratio - advantages
    expected = {
        "loss": np.mean(residual**2),
        "kl": mean(np.exp(gap) - 1 - gap),
        "entropy": mean(entropy),
        "log_ratio/slope": np.linalg.lstsq(target[:, None], log_ratio, rcond=None)[0][0],
        "target_log_ratio": np.mean(target),
        "ess": np.sum(np.exp(log_ratio)) ** 2 / np.sum(np.exp(2 * log_ratio)) / 16,
        "padding": np.mean(batch.segments == 0),
        "skipped": 0,
        "skipped_in_a_row": 0,
    }
    for name, values in {"log_ratio": log_ratio, "residual": residual}.items():
        expected[name] = np.mean(values)
        for side, where in {"right": reward > 0, "wrong": reward <= 0}.items():
            expected[f"{name}/{side}"] = np.mean(values[where])
            expected[f"{name}/{side}_std"] = np.std(values[where])
    _, metrics = expected_step()
    assert metrics.keys() == {*expected, "grad_norm"}
    for key, value in expected.items():
        close(metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_responses_have_the_values_of_which_the_metrics_are_means():
    """In the order of the batch, whatever micro-batch computed them; log-probs before the step."""
    run, batch = compiled(), batch_of(step=9)
    state = run.start()
    _, metrics = jax.device_get(run.step(state, run.put(batch)))
    responses = metrics["responses"]
    close(responses["logp"], plain_logps()[0], rtol=1e-7, atol=1e-5)
    log_ratio = np.sum((plain_logps()[0] - batch.behavior_logp) * batch.mask, axis=-1)
    close(responses["log_ratio"], log_ratio, rtol=1e-4, atol=1e-5)
    close(responses["target"], oapl_advantages() / BETA2, rtol=1e-4, atol=1e-6)
    residual = BETA2 * log_ratio - oapl_advantages()
    close(responses["residual"], residual, rtol=1e-4, atol=1e-5)


def test_log_probs_leave_the_step_on_request_only():
    run, batch = compiled(), batch_of()
    choices = dict(kl_weight=0.0, ess_power=0.0, to_reference=False)
    scoring = dict(temperature=TEMPERATURE, logp_chunk=5)
    step = train_step.make_train_step(MODEL, OAPL, OPTIMIZER, run.mesh, **scoring, **choices)
    shapes = jax.eval_shape(step, run.start(), run.put(batch))[1]["responses"]
    assert {name: value.shape for name, value in shapes.items()} == dict.fromkeys(
        ("log_ratio", "residual", "target"), batch.mask.shape[:1]
    )


def test_metrics_of_an_empty_set_are_not_a_number_rather_than_zero():
    """All rewards above 0, all advantages 0: nothing is wrong, and there is no slope."""
    batch = batch_of()
    batch = replace(batch, reward=np.ones_like(batch.reward), advantage=0 * batch.advantage)
    _, metrics = one_step(batch)
    empty = {key for key, value in metrics.items() if np.isnan(value)}
    sides = {f"{name}/wrong{end}" for name in ("residual", "log_ratio") for end in ("", "_std")}
    assert empty == {*sides, "log_ratio/slope"}


def test_a_stale_batch_shortens_the_step_and_nothing_else():
    (state, metrics), (plain, expected) = one_step(batch_of(), ess_power=0.5), expected_step()
    assert 0.1 < expected["ess"] < 0.9
    assert metrics == expected
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, plain.opt_state)
    move = lambda new: jax.tree.map(np.subtract, new.params, parameters())
    shorter = jax.tree.map(lambda x: x * np.sqrt(expected["ess"]), move(plain))
    jax.tree.map(functools.partial(close, atol=2e-7, rtol=1e-3), move(state), shorter)


def test_a_reference_adds_its_kl_to_the_loss_and_to_the_gradient():
    batch = batch_of()
    reference = (batch.behavior_logp - 0.1) * batch.mask
    _, metrics = one_step(replace(batch, reference_logp=reference), kl_weight=0.3)
    _, expected = expected_step()
    logp, _ = plain_logps()
    ratio, gap = np.exp(logp - batch.behavior_logp), logp - reference
    kl = np.sum(ratio * (np.exp(-gap) + gap - 1), axis=-1)
    close(metrics["reference_kl"], np.mean(kl), rtol=1e-4)
    close(metrics["loss"], expected["loss"] + 0.3 * np.mean(kl), rtol=1e-4)
    assert abs(metrics["grad_norm"] / expected["grad_norm"] - 1) > 0.01


def test_drift_is_from_the_behavior_policy_when_the_objective_compares_with_a_reference():
    """The objective's loss, gradient and metrics are the reference's; `kl` and `ess` are not."""
    batch = batch_of()
    reference = (batch.behavior_logp - 0.1) * batch.mask
    state, found = one_step(replace(batch, reference_logp=reference), to_reference=True)
    compared, of_reference = one_step(replace(batch, behavior_logp=reference))
    drift, of_behavior = {"kl", "ess"}, expected_step()[1]
    for key in found.keys() - drift:
        np.testing.assert_array_equal(found[key], of_reference[key], err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, state, compared)
    for key in drift:
        close(found[key], of_behavior[key], rtol=1e-6, err_msg=key)
        assert abs(of_reference[key] / of_behavior[key] - 1) > 0.01, key


def test_the_stop_token_is_part_of_the_sum():
    """A behavior policy that is a nat less sure of each EOS moves each log-ratio by a nat."""
    batch = batch_of()
    tokens = batch.tokens.reshape(-1)[batch.token_index]
    stops = (tokens == EOS) * batch.mask
    np.testing.assert_array_equal(stops.sum(-1), 1)
    _, found = one_step(replace(batch, behavior_logp=batch.behavior_logp - stops))
    close(found["log_ratio"], expected_step()[1]["log_ratio"] + 1, rtol=1e-7, atol=1e-5)


def test_behavior_log_probs_of_another_temperature_leave_a_log_ratio():
    behavior = plain_logps(1.0)[0].astype(np.float32)
    _, metrics = one_step(replace(batch_of(), behavior_logp=behavior))
    assert max(abs(metrics["log_ratio/right"]), abs(metrics["log_ratio/wrong"])) > 0.5
    assert metrics["kl"] > 1e-2


def test_the_recomputed_denominator_is_the_steps_own():
    run, batch = compiled(), batch_of()
    found = np.asarray(run.logp(run.start().params, run.put(batch)))
    assert found.shape == batch.mask.shape
    np.testing.assert_array_equal(found[batch.mask == 0], 0.0)
    close(found, plain_logps()[0], rtol=1e-7, atol=1e-5)
    _, metrics = one_step(replace(batch, behavior_logp=found))
    for key in ("log_ratio/right", "log_ratio/wrong", "log_ratio/right_std", "kl"):
        assert abs(metrics[key]) < 1e-6, key
    # At the anchor the loss is the square of the advantages.
    close(metrics["loss"], np.mean(batch.advantage**2))


@pytest.mark.parametrize("reference", [None, 9.0])
@pytest.mark.parametrize("load_version", [None, float])
def test_log_probs_are_recomputed_by_reference_and_version(reference, load_version):
    """A token has log-probability -v under the weights of version v."""
    lag = np.repeat([2, 1, 1, 3], 4)
    batch = replace(batch_of(), lag=lag)
    logp_step = lambda version, batch: -version * jnp.asarray(batch.mask)
    found = train_step.recompute_logps(
        batch, logp_step, step=7, reference=reference, load_version=load_version
    )
    behavior = (lag[:, None] - 7) * batch.mask if load_version else batch.behavior_logp
    np.testing.assert_array_equal(found.behavior_logp, behavior)
    expected = -reference * batch.mask if reference else batch.reference_logp
    np.testing.assert_array_equal(found.reference_logp, expected)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize(("micro_batches", "used"), [(2, 2), (4, 3)])
def test_accumulation_equals_the_whole_batch(micro_batches, used, aggregation):
    """In parts of different size, since with equal ones a local normaliser would do; and some of
    the micro-batches that there is room for are empty."""
    split = batch_of(micro_batches=micro_batches, rows_multiple=1, aggregation=aggregation)
    parts = np.sum(split.segments > 0, axis=(1, 2))
    assert np.count_nonzero(parts) == used
    assert len(set(parts[:used])) > 1
    whole = batch_of(micro_batches=1, aggregation=aggregation)
    assert_same_step(one_step(split), one_step(whole))


def test_micro_batches_that_hold_nothing_are_not_computed():
    run, batch = compiled(), batch_of(micro_batches=4, rows_multiple=1)
    empty = ~batch.segments.any((1, 2))
    assert list(empty) == [False, False, False, True]
    calls = []

    def count(m):
        jax.debug.callback(lambda m: calls.append(int(m)), m)
        return jnp.zeros(())

    jax.jit(functools.partial(train_step.sum_micro_batches, count))(run.put(batch))
    jax.effects_barrier()
    assert sorted(calls) == [0, 1, 2]


@pytest.mark.parametrize("layout", [dict(), dict(row_length=64), dict(micro_batches=4)])
def test_padding_is_the_share_of_computed_places_without_a_token(layout):
    batch = batch_of(**layout)
    used = [part for part in batch.segments if part.any()]
    close(train_step.padding(batch), np.mean(np.array(used) == 0), rtol=1e-6)


def test_the_order_of_sequences_and_their_packing_do_not_matter():
    packed, unpacked, batch = batch_of(row_length=64), batch_of(row_length=19), batch_of()
    assert np.count_nonzero(packed.segments.any(-1)) <= 6
    assert packed.segments.max() >= 3
    assert np.count_nonzero(unpacked.segments.any(-1)) == 16
    assert unpacked.segments.max() == 1
    order = np.random.default_rng(2).permutation(16)
    per_sequence = ("token_index", "mask", "behavior_logp", "advantage", "reward", "weight", "lag")
    moved = replace(batch, **{name: getattr(batch, name)[order] for name in per_sequence})
    for other in (packed, unpacked, moved):
        assert_same_step(one_step(other), expected_step())


MESHES = [(8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (1, 2, 4, 1), (2, 1, 2, 2)]


@pytest.mark.parametrize("sizes", MESHES)
def test_eight_devices_equal_one(sizes):
    """Two steps, in which parameters and moments stay where the table puts them."""
    run, one, batch = compiled(sizes), compiled(), batch_of()
    state, expected = run.start(), one.start()
    data, fsdp, context, tensor = sizes
    # Devices hold parts, or this would compare one device with itself.
    placed = run.put(batch)
    shard = placed.tokens.sharding.shard_shape(placed.tokens.shape)
    assert shard == (2, 8 // (data * fsdp), 24 // context)
    kernel = state.params["layers"]["q"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // fsdp, 32 // tensor)

    for _ in range(2):
        state, metrics = run.step(state, placed)
        expected, expected_metrics = one.step(expected, one.put(batch))
        found = jax.device_get((state, metrics))
        assert_same_step(found, jax.device_get((expected, expected_metrics)))
        table = parameter_shardings(state.params, run.mesh)
        is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
        (adam,) = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
        for tree in (state.params, adam.mu, adam.nu):
            kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, table)
            assert all(jax.tree.leaves(kept))


LOGGED = """
import sys
import test_train_step
from oapl_jax.model import transformer

def compile_step():
    run = test_train_step.compiled((2, 2, 1, 2))
    run.step.lower(run.start(), run.put(test_train_step.batch_of())).compile()

compile_step()
print("now in one stride", file=sys.stderr, flush=True)
transformer.constrain_embedded = lambda x: x
test_train_step.compiled.cache_clear()
compile_step()
"""


def test_the_compiler_never_replicates_what_it_can_not_reshard():
    """It says so in a warning, and does where embeddings are to be split by row in one stride.

    In a process of its own, since the compiler reads what it may say once, when it is loaded.
    """
    log = {"TF_CPP_MIN_LOG_LEVEL": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | log | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", LOGGED], capture_output=True, text=True, env=environment, timeout=300
    )
    assert child.returncode == 0, child.stderr
    ours, _, in_one_stride = child.stderr.partition("now in one stride")
    assert "Involuntary full rematerialization" not in ours
    assert "Involuntary full rematerialization" in in_one_stride


@pytest.mark.parametrize("what", ["parameter", "moment"])
def test_an_update_that_is_not_finite_is_not_taken(what):
    """Loss and gradient are finite; the second step's update is infinite in one element."""

    def update(grads, count, params=None):
        infinite = jnp.where(count >= 1, jnp.inf, 0.0)
        if what == "moment":
            return grads, count + 1 + infinite
        return grads | {
            "final_norm": {"scale": grads["final_norm"]["scale"].at[0].add(infinite)}
        }, count + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    scoring: dict[str, Any] = dict(temperature=TEMPERATURE, logp_chunk=5)
    choices = dict(kl_weight=0.0, ess_power=0.0, to_reference=False)
    mesh = small_mesh()
    step = train_step.make_train_step(MODEL, OAPL, optimizer, mesh, **scoring, **choices)
    state = train_step.init_state(MODEL, optimizer, mesh, parameters())
    batch = to_mesh(batch_of(), train_step.batch_shardings(mesh))
    state, metrics = step(state, batch)
    assert metrics["skipped"] == 0
    old = jax.device_get(state)
    new, metrics = jax.device_get(step(state, batch))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["skipped_in_a_row"] == 1
    assert_untouched(new, old)


def test_fresh_parameters_do_not_depend_on_the_mesh():
    fresh = lambda *sizes: train_step.init_state(MODEL, OPTIMIZER, small_mesh(*sizes), 3)
    one, many = jax.device_get((fresh(), fresh(2, 2, 1, 2)))
    assert_same(many, one)
    kernels = one.params["layers"]["q"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def assert_untouched(new, old):
    """To the bit."""
    parts = lambda state: (state.params, state.opt_state)
    same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert jax.tree.all(jax.tree.map(same, parts(new), parts(old)))


def test_steps_that_are_not_finite_change_nothing_and_are_counted():
    run, good = compiled(), batch_of()
    poison = lambda name, value: replace(good, **{name: _with_one(getattr(good, name), value)})
    bad = [poison("behavior_logp", np.nan), poison("advantage", np.inf), poison("weight", np.nan)]
    bad.append(poison("advantage", 1e30))  # whose square overflows
    state, _ = run.step(run.start(), run.put(good))  # so that the moments are not all zero
    counts = []
    for batch in [bad[0], bad[1], good, bad[2], bad[3], bad[0], good]:
        old = jax.device_get(state)
        state, metrics = run.step(state, run.put(batch))
        counts.append((int(state.skipped), int(state.skipped_in_a_row)))
        assert counts[-1] == (int(metrics["skipped"]), int(metrics["skipped_in_a_row"]))
        new = jax.device_get(state)
        if batch is good:
            assert np.abs(new.params["head"] - old.params["head"]).max() > 1e-5
        else:
            assert_untouched(new, old)
    assert counts == [(1, 1), (2, 2), (2, 0), (3, 1), (4, 2), (5, 3), (5, 0)]
    assert int(state.step) == 8

    # Bad steps leave no trace: three good ones alone end in the same state.
    alone = run.start()
    for _ in range(3):
        alone, _ = run.step(alone, run.put(good))
    assert_untouched(state, jax.device_get(alone))


@pytest.mark.parametrize("ess_power", [0.0, 0.5])
def test_a_scale_that_is_no_number_is_a_step_that_is_not_finite(ess_power):
    """The objective looks at the reference alone, so loss and gradient are finite without it."""
    batch = batch_of()
    batch = replace(
        batch,
        behavior_logp=_with_one(batch.behavior_logp, np.nan),
        reference_logp=(batch.behavior_logp - 0.1) * batch.mask,
    )
    run = compiled(ess_power=ess_power, to_reference=True)
    old = jax.device_get(run.start())
    state, metrics = jax.device_get(run.step(run.start(), run.put(batch)))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == (ess_power > 0)
    if ess_power:
        assert_untouched(state, old)
    else:
        assert np.abs(state.params["head"] - old.params["head"]).max() > 1e-5


def _with_one(array, value):
    array = np.array(array)
    array[(-1,) + (0,) * (array.ndim - 1)] = value
    return array


def fragile_loss(logp, behavior_logp, advantage, mask):
    """Finite with a gradient that is not (0 * inf), or the reverse."""
    root = jnp.sqrt(0 * logp + jnp.where(mask > 0, behavior_logp, 1.0))
    return jnp.sum((root + 0.1 * logp) * mask, axis=-1) + advantage, {}


FRAGILE = Objective(lambda reward: reward, fragile_loss)


@pytest.mark.parametrize("case", ["fine", "only the gradient", "only the loss"])
def test_loss_and_gradient_must_both_be_finite(case):
    run, batch = compiled(objective=FRAGILE), batch_of()
    behavior, advantage = np.ones_like(batch.behavior_logp), np.zeros_like(batch.advantage)
    if case == "only the gradient":
        behavior[12, 0] = 0.0
    if case == "only the loss":
        advantage[12] = np.inf
    batch = replace(batch, behavior_logp=behavior, advantage=advantage)
    state, metrics = run.step(run.start(), run.put(batch))
    assert np.isfinite(metrics["loss"]) == (case != "only the loss")
    assert np.isfinite(metrics["grad_norm"]) == (case != "only the gradient")
    assert metrics["skipped"] == (case != "fine")
    if case != "fine":
        assert_untouched(state, run.start())


@pytest.mark.parametrize("sizes", [ONE, (2, 2, 1, 2)])
def test_the_old_state_is_donated_and_nothing_else(sizes):
    """Parameters that a state starts from belong to the sampler, or to a published version."""
    run = compiled(sizes)
    batch = run.put(batch_of())
    params = jax.device_put(parameters(), parameter_shardings(parameters(), run.mesh))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jax warns of donated buffers that it could not use
        old = train_step.init_state(MODEL, OPTIMIZER, run.mesh, params)
        new, _ = run.step(old, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, batch, params)))
    jax.tree.map(np.testing.assert_array_equal, params, parameters())
