"""The tensors of deltas."""
