"""The language of specs: what one may say, how it is read, and what is wrong with one.

Knows no model and builds no tensor. No torch at import.
"""
