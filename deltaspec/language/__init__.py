"""The language of specs."""
