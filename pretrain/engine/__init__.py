"""Everything that drives DeepSpeed: its configuration, the sharded model, one optimizer step, and the gate before it."""
