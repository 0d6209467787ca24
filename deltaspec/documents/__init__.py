"""Documents: YAML and JSON with positions, read strictly; files written whole or not at all.

Knows nothing of what a document says. No torch.
"""
