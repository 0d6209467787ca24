"""Documents as hypothesis makes them."""

from hypothesis import strategies as st

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp"), exclude_characters="\ufeff"), max_size=20),
)
keys = st.text(st.characters(min_codepoint=32, max_codepoint=0x2000, exclude_categories=("Cs", "Cc", "Cn")), max_size=8)
trees = st.recursive(
    scalars, lambda kids: st.lists(kids, max_size=4) | st.dictionaries(keys, kids, max_size=4), max_leaves=20
)
documents = st.dictionaries(keys, trees, max_size=4)
