"""The audit of a corpus: its content, the origin of its documents, damage to its files, and what a run read of it.

Everything here returns plain JSON values, which `tables` lays out as text. Nothing imports torch.
"""
