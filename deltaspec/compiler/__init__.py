"""`CompiledModel`, and the ways to make one: compile, restore, copy, unpickle.

Wires the parts together; what a part does is below.
"""
