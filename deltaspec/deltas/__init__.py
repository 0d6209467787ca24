"""The tensors of deltas: where they live, how they start, how many alike are stacked, how some are combined.

Knows no forward and no active set.
"""
