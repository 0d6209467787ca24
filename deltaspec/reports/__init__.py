"""Plans, models and methods drawn for people.

Prints nothing and decides nothing; the command line prints.
"""
