"""The exemplar memory."""
