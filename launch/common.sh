# What the launch files share; they read it with `source`.
set -euo pipefail

# usage FILE: tells the comment at the top of it.
usage() { sed -n '2,${/^# /!q;s/^# //p;}' "$1"; }

# fail WHAT: ends with one line on a mistake of the user.
fail() {
  echo "error: $1" >&2
  exit 2
}

# show WORDS...: prints a command line as one could type it.
show() {
  local word line="" quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'${word//"'"/$quote}'"
    line+=" $word"
  done
  echo "${line# }"
}

# check_command ROOT NAME: fails unless there is python -m launch.NAME.
check_command() {
  [[ $2 =~ ^[a-z]+$ && $2 != command && -f $1/launch/$2.py ]] ||
    fail "no such command: ${2:-(none)}; give one of launch/, such as train, and its flags"
}
