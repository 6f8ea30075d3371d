# LSF; pbs.sh says what each function is for.
job_id=LSB_JOBID

submit_job() {
    [ "$5" = 0 ] && gpus='' || gpus="-gpu num=$5"
    # shellcheck disable=SC2086  # two words or none
    bsub -J "$1" -n "$2" -R "span[hosts=1] rusage[mem=${3}MB]" -M "${3}MB" -W "$4" -oo "$folder/%J.log" $gpus |
        sed 's/^Job <\([0-9]*\)>.*/\1/'
}

forgotten() {
    bjobs -noheader -o stat "$1" 2>&1 | grep -E -q 'is not found|^(DONE|EXIT)$'
}

cancel_jobs() {
    bkill "$@"
}
