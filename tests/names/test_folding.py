import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaspec.names.folding import fold, ranges, unfold


def test_layers_and_last_segments_fold() -> None:
    names = [f"encoder.layer.{i}.attention.self.{n}" for i in range(12) for n in ("query", "value")]
    assert fold(names) == ["encoder.layer.{0..11}.attention.self.{query,value}"]


def test_gaps_stay_visible() -> None:
    assert fold(f"h.{i}.mlp" for i in (0, 1, 2, 5, 7, 8)) == ["h.{0..2,5,7..8}.mlp"]


def test_one_name_stays_as_it_is() -> None:
    assert fold(["h.3.mlp", "lm_head"]) == ["h.3.mlp", "lm_head"]


def test_two_indices_fold_as_a_product_only_where_they_are_one() -> None:
    full = [f"block.{i}.expert.{j}" for i in range(4) for j in range(8)]
    assert fold(full) == ["block.{0..3}.expert.{0..7}"]
    assert fold(full[:-1]) == ["block.{0..2}.expert.{0..7}", "block.3.expert.{0..6}"]


def test_different_layers_of_different_names_do_not_mix() -> None:
    assert fold(["h.0.q", "h.1.q", "h.0.v"]) == ["h.{0..1}.q", "h.0.v"]


def test_numbers_that_are_not_indices_are_kept() -> None:
    assert fold(["a.01.w", "a.02.w"]) == ["a.01.w", "a.02.w"]


def test_root_and_reserved_characters() -> None:
    assert fold([""]) == [""]
    names = ["odd.a{b", "odd.x,y", "odd.50%"]
    assert [n for p in fold(names) for n in unfold(p)] == names


def test_ranges() -> None:
    assert ranges([3, 1, 2, 9]) == "1..3,9"


def test_a_pattern_of_too_many_names_is_refused_at_once() -> None:
    for pattern in ("a.{0..99999999999999}", "{0..9999}.{0..9999}.{0..9999}"):
        with pytest.raises(ValueError, match="more than"):
            unfold(pattern)


segment = st.one_of(
    st.integers(0, 12).map(str), st.sampled_from(["q", "v", "layer", "01", "0..3", "a,b", "{", "%7B", "}", "é", "{0"])
).filter(lambda s: "." not in s)


@given(st.lists(st.lists(segment, min_size=1, max_size=5).map(".".join), unique=True, max_size=40))
def test_unfold_gives_back_exactly_the_names(names: list[str]) -> None:
    back = [name for pattern in fold(names) for name in unfold(pattern)]
    assert len(back) == len(names)
    assert set(back) == set(names)
