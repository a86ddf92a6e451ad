"""JSON lines, and the serialization of groups."""

import numpy as np
import pytest
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import JsonLines, read_json_lines
from oapl_jax.structs import Group, Prompt, Rollout, decode_groups, encode_groups


def test_json_lines_survive_a_cut_in_the_last_line(tmp_path):
    path = epath.Path(tmp_path / "a.jsonl")
    lines = JsonLines(path, exclusive=True)
    for i in range(3):
        lines.append({"i": i})
    lines.close()
    whole = path.read_bytes()
    assert lines.size == len(whole)
    second = whole.index(b"\n", 10) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(read_json_lines(path)) == [{"i": 0}, {"i": 1}]
        lines = JsonLines(path, exclusive=True)
        assert lines.size == second
        lines.append({"i": 2})
        lines.close()
        assert path.read_bytes() == whole


def test_json_lines_have_one_writer(tmp_path):
    path = epath.Path(tmp_path / "a.jsonl")
    first = JsonLines(path, exclusive=True)
    with pytest.raises(UserError, match=r"a\.jsonl"):
        JsonLines(path, exclusive=True)
    JsonLines(path, exclusive=False).close()
    first.close()
    JsonLines(path, exclusive=True).close()


def test_json_lines_refuse_what_json_can_not_hold(tmp_path):
    lines = JsonLines(epath.Path(tmp_path / "a.jsonl"), exclusive=False)
    with pytest.raises(RunError):
        lines.append({"x": float("nan")})
    lines.close()
    for content in (b"{]\n", b"[]\n"):
        lines.path.write_bytes(b"{}\n" + content)
        with pytest.raises(UserError, match="line 2"):
            list(read_json_lines(lines.path))
    with pytest.raises(UserError):
        JsonLines(epath.Path("gs://bucket/a.jsonl"), exclusive=False)


def make_group(index, *, size, longest=6):
    rng = np.random.default_rng(index)
    rollouts = tuple(
        Rollout(
            rng.integers(0, 99, length).astype(np.int32),
            -rng.exponential(size=length).astype(np.float32),
            index,
            str(rng.choice(["stop", "length"])),
        )
        for length in rng.integers(0, longest, size)
    )
    tokens = rng.integers(0, 99, index % 5).astype(np.int32)
    prompt = Prompt(f"id{index}", index, tokens, 'a "text"\n', "é", "chain_sum")
    return Group(prompt, rollouts, rng.random(size).astype(np.float32))


@pytest.mark.parametrize("count", [0, 1, 6])
def test_groups_come_back_bit_for_bit(count):
    groups = [make_group(i, size=i + 1, longest=6 * (i != 2) + 1) for i in range(count)]
    assert_same_groups(decode_groups(encode_groups(groups)), groups)


def assert_same_groups(found, expected):
    def arrays(group):
        yield from (group.prompt.tokens, group.reward)
        for rollout in group.rollouts:
            yield from (rollout.tokens, rollout.behavior_logp)

    def scalars(group):
        prompt = {k: v for k, v in vars(group.prompt).items() if k != "tokens"}
        return prompt, [(r.policy_version, r.finish_reason) for r in group.rollouts]

    assert list(map(scalars, found)) == list(map(scalars, expected))
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(arrays(mine), arrays(theirs), strict=True):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
