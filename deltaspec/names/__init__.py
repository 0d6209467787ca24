"""Dotted names: patterns on them, and folding."""
