# Answers TCP and UDP on every address of this network namespace, and prints what came: each accepted
# connection and datagram, and the destination of each IP packet of the device that is for the port.
# argv: device, port.
import select
import socket
import sys

DEVICE, PORT = sys.argv[1], int(sys.argv[2])


def say(text):
    print(text, flush=True)


tcp = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
udp.bind(("::", PORT))
wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
wire.bind((DEVICE, 3))
say("ready")

while True:
    ready, _, _ = select.select([tcp, udp, wire], [], [])
    if tcp in ready:
        stream, peer = tcp.accept()
        say(f"accepted {peer[0]}")
        stream.settimeout(5)
        try:
            stream.sendall(stream.recv(64))
        except OSError:
            pass
        stream.close()
    if udp in ready:
        data, peer = udp.recvfrom(2048)
        say(f"datagram {peer[0]}")
        udp.sendto(data, peer)
    if wire in ready:
        packet, address = wire.recvfrom(65536)
        if address[2] == socket.PACKET_OUTGOING:
            continue
        if address[1] == 0x0800 and packet[9] in (1, 6, 17):
            body = packet[(packet[0] & 15) * 4:]
            if packet[9] == 1 or int.from_bytes(body[2:4], "big") == PORT:
                say("packet " + socket.inet_ntop(socket.AF_INET, packet[16:20]))
        elif address[1] == 0x86DD and packet[6] in (6, 17, 58):
            echo = packet[6] == 58 and packet[40] == 128
            if echo or packet[6] != 58 and int.from_bytes(packet[42:44], "big") == PORT:
                say("packet " + socket.inet_ntop(socket.AF_INET6, packet[24:40]))
