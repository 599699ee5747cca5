"""The methods: one file each, found by name in `models.catalogue`.  Importing this package does not import torch."""
