"""Side-by-side measurements: rivals interleaved in one run, ratios reported. The command line is tools/bench.py."""
