"""Writes datasets into the project's layout."""
