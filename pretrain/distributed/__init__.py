"""Ranks: their meeting, the objects they exchange, the launcher that started them, and the signals that reach them."""
