"""Eight devices on any machine, so that meshes are tested everywhere; set before jax starts.
And what the processes that share the tests have in common."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Most programs are compiled for longer than they run: without XLA's fusion emitters, half as long.
# An XLA that lacks a flag ends the process; jax 0.12 lacks that one.
QUICK = "--xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jax").startswith("0.10")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {QUICK} "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_force_host_platform_device_count=8"
)


def pytest_configure(config: pytest.Config) -> None:
    """One folder for the compiled programs of all runs of these tests: many are the same."""
    gc.set_threshold(100_000, 50, 100)  # as in a command
    if "TEST_PROGRAMS" not in os.environ:  # else a process of the one that has made it
        folder = tempfile.TemporaryDirectory(prefix="programs")
        config.add_cleanup(folder.cleanup)
        os.environ["TEST_PROGRAMS"] = folder.name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Starts training processes that share a data set."""
    from small_runs import Runs  # once the environment above is set

    return Runs(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def kept_programs() -> Iterator[None]:
    """Keeps there too what a file's tests compile in this process."""
    import jax  # once the environment above is set

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", os.environ["TEST_PROGRAMS"])
    yield
    jax.config.update("jax_compilation_cache_dir", None)


# Files whose programs run for longer than they compile.
OPTIMIZED = ("test_cyclic_games", "test_documents_run", "test_curriculum_run")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Optimising machine code takes most of the time of compiling programs that run for 10 ms."""
    import jax

    quick = request.path.stem not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Minutes each, longest first: begun last, one of them would keep a process when the other is done.
LONG = (
    *("test_pods", "test_train", "test_real_fleet", "test_experiments", "test_record"),
    *("test_documents_run", "test_paper_configs", "test_every_objective", "test_restart_proxy"),
)
# Marked `slow` and left out of `make test-quick`: whole runs, real servers, other processes, the
# compiler for TPUs, large programs.
SLOW = (
    *LONG,
    *("test_attention", "test_code_verifier", "test_curriculum", "test_curriculum_experiment"),
    *("test_curriculum_run", "test_cyclic_games", "test_fleet_faults"),
    *("test_fleet_lost", "test_hub", "test_multihost", "test_plan", "test_plan_estimate"),
    *("test_lora_run", "test_lora_step", "test_own_task", "test_preferences_run", "test_publisher"),
    *("test_real_adapters", "test_real_server", "test_remat", "test_run", "test_sample_tokens"),
    *("test_smollm2", "test_tpu_slices", "test_train_step"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow files, and orders files for the processes that share them."""
    unknown = set(SLOW) - {path.stem for path in pathlib.Path(__file__).parent.rglob("test_*.py")}
    assert not unknown, f"no such files: {unknown}"
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (*LONG, item.path.stem).index(item.path.stem))
