"""What is in a corpus, where its documents came from, whether its files are whole, and what a run read of it.

Everything here returns plain JSON values, which `tables` lays out as text. Nothing imports torch.
"""
