"""The roles of weights, and the modules that methods swap in."""
