#!/bin/sh
# A certificate authority of one's own, and with it the server's certificate.
#
#   sh make-certificates.sh FOLDER NAME [NAME ...]      # host names and IP addresses that nodes use
#   DAYS=90 sh make-certificates.sh FOLDER NAME         # how long the server's certificate is valid (365)
#
# FOLDER gets ca.crt (give it to every node), ca.key (keep it away from the server), server.crt and
# server.key. Nothing is overwritten. Once ca.key is there it is used again: to renew, move server.crt
# and server.key away and run the same command; nodes keep their ca.crt.
set -eu
umask 077

fail() {
    echo "make-certificates: $*" >&2
    exit 1
}

[ $# -ge 2 ] || fail "give a folder and the server's host names or IP addresses; got $# arguments"
folder=$1
shift
days=${DAYS:-365}
case $days in
    '' | *[!0-9]* | 0*) fail "DAYS is '$days'; give a whole number of days, 1 or more" ;;
esac
command -v openssl >/dev/null || fail "openssl is not installed"
for file in server.crt server.key; do
    [ ! -e "$folder/$file" ] || fail "$folder/$file exists; move it away to make a new one"
done
if [ -e "$folder/ca.key" ] || [ -e "$folder/ca.crt" ]; then
    [ -e "$folder/ca.key" ] && [ -e "$folder/ca.crt" ] ||
        fail "of ca.key and ca.crt only one is in $folder; put the other beside it"
fi

# The server's own processes reach it by localhost, so its certificate always has that too.
names="DNS:localhost,IP:127.0.0.1,IP:::1"
for name in "$@"; do
    case $name in
        localhost | 127.0.0.1 | ::1) ;;
        '' | -* | *[!A-Za-z0-9.:-]*) fail "'$name' is no host name and no IP address" ;;
        *:*:*) names="$names,IP:$name" ;;
        *:*) fail "'$name' has a port; give the name alone" ;;
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
    esac
done

mkdir -p "$folder"
work=$(mktemp -d "$folder/.making.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

new_key() { # FILE
    openssl ecparam -name secp384r1 -genkey -noout -out "$1"
}

quiet() { # openssl talks on stderr even when all is well
    "$@" 2>"$work/said" || fail "openssl refused: $(tail -n 1 "$work/said")"
}

if [ -e "$folder/ca.key" ]; then
    cp "$folder/ca.key" "$folder/ca.crt" "$work/"
else
    new_key "$work/ca.key"
    cat >"$work/ca.cnf" <<END
[req]
distinguished_name = name
x509_extensions = authority
prompt = no
[name]
CN = fedsafe federation
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
END
    quiet openssl req -x509 -new -sha384 -config "$work/ca.cnf" -key "$work/ca.key" \
        -days $((days > 3650 ? days : 3650)) -out "$work/ca.crt"
fi

new_key "$work/server.key"
cat >"$work/server.cnf" <<END
[req]
distinguished_name = name
prompt = no
[name]
CN = fedsafe server
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $names
END
serial=0x$(openssl rand -hex 16)
quiet openssl req -new -sha384 -config "$work/server.cnf" -key "$work/server.key" -out "$work/server.csr"
quiet openssl x509 -req -sha384 -in "$work/server.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" \
    -set_serial "$serial" -days "$days" -extfile "$work/server.cnf" -extensions server -out "$work/server.crt"
quiet openssl verify -CAfile "$work/ca.crt" "$work/server.crt" >"$work/verified"

chmod 600 "$work"/*.key
chmod 644 "$work"/*.crt
for file in ca.key ca.crt server.key server.crt; do
    [ -e "$folder/$file" ] || mv "$work/$file" "$folder/$file"
done
echo "wrote $folder/server.crt, valid for $days days, for $names"
echo "give $folder/ca.crt to every node; the server needs ca.crt, server.crt and server.key, and never ca.key"
