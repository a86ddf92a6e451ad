"""The probe equals the plain forward pass of the same rows, on any mesh."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.model import hf
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer, head, logits
from oapl_jax.weights.probe import make_probe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "qwen3_tied"


@pytest.mark.parametrize("row_length", [48, 16])
def test_the_probe_is_the_log_softmax_of_the_plain_forward_pass(row_length):
    config = hf.load_config(GOLDEN)
    params = hf.load_params(GOLDEN, config)
    model = Transformer(config, jnp.dtype("float32"), "none")
    mesh = make_mesh(data=2, fsdp=2, context=1, tensor=2)
    split = hf.load_params(GOLDEN, config, mesh=mesh)
    probe = make_probe(model, mesh, row_length=row_length, rows_multiple=8, logp_chunk=8)(split)

    tokens = np.array(probe["tokens"])
    assert tokens.shape == (4, min(33, row_length))
    assert len(np.unique(tokens)) > 20  # ids from all over the vocabulary
    positions = np.tile(np.arange(tokens.shape[1]), (4, 1))
    hidden = model.apply({"params": params}, tokens, positions, np.ones_like(tokens))
    table = jax.nn.log_softmax(logits(hidden, head(params, config)), axis=-1)
    expected = np.take_along_axis(np.asarray(table)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(probe["logp"], expected, atol=1e-5)
