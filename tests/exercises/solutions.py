"""One way to do each of the exercises: try it yourself first.

python tests/exercises/solutions.py typing
"""

import json
import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import chatstream
from chatstream import (
    OWN,
    ROUTES,
    WS_JSON,
    App,
    Demo,
    EventLog,
    Member,
    Problem,
    Route,
    Said,
    Server,
    list_models,
)


class Typist(Member):
    async def pass_on(self, say, message):
        if self.framing is WS_JSON and json.loads(message).get("typing"):
            await say(Said("typing", self.name))
        else:
            await super().pass_on(say, message)


class TwoModels(Demo):
    def words(self, asked):
        if asked.get("model") == "shout":
            return [asked["messages"][-1]["content"].upper()]
        return super().words(asked)

    async def models(self, headers, query=""):
        return list_models(["demo", "shout"])


class Voter(Member):
    votes = {}  # noqa: RUF012 (one poll for the whole room)

    async def pass_on(self, say, message):
        await super().pass_on(say, message)
        command, *words = self.parse(message).text.split()
        if command == "/poll":
            self.votes.clear()
            self.votes.update(dict.fromkeys(words, 0))
        elif command == "/vote" and words[0] in self.votes:
            self.votes[words[0]] += 1
        else:
            return
        counts = ", ".join(f"{word} {votes}" for word, votes in self.votes.items())
        await say(Said("message", "poll", counts))


class Notes(App):
    def __init__(self, *settings):
        super().__init__(*settings)
        self.notes = EventLog("notes", 1000, on_news=self.pump.notify)

    async def post_note(self, request):
        self.notes.append(request.body.decode())
        await request.respond(204)

    async def get_notes(self, request):
        place = self.notes.place_after(request.last_event_id)
        await self.stream(request, self.notes, place or self.notes.start)


class NotesServer(Server):
    async def end(self):
        self.app.notes.close()
        await super().end()


HANDLERS = {"GET": Notes.get_notes, "POST": Notes.post_note}
WITH_NOTES = [*ROUTES, Route("/notes", OWN, HANDLERS)]


class Patient(App):
    asked = ()

    async def post_answer(self, request, api):
        now = trio.current_time()
        self.asked = [at for at in self.asked if at > now - 1]
        if len(self.asked) == 3:
            wait = {"retry-after": "1"}
            raise Problem(429, "three questions a second", "rate_limit", headers=wait)
        self.asked.append(now)
        await super().post_answer(request, api)


SOLUTIONS = {
    "typing": {"Member": Typist},
    "model": {"Demo": TwoModels},
    "poll": {"Member": Voter},
    "endpoint": {"App": Notes, "Server": NotesServer, "ROUTES": WITH_NOTES},
    "rate": {"App": Patient},
}

if __name__ == "__main__":
    vars(chatstream).update(SOLUTIONS[sys.argv[1]])
    sys.exit(chatstream.main(sys.argv[2:]))
