"""Predictions about a run that has not started: memory of each rank, time of a step, and the layouts that fit a cluster."""
