#!/usr/bin/env bash
# Runs a command as the owner of adapters/, with no capability and no way to get one: the entry point of every service.
#   as-owner COMMAND [ARGUMENT...]
# A container that compose.yaml gave a UID runs as that user from the start, and nothing is left to do here.
# Root needs SETUID and SETGID for it. Ends with 2 where no user can be found who may write adapters.
set -euo pipefail
adapters=/app/adapters

refuse() {
  cat >&2 <<TEXT
adapters belongs to user $user here, and this container's root may not write it: its mode, or a share that takes root's rights away (root_squash)
  make it yours:                  sudo chown -R "\$(id -u):\$(id -g)" adapters
  or, if you can write it, type:  (echo; id -u | sed s/^/UID=/; id -g | sed s/^/GID=/) >> .env
TEXT
  exit 2
}

may_write() {  # a mount that is read-only on purpose, as TensorBoard's, is no reason to refuse
  local made
  made=$(mktemp "$adapters/.as-owner.XXXXXX" 2>&1) || { [[ $made == *'Read-only file system'* ]]; return; }
  rm "$made"
}

if (($(id -u) != 0)); then exec "$@"; fi
user=$(stat --format %u "$adapters") group=$(stat --format %g "$adapters")
if ((user != 0 && user != 65534)); then  # 65534 stands for whoever has no number in this container
  exec setpriv --reuid "$user" --regid "$group" --clear-groups --inh-caps=-all --no-new-privs "$@"
fi
may_write || refuse
# Only a change of user makes setpriv drop them, and root stays root. Without new privileges, exec gives none back.
exec python -I -c '
import ctypes, os, sys

libc, set_no_new_privs, version_3 = ctypes.CDLL(None, use_errno=True), 38, 0x20080522
header, none = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
if libc.prctl(set_no_new_privs, 1, 0, 0, 0) or libc.capset(header, none):
    sys.exit(f"as-owner: capabilities were not dropped: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[1], sys.argv[1:])
' "$@"
