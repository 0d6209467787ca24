"""Roles: what the parts of an architecture are called, one data file an architecture.

Knows no model object and no spec. No torch.
"""
