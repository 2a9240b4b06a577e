"""Flower carries the letters between server and clients (extra `flower`)."""
