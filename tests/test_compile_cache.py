"""The cache of compiled programs."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import jax
from etils import epath
from configs.arithmetic import get_config
from oapl_jax.launch import use_compile_cache
config = get_config()
config.compile_cache = sys.argv[2] if len(sys.argv) > 2 else config.compile_cache
use_compile_cache(config.compile_cache, epath.Path(sys.argv[1]))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("chosen", "environment", "expected"),
    [
        ([], {}, "/shared/programs"),  # of all runs in /shared
        (["gs://bucket/programs"], {}, "gs://bucket/programs"),
        ([""], {}, "None"),
        ([], {"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_the_cache_directory_is_beside_the_run_or_as_configured(chosen, environment, expected):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "/shared/run", *chosen],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
