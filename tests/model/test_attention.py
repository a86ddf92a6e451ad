"""Every attention kernel equals the plain reference, with its gradients: blockwise, splash, GPU.

The Pallas kernels for TPUs and GPUs are interpreted, operation by operation; the GPU's and cuDNN's
are lowered for CUDA and not run.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import small_mesh

from oapl_jax.errors import UserError
from oapl_jax.model import attention
from oapl_jax.model.blockwise_attention import BLOCK, blockwise_attention, visible

HEADS, KV_HEADS, DIM = 4, 2, 16


def packed(rows, length, seed=0):
    """int32[rows, length] segments: sequences of several lengths in order, then padding, 0."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        ends = np.sort(rng.choice(np.arange(1, length), 4, replace=False))
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            row[start:end] = i
    return segments


def arrays(rows, length, seed=0, dtype=np.float32):
    """Query, key, value and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    draw = lambda heads: jnp.asarray(rng.normal(0, 1, (rows, length, heads, DIM)), dtype)
    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), draw(HEADS)


def reference(query, key, value, segments):
    slots = jnp.arange(segments.shape[1])
    mask = visible(segments, segments, slots, slots)
    return attention.masked_attention(query, key, value, mask)


def on_one_device(kernel):
    def run(query, key, value, segments):
        slots = jnp.arange(segments.shape[1])
        return kernel(query, key, value, segments, segments, slots)

    return run


def over(kernel, mesh):
    multiple, make_kernel = kernel

    def run(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention.over_mesh(make_kernel, *arguments, multiple=multiple)

    return jax.jit(run, in_shardings=NamedSharding(mesh, P()))


def value_and_gradients(run, query, key, value, cotangent, segments):
    def total(query, key, value):
        out = run(query, key, value, segments)
        assert out.dtype == value.dtype
        return jnp.sum((out * cotangent).astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return out, *gradients


def assert_equal_the_reference(run, segments):
    given = *arrays(*segments.shape), segments.astype(np.int32)
    found, expected = (value_and_gradients(f, *given) for f in (run, reference))
    assert np.abs(expected[0]).max() > 0.5
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "segments",
    [
        *(np.ones((3, length)) for length in (1, 2)),
        *(packed(3, length) for length in (64, 128, 129, 300, 512)),
        # In any order, every block with visible keys is visited.
        np.ones((1, 300)),
        np.zeros((1, 300)),
        np.arange(300)[None],
        np.where(np.arange(300) % 2, 3, 7)[None],
        np.repeat([5, 1, 9, 5], 75)[None],
        np.stack([np.repeat([1, 2, 3], 100), np.repeat([1, 0], 150)]),
    ],
)
def test_blockwise_equals_the_reference(segments):
    assert_equal_the_reference(on_one_device(blockwise_attention), segments)


@pytest.mark.parametrize("lengths", [[BLOCK] * 4, [4 * BLOCK]], ids=["packed", "one"])
def test_blockwise_skips_blocks_without_visible_keys(lengths):
    """NaN values of a visited block would spread, since 0 times NaN is NaN."""
    segments = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    query, key, value, _ = arrays(1, 4 * BLOCK)
    run = jax.jit(on_one_device(blockwise_attention))
    for i in range(4):
        rows = np.arange(4 * BLOCK) // BLOCK
        masked = (rows != i) if len(lengths) > 1 else (rows > i)
        poisoned = jnp.where(masked[None, :, None, None], jnp.nan, value)
        found = run(query, key, poisoned, segments)
        assert np.isfinite(found[0, rows == i]).all()


def test_blockwise_memory_is_linear_in_the_length():
    """At 2,048 positions temporaries are a tenth of the reference's."""

    def temporaries(run, length):
        given = *arrays(1, length), np.ones((1, length), np.int32)
        compiled = jax.jit(functools.partial(value_and_gradients, run)).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    run = on_one_device(blockwise_attention)
    assert temporaries(run, 2048) < 0.1 * temporaries(reference, 2048)
    assert temporaries(run, 4096) < 2.2 * temporaries(run, 2048)


def test_large_logits_do_not_overflow():
    query, key, value, _ = arrays(1, 300)
    segments = packed(1, 300)
    for scale in (30.0, 1e18):
        found = blockwise_attention(query * scale, key, value, segments, segments, jnp.arange(300))
        expected = reference(query * scale, key, value, segments)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_half_precision_sums_in_float32():
    *given, _ = arrays(2, 256)
    segments = packed(2, 256)
    narrow = (x.astype(jnp.bfloat16) for x in given)
    found = on_one_device(blockwise_attention)(*narrow, segments)
    assert found.dtype == jnp.bfloat16
    expected = reference(*given, segments)
    assert 1e-3 < np.abs(found.astype(jnp.float32) - expected).max() < 0.05


def lowered_for_cuda(run, rows, length, dtype):
    """The program of value and gradients that a GPU's compiler gets."""
    given = *arrays(rows, length, dtype=dtype), packed(rows, length)
    traced = jax.jit(functools.partial(value_and_gradients, run)).trace(*given)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks for cuDNN's version when it traces."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("sizes", [dict(), dict(data=2, tensor=2)], ids=str)
def test_half_precision_lowers_to_the_kernel_of_segments_for_a_gpu(sizes):
    """Of any length: no array is quadratic in it."""
    run = over(attention.KERNELS["gpu"], small_mesh(**sizes))
    text = lowered_for_cuda(run, 2, 1024, jnp.bfloat16)
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert len(calls) == 3  # the forward pass, and two of the backward pass
    rows, heads = (1, HEADS // 2) if sizes else (2, HEADS)
    for call in calls:
        assert f"tensor<{rows}x1024x{heads}x{DIM}xbf16>" in call
    assert sum(f"tensor<{rows}x1024xi32>" in call for call in calls) == 2
    assert "1024x1024x" not in text


@pytest.mark.parametrize("sizes", [None, dict(context=2, tensor=2)], ids=str)
def test_half_precision_over_context_lowers_to_cudnn_for_a_gpu(cudnn, sizes):
    gpu = attention.KERNELS["gpu"]
    run = over(gpu, small_mesh(**sizes)) if sizes else on_one_device(attention.mask_attention)
    text = lowered_for_cuda(run, 2, 256, jnp.bfloat16)
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert [re.findall(r"fmha\w+", call)[0] for call in calls] == [
        *("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward")
    ]
    queries, shards = (128, 2) if sizes else (256, 1)
    for call in calls:  # a device's part of queries, keys and mask; keys are not repeated
        for shape in ((queries, HEADS), (256, KV_HEADS)):
            assert f"tensor<2x{shape[0]}x{shape[1] // shards}x{DIM}xbf16>" in call
        assert f"tensor<2x1x{queries}x256xbf16>" in call


@pytest.mark.parametrize(("dtype", "length"), [(jnp.float32, 128), (jnp.bfloat16, 362)])
def test_long_rows_by_a_mask_need_no_quadratic_array(cudnn, monkeypatch, dtype, length):
    """Two positions beyond the limit (lowered here) the program has no [T, T] array."""
    monkeypatch.setattr(attention, "QUADRATIC_BYTES", 2**18)
    run = on_one_device(attention.mask_attention)
    for positions, quadratic in ((length, True), (length + 2, False)):
        text = lowered_for_cuda(run, 1, positions, dtype)
        assert (f"{positions}x{positions}x" in text) == quadratic
        assert ("fmha" in text) == (quadratic and dtype == jnp.bfloat16)
    if dtype == jnp.float32:
        assert_equal_the_reference(run, packed(1, length + 2))


# Over a mesh

INTERPRETED = attention.LANES, functools.partial(attention.splash_kernel, interpret=True)
SEGMENTS = jax.tree_util.Partial(lambda *given: attention.segment_attention(*given, interpret=True))
KERNELS = attention.KERNELS | {
    "splash": INTERPRETED,
    "segments": (attention.TILE, lambda *_: (SEGMENTS, P())),
}
MESHES = [
    dict(),
    dict(context=2),
    dict(data=2, tensor=2),
    dict(fsdp=2, context=2, tensor=2),
    dict(data=2, context=4),
]


@pytest.mark.parametrize(
    ("kernel", "sizes", "length"),
    [
        *(("splash", sizes, 256 * max(sizes.get("context", 1), 2)) for sizes in MESHES),
        *(("cpu", sizes, 320) for sizes in [*MESHES, dict(context=8)]),
        *(("gpu", sizes, 320) for sizes in [*MESHES, dict(context=8)]),
        *(("segments", sizes, 512) for sizes in (dict(), dict(data=2, tensor=2))),
        # Rows of any length are padded for the kernel.
        ("splash", dict(context=2), 130),
        ("segments", dict(), 130),
        ("cpu", dict(context=4), 54),
    ],
    ids=str,
)
def test_kernels_over_a_mesh_equal_the_reference(kernel, sizes, length):
    assert_equal_the_reference(over(KERNELS[kernel], small_mesh(**sizes)), packed(2, length))


def test_queries_are_exchanged_to_balance_the_work():
    seen = []

    def make_kernel(heads, slots, mesh):
        seen.append((heads, slots))
        return KERNELS["cpu"][1](heads, slots, mesh)

    mesh = small_mesh(context=4, tensor=2)
    over((2, make_kernel), mesh)(*arrays(1, 64)[:3], packed(1, 64))
    ((heads, slots),) = seen
    assert heads == HEADS // 2
    np.testing.assert_array_equal(np.sort(slots), np.arange(64))
    work = (slots + 1).reshape(4, -1).sum(-1)  # keys visible to the queries of a device
    np.testing.assert_array_equal(work, work[0])


def test_the_platform_of_the_mesh_selects_the_kernel(monkeypatch):
    """Not that of the host: any host compiles for a TPU."""
    chosen = []

    def record(platform):
        def make_kernel(*given):
            chosen.append(platform)
            return KERNELS["cpu"][1](*given)

        return 2, make_kernel

    for platform in attention.KERNELS:
        monkeypatch.setitem(attention.KERNELS, platform, record(platform))
    given = *arrays(1, 64)[:3], packed(1, 64)
    mesh = small_mesh().abstract_mesh
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    for here in (mesh, mesh.update(abstract_device=tpu)):
        with jax.sharding.use_abstract_mesh(here):
            jax.eval_shape(attention.attention, *given)
    attention.attention(*given)  # outside a mesh
    assert chosen == ["cpu", "tpu"]


def test_key_heads_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(UserError, match=r"mesh\.tensor=4 .* mesh\.tensor=2 and mesh\.data=2"):
        over(KERNELS["cpu"], small_mesh(tensor=4))(*arrays(1, 64)[:3], packed(1, 64))
