"""Documents: YAML and JSON with positions, read strictly; files written whole or not at all.

Knows nothing of what a document means: only its messages speak of specs. No torch.
"""
