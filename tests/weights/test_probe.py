"""The probe equals the plain forward pass of the same rows, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import GOLDEN, forward, golden_model, small_mesh

from oapl_jax.config import LearnerConfig
from oapl_jax.errors import NotFinite
from oapl_jax.model import hf
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.weights.probe import make_probe


def test_a_policy_whose_log_probs_are_not_finite_has_no_probe():
    config, params = golden_model("qwen3_tied")
    layout = LearnerConfig(micro_batches=1, row_length=48, rows_multiple=1, logp_chunk=8)
    probe = make_probe(Transformer(config, jnp.dtype("float32"), "none"), small_mesh(), layout)
    huge = {"scale": np.full_like(params["final_norm"]["scale"], 1e38)}
    with pytest.raises(NotFinite):
        probe(params | {"final_norm": huge})


@pytest.mark.parametrize("row_length", [48, 16])
def test_the_probe_is_the_log_softmax_of_the_plain_forward_pass(row_length):
    config, params = golden_model("qwen3_tied")
    mesh = make_mesh(data=2, fsdp=2, context=1, tensor=2)
    split = hf.load_params(GOLDEN / "qwen3_tied", config, mesh=mesh)
    layout = LearnerConfig(micro_batches=2, row_length=row_length, rows_multiple=8, logp_chunk=8)
    probe = make_probe(Transformer(config, jnp.dtype("float32"), "none"), mesh, layout)(split)

    tokens = np.array(probe["tokens"])
    assert tokens.shape == (4, min(33, row_length))
    assert len(np.unique(tokens)) > 20  # ids from all over the vocabulary
    table = jax.nn.log_softmax(forward(config, params, tokens), axis=-1)
    expected = np.take_along_axis(np.asarray(table)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(probe["logp"], expected, atol=1e-5)
