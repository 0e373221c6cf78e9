"""The work of a Slurm job before training starts and after it has ended."""
