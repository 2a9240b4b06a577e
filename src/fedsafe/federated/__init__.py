"""Rounds: who trains next, with which adapter, and how copies become one."""
