"""Side-by-side measurements, one file a subject; tools/bench.py prints them."""
