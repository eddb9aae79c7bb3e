# Sourced by quickstart.sh and test.sh from the project's folder: an environment with torch, BasicSR and this plugin.
# The active environment if there is one, else .venv, made here if need be. $1: extras of setup.py to install.

suits() { "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python python3.12 python3.11 python3.10 python3.9 none; do
            suits "$python" && break
        done
        if [ "$python" = none ]; then
            echo "Python 3.9 to 3.12 is needed (BasicSR does not install on 3.13) and not found." >&2
            exit 1
        fi
        echo "Making .venv with $("$python" --version)."
        "$python" -m venv .venv
    fi
    . .venv/bin/activate
fi
if ! suits python; then
    echo "The active environment has $(python --version); Python 3.9 to 3.12 is needed." >&2
    exit 1
fi

has() { python -c "import sys; from importlib.metadata import version; [version(name) for name in sys.argv[1:]]" "$@" 2>/dev/null; }

# In this order and without build isolation: BasicSR's setup.py needs torch, and an isolated build would download it again.
has torch torchvision || python -m pip install torch torchvision
has basicsr || {
    python -m pip install cython numpy 'setuptools<82' wheel
    python -m pip install --no-build-isolation basicsr
}
python -m pip install --quiet -e ".[$1]"
