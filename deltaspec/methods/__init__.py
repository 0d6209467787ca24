'''Methods: what each declares, and the names that an author needs. A method is one class, in one file of any package.

Knows the facts of a module (`backbone/table.py`), but no spec, plan or compiled model; one method knows no other. No
torch at import.

This one learns a factor for every output of a linear layer:

```python
from deltaspec.methods import Init, Method, MethodParams, Promises, Refusal, TensorSpec


class GainParams(MethodParams):
    """Parameters of gain."""

    start: float = 1.0
    """Value that every factor starts with."""


class Gain(Method):
    """A factor for every output."""

    name = "gain"
    summary = "scales each output of a linear layer"
    paper = "none: an example"
    Params = GainParams
    promises = Promises(identity_at_start=False, weight="add", per_row=True)  # `start` need not be 1
    default_roles = ("mlp.down",)

    def refuse(self, site, params):
        """Take linear layers that are called."""
        if site.parameter is not None or site.kind != "linear" or site.host is not None:
            return Refusal(f"gain does not take {site.row.type}", "select the linear layers inside it")
        return None

    def tensors(self, site, params):
        """Declare the factors, `[out]`."""
        return (TensorSpec("gain", (site.row.out_features,), Init("constant", params.start)),)

    def apply(self, form, params, t, x, base):
        """Compute base(x) · gain."""
        return base(x) * t.gain

    def fold(self, site, params, t, weights):
        """Scale the rows of the weight, and the bias."""
        scaled = {"weight": weights["weight"] * t.gain[:, None]}
        return scaled | ({"bias": weights["bias"] * t.gain} if "bias" in weights else {})
```

The package registers it in its `pyproject.toml` under the entry-point group of this name:

```toml
[project.entry-points."deltaspec.methods"]
gain = "my_package:Gain"
```

`Method` says what else a method may declare, and `deltaspec.testing.check_method("gain")` checks in the package's own
tests what every method promises. A module that declares a method imports torch only inside functions: specs are
validated where torch is not installed.
'''

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.names.packages import given_by

if TYPE_CHECKING:
    from deltaspec.methods.base import Method as Method
    from deltaspec.methods.declarations import Form as Form
    from deltaspec.methods.declarations import Init as Init
    from deltaspec.methods.declarations import MethodParams as MethodParams
    from deltaspec.methods.declarations import Promises as Promises
    from deltaspec.methods.declarations import Refusal as Refusal
    from deltaspec.methods.declarations import Site as Site
    from deltaspec.methods.declarations import TensorSpec as TensorSpec
    from deltaspec.methods.registry import builtin_methods as builtin_methods
    from deltaspec.methods.registry import methods as methods
    from deltaspec.methods.shared.rank import Rank as Rank

_HOME = {
    **dict.fromkeys(("Form", "Init", "MethodParams", "Promises", "Refusal", "Site", "TensorSpec"), "declarations"),
    "Method": "base",
    "Rank": "shared.rank",
    **dict.fromkeys(("builtin_methods", "methods"), "registry"),
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = given_by(__name__, _HOME)
