"""What would not change if the method changed: config, engine, checkpoints, schedules, evaluation."""
