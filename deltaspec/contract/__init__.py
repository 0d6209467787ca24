"""What every method promises, clause by clause, checked on a model.

Uses compiled models as a user would.
"""
