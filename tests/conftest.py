"""Eight devices on any machine, so that meshes are tested everywhere; set before jax starts.
And what the processes that share the tests have in common."""

import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


def pytest_configure(config: pytest.Config) -> None:
    """One folder for the compiled programs of all runs of these tests: many are the same."""
    if "TEST_PROGRAMS" not in os.environ:  # else a process of the one that has made it
        folder = tempfile.TemporaryDirectory(prefix="programs")
        config.add_cleanup(folder.cleanup)
        os.environ["TEST_PROGRAMS"] = folder.name


@pytest.fixture(scope="module")
def kept_programs() -> Iterator[None]:
    """Keeps there too what a file's tests compile in this process."""
    import jax  # once the environment above is set

    cache = {
        "jax_compilation_cache_dir": os.environ["TEST_PROGRAMS"],
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in cache.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


# Minutes each, longest first: begun last, one of them would keep a process when the other is done.
LONG = (
    *("test_pods.py", "test_train.py", "test_experiments.py", "test_record.py"),
    *("test_real_fleet.py", "test_fleet_job.py", "test_documents_run.py", "test_paper_configs.py"),
    *("test_every_objective.py", "test_learning.py", "test_restart_proxy.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which the processes that share the tests take them, a file at a time."""
    items.sort(key=lambda item: (*LONG, item.path.name).index(item.path.name))
