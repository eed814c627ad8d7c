"""The loop's parts: optimizer, schedule, steps, checkpoints, meters."""
