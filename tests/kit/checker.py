"""The checker for event streams, run as its users run it."""

import json
import os
import subprocess
import sys

from .common import ROOT

CHECKER = [sys.executable, str(ROOT / "tests" / "check_stream.py")]


class Report:
    """What the checker says of a stream."""

    def __init__(self, url, *options, **environment):
        command = [*CHECKER, url, "--seconds", "1", *options, "--json"]
        env = os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
        assert not done.stderr
        self.code, self.json = done.returncode, json.loads(done.stdout)
        self.findings = {one["name"]: one for one in self.json["findings"]}

    def __repr__(self):
        return json.dumps(self.json, indent=2)

    def result(self, name):
        return self.findings[name]["result"]

    def says(self, name):
        return self.findings[name]["says"]
