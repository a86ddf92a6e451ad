"""Compiled programs on disk: a run that resumes, or is the next of a sweep, need not compile."""

import os

import jax
from etils import epath

from oapl_jax.build import Config
from oapl_jax.files import absolute, is_local


def keep_programs(config: Config, workdir: epath.Path) -> None:
    """Keeps what is compiled from here on in the directory `config.compile_cache`, if there is one.

    A relative path begins at the workdir. All hosts read it and host 0 writes it, so theirs must be
    one directory. Whoever set JAX_COMPILATION_CACHE_DIR has chosen already. JAX keeps what took a
    second or longer, by program, compiler, flags and devices; an entry that it can't read it
    reports and compiles anew.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if config.compile_cache and chosen is None:
        path = config.compile_cache
        directory = absolute(workdir / path if is_local(path) else path)
        jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
