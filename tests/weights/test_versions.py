"""Publication of a version on each of several hosts, one host at a time."""

import json
import threading
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from etils import epath
from small_models import small_config

from oapl_jax import multihost
from oapl_jax.errors import HostLost
from oapl_jax.weights import publisher, versions


class Host:
    """The versions of a run on one host; the test plays the other hosts."""

    def __init__(self, tmp_path, monkeypatch, *, index: int, deadline: float = 30.0):
        self.saved: list[int] = []  # steps whose weights this host takes part in saving
        self.written: list[int] = []  # versions that it publishes
        self.directory = epath.Path(tmp_path) / "versions"
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(publisher, "publish", self._publish)
        weights = SimpleNamespace(
            save=lambda step, params, probe: self.saved.append(step),
            wait=lambda: None,
            path=lambda step: self.directory / "no step",
        )
        monkeypatch.setattr(versions, "Weights", lambda directory, *, deadline: weights)
        nothing: Any = None
        self.versions = versions.Versions(
            epath.Path(tmp_path),
            *(small_config(), nothing, nothing),
            lambda params: {},
            dtype="float32",
            config={},
            deadline=deadline,
        )

    def _publish(self, *_: Any, version: int, **__: Any) -> None:
        self.written.append(version)
        self.commit(version)

    def commit(self, version: int) -> None:
        path = publisher.version_path(self.directory, version)
        path.mkdir(parents=True, exist_ok=True)
        (path / publisher.COMMITTED).touch()


def test_another_host_waits_for_the_marker_and_touches_nothing(tmp_path, monkeypatch):
    host = Host(tmp_path, monkeypatch, index=1)
    part = publisher.version_path(host.directory, 4) / "model.safetensors"
    part.parent.mkdir(parents=True)
    part.write_text("which host 0 is writing")
    publishing = threading.Thread(target=host.versions.publish, args=(4, None))
    publishing.start()
    publishing.join(0.5)
    assert publishing.is_alive()
    host.commit(4)
    publishing.join(30)
    assert not publishing.is_alive()
    assert (host.saved, host.written) == ([4], [])
    assert part.read_text() == "which host 0 is writing"


def test_a_marker_that_does_not_come_is_an_error(tmp_path, monkeypatch):
    host = Host(tmp_path, monkeypatch, index=1, deadline=0.1)
    with pytest.raises(HostLost, match="v000004/COMMITTED"):
        host.versions.publish(4, None)


@pytest.mark.parametrize("index", [0, 1])
def test_host_0_decides_which_versions_exist(tmp_path, monkeypatch, index):
    seen = [[0], [0, 4]]  # host 1 sees a version that is gone

    def gather(mine: bytes, *_: Any, **__: Any) -> list[bytes]:
        assert json.loads(mine) == seen[index]
        return [json.dumps(versions).encode() for versions in seen]

    monkeypatch.setattr(multihost, "allgather_bytes", gather)
    host = Host(tmp_path, monkeypatch, index=index)
    for version in seen[index]:
        host.commit(version)
    for version in (0, 4):
        host.versions.publish(version, None)
    assert (host.saved, host.written) == ([4], [[4], []][index])
