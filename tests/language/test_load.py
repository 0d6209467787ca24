"""Loading: documents made of the grammar's own words parse, or have findings."""
# ruff: noqa: E501  # a part of the grammar a line

from hypothesis import given
from hypothesis import strategies as st
from whole import examples

from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec

# Documents made of the grammar's own words: whatever the checks let through must parse.
words = st.sampled_from(
    ["d", "lora", "full", "**.q", "attn.q", ">=3", "a.b", "x y", "", "s", 0, 1, 2, 8.0, 0.5, -1, True, None]
)
atoms = st.sampled_from(
    ["path", "regex", "type", "role", "layers", "shape", "parameter", "ref", "any", "all", "not", "optional"]
)
inner = st.sampled_from(
    ["from", "to", "first", "last", "only", "every", "in", "out", "min", "max", "max_fraction", "sites"]
)
selectors = st.recursive(
    words, lambda s: st.lists(s, max_size=3) | st.dictionaries(atoms | inner, s, max_size=3), max_leaves=8
)
bounds = words | st.dictionaries(inner, words, max_size=2)
entries = st.fixed_dictionaries(
    {"name": st.sampled_from(["d", "e", "d\n", "1"]), "method": st.sampled_from(["lora", "adapter", "bitfit", "full"])},
    optional={
        "params": st.dictionaries(st.sampled_from(["rank", "alpha", "width", "tied", "bias"]), words, max_size=2),
        "target": selectors,
        "overrides": st.lists(st.fixed_dictionaries({"match": selectors, "params": st.dictionaries(st.just("rank"), words)}), max_size=2),
        "expect": st.dictionaries(st.sampled_from(["sites", "trainable"]), bounds, max_size=2),
        "attached": words,
    },
)  # fmt: skip
specs = st.fixed_dictionaries(
    {"deltaspec": st.just(1), "deltas": st.lists(entries, max_size=3)},
    optional={
        "selectors": st.dictionaries(st.sampled_from(["s", "t"]), selectors, max_size=2),
        "expect": st.dictionaries(
            st.sampled_from(["trainable", "untouched"]), bounds | st.lists(selectors, max_size=2)
        ),
        "model": st.dictionaries(st.sampled_from(["type", "architecture"]), words),
        "seed": words,
    },
)


@given(specs)
@examples(400)
def test_whatever_the_checks_let_through_parses_and_reads_back(data):
    try:
        spec = load(data)
    except DeltaSpecError as error:
        assert all(d.message and d.code in CODES for d in error.diagnostics)
    else:
        assert isinstance(spec, DeltaSpec)
        assert load(spec.to_data()) == spec
