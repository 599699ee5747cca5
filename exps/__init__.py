"""Experiments of many runs; they start main.py and compress/run.py as commands."""
