"""Planning: spec × model to a `Plan`, its text and its lock. Every user error ends here.

Makes no tensor of a delta and changes no model.
"""
