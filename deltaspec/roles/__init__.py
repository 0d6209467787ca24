"""Roles of modules."""
