"""The room with picows, a WebSocket library in C, on uvloop.  picows_room.py PORT"""

import sys

import uvloop
from picows import WSListener, WSMsgType, ws_create_server

members = set()


class Member(WSListener):
    def on_ws_connected(self, transport):
        members.add(transport)

    def on_ws_disconnected(self, transport):
        members.discard(transport)

    def on_ws_frame(self, transport, frame):
        if frame.msg_type != WSMsgType.TEXT:
            return
        message = frame.get_payload_as_bytes() + "--返回数据".encode()
        for member in members:
            member.send(WSMsgType.TEXT, message)


async def main():
    port = int(sys.argv[1])
    server = await ws_create_server(lambda request: Member(), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


uvloop.run(main())
