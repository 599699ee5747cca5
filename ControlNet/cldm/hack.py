"""The published switches for quieter logs and less memory."""


def disable_verbosity() -> None:
    """Let transformers report errors only."""
    from transformers import logging

    logging.set_verbosity_error()


def enable_sliced_attention() -> None:
    """Do nothing: attention here never holds all scores in memory (scaled_dot_product_attention)."""
