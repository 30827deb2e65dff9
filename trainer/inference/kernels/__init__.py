"""Compiled functions that compute with compressed weights."""
