"""What a weight is, and the modules that methods swap in."""
