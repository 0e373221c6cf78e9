"""Measurements that a person watches during a run, and the files and services that get them."""
