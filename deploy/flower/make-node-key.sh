#!/bin/sh
# The key that a node proves itself with: ECDSA on NIST's curve P-384, as Flower wants it.
#
#   sh make-node-key.sh FILE        # run it on the node's own machine
#
# FILE is the private key and stays there, readable by its owner alone; FILE.pub goes to the server.
set -eu
umask 077

fail() {
    echo "make-node-key: $*" >&2
    exit 1
}

[ $# -eq 1 ] || fail "give one file name for the private key; got $# arguments"
case $1 in
    -*) fail "'$1' is no file name" ;;
esac
command -v ssh-keygen >/dev/null || fail "ssh-keygen is not installed; it comes with openssh-client"
for file in "$1" "$1.pub"; do
    [ ! -e "$file" ] || fail "$file exists; move it away to make a new one"
done
ssh-keygen -q -t ecdsa -b 384 -N '' -C "$(basename "$1")" -f "$1"
chmod 644 "$1.pub"
echo "wrote $1 (keep it here) and $1.pub (give it to the server)"
