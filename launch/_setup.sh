# Sourced by the other scripts in this folder: finds Python, makes .venv in the checkout and installs the project in it.
# Sets `root` (the checkout, also the working directory from here on) and `python` (the environment's interpreter).
# shellcheck shell=bash

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$root"
python="$root/.venv/bin/python"

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# Whether a command is a Python that the project supports; a name may exist and still not run (version managers' shims).
is_supported_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_supported_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found (tried python3, python3.13, python3.12, python3.11); install one and try again"
}

ensure_environment() {
    if is_supported_python "$python" && "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [[ -e .venv && ! -e .venv/pyvenv.cfg ]]; then
        fail "$root/.venv exists but is no virtual environment; move it away and try again"
    fi
    local base
    base="$(find_python)" || exit 1
    if ! "$base" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        local version
        version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        fail "$base cannot make virtual environments (no ensurepip); on Debian and Ubuntu: apt install python$version-venv"
    fi
    say "Making the environment .venv with $("$base" --version) ..."
    "$base" -m venv --clear .venv || fail "$base -m venv .venv failed; see the message above"
}

# Changes whenever the installation has to be done again. The path counts too: an editable install points to it.
installation_stamp() {
    "$python" - <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version}\n{pathlib.Path.cwd()}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
}

ensure_installation() {
    local stamp_file=.venv/.pldr-train-stamp stamp
    stamp="$(installation_stamp)"
    if [[ -e "$stamp_file" && "$(<"$stamp_file")" == "$stamp" ]]; then
        return
    fi
    local pip=("$python" -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt)
    say "Installing PyTorch (the first time this takes minutes) ..."
    # First and by itself, so that no other package's wishes choose its build.
    "${pip[@]}" torch || fail "PyTorch could not be installed; see the message above"
    say "Installing pldr_train and what it needs ..."
    # DeepSpeed comes as source; its kernels are built where they are first used, not here.
    export DS_BUILD_OPS=0
    "${pip[@]}" -e ".[dev]" || fail "the project could not be installed; see the message above"
    printf '%s\n' "$stamp" >"$stamp_file"
    say "Installed."
}

ensure_environment
ensure_installation
