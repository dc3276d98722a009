"""Launching distributed runs and observing them: the only part that executes attention operators."""
