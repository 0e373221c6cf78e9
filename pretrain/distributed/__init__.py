"""Ranks: how they meet, what they share, which launcher started them, and the signals that reach them."""
