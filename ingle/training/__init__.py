"""Parts of the training loop: optimizer, schedule, steps, checkpoints, run folder, meters."""
