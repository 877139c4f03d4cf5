# Measures a path to serve.py; prints seconds: of a download, of an upload, and of the median connect.
# argv: address, port, bytes, connects.
import json
import socket
import statistics
import sys
import time

ADDRESS = (sys.argv[1], int(sys.argv[2]))
SIZE, CONNECTS = int(sys.argv[3]), int(sys.argv[4])


def connect():
    start = time.monotonic()
    stream = socket.create_connection(ADDRESS, timeout=60)
    return stream, time.monotonic() - start


def transfer(way):
    block = bytearray(1 << 18)
    stream, _ = connect()
    start = time.monotonic()
    stream.sendall(way + SIZE.to_bytes(8, "big"))
    done = 0
    if way == b"d":
        while count := stream.recv_into(block):
            done += count
    else:
        while done < SIZE:
            done += stream.send(memoryview(block)[: min(SIZE - done, len(block))])
        assert stream.recv(1) == b"."
    took = time.monotonic() - start
    assert done == SIZE, f"{done} bytes of {SIZE}"
    stream.close()
    return took


def connects():
    for _ in range(CONNECTS):
        stream, took = connect()
        stream.close()
        yield took


print(json.dumps({"d": transfer(b"d"), "u": transfer(b"u"), "c": statistics.median(connects())}))
