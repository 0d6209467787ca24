"""Checks of a document, which say in its author's words what is wrong. Build no spec."""
