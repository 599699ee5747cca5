"""What a run leaves: metrics, history, reports and pictures."""
