"""One run, from its plan to its exit code."""
