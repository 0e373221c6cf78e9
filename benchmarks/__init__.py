"""Side-by-side measurements, one file a subject; `python -m benchmarks` and tools/bench.py print them."""
