"""The same modules under other names."""

from __future__ import annotations

import pytest

from deltaspec.names.prefixes import Prefix, prefixes

HERE = ["", "bert", "bert.layer", "bert.layer.0", "bert.layer.0.q", "bert.layer.1", "bert.layer.1.q", "head"]


@pytest.mark.parametrize(
    "sites, expected",
    [
        (["bert.layer.0.q"], Prefix()),
        (["layer.0.q", "layer.1.q"], Prefix("", "bert")),
        (["model.bert.layer.0.q", "model.bert.layer.1.q"], Prefix("model", "")),
        (["roberta.layer.0.q", "roberta.layer.1.q"], Prefix("roberta", "bert")),
        ([""], Prefix()),
    ],
)
def test_where_names_are_found(sites, expected):
    assert prefixes(sites, HERE)[0] == expected
    assert all(expected.to_here(site) in HERE for site in sites)
    assert all(expected.to_saved(expected.to_here(site) or "") == site for site in sites)


def test_names_that_are_nowhere():
    assert prefixes(["layer.2.q"], HERE) == []  # no other layer is taken for it
    assert prefixes(["1.q"], ["", "0", "0.q"]) == []
    assert prefixes(["0.q"], ["", "q"]) == [Prefix("0", "")]
    assert Prefix("model", "bert").to_here("other.q") is None
    assert Prefix("model", "bert").to_here("model") == "bert"
