"""The embedded miniature: harmless stand-in data and a tiny GPT-2 trained on it."""
