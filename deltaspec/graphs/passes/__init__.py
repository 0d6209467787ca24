"""Passes over region graphs, one file each; `run.py` has their order.

A pass knows a graph, no delta.
"""
