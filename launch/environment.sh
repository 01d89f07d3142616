# Sourced by the other scripts, from the repository's top folder.

error() { # bad input
  echo "error: $*" >&2
  exit 2
}

# show_help SCRIPT: prints the comment that it begins with.
show_help() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$1"
  exit
}

# run COMMAND...: runs it, or prints it where `dry_run` is set: by descriptor 3, to be seen where output is captured.
exec 3>&1
run() {
  if [ -z "$dry_run" ]; then
    "$@"
    return
  fi
  local word line=
  for word; do
    [[ $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }" >&3
}

# one_word FLAG=VALUE, positive FLAG=VALUE: print the value when it is one.
one_word() {
  [[ ${1#*=} =~ ^[a-zA-Z0-9_.][a-zA-Z0-9_.:,@%+/-]*$ ]] || error "$(printf %q "$1") is not one word: use letters, digits and ._:,@%+/-"
  echo "${1#*=}"
}

positive() {
  [[ ${1#*=} =~ ^[1-9][0-9]{0,4}$ ]] || error "$1 is not a whole number of 1 or more: write one, such as ${1%%=*}=8"
  echo "${1#*=}"
}

# local_path PATH: prints it with ~ as the home, which no shell does within --flag=~/x.
local_path() {
  # shellcheck disable=SC2088  # that is what is looked for
  case $1 in
    '~'|'~/'*) echo "$HOME${1#\~}" ;;
    '~'*) error "$1 is in another user's home: write its path in full" ;;
    *) echo "$1" ;;
  esac
}

# read_training ARGUMENT...: sets `workdir` to that of a training, or to nothing, and `config` to its file; refuses what
# no training can do with.
# shellcheck disable=SC2034  # who calls it reads the workdir
read_training() {
  local argument
  config='' workdir=''
  for argument; do
    case $argument in
      --config=*://*|--workdir=*://*) error "$argument is no path: give one on storage that all machines see, such as" \
        'that of a mounted bucket' ;;
      --config=?*) config=${argument#*=} config=${config%%:*} ;;
      --workdir=?*) workdir=${argument#*=} ;;
      --distributed*) error "$argument is set by this script: leave it out" ;;
    esac
  done
  [ -n "$config" ] || error 'the config is missing: write --config=FILE.py:STAGE after --'
}

# install_var_jax WHAT: makes .venv when missing and installs WHAT ('.' or '.[extra]') into it, unless that was done.
install_var_jax() {
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    error "$python is missing or older than 3.11: install Python 3.11 or newer, or set PYTHON=/path/to/it"
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  if [ "$(cat ".venv/installed $1" 2>/dev/null)" != "$(cksum setup.py)" ]; then
    echo "installing $1 into .venv"
    # Python compiles the modules that are used, when they are: half of the time that pip would take.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable "$1"
    cksum setup.py > ".venv/installed $1"
  fi
}
