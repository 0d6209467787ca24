"""The same numbers everywhere: golden answers of saved deltas, compared with what PEFT, ONNX Runtime or a server gives.

Uses compiled models as a user would.
"""

from deltaspec.verification.check import verify as verify

__all__ = ["verify"]
