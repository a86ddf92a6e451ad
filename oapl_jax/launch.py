"""Launch of the commands: command line and compile cache."""

import gc
import os
import runpy
import sys

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from oapl_jax.config import Config, nearest
from oapl_jax.errors import UserError
from oapl_jax.files import absolute, is_local

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; a run in it is resumed")


def read_command_line() -> tuple[Config, epath.Path]:
    """The configuration with its overrides, and the workdir; `--help` prints and exits.

    Sets Python's garbage collector, for programs that trace.

    Raises:
      UserError: for an unknown flag, key, choice or file, a value of the wrong type or outside its
        range, or a workdir in an object store.
    """
    # Tracing makes many objects that stay. With Python's default thresholds the collector walks
    # them again and again: a seventh of the processor time of a short run.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    if "--help" in sys.argv:
        print(usage())
        sys.exit()
    try:
        flags.FLAGS(sys.argv)
        values = CONFIG.value.to_dict() if CONFIG.value is not None else None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        check_overrides(sys.argv[1:])
        # The libraries put tracebacks into their messages; the cause is in the last line.
        lines = [line for line in str(error.args[0]).splitlines() if line.strip()]
        what = " ".join(lines) if len(lines) <= 2 else lines[-1].strip()
        raise UserError(f"{what} (see the settings in the file that --config names)") from error
    if values is None:
        raise UserError("--config is missing; add, for example, --config=configs/arithmetic.py")
    config = Config.from_dict(values)
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; add, for example, --workdir=runs/arithmetic")
    if not is_local(WORKDIR.value):
        raise UserError(
            f"--workdir={WORKDIR.value} is in an object store, whose files can't grow as a run's "
            "ledger and metrics do; name a directory (a bucket can be mounted as one)"
        )
    return config, absolute(WORKDIR.value)


def check_overrides(arguments: list[str]) -> None:
    """Raises a UserError for the first `--config.a.b=` whose key the configuration file lacks."""
    given = {a.lstrip("-").partition("=")[0]: a.partition("=")[2] for a in arguments}
    file, colon, argument = given.get("config", "").partition(":")
    if not os.path.exists(file):
        return
    try:
        get_config = runpy.run_path(file)["get_config"]
        whole = get_config(argument) if colon else get_config()
    except (KeyError, TypeError, ValueError):
        return  # the file or its argument is at fault, not a key
    for name in given:
        section = whole
        parts = name.split(".")[1:] if name.startswith("config.") else []
        for depth, part in enumerate(parts):
            if not isinstance(section, ConfigDict) or part not in section:
                known = section.keys() if isinstance(section, ConfigDict) else ()
                path = ".".join(parts[: depth + 1])
                raise UserError(f"--config.{path} is not a setting{nearest(part, known)}")
            section = section.get_oneway_ref(part).get() if part in section else None


def usage() -> str:
    """Docstring of the command, and its own flags."""
    modules = flags.FLAGS.flags_by_module_dict()
    mine = [
        f for name in modules if name.startswith(("oapl_jax", sys.argv[0])) for f in modules[name]
    ]
    lines = [
        f"  --{flag.name}: {flag.help}" + (f" [{flag.default}]" if flag.default is not None else "")
        for flag in sorted(mine, key=lambda flag: flag.name)
    ]
    overrides = "  --config.NAME=VALUE: a setting of that file, such as --config.lag.steps=8"
    return "\n".join([sys.modules["__main__"].__doc__ or "", *lines, overrides])


def use_compile_cache(directory: str, workdir: epath.Path) -> None:
    """Keeps compiled programs in a directory: a run that resumes, or the next of a sweep, need not
    compile.

    All hosts read it and host 0 writes it, so theirs must be one directory. JAX keeps programs that
    took a second or longer to compile, by program, compiler, flags and devices. An environment with
    JAX_COMPILATION_CACHE_DIR has chosen already.

    Args:
      directory: `config.compile_cache`; relative to the workdir; "" for none.
      workdir: of the run.
    """
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if directory and chosen is None:
        path = absolute(workdir / directory if is_local(directory) else directory)
        jax.config.update("jax_compilation_cache_dir", os.fspath(path))
