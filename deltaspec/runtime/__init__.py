"""The active set: the forwards it needs, put in and taken out; threads and views.

Knows neither files nor libraries nor what the rows of a batch are under; what it asks of those above is in `ports.py`.
"""
