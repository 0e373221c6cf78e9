"""What a run will take before it is started: memory of each rank, time of a step, and the layouts that fit a cluster."""
