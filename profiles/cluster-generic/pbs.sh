# PBS. Site-specific options (queue, account, name of the GPU resource) belong into submit_job.
job_id=PBS_JOBID # the variable in which a job finds its id

# RULE CORES MEMORY_MB MINUTES GPUS: submit the script on standard input, and print the job's id.
submit_job() {
    [ "$5" = 0 ] && gpus='' || gpus=":ngpus=$5"
    qsub -N "$1" -V -j oe -o "$folder/" -l "select=1:ncpus=$2:mem=$3mb$gpus" -l "walltime=$(($4 * 60))"
}

# ID: whether the scheduler answers that it has no such job (any longer).
forgotten() {
    qstat "$1" 2>&1 | grep -E -q 'Unknown Job|has finished'
}

# ID...: end these jobs.
cancel_jobs() {
    qdel "$@"
}
