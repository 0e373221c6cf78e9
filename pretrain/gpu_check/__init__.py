"""Checks of a GPU, in one command of ten minutes: first that results are right, then how fast a 1B model trains.

Each stage is a process of its own with a limit of its own, so that a hang, a crash or a full memory costs one stage. What a
stage finds is written at once. Stages train through the same trainer as every run, on random tokens that are made here.
"""
