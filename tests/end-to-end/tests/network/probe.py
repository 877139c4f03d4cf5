# Tries to reach every target by TCP, UDP and raw packets, as root; prints the targets that answered.
# argv: port, then addresses or names.
import socket
import struct
import sys

PORT = int(sys.argv[1])
BOUND = 10


def family(target):
    return socket.AF_INET6 if ":" in target else socket.AF_INET


def tcp(target):
    try:
        with socket.create_connection((target, PORT), timeout=BOUND) as stream:
            stream.sendall(b"question")
            stream.settimeout(BOUND)
            return stream.recv(64) != b""
    except OSError:
        return False


def udp(target):
    try:
        with socket.socket(family(target), socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.connect((target, PORT))
            sock.send(b"question")
            return sock.recv(64) != b""
    except OSError:
        return False


def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def raw(target):
    """A SYN and an echo request that no socket of the kernel makes; whether they answer is not asked."""
    try:
        if family(target) == socket.AF_INET6:
            with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
                sock.sendto(struct.pack("!BBHHH", 128, 0, 0, 1, 1), (target, 0))
            return
        address = socket.inet_aton(socket.gethostbyname(target))
        syn = struct.pack("!HHIIBBHHH", 40000, PORT, 1, 0, 5 << 4, 2, 65535, 0, 0)
        source = socket.inet_aton("10.9.8.7")
        pseudo = source + address + struct.pack("!BBH", 0, 6, len(syn))
        syn = syn[:16] + struct.pack("!H", checksum(pseudo + syn)) + syn[18:]
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(syn), 1, 0, 64, 6, 0) + source + address
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            sock.sendto(head + syn, (target, 0))
        echo = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
        echo = echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:]
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            sock.sendto(echo, (target, 0))
    except OSError:
        pass


# Below IP, out of every interface there is.
for _, name in socket.if_nameindex():
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as sock:
            for target in sys.argv[2:]:
                if family(target) == socket.AF_INET and target[0].isdigit():
                    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 17, 0)
                    head += socket.inet_aton("10.9.8.7") + socket.inet_aton(target)
                    packet = head + struct.pack("!HHHH", 40000, PORT, 8, 0)
                    sock.sendto(packet, (name, 0x0800, 0, 0, b"\0" * 6))
    except OSError:
        pass

for target in sys.argv[2:]:
    raw(target)
    if tcp(target) or udp(target):
        # Its own loopback is the sandbox's, not the node's: nobody listens there.
        print(target, flush=True)
