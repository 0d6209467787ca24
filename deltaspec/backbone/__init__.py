"""The user's model: described as a table, run to be observed, copied; never written to.

Knows no delta, no method and no spec; what a delta puts in is found by one reserved name. `table.py` needs no torch.
"""
