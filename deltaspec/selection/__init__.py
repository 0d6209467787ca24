"""Selection: selectors matched against the module table, and why one does not match.

Makes no tensor and knows no plan.
"""
