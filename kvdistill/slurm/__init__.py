"""Many tasks over one folder: on Slurm, or in a pool of processes on this machine.

The truth is the folder, never the scheduler. Units of work are names; whether one is done is
asked of the workload. ``ledger`` owns every file name, ``worker`` runs one task, ``submit`` and
``local`` start many, ``status`` reads what happened. Nothing here knows of keys and values.
"""
