"""Runs and sweeps as the command line makes them: options, run folders, logs, Slurm."""
