"""Findings: a code, a place, what is wrong, a suggestion; their wording and the formats they are printed in.

Knows no spec, no model and no method. Imports no other room.
"""
