"""Generated functions without `self`: what is called is an argument, whatever the text around it looks like."""

import torch
from torch import fx

from deltaspec.graphs.lifted import SPLAT_ARGS, SPLAT_KWARGS, to_function, without_self


def test_only_what_is_called_loses_its_self():
    """The text comes from torch.fx, which may write it in another way tomorrow: only its syntax is counted on."""
    source = 'def forward(self , base, *args):\n    é = base.self.up;  x = self.base ("self.base(", é)\n    return x\n'
    assert without_self(source) == (
        'def forward(base, *args):\n    é = base.self.up;  x = base ("self.base(", é)\n    return x\n'
    )
    source = "def forward(self, base, a):\n    return self.base(1, _splat_args = a, _splat_kwargs=a[0])\n"
    assert without_self(source) == "def forward(base, a):\n    return base(1, *a, **a[0])\n"


def test_a_graph_becomes_a_function_of_what_it_calls():
    graph = fx.Graph()
    base, args, kwargs = (graph.placeholder(name) for name in ("base", "*args", "**kwargs"))
    out = graph.call_module("base", (2,), {SPLAT_ARGS: args, SPLAT_KWARGS: kwargs})
    graph.call_function(torch.neg, (out,))  # nobody uses it
    graph.output(out)
    function, source = to_function(graph, "test")
    assert function(lambda *a, **k: (a, k), 3, d=4) == ((2, 3), {"d": 4})
    assert "self" not in source and "neg" not in source and base.users == {}
