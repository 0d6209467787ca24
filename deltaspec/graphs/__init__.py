"""fx graphs: built from formulas, joined, rewritten by passes.

Knows no spec, no plan and no attached set; what it must know of rows it says as protocols.
"""
