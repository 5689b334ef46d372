"""One way to do each of the exercises: try it yourself first.

python tests/exercises/solutions.py typing
"""

import json
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import chatstream
from chatstream import WS_JSON, Demo, EventLog, Member, Problem, Service


class Typist(Member):
    async def tell(self, room, said):
        if self.framing is WS_JSON and json.loads(said).get("typing"):
            await room.publish("typing", self.name)
        else:
            await super().tell(room, said)


class Shout(Demo):
    def text(self, messages):
        return messages[-1]["content"].upper()


class TwoModels(Demo):
    async def write(self, answer, body, authorization):
        write = Shout().write if body.get("model") == "shout" else super().write
        await write(answer, body, authorization)

    async def models(self, authorization):
        models = json.loads(await super().models(authorization))
        models["data"].append({**models["data"][0], "id": "shout"})
        return json.dumps(models)


class Voter(Member):
    votes = {}  # noqa: RUF012 (one poll for the whole room)

    async def tell(self, room, said):
        await super().tell(room, said)
        command, *words = self.text_of(said).split()
        if command == "/poll":
            self.votes.clear()
            self.votes.update(dict.fromkeys(words, 0))
        elif command == "/vote" and words[0] in self.votes:
            self.votes[words[0]] += 1
        else:
            return
        counts = ", ".join(f"{word} {votes}" for word, votes in self.votes.items())
        await room.publish("message", "poll", counts)


class Notes(Service):
    def __init__(self, *settings):
        super().__init__(*settings)
        self.notes = EventLog("notes", 1000, on_news=self.pump.notify)

    def routes(self, path):
        own = {"GET": self.get_notes, "POST": self.post_note}
        return own if path == "/notes" else super().routes(path)

    async def post_note(self, request):
        self.notes.append(request.body.decode())
        await request.respond(204)

    async def get_notes(self, request):
        place = self.notes.place_after(request.last_event_id)
        await self.stream(request, self.notes, place or self.notes.start)

    async def end(self):
        self.notes.close()
        await super().end()


class Patient(Service):
    asked = ()

    async def post_answer(self, request, seed):
        now = trio.current_time()
        self.asked = [at for at in self.asked if at > now - 1]
        if len(self.asked) == 3:
            wait = {"retry-after": "1"}
            raise Problem(429, "three questions a second", "rate_limit", headers=wait)
        self.asked.append(now)
        await super().post_answer(request, seed)


SOLUTIONS = {
    "typing": {"Member": Typist},
    "model": {"Demo": TwoModels},
    "poll": {"Member": Voter},
    "endpoint": {"Service": Notes},
    "rate": {"Service": Patient},
}

if __name__ == "__main__":
    vars(chatstream).update(SOLUTIONS[sys.argv[1]])
    sys.exit(chatstream.main(sys.argv[2:]))
