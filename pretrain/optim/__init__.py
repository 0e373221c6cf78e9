"""The learning rate over the run, parameter groups, and the optimizers."""
