"""Quick ways through a model give what the plain ones give: modules, what lies below them, and its size."""

import pytest
from module_trees import Part, circular, shared, tied, tree
from torch import nn

from deltaspec.backbone.tabulate import tabulate
from deltaspec.names.paths import is_inside
from deltaspec.selection.subtree import Subtrees


@pytest.mark.parametrize("build", [tree, tied, shared, circular, Part, lambda: nn.Linear(2, 2)])
def test_modules_subtrees_and_sizes(build):
    net = build()
    table = tabulate(net)
    subtrees = Subtrees(table)
    for row in table.rows:
        below = [r for r in table.rows if any(is_inside(name, row.fqn) for name in (r.fqn, *r.aliases))]
        assert {r.fqn for r in subtrees.of(row)} == {r.fqn for r in below}
        if build is not circular:
            assert row.subtree_parameters == sum(p.numel() for p in net.get_submodule(row.fqn).parameters())
    assert table.parameters == sum(p.numel() for p in net.parameters())
