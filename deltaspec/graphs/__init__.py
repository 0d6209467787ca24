"""torch.fx graphs."""
