"""Helpers of the tests: runs on real ranks, tiny models and corpora, faults, servers, references."""
