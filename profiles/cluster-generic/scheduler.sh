# Read by submit, status and cancel: which scheduler this is, and where jobs leave their exit status and output.
if command -v bsub > /dev/null; then
    scheduler=lsf
elif command -v qconf > /dev/null; then
    scheduler=sge
elif command -v qsub > /dev/null; then
    scheduler=pbs
else
    echo "error: none of bsub (LSF), qconf (Grid Engine) and qsub (PBS) is here. Run this on a login node." >&2
    exit 1
fi
folder=$PWD/logs/cluster
mkdir -p "$folder"
