"""Deltas on disk: what a saved set is, written atomically, read with every key accounted for.

Knows the active set, not the compiled model, and nothing of rows.
"""
