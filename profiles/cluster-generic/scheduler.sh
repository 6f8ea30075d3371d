# Read by submit, status and cancel: where jobs leave their exit status and output, and the commands of the scheduler
# that is here. For another scheduler write a file like pbs.sh, and name it below.
folder=$PWD/logs/cluster
mkdir -p "$folder"
here=$(dirname "$0")
if command -v bsub > /dev/null; then
    . "$here/lsf.sh"
elif command -v qconf > /dev/null; then
    . "$here/sge.sh"
elif command -v qsub > /dev/null; then
    . "$here/pbs.sh"
else
    echo "error: none of bsub (LSF), qconf (Grid Engine) and qsub (PBS) is here. Run this on a login node." >&2
    exit 1
fi
