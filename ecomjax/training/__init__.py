"""Training: losses, optimizer, step, loop, checkpoints and logs; knows no tasks."""
