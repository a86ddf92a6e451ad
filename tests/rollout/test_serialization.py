"""JSON lines, and the serialization of groups."""

import pytest
from etils import epath
from groups import assert_same_groups, make_group

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import JsonLines, read_json_lines
from oapl_jax.structs import decode_groups, encode_groups


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


@pytest.mark.parametrize("longest", [1, 6])
def test_groups_come_back_bit_for_bit(longest):
    texts = lambda tokens: " ".join(map(str, tokens))
    groups = [make_group(i, size=i + 1, longest=longest) for i in range(6)]  # 1: no tokens at all
    for count in range(len(groups) + 1):
        for decode in (None, texts):
            assert_same_groups(decode_groups(encode_groups(groups[:count], decode)), groups[:count])
