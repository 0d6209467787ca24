"""The contract that every method keeps; `deltaspec.testing.check_method` checks it."""
