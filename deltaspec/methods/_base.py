"""The old home of what `deltaspec.methods` exports; it goes with the next release."""

import warnings

from deltaspec.methods.base import Method as Method
from deltaspec.methods.declarations import Form as Form
from deltaspec.methods.declarations import Init as Init
from deltaspec.methods.declarations import InitKind as InitKind
from deltaspec.methods.declarations import MethodParams as MethodParams
from deltaspec.methods.declarations import Promises as Promises
from deltaspec.methods.declarations import Refusal as Refusal
from deltaspec.methods.declarations import Site as Site
from deltaspec.methods.declarations import TensorSpec as TensorSpec
from deltaspec.methods.shared.rank import Rank as Rank

warnings.warn(
    "deltaspec.methods._base goes with the next release; import from deltaspec.methods",
    DeprecationWarning,
    stacklevel=2,
)
