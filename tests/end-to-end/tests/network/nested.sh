# Makes a network namespace within the sandbox, with a way out through the sandbox's own, and tries
# from there. argv: port, the public address, one without a route, the forbidden ones.
set -eu
port=$1 public=$2 unroutable=$3
shift 3
modprobe veth
unshare --net sleep 1000 &
inner=$!
trap 'kill $inner' EXIT
# Until it has its namespace.
while [ "$(readlink /proc/$inner/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add outer type veth peer name inner netns $inner
ip address add 10.99.0.1/24 dev outer
ip link set outer up
echo 1 > /proc/sys/net/ipv4/ip_forward
within() { nsenter --target $inner --net -- "$@"; }
within ip address add 10.99.0.2/24 dev inner
within ip link set inner up
within ip route add default via 10.99.0.1
within /usr/bin/python3 -c '
import errno, socket, sys
for target in sys.argv[1:]:
    address, port = target.rsplit(":", 1)
    try:
        stream = socket.create_connection((address, int(port)), timeout=30)
        stream.sendall(b"hello")
        print(target, stream.recv(64).decode())
    except OSError as error:
        print(target, errno.errorcode.get(error.errno, error))
' "$public:$port" "$public:9" "$unroutable:$port" $(printf "%s:$port " "$@")
