#!/bin/sh
# Names what this machine lacks for building masked_ops, each with the Debian package that has it.
# Usage: system.sh PYTHON
python=$1
compiler=${CXX:-g++}
status=0

missing() {
    echo "$1 is missing: apt-get install $2" >&2
    status=1
}

if command -v "$python" >/dev/null; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Python 3.10 or newer is needed, $python is $("$python" --version): name another with make PYTHON=..." >&2
        status=1
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing python3-venv python3-venv
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
        missing Python.h python3-dev
else
    missing "$python" "python3 python3-venv python3-dev"
fi
command -v "${compiler%% *}" >/dev/null || missing "${compiler%% *}" g++
exit $status
