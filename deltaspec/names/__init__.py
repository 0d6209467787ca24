"""Dotted names: patterns over them, folding many into few, what is below what.

Works on strings alone; knows no module and no spec. No torch.
"""
