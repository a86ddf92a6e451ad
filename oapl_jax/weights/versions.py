"""Versions of a run: the learner's parameters become version directories, and come back."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from oapl_jax import multihost
from oapl_jax.errors import UserError
from oapl_jax.files import local_place
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.tracking.metrics import read_last_lines
from oapl_jax.tracking.progress import log
from oapl_jax.weights import publisher
from oapl_jax.weights.card import model_card
from oapl_jax.weights.checkpoint import Weights, exit_after

LOADED = 4  # copies of versions that stay for objective.denominator="learner"


def publish_with_card(
    source: epath.Path,
    model: ModelConfig,
    config: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    *,
    version: int,
    directory: epath.Path,
    tokenizer: Any,
    dtype: str,
    adapters: hf.Adapters | None = None,
    base: epath.Path | None = None,
) -> epath.Path:
    """Publishes a finished Orbax step with a model card; see `publisher.publish`.

    Args:
      config: of the run, as saved in its workdir.
      lines: of its metrics.jsonl, for the card.
    """
    alone = adapters is not None and not adapters.merged
    dtype = hf.ADAPTER_DTYPE if alone else dtype
    described: Any = dict(version=version, dtype=dtype, config_hash=publisher.config_hash(config))
    parent = f"{source.parent.name}/{source.name}"
    return publisher.publish(
        source,
        model,
        directory=directory,
        tokenizer=tokenizer,
        adapters=adapters,
        base=base,
        card=model_card(config, lines, model, parent=parent, adapters=alone, **described),
        **described,
    )


class Versions:
    """Publishes parameters of a run as versions, and loads them; all hosts make each call.

    Versions lie in `versions/` of the workdir, the Orbax steps behind them in `weights/`. Every
    `full_every`-th version is whole, the others are deltas of the one before. `probe` maps
    parameters to the probe that is published with them; hosts wait for each other for `deadline`
    seconds. With `adapters`, parameters are adapters alone, and `whole` adds the
    learner's own frozen weights to those of a version.
    """

    def __init__(
        self,
        workdir: epath.Path,
        model: ModelConfig,
        tokenizer: Any,
        mesh: Mesh,
        probe: Callable[[Any], dict[str, Any]],
        *,
        dtype: str,
        config: Mapping[str, Any],
        deadline: float,
        full_every: int = 1,
        adapters: hf.Adapters | None = None,
        whole: Callable[[Any], Any] = lambda params: params,
    ):
        self.directory, self.probe = workdir / "versions", probe
        self._weights = Weights(workdir / "weights", deadline=deadline)
        self._model, self._mesh, self._deadline = model, mesh, deadline
        self._tokenizer, self._dtype, self._config = tokenizer, dtype, config
        self._adapters, self._whole = adapters, whole
        self._full_every = full_every
        # Of the version that the next one is a delta of, and of those that were loaded last. A
        # killed run leaves them to the one that resumes.
        self.copies = local_place(f"{self.directory}.{jax.process_index()}")
        self._keep = 1

    def path(self, version: int) -> epath.Path:
        return publisher.version_path(self.directory, version)

    @functools.cached_property
    def _published(self) -> list[int]:
        """Versions at the first publication, as host 0 lists them: other views may be stale."""
        mine = json.dumps(publisher.published_versions(self.directory)).encode()
        name = "the published versions"
        return json.loads(multihost.allgather_bytes(mine, name, deadline=self._deadline)[0])

    def publish(self, step: int, params: Any) -> None:
        """Publishes a version, unless it exists: host 0 writes, the others wait for its marker."""
        if step not in self._published:
            name = f"the weights of version {step}"
            with multihost.collective_section(name, deadline=self._deadline):
                self._weights.save(step, params, self.probe(params))
                self._weights.wait()
            if not jax.process_index():
                self._publish_delta(step)
        marker = self.path(step) / publisher.COMMITTED
        multihost.wait_until(marker.exists, os.fspath(marker), deadline=self._deadline)

    def _publish_delta(self, step: int) -> None:
        """Publishes a version as a delta, or whole, if that is due, or base or local disk fail."""
        how: Any = dict(full_every=self._full_every, dtype=self._dtype)
        publish = functools.partial(
            self.publish_step, self._weights.path(step), step, self.directory
        )
        try:
            if base := publisher.base_for(self.directory, step, **how):
                with publisher.checked_version(base, self.copies) as whole:
                    publish(base=whole)
                publisher.collect_fetched(self.copies, keep=self._keep)
                return
        except (OSError, UserError) as error:
            log(f"version {step} is published whole: {error}")
        publish()

    def publish_step(
        self,
        source: epath.Path,
        version: int,
        directory: epath.Path,
        *,
        base: epath.Path | None = None,
    ) -> epath.Path:
        """Publishes a finished Orbax step below any directory; returns the version's.

        With `base`, a whole version on this machine, it is a delta of that.
        """
        with exit_after(self._deadline, f"the publication of version {version}"):
            return publish_with_card(
                source,
                self._model,
                self._config,
                read_last_lines(self.directory.parent / "metrics.jsonl"),
                version=version,
                directory=directory,
                tokenizer=self._tokenizer,
                dtype=self._dtype,
                adapters=self._adapters,
                base=base,
            )

    def repair(self) -> dict[int, list[str]]:
        """Restores damaged files of versions from the Orbax steps behind them.

        A version that can't be restored stays as it is: whoever is to load it refuses it.

        Returns:
          version -> names of the restored files, on host 0; {} on the others, which wait for it.
        """
        restored, published = {}, self._published
        with multihost.host0_first("the check of versions", deadline=self._deadline):
            for version in () if jax.process_index() else published:
                again = functools.partial(self.publish_step, self._weights.path(version), version)
                with contextlib.suppress(UserError):
                    restored[version] = publisher.repair(self.path(version), again)
        return {version: names for version, names in restored.items() if names}

    def keep_only(self, versions: set[int]) -> None:
        """Deletes all other versions, but those that one of these is a delta of, and the Orbax
        steps behind all others."""
        if not jax.process_index():
            publisher.collect(self.directory, keep=versions)
        self._weights.keep_only(versions)

    def load(self, version: int) -> Any:
        """Parameters of a published version, on the mesh; adapters share the frozen weights.

        Copies of the last LOADED versions of a bucket stay until `close`: each step asks again.
        """
        self._keep = LOADED
        params = self._load(version, self.copies)
        publisher.collect_fetched(self.copies, keep=self._keep)
        return params

    @functools.cached_property
    def reference(self) -> Any:
        """Parameters of version 0, on the mesh."""
        return self._load(0, None)

    def _load(self, version: int, copies: epath.Path | None) -> Any:
        with publisher.checked_version(self.path(version), copies) as path:
            if self._adapters:
                return self._whole(self._adapters.load(path, self._model, mesh=self._mesh))
            return hf.load_params(path, self._model, mesh=self._mesh)

    def close(self) -> None:
        self._weights.close()
        if self.copies.exists():
            self.copies.rmtree()
