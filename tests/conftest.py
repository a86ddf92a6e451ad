"""Eight devices on any machine, so that meshes are tested everywhere; set before jax starts.
And who runs what, of the processes that share the tests."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
ROOT = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """One folder for the compiled programs of all runs of these tests: many are the same."""
    if "TEST_PROGRAMS" not in os.environ:  # else a process of the one that has made it
        folder = tempfile.TemporaryDirectory(prefix="programs")
        config.add_cleanup(folder.cleanup)
        os.environ["TEST_PROGRAMS"] = folder.name


@pytest.fixture(scope="module")
def kept_programs() -> Iterator[None]:
    """What a file's tests compile in this process is kept there too."""
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


# What takes minutes, longest first: begun late, one would keep a process when the other is done.
LONG = ("rollout", "test_pods.py", "test_train.py", "test_experiments.py", "test_documents.py")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of a file, or of a folder here, run in one process: what they share (servers,
    models, finished runs) is made once."""
    group = lambda item: item.path.relative_to(ROOT).parts[0]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: (*LONG, group(item)).index(group(item)))
