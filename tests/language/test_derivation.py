"""Derived deltas in a document: wrong ones, circles, and the published schema."""

import pytest
from blends import spec

import deltaspec
from deltaspec.methods.registry import methods


def finding(**blend):
    entries = spec()["deltas"]
    given = {key.rstrip("_"): value for key, value in blend.items()}
    entries[2] = {key: value for key, value in {**entries[2], **given}.items() if value is not ...}
    return deltaspec.validate({"deltaspec": 1, "deltas": entries})


@pytest.mark.parametrize(
    ("blend", "code", "where", "message", "hint"),
    [
        ({"from_": {"french": 1, "legel": 1}}, "DS223", "from.legel", 'no delta is named "legel"', 'mean "legal"'),
        ({"from_": {"blend": 1}}, "DS224", "from", "circular derivation: blend → blend", "break the circle"),
        ({"from_": {}}, "DS209", "from", "from is an empty mapping", "name the sources"),
        ({"from_": {"french": "1"}}, "DS203", "from.french", "french must be a number", "write 1"),
        ({"from_": ["french"]}, "DS203", "from", "from must be a mapping", None),
        ({"from_": {"french": 1e9}}, "DS204", "from.french", "french must be at most 1000000", None),
        ({"combine": ...}, "DS202", "", 'lacks the key "combine"', "combine: linear"),
        ({"combine": "line"}, "DS205", "combine", 'combine knows no value "line"', 'mean "linear"'),
        ({"method": "lora"}, "DS201", "method", '"method" has no place beside "from"', "delete one of the two"),
        ({"target": "a"}, "DS201", "target", '"target" has no place beside "from"', "its sources' sites"),
        ({"overrides": []}, "DS201", "overrides", '"overrides" has no place beside "from"', None),
        ({"weights": {}}, "DS201", "weights", 'unknown key "weights"', 'mean "from"'),
        ({"from_": ..., "method": "lora"}, "DS201", "combine", '"combine" has no place without "from"', "name the s"),
        ({"params": {"density": 0.5}}, "DS210", "params.density", "linear does not use it", "ties, dare_linear"),
        ({"combine": "ties"}, "DS210", "", "ties needs a density", "density: 0.5"),
        ({"combine": "ties", "params": {"density": 0}}, "DS204", "params.density", "greater than 0", None),
        ({"params": {"alpha": 3}}, "DS201", "params.alpha", 'unknown key "alpha"', None),
        ({"combine": "svd", "params": {"svd_rank": 3}}, "DS201", "params.svd_rank", "svd_rank", 'mean "rank"'),
    ],
)
def test_wrong_documents(blend, code, where, message, hint):
    [found] = finding(**blend)
    assert (found.code, found.where) == (code, f"deltas[2].{where}".rstrip("."))
    assert message in found.message
    assert hint is None or hint in found.suggestion


def test_circles_and_methods():
    entries = spec()["deltas"]
    entries += [{"name": name, "from": {other: 1}, "combine": "cat"} for name, other in (("x", "y"), ("y", "x"))]
    [found] = deltaspec.validate({"deltaspec": 1, "deltas": entries})
    assert found.message in ("circular derivation: x → y → x", "circular derivation: y → x → y")
    mixed = spec()
    mixed["deltas"][1]["method"] = "loha"
    [found] = deltaspec.validate(mixed)
    assert found.code == "DS225" and "french (lora), legal (loha)" in found.message
    for method, words in (("adapter", "adapter does not add to a weight"), ("full", "full does not add to a weight")):
        [found] = deltaspec.validate(spec("svd", {"rank": 2}, method=method, source={}))
        assert found.code == "DS225" and words in found.message
    [found] = deltaspec.validate(spec(method="vera"))
    assert (found.code, found.suggestion) == ("DS225", "use combine: svd")
    [found] = deltaspec.validate(spec("svd", method="c3a", source={"block_size": 2}))
    assert (found.code, found.suggestion) == ("DS210", "write params: {rank: 8}")


def test_the_published_schema_tells_derived_deltas_apart():
    from jsonschema import Draft7Validator, Draft202012Validator

    from deltaspec.language.schema.generate import schema

    for kind in (Draft7Validator, Draft202012Validator):
        validator = kind(schema(methods()))
        assert validator.is_valid(spec("ties", {"density": 0.5}))
        for wrong in (spec(method="lora", combine="sum"), spec(target_="x"), spec(params={"alpha": 1})):
            assert not validator.is_valid(wrong)
        both = spec()
        both["deltas"][2]["method"] = "lora"
        assert not validator.is_valid(both)


def test_weights_that_are_all_zero_are_refused() -> None:
    deltas = [{"name": "a", "method": "lora"}, {"name": "b", "method": "lora"}]
    for weights, found in (({"a": 0, "b": 0.0}, 1), ({"a": 0, "b": 0.5}, 0)):
        blend = {"name": "blend", "from": weights, "combine": "linear"}
        findings = deltaspec.validate({"deltaspec": 1, "deltas": [*deltas, blend]})
        assert [f.code for f in findings] == ["DS204"] * found
