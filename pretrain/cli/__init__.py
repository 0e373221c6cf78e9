"""Command lines: the arguments that the tools share, and how a tool ends."""
