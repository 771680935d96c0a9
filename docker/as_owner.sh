#!/usr/bin/env bash
# The entry point of every service: runs a command as the owner of adapters/, without capabilities or a way to gain any.
#   as-owner COMMAND [ARGUMENT...]
# If UID is set, compose.yaml starts the container as that user, and this script only runs the command.
# Root needs SETUID and SETGID to switch. Exits with 2 if the owner is root or unknown and root cannot write adapters.
set -euo pipefail
adapters=/app/adapters

refuse() {
  cat >&2 <<TEXT
adapters belongs to user $user in this container, and root cannot write it (its mode, or a network share with root_squash)
  to make it yours, type:         sudo chown -R "\$(id -u):\$(id -g)" adapters
  or, if you can write it, type:  (echo; id -u | sed s/^/UID=/; id -g | sed s/^/GID=/) >> .env
TEXT
  exit 2
}

may_write() {  # a mount that is meant to be read-only, such as TensorBoard's, passes too
  local made
  made=$(mktemp "$adapters/.as-owner.XXXXXX" 2>&1) || { [[ $made == *'Read-only file system'* ]]; return; }
  rm "$made"
}

if (($(id -u) != 0)); then exec "$@"; fi
user=$(stat --format %u "$adapters") group=$(stat --format %g "$adapters")
if ((user != 0 && user != 65534)); then  # 65534 (nobody): the owner has no id in this container
  exec setpriv --reuid "$user" --regid "$group" --clear-groups --inh-caps=-all --no-new-privs "$@"
fi
may_write || refuse
# setpriv drops capabilities only when it changes the user. With no_new_privs, exec cannot restore them.
exec python -I -c '
import ctypes, os, sys

libc, set_no_new_privs, version_3 = ctypes.CDLL(None, use_errno=True), 38, 0x20080522
header, none = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
if libc.prctl(set_no_new_privs, 1, 0, 0, 0) or libc.capset(header, none):
    sys.exit(f"as-owner: capabilities were not dropped: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])
' "$@"
