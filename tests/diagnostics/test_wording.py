"""Words that findings are said in: near misses, values, paths."""

import pytest

from deltaspec.diagnostics.wording import closest, show_path, show_value


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("rnk", ["rank", "alpha"], "rank"),
        ("LORA", ["lora", "full"], "lora"),
        ("zzz", ["rank", "alpha"], None),
        ("", ["rank"], None),
        ("x", [], None),
    ],
)
def test_closest(word, known, found):
    assert closest(word, known) == found


def test_values_and_paths_as_messages_show_them():
    assert show_path(("deltas", 0, "target", "any", 1)) == "deltas[0].target.any[1]"
    assert show_path(()) == ""
    assert [show_value(v) for v in ("a", True, None, 3, 0.5, [], {})] == [
        '"a"', "true", "nothing (null)", "3", "0.5", "a list", "a mapping",
    ]  # fmt: skip
    assert len(show_value("x" * 500)) <= 60
