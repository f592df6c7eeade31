"""Runs and sweeps of the command line: options, run folders, logs and Slurm."""
