"""Clients on other machines: what travels, who is there, and both ends of a visit.

Knows no engine: `Post` carries the letters, and `federated.flower` is one.
"""
