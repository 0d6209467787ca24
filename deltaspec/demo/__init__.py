"""The demo: two deltas on one real pretrained model, trained, swapped, detached, saved and reloaded.

Uses the public API as a user would.
"""
