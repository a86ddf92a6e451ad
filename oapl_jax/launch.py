"""The command line that train and evaluate share: a configuration, its overrides, and a workdir."""

import sys

from absl import flags
from etils import epath
from ml_collections import config_flags

from oapl_jax.build import Config
from oapl_jax.errors import UserError
from oapl_jax.files import absolute, is_local

CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; what it holds is resumed")


def read_command_line() -> tuple[Config, epath.Path]:
    """The configuration with its overrides, and the workdir; `--help` prints and ends instead.

    Raises:
      UserError: for an unknown flag, key, choice or file, a value of the wrong type, or a workdir
        in an object store.
    """
    if "--help" in sys.argv:
        print(usage())
        sys.exit()
    try:
        flags.FLAGS(sys.argv)
        config = CONFIG.value
        if config is not None:
            config.to_dict()  # a file that could not be loaded fails only when it is used
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # The libraries put whole tracebacks into their messages; what is wrong stands at the end.
        lines = [line for line in str(error.args[0]).splitlines() if line.strip()]
        what = " ".join(lines) if len(lines) <= 2 else lines[-1].strip()
        raise UserError(f"{what} (see the settings in the file that --config names)") from error
    if config is None:
        raise UserError("--config is missing; add, for example, --config=configs/arithmetic.py")
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; add, for example, --workdir=runs/arithmetic")
    if not is_local(WORKDIR.value):
        raise UserError(
            f"--workdir={WORKDIR.value} is in an object store, whose files can't grow as a run's "
            "ledger and metrics do; name a directory (a bucket can be mounted as one)"
        )
    return config, absolute(WORKDIR.value)


def usage() -> str:
    """What the command does, and its own flags."""
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
