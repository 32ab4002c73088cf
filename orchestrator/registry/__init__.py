"""Immutable, numbered versions of models, the aliases that point at them, and the log of who moved what and why."""
