"""Plain models out of compiled ones."""
