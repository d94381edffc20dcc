"""Many tasks over one folder, on Slurm or in a pool of processes on this machine.

A unit of work is a name, a workload does it, and only its published result counts as done; the
scheduler's view never matters. Nothing here depends on keys and values.
"""
