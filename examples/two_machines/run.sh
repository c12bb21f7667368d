#!/bin/sh
# A federation of two clients and a server, over TLS, as on three machines: each process has only the files that its
# machine would have. Run: sh examples/two_machines/run.sh [FOLDER]
set -eu
config=$(dirname "$0")/federation.yaml
folder=${1:-$(mktemp -d)}
address=localhost:${PORT:-9443}

# On the server: a certificate authority, the server's certificate, and a pair of keys for each client.
fedsim certs "$folder/certs" --host localhost --clients 2

# To each client goes its own folder, and the config. On real machines: scp -r certs/client-0 clinic-a:
for client in 0 1; do
    mkdir -p "$folder/clinic-$client"
    cp -r "$folder/certs/client-$client" "$config" "$folder/clinic-$client/"
done

# Each client waits for the server, which may start later.
for client in 0 1; do
    (
        cd "$folder/clinic-$client"
        exec fedsim client federation.yaml --server "$address" --certs "client-$client" --partition "$client" \
            --state state > client.log 2>&1
    ) &
done

fedsim server "$config" --listen "$address" --certs "$folder/certs" "output=$folder/runs"
wait
echo "what clinic 0 said:"
cat "$folder/clinic-0/client.log"
