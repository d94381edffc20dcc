"""Many tasks over one folder, on Slurm or in a pool of processes on this machine.

A unit of work is a name, a workload does it, and only its published result counts as done; the
scheduler's view never matters. Nothing here depends on keys and values.

    task        what a worker gets: a workload by name, and units
    ledger      every file of the folder: attempts, claims, failures, submitted jobs
    heartbeat   one attempt's identity and liveness
    worker      one task, start to end
    retry       failures, quarantine, units of crashed workers, requeueing
    submit      arrays, single jobs, batch scripts and Dask workers
    launch      one command per job, under torchrun where there are several processes
    local_pool  the same tasks without Slurm
    status      the state of every unit
    client      Slurm's own commands;  signals: the request to stop
"""
