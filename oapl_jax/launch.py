"""Launch of the commands: command line and compile cache."""

import gc
import importlib.metadata
import os
import platform
import runpy
import sys
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

import oapl_jax
from oapl_jax.config import Config, flatten, load_config, nearest, sections, settings_of
from oapl_jax.errors import UserError
from oapl_jax.files import absolute, check_reachable, flag_directory, is_local
from oapl_jax.fleet.addresses import server_url

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "tensorstore"),
    *("transformers", "tokenizers", "math-verify", "sympy"),
)
CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; a run in it is resumed")


def read_command_line(*, or_saved: bool = False) -> tuple[Config, epath.Path]:
    """The configuration with its overrides, and the workdir; `--help` prints and exits.

    Sets Python's garbage collector, for programs that trace.

    Args:
      or_saved: without --config, take the configuration of the run in the workdir.

    Raises:
      UserError: for an unknown flag, key, choice or file, a value of the wrong type or outside its
        range, a malformed address of a server, or a workdir that can't be reached.
    """
    # Tracing makes many objects that stay. With Python's default thresholds the collector walks
    # them again and again: a seventh of the processor time of a short run.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    if "--help" in sys.argv:
        print(usage())
        sys.exit()
    try:
        words = flags.FLAGS(sys.argv)[1:]
        values = CONFIG.value.to_dict() if CONFIG.value is not None else None
    except (
        flags.Error,
        AttributeError,
        KeyError,
        OSError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:
        check_overrides(sys.argv[1:])
        # The libraries put tracebacks into their messages; the cause is in the last line.
        lines = [line for line in str(error.args[0]).splitlines() if line.strip()]
        what = " ".join(lines) if len(lines) <= 2 else lines[-1].strip()
        raise UserError(f"{what} (see the settings in the file that --config names)") from error
    if words:
        raise UserError(
            f"{words[0]!r} is no flag; flags begin with dashes, and settings with --config., such "
            "as --config.num_steps=3"
        )
    if values is None and or_saved and WORKDIR.value:
        values = load_config(flag_directory("workdir", WORKDIR.value))
    if values is None:
        raise UserError("--config is missing; add, for example, --config=configs/arithmetic.py")
    config = Config.from_dict(values)
    check_servers(config)
    if not WORKDIR.value:
        raise UserError("--workdir is missing; add, for example, --workdir=runs/arithmetic")
    workdir = flag_directory("workdir", WORKDIR.value)
    check_reachable(workdir, of="--workdir")
    return config, workdir


def check_servers(config: Config) -> None:
    """Raises a UserError for a server's address that no request can go to."""
    fleet, judge = config.fleet, config.preferences.language_model
    for name, urls in {
        "fleet.servers": fleet.servers,
        "fleet.router": [fleet.router] if fleet.router else [],
        "preferences.language_model.servers": judge.servers,
    }.items():
        for url in urls:
            server_url(url, of=name)


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
                above, every = ".".join(parts[:depth]), flatten(whole.to_dict())
                close = (
                    nearest(part, known, every, section=above)
                    if known
                    else f"; {above} has no parts"
                )
                raise UserError(f"--config.{'.'.join(parts[: depth + 1])} is not a setting{close}")
            section = section.get_oneway_ref(part).get() if part in section else None


def origins(config: Config) -> dict[str, tuple[Any, str]]:
    """Setting -> its value, and where that comes from.

    The place is the command line, the file of --config (with its argument, if that has chosen the
    value), another setting that this one follows, or the default of oapl_jax/config.py.
    """
    flag: Any = flags.FLAGS["config"]
    overridden, name = flag.override_values, flag.config_filename
    file, _, argument = name.partition(":")
    get_config = runpy.run_path(file)["get_config"]
    as_given = flatten((get_config(argument) if argument else get_config()).to_dict())
    plain = flatten(get_config().to_dict()) if argument else as_given

    def origin(setting: str, value: Any) -> str:
        if any(setting == key or setting.startswith(f"{key}.") for key in overridden):
            return "the command line"
        if setting not in as_given:
            return "the default in oapl_jax/config.py"
        given = as_given[setting]
        if value not in (given, os.path.expanduser(given) if isinstance(given, str) else given):
            return "a setting of the command line, which it follows"
        return name if plain.get(setting) != given else file

    values = flatten(config.to_dict())
    values = {key.replace("objective.constants.", "objective."): v for key, v in values.items()}
    return {setting: (value, origin(setting, value)) for setting, value in values.items()}


def package_versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that decide a run's numbers."""
    there = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    found = {name: importlib.metadata.version(name) for name in PACKAGES if name in there}
    return {"oapl_jax": oapl_jax.__version__, "python": platform.python_version(), **found}


def one_sentence(section: type) -> str:
    """The first sentence of a section's docstring."""
    return (section.__doc__ or "").strip().splitlines()[0].partition(". ")[0].rstrip(".")


def usage() -> str:
    """Docstring of the command, its flags, those of every command, and the settings by section."""
    modules = flags.FLAGS.flags_by_module_dict()
    groups = {
        "Flags of this command": [f for m in modules if m == sys.argv[0] for f in modules[m]],
        "Flags of every command": [flags.FLAGS[name] for name in ("config", "workdir")],
    }
    lines = [sys.modules["__main__"].__doc__ or ""]
    for title, of_group in groups.items():
        lines += [title] if of_group else []
        for flag in sorted(of_group, key=lambda flag: flag.name):
            default = f" [{flag.default}]" if flag.default is not None else ""
            lines.append(f"  --{flag.name}: {flag.help}{default}")
    lines.append("\nSettings: --config.NAME=VALUE, such as --config.lag.steps=8 (docs/config.md)")
    for path, section in sections():
        lines.append(f"\n{path or 'the whole run'}: {one_sentence(section)}")
        for setting in settings_of(section, path):
            allowed = f" [{setting.values}]" if setting.values else ""
            lines.append(f"  {setting.name} ({setting.type}): {setting.doc}{allowed}")
    return "\n".join(lines)


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
