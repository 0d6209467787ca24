"""Deltas on disk: atomic writes, saved directories, pickles, and what identifies a backbone."""
