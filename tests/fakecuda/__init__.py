"""A CUDA device that is host memory, for a torch without CUDA: it shows where tensors lie, and no more.

`python -m tests.fakecuda.run pretrain/train.py --config ...` runs a program on it. `docs/development.md` says what it can
show and what it cannot.
"""
