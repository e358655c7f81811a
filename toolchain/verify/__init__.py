"""Verification against transformers on the same weights."""
