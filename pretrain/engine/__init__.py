"""DeepSpeed behind one door: its configuration, the sharded model, one optimizer step, and the gate before it."""
