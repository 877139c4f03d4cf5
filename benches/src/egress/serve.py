# The other end of the wire: `d` and eight bytes of a length are answered with that many bytes, `u`
# and a length with one byte when that many have come; whoever closes at once is let go.
# argv: address, port.
import socket
import sys
import threading


def serve(stream):
    with stream:
        head = stream.recv(9, socket.MSG_WAITALL)
        if len(head) < 9:
            return
        left = int.from_bytes(head[1:], "big")
        block = bytearray(1 << 18)
        if head[:1] == b"d":
            while left:
                stream.sendall(memoryview(block)[: min(left, len(block))])
                left -= min(left, len(block))
            return
        while left:
            left -= stream.recv_into(block)
        stream.sendall(b".")


listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=256)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
