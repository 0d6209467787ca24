"""A delta for each row of a batch.

Reads no file. Knows the active set, not the compiled model.
"""
