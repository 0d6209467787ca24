"""Other models out of an active set: merged plain ones, deltas without what only training needed.

Changes nothing in what it is given.
"""
