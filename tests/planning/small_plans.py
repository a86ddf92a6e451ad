"""Small runs to plan, with micro-batches of 8 rows and one sequence in each row."""

from small_runs import typed

from configs import arithmetic
from oapl_jax.model.config import ModelConfig
from oapl_jax.plan import plan_inputs
from oapl_jax.planning.hardware import make_mesh
from oapl_jax.planning.programs import RunPrograms

ROWS = 8


def small_run(
    where, mesh, *, length, prompt, logp_chunk, sizes, micro_batches=2, remat="full"
) -> RunPrograms:
    config = arithmetic.get_config().unlock()
    config.group_size, config.groups_per_step = 4, 2 * micro_batches
    config.data.max_prompt_tokens, config.rollout.max_response_tokens = prompt, length - prompt
    config.model.update(dtype="bfloat16", remat=remat)
    config.mesh.update(dict(data=1, fsdp=1, context=1, tensor=1) | mesh)
    config.rollout.sampler, config.evaluation.every = "fleet", 0
    config.learner.update(
        micro_batches=micro_batches, row_length=length, rows_multiple=ROWS, logp_chunk=logp_chunk
    )
    decoder = dict(head_dim=64, num_hidden_layers=2, max_position_embeddings=length) | sizes
    model = ModelConfig.from_hf(dict(config.model.architecture) | decoder, source="this test")
    mesh = make_mesh(where, **config.mesh)
    run = RunPrograms(plan_inputs(typed(config), model, False), mesh)
    assert run.longest.tokens.shape == (micro_batches, ROWS, length)
    return run
