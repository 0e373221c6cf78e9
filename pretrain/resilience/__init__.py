"""Requests to stop, the watchdog, the consistency of ranks, and the guard against harmful steps."""
