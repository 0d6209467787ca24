"""Costs: what a step of training takes, counted before a weight is loaded.

Knows plans, and is given what compiles one; makes no tensor that has values.
"""
