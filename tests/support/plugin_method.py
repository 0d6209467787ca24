"""A method of another package, as the registry would find it."""

from typing import Annotated

from pydantic import Field

from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams


class PluginParams(MethodParams):
    """Parameters of the test's own method."""

    tokens: Annotated[int, Field(ge=1)]
    """Number of tokens."""
    places: tuple[int, ...] = ()
    """Some places."""
    undescribed: float | None = None


class Plugin(Method):
    """A method of another package."""

    name = "zz_plugin"
    summary = "a method of another package"
    paper = "none"
    Params = PluginParams
    default_roles = ("attn.q",)

    def tensors(self, site, params):
        return ()

    def apply(self, form, params, t, x, base):
        return base(x)
