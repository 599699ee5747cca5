"""A run's configuration: its keys (`schema`), read from JSON and checked."""
