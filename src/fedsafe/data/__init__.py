"""Conversations in, packed batches of tokens out."""
