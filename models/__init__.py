"""The methods: one file each, found by name in `models.catalogue`.  Importing this package does not import torch."""


def __getattr__(attribute: str):
    """METHODS: the class of every method by name, all imported."""
    if attribute != "METHODS":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    from models import catalogue

    return {name: catalogue.load(name) for name in catalogue.methods()}
