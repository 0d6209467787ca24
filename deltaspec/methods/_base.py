"""The old home of what `deltaspec.methods` exports; it goes with the next release."""

import warnings

from deltaspec.methods.base import Method
from deltaspec.methods.declarations import Form, Init, InitKind, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rank import Rank

__all__ = ["Form", "Init", "InitKind", "Method", "MethodParams", "Promises", "Rank", "Refusal", "Site", "TensorSpec"]

_MOVED = "deltaspec.methods._base goes with the next release; import from deltaspec.methods"
warnings.warn(_MOVED, DeprecationWarning, stacklevel=2)
