"""What a Slurm job does around the training: before it, and once it has ended."""
