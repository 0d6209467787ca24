"""Checks that need a machine of their own kind, apart from the test suite."""
