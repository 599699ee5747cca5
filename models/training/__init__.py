"""What trains a method: its base class, the phases, the epoch loop, and checkpoints."""
