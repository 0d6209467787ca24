"""Checking a document: what is wrong with it, in the author's words. Never imports torch."""
