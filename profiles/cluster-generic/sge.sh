# Grid Engine; pbs.sh says what each function is for. `smp` and `gpu` are the usual names of the parallel environment
# and of the GPU resource, see `qconf -spl` and `qconf -sc`.
job_id=JOB_ID

submit_job() {
    [ "$5" = 0 ] && gpus='' || gpus=",gpu=$5"
    # Memory is per core.
    qsub -terse -N "$1" -V -cwd -j y -o "$folder/" -pe smp "$2" -l "h_vmem=$(($3 / $2))M,h_rt=$(($4 * 60))$gpus"
}

forgotten() {
    qstat -j "$1" 2>&1 | grep -q 'do not exist'
}

cancel_jobs() {
    qdel "$@"
}
