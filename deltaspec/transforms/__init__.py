"""Other models out of a compiled one: merged plain ones, deltas without what only training needed.

Changes nothing in the model it starts from.
"""
