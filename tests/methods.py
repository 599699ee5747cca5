"""The class of every method, by name."""

from models import catalogue

METHODS = {name: catalogue.load(name) for name in catalogue.methods()}
