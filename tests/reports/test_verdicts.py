"""Why a delta changes a module: a derived one is where its sources are."""

from blends import Net, X, spec
from nets import spec as read_spec
from weight_methods import gpt2

import deltaspec


def test_tree_and_explain_show_it_where_its_sources_are():
    from deltaspec.backbone.observations import Observations
    from deltaspec.backbone.tabulate import tabulate
    from deltaspec.reports.tree import targets
    from deltaspec.reports.verdicts import find_row, verdicts

    model, loaded = Net(), deltaspec.load(spec(target="a"))
    table = tabulate(model)
    assert [match.row.fqn for match in targets(loaded, 2, table)[0]] == ["a"]
    for fqn in ("a", "b"):
        found = verdicts(loaded, table, Observations(model, X), find_row(table, fqn))
        assert [(v.delta, v.taken) for v in found] == [(n, fqn == "a") for n in ("french", "legal", "blend")]
        assert found[2].outcome.startswith("as its source french: ")


def test_a_site_that_cannot_read_another_modules_input_says_why():
    from deltaspec.backbone.observations import Observations
    from deltaspec.backbone.tabulate import tabulate
    from deltaspec.reports.verdicts import find_row, verdicts

    delta = {"name": "d", "method": "parallel_adapter", "params": {"input_of": "ln_f"}, "target": {"path": "**.c_proj"}}
    model = gpt2()[0]
    table = tabulate(model)
    row = find_row(table, "transformer.h.0.mlp.c_proj")
    (found,) = verdicts(deltaspec.load(read_spec(delta)), table, Observations(model), row)
    assert not found.taken and "ln_f does not run once before each end" in found.outcome
